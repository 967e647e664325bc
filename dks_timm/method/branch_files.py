"""The branches beside a published backbone: ``branches.safetensors`` and ``dks_config.json``.

timm loads a folder or repository with them as it does any other.
"""
import json
import logging
from pathlib import Path
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import parse_model_name
from timm.models._hub import hf_split
from timm.utils import load_checkpoint_metadata

from ..errors import InputError, why

__all__ = [
    'BRANCH_CONFIG', 'BRANCH_WEIGHTS', 'load_branches', 'load_checkpoint_branches', 'plain_tensors', 'read_layout',
    'save_branches',
]

_logger = logging.getLogger(__name__)

BRANCH_CONFIG = 'dks_config.json'
BRANCH_WEIGHTS = 'branches.safetensors'

_LAYOUT = ('stages', 'branches', 'branch_kwargs', 'budget', 'image_size')
# Arguments of timm.create_model that name files or addresses to read. No layout needs them.
_SOURCES = {'cache_dir', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'}


def plain_tensors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """What safetensors takes: contiguous tensors on the CPU that share no memory (no tied weights). The statistics
    that split BatchNorm keeps for training are left out."""
    return {
        name: tensor.to('cpu', copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items() if '.aux_bn.' not in name
    }


def save_branches(net: nn.Module, folder: Path) -> None:
    """Write a DKSModel's branches beside its backbone.

    Raises:
        ValueError: If the network does not know how its branches were made, or JSON cannot hold it.
    """
    if not net.layout:
        raise InputError('keep_branches needs a network made by create_dks_model or DKSModel.from_timm')
    try:
        config = json.dumps(net.layout, indent=2)
    except TypeError as e:
        raise InputError(f'keep_branches cannot write branch_kwargs {net.layout["branch_kwargs"]}: {e}') from e
    save_file(plain_tensors(net.branches.state_dict()), folder / BRANCH_WEIGHTS)
    (folder / BRANCH_CONFIG).write_text(config)


def _find(model_name: str, filename: str, cache_dir: Optional[str] = None) -> Optional[Path]:
    """A file beside the weights of a ``local-dir:`` or ``hf-hub:`` model, None where there is none."""
    source, name = parse_model_name(model_name)
    if source == 'local-dir':
        path = Path(name, filename)
        return path if path.is_file() else None
    if source != 'hf-hub':
        return None
    repo_id, revision = hf_split(name)
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(repo_id, filename, cache_dir, revision) is not _CACHED_NO_EXIST:
            _logger.warning(f'The Hub cannot be asked whether {model_name} has branches: they start fresh.')
    except EntryNotFoundError:
        pass
    return None


def read_layout(model_name: str, cache_dir: Optional[str] = None) -> Optional[Dict[str, Any]]:
    """How the branches of a published network were made, as arguments of ``DKSModel.from_timm``; None without any.

    Raises:
        ValueError: If the file is not one that :func:`save_branches` writes.
    """
    path = _find(model_name, BRANCH_CONFIG, cache_dir)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
        layout = {key: config[key] for key in _LAYOUT}
        foreign = _SOURCES & {key.rpartition('.')[2] for key in layout['branch_kwargs']}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f'{BRANCH_CONFIG} of {model_name} is not one of a published network: {e!r}') from e
    if foreign:
        raise InputError(f'{BRANCH_CONFIG} of {model_name} has branch_kwargs that are not accepted: {sorted(foreign)}')
    return layout


def load_branches(net: nn.Module, model_name: str, cache_dir: Optional[str] = None) -> None:
    """Load the weights of published branches into a network with their layout.

    A tensor of another shape stays as it is, freshly initialised: above all a classifier for other classes.

    Raises:
        ValueError: If they cannot be read, or are the weights of other branches.
    """
    path = _find(model_name, BRANCH_WEIGHTS, cache_dir)
    if path is None:
        raise InputError(f'{model_name} has {BRANCH_CONFIG}, but no {BRANCH_WEIGHTS}')
    try:
        own, given = net.branches.state_dict(), load_file(path)
    except SafetensorError as e:
        raise InputError(f'{BRANCH_WEIGHTS} of {model_name} cannot be read: {why(e)}') from e
    if own.keys() != given.keys():
        differ = sorted(own.keys() ^ given.keys())
        raise InputError(f'{BRANCH_WEIGHTS} of {model_name} holds other branches than {BRANCH_CONFIG}: {differ[:3]}')
    fresh = [name for name in own if own[name].shape != given[name].shape]
    if fresh:
        _logger.info(f'{model_name} was trained with other shapes; in its branches start fresh: {", ".join(fresh)}.')
    net.branches.load_state_dict({**given, **{name: own[name] for name in fresh}})


def load_checkpoint_branches(net: nn.Module, path: str, use_ema: bool = True) -> None:
    """Load the branches of a training checkpoint, as ``timm.models.load_checkpoint`` does the backbone.

    Raises:
        ValueError: If it holds no branches, or others.
    """
    checkpoint = load_checkpoint_metadata(path)
    state = checkpoint.get('task_state_ema') if use_ema else None
    own, given = net.branches.state_dict(), (state or checkpoint.get('task_state') or {}).get('branches', {})
    if {k for k in own.keys() ^ given.keys() if '.aux_bn.' not in k}:
        raise InputError(f'checkpoint {path!r} holds other branches than its run would make now')
    net.branches.load_state_dict({name: given.get(name, tensor) for name, tensor in own.items()})
