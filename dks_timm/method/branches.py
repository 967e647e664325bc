"""Supervision branches: the tail of a template model, and a plain convolutional one."""
import math
from dataclasses import dataclass
from typing import Any, Callable, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, SeparableConvNormAct
from torch.utils.checkpoint import checkpoint

from .stages import Stage
from .tails import Feed, TailPlan, cut
from .trace import SurgeryError, tensors


class Branch(nn.Module):
    """An auxiliary classifier. A new kind is a subclass with ``kind``, ``forward`` and ``get_classifier``.

    Args:
        stage: Supervised stage, an index into the backbone's ``feature_info``.
        source: Name of the module of the backbone that puts out the features, as in ``named_modules``.
        reason: Why the branch is what it is, for people.

    Attributes:
        kind: Name of the kind, of the class; 'tail' and 'conv' are those of this package.
    """
    kind: str

    def __init__(self, stage: int, source: str, reason: str):
        super().__init__()
        self.stage = stage
        self.source = source
        self.reason = reason

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        """Return the logits of a batch.

        Args:
            image: Images (B, C, H, W), those that the backbone was given.
            features: Output of the source module: (B, C, H, W), or (B, H, W, C), or tokens (B, N, C).

        Returns:
            Logits (B, num_classes).
        """
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the module that puts out the logits, for gradient clipping and ``head_init_scale``."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a fresh one, and the pooling before it where a kind is given and there is one."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass; a kind with few of them does nothing."""

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters to exempt from weight decay."""
        return set()


class Tail(Branch):
    """The part of a template after a stage, fed with the backbone's features. The template is cut in place.

    The shapes of stand-ins are those of the plan for images of ``image_size``; ``retrace`` finds them for other sizes.
    """
    kind = 'tail'

    def __init__(
            self, template: nn.Module, plan: TailPlan, retrace: Callable, image_size: Tuple[int, int], **where: Any,
    ):
        super().__init__(**where)
        self.plan = plan
        self.feed = Feed()
        self.template = cut(template, plan, self.feed)
        self.retrace = retrace
        self.stub_shapes = {tuple(image_size): plan.stubs}
        self.recomputes = False

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        size = tuple(image.shape[-2:])
        if size not in self.stub_shapes:
            self._learn_shapes(size)
        if self.recomputes and torch.is_grad_enabled():
            return self._run_twice(image, features)
        return self._run(image, features)

    @torch.compiler.disable
    def _learn_shapes(self, size: Tuple[int, int]) -> None:
        self.stub_shapes[size] = self.retrace(size)

    @torch.compiler.disable
    def _run_twice(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        # As a whole: segments of the template would find the features of the last forward, not those of their own.
        return checkpoint(self._run, image, features, use_reentrant=False)

    def _run(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        feed = self.feed
        feed.image, feed.features, feed.shapes = image, features, self.stub_shapes[tuple(image.shape[-2:])]
        try:
            return self.template(image)
        finally:
            feed.image = feed.features = None  # keep no activations alive between steps

    def get_classifier(self) -> nn.Module:
        return self.template.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.template.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recomputes = enable

    def no_weight_decay(self) -> Set[str]:
        return {f'template.{name}' for name in getattr(self.template, 'no_weight_decay', set)()}

    def start_from(self, backbone: nn.Module) -> None:
        """Copy the backbone's weights wherever name and shape agree."""
        own, given = self.template.state_dict(), backbone.state_dict()
        own.update({k: given[k] for k, v in own.items() if k in given and given[k].shape == v.shape})
        self.template.load_state_dict(own)


@dataclass(frozen=True)
class Layout:
    """Place and format of a stage's feature map in the output of its module."""
    index: int  # position among the output's tensors
    format: str  # 'NCHW', 'NHWC', or 'NLC' for tokens
    channels: int
    grid: Optional[int] = None  # stride of the tokens relative to the image, None where they form no grid
    prefix: int = 0  # tokens before the grid (class, register and distillation tokens)

    @classmethod
    def of(cls, output: Any, stage: Stage, image_size: Tuple[int, int]) -> 'Layout':
        """Find the feature map of ``stage`` in its module's output, or raise SurgeryError."""
        maps = [(i, t) for i, t in enumerate(tensors(output)) if t.ndim in (3, 4)]
        if not maps:
            raise SurgeryError(f'{stage} puts out no feature map')
        # The first tensor with the stage's number of channels, or else the first of all.
        index, t = min(maps, key=lambda found: stage.channels not in found[1].shape[1:])
        if t.ndim == 4:
            last = t.shape[-1] == stage.channels != t.shape[1]
            return cls(index, 'NHWC', t.shape[-1]) if last else cls(index, 'NCHW', t.shape[1])
        prefix = t.shape[1] - math.prod(-(-s // stage.reduction) for s in image_size)
        on_grid = 0 <= prefix < t.shape[1]
        return cls(index, 'NLC', t.shape[2], *((stage.reduction, prefix) if on_grid else ()))

    def to_nchw(self, output: Any, image: torch.Tensor) -> torch.Tensor:
        """Return the feature map (B, channels, H', W') in ``output``."""
        x = tensors(output)[self.index]
        if self.format == 'NCHW':
            return x
        if self.format == 'NHWC':
            return x.permute(0, 3, 1, 2)
        x = x[:, self.prefix:].transpose(1, 2)
        return x.unsqueeze(-1) if self.grid is None else x.unflatten(2, (-(-image.shape[-2] // self.grid), -1))


class ConvBranch(Branch):
    """A light branch for any stage: strided depthwise-separable convolutions, average pooling, a linear classifier.

    The resolution is halved ``halvings`` times, doubling the width up to ``max_channels``; with 0, there is one
    convolution at full resolution.
    """
    kind = 'conv'

    def __init__(
            self, layout: Layout, halvings: int, max_channels: int, num_classes: int, norm_layer: type, **where: Any,
    ):
        super().__init__(**where)
        self.layout = layout
        width = layout.channels
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

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.head.reset(num_classes)  # its average pooling is part of the kind
