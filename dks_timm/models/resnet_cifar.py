"""Residual networks for 32x32 images, plain and wide.

Papers:
* `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
* `Wide Residual Networks` - https://arxiv.org/abs/1605.07146
"""
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, calculate_drop_path_rates, create_conv2d
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

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, proj_drop: float = 0., drop_path=None, **dd: Any):
        super().__init__()
        self.norm1 = BatchNormAct2d(in_chs, **dd)
        self.conv1 = create_conv2d(in_chs, out_chs, 3, stride=stride, **dd)
        self.norm2 = BatchNormAct2d(out_chs, **dd)
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
        x = self.conv2(self.drop(self.norm2(self.conv1(x))))
        return self.drop_path(x) + shortcut


class ResNetCifar(CifarNet):
    """ResNet with a 3x3 stem at full resolution; every stage but the first begins with stride 2.

    With ``preact``, blocks are :class:`PreActBlock` with a projection where the shape changes (wide residual networks),
    else timm's ``BasicBlock`` with shortcuts without parameters.

    Args:
        layers: Number of blocks in each stage.
        channels: Channels of each stage.
        preact: Norm and activation before the convolutions, not after.
        stem_width: Channels of the stem, None for those of the first stage.
        num_classes, in_chans, global_pool, drop_rate: As in timm's models.
        proj_drop_rate: Dropout between the convolutions of a block, with ``preact``.
        drop_path_rate: Stochastic depth rate.
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
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        check_layout(layers, channels=channels)
        stem_width = stem_width or channels[0]
        if proj_drop_rate and not preact:
            raise ValueError(f'proj_drop_rate is {proj_drop_rate}, but only blocks of a wide network have such dropout')
        dd = {'device': device, 'dtype': dtype}
        if preact:
            stem, norm = create_conv2d(in_chans, stem_width, 3, **dd), BatchNormAct2d(channels[-1], **dd)
        else:
            stem, norm = ConvNormAct(in_chans, stem_width, 3, **dd), nn.Identity()

        stages = []
        in_chs = stem_width
        rates = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        for stage_idx, (stage_rates, out_chs) in enumerate(zip(rates, channels, strict=True)):
            blocks = []
            for block_idx, rate in enumerate(stage_rates):
                stride = 2 if stage_idx > 0 and block_idx == 0 else 1
                drop_path = DropPath(rate) if rate > 0. else None
                if preact:
                    block = PreActBlock(in_chs, out_chs, stride, proj_drop_rate, drop_path, **dd)
                else:
                    same = stride == 1 and in_chs == out_chs
                    shortcut = None if same else PadShortcut(in_chs, out_chs, stride)
                    block = BasicBlock(in_chs, out_chs, stride, shortcut, drop_path=drop_path, **dd)
                blocks.append(block)
                in_chs = out_chs
            stages.append(nn.Sequential(*blocks))

        super().__init__(stem, stem_width, stages, channels, norm, num_classes, in_chans, global_pool, drop_rate, **dd)


class ResNet3x3(ResNet):
    """timm's ResNet with a 3x3 stem of stride 1 and no max-pooling, so that 32x32 images reach the head as 4x4."""

    def __init__(self, *args, in_chans: int = 3, device=None, dtype=None, **kwargs):
        super().__init__(*args, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        self.conv1 = create_conv2d(in_chans, self.bn1.num_features, 3, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        self.feature_info = [dict(stage, reduction=max(1, stage['reduction'] // 4)) for stage in self.feature_info]


# Each network: its class and arguments.
_NETWORKS = {
    'resnet8_cifar': (ResNetCifar, dict(layers=(1, 1, 1))),
    'resnet20_cifar': (ResNetCifar, dict(layers=(3, 3, 3))),
    'resnet32_cifar': (ResNetCifar, dict(layers=(5, 5, 5))),
    'resnet44_cifar': (ResNetCifar, dict(layers=(7, 7, 7))),
    'resnet56_cifar': (ResNetCifar, dict(layers=(9, 9, 9))),
    'resnet110_cifar': (ResNetCifar, dict(layers=(18, 18, 18))),
    'wrn_16_2_cifar': (ResNetCifar, dict(layers=(2, 2, 2), channels=(32, 64, 128), preact=True, stem_width=16)),
    'wrn_28_10_cifar': (ResNetCifar, dict(layers=(4, 4, 4), channels=(160, 320, 640), preact=True, stem_width=16)),
    'wrn_40_4_cifar': (ResNetCifar, dict(layers=(6, 6, 6), channels=(64, 128, 256), preact=True, stem_width=16)),
    'resnet18_cifar': (ResNet3x3, dict(block=BasicBlock, layers=(2, 2, 2, 2))),
    'resnet50_cifar': (ResNet3x3, dict(block=Bottleneck, layers=(3, 4, 6, 3))),
}


default_cfgs = generate_default_cfgs({
    name: cifar_cfg(pool_size=(4, 4), first_conv='conv1', classifier='fc') if cls is ResNet3x3
    else cifar_cfg(first_conv='stem' if 'preact' in model_args else 'stem.conv')
    for name, (cls, model_args) in _NETWORKS.items()
})


def _register(name: str, cls: type, model_args: dict) -> None:
    """Register an entry point, as the decorator of timm's own does, and make it a function of this module."""
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        create = build_model_with_cfg if cls is ResNet3x3 else create_cifar_model
        return create(cls, name, pretrained, **dict(model_args, **kwargs))

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f'{cls.__name__} of {model_args["layers"]} blocks for 32x32 images.'
    globals()[name] = register_model(entry_point)


for _name, _network in _NETWORKS.items():
    _register(_name, *_network)
