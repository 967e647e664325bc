"""A timm model with branches, by name, and the files of branches: of published networks, and of checkpoints.

Beside a published backbone lie ``branches.safetensors`` and ``dks_config.json``; timm loads it as it does any other.
"""
import json
import logging
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import parse_model_name

from .._compat import download_from_hf
from ..errors import InputError
from .model import DKSModel
from .plan import WEIGHT_PLACES

_logger = logging.getLogger(__name__)

BRANCH_CONFIG = 'dks_config.json'
BRANCH_WEIGHTS = 'branches.safetensors'

_LAYOUT = ('stages', 'branches', 'branch_kwargs', 'budget', 'image_size')


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
    """Create a timm model with supervision branches (Sun et al., CVPR 2019, section 3).

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
    layout = dict(stages=stages, branches=branches, branch_kwargs=branch_kwargs, budget=budget, image_size=image_size)
    backbone = timm.create_model(model_name, pretrained=pretrained, **timm_kwargs)
    return add_branches(backbone, model_name, pretrained, timm_kwargs, layout=layout, batch_fraction=batch_fraction)


def add_branches(
        backbone: nn.Module, model_name: str, pretrained: bool, timm_kwargs: Dict[str, Any], *,
        layout: Dict[str, Any], batch_fraction: float = 1.0,
) -> DKSModel:
    """Attach branches to what ``timm.create_model(model_name, pretrained, **timm_kwargs)`` returned, and load weights.

    ``layout`` has the arguments of :meth:`DKSModel.from_timm` that decide about the branches.
    """
    cache_dir = timm_kwargs.get('cache_dir')
    defaults = dict(stages=None, branches='auto', branch_kwargs={}, budget=None)
    by_default = all(layout[name] in (value, None) for name, value in defaults.items())
    published = read_layout(model_name, cache_dir) if by_default else None
    if published:
        if backbone.pretrained_cfg.get('fixed_input_size'):
            published['image_size'] = layout['image_size']  # the published one may not be that of this backbone
        layout = published
    net = DKSModel.from_timm(backbone, model_kwargs=timm_kwargs, batch_fraction=batch_fraction, **layout)
    from_elsewhere = timm_kwargs.get('checkpoint_path') or timm_kwargs.get('pretrained_cfg_overlay')
    if published and pretrained and not from_elsewhere:
        load_branches(net, read_weights(model_name, cache_dir), model_name, adapt=True)
    elif pretrained or timm_kwargs.get('checkpoint_path'):
        for branch in net.branches:
            if branch.kind == 'tail':
                branch.start_from(backbone)
    return net


def plain_tensors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return tensors that safetensors takes, without the statistics that split BatchNorm keeps for training."""
    return {
        name: tensor.to('cpu', copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items() if '.aux_bn.' not in name
    }


def save_branches(net: nn.Module, folder: Path) -> None:
    """Write a DKSModel's branches beside its backbone, or raise ValueError where nothing could make them again."""
    if not net.layout:
        raise InputError('keep_branches needs a network made by create_dks_model or DKSModel.from_timm')
    try:
        config = json.dumps(net.layout, indent=2)
    except TypeError as e:  # of a type that JSON does not have
        raise InputError(f'keep_branches cannot write branch_kwargs {net.layout["branch_kwargs"]}: {e}') from e
    save_file(plain_tensors(net.branches.state_dict()), folder / BRANCH_WEIGHTS)
    (folder / BRANCH_CONFIG).write_text(config)


def _find(model_name: str, filename: str, cache_dir: Optional[str] = None) -> Optional[Path]:
    """Return a file beside the weights of a ``local-dir:`` or ``hf-hub:`` model, None where there is none."""
    source, name = parse_model_name(model_name)
    if source == 'local-dir' and Path(name, filename).is_file():
        return Path(name, filename)
    if source == 'hf-hub':
        try:
            return Path(download_from_hf(name, filename, cache_dir))
        except LocalEntryNotFoundError:
            _logger.warning(f'The Hub cannot be asked whether {model_name} has branches: they start fresh.')
        except EntryNotFoundError:
            pass
    return None


def read_layout(model_name: str, cache_dir: Optional[str] = None) -> Optional[Dict[str, Any]]:
    """Return the arguments of ``DKSModel.from_timm`` that made the branches of a published network, None without."""
    path = _find(model_name, BRANCH_CONFIG, cache_dir)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
        layout = {key: config[key] for key in _LAYOUT}
        foreign = {*WEIGHT_PLACES} & {key.rpartition('.')[2] for key in layout['branch_kwargs']}
    except (LookupError, TypeError, ValueError) as e:  # not JSON, or other things in it
        raise InputError(f'{BRANCH_CONFIG} of {model_name} is not one of a published network: {e!r}') from e
    if foreign:
        raise InputError(f'{BRANCH_CONFIG} of {model_name} has branch_kwargs that are not accepted: {sorted(foreign)}')
    return layout


def read_weights(model_name: str, cache_dir: Optional[str] = None) -> Dict[str, torch.Tensor]:
    """Return the weights of published branches; raise ValueError where they are missing or cannot be read."""
    path = _find(model_name, BRANCH_WEIGHTS, cache_dir)
    if path is None:
        raise InputError(f'{model_name} has {BRANCH_CONFIG}, but no {BRANCH_WEIGHTS}')
    try:
        return load_file(path)
    except SafetensorError as e:
        raise InputError(f'{BRANCH_WEIGHTS} of {model_name} cannot be read: {e!r}') from e


def load_branches(net: nn.Module, weights: Dict[str, torch.Tensor], source: str, adapt: bool = False) -> None:
    """Load weights into the branches of a DKSModel, or raise ValueError and load nothing where they are of others.

    With ``adapt``, what has another shape stays freshly initialised, above all a classifier for other classes.
    """
    own = net.branches.state_dict()
    fresh = [name for name in own if adapt and name in weights and own[name].shape != weights[name].shape]
    if fresh:
        _logger.info(f'{source} was trained with other shapes; in its branches start fresh: {", ".join(fresh)}.')
        weights.update({name: own[name] for name in fresh})
    check_fit(own, weights, f'{source} holds other branches than this model has')
    net.branches.load_state_dict(weights)


def check_fit(own: Dict[str, torch.Tensor], given: Dict[str, torch.Tensor], complaint: str) -> None:
    """Raise ValueError for a state dict with other entries or shapes than the model's own, naming the first of them."""
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, given))
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f'{complaint}: {name} is {theirs.get(name, "missing")} there and '
                f'{ours.get(name, "missing")} in the model')
