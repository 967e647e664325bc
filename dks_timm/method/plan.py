"""Deciding which branches to attach to a backbone, and making them."""
import contextlib
import copy
import functools
import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch.nn.modules.batchnorm import _BatchNorm

from .. import models  # noqa: F401  (registers its networks with timm)
from ..errors import InputError, out_of_memory, why, works
from .branches import Branch, ConvBranch, Layout, Tail
from .meta import copy_without_weights, flop_counter, on_meta_or_cpu
from .presets import PRESETS, PRESETS_BY_ANALOGY
from .stages import Stage, list_stages
from .tails import TailPlan, plan_tail
from .trace import TRACE_BATCH, SurgeryError, Trace, map_tensors, shapes

__all__ = ['BRANCH_KINDS', 'BranchBuilder', 'BranchSpec', 'Template', 'WEIGHT_SOURCES', 'run_bare']

_logger = logging.getLogger(__name__)

BRANCH_KINDS = ('auto', 'tail', 'conv')

# Arguments of timm.create_model that name files or addresses of weights; they do not change the layout of a model.
WEIGHT_SOURCES = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')

# Errors of timm and torch for an argument that does not fit: of a forward, and of a constructor, which checks little.
_OF_FORWARDS = (AssertionError, RuntimeError, ValueError)
_OF_CONSTRUCTORS = (*_OF_FORWARDS, ArithmeticError, LookupError, TypeError)


@dataclass(frozen=True)
class Template:
    """Makes models of a backbone's architecture."""
    architecture: str
    kwargs: Dict[str, Any]

    @classmethod
    def of(cls, backbone: nn.Module, model_kwargs: Optional[Dict[str, Any]] = None) -> 'Template':
        """Return the template of a timm model, made with ``model_kwargs`` besides those timm noted on it."""
        cfg = dict(backbone.pretrained_cfg)
        noted = getattr(backbone, '_model_args', {})  # private: timm _model_args, which 1.0.31 and later set
        kwargs = {k: v for k, v in {**noted, **(model_kwargs or {})}.items() if k not in WEIGHT_SOURCES}
        # The configuration decides about image size and pooling where the arguments do not.
        return cls(cfg['architecture'], {**kwargs, 'pretrained_cfg': cfg, 'num_classes': backbone.num_classes})

    def make(self, **overrides: Any) -> nn.Module:
        return timm.create_model(self.architecture, **{**self.kwargs, **overrides})


def _stand_in_shapes(template, overrides, stage, rank, in_chans, device, image_size) -> Dict[str, Any]:
    """Return the stubs of a tail for images of another size than it was planned with, from a trace of its template."""
    # A trace follows gradients, also where the forward that asks for it does not.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device(device):
        trace = Trace(template.make(**overrides), torch.zeros(TRACE_BATCH, in_chans, *image_size))
    return trace.stubs(trace.sources(stage)[rank])


@dataclass(frozen=True)
class BranchSpec:
    """Description of a branch to be made.

    Attributes:
        kind: 'tail' or 'conv'.
        reason: Why it is chosen, for people.
        overrides: Tail: arguments of the template that differ from the backbone's.
        keep_every: Tail: thin runs of alike blocks down to one in so many; 0 keeps one block of a kind.
        widens: Conv: double the width where the resolution halves, up to the backbone's.
    """
    kind: str
    reason: str
    overrides: Dict[str, Any] = field(default_factory=dict)
    keep_every: int = 1
    widens: bool = True


def run_bare(architecture: str, image_shape: Optional[Tuple[int, ...]] = None, **kwargs: Any) -> None:
    """Make a timm model and run it, with given settings or with none, to tell whether it is these that do not work."""
    def make_and_run(device):
        with torch.device(device):
            model = timm.create_model(architecture, **kwargs).eval()
            model(torch.zeros(TRACE_BATCH, *(image_shape or model.pretrained_cfg['input_size'])))

    on_meta_or_cpu(make_and_run)


