"""The stages of a timm model: indices into its ``feature_info``, the same numbers that ``out_indices`` takes."""
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch.nn as nn

from ..errors import InputError


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
    """List the stages of a timm model, shallowest first; raise ValueError if it carries no ``feature_info``."""
    feature_info = getattr(model, 'feature_info', None)
    if not feature_info:
        raise InputError(f'{type(model).__name__} has no feature_info, so its stages are unknown; use a timm model.')
    entries = getattr(feature_info, 'info', feature_info)
    return [Stage(i, str(e['module']), e['num_chs'], e['reduction']) for i, e in enumerate(entries)]


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
    if count < 2:
        raise InputError(f'{type(model).__name__} has a single stage, so there is none before its last to supervise.')
    if stages is None and len({s.reduction for s in available}) > 1:
        return tuple(range(max(0, count - 3), count - 1))
    if stages is None:  # depth is all that tells stages apart: entry i closes (i + 1) / count of it
        nearest = (round(count * part) - 1 for part in (0.5, 0.75))
        return tuple(sorted({min(max(i, 0), count - 2) for i in nearest}))
    menu = 'choose from the stages: ' + ', '.join(str(s) for s in available[:-1])
    if len(stages) == 0:
        raise InputError(f'stages is empty, but DKS needs at least two classifiers; {menu}')
    resolved = set()
    for stage in stages:
        if not isinstance(stage, int) or not -count <= stage < count or stage % count == count - 1:
            raise InputError(f'stages has {stage!r}, which is none before the last; {menu}')
        if stage % count in resolved:
            raise InputError(f'stages has {stage} twice; {menu}')
        resolved.add(stage % count)
    return tuple(sorted(resolved))
