"""DKS in timm's own training loop."""
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator, ClassificationTask, MultiLabelClassificationEvaluator, TrainingTask
from timm.utils import unwrap_model

from ..errors import InputError
from .create import check_fit
from .loss import DKSLoss
from .model import DKSModel


class DKSTask(ClassificationTask):
    """Train all classifiers of a DKSModel (Sun et al., CVPR 2019, section 3); evaluate and save its plain backbone.

    The trainable module is the DKSModel, the eval model its backbone. So the `state_dict` of a checkpoint is that of
    the timm model, which `timm.create_model(checkpoint_path=...)` loads, and the branches are in its `task_state`.

    Args:
        net: The model to train.
        loss_fn: Loss of the list of logits, DKSLoss() when None.
        device, dtype: Of the task's own buffers; the model stays as it is.
        verbose: Log what the task sets up.
        every: Run the branches in one of so many updates; the others train the backbone by its labels alone.
        off_epoch: First epoch that trains the backbone alone, as do all after it; 0 for none.
        start_epoch: First epoch with synergy; before it, every classifier learns from the labels alone.
        ramp: Epochs in which the synergy's weight grows to its full size, by equal steps.
        averaged_teacher: The ensemble that teaches is that of the averaged weights, which `setup_ema` has to set up.
        multi_label: Targets are labels of each class by itself, dense and floating (B, num_classes); evaluate as timm's
            MultiLabelClassificationTask does.
        threshold: Probability from which on a class counts as predicted, for the F1 scores of `multi_label`.

    Raises:
        ValueError: The weights of the loss are for another number of classifiers, `every` is below 1, `off_epoch` or
            `ramp` is negative, `multi_label` with synergy between exclusive classes, or `averaged_teacher` with a loss
            whose teacher is not the ensemble.

    Example:
        >>> import torch, dks_timm
        >>> net = dks_timm.create_dks_model('test_resnet', num_classes=10)
        >>> task = dks_timm.DKSTask(net, dks_timm.DKSLoss(), verbose=False)
        >>> out = task(torch.randn(2, 3, 64, 64), torch.tensor([3, 7]))
        >>> out['loss'].backward()
        >>> len(out['logits']), task.get_eval_model() is net.backbone
        (3, True)
    """

    def __init__(
            self,
            net: DKSModel,
            loss_fn: Optional[DKSLoss] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            every: int = 1,
            off_epoch: int = 0,
            start_epoch: int = 0,
            ramp: int = 0,
            averaged_teacher: bool = False,
            multi_label: bool = False,
            threshold: float = 0.5,
    ):
        loss_fn = loss_fn or DKSLoss(synergy='sigmoid' if multi_label else None)
        if multi_label and loss_fn.synergy == 'softmax':
            raise InputError("synergy 'softmax' is of exclusive classes; multi_label needs 'sigmoid'.")
        loss_fn.resolve_weights(1 + len(net.branches))  # refused before training begins, not in its first step
        if every < 1:
            raise InputError(f'every is {every}; it must be at least 1.')
        for name, value in dict(off_epoch=off_epoch, ramp=ramp).items():
            if value < 0:
                raise InputError(f'{name} is {value}; it must be 0 or more.')
        if averaged_teacher and loss_fn.teacher != 'ensemble':
            raise InputError(f"averaged_teacher needs a DKSLoss with teacher 'ensemble', not {loss_fn.teacher!r}.")
        super().__init__(net, loss_fn, device=device, dtype=dtype, verbose=verbose)
        self.every, self.off_epoch = every, off_epoch
        self.start_epoch, self.ramp = start_epoch, ramp
        self.averaged_teacher = averaged_teacher
        self.multi_label, self.threshold = multi_label, threshold

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """Return timm's evaluator of loss and accuracy, or with `multi_label` of loss, mAP and F1."""
        if self.multi_label:
            return MultiLabelClassificationEvaluator(device=self.device, threshold=self.threshold, **kwargs)
        return super().create_evaluator(**kwargs)

    def begin_update(self, epoch: int, num_updates: int) -> None:
        """Decide about branches and synergy in the next update, of an epoch and after so many updates of the run.

        Without a call, every update has both.
        """
        unwrap_model(self.trainable_module).branches_on = (
            num_updates % self.every == 0 and (not self.off_epoch or epoch < self.off_epoch))
        self.criterion.synergy_scale = min(1., max(0, epoch - self.start_epoch + 1) / (self.ramp + 1))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """Forward pass through backbone and branches, and the DKS loss.

        Args:
            input: Images (B, C, H, W).
            target: Class indices (B,), or dense targets (B, num_classes).

        Returns:
            A dictionary: 'loss', a scalar, the only entry to call ``backward`` on; 'output', the backbone's logits
            (B, num_classes); 'logits', the list of all logits, the backbone's first; 'ce' (M,) and 'synergy' (M, M),
            the reports of :class:`dks_timm.DKSLoss`. Where the branches have not run, 'logits' are the backbone's
            alone, and there is no 'synergy'.
        """
        return self._result(input, self.trainable_module(input), target)

    def _result(self, input: torch.Tensor, logits: List[torch.Tensor], target: torch.Tensor) -> Dict[str, Any]:
        if len(logits) == 1:
            losses = self.criterion.forward_backbone(logits[0], target)
        else:
            teachers = self._averaged_logits(input[:len(logits[-1])]) if self.averaged_teacher else None
            losses = self.criterion(logits, target, teachers)
        return {**losses, 'output': logits[0], 'logits': logits}

    @torch.no_grad()
    def _averaged_logits(self, input: torch.Tensor) -> List[torch.Tensor]:
        """Return the logits of all classifiers with averaged weights, and statistics of BatchNorm."""
        averaged = self.get_trainable_module(ema=True)
        if averaged is None:
            raise InputError('averaged_teacher: there is no average of the weights; call setup_ema() first.')
        return unwrap_model(averaged).eval().exits(input)

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the DKSModel for training, and its backbone by itself for evaluation."""
        self.eval_model = torch.compile(self.get_eval_model(), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the plain backbone, whatever wraps the DKSModel; the compiled one after `compile`."""
        model = super().get_eval_model(module=module, ema=ema)
        net = unwrap_model(model)
        return net.backbone if isinstance(net, DKSModel) else model

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Return the parameters to clip; exclude_head leaves out the classifiers of backbone and branches."""
        net = unwrap_model(self.trainable_module)
        heads = {id(p) for head in net.get_classifiers() for p in head.parameters()} if exclude_head else set()
        return [p for p in net.parameters() if id(p) not in heads]

    def _saved_parts(self, module: Optional[nn.Module], ema: bool) -> Dict[str, nn.Module]:
        """Return what a checkpoint holds beside the backbone."""
        net = unwrap_model(self.get_trainable_module(ema=ema) if module is None else module)
        return {name: part for name, part in net.named_children() if name in ('branches', 'projection')}

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return 'stages', a list, the state dict of 'branches', and that of a 'projection' to a teacher's features."""
        states = {name: part.state_dict() for name, part in self._saved_parts(module, ema).items()}
        return {'stages': list(unwrap_model(self.trainable_module).stages), **states}

    def load_task_state(self, state, strict: bool = True, module: Optional[nn.Module] = None, ema: bool = False):
        """Load the state of the branches, and of the projection where there is one."""
        for name, part in self._saved_parts(module, ema).items():
            part.load_state_dict(state[name], strict=strict)

    def load_checkpoint_state(
            self, state_dict: Dict, task_state: Optional[Dict] = None, ema: bool = False, strict: bool = True,
    ) -> None:
        """Load backbone and branches.

        Args:
            state_dict: Of the plain backbone.
            task_state: Of the branches, from :meth:`get_task_state`.
            ema: Load into the average of the weights.
            strict: Ask for all entries, in the shapes of the model's.

        Raises:
            ValueError: The checkpoint has no branches, or is of another backbone or other branches. Nothing is loaded.
        """
        net = unwrap_model(self.get_trainable_module(ema=ema))
        if net is not None:
            if not task_state or 'branches' not in task_state:
                raise InputError(
                    'the checkpoint holds no branches, so training with DKS cannot resume from it: '
                    'use --initial-checkpoint to start from its backbone')
            stages = tuple(task_state['stages'])
            if stages != net.stages:
                raise InputError(f'the checkpoint has branches on stages {stages}, the model on {net.stages}')
            given = {**task_state, 'backbone': state_dict}
            for name, part in {'backbone': net.backbone, **self._saved_parts(net, ema)}.items() if strict else ():
                check_fit(part.state_dict(), given.get(name, {}), f"the checkpoint does not fit the model's {name}")
        super().load_checkpoint_state(state_dict, task_state, ema=ema, strict=strict)


