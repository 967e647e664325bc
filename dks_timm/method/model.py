"""A backbone with supervision branches: all classifiers in one forward, and the plain backbone back at the end."""
import logging
import math
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.utils import unwrap_model
from torch.utils._pytree import tree_map_only

from ..errors import InputError
from . import branch_files
from .branches import Branch
from .plan import BranchBuilder
from .stages import list_stages, resolve_stages

__all__ = ['DKSModel', 'create_dks_model', 'prune']

_logger = logging.getLogger(__name__)


class _Flow(threading.local):
    """Where outputs of tapped modules go in the forward that a thread runs; nowhere, if it is the backbone's own."""

    def __init__(self):  # for each thread; torch.compile does not follow defaults of the class
        self.outputs: Optional[Dict[str, Any]] = None
        self.ask: Optional[Callable[[str, Any], None]] = None


_flow = _Flow()


class _Tap:
    """Forward hook of one module.

    Args:
        name: Of the module.
        copies: Whether what it puts out is worked on in place afterwards.
    """

    def __init__(self, name: str, copies: bool):
        self.name = name
        self.copies = copies

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _flow.outputs is not None:
            _flow.outputs[self.name] = tree_map_only(torch.Tensor, torch.clone, output) if self.copies else output
        elif _flow.ask is not None:
            _flow.ask(self.name, output)


class _AllLeft(Exception):
    """All images of a batch have left at a branch: the rest of the backbone need not run."""


