"""Private parts of other libraries that this package relies on, each with the version that it was read in.

tests/test_compat.py fails where one is gone, and pyproject.toml bounds the versions.
"""
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.models._features import feature_take_indices  # timm 1.0.31
from timm.models._hub import download_from_hf, save_config_for_hf  # timm 1.0.31
from torch.utils._pytree import tree_leaves, tree_map_only  # torch 2.6 to 2.14
from torch.utils.data import DataLoader

__all__ = [
    'creation_args', 'download_from_hf', 'feature_take_indices', 'has_started', 'replace_batch_sampler',
    'rounding_generator', 'save_config_for_hf', 'tree_leaves', 'tree_map_only']


def replace_batch_sampler(loader: DataLoader, batch_sampler: Any) -> None:
    """Give a loader another batch sampler, as timm's MultiEpochsDataLoader does (torch 2.6 to 2.14)."""
    loader._DataLoader__initialized = False
    loader.batch_sampler = batch_sampler
    loader._DataLoader__initialized = True


def has_started(loader: DataLoader) -> bool:
    """Return True if a loader with persistent workers has started them (torch 2.6 to 2.14)."""
    return loader._iterator is not None


def rounding_generator(average: Optional[nn.Module]) -> Optional[torch.Generator]:
    """Return the generator that rounds a bfloat16 average of timm's at random, or None (timm 1.0.31)."""
    return getattr(average, '_sr_generator', None)


def creation_args(model: nn.Module) -> Dict[str, Any]:
    """Return the arguments that ``timm.create_model`` noted on a model (timm 1.0.31)."""
    return getattr(model, '_model_args', {})
