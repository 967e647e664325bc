"""Running only what follows a stage of a timm model.

The tail of a model is run by the model's own ``forward``. The module at the end of the stage hands on the features it
is fed, and every module before it that works on the image returns an uninitialised tensor of the right shape instead of
computing one. Nothing else is touched, so whatever a ``forward`` does between its modules (class tokens, position
embeddings, window bookkeeping) happens as its author wrote it. That no uninitialised value reaches a logit is checked
with autograd when the tail is planned.

A plan comes from one traced forward on the meta device, and is then carried out on a model with weights.
"""
import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import InputError
from .stages import Stage

__all__ = ['TRACE_BATCH', 'Call', 'Feed', 'SurgeryError', 'TailPlan', 'Trace', 'cut', 'plan_tail', 'without_fast_norm']

TRACE_BATCH = 2


class SurgeryError(InputError):
    """This architecture cannot be run from the given stage on; the message says why."""


def tensors(tree: Any) -> List[torch.Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def shapes(tree: Any) -> Any:
    """The nest with every tensor replaced by its ``torch.Size``."""
    return tree_map_only(torch.Tensor, lambda t: t.shape, tree)


@dataclass(eq=False)
class Call:
    """One module call of a traced forward; ``start`` and ``end`` count calls and returns."""
    name: str
    module: nn.Module
    args: Tuple[Any, ...]
    start: int
    end: int = -1
    output: Any = None
    versions: Tuple[int, ...] = ()

    @property
    def written(self) -> bool:
        """Whether the model went on to work on the output in place."""
        return self.versions != tuple(t._version for t in tensors(self.output))

    @property
    def depends_on_input(self) -> bool:
        return any(t.requires_grad for t in tensors(self.output))

    @property
    def is_sequential(self) -> bool:
        return type(self.module) is nn.Sequential and len(self.module) > 0

    @property
    def can_be_cut(self) -> bool:
        """Whether the module works on the input and gets called whatever the settings.

        A plain Sequential may not be: gradient checkpointing in timm calls its children itself.
        """
        return self.depends_on_input and not self.is_sequential


class Trace:
    """The module calls of one forward, in the order in which they begin.

    Args:
        model: Model on the device of ``x``; it is put into training mode. Its parameters stop requiring gradients:
            autograd then tells the calls that depend on the input from those that do not.
        x: Input (B, C, H, W).
        forward: What to run instead of ``model``.

    Attributes:
        trainable: Names of the parameters that required gradients.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, forward: Optional[Callable] = None):
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.model = _training_mode(model).requires_grad_(False)
        self.x = x
        self.calls: List[Call] = []
        self._running: List[Call] = []
        self._clock = 0
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.enable_grad():
                (forward or model)(x.detach().requires_grad_() * 1)  # no leaf, so that it may be worked on in place
        finally:
            for handle in handles:
                handle.remove()
        times = Counter(c.name for c in self.calls)
        self.once = {c.name: c for c in self.calls if times[c.name] == 1}

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _enter(self, name, module, args):
        self.calls.append(Call(name, module, args, start=self._tick()))
        self._running.append(self.calls[-1])

    def _leave(self, module, args, output):
        call = self._running.pop()
        call.end, call.output = self._tick(), output
        call.versions = tuple(t._version for t in tensors(output))

    def sources(self, stage: Stage) -> List[Call]:
        """Calls whose output can serve as the features of ``stage``, best first.

        The first one puts out what timm calls the stage's features. Where that lies inside a residual block, a model
        cannot be cut there; the others end right before the blocks around it begin.

        Raises:
            SurgeryError: There is none.
        """
        first = self._named(stage) or self._last_of(stage)
        if first is None:
            raise SurgeryError(f'no module puts out the features of stage {stage}')
        found = [first]
        around = [c for c in self.calls if c.start <= first.start and c.end >= first.end and c.name]
        for outer in reversed(around):
            before = [c for c in self.once.values() if c.end < outer.start and c.can_be_cut]
            if before and (last := max(before, key=lambda c: c.end)) not in found:
                found.append(last)
        return found

    def _named(self, stage: Stage) -> Optional[Call]:
        # The path may lack the name of a model that this one wraps.
        named = [c for c in self.once.values() if f'.{c.name}'.endswith(f'.{stage.module}')]
        call = named[0] if len(named) == 1 else self.once.get(stage.module)
        while call is not None and call.is_sequential:
            call = self.once.get(f'{call.name}.{list(call.module._modules)[-1]}')
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
        """Output shapes, by name, of the outermost modules that work on the image before ``source`` does."""
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
        """Blocks to leave out so that one in ``keep_every`` remains of each run of alike siblings after ``source``.

        Alike are consecutive siblings of one class with equal parameter shapes whose outputs have their inputs' shapes.
        Whole blocks are left out, never parts of a block that is itself repeated. Of 0, none of a run remains that
        follows a sibling of its class, as in a stage whose first block alone changes shapes, and one of any other run.
        """
        siblings: Dict[str, List[Call]] = {}
        for call in self.calls:
            if call.start > source.end and call.depends_on_input:
                siblings.setdefault(call.name.rpartition('.')[0], []).append(call)

        def kind(call):
            parameters = tuple(p.shape for p in call.module.parameters())
            if not parameters or call.name not in self.once or _passed(call) is None:
                return call.start  # like nothing else
            return type(call.module), parameters, _passed(call), str(shapes(call.output))

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
                    found.update({c.name: _passed(c) for c in left_out})
        return found


def _passed(call: Call) -> Optional[int]:
    """How many leading arguments have the shapes of a call's outputs; 0 for a bare tensor, None where they differ."""
    if isinstance(call.output, torch.Tensor):
        return 0 if call.args and shapes(call.args[0]) == call.output.shape else None
    if isinstance(call.output, tuple) and shapes(call.args[:len(call.output)]) == shapes(call.output):
        return len(call.output)
    return None


@dataclass(frozen=True)
class TailPlan:
    """What to change in a template to make it a tail; plain data, by module name.

    Attributes:
        rank: Position of ``source`` in ``Trace.sources``; the backbone's features come from the same one.
        source: Module whose output are the stage's features.
        features: Their shapes, for a batch of ``TRACE_BATCH``.
        stubs: Modules that return uninitialised tensors, with the shapes of their outputs.
        skips: Repeated blocks that pass their input on, with the number of inputs to pass (0: the first one, bare).
        alive: Modules that the tail still calls, also where a module that it does not call owns them as well.
        unused: Parameters that no logit depends on.
        copies: Whether the tail works on its features in place, and so needs a copy of them.
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
    """What flows into a tail: the stage's features, and the shapes that stand in for everything before them.

    Each thread has its own, as it may run the same tail.

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
        return self._empty(self.shapes[name], name in self.written)

    def _empty(self, tree, written):
        if isinstance(tree, torch.Size):
            # Whatever a model folds into the batch (windows, patches), the first dimension stays a multiple of it.
            shape = (tree[0] * self.image.shape[0] // TRACE_BATCH, *tree[1:])
            return self.image.new_empty(shape) if written else self.image.new_empty(()).expand(shape)
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._empty(t, written) for t in tree])
        return tree