class DKSDistillationTask(DKSTask):
    """DKS with a teacher: loss = task_loss_weight * DKS + distill_loss_weight * distillation of the backbone.

    Args:
        net, loss_fn, **kwargs: See DKSTask.
        distillation: timm's LogitDistillationTask, FeatureDistillationTask or TokenDistillationTask whose student is
            `net.backbone`. It brings the teacher, the divergence and both weights.
    """

    def __init__(self, net: DKSModel, distillation: TrainingTask, loss_fn: Optional[DKSLoss] = None, **kwargs: Any):
        super().__init__(net, loss_fn, **kwargs)
        if distillation.trainable_module is not net.backbone:
            net.set_student(distillation.trainable_module)
            net.projection = distillation.trainable_module.projection
        # The backbone has run when the distillation is asked for, and DKSLoss has seen to the labels.
        distillation.trainable_module = _Given()
        distillation.criterion = _Given(0.)
        self.distillation = distillation

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """Run :meth:`DKSTask.forward` with the teacher's term in 'loss', and by itself in 'kd_loss', unweighted."""
        student, *branch_logits = self.trainable_module(input)
        result = self._result(input, [student[0] if isinstance(student, tuple) else student, *branch_logits], target)
        self.distillation.trainable_module.value = student
        distilled = self.distillation(input, target)
        self.distillation.trainable_module.value = None
        kd_loss = distilled['kd_loss' if 'kd_loss' in distilled else 'distill_loss'].detach()
        loss = self.distillation.task_loss_weight * result['loss'] + distilled['loss']
        return {**result, 'loss': loss, 'kd_loss': kd_loss}

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile student and teacher."""
        self.distillation.teacher.compile(backend, mode, compile_features=True, **compile_kwargs)
        return super().compile(backend, mode, **compile_kwargs)


class _Given(nn.Module):
    """A module that returns a value computed elsewhere, for any input."""

    def __init__(self, value: Any = None):
        super().__init__()
        self.value = value

    def forward(self, *args: Any) -> Any:
        return self.value
