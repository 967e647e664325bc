"""Deciding which branches to attach to a backbone, and making them."""
import copy
import functools
import logging
import math
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .. import models  # noqa: F401  (registers its networks with timm)
from ..errors import InputError, out_of_memory, why, works
from .branches import Branch, ConvBranch, Layout, Tail
from .stages import Stage, list_stages
from .tails import TRACE_BATCH, SurgeryError, TailPlan, Trace, plan_tail, shapes, without_fast_norm

__all__ = ['BRANCH_KINDS', 'PRESETS', 'BranchBuilder', 'BranchSpec', 'Template', 'copy_without_weights']

_logger = logging.getLogger(__name__)

BRANCH_KINDS = ('auto', 'tail', 'conv')

# The paper's branches as overrides of the template, by supervised stage. On ImageNet, after layer2: layer3 at about
# half depth and two blocks of layer4; after layer3: layer4 at twice the width. On CIFAR, after the first stage: all of
# the second and half of the third (ResNet-110: half of both), rounded up; after the second: the third at twice the
# width.
PRESETS: Dict[str, Dict[int, Dict[str, Any]]] = {
    'resnet18': {2: dict(layers=(2, 2, 1, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet34': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet50': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet101': {2: dict(layers=(3, 4, 12, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet152': {2: dict(layers=(3, 8, 18, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet32_cifar': {1: dict(layers=(5, 5, 3)), 2: dict(channels=(16, 32, 128))},
    'resnet110_cifar': {1: dict(layers=(18, 9, 9)), 2: dict(channels=(16, 32, 128))},
    'wrn_28_10_cifar': {1: dict(layers=(4, 4, 2)), 2: dict(channels=(160, 320, 1280))},
    'densenet_40_12_cifar': {1: dict(layers=(12, 12, 6)), 2: dict(growth_rate=(12, 12, 36))},
}

# Networks that the paper does not have, by the rules of ResNet-32, WRN-28-10 and the ResNets on ImageNet.
PRESETS_BY_ANALOGY: Dict[str, Dict[int, Dict[str, Any]]] = {
    'resnet20_cifar': {1: dict(layers=(3, 3, 2)), 2: dict(channels=(16, 32, 128))},
    'resnet44_cifar': {1: dict(layers=(7, 7, 4)), 2: dict(channels=(16, 32, 128))},
    'resnet56_cifar': {1: dict(layers=(9, 9, 5)), 2: dict(channels=(16, 32, 128))},
    'wrn_16_2_cifar': {1: dict(layers=(2, 2, 1)), 2: dict(channels=(32, 64, 256))},
    'wrn_40_4_cifar': {1: dict(layers=(6, 6, 3)), 2: dict(channels=(64, 128, 512))},
    'resnet18_cifar': PRESETS['resnet18'],
    'resnet50_cifar': PRESETS['resnet50'],
}

# Arguments of timm.create_model that say where weights come from, not what the model looks like.
_NOT_THE_LAYOUT = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')


@dataclass(frozen=True)
class Template:
    """How to make models of a backbone's architecture."""
    architecture: str
    kwargs: Dict[str, Any]

    @classmethod
    def of(cls, backbone: nn.Module, model_kwargs: Optional[Dict[str, Any]] = None) -> 'Template':
        """Template of a timm model.

        Args:
            backbone: timm model; its architecture's name is in its ``pretrained_cfg``.
            model_kwargs: Arguments it was made with, besides those timm noted on the model.
        """
        cfg = dict(backbone.pretrained_cfg)
        noted = getattr(backbone, '_model_args', {})  # since timm 1.0.31
        kwargs = {k: v for k, v in {**noted, **(model_kwargs or {})}.items() if k not in _NOT_THE_LAYOUT}
        # The configuration decides about image size and pooling where the arguments do not.
        return cls(cfg['architecture'], {**kwargs, 'pretrained_cfg': cfg, 'num_classes': backbone.num_classes})

    def make(self, **overrides: Any) -> nn.Module:
        return timm.create_model(self.architecture, **{**self.kwargs, **overrides})


@dataclass(frozen=True)
class Retrace:
    """Looks up the stand-in shapes of a tail's template at another image size."""
    template: Template
    overrides: Dict[str, Any]
    stage: Stage
    rank: int
    in_chans: int
    device: str

    def __call__(self, image_size: Tuple[int, int]) -> Dict[str, Any]:
        # A trace follows gradients, also where the forward that asks for it does not.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device(self.device):
            x = torch.zeros(TRACE_BATCH, self.in_chans, *image_size)
            trace = Trace(self.template.make(**self.overrides), x)
        return trace.stubs(trace.sources(self.stage)[self.rank])


@dataclass(frozen=True)
class BranchSpec:
    """What a branch is to be.

    Attributes:
        kind: 'tail' or 'conv'.
        reason: Why, for people.
        overrides: Tail: arguments of the template that differ from the backbone's.
        keep_every: Tail: thin runs of alike blocks down to one in so many; 0 keeps one block of a kind.
        widens: Conv: double the width where the resolution halves, up to the backbone's.
    """
    kind: str
    reason: str
    overrides: Dict[str, Any] = field(default_factory=dict)
    keep_every: int = 1
    widens: bool = True


def run_bare(architecture: str, run: Callable = nn.Module.__call__) -> None:
    """Make a timm model and run it without further settings, to tell whether it is these that do not work."""
    for device in ('meta', 'cpu'):  # some forwards read the values of tensors, and the meta device has none
        try:
            with torch.device(device):
                model = timm.create_model(architecture).eval()
                run(model, torch.zeros(TRACE_BATCH, *model.pretrained_cfg['input_size']))
            return
        except RuntimeError:
            if device == 'cpu':
                raise


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
            name = backbone.pretrained_cfg['architecture']
            raise InputError(f'{name} cannot classify: it is an encoder that timm has no classifier for.')
        self.stages = list_stages(backbone)
        self.template = Template.of(backbone, self.model_kwargs)
        name = self.template.architecture
        if not backbone.num_classes:
            raise InputError(f'{name} has no classifier (num_classes is 0); give it one with num_classes.')
        kwargs = self.template.kwargs
        channels, *size = backbone.pretrained_cfg['input_size']
        self.in_chans = kwargs.get('in_chans') or getattr(backbone, 'in_chans', None) or channels
        own_size = kwargs.get('img_size') or getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
        self.image_size = to_2tuple(self.image_size or own_size or tuple(size))
        self.batch_norm = any(isinstance(m, _BatchNorm) for m in backbone.modules())
        self._plans: Dict[Any, TailPlan] = {}
        self._traces: Dict[str, Trace] = {}
        self._blanks: Dict[str, nn.Module] = {}
        try:
            self.trace = self._trace_backbone()
        except Exception as e:
            if out_of_memory(e) or not works(lambda: run_bare(name, _trace)):
                raise
            height, width = self.image_size
            raise InputError(f'{name} does not run on images of {height} x {width}: {why(e)}') from e
        output = self.trace.calls[0].output
        if not isinstance(output, torch.Tensor) or output.shape != (TRACE_BATCH, backbone.num_classes):
            raise InputError(
                f'{name} cannot classify: its output in training mode is {shapes(output)} instead of logits '
                f'(B, {backbone.num_classes}).')

    def image(self) -> torch.Tensor:
        return torch.zeros(TRACE_BATCH, self.in_chans, *self.image_size, device=self.device)

    def _trace_backbone(self) -> Trace:
        try:
            self.device = 'meta'
            return _trace(self.backbone, self.image())
        except RuntimeError:
            # Some forwards read the values of tensors, and the meta device has none.
            self.device = 'cpu'
            with torch.device(self.device):
                model = self.template.make()
            return Trace(model, self.image())

    def attach(
            self,
            indices: Sequence[int],
            kind: str = 'auto',
            overrides: Optional[Dict[int, Dict[str, Any]]] = None,
            budget: Optional[float] = None,
    ) -> List[Branch]:
        """Choose and make the branches of several stages, on the default device.

        Args:
            indices: Stages, ascending.
            kind: 'tail', 'conv', or 'auto' for a tail where the architecture allows it.
            overrides: Arguments of the tails' templates that differ from the backbone's, by stage.
            budget: Most that one training forward (backbone and branches) may cost, as a multiple of the backbone's
                forward FLOPs. Branches are made cheaper, the costliest first, until they fit; all tails are made
                thinner before one gives way to convolutions.

        Raises:
            ValueError: Unknown kind, a tail that the architecture or the overrides do not allow, or a budget below the
                cheapest branches.
        """
        if kind not in BRANCH_KINDS:
            raise InputError(f"branches is '{kind}'; choose from {', '.join(BRANCH_KINDS)}.")
        ladders = [self._ladder(self.stages[i], kind, (overrides or {}).get(i)) for i in indices]
        if budget is not None:
            specs = self._fit(indices, ladders, budget)
        else:
            specs = [ladder[0] for ladder in ladders]
        return [self.build(i, spec) for i, spec in zip(indices, specs, strict=True)]

    def _ladder(self, stage: Stage, kind: str, overrides: Optional[Dict[str, Any]]) -> List[BranchSpec]:
        """What the branch of a stage may be, the preferred form first, then ever cheaper ones."""
        name = self.template.architecture
        preset = {**PRESETS, **PRESETS_BY_ANALOGY}.get(name, {}).get(stage.index, {})
        if preset.keys() & self.template.kwargs.keys():
            preset = {}  # it is for the architecture's own layout, not for one that was asked for
        tails = []
        if overrides:
            tails = [BranchSpec('tail', f'template with {_listed(overrides)}', overrides)]
        else:
            if preset:
                layout = "the paper's layout" if name in PRESETS else "layout as in the paper's networks"
                tails = [BranchSpec('tail', f'{layout}, {_listed(preset)}', preset)]
                tails += [BranchSpec('tail', 'whole tail')]
            tails += [BranchSpec('tail', f'1 in {n} of repeated blocks', keep_every=n) for n in (2, 4, 8, 16)]
            tails += [BranchSpec('tail', '1 block of a kind', keep_every=0)]
        convs = [BranchSpec('conv', 'as asked'), BranchSpec('conv', 'narrow', widens=False)]
        if kind == 'conv':
            return convs
        try:
            self._plan(stage, tails[0])
        except SurgeryError as e:
            if kind == 'tail':
                given = f' with {_listed(overrides)}' if overrides else ''
                raise InputError(
                    f"branches='tail' does not fit {name}{given}: {e}; branches='conv' does.") from e
            _logger.warning(f'{name}, stage {stage}: conv branch, because {e}.')
            return [replace(spec, reason=f'no tail: {e}') for spec in convs]
        return tails if kind == 'tail' else tails + [replace(spec, reason='within the budget') for spec in convs]

    def _fit(self, indices: Sequence[int], ladders: List[List[BranchSpec]], budget: float) -> List[BranchSpec]:
        whole = self.flops()

        @functools.cache
        def cost(n: int, rung: int) -> float:
            return self._spec_flops(indices[n], ladders[n][rung]) / whole

        def total() -> float:
            return 1 + sum(cost(n, rung) for n, rung in enumerate(rungs))

        rungs = [0] * len(ladders)
        while total() > budget:
            cheaper = {}
            for n, rung in enumerate(rungs):
                below = (r for r in range(rung + 1, len(ladders[n])) if cost(n, r) < cost(n, rung))
                cheaper[n] = next(below, None)
            cheaper = {n: rung for n, rung in cheaper.items() if rung is not None}
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

    def _spec_flops(self, index: int, spec: BranchSpec) -> int:
        with torch.device(self.device):
            return self.flops(self.build(index, spec))

    def flops(self, branch: Optional[Branch] = None) -> int:
        """Forward FLOPs per image of the backbone, or of a branch made for counting on this builder's ``device``."""
        if branch is None:
            module, inputs = self.trace.model, [self.image()]
        else:
            features = self.trace.once[branch.source].output
            module, inputs = branch, [self.image(), tree_map_only(torch.Tensor, torch.Tensor.detach, features)]
        # The counter follows gradients where there are any, and stumbles over expanded parameters.
        without_fast_norm(module).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops() // TRACE_BATCH

    def build(self, index: int, spec: BranchSpec) -> Branch:
        """Make the branch of one stage, on the default device."""
        branch = self._build(index, spec)
        branch.written = self.trace.once[branch.source].written
        return branch

    def _build(self, index: int, spec: BranchSpec) -> Branch:
        stage = self.stages[index]
        where = dict(stage=index, reason=spec.reason)
        if spec.kind == 'tail':
            plan = self._plan(stage, spec)
            if spec.keep_every != 1 and not plan.skips:
                where['reason'] = 'whole tail, it has no repeated blocks'
            source = self.trace.sources(stage)[plan.rank]
            retrace = Retrace(self.template, spec.overrides, stage, plan.rank, self.in_chans, self.device)
            no_weights = self.device == torch.get_default_device().type == 'meta'
            template = self._blank(spec.overrides) if no_weights else self.template.make(**spec.overrides)
            return Tail(template, plan, retrace, self.image_size, source=source.name, **where)
        source = self.trace.sources(stage)[0]
        last = self.stages[-1]
        return ConvBranch(
            Layout.of(source.output, stage, self.image_size),
            halvings=max(0, (last.reduction // stage.reduction).bit_length() - 1),
            max_channels=last.channels if spec.widens else 0,
            num_classes=self.backbone.num_classes,
            batch_norm=self.batch_norm,
            source=source.name,
            **where,
        )

    def _plan(self, stage: Stage, spec: BranchSpec) -> TailPlan:
        """Plan of a tail, checked against the backbone.

        Raises:
            SurgeryError: The architecture has no such tail, or the template's stage is not the backbone's.
            ValueError: The architecture does not take the overrides.
        """
        given = _listed(spec.overrides)
        key = (stage, spec.keep_every, given)
        if key not in self._plans:
            if given not in self._traces:
                try:
                    self._traces[given] = Trace(self._blank(spec.overrides), self.image())
                    self._traces[given].sources(stage)
                except SurgeryError:
                    raise
                except Exception as e:
                    if not spec.overrides or out_of_memory(e) or not works(lambda: self._blank({})):
                        raise
                    name = self.template.architecture
                    raise InputError(f'branch_kwargs has {given}; {name} cannot be made with {given}: {why(e)}') from e
            plan = plan_tail(self._traces[given], lambda: self._blank(spec.overrides), stage, spec.keep_every)
            source = self.trace.sources(stage)[plan.rank]
            if shapes(source.output) != plan.features:
                raise SurgeryError(
                    f'the features of stage {stage} have shape {shapes(source.output)} in the backbone and '
                    f'{plan.features} in the template; model_kwargs must say how the backbone was made')
            self._plans[key] = plan
        return self._plans[key]

    def _blank(self, overrides: Dict[str, Any]) -> nn.Module:
        """A template to plan with, on this builder's ``device``: copied, since making it anew takes far longer."""
        given = _listed(overrides)
        if given not in self._blanks:
            with torch.device(self.device):
                self._blanks[given] = self.template.make(**overrides)
        return copy.deepcopy(self._blanks[given])


def _trace(model: nn.Module, image: torch.Tensor) -> Trace:
    return Trace(copy_without_weights(model) if image.is_meta else model, image)


def _listed(kwargs: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in kwargs.items()) or 'no arguments'


def copy_without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device."""
    memo: Dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        blank = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return without_fast_norm(copy.deepcopy(model, memo))
