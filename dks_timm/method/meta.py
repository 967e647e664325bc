"""Models without weights: copying them to the meta device, running them there, counting their FLOPs."""
import copy
from itertools import chain
from typing import Any, Callable, Dict

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['copy_without_weights', 'flop_counter', 'on_meta_or_cpu', 'without_fast_norm']


def on_meta_or_cpu(function: Callable[[str], Any]) -> Any:
    """Call a function with 'meta', or with 'cpu' where a forward reads values, which meta tensors do not have."""
    try:
        return function('meta')
    except RuntimeError:
        return function('cpu')


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device."""
    memo: Dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        blank = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return without_fast_norm(copy.deepcopy(model, memo))


def without_fast_norm(model: nn.Module) -> nn.Module:
    """Turn timm's fast norms off, in place: they ask for the autocast of a device, and the meta device has none."""
    for module in model.modules():
        if getattr(module, '_fast_norm', False):  # private: timm _fast_norm of its norm layers
            module._fast_norm = False
    return model


def flop_counter(*modules: nn.Module) -> FlopCounterMode:
    """Prepare modules for counting, in place, and return the context that counts the FLOPs of what runs within it.

    A multiply-add counts as two. The counter follows gradients where there are any, and stumbles over expanded
    parameters, so the modules go into evaluation mode and require no gradients.
    """
    for module in modules:
        without_fast_norm(module).eval().requires_grad_(False)
    return FlopCounterMode(display=False)
