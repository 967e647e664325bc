"""DenseNet for 32x32 images, without bottlenecks and compression.

Paper: `Densely Connected Convolutional Networks`, section 4 - https://arxiv.org/abs/1608.06993
"""
from typing import Any, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, create_conv2d, to_ntuple
from timm.models import generate_default_cfgs, register_model

from ._cifar import CifarNet, check_layout, cifar_cfg, create_cifar_model

__all__ = ['DenseLayer', 'DenseNetCifar', 'Transition']  # register_model adds the entry points


class DenseLayer(nn.Module):
    """Norm, activation and a 3x3 convolution, whose output is appended to the input's channels."""

    def __init__(self, in_chs: int, growth_rate: int, proj_drop: float, **dd: Any):
        super().__init__()
        self.norm = BatchNormAct2d(in_chs, **dd)
        self.conv = create_conv2d(in_chs, growth_rate, 3, **dd)
        self.drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.drop(self.conv(self.norm(x)))], 1)


class Transition(nn.Module):
    """Halves the resolution between dense blocks; the number of channels stays."""

    def __init__(self, in_chs: int, proj_drop: float, **dd: Any):
        super().__init__()
        self.norm = BatchNormAct2d(in_chs, **dd)
        self.conv = create_conv2d(in_chs, in_chs, 1, **dd)
        self.drop = nn.Dropout(proj_drop)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.drop(self.conv(self.norm(x))))


class DenseNetCifar(CifarNet):
    """DenseNet with a 3x3 stem at full resolution. A stage is a dense block, all but the first after a transition.

    Args:
        layers: Number of layers in each dense block.
        growth_rate: Channels that a layer adds; one number, or one for each block.
        stem_width: Channels of the stem.
        num_classes, in_chans, global_pool, drop_rate: As in timm's models.
        proj_drop_rate: Dropout after the convolution of each layer and transition.
    """

    def __init__(
            self,
            layers: Tuple[int, ...],
            growth_rate: Union[int, Tuple[int, ...]] = 12,
            stem_width: int = 16,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        growth_rates = to_ntuple(len(layers))(growth_rate)
        check_layout(layers, growth_rate=growth_rates)
        dd = {'device': device, 'dtype': dtype}

        stages, stage_chs = [], []
        chs = stem_width
        for stage_idx, (depth, growth) in enumerate(zip(layers, growth_rates, strict=True)):
            blocks = [Transition(chs, proj_drop_rate, **dd)] if stage_idx > 0 else []
            for _ in range(depth):
                blocks.append(DenseLayer(chs, growth, proj_drop_rate, **dd))
                chs += growth
            stages.append(nn.Sequential(*blocks))
            stage_chs.append(chs)

        stem, norm = create_conv2d(in_chans, stem_width, 3, **dd), BatchNormAct2d(chs, **dd)
        super().__init__(stem, stem_width, stages, stage_chs, norm, num_classes, in_chans, global_pool, drop_rate, **dd)


default_cfgs = generate_default_cfgs({'densenet_40_12_cifar': cifar_cfg(first_conv='stem')})


@register_model
def densenet_40_12_cifar(pretrained: bool = False, **kwargs) -> DenseNetCifar:
    """DenseNet-40 with growth rate 12 for 32x32 images, 12 layers a block."""
    model_args = dict(layers=(12, 12, 12), growth_rate=12)
    return create_cifar_model(DenseNetCifar, 'densenet_40_12_cifar', pretrained, **dict(model_args, **kwargs))