class _WatchedFeed(Feed):
    """Feed of a planning run. It keeps its stand-ins: a gradient on one of them means that a logit depends on it."""

    def __init__(self):
        super().__init__()
        self.watched: List[torch.Tensor] = []
        self.given: Dict[str, Any] = {}

    def stand_in(self, name: str) -> Any:
        self.given[name] = tree_map_only(torch.Tensor, self.watch, super().stand_in(name))
        return self.given[name]

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        self.watched.append(tensor.detach().requires_grad_())
        return self.watched[-1] * 1


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


def without_fast_norm(model: nn.Module) -> nn.Module:
    """A model for the meta device, in place: timm's fast norms ask for a device's autocast, and that one has none."""
    for module in model.modules():
        if getattr(module, '_fast_norm', False):
            module._fast_norm = False
    return model


def _training_mode(model: nn.Module) -> nn.Module:
    """A model to plan with: in training mode, but for BatchNorm, whose statistics take most of the time there."""
    without_fast_norm(model).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


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
            return _check(_training_mode(make()), plan, trace, source.output)
        except SurgeryError as e:
            refusals.append(str(e))
    raise SurgeryError(f'cannot run what follows stage {stage}: {refusals[0]}')


def _check(template: nn.Module, plan: TailPlan, trace: Trace, features: Any) -> TailPlan:
    feed = _WatchedFeed()
    parameters = dict(template.named_parameters())
    cut(template, plan, feed)
    feed.image, feed.shapes = trace.x, plan.stubs
    watched: List[torch.Tensor] = []
    with torch.enable_grad():
        feed.features = tree_map_only(torch.Tensor, feed.watch, features)
        given, feed.watched = feed.watched, watched
        versions = [t._version for t in tensors(feed.features)]
        output = template(trace.x)
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise SurgeryError(f'{type(template).__name__} does not return logits (B, num_classes) in training mode')
        if output.requires_grad:
            output.sum().backward()
    if any(t.grad is not None for t in watched):
        raise SurgeryError('it also uses tensors from before the stage')
    if all(t.grad is None for t in given):
        raise SurgeryError('no logit depends on the features of the stage')
    kept = {name for name, _ in template.named_parameters()}
    return replace(
        plan,
        unused=tuple(name for name in trace.trainable if name in kept and parameters[name].grad is None),
        copies=versions != [t._version for t in tensors(feed.features)],
        written=frozenset(name for name, given in feed.given.items() if any(t._version for t in tensors(given))),
    )


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
            for store in (module._parameters, module._buffers):
                store.update(dict.fromkeys(store))
        template.get_submodule(name).forward = forward
    for name in plan.unused:
        parent, _, attribute = name.rpartition('.')
        parameter = modules[parent]._parameters.pop(attribute)
        modules[parent].register_buffer(attribute, parameter.detach(), persistent=False)
    return template