class DKSModel(nn.Module):
    """A timm model with auxiliary classifiers on intermediate stages (Sun et al., CVPR 2019, section 3).

    Made by :func:`create_dks_model` or :meth:`from_timm`. In training mode the output is the list of all logits, in
    evaluation mode it is the backbone's logits and the branches are not run. The backbone is the unmodified timm model;
    its features come from forward hooks.

    Args:
        backbone: timm model with a classifier. It stays the object that it was, with hooks on the supervised modules.
        branches: One branch per supervised stage, shallowest first.
        batch_fraction: Part of a training batch that the branches run on, its first images: above 0, at most 1.

    Attributes:
        backbone: The timm model.
        branches: ``nn.ModuleList`` of the branches; ``branches[i].kind`` is 'tail' or 'conv'.
        stages: Supervised stages, ascending indices into the backbone's ``feature_info``.
        batch_fraction: See Args.
        branches_on: Whether the branches run in training mode.
        layout: Arguments of :meth:`from_timm` that make the same branches again, {} if it did not make them.

    Raises:
        ValueError: ``batch_fraction`` is not above 0 and at most 1.
    """

    def __init__(self, backbone: nn.Module, branches: Sequence[Branch], batch_fraction: float = 1.0):
        super().__init__()
        check_batch_fraction(batch_fraction)
        self.batch_fraction = batch_fraction
        self.branches_on = True
        self.backbone = backbone
        self.branches = nn.ModuleList(branches)
        self.stages: Tuple[int, ...] = tuple(branch.stage for branch in branches)
        self._student: Optional[nn.Module] = None
        self.layout: Dict[str, Any] = {}
        self._tap()

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

        The model's parameters, statistics, mode and the global random state stay as they are: branches are built under
        a forked random state, on the device and in the dtype of the backbone.

        Args:
            backbone: timm model with a classifier.
            stages: Stages to supervise, indices into ``feature_info``; None takes the two before the last (see
                :func:`dks_timm.method.stages.resolve_stages`).
            branches: 'tail' (the tail of a second model of the architecture), 'conv' (light convolutions), or 'auto'
                for tails where the architecture allows them.
            model_kwargs: Arguments the model was made with. timm 1.0.31 and later note them on the model.
            branch_kwargs: Arguments of the tails' templates that differ from the backbone's;
                ``{'2.layers': (3, 4, 3, 2)}`` is for stage 2 alone.
            budget: Most that one training forward (backbone and branches) may cost, as a multiple of the backbone's
                forward FLOPs at the same image size; None sets no bound.
            image_size: Size (H, W) of the images in pixels, for the budget; None takes the model's own. Other sizes
                still work.
            batch_fraction: Part of a training batch that the branches run on, above 0, at most 1.

        Raises:
            ValueError: Stages that do not exist, a model without a classifier, tails that the architecture or the
                arguments do not allow, or a budget below the cheapest branches.
        """
        indices = resolve_stages(backbone, stages)
        overrides = split_branch_kwargs(branch_kwargs or {}, indices)
        like = next(backbone.parameters())
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            builder = BranchBuilder(backbone, dict(model_kwargs or {}), image_size)
            built = builder.attach(indices, branches, overrides, budget)
        net = cls(backbone, built, batch_fraction)
        if batch_fraction < 1:  # before training begins, not in its first step
            net._first_images(builder.image(), {b.source: builder.trace.once[b.source].output for b in built})
        net.layout = dict(
            stages=list(net.stages),
            branches=branches,
            branch_kwargs=dict(branch_kwargs or {}),
            budget=budget,
            image_size=list(builder.image_size),
        )
        net.branches.to(like.device, like.dtype).train(backbone.training)
        net.training = backbone.training
        return net

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Logits of an image batch.

        Args:
            x: Images (B, C, H, W).

        Returns:
            In training mode the list of M logits (B, num_classes): backbone, branch on the shallowest stage, ..., on
            the deepest; those of branches (n, num_classes), for the first n = ceil(batch_fraction * B) images, and
            none of them without ``branches_on``. In evaluation mode the backbone's logits (B, num_classes).
        """
        return self.exits(x) if self.training else self._run_backbone(self.backbone, x)

    def _run_backbone(
            self,
            module: nn.Module,
            x: torch.Tensor,
            outputs: Optional[Dict[str, Any]] = None,
            ask: Optional[Callable[[str, Any], None]] = None,
    ) -> torch.Tensor:
        """Run the backbone, or what wraps it, and say where outputs go; this may be within another such forward."""
        outer = _flow.outputs, _flow.ask
        _flow.outputs, _flow.ask = outputs, ask
        try:
            return module(x)
        finally:
            _flow.outputs, _flow.ask = outer

    def exits(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Logits of all classifiers, in either mode.

        Args:
            x: Images (B, C, H, W).

        Returns:
            List of M logits (B, num_classes), ordered as in :meth:`forward`. In evaluation mode ``batch_fraction`` and
            ``branches_on`` do not count.
        """
        if not torch.compiler.is_compiling() and not self._tapped():
            self._tap()
        module = self._student if self.training and self._student is not None else self.backbone
        if self.training and not self.branches_on:
            return [self._run_backbone(module, x)]
        features: Dict[str, Any] = {}
        reentrant = use_reentrant_ckpt()
        if reentrant:
            set_reentrant_ckpt(False)  # it would run supervised modules without gradient
        try:
            logits = self._run_backbone(module, x, outputs=features)
        finally:
            if reentrant:
                set_reentrant_ckpt(True)
        if self.training and self.batch_fraction < 1:
            x, features = self._first_images(x, features)
        if self.training and x.device.type == 'cpu' and not torch.compiler.is_compiling():
            # Dropout in a branch must not shift the random numbers that data order and augmentation draw.
            with torch.random.fork_rng(devices=[]):
                return [logits, *self._run_branches(x, features)]
        return [logits, *self._run_branches(x, features)]

    def early_exit(
            self,
            x: torch.Tensor,
            threshold: float = 0.9,
            branches: Optional[Sequence[int]] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Answer with the first classifier that is sure, in evaluation mode.

        Computing stops at the branch where the last image of the batch leaves; with one image, as soon as it leaves.

        Args:
            x: Images (B, C, H, W).
            threshold: Confidence, the largest softmax probability, from which on an image leaves at a branch.
            branches: Branches to ask, as indices into ``branches``; None asks all. The shallowest comes first.

        Returns:
            Logits (B, num_classes), and for each image the classifier they are of (B,): 0 for the backbone, 1 for the
            first branch.

        Raises:
            ValueError: The model is in training mode.
        """
        if self.training:
            raise InputError('early_exit needs the model in evaluation mode; call eval() first.')
        exits = torch.zeros(len(x), dtype=torch.long, device=x.device)
        early = None  # logits of those that have left

        asked = range(len(self.branches)) if branches is None else branches

        def ask(source: str, output: Any) -> None:
            nonlocal early
            for index in asked:
                if self.branches[index].source != source:
                    continue
                answer = self.branches[index](x, output)
                leave = (exits == 0) & (answer.float().softmax(dim=-1).amax(dim=-1) >= threshold)
                early = torch.where(leave[:, None], answer, answer if early is None else early)
                exits[leave] = index + 1
                if exits.all():
                    raise _AllLeft

        if not self._tapped():
            self._tap()
        try:
            logits = self._run_backbone(self.backbone, x, ask=ask)
        except _AllLeft:
            return early, exits
        return (logits if early is None else torch.where(exits[:, None] > 0, early, logits)), exits

    def _first_images(self, x: torch.Tensor, features: Dict[str, Any]) -> Tuple[torch.Tensor, Dict[str, Any]]:
        batch_size = x.shape[0]
        count = math.ceil(round(self.batch_fraction * batch_size, 6))  # 0.07 * 100 is a little more than 7

        def first(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:1] != (batch_size,):
                raise InputError(
                    f'batch_fraction {self.batch_fraction}: features of this model have shape {tuple(tensor.shape)}, '
                    f'in which {batch_size} images do not come first; use 1')
            return tensor[:count]

        return x[:count], tree_map_only(torch.Tensor, first, features)

    def _run_branches(self, x: torch.Tensor, features: Dict[str, Any]) -> List[torch.Tensor]:
        return [branch(x, features[branch.source]) for branch in self.branches]

    def set_student(self, student: nn.Module) -> None:
        """Have a module that wraps the backbone run it in training mode; what it returns takes the place of the logits.

        For distillation that asks more of a backbone than its logits. Modules of its own have to be registered by name.
        """
        # Not registered, because a state dict would then hold the backbone twice, and an average count it twice.
        object.__setattr__(self, '_student', student)

    def _tap(self) -> None:
        self._untap()
        copies = {branch.source: False for branch in self.branches}
        for branch in self.branches:
            copies[branch.source] |= branch.written
        for name, copied in copies.items():
            self.backbone.get_submodule(name).register_forward_hook(_Tap(name, copied))

    def _untap(self) -> None:
        for module in self.backbone.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Tap):
                    del module._forward_hooks[key]

    def _tapped(self) -> bool:
        """Whether every supervised module has its hook; pruning removes it, and who replaces a module."""
        return all(
            any(isinstance(hook, _Tap) for hook in self.backbone.get_submodule(branch.source)._forward_hooks.values())
            for branch in self.branches)

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """As of any module. What converts modules (to SyncBatchNorm) calls it when all inside are replaced."""
        super().add_module(name, module)
        if name == 'backbone':
            self._tap()

    def describe(self) -> str:
        """A table of the classifiers: where each sits, what it is, and its number of parameters."""
        stages = list_stages(self.backbone)
        rows = [('classifier', 'stage', 'kind', 'parameters', 'made of')]
        for i, module in enumerate((self.backbone, *self.branches)):
            where = ('backbone', stages[-1], type(module).__name__) if i == 0 else (
                f'branch {i}', stages[module.stage], module.kind)
            count = sum(p.numel() for p in module.parameters())
            rows.append((*map(str, where), f'{count:,}', getattr(module, 'reason', '')))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return '\n'.join(
            f'{name:{widths[0]}}  {stage:{widths[1]}}  {kind:{widths[2]}}  {count:>{widths[3]}}  {reason}'.rstrip()
            for name, stage, kind, count, reason in rows)

    # What timm's factories ask of a model.

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        return self.backbone.pretrained_cfg

    @property
    def default_cfg(self) -> Dict[str, Any]:
        return self.backbone.default_cfg

    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def get_classifiers(self) -> List[nn.Module]:
        """The classifier modules, the backbone's first; both of a model with two (class and distillation token)."""
        found: List[nn.Module] = []
        for owner in (self.backbone, *self.branches):
            classifier = owner.get_classifier()
            found += classifier if isinstance(classifier, (tuple, list)) else [classifier]
        return found

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give every classifier a fresh last layer, as timm's models do. The branches' draw no shared random numbers.

        Args:
            num_classes: Number of classes.
            global_pool: Pooling before it, of the backbone and of branches that are tails; None keeps what there is.
        """
        like = next(self.parameters())
        self.backbone.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            for branch in self.branches:
                branch.reset_classifier(num_classes, global_pool)
        self.to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, in the backbone and in the branches."""
        for owner in (self.backbone, *self.branches):
            owner.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> Set[str]:
        """Names of parameters to exempt from weight decay."""
        names = {f'backbone.{name}' for name in getattr(self.backbone, 'no_weight_decay', set)()}
        for i, branch in enumerate(self.branches):
            names |= {f'branches.{i}.{name}' for name in branch.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter for layer-wise learning-rate decay; branches belong to the layer of the head.

        Args:
            coarse: One layer per stage rather than per block, as in timm.

        Returns:
            A function from the name of a parameter to the index of its layer, 0 for the stem.
        """
        backbone = self.backbone
        if hasattr(backbone, 'group_matcher'):
            layers = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(backbone)
        head = max(layers.values())
        return lambda name: layers.get(name[len('backbone.'):], head) if name.startswith('backbone.') else head


def check_batch_fraction(batch_fraction: float) -> None:
    if not 0 < batch_fraction <= 1:
        raise InputError(f'batch_fraction is {batch_fraction}; it must be above 0 and at most 1.')


def split_branch_kwargs(branch_kwargs: Dict[str, Any], stages: Sequence[int]) -> Dict[int, Dict[str, Any]]:
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


def create_dks_model(
        model_name: str,
        pretrained: bool = False,
        stages: Optional[Sequence[int]] = None,
        branches: str = 'auto',
        branch_kwargs: Optional[Dict[str, Any]] = None,
        budget: Optional[float] = None,
        image_size: Optional[Tuple[int, int]] = None,
        batch_fraction: float = 1.0,
        **timm_kwargs: Any,
) -> DKSModel:
    """Create a timm model with supervision branches.

    Where a published model was exported with its branches, they come back too, unless ``stages``, ``branches``,
    ``branch_kwargs`` or ``budget`` ask for others. With another number of classes, their classifiers are fresh.

    Args:
        model_name: Any name ``timm.create_model`` takes, ``hf-hub:`` and ``local-dir:`` ones included.
        pretrained: Load pretrained weights, those of published branches included. Other tails start from the
            backbone's wherever name and shape agree.
        stages: See :meth:`DKSModel.from_timm`.
        branches: See :meth:`DKSModel.from_timm`.
        branch_kwargs: See :meth:`DKSModel.from_timm`.
        budget: See :meth:`DKSModel.from_timm`.
        image_size: See :meth:`DKSModel.from_timm`.
        batch_fraction: See :meth:`DKSModel.from_timm`.
        **timm_kwargs: Further arguments of ``timm.create_model``, for the backbone and the templates of its branches.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: See :meth:`DKSModel.from_timm`.
    """
    backbone = timm.create_model(model_name, pretrained=pretrained, **timm_kwargs)
    return add_branches(
        backbone, model_name, pretrained, stages, branches, branch_kwargs, budget, image_size, batch_fraction,
        timm_kwargs)


def add_branches(
        backbone, model_name, pretrained, stages, branches, branch_kwargs, budget, image_size, batch_fraction,
        timm_kwargs) -> DKSModel:
    """The rest of :func:`create_dks_model`, for a backbone that timm has made of its arguments."""
    layout = None
    if stages is None and branches == 'auto' and not branch_kwargs and budget is None:
        layout = branch_files.read_layout(model_name, timm_kwargs.get('cache_dir'))
    if layout:
        if backbone.pretrained_cfg.get('fixed_input_size'):
            layout['image_size'] = image_size  # the published one may not be that of this backbone
        net = DKSModel.from_timm(backbone, model_kwargs=timm_kwargs, batch_fraction=batch_fraction, **layout)
    else:
        net = DKSModel.from_timm(
            backbone, stages, branches, timm_kwargs, branch_kwargs, budget, image_size, batch_fraction)
    from_elsewhere = timm_kwargs.get('checkpoint_path') or timm_kwargs.get('pretrained_cfg_overlay')
    if layout and pretrained and not from_elsewhere:
        branch_files.load_branches(net, model_name, timm_kwargs.get('cache_dir'))
    elif pretrained or from_elsewhere:
        for branch in net.branches:
            if branch.kind == 'tail':
                branch.start_from(backbone)
    return net


def prune(model: nn.Module) -> nn.Module:
    """The plain timm model in a :class:`DKSModel`, its parameters untouched.

    Args:
        model: DKSModel, also wrapped by DistributedDataParallel, ``torch.compile`` or timm's EMA.

    Returns:
        The backbone, the same object, without the hooks of the DKSModel; a plain model comes back as it is. Its logits
        equal those of the DKSModel in evaluation mode bit for bit (CPU, float32).
    """
    model = unwrap_model(model)
    if not isinstance(model, DKSModel):
        return model
    model._untap()
    return model.backbone
