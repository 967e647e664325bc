"""The common part of the paper's CIFAR networks: everything but their blocks."""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq

from .._compat import feature_take_indices


def cifar_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Return timm's configuration of a network for 32x32 images; there are no pretrained weights."""
    return {
        'url': '',
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': (125.3 / 255, 123.0 / 255, 113.9 / 255),  # of the training images, as the paper has them
        'std': (63.0 / 255, 62.1 / 255, 66.7 / 255),
        'first_conv': 'stem.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def create_cifar_model(model_cls: type, variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a :class:`CifarNet` from its configuration, with all its stages as the default features."""
    feature_cfg = dict(out_indices=tuple(range(len(kwargs['layers']) + 1)), flatten_sequential=True)
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def check_layout(layers: Sequence[int], **per_stage: Sequence[Any]) -> None:
    """Raise ValueError for a stage without blocks, and for arguments without one value for each stage."""
    if not layers or min(layers) < 1:
        raise ValueError(f'layers is {tuple(layers)}; give each stage at least one block')
    for name, values in per_stage.items():
        if len(values) != len(layers):
            raise ValueError(f'{name} is {tuple(values)}, but layers has {len(layers)} stages; give one value for each')


class CifarNet(nn.Module):
    """Stem, stages of which each but the first halves the resolution, norm, classifier.

    ``feature_info`` has the stem as entry 0 and stage i as entry i + 1. Convolutions start from Kaiming's normal
    distribution (fan out), BatchNorm from weight 1 and bias 0; the paper's authors draw its weights from U(0, 1).
    """

    def __init__(
            self, stem, stem_chs: int, stages: List[nn.Sequential], stage_chs: Sequence[int], norm,
            num_classes: int, in_chans: int, global_pool: str, drop_rate: float, **dd: Any,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.num_features = stage_chs[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.feature_info = [dict(num_chs=stem_chs, reduction=1, module='stem')]
        self.feature_info += [
            dict(num_chs=chs, reduction=2 ** i, module=f'stages.{i}') for i, chs in enumerate(stage_chs)]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw new weights for convolutions, and clear the classifier's bias."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return patterns that group parameters by stage if coarse, else by block."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling where ``global_pool`` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the final features and those of some entries of ``feature_info`` (the last n if int, all if None)."""
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        intermediates = []

        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        stages = self.stages[:max_index] if stop_early else self.stages
        for feat_idx, stage in enumerate(stages, 1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if feat_idx in take_indices:
                last = feat_idx == len(self.stages)
                intermediates.append(self.norm(x) if norm and last else x)

        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop what the given entries of ``feature_info`` do not need; return them as non-negative indices."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        prune_end = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head.in_features = self.num_features
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features before pooling [B, C, H, W]."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.norm(checkpoint_seq(self.stages, x, flatten=True))
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits [B, num_classes] of final features, or the pooled features [B, num_features]."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
