"""Models without weights: copies, FLOPs, and one traced forward, which tells what depends on the image."""
import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, groupby
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from .._compat import tree_leaves, tree_map_only
from ..errors import InputError
from .stages import Stage

TRACE_BATCH = 2


class SurgeryError(InputError):
    """This architecture cannot be run from the given stage on; the message says why."""


def tensors(tree: Any) -> List[torch.Tensor]:
    """List the tensors in a nest of tuples, lists and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def map_tensors(function: Callable, tree: Any) -> Any:
    """Replace every tensor in a nest by what a function returns for it."""
    return tree_map_only(torch.Tensor, function, tree)


def shapes(tree: Any) -> Any:
    """Replace every tensor in a nest by its ``torch.Size``."""
    return map_tensors(lambda t: t.shape, tree)


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device."""
    memo: Dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        blank = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(model, memo)


def planning_mode(model: nn.Module) -> nn.Module:
    """Put a model into training mode, but BatchNorm, which takes most of the time there, into evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
        if getattr(module, '_fast_norm', False):  # private: timm _fast_norm of its norm layers
            module._fast_norm = False  # it asks for the autocast of a device, and the meta device has none
    return model


def flop_counter(module: nn.Module) -> FlopCounterMode:
    """Prepare a module, in place, and return the context that counts its FLOPs; a multiply-add counts as two."""
    planning_mode(module).eval().requires_grad_(False)  # the counter would follow gradients
    return FlopCounterMode(display=False)


@dataclass(eq=False)
class Call:
    """One module call of a traced forward; ``start`` and ``end`` count calls and returns."""
    name: str
    module: nn.Module
    args: Tuple[Any, ...]
    start: int
    end: int = -1
    output: Any = None

    @property
    def depends_on_image(self) -> bool:
        return any(t.requires_grad for t in tensors(self.output))

    @property
    def can_be_cut(self) -> bool:
        """True if the module works on the image, and gradient checkpointing of timm does not run its children alone."""
        return self.depends_on_image and not _is_sequential(self.module)

    @property
    def passed(self) -> Optional[int]:
        """Number of leading arguments with the outputs' shapes; 0 for a bare tensor, None where shapes differ."""
        if isinstance(self.output, torch.Tensor):
            return 0 if self.args and shapes(self.args[0]) == self.output.shape else None
        if isinstance(self.output, tuple) and shapes(self.args[:len(self.output)]) == shapes(self.output):
            return len(self.output)
        return None


def _is_sequential(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len(module) > 0


class Trace:
    """The module calls of one forward, in the order in which they begin.

    Args:
        model: It is put into training mode, and its parameters stop requiring gradients: autograd then tells the calls
            that depend on the image from those that do not.
        x: Images (B, C, H, W).
        forward: Runs instead of ``model``, if given.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, forward: Optional[Callable] = None):
        self.model = planning_mode(model).requires_grad_(False)
        self.x = x
        self.calls: List[Call] = []
        clock, running, handles = count(), [], []

        def enter(name, module, args):
            running.append(Call(name, module, args, start=next(clock)))
            self.calls.append(running[-1])

        def leave(module, args, output):
            call = running.pop()
            call.end, call.output = next(clock), output

        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(leave))
        try:
            with torch.enable_grad():
                (forward or model)(x.detach().requires_grad_() * 1)  # no leaf, so that it may be worked on in place
        finally:
            for handle in handles:
                handle.remove()
        times = Counter(c.name for c in self.calls)
        self.once = {c.name: c for c in self.calls if times[c.name] == 1}  # calls of modules called exactly once

    def sources(self, stage: Stage) -> List[Call]:
        """List the calls whose output can serve as the features of ``stage``, best first.

        The first one puts out what timm calls the stage's features. Where that lies inside a residual block, a model
        cannot be cut there; the others end right before the blocks around it begin.
        """
        first = self._named(stage) or self._last_of(stage)
        if first is None:
            raise SurgeryError(f'no module puts out the features of stage {stage}')
        found = [first]
        for outer in reversed([c for c in self.calls if c.start <= first.start and c.end >= first.end and c.name]):
            before = [c for c in self.once.values() if c.end < outer.start and c.can_be_cut]
            if before and (last := max(before, key=lambda c: c.end)) not in found:
                found.append(last)
        return found

    def _named(self, stage: Stage) -> Optional[Call]:
        # The path may lack the name of a model that this one wraps.
        named = [c for c in self.once.values() if f'.{c.name}'.endswith(f'.{stage.module}')]
        call = named[0] if len(named) == 1 else self.once.get(stage.module)
        while call is not None and _is_sequential(call.module):
            last = list(call.module._modules)[-1]  # private: torch Module._modules, whose last may also come earlier
            call = self.once.get(f'{call.name}.{last}')
        return call if call is not None and call.can_be_cut else None

    def _last_of(self, stage: Stage) -> Optional[Call]:
        # The name is not the path of a called module: run as far as the stage goes, and take what returns last.
        early = Trace(self.model, self.x, lambda x: self.model.forward_intermediates(
            x, indices=[stage.index], stop_early=True, intermediates_only=True))
        for call in sorted(early.once.values(), key=lambda c: -c.end):
            same = self.once.get(call.name)
            if same and same.can_be_cut and shapes(same.output) == shapes(call.output):
                return same
        return None

    def stubs(self, source: Call) -> Dict[str, Any]:
        """Return the outputs, by name, of the outermost modules that work on the image before ``source`` does."""
        found: Dict[str, Any] = {}
        covered = -1
        for call in self.calls:
            if call.start >= source.start:
                break
            around = call.end > source.end
            if call.name in self.once and call.can_be_cut and not around and call.start > covered:
                found[call.name] = shapes(call.output)
                covered = call.end
        return found

    def skips(self, source: Call, keep_every: int) -> Dict[str, int]:
        """Choose blocks to leave out, so that one in ``keep_every`` remains of each run of alike siblings.

        Alike are consecutive siblings of one class, after ``source``, with equal parameter shapes whose outputs have
        their inputs' shapes. Whole blocks are left out, never parts of a block that is itself repeated. With
        ``keep_every`` 0, none is kept of a run that follows a sibling of its class, as in a stage whose first block
        alone changes shapes, and one of any other run. Returns ``Call.passed`` of each block, by name.
        """
        siblings: Dict[str, List[Call]] = {}
        for call in self.calls:
            if call.start > source.end and call.depends_on_image:
                siblings.setdefault(call.name.rpartition('.')[0], []).append(call)

        def kind(call):
            parameters = tuple(p.shape for p in call.module.parameters())
            if not parameters or call.name not in self.once or call.passed is None:
                return call.start  # like nothing else
            return type(call.module), parameters, call.passed, str(shapes(call.output))

        found: Dict[str, int] = {}
        repeated: List[str] = []
        for parent in sorted(siblings, key=lambda name: name.count('.')):
            if any(f'{parent}.'.startswith(f'{name}.') for name in repeated):
                continue
            before = None
            for key, run in groupby(siblings[parent], kind):
                run = list(run)
                follows, before = before is type(run[0].module), type(run[0].module)
                left_out = [c for i, c in enumerate(run) if (i % keep_every if keep_every else follows or i)]
                if left_out and isinstance(key, tuple):
                    repeated += [c.name for c in run]
                    found.update({c.name: c.passed for c in left_out})
        return found
