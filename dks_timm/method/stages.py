"""Which stages a timm model offers, and which of them to supervise.

A stage is an index into the model's ``feature_info``, the metadata behind ``features_only``: the same numbers that
``out_indices`` takes. Negative numbers count from the end.
"""
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch.nn as nn

from ..errors import InputError

__all__ = ['Stage', 'list_stages', 'resolve_stages']


@dataclass(frozen=True)
class Stage:
    """One entry of a model's ``feature_info``.

    Attributes:
        index: Position in ``feature_info``.
        module: timm's name for the place the features come from; not always the path of a module.
        channels: Number of channels of the features.
        reduction: Stride of the features relative to the input, in pixels.
    """
    index: int
    module: str
    channels: int
    reduction: int

    def __str__(self) -> str:
        return f'{self.index} ({self.module}, {self.channels} channels, /{self.reduction})'


def list_stages(model: nn.Module) -> List[Stage]:
    """List the stages of a timm model, shallowest first.

    Raises:
        ValueError: The model carries no ``feature_info``.
    """
    feature_info = getattr(model, 'feature_info', None)
    if not feature_info:
        raise InputError(f'{type(model).__name__} has no feature_info, so its stages are unknown; use a timm model.')
    entries = getattr(feature_info, 'info', feature_info)
    return [Stage(i, str(e['module']), e['num_chs'], e['reduction']) for i, e in enumerate(entries)]


def _default_stages(stages: Sequence[Stage]) -> Tuple[int, ...]:
    count = len(stages)
    if len({s.reduction for s in stages}) > 1:
        return tuple(range(max(0, count - 3), count - 1))
    # One resolution throughout: depth is all that tells stages apart. Entry i closes (i + 1) / count of the depth.
    nearest = (round(count * part) - 1 for part in (0.5, 0.75))
    return tuple(sorted({min(max(i, 0), count - 2) for i in nearest}))


def resolve_stages(model: nn.Module, stages: Optional[Sequence[int]] = None) -> Tuple[int, ...]:
    """Return the stages to supervise, as ascending non-negative indices.

    Args:
        model: timm model.
        stages: Indices into ``feature_info``, negative ones count from the end. None takes the two entries before the
            last where the reductions differ, and the ones nearest 1/2 and 3/4 of the depth where they do not.

    Raises:
        ValueError: A stage that does not exist, the last one (the backbone's own classifier sits there), one given
            twice, or none at all (the backbone would have nobody to learn from).
    """
    available = list_stages(model)
    count = len(available)
    menu = 'stages: ' + ', '.join(str(s) for s in available[:-1])
    if count < 2:
        raise InputError(f'{type(model).__name__} has a single stage, so there is none before its last to supervise.')
    if stages is None:
        return _default_stages(available)
    if len(stages) == 0:
        raise InputError(f'stages is empty, but DKS needs at least two classifiers; choose at least one of the {menu}')
    resolved = []
    for stage in stages:
        if isinstance(stage, bool) or not isinstance(stage, int) or not -count <= stage < count:
            raise InputError(f'stages has {stage!r}, which this model does not have; choose from the {menu}')
        index = stage % count
        if index == count - 1:
            raise InputError(
                f'stages has {stage}, the last one, where the backbone has its own classifier; choose from the {menu}')
        if index in resolved:
            raise InputError(f'stages has {stage} twice; choose different ones from the {menu}')
        resolved.append(index)
    return tuple(sorted(resolved))
