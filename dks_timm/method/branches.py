"""Supervision branches: the tail of a template model, and a plain convolutional one."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, ClassifierHead, LayerNormAct2d, SeparableConvNormAct
from torch.utils.checkpoint import checkpoint

from .stages import Stage
from .tails import Feed, TailPlan, cut
from .trace import SurgeryError, map_tensors, tensors

__all__ = ['Branch', 'ConvBranch', 'Layout', 'Tail']


class Branch(nn.Module):
    """An auxiliary classifier. A new kind is a subclass with ``kind``, ``forward`` and ``get_classifier``.

    Args:
        stage: Supervised stage, an index into the backbone's ``feature_info``.
        source: Name of the module of the backbone that puts out the features, as in ``named_modules``.
        reason: Why the branch is what it is, for people.

    Attributes:
        kind: Name of the kind, of the class; 'tail' and 'conv' are those of this package.
        written: True if the backbone goes on to work on the features in place, so that the branch needs a copy.
    """
    kind: str
    written = False

    def __init__(self, stage: int, source: str, reason: str):
        super().__init__()
        self.stage = stage
        self.source = source
        self.reason = reason

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        """Return the logits of a batch.

        Args:
            image: Images (B, C, H, W), those that the backbone was given.
            features: Output of the source module, as it is: (B, C, H, W) in most networks, (B, H, W, C) or tokens
                (B, N, C) in others.

        Returns:
            Logits (B, num_classes).
        """
        raise NotImplementedError('a branch turns features into logits')

    def get_classifier(self) -> nn.Module:
        """Return the module that puts out the logits, for gradient clipping and ``head_init_scale``."""
        raise NotImplementedError('a branch names its classifier')

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a fresh one, and the pooling before it where a kind is given and there is one."""
        raise NotImplementedError('a branch renews its classifier')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, where there are enough of them."""

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters to exempt from weight decay."""
        return set()


class Tail(Branch):
    """The part of a template after a stage, fed with the backbone's features.

    Args:
        template: Freshly made model; it is cut in place.
        plan: Plan of the cut.
        retrace: Looks up the stand-in shapes at an image size other than the planned one.
        image_size: (H, W) of the images that the plan was made with.
        **where: Attributes of :class:`Branch`.
    """
    kind = 'tail'

    def __init__(
            self,
            template: nn.Module,
            plan: TailPlan,
            retrace: Callable[[Tuple[int, int]], Dict[str, Any]],
            image_size: Tuple[int, int],
            **where: Any,
    ):
        super().__init__(**where)
        self.plan = plan
        self.feed = Feed(plan.written)
        self.template = cut(template, plan, self.feed)
        self.retrace = retrace
        self.stub_shapes = {tuple(image_size): plan.stubs}
        self.recomputes = False

    def forward(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        if not (self.recomputes and torch.is_grad_enabled()):
            return self._run(image, features)
        self.shapes_at(*image.shape[-2:])  # a recomputation finds them known, and so must the forward
        return self._run_twice(image, features)

    @torch.compiler.disable
    def _run_twice(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        # As a whole: segments of the template would find the features of the last forward, not those of their own.
        return checkpoint(self._run, image, features, use_reentrant=False)

    def _run(self, image: torch.Tensor, features: Any) -> torch.Tensor:
        feed = self.feed
        feed.image, feed.shapes = image, self.shapes_at(image.shape[-2], image.shape[-1])
        feed.features = map_tensors(torch.clone, features) if self.plan.copies else features
        try:
            return self.template(image)
        finally:
            feed.image = feed.features = None  # keep no activations alive between steps

    def shapes_at(self, height: int, width: int) -> Dict[str, Any]:
        """Return the shapes of the stand-ins for images of a size; they are found out the first time."""
        size = (height, width)
        if size not in self.stub_shapes:
            self._learn_shapes(size)
        return self.stub_shapes[size]

    @torch.compiler.disable
    def _learn_shapes(self, size: Tuple[int, int]) -> None:
        self.stub_shapes[size] = self.retrace(size)

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
    """Place and format of a stage's feature map in the output of its module.

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
        """Return the feature map (B, channels, H', W') in ``output``."""
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

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.head.reset(num_classes)  # its average pooling is part of the kind
