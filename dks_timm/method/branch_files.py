"""Branches beside a published backbone, ``branches.safetensors`` and ``dks_config.json``, and branches of a checkpoint.

timm loads a folder or repository with these files as it does any other.
"""
import json
import logging
from pathlib import Path
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import parse_model_name
from timm.models._hub import hf_split  # private: timm models._hub
from timm.utils import load_checkpoint_metadata

from ..errors import InputError, why
from .plan import WEIGHT_SOURCES

_logger = logging.getLogger(__name__)

BRANCH_CONFIG = 'dks_config.json'
BRANCH_WEIGHTS = 'branches.safetensors'

_LAYOUT = ('stages', 'branches', 'branch_kwargs', 'budget', 'image_size')


def plain_tensors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return tensors that safetensors takes: contiguous, on the CPU, without shared memory (no tied weights).

    The statistics that split BatchNorm keeps for training are left out.
    """
    return {
        name: tensor.to('cpu', copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items() if '.aux_bn.' not in name
    }


def save_branches(net: nn.Module, folder: Path) -> None:
    """Write a DKSModel's branches beside its backbone.

    Raises:
        ValueError: The network does not know how its branches were made, or JSON cannot hold it.
    """
    if not net.layout:
        raise InputError('keep_branches needs a network made by create_dks_model or DKSModel.from_timm')
    try:
        config = json.dumps(net.layout, indent=2)
    except TypeError as e:  # json's word for what it has no form for
        raise InputError(f'keep_branches cannot write branch_kwargs {net.layout["branch_kwargs"]}: {e}') from e
    save_file(plain_tensors(net.branches.state_dict()), folder / BRANCH_WEIGHTS)
    (folder / BRANCH_CONFIG).write_text(config)


def _find(model_name: str, filename: str, cache_dir: Optional[str] = None) -> Optional[Path]:
    """Return a file beside the weights of a ``local-dir:`` or ``hf-hub:`` model, None where there is none."""
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
        if try_to_load_from_cache(repo_id, filename, cache_dir, revision) is None:  # nor known to be missing
            _logger.warning(f'The Hub cannot be asked whether {model_name} has branches: they start fresh.')
    except EntryNotFoundError:
        pass
    return None


def read_layout(model_name: str, cache_dir: Optional[str] = None) -> Optional[Dict[str, Any]]:
    """Return the arguments of ``DKSModel.from_timm`` that made the branches of a published network, None without any.

    Raises:
        ValueError: The file is not one that :func:`save_branches` writes.
    """
    path = _find(model_name, BRANCH_CONFIG, cache_dir)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f'{BRANCH_CONFIG} of {model_name} is not one of a published network: {why(e)}') from e
    if not isinstance(config, dict) or not config.keys() >= {*_LAYOUT} or not isinstance(config['branch_kwargs'], dict):
        raise InputError(f'{BRANCH_CONFIG} of {model_name} is not one of a published network: {config!r:.100}')
    foreign = {*WEIGHT_SOURCES} & {key.rpartition('.')[2] for key in config['branch_kwargs']}
    if foreign:
        raise InputError(f'{BRANCH_CONFIG} of {model_name} has branch_kwargs that are not accepted: {sorted(foreign)}')
    return {key: config[key] for key in _LAYOUT}


def read_weights(model_name: str, cache_dir: Optional[str] = None) -> Dict[str, torch.Tensor]:
    """Return the weights of published branches; raise ValueError where they are missing or cannot be read."""
    path = _find(model_name, BRANCH_WEIGHTS, cache_dir)
    if path is None:
        raise InputError(f'{model_name} has {BRANCH_CONFIG}, but no {BRANCH_WEIGHTS}')
    try:
        return load_file(path)
    except SafetensorError as e:
        raise InputError(f'{BRANCH_WEIGHTS} of {model_name} cannot be read: {why(e)}') from e


def load_branches(net: nn.Module, weights: Dict[str, torch.Tensor], source: str, adapt: bool = False) -> None:
    """Load weights into the branches of a DKSModel.

    Args:
        net: The network.
        weights: State dict of its ``branches``. The statistics that split BatchNorm keeps for training are left out.
        source: Where they come from, for messages.
        adapt: Leave what has another shape freshly initialised, above all a classifier for other classes.

    Raises:
        ValueError: They are the weights of other branches. Nothing is loaded.
    """
    own = net.branches.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if '.aux_bn.' not in name}
    fresh = [name for name in own if adapt and name in weights and own[name].shape != weights[name].shape]
    if fresh:
        _logger.info(f'{source} was trained with other shapes; in its branches start fresh: {", ".join(fresh)}.')
        weights.update({name: own[name] for name in fresh})
    check_fit(own, weights, f'{source} holds other branches than this model has')
    net.branches.load_state_dict(weights)


def load_checkpoint_branches(net: nn.Module, path: str, use_ema: bool = True) -> None:
    """Load the branches of a training checkpoint, as ``timm.models.load_checkpoint`` does the backbone."""
    checkpoint = load_checkpoint_metadata(path)
    state = checkpoint.get('task_state_ema') if use_ema else None
    load_branches(net, (state or checkpoint.get('task_state') or {}).get('branches', {}), f'checkpoint {path!r}')


def check_fit(own: Dict[str, torch.Tensor], given: Dict[str, torch.Tensor], complaint: str) -> None:
    """Raise ValueError for a state dict with other entries or shapes than the model's own, naming the first of them."""
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, given))
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f'{complaint}: {name} is {theirs.get(name, "missing")} there and '
                f'{ours.get(name, "missing")} in the model')
