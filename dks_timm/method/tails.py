"""Running only what follows a stage of a timm model.

The tail of a model is run by the model's own ``forward``. The module at the end of the stage hands on the features it
is fed, and every module before it that works on the image returns an uninitialised tensor of the right shape. Whatever
a ``forward`` does between its modules (class tokens, position embeddings, windows) happens as its author wrote it. That
no uninitialised value reaches a logit is checked with autograd when the tail is planned, on the meta device.
"""
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, List, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._compat import tree_map_only
from .stages import Stage
from .trace import TRACE_BATCH, SurgeryError, Trace, map_tensors, planning_mode, shapes


@dataclass(frozen=True)
class TailPlan:
    """The changes that make a template a tail; plain data, by module name."""
    rank: int  # position of the source in Trace.sources; the backbone's features come from the same one
    source: str  # module whose output are the stage's features
    features: Any  # their shapes, for a batch of TRACE_BATCH
    stubs: Dict[str, Any]  # modules that return uninitialised tensors, with the shapes of their outputs
    skips: Dict[str, int]  # repeated blocks that pass so many inputs on (0: the first one, bare)
    alive: FrozenSet[str]  # modules that the tail still calls, also those shared with one that it does not
    unused: Tuple[str, ...] = ()  # parameters that no logit depends on



class Feed(threading.local):
    """The input of a tail, of each thread that runs it: the stage's features, and shapes of all that comes before."""

    def __init__(self):
        self.features = None
        self.image = None
        self.shapes: Dict[str, Any] = {}
        self.on_stand_in = None  # replaces stand-ins while a tail is planned

    def __reduce__(self):
        return type(self), ()

    def empty(self, shape: torch.Size) -> torch.Tensor:
        """Return an uninitialised tensor of a shape that was traced with ``TRACE_BATCH`` images."""
        # Whatever a model folds into the batch (windows, patches), the first dimension stays a multiple of it.
        return self.image.new_empty((shape[0] * self.image.shape[0] // TRACE_BATCH, *shape[1:]))


# New forwards of modules, as partial functions: torch.compile confuses the feeds of bound methods.

def _hand_on(feed: Feed, *args, **kwargs):
    return feed.features


def _stand_in(feed: Feed, name: str, *args, **kwargs):
    found = tree_map_only(torch.Size, feed.empty, feed.shapes[name], is_leaf=lambda tree: isinstance(tree, torch.Size))
    return feed.on_stand_in(found) if feed.on_stand_in else found


def _pass_on(count: int, *args, **kwargs):
    return args[:count] if count else args[0]


def plan_tail(trace: Trace, make: Callable[[], nn.Module], stage: Stage, keep_every: int = 1) -> TailPlan:
    """Plan the tail that follows ``stage``, and prove on a template that it needs nothing from before the stage.

    ``trace`` is that of a template, ``make`` makes another. Runs of alike blocks are thinned to one in ``keep_every``;
    1 keeps all, 0 one block of a kind. Raises SurgeryError where the architecture cannot be cut there.
    """
    refusals = []
    for rank, source in enumerate(trace.sources(stage)):
        skips = trace.skips(source, keep_every) if keep_every != 1 else {}
        stubs = trace.stubs(source)
        silent = [source] + [trace.once[name] for name in (*stubs, *skips)]
        alive = frozenset(c.name for c in trace.calls if not any(s.start <= c.start < s.end for s in silent))
        plan = TailPlan(rank, source.name, shapes(source.output), stubs, skips, alive)
        try:
            return replace(plan, unused=_prove(plan, planning_mode(make()), trace, source.output))
        except SurgeryError as e:
            refusals.append(str(e))
    raise SurgeryError(f'cannot run what follows stage {stage}: {refusals[0]}')


def _prove(plan: TailPlan, template: nn.Module, trace: Trace, features: Any) -> Tuple[str, ...]:
    """Run a planned tail once, and return the parameters that no logit depends on, by autograd.

    Raises SurgeryError where a logit depends on a tensor from before the stage, or none on the stage's features.
    """
    feed, before, leaves = Feed(), [], []  # a gradient on a leaf means that a logit depends on it
    parameters = dict(template.named_parameters())
    cut(template, plan, feed)
    feed.image, feed.shapes = trace.x, plan.stubs
    feed.on_stand_in = partial(_watch, before)
    with torch.enable_grad():
        feed.features = _watch(leaves, features)
        output = template(trace.x)
        if output.requires_grad:
            output.sum().backward()
    if any(t.grad is not None for t in before):
        raise SurgeryError('it also uses tensors from before the stage')
    if all(t.grad is None for t in leaves):
        raise SurgeryError('no logit depends on the features of the stage')
    kept = {name for name, p in template.named_parameters() if p.requires_grad}
    return tuple(name for name in parameters if name in kept and parameters[name].grad is None)


def _watch(leaves: List[torch.Tensor], tree: Any) -> Any:
    """Return the tensors of a nest as results of leaves that want a gradient; append these to ``leaves``."""
    def watch(tensor):
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1] * 1  # no leaf, so that it may be worked on in place

    return map_tensors(watch, tree)


def cut(template: nn.Module, plan: TailPlan, feed: Feed) -> nn.Module:
    """Carry out a plan on ``template``, in place: it becomes a tail that is fed through ``feed``.

    Modules that no longer compute lose their tensors, but stay, because others may read their attributes. Parameters
    that no logit depends on become buffers outside the state dict.
    """
    modules = dict(template.named_modules())
    forwards = {plan.source: partial(_hand_on, feed)}
    forwards.update({name: partial(_stand_in, feed, name) for name in plan.stubs})
    forwards.update({name: partial(_pass_on, count) for name, count in plan.skips.items()})
    alive = {id(modules[name]) for name in plan.alive}
    for name, forward in forwards.items():
        for path, module in list(modules[name].named_modules(prefix=name)):
            if id(module) in alive:
                continue
            if isinstance(module, _BatchNorm):
                # Converters to SyncBatchNorm and the like would bring it back to life.
                template.set_submodule(path, nn.Identity())
            for store in (module._parameters, module._buffers):  # private: torch Module._parameters, Module._buffers
                store.update(dict.fromkeys(store))
        template.get_submodule(name).forward = forward
    for name in plan.unused:
        parent, _, attribute = name.rpartition('.')
        parameter = modules[parent]._parameters.pop(attribute)  # private: torch Module._parameters
        modules[parent].register_buffer(attribute, parameter.detach(), persistent=False)
    return template
