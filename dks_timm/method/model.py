"""A backbone with supervision branches: all classifiers in one forward, and the plain backbone back at the end."""
import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import set_reentrant_ckpt
from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.utils import unwrap_model

from ..errors import InputError
from .branches import Branch
from .plan import BranchBuilder
from .stages import list_stages, resolve_stages
from .trace import map_tensors


class _Forward(threading.local):
    """The receiver of the forward that a thread runs, None where nobody asks for features."""

    def __init__(self):  # for each thread; torch.compile does not follow defaults of the class
        self.receiver: Optional[Callable[[str, Any], None]] = None


_forward = _Forward()


@dataclass
class _Tap:
    """Forward hook of the module of a name."""
    name: str

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _forward.receiver is not None:
            _forward.receiver(self.name, output)


def run(module: nn.Module, x: torch.Tensor, receiver: Optional[Callable] = None) -> Any:
    """Run a backbone, or what wraps it; the receiver gets name and output of each tapped module once it has run."""
    outer, _forward.receiver = _forward.receiver, receiver  # this may be within another such forward
    try:
        return module(x)
    finally:
        _forward.receiver = outer


def tap(backbone: nn.Module, names: Iterable[str]) -> None:
    """Hook these modules of a backbone, and no others."""
    untap(backbone)
    for name in set(names):
        backbone.get_submodule(name).register_forward_hook(_Tap(name))


def untap(backbone: nn.Module) -> None:
    """Remove every tap, also those that came with a copied module."""
    for module in backbone.modules():
        for key, hook in list(module._forward_hooks.items()):  # private: torch Module._forward_hooks
            if isinstance(hook, _Tap):
                del module._forward_hooks[key]


def is_tapped(backbone: nn.Module, names: Iterable[str]) -> bool:
    """Return True if all these modules are tapped; pruning removes taps, and so does whoever replaces a module."""
    hooks = (backbone.get_submodule(name)._forward_hooks for name in names)  # private: torch Module._forward_hooks
    return all(any(isinstance(hook, _Tap) for hook in of_one.values()) for of_one in hooks)


class _AllLeft(Exception):
    """All images of a batch have left at a branch: the rest of the backbone need not run."""


