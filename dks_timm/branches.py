"""Supervision branches: the tail of a template model, and a plain convolutional one."""
import copy
import logging
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Dict, Optional, Set, Tuple

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, ClassifierHead, LayerNormAct2d, SeparableConvNormAct, to_2tuple
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from .stages import Stage, list_stages
from .surgery import TRACE_BATCH, Feed, SurgeryError, TailPlan, Trace, cut, plan_tail, shapes, tensors

__all__ = ['BRANCH_KINDS', 'PRESETS', 'Branch', 'BranchBuilder', 'ConvBranch', 'Layout', 'Tail', 'Template']

_logger = logging.getLogger(__name__)

BRANCH_KINDS = ('auto', 'tail', 'conv')

# The paper's branches as overrides of the template, by supervised stage. After layer2: layer3 at about half depth and
# two blocks of layer4. After layer3: layer4 at twice the width.
PRESETS: Dict[str, Dict[int, Dict[str, Any]]] = {
    'resnet18': {2: dict(layers=(2, 2, 1, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet34': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet50': {2: dict(layers=(3, 4, 3, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet101': {2: dict(layers=(3, 4, 12, 2)), 3: dict(channels=(64, 128, 256, 1024))},
    'resnet152': {2: dict(layers=(3, 8, 18, 2)), 3: dict(channels=(64, 128, 256, 1024))},
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


class Branch(nn.Module):
    """An auxiliary classifier: ``branch(image, features)`` returns logits (B, num_classes).

    ``image`` is the batch (B, C, H, W), ``features`` whatever the module at the end of the stage put out.

    Attributes:
        kind: 'tail' or 'conv'.
        stage: Supervised stage, an index into the backbone's ``feature_info``.
        source: Module of the backbone that puts out the features.
        reason: Why the branch is what it is, for people.
    """
    kind: str

    def __init__(self, stage: int, source: str, reason: str):
        super().__init__()
        self.stage = stage
        self.source = source
        self.reason = reason

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError('a branch names its classifier')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, where there are enough of them."""

    def no_weight_decay(self) -> Set[str]:
        """Names of parameters to exempt from weight decay."""
        return set()


class Tail(Branch):
    """The part of a template after a stage, fed with the backbone's features.

    Args:
        template: Freshly made model; it is cut in place.
        plan: Plan of the cut.
        retrace: Looks up the stand-in shapes at image sizes other than the planned one.
        image_size: (H, W) of the images that the plan was made with.
        **where: Attributes of :class:`Branch`.
    """
    kind = 'tail'

    def __init__(
            self,
            template: nn.Module,
            plan: TailPlan,
            retrace: 'Retrace',
            image_size: Tuple[int, int],
            **where: Any,
    ):
        super().__init__(**where)
        self.plan = plan
        self.feed = Feed()
        self.template = cut(template, plan, self.feed)
        self.retrace = retrace
        self.stub_shapes = {tuple(image_size): plan.stubs}
        self.recomputes = False

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        feed = self.feed
        feed.image, feed.shapes = image, self.shapes_at(image.shape[-2], image.shape[-1])
        feed.features = tree_map_only(torch.Tensor, torch.clone, features) if self.plan.copies else features
        logits = self.template(image)
        if not self.recomputes:
            feed.image = feed.features = None  # keep no activations alive between steps
        return logits

    def shapes_at(self, height: int, width: int) -> Dict[str, Any]:
        size = (height, width)
        if size not in self.stub_shapes:
            self.stub_shapes[size] = self.retrace(size)
        return self.stub_shapes[size]

    def get_classifier(self) -> nn.Module:
        return self.template.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.template.set_grad_checkpointing(enable)
        self.recomputes = enable  # the features are needed again in the backward pass

    def no_weight_decay(self) -> Set[str]:
        return {f'template.{name}' for name in getattr(self.template, 'no_weight_decay', set)()}

    def start_from(self, backbone: nn.Module) -> None:
        """Copy the backbone's weights wherever name and shape agree."""
        own, given = self.template.state_dict(), backbone.state_dict()
        own.update({k: given[k] for k, v in own.items() if k in given and given[k].shape == v.shape})
        self.template.load_state_dict(own)


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
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            x = torch.zeros(TRACE_BATCH, self.in_chans, *image_size)
            trace = Trace(self.template.make(**self.overrides).train(), x)
        return trace.stubs(trace.sources(self.stage)[self.rank])


@dataclass(frozen=True)
class Layout:
    """Where a stage's feature map is in the output of its module.

    Attributes:
        index: Position among the output's tensors.
        format: 'NCHW', 'NHWC', or 'NLC' for tokens.
        channels: Number of channels.
        reduction: Stride relative to the image, or None for tokens that form no grid.
        prefix: Tokens before the grid (class, register and distillation tokens).
    """
    index: int
    format: str
    channels: int
    reduction: Optional[int] = None
    prefix: int = 0

    @classmethod
    def of(cls, output: Any, stage: Stage, image_size: Tuple[int, int]) -> 'Layout':
        """Find the feature map of ``stage`` in its module's output.

        Raises:
            SurgeryError: No tensor there looks like one.
        """
        grid = tuple(-(-s // stage.reduction) for s in image_size)
        candidates = list(enumerate(tensors(output)))
        # The tensor with the stage's number of channels first, then any other.
        for index, t in sorted(candidates, key=lambda c: stage.channels not in c[1].shape[1:]):
            if t.ndim == 4 and (t.shape[1] == stage.channels or t.shape[-1] != stage.channels):
                return cls(index, 'NCHW', t.shape[1])
            if t.ndim == 4:
                return cls(index, 'NHWC', t.shape[-1])
            if t.ndim == 3:
                prefix = t.shape[1] - grid[0] * grid[1]
                on_grid = 0 <= prefix < t.shape[1]
                return cls(index, 'NLC', t.shape[2], *((stage.reduction, prefix) if on_grid else ()))
        raise SurgeryError(f'{stage} puts out no feature map')

    def to_nchw(self, output: Any, image: torch.Tensor) -> torch.Tensor:
        """The feature map (B, channels, H', W') in ``output``."""
        x = output if isinstance(output, torch.Tensor) else tensors(output)[self.index]
        if self.format == 'NCHW':
            return x
        if self.format == 'NHWC':
            return x.permute(0, 3, 1, 2)
        x = x[:, self.prefix:].transpose(1, 2)
        if self.reduction is None:
            return x.unsqueeze(-1)
        return x.unflatten(2, (-(-image.shape[-2] // self.reduction), -1))


class ConvBranch(Branch):
    """A light branch for any stage: strided depthwise-separable convolutions, average pooling, a linear classifier.

    Args:
        layout: Where the features are.
        halvings: Times the resolution is halved, doubling the width; one convolution at full resolution if 0.
        max_channels: Bound on the width.
        num_classes: Number of classes.
        batch_norm: BatchNorm, as in most CNNs, or LayerNorm, for backbones without batch statistics.
        **where: Attributes of :class:`Branch`.
    """
    kind = 'conv'

    def __init__(
            self,
            layout: Layout,
            halvings: int,
            max_channels: int,
            num_classes: int,
            batch_norm: bool = True,
            **where: Any,
    ):
        super().__init__(**where)
        self.layout = layout
        width = layout.channels
        norm_layer = BatchNormAct2d if batch_norm else LayerNormAct2d
        blocks = []
        for stride in [2] * halvings or [1]:
            out = max(width, min(width * stride, max_channels))
            blocks.append(SeparableConvNormAct(width, out, stride=stride, norm_layer=norm_layer))
            width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = ClassifierHead(width, num_classes)

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        return self.head(self.blocks(self.layout.to_nchw(features, image)))

    def get_classifier(self) -> nn.Module:
        return self.head.fc


@dataclass
class BranchBuilder:
    """Makes branches for the stages of a backbone.

    The backbone's forward is traced once, on a copy without weights on the meta device (a model that needs real tensors
    is copied to the CPU). The backbone itself is only looked at.

    Args:
        backbone: timm model with a classifier.
        model_kwargs: Arguments it was made with, besides those timm noted on the model.

    Raises:
        ValueError: The model has no classifier.
    """
    backbone: nn.Module
    model_kwargs: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        backbone = self.backbone
        self.stages = list_stages(backbone)
        self.template = Template.of(backbone, self.model_kwargs)
        name = self.template.architecture
        if not backbone.num_classes:
            raise ValueError(f'{name} has no classifier (num_classes is 0); give it one with num_classes.')
        kwargs = self.template.kwargs
        channels, *size = backbone.pretrained_cfg['input_size']
        self.in_chans = kwargs.get('in_chans') or getattr(backbone, 'in_chans', None) or channels
        self.image_size = to_2tuple(kwargs.get('img_size') or getattr(
            getattr(backbone, 'patch_embed', None), 'img_size', None) or tuple(size))
        self.batch_norm = any(isinstance(m, _BatchNorm) for m in backbone.modules())
        try:
            self.device = 'meta'
            self.trace = self._trace_backbone()
        except RuntimeError:
            # Some forwards read the values of tensors, and the meta device has none.
            self.device = 'cpu'
            self.trace = self._trace_backbone()
        output = self.trace.calls[0].output
        if not isinstance(output, torch.Tensor) or output.shape != (TRACE_BATCH, backbone.num_classes):
            raise ValueError(
                f'{name} cannot classify: its output in training mode is {shapes(output)} instead of logits '
                f'(B, {backbone.num_classes}); timm has no classifier for this encoder.')

    def _image(self) -> torch.Tensor:
        return torch.zeros(TRACE_BATCH, self.in_chans, *self.image_size, device=self.device)

    def _trace_backbone(self) -> Trace:
        return Trace(_copy_to(self.backbone, self.device).train(), self._image())

    def build(
            self,
            index: int,
            kind: str = 'auto',
            overrides: Optional[Dict[str, Any]] = None,
            keep_every: Optional[int] = None,
    ) -> Branch:
        """Make the branch of one stage, on the default device.

        Args:
            index: Stage.
            kind: 'tail', 'conv', or 'auto' for a tail where the architecture allows it.
            overrides: Arguments of the tail's template that differ from the backbone's. None takes the paper's where it
                has a layout for the stage, and otherwise leaves out every second one of repeated blocks.
            keep_every: Leave out repeated blocks so that one in so many remains.

        Raises:
            ValueError: Unknown kind, or a tail that the architecture or the overrides do not allow.
        """
        if kind not in BRANCH_KINDS:
            raise ValueError(f"branches is '{kind}'; choose from {', '.join(BRANCH_KINDS)}.")
        stage = self.stages[index]
        if kind == 'conv':
            return self._conv(stage, 'as asked')
        preset = PRESETS.get(self.template.architecture, {}).get(index)
        given = f' with {_listed(overrides)}' if overrides else ''
        if overrides:
            reason = 'template' + given
        elif preset and keep_every is None:
            overrides, reason = preset, "the paper's layout, " + _listed(preset)
        else:
            keep_every = keep_every or 2
            reason = f'one of {keep_every} repeated blocks' if keep_every > 1 else 'whole tail'
        try:
            return self._tail(stage, overrides or {}, keep_every or 1, reason)
        except SurgeryError as e:
            if kind == 'tail':
                raise ValueError(f"branches='tail' does not fit {self.template.architecture}{given}: {e}; "
                                 "branches='conv' does.") from e
            _logger.warning(f'{self.template.architecture}, stage {stage}: conv branch, because {e}.')
            return self._conv(stage, f'no tail: {e}')

    def _tail(self, stage: Stage, overrides: Dict[str, Any], keep_every: int, reason: str) -> Branch:
        def make() -> nn.Module:
            with torch.device(self.device):
                return self.template.make(**overrides)

        try:
            plan = plan_tail(make, stage, self._image(), keep_every)
        except TypeError as e:
            given = _listed({**self.model_kwargs, **overrides})
            raise ValueError(f'{self.template.architecture} cannot be made with {given}: {e}') from e
        source = self.trace.sources(stage)[plan.rank]
        if shapes(source.output) != plan.features:
            raise SurgeryError(
                f'the features of stage {stage} have shape {shapes(source.output)} in the backbone and {plan.features} '
                'in the template; model_kwargs must say how the backbone was made')
        retrace = Retrace(self.template, overrides, stage, plan.rank, self.in_chans, self.device)
        where = dict(stage=stage.index, source=source.name, reason=reason)
        return Tail(self.template.make(**overrides), plan, retrace, self.image_size, **where)

    def _conv(self, stage: Stage, reason: str) -> Branch:
        source = self.trace.sources(stage)[0]
        last = self.stages[-1]
        return ConvBranch(
            Layout.of(source.output, stage, self.image_size),
            halvings=max(0, (last.reduction // stage.reduction).bit_length() - 1),
            max_channels=last.channels,
            num_classes=self.backbone.num_classes,
            batch_norm=self.batch_norm,
            stage=stage.index,
            source=source.name,
            reason=reason,
        )


def _listed(kwargs: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in kwargs.items()) or 'no arguments'


def _copy_to(model: nn.Module, device: str) -> nn.Module:
    """A copy of a model with uninitialised tensors on ``device``."""
    memo: Dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        # Buffers may be indices into something, which only their values keep in range; the meta device does not look.
        blank = torch.empty_like(tensor, device=device) if device == 'meta' else tensor.detach().clone().to(device)
        memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank
    return copy.deepcopy(model, memo)
