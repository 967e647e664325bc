"""Residual networks for 32x32 images, plain and wide.

Papers:
* `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
* `Wide Residual Networks` - https://arxiv.org/abs/1605.07146
"""
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_conv2d,
    get_act_layer,
    get_norm_act_layer,
    get_norm_layer,
)
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from ._cifar import CifarNet, check_layout, cifar_cfg, create_cifar_model

__all__ = ['PadShortcut', 'PreActBlock', 'ResNet3x3', 'ResNetCifar']  # register_model adds the entry points


class PadShortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, new channels are zero (option A of He et al.)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1):
        super().__init__()
        if out_chs < in_chs:
            raise ValueError(
                f'channels shrinks from {in_chs} to {out_chs}; shortcuts without parameters can only add channels')
        self.new_chs = out_chs - in_chs
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.new_chs))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and activation, with dropout between them (Zagoruyko and Komodakis).

    The first convolution and the shortcut have the stride. ``drop_path`` is a module for stochastic depth.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            proj_drop: float = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: Optional[nn.Module] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = create_conv2d(in_chs, out_chs, 3, stride=stride, **dd)
        self.norm2 = norm_act_layer(out_chs, **dd)
        self.drop = nn.Dropout(proj_drop)
        self.conv2 = create_conv2d(out_chs, out_chs, 3, **dd)
        self.drop_path = drop_path or nn.Identity()
        # The projection sees the activated input, the identity the raw one.
        projects = stride != 1 or in_chs != out_chs
        self.downsample = create_conv2d(in_chs, out_chs, 1, stride=stride, **dd) if projects else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.norm1(x)
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.norm2(x)
        x = self.drop(x)
        x = self.conv2(x)
        return self.drop_path(x) + shortcut


class ResNetCifar(CifarNet):
    """ResNet with a 3x3 stem at full resolution; every stage but the first begins with stride 2.

    With ``preact``, blocks are :class:`PreActBlock` with a projection where the shape changes (wide residual networks),
    else timm's ``BasicBlock`` with shortcuts without parameters.
    """

    def __init__(
            self,
            layers: Tuple[int, ...],
            channels: Tuple[int, ...] = (16, 32, 64),
            preact: bool = False,
            stem_width: Optional[int] = None,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            layers: Number of blocks in each stage.
            channels: Channels of each stage.
            preact: Norm and activation before the convolutions, not after.
            stem_width: Channels of the stem, None for those of the first stage.
            num_classes: Number of classes.
            in_chans: Input channels.
            global_pool: Type of the global pooling.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout between the convolutions of a block, with ``preact``.
            drop_path_rate: Stochastic depth rate.
        """
        check_layout(layers, channels=channels)
        stem_width = stem_width or channels[0]
        if proj_drop_rate and not preact:
            raise ValueError(f'proj_drop_rate is {proj_drop_rate}, but only blocks of a wide network have such dropout')
        dd = {'device': device, 'dtype': dtype}
        common = dict(act_layer=get_act_layer(act_layer), norm_layer=get_norm_layer(norm_layer), **dd)
        if preact:
            stem = create_conv2d(in_chans, stem_width, 3, **dd)
            norm = get_norm_act_layer(norm_layer, act_layer)(channels[-1], **dd)
        else:
            stem = ConvNormAct(in_chans, stem_width, 3, norm_layer=norm_layer, act_layer=act_layer, **dd)
            norm = nn.Identity()

        stages = []
        in_chs = stem_width
        rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        for stage_idx, (stage_rates, out_chs) in enumerate(zip(rates, channels, strict=True)):
            blocks = []
            for block_idx, rate in enumerate(stage_rates):
                stride = 2 if stage_idx > 0 and block_idx == 0 else 1
                drop_path = DropPath(rate) if rate > 0. else None
                if preact:
                    block = PreActBlock(in_chs, out_chs, stride, proj_drop_rate, drop_path=drop_path, **common)
                else:
                    same = stride == 1 and in_chs == out_chs
                    shortcut = None if same else PadShortcut(in_chs, out_chs, stride)
                    block = BasicBlock(in_chs, out_chs, stride, shortcut, drop_path=drop_path, **common)
                blocks.append(block)
                in_chs = out_chs
            stages.append(nn.Sequential(*blocks))

        super().__init__(
            stem, stem_width, stages, channels, norm, num_classes, in_chans, global_pool, drop_rate, **dd)


class ResNet3x3(ResNet):
    """timm's ResNet with a 3x3 stem of stride 1 and no max-pooling, so that 32x32 images reach the head as 4x4.

    Arguments and weights' initialization are timm's (the last norm of a block starts from zero).
    """

    def __init__(self, *args, in_chans: int = 3, device=None, dtype=None, **kwargs):
        super().__init__(*args, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        self.conv1 = create_conv2d(in_chans, self.bn1.num_features, 3, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        stem, *stages = self.feature_info
        self.feature_info = [dict(stem, reduction=1)]
        self.feature_info += [dict(stage, reduction=stage['reduction'] // 4) for stage in stages]


# Blocks per stage and channels of each network.
_RESNETS = {
    'resnet20_cifar': 3,
    'resnet32_cifar': 5,
    'resnet44_cifar': 7,
    'resnet56_cifar': 9,
    'resnet110_cifar': 18,
}
_WIDE_RESNETS = {
    'wrn_16_2_cifar': (2, (32, 64, 128)),
    'wrn_28_10_cifar': (4, (160, 320, 640)),
    'wrn_40_4_cifar': (6, (64, 128, 256)),
}

default_cfgs = generate_default_cfgs({
    **{name: cifar_cfg() for name in _RESNETS},
    **{name: cifar_cfg(first_conv='stem') for name in _WIDE_RESNETS},
    'resnet18_cifar': cifar_cfg(pool_size=(4, 4), first_conv='conv1', classifier='fc'),
    'resnet50_cifar': cifar_cfg(pool_size=(4, 4), first_conv='conv1', classifier='fc'),
})


def _register(name: str, doc: str, **model_args: Any) -> None:
    """Register an entry point, as the decorator of timm's own does, and make it a function of this module."""
    def entry_point(pretrained: bool = False, **kwargs) -> ResNetCifar:
        return create_cifar_model(ResNetCifar, name, pretrained, **dict(model_args, **kwargs))

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = doc
    globals()[name] = register_model(entry_point)


for _name, _blocks in _RESNETS.items():
    _register(_name, f'ResNet for 32x32 images, {_blocks} blocks a stage.', layers=(_blocks,) * 3)

for _name, (_blocks, _channels) in _WIDE_RESNETS.items():
    _doc = f'Wide ResNet for 32x32 images, {_blocks} blocks a stage with {_channels} channels.'
    _register(_name, _doc, layers=(_blocks,) * 3, channels=_channels, preact=True, stem_width=16)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> ResNet3x3:
    """ResNet-18 with a 3x3 stem and no max-pooling."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build_model_with_cfg(ResNet3x3, 'resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs) -> ResNet3x3:
    """ResNet-50 with a 3x3 stem and no max-pooling."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_model_with_cfg(ResNet3x3, 'resnet50_cifar', pretrained, **dict(model_args, **kwargs))
