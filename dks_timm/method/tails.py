"""Running only what follows a stage of a timm model.

The tail of a model is run by the model's own ``forward``. The module at the end of the stage hands on the features it
is fed, and every module before it that works on the image returns an uninitialised tensor of the right shape instead of
computing one. Nothing else is touched, so whatever a ``forward`` does between its modules (class tokens, position
embeddings, window bookkeeping) happens as its author wrote it. That no uninitialised value reaches a logit is checked
with autograd when the tail is planned.

A plan comes from one traced forward on the meta device, and is then carried out on a model with weights.
"""
import threading
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, FrozenSet, List, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .stages import Stage
from .trace import TRACE_BATCH, SurgeryError, Trace, map_tensors, planning_mode, shapes, versions

__all__ = ['Feed', 'TailPlan', 'cut', 'plan_tail']


@dataclass(frozen=True)
class TailPlan:
    """The changes that make a template a tail; plain data, by module name.

    Attributes:
        rank: Position of ``source`` in ``Trace.sources``; the backbone's features come from the same one.
        source: Module whose output are the stage's features.
        features: Their shapes, for a batch of ``TRACE_BATCH``.
        stubs: Modules that return uninitialised tensors, with the shapes of their outputs.
        skips: Repeated blocks that pass their input on, with the number of inputs to pass (0: the first one, bare).
        alive: Modules that the tail still calls, also where a module that it does not call owns them as well.
        unused: Parameters that no logit depends on.
        copies: True if the tail works on its features in place, and so needs a copy of them.
        written: Stubs whose output the tail works on in place, so that it needs memory.
    """
    rank: int
    source: str
    features: Any
    stubs: Dict[str, Any]
    skips: Dict[str, int]
    alive: FrozenSet[str]
    unused: Tuple[str, ...] = ()
    copies: bool = False
    written: FrozenSet[str] = frozenset()


class Feed(threading.local):
    """The input of a tail: the stage's features, and the shapes that stand in for everything before them.

    Each thread has its own, as several may run the same tail.

    Args:
        written: Modules whose stand-ins are worked on in place. Those of others take no memory, whatever their size.
    """

    def __init__(self, written: FrozenSet[str] = frozenset()):
        self.written = written
        self.features = None
        self.image = None
        self.shapes: Dict[str, Any] = {}

    def __reduce__(self):
        return type(self), (self.written,)

    def stand_in(self, name: str) -> Any:
        """Return uninitialised tensors of the shapes that a module puts out."""
        return self._empty(self.shapes[name], name in self.written)

    def _empty(self, tree, written):
        if isinstance(tree, torch.Size):
            # Whatever a model folds into the batch (windows, patches), the first dimension stays a multiple of it.
            shape = (tree[0] * self.image.shape[0] // TRACE_BATCH, *tree[1:])
            return self.image.new_empty(shape) if written else self.image.new_empty(()).expand(shape)
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._empty(t, written) for t in tree])
        return tree


# New forwards of modules: objects that look their feed up when called, as torch.compile would take a bound method's for
# another one than the tail fills.

@dataclass
class _HandOn:
    feed: Feed

    def __call__(self, *args, **kwargs):
        return self.feed.features


@dataclass
class _StandIn:
    feed: Feed
    name: str

    def __call__(self, *args, **kwargs):
        return self.feed.stand_in(self.name)


@dataclass
class _PassOn:
    count: int

    def __call__(self, *args, **kwargs):
        return args[:self.count] if self.count else args[0]


def plan_tail(trace: Trace, make: Callable[[], nn.Module], stage: Stage, keep_every: int = 1) -> TailPlan:
    """Plan the tail of a template, and check that its logits depend on the stage's features and on nothing before them.

    Args:
        trace: Trace of the template.
        make: Makes another one, on the device of the trace (meta, as a rule).
        stage: Where the tail begins.
        keep_every: Thin runs of alike blocks down to one in so many; 1 keeps all, 0 one block of a kind.

    Raises:
        SurgeryError: The architecture cannot be cut there.
    """
    refusals = []
    for rank, source in enumerate(trace.sources(stage)):
        skips = trace.skips(source, keep_every) if keep_every != 1 else {}
        stubs = trace.stubs(source)
        silent = [source] + [trace.once[name] for name in (*stubs, *skips)]
        alive = frozenset(c.name for c in trace.calls if not any(s.start <= c.start < s.end for s in silent))
        plan = TailPlan(rank, source.name, shapes(source.output), stubs, skips, alive)
        try:
            return _prove(plan, planning_mode(make()), trace, source.output)
        except SurgeryError as e:
            refusals.append(str(e))
    raise SurgeryError(f'cannot run what follows stage {stage}: {refusals[0]}')


def _prove(plan: TailPlan, template: nn.Module, trace: Trace, features: Any) -> TailPlan:
    """Run a planned tail once, and complete its plan with what autograd says about it.

    Raises:
        SurgeryError: A logit depends on a tensor from before the stage, or none depends on the stage's features.
    """
    feed = _WatchedFeed()
    parameters = dict(template.named_parameters())
    cut(template, plan, feed)
    feed.image, feed.shapes = trace.x, plan.stubs
    leaves: List[torch.Tensor] = []
    with torch.enable_grad():
        feed.features = _watch(features, leaves)
        before = versions(feed.features)
        output = template(trace.x)
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise SurgeryError(f'{type(template).__name__} does not return logits (B, num_classes) in training mode')
        if output.requires_grad:
            output.sum().backward()
    if any(t.grad is not None for t in feed.leaves):
        raise SurgeryError('it also uses tensors from before the stage')
    if all(t.grad is None for t in leaves):
        raise SurgeryError('no logit depends on the features of the stage')
    kept = {name for name, _ in template.named_parameters()}
    return replace(
        plan,
        unused=tuple(name for name in trace.trainable if name in kept and parameters[name].grad is None),
        copies=before != versions(feed.features),
        written=frozenset(name for name, given in feed.given.items() if any(versions(given))),
    )


class _WatchedFeed(Feed):
    """Feed of a planning run. It keeps its stand-ins: a gradient on a leaf means that a logit depends on it."""

    def __init__(self):
        super().__init__()
        self.leaves: List[torch.Tensor] = []
        self.given: Dict[str, Any] = {}

    def stand_in(self, name: str) -> Any:
        self.given[name] = _watch(super().stand_in(name), self.leaves)
        return self.given[name]


def _watch(tree: Any, leaves: List[torch.Tensor]) -> Any:
    """Return the tensors of a nest as results of leaves that want a gradient; append these to ``leaves``."""
    def watch(tensor):
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1] * 1  # no leaf, so that it may be worked on in place

    return map_tensors(watch, tree)


def cut(template: nn.Module, plan: TailPlan, feed: Feed) -> nn.Module:
    """Carry out a plan on ``template``, in place: it becomes a tail that is fed through ``feed``.

    Modules that no longer compute lose their parameters and buffers, but stay where they are, because others may read
    their attributes (BatchNorm excepted). Parameters that no logit depends on become buffers outside the state dict.
    """
    modules = dict(template.named_modules())
    forwards = {plan.source: _HandOn(feed)}
    forwards.update({name: _StandIn(feed, name) for name in plan.stubs})
    forwards.update({name: _PassOn(count) for name, count in plan.skips.items()})
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
