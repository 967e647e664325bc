"""A timm model with supervision branches, by name; those of a published model come back with their weights."""
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch.nn as nn

from .branch_files import load_branches, read_layout, read_weights
from .model import DKSModel

__all__ = ['add_branches', 'create_dks_model']


def create_dks_model(
        model_name: str,
        pretrained: bool = False,
        stages: Optional[Sequence[int]] = None,
        branches: str = 'auto',
        branch_kwargs: Optional[Dict[str, Any]] = None,
        budget: Optional[float] = None,
        image_size: Optional[Tuple[int, int]] = None,
        batch_fraction: float = 1.0,
        **timm_kwargs: Any,
) -> DKSModel:
    """Create a timm model with supervision branches.

    Where a published model was exported with its branches, they come back too, unless ``stages``, ``branches``,
    ``branch_kwargs`` or ``budget`` ask for others. With another number of classes, their classifiers are fresh.

    Args:
        model_name: Any name ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` ones included.
        pretrained: Load pretrained weights, those of published branches included. Other tails start from the
            backbone's wherever name and shape agree.
        stages, branches, branch_kwargs, budget, image_size, batch_fraction: See :meth:`DKSModel.from_timm`.
        **timm_kwargs: Further arguments of ``timm.create_model``, for the backbone and the templates of its branches.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: See :meth:`DKSModel.from_timm`.

    Example:
        >>> import dks_timm
        >>> net = dks_timm.create_dks_model('test_resnet', num_classes=10, stages=(1, -2), branches='conv')
        >>> net.stages, [branch.kind for branch in net.branches]
        ((1, 3), ['conv', 'conv'])
    """
    layout = dict(
        stages=stages, branches=branches, branch_kwargs=branch_kwargs, budget=budget, image_size=image_size)
    backbone = timm.create_model(model_name, pretrained=pretrained, **timm_kwargs)
    return add_branches(backbone, model_name, pretrained, timm_kwargs, layout=layout, batch_fraction=batch_fraction)


def add_branches(
        backbone: nn.Module,
        model_name: str,
        pretrained: bool,
        timm_kwargs: Dict[str, Any],
        *,
        layout: Dict[str, Any],
        batch_fraction: float = 1.0,
) -> DKSModel:
    """Attach branches to what ``timm.create_model(model_name, pretrained, **timm_kwargs)`` returned, and load weights.

    Args:
        layout: The arguments of :meth:`DKSModel.from_timm` that decide about the branches.
    """
    cache_dir = timm_kwargs.get('cache_dir')
    defaults = dict(stages=None, branches='auto', branch_kwargs={}, budget=None)
    published = None
    if all(layout[name] in (value, None) for name, value in defaults.items()):
        published = read_layout(model_name, cache_dir)
    if published:
        if backbone.pretrained_cfg.get('fixed_input_size'):
            published['image_size'] = layout['image_size']  # the published one may not be that of this backbone
        layout = published
    net = DKSModel.from_timm(backbone, model_kwargs=timm_kwargs, batch_fraction=batch_fraction, **layout)
    from_elsewhere = timm_kwargs.get('checkpoint_path') or timm_kwargs.get('pretrained_cfg_overlay')
    if published and pretrained and not from_elsewhere:
        load_branches(net, read_weights(model_name, cache_dir), model_name, adapt=True)
    elif pretrained or from_elsewhere:
        for branch in net.branches:
            if branch.kind == 'tail':
                branch.start_from(backbone)
    return net