class DKSModel(nn.Module):
    """A timm model with auxiliary classifiers on intermediate stages (Sun et al., CVPR 2019, section 3).

    Made by :func:`dks_timm.create_dks_model` or :meth:`from_timm`. The backbone is the unmodified timm model; its
    features come from forward hooks. In evaluation mode the branches do not run.

    Args:
        backbone: timm model with a classifier. It stays the object that it was, with hooks on the supervised modules.
        branches: One branch per supervised stage, shallowest first.
        batch_fraction: Part of a training batch that the branches run on, its first images: above 0, at most 1.

    Attributes:
        backbone: The timm model.
        branches: ``nn.ModuleList`` of the branches; ``branches[i].kind`` is 'tail' or 'conv'.
        stages: Supervised stages, ascending indices into the backbone's ``feature_info``.
        branches_on: True if the branches run in training mode.
        layout: Arguments of :meth:`from_timm` that make the same branches again, {} if it did not make them.
        input_size: (C, H, W) of the images that :meth:`from_timm` chose the branches for.

    Raises:
        ValueError: ``batch_fraction`` is not above 0 and at most 1.

    Example:
        >>> import timm, torch, dks_timm
        >>> net = dks_timm.DKSModel.from_timm(timm.create_model('test_resnet', num_classes=10))
        >>> images = torch.randn(2, 3, 64, 64)
        >>> [tuple(z.shape) for z in net.train()(images)]  # backbone, shallower branch, deeper branch
        [(2, 10), (2, 10), (2, 10)]
        >>> tuple(net.eval()(images).shape)
        (2, 10)
        >>> type(dks_timm.prune(net)).__name__  # the plain timm model
        'ResNet'
    """

    def __init__(self, backbone: nn.Module, branches: Sequence[Branch], batch_fraction: float = 1.0):
        super().__init__()
        if not 0 < batch_fraction <= 1:
            raise InputError(f'batch_fraction is {batch_fraction}; it must be above 0 and at most 1.')
        self.batch_fraction = batch_fraction
        self.branches_on = True
        self.backbone = backbone
        self.branches = nn.ModuleList(branches)
        self.stages: Tuple[int, ...] = tuple(branch.stage for branch in branches)
        self._student: Optional[nn.Module] = None
        self.layout: Dict[str, Any] = {}
        self._tap(anew=True)

    @classmethod
    def from_timm(
            cls,
            backbone: nn.Module,
            stages: Optional[Sequence[int]] = None,
            branches: str = 'auto',
            model_kwargs: Optional[Dict[str, Any]] = None,
            branch_kwargs: Optional[Dict[str, Any]] = None,
            budget: Optional[float] = None,
            image_size: Optional[Tuple[int, int]] = None,
            batch_fraction: float = 1.0,
    ) -> 'DKSModel':
        """Attach branches to an existing timm model.

        The model's parameters, statistics and mode, and the global random state, stay as they are. Branches are on the
        device and in the dtype of the backbone.

        Args:
            backbone: timm model with a classifier.
            stages: Stages to supervise, see :func:`dks_timm.method.stages.resolve_stages`.
            branches: 'tail' (the tail of a second model of the architecture), 'conv' (light convolutions), or 'auto'
                for tails where the architecture allows them.
            model_kwargs: Arguments the model was made with. timm 1.0.31 and later note them on the model.
            branch_kwargs: Arguments of the tails' templates that differ from the backbone's;
                ``{'2.layers': (3, 4, 3, 2)}`` is for stage 2 alone.
            budget: Most that a training forward may cost, as a multiple of the backbone's forward FLOPs; None sets no
                bound.
            image_size: Size (H, W) of the images in pixels, for the budget; None takes the model's own.
            batch_fraction: Part of a training batch that the branches run on, above 0, at most 1.

        Raises:
            ValueError: Stages that do not exist, a model without a classifier, tails that the architecture or the
                arguments do not allow, or a budget below the cheapest branches.
        """
        indices = resolve_stages(backbone, stages)
        with _forked_random_state():
            builder = BranchBuilder(backbone, model_kwargs, image_size)
            built = builder.attach(indices, branches, branch_kwargs, budget)
        net = cls(backbone, built, batch_fraction)
        if batch_fraction < 1:  # refused before training begins, not in its first step
            net._first_images(builder.image, {b.source: builder.trace.once[b.source].output for b in built})
        net.input_size = builder.input_size
        net.layout = dict(
            stages=list(net.stages), branches=branches, branch_kwargs=dict(branch_kwargs or {}), budget=budget,
            image_size=list(net.input_size[1:]))
        like = next(backbone.parameters())
        net.branches.to(like.device, like.dtype).train(backbone.training)
        net.training = backbone.training
        return net

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Return the logits of an image batch.

        Args:
            x: Images (B, C, H, W).

        Returns:
            In evaluation mode the backbone's logits (B, num_classes). In training mode the list of M logits: backbone,
            branch on the shallowest stage, ..., on the deepest; those of branches (n, num_classes), for the first
            n = ceil(batch_fraction * B) images, and none of them without ``branches_on``.
        """
        return self.exits(x) if self.training else run(self.backbone, x)

    def exits(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the list of M logits (B, num_classes) of images (B, C, H, W), as :meth:`forward` in training mode.

        In evaluation mode ``batch_fraction`` and ``branches_on`` do not count.
        """
        self._tap()
        backbone = self._student if self.training and self._student is not None else self.backbone
        if self.training and not self.branches_on:
            return [run(backbone, x)]
        features: Dict[str, Any] = {}
        logits = run(backbone, x, features.__setitem__)
        if self.training and self.batch_fraction < 1:
            x, features = self._first_images(x, features)
        # Dropout in a branch must not shift the random numbers that data order and augmentation draw.
        apart = self.training and x.device.type == 'cpu' and not torch.compiler.is_compiling()
        with torch.random.fork_rng(devices=[]) if apart else nullcontext():
            return [logits, *[branch(x, features[branch.source]) for branch in self.branches]]

    def early_exit(
            self,
            x: torch.Tensor,
            threshold: float = 0.9,
            branches: Optional[Sequence[int]] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Answer with the first classifier that is sure, in evaluation mode.

        Computing stops at the branch where the last image of the batch leaves.

        Args:
            x: Images (B, C, H, W).
            threshold: Confidence, the largest softmax probability, from which on an image leaves at a branch.
            branches: Indices of the branches to ask; None asks all.

        Returns:
            Logits (B, num_classes), and for each image the classifier they are of (B,), 0 for the backbone.

        Raises:
            ValueError: The model is in training mode.
        """
        if self.training:
            raise InputError('early_exit needs the model in evaluation mode; call eval() first.')
        exits = torch.zeros(len(x), dtype=torch.long, device=x.device)
        early = None  # logits of those that have left
        asked = range(len(self.branches)) if branches is None else branches

        def ask(source: str, features: Any) -> None:
            nonlocal early
            for index in (index for index in asked if self.branches[index].source == source):
                answer = self.branches[index](x, features)
                leave = (exits == 0) & (answer.float().softmax(dim=-1).amax(dim=-1) >= threshold)
                early = torch.where(leave[:, None], answer, answer if early is None else early)
                exits[leave] = index + 1
                if exits.all():
                    raise _AllLeft

        self._tap()
        try:
            logits = run(self.backbone, x, ask)
        except _AllLeft:
            return early, exits
        return (logits if early is None else torch.where(exits[:, None] > 0, early, logits)), exits

    def _first_images(self, x: torch.Tensor, features: Dict[str, Any]) -> Tuple[torch.Tensor, Dict[str, Any]]:
        """Return the part of a batch, and of its features, that the branches train on."""
        count = math.ceil(round(self.batch_fraction * len(x), 6))  # 0.07 * 100 is a little more than 7

        def first(tensor):
            if tensor.shape[:1] != x.shape[:1]:
                raise InputError(
                    f'batch_fraction {self.batch_fraction}: features of this model have shape {tuple(tensor.shape)}, '
                    f'in which {len(x)} images do not come first; use 1')
            return tensor[:count]

        return x[:count], map_tensors(first, features)

    def set_student(self, student: nn.Module) -> None:
        """Have a module that wraps the backbone run it in training mode; its output takes the place of the logits."""
        # Not registered, because a state dict would then hold the backbone twice, and an average count it twice.
        object.__setattr__(self, '_student', student)

    def _tap(self, anew: bool = False) -> None:
        names = [branch.source for branch in self.branches]
        if anew or not torch.compiler.is_compiling() and not is_tapped(self.backbone, names):
            tap(self.backbone, names)

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        super().add_module(name, module)
        if name == 'backbone':  # replaced by a converter, to SyncBatchNorm for one
            self._tap(anew=True)

    def describe(self) -> str:
        """Return a table of the classifiers: stage, kind, number of parameters, and why a branch is what it is."""
        stages = list_stages(self.backbone)
        count, *counts = (f'{sum(p.numel() for p in m.parameters()):,}' for m in (self.backbone, *self.branches))
        rows = [('backbone', stages[-1], type(self.backbone).__name__, count, '')]
        for i, (branch, count) in enumerate(zip(self.branches, counts, strict=True), 1):
            rows.append((f'branch {i}', stages[branch.stage], branch.kind, count, branch.reason))
        return format_table(('classifier', 'stage', 'kind', 'parameters', 'made of'), rows)

    # What timm's factories ask of a model.

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """Return the backbone's classifier."""
        return self.backbone.get_classifier()

    def get_classifiers(self) -> List[nn.Module]:
        """List the classifier modules, the backbone's first; both of a model with two (class, distillation token)."""
        found: List[nn.Module] = []
        for owner in (self.backbone, *self.branches):
            classifier = owner.get_classifier()
            found += classifier if isinstance(classifier, (tuple, list)) else [classifier]
        return found

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give every classifier a fresh last layer, as timm's models do, and another pooling where one is given."""
        like = next(self.parameters())
        self.backbone.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        with _forked_random_state():
            for branch in self.branches:
                branch.reset_classifier(num_classes, global_pool)
        self.to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, in the backbone and in the branches."""
        if enable:
            set_reentrant_ckpt(False)  # timm's reentrant one would run supervised modules without gradient
        for owner in (self.backbone, *self.branches):
            owner.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters to exempt from weight decay."""
        owners = {'backbone': self.backbone, **{f'branches.{i}': b for i, b in enumerate(self.branches)}}
        return {f'{key}.{name}' for key, owner in owners.items() for name in getattr(owner, 'no_weight_decay', set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from a parameter's name to its layer (0 is the stem), for layer-wise learning-rate decay.

        Branches belong to the layer of the head. Layers are blocks, or stages if ``coarse``.
        """
        backbone = self.backbone
        if hasattr(backbone, 'group_matcher'):
            layers = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(backbone)
        head = max(layers.values())
        return lambda name: layers.get(name[len('backbone.'):], head) if name.startswith('backbone.') else head


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in columns as wide as their entries."""
    rows = [header, *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _forked_random_state():
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


def prune(model: nn.Module) -> nn.Module:
    """Return the plain timm model in a :class:`DKSModel`, its parameters untouched.

    Args:
        model: DKSModel, also wrapped by DistributedDataParallel, ``torch.compile`` or timm's EMA.

    Returns:
        The backbone, the same object, without hooks; its logits equal those of the DKSModel in evaluation mode bit for
        bit (CPU, float32). A plain model comes back as it is.

    Example:
        >>> import timm, dks_timm
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> dks_timm.prune(dks_timm.DKSModel.from_timm(model)) is model
        True
    """
    model = unwrap_model(model)
    if not isinstance(model, DKSModel):
        return model
    untap(model.backbone)
    return model.backbone