def split_branch_kwargs(branch_kwargs: Dict[str, Any], stages: Sequence[int]) -> Dict[int, Dict[str, Any]]:
    """Return the overrides of every stage: ``'2.layers'`` is for stage 2 alone, ``'layers'`` for those without."""
    found: Dict[int, Dict[str, Any]] = {stage: {} for stage in stages}
    for key, value in branch_kwargs.items():
        prefix, dot, name = key.partition('.')
        if not dot:
            for overrides in found.values():
                overrides.setdefault(key, value)
        elif prefix.isdigit() and int(prefix) in found:
            found[int(prefix)][name] = value
        else:
            raise InputError(
                f"branch_kwargs has '{key}', but the supervised stages are {', '.join(map(str, stages))}; "
                f"write '{stages[0]}.{name}' for stage {stages[0]} alone, or '{name}' for all.")
    return found


@dataclass
class BranchBuilder:
    """Makes branches for the stages of a backbone.

    The backbone's forward is traced once, on a copy without weights on the meta device (on a second model of the
    architecture on the CPU where the forward needs real tensors). The backbone itself is only looked at.

    Args:
        backbone: timm model with a classifier.
        model_kwargs: Arguments it was made with, besides those timm noted on the model.
        image_size: Size (H, W) of the images, None for the model's own.

    Attributes:
        stages: All stages of the backbone.
        trace: Trace of the backbone's forward.
        device: Device of the traces.

    Raises:
        ValueError: The model has no classifier, does not put out logits, or does not take images of this size.
    """
    backbone: nn.Module
    model_kwargs: Dict[str, Any] = field(default_factory=dict)
    image_size: Optional[Tuple[int, int]] = None

    def __post_init__(self):
        backbone = self.backbone
        if not hasattr(backbone, 'get_classifier'):
            raise InputError(
                f'{backbone.pretrained_cfg["architecture"]} cannot classify: it is an encoder that timm has no '
                'classifier for.')
        self.stages = list_stages(backbone)
        self.template = Template.of(backbone, self.model_kwargs)
        name, kwargs = self.template.architecture, self.template.kwargs
        if not backbone.num_classes:
            raise InputError(f'{name} has no classifier (num_classes is 0); give it one with num_classes.')
        channels, *size = backbone.pretrained_cfg['input_size']
        self.in_chans = kwargs.get('in_chans') or getattr(backbone, 'in_chans', None) or channels
        own_size = kwargs.get('img_size') or getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
        self.image_size = to_2tuple(self.image_size or own_size or tuple(size))
        self._plans: Dict[Any, TailPlan] = {}
        self._traces: Dict[str, Trace] = {}
        self._blanks: Dict[str, nn.Module] = {}
        try:
            self.trace = on_meta_or_cpu(self._trace_backbone)
        except Exception as e:
            given = partial(run_bare, name, (self.in_chans, *self.image_size), **kwargs)
            if out_of_memory(e) or works(given) or not works(partial(run_bare, name)):
                raise  # no fault of the images, nor of the arguments that the model was made with
            height, width = self.image_size
            raise InputError(f'{name} does not run on images of {height} x {width}: {why(e)}') from e
        output = self.trace.calls[0].output
        if not isinstance(output, torch.Tensor) or output.shape != (TRACE_BATCH, backbone.num_classes):
            raise InputError(
                f'{name} cannot classify: its output in training mode is {shapes(output)} instead of logits '
                f'(B, {backbone.num_classes}).')

    def image(self) -> torch.Tensor:
        return torch.zeros(TRACE_BATCH, self.in_chans, *self.image_size, device=self.device)

    def _trace_backbone(self, device: str) -> Trace:
        self.device = device
        if device == 'meta':
            return Trace(copy_without_weights(self.backbone), self.image())
        with torch.device(device):
            model = self.template.make()
        return Trace(model, self.image())

    def attach(
            self,
            indices: Sequence[int],
            kind: str = 'auto',
            branch_kwargs: Optional[Dict[str, Any]] = None,
            budget: Optional[float] = None,
    ) -> List[Branch]:
        """Choose and make the branches of several stages (ascending), on the default device.

        The arguments and errors are those of :meth:`dks_timm.DKSModel.from_timm`. Within a budget, branches are made
        cheaper, the costliest first, until they fit; all tails are made thinner before one gives way to convolutions.
        """
        if kind not in BRANCH_KINDS:
            raise InputError(f"branches is '{kind}'; choose from {', '.join(BRANCH_KINDS)}.")
        overrides = split_branch_kwargs(branch_kwargs or {}, indices)
        ladders = [self._ladder(self.stages[i], kind, overrides[i]) for i in indices]
        if budget is None:
            specs = [ladder[0] for ladder in ladders]
        else:
            specs = self._fit(indices, ladders, budget)
        return [self.build(i, spec) for i, spec in zip(indices, specs, strict=True)]

    def _ladder(self, stage: Stage, kind: str, overrides: Dict[str, Any]) -> List[BranchSpec]:
        """List the branches that a stage may get, the preferred form first, then ever cheaper ones."""
        convs = [BranchSpec('conv', 'as asked'), BranchSpec('conv', 'narrow', widens=False)]
        if kind == 'conv':
            return convs
        tails = self._tails(stage, overrides)
        try:
            self._plan(stage, tails[0])
        except SurgeryError as e:
            name = self.template.architecture
            if kind == 'tail':
                given = f' with {_listed(overrides)}' if overrides else ''
                raise InputError(f"branches='tail' does not fit {name}{given}: {e}; branches='conv' does.") from e
            _logger.warning(f'{name}, stage {stage}: conv branch, because {e}.')
            return [replace(spec, reason=f'no tail: {e}') for spec in convs]
        return tails if kind == 'tail' else tails + [replace(spec, reason='within the budget') for spec in convs]

    def _tails(self, stage: Stage, overrides: Dict[str, Any]) -> List[BranchSpec]:
        if overrides:
            return [BranchSpec('tail', f'template with {_listed(overrides)}', overrides)]
        name = self.template.architecture
        preset = {**PRESETS, **PRESETS_BY_ANALOGY}.get(name, {}).get(stage.index, {})
        tails = []
        if preset and not preset.keys() & self.template.kwargs.keys():  # else another layout was asked for
            layout = "the paper's layout" if name in PRESETS else "layout as in the paper's networks"
            tails = [BranchSpec('tail', f'{layout}, {_listed(preset)}', preset), BranchSpec('tail', 'whole tail')]
        tails += [BranchSpec('tail', f'1 in {n} of repeated blocks', keep_every=n) for n in (2, 4, 8, 16)]
        return [*tails, BranchSpec('tail', '1 block of a kind', keep_every=0)]

    def _fit(self, indices: Sequence[int], ladders: List[List[BranchSpec]], budget: float) -> List[BranchSpec]:
        """Choose a rung of every ladder so that all branches together fit the budget."""
        whole = self.flops()

        @functools.cache
        def cost(n: int, rung: int) -> float:
            with torch.device(self.device):
                return self.flops(self.build(indices[n], ladders[n][rung])) / whole

        def total() -> float:
            return 1 + sum(cost(n, rung) for n, rung in enumerate(rungs))

        rungs = [0] * len(ladders)
        while total() > budget:
            cheaper = {}
            for n, rung in enumerate(rungs):
                below = (r for r in range(rung + 1, len(ladders[n])) if cost(n, r) < cost(n, rung))
                if (r := next(below, None)) is not None:
                    cheaper[n] = r
            if not cheaper:
                raise InputError(
                    f'budget is {budget}, but the cheapest branches on stages {", ".join(map(str, indices))} of '
                    f'{self.template.architecture} need {math.ceil(total() * 100) / 100}; give at least that, or fewer '
                    'stages.')
            n = max(cheaper, key=lambda n: (ladders[n][cheaper[n]].kind == 'tail', cost(n, rungs[n])))
            rungs[n] = cheaper[n]
        # A branch may have become cheaper than it has to be, now that the others are.
        for n, rung in enumerate(rungs):
            room = budget - total() + cost(n, rung)
            rungs[n] = next(r for r in range(rung + 1) if cost(n, r) <= room or r == rung)
        _logger.info(f'Training forward: {total():.2f}x the FLOPs of the backbone (budget {budget}).')
        return [ladder[rung] for ladder, rung in zip(ladders, rungs, strict=True)]

    def flops(self, branch: Optional[Branch] = None) -> int:
        """Count the forward FLOPs per image of the backbone, or of a branch made on this builder's ``device``."""
        module, inputs = self.trace.model, [self.image()]
        if branch is not None:
            features = self.trace.once[branch.source].output
            module, inputs = branch, [*inputs, map_tensors(torch.Tensor.detach, features)]
        with flop_counter(module) as counter:
            module(*inputs)
        return counter.get_total_flops() // TRACE_BATCH

    def build(self, index: int, spec: BranchSpec) -> Branch:
        """Make the branch of one stage, on the default device."""
        branch = (self._build_tail if spec.kind == 'tail' else self._build_conv)(self.stages[index], spec)
        branch.written = self.trace.once[branch.source].written
        return branch

    def _build_tail(self, stage: Stage, spec: BranchSpec) -> Tail:
        plan = self._plan(stage, spec)
        no_weights = self.device == torch.get_default_device().type == 'meta'
        return Tail(
            self._blank(spec.overrides) if no_weights else self.template.make(**spec.overrides),
            plan,
            partial(_stand_in_shapes, self.template, spec.overrides, stage, plan.rank, self.in_chans, self.device),
            self.image_size,
            stage=stage.index,
            source=self.trace.sources(stage)[plan.rank].name,
            reason='whole tail, it has no repeated blocks' if spec.keep_every != 1 and not plan.skips else spec.reason,
        )

    def _build_conv(self, stage: Stage, spec: BranchSpec) -> ConvBranch:
        source, last = self.trace.sources(stage)[0], self.stages[-1]
        return ConvBranch(
            Layout.of(source.output, stage, self.image_size),
            halvings=max(0, (last.reduction // stage.reduction).bit_length() - 1),
            max_channels=last.channels if spec.widens else 0,
            num_classes=self.backbone.num_classes,
            batch_norm=any(isinstance(m, _BatchNorm) for m in self.backbone.modules()),
            stage=stage.index,
            source=source.name,
            reason=spec.reason,
        )

    def _plan(self, stage: Stage, spec: BranchSpec) -> TailPlan:
        """Plan a tail, and check it against the backbone.

        Raises:
            SurgeryError: The architecture has no such tail, or the template's stage is not the backbone's.
            ValueError: The architecture does not take the overrides.
        """
        key = (stage, spec.keep_every, _listed(spec.overrides))
        if key not in self._plans:
            trace = self._trace_template(stage, spec.overrides)
            plan = plan_tail(trace, lambda: self._blank(spec.overrides), stage, spec.keep_every)
            source = self.trace.sources(stage)[plan.rank]
            if shapes(source.output) != plan.features:
                raise SurgeryError(
                    f'the features of stage {stage} have shape {shapes(source.output)} in the backbone and '
                    f'{plan.features} in the template; model_kwargs must say how the backbone was made')
            self._plans[key] = plan
        return self._plans[key]

    def _trace_template(self, stage: Stage, overrides: Dict[str, Any]) -> Trace:
        given = _listed(overrides)
        if given not in self._traces:
            with _naming(overrides, self.template.architecture, _OF_CONSTRUCTORS):
                model = self._blank(overrides)
            with _naming(overrides, self.template.architecture, _OF_FORWARDS):
                trace = Trace(model, self.image())
                trace.sources(stage)
            self._traces[given] = trace
        return self._traces[given]

    def _blank(self, overrides: Dict[str, Any]) -> nn.Module:
        """Make a template to plan with, on this builder's ``device``: a copy, since making it anew takes far longer."""
        given = _listed(overrides)
        if given not in self._blanks:
            with torch.device(self.device):
                self._blanks[given] = self.template.make(**overrides)
        return copy.deepcopy(self._blanks[given])


@contextlib.contextmanager
def _naming(overrides: Dict[str, Any], architecture: str, errors: Tuple[type, ...]):
    """Name the overrides in the errors of a template that has any."""
    try:
        yield
    except SurgeryError:
        raise
    except errors as e:
        if not overrides or out_of_memory(e):
            raise
        given = _listed(overrides)
        raise InputError(f'branch_kwargs has {given}; {architecture} cannot be made with {given}: {why(e)}') from e


def _listed(kwargs: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in kwargs.items()) or 'no arguments'
