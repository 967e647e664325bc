"""Deciding which branches to attach to a backbone, and making them."""
import copy
import functools
import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, LayerNormAct2d, to_2tuple
from timm.models import get_model_input_config
from torch.nn.modules.batchnorm import _BatchNorm

from .. import models  # noqa: F401  (registers its networks with timm)
from .._compat import creation_args
from ..errors import InputError
from .branches import Branch, ConvBranch, Layout, Tail
from .stages import Stage, list_stages
from .tails import TailPlan, plan_tail
from .trace import TRACE_BATCH, SurgeryError, Trace, copy_without_weights, flop_counter, map_tensors, shapes

_logger = logging.getLogger(__name__)

BRANCH_KINDS = ('auto', 'tail', 'conv')

# Arguments of timm.create_model that say where weights come from or go to; they do not change the layout of a model.
WEIGHT_PLACES = (
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'device', 'dtype')

# The paper's branches, as overrides of the template by supervised stage (Sun et al., CVPR 2019, section 4).
# On ImageNet, after layer2: layer3 at about half depth, two blocks of layer4; after layer3: layer4 at twice the width.
# On CIFAR, after the first stage: all of the second and half of the third (ResNet-110: half of both), rounded up; after
# the second: the third at twice the width (DenseNet: at three times the growth rate).
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
    **{f'resnet{6 * n + 2}_cifar': {1: dict(layers=(n, n, -(-n // 2))), 2: dict(channels=(16, 32, 128))}
       for n in (1, 3, 7, 9)},
    'wrn_16_2_cifar': {1: dict(layers=(2, 2, 1)), 2: dict(channels=(32, 64, 256))},
    'wrn_40_4_cifar': {1: dict(layers=(6, 6, 3)), 2: dict(channels=(64, 128, 512))},
    'resnet18_cifar': PRESETS['resnet18'],
    'resnet50_cifar': PRESETS['resnet50'],
}

# Errors of timm and torch for an argument that does not fit: of a forward, and of a constructor, which checks little.
_OF_FORWARDS = (AssertionError, RuntimeError, ValueError)
_OF_CONSTRUCTORS = (*_OF_FORWARDS, ArithmeticError, LookupError, TypeError)


@dataclass(frozen=True)
class BranchSpec:
    """Description of a branch to be made."""
    kind: str  # 'tail' or 'conv'
    reason: str  # why it is chosen, for people
    overrides: Dict[str, Any] = field(default_factory=dict)  # of a tail: arguments of its template
    keep_every: int = 1  # of a tail: thin runs of alike blocks down to one in so many; 0 keeps one block of a kind
    widens: bool = True  # of convolutions: double the width where the resolution halves, up to the backbone's


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


class BranchBuilder:
    """Makes branches for the stages of a backbone.

    The backbone's forward is traced once, on a copy without weights; the backbone itself is only looked at. The
    arguments and errors are those of :meth:`dks_timm.DKSModel.from_timm`.
    """

    def __init__(self, backbone: nn.Module, model_kwargs: Optional[Dict] = None, image_size: Optional[Tuple] = None):
        cfg = dict(backbone.pretrained_cfg)
        name = self.architecture = cfg['architecture']
        if not hasattr(backbone, 'get_classifier'):
            raise InputError(f'{name} cannot classify: it is an encoder that timm has no classifier for.')
        if not backbone.num_classes:
            raise InputError(f'{name} has no classifier (num_classes is 0); give it one with num_classes.')
        self.backbone = backbone
        self.stages = list_stages(backbone)
        noted = creation_args(backbone)
        kwargs = {k: v for k, v in {**noted, **(model_kwargs or {})}.items() if k not in WEIGHT_PLACES}
        # The configuration decides about image size and pooling where the arguments do not.
        self.kwargs = {**kwargs, 'pretrained_cfg': cfg, 'num_classes': backbone.num_classes}
        in_chans, *own_size = get_model_input_config(backbone)['input_size']
        self.input_size = (in_chans, *to_2tuple(image_size or tuple(own_size)))
        self.image = torch.zeros(TRACE_BATCH, *self.input_size, device='meta')
        self._templates: Dict[str, Tuple[nn.Module, Trace]] = {}
        self._plans: Dict[Any, TailPlan] = {}
        try:
            self.trace = Trace(copy_without_weights(backbone), self.image)
        except _OF_FORWARDS as e:
            _, height, width = self.input_size
            raise InputError(f'{name} does not run on images of {height} x {width}: {type(e).__name__}: {e}') from e
        output = self.trace.calls[0].output
        if not isinstance(output, torch.Tensor) or output.shape != (TRACE_BATCH, backbone.num_classes):
            raise InputError(
                f'{name} cannot classify: its output in training mode is {shapes(output)} instead of logits '
                f'(B, {backbone.num_classes}).')

    def attach(
            self, indices: Sequence[int], kind: str = 'auto', branch_kwargs: Optional[Dict] = None,
            budget: Optional[float] = None,
    ) -> List[Branch]:
        """Choose and make the branches of several stages (ascending), on the default device.

        Within a budget, branches are made cheaper, the costliest first, until they fit; all tails are made thinner
        before one gives way to convolutions.
        """
        if kind not in BRANCH_KINDS:
            raise InputError(f"branches is '{kind}'; choose from {', '.join(BRANCH_KINDS)}.")
        overrides = split_branch_kwargs(branch_kwargs or {}, indices)
        ladders = [self._ladder(self.stages[i], kind, overrides[i]) for i in indices]
        specs = [ladder[0] for ladder in ladders] if budget is None else self._fit(indices, ladders, budget)
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
            if kind == 'tail':
                given = f' with {_listed(overrides)}' if overrides else ''
                raise InputError(
                    f"branches='tail' does not fit {self.architecture}{given}: {e}; branches='conv' does.") from e
            _logger.warning(f'{self.architecture}, stage {stage}: conv branch, because {e}.')
            return [replace(spec, reason=f'no tail: {e}') for spec in convs]
        return tails if kind == 'tail' else tails + [replace(spec, reason='within the budget') for spec in convs]

    def _tails(self, stage: Stage, overrides: Dict[str, Any]) -> List[BranchSpec]:
        if overrides:
            return [BranchSpec('tail', f'template with {_listed(overrides)}', overrides)]
        name = self.architecture
        preset = {**PRESETS, **PRESETS_BY_ANALOGY}.get(name, {}).get(stage.index, {})
        tails = []
        if preset and not preset.keys() & self.kwargs.keys():  # else another layout was asked for
            layout = "the paper's layout" if name in PRESETS else "layout as in the paper's networks"
            tails = [BranchSpec('tail', f'{layout}, {_listed(preset)}', preset), BranchSpec('tail', 'whole tail')]
        tails += [BranchSpec('tail', f'1 in {n} of repeated blocks', keep_every=n) for n in (2, 4, 8, 16)]
        return [*tails, BranchSpec('tail', '1 block of a kind', keep_every=0)]

    def _fit(self, indices: Sequence[int], ladders: List[List[BranchSpec]], budget: float) -> List[BranchSpec]:
        """Choose a rung of every ladder so that all branches together fit the budget."""
        whole = self.flops()
        rungs = [0] * len(ladders)

        @functools.cache
        def cost(n: int, rung: int) -> float:
            with torch.device('meta'):
                return self.flops(self.build(indices[n], ladders[n][rung])) / whole

        def total() -> float:
            return 1 + sum(cost(n, rung) for n, rung in enumerate(rungs))

        def next_cheaper(n: int) -> Optional[int]:
            below = range(rungs[n] + 1, len(ladders[n]))
            return next((rung for rung in below if cost(n, rung) < cost(n, rungs[n])), None)

        while total() > budget:
            cheaper = {n: rung for n in range(len(rungs)) if (rung := next_cheaper(n)) is not None}
            if not cheaper:
                raise InputError(
                    f'budget is {budget}, but the cheapest branches on stages {", ".join(map(str, indices))} of '
                    f'{self.architecture} need {math.ceil(total() * 100) / 100}; give at least that, or fewer stages.')
            n = max(cheaper, key=lambda n: (ladders[n][cheaper[n]].kind == 'tail', cost(n, rungs[n])))
            rungs[n] = cheaper[n]
        # A branch may have become cheaper than it has to be, now that the others are.
        for n, rung in enumerate(rungs):
            room = budget - total() + cost(n, rung)
            rungs[n] = next(r for r in range(rung + 1) if cost(n, r) <= room or r == rung)
        _logger.info(f'Training forward: {total():.2f}x the FLOPs of the backbone (budget {budget}).')
        return [ladder[rung] for ladder, rung in zip(ladders, rungs, strict=True)]

    def flops(self, branch: Optional[Branch] = None) -> int:
        """Count the forward FLOPs per image of the backbone, or of a branch made on the meta device."""
        module, inputs = self.trace.model, [self.image]
        if branch is not None:
            features = self.trace.once[branch.source].output
            module, inputs = branch, [self.image, map_tensors(torch.Tensor.detach, features)]
        with flop_counter(module) as counter:
            module(*inputs)
        return counter.get_total_flops() // TRACE_BATCH

    def build(self, index: int, spec: BranchSpec) -> Branch:
        """Make the branch of one stage, on the default device."""
        stage, last = self.stages[index], self.stages[-1]
        if spec.kind == 'tail':
            return self._build_tail(stage, spec)
        source = self.trace.sources(stage)[0]
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.backbone.modules())
        return ConvBranch(
            Layout.of(source.output, stage, self.input_size[1:]),
            halvings=max(0, (last.reduction // stage.reduction).bit_length() - 1),
            max_channels=last.channels if spec.widens else 0,
            num_classes=self.backbone.num_classes,
            norm_layer=BatchNormAct2d if has_batch_norm else LayerNormAct2d,
            stage=index,
            source=source.name,
            reason=spec.reason,
        )

    def _build_tail(self, stage: Stage, spec: BranchSpec) -> Tail:
        plan = self._plan(stage, spec)
        make = self._make(spec.overrides)
        no_weights = torch.get_default_device().type == 'meta'
        return Tail(
            copy.deepcopy(self._template(spec.overrides)[0]) if no_weights else make(),
            plan,
            partial(_stubs_at, make, plan.source, self.input_size[0]),
            self.input_size[1:],
            stage=stage.index,
            source=self.trace.sources(stage)[plan.rank].name,
            reason='whole tail, it has no repeated blocks' if spec.keep_every != 1 and not plan.skips else spec.reason,
        )

    def _plan(self, stage: Stage, spec: BranchSpec) -> TailPlan:
        """Plan a tail; raise SurgeryError where there is none, or where its template's stage is not the backbone's."""
        given = _listed(spec.overrides)
        key = (stage, spec.keep_every, given)
        if key in self._plans:
            return self._plans[key]
        try:
            blank, trace = self._template(spec.overrides)
            plan = plan_tail(trace, lambda: copy.deepcopy(blank), stage, spec.keep_every)
        except SurgeryError:
            raise
        except _OF_CONSTRUCTORS as e:
            if not spec.overrides:
                raise
            raise InputError(
                f'branch_kwargs has {given}; {self.architecture} cannot be made with {given}: '
                f'{type(e).__name__}: {e}') from e
        source = self.trace.sources(stage)[plan.rank]
        if shapes(source.output) != plan.features:
            raise SurgeryError(
                f'the features of stage {stage} have shape {shapes(source.output)} in the backbone and '
                f'{plan.features} in the template; model_kwargs must say how the backbone was made')
        self._plans[key] = plan
        return plan

    def _make(self, overrides: Dict[str, Any]) -> Callable[[], nn.Module]:
        return partial(timm.create_model, self.architecture, **{**self.kwargs, **overrides})

    def _template(self, overrides: Dict[str, Any]) -> Tuple[nn.Module, Trace]:
        """Return a template without weights, to be copied, as making it takes far longer, and its trace."""
        given = _listed(overrides)
        if given not in self._templates:
            with torch.device('meta'):
                blank = self._make(overrides)()
            self._templates[given] = blank, Trace(copy.deepcopy(blank), self.image)
        return self._templates[given]


def _stubs_at(make: Callable[[], nn.Module], source: str, in_chans: int, image_size: Tuple[int, int]) -> Dict[str, Any]:
    """Return the stubs of a tail for images of another size than it was planned with."""
    # A trace follows gradients, also where the forward that asks for it does not.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device('meta'):
        trace = Trace(make(), torch.zeros(TRACE_BATCH, in_chans, *image_size))
    return trace.stubs(trace.once[source])


def _listed(kwargs: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in kwargs.items()) or 'no arguments'
