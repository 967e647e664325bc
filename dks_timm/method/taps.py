"""Features of a backbone while it runs: forward hooks that stay, and for each forward a receiver of what they see."""
import threading
from typing import Any, Callable, Dict, Iterable, Optional

import torch
import torch.nn as nn

from .trace import map_tensors

__all__ = ['is_tapped', 'run', 'tap', 'untap']

Receiver = Callable[[str, Any], None]


class _Forward(threading.local):
    """The receiver of the forward that a thread runs, None where nobody asks for features."""

    def __init__(self):  # for each thread; torch.compile does not follow defaults of the class
        self.receiver: Optional[Receiver] = None


_forward = _Forward()


class _Tap:
    """Forward hook of one module.

    Args:
        name: Of the module.
        copies: True if the model goes on to work on the output in place.
    """

    def __init__(self, name: str, copies: bool):
        self.name = name
        self.copies = copies

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _forward.receiver is not None:
            _forward.receiver(self.name, map_tensors(torch.clone, output) if self.copies else output)


def run(module: nn.Module, x: torch.Tensor, receiver: Optional[Receiver] = None) -> Any:
    """Run a backbone, or what wraps it; this may be within another such forward.

    Args:
        module: The backbone, with taps.
        x: Its input.
        receiver: Called with name and output of each tapped module as soon as it has run.
    """
    outer, _forward.receiver = _forward.receiver, receiver
    try:
        return module(x)
    finally:
        _forward.receiver = outer


def tap(backbone: nn.Module, copies: Dict[str, bool]) -> None:
    """Hook modules of a backbone, given by name with whether their output has to be copied, and no others."""
    untap(backbone)
    for name, copied in copies.items():
        backbone.get_submodule(name).register_forward_hook(_Tap(name, copied))


def untap(backbone: nn.Module) -> None:
    """Remove every tap, also those that came with a copied module."""
    for module in backbone.modules():
        for key, hook in list(module._forward_hooks.items()):  # private: torch Module._forward_hooks
            if isinstance(hook, _Tap):
                del module._forward_hooks[key]


def is_tapped(backbone: nn.Module, names: Iterable[str]) -> bool:
    """Return True if all these modules are tapped; pruning removes taps, and so does whoever replaces a module."""
    hooks = (backbone.get_submodule(name)._forward_hooks for name in names)  # private: torch Module._forward_hooks
    return all(any(isinstance(hook, _Tap) for hook in of_one.values()) for of_one in hooks)
