"""DKS in timm's own training loop."""
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .loss import DKSLoss
from .model import DKSModel


class DKSTask(ClassificationTask):
    """Train all classifiers of a DKSModel; evaluate and save its plain backbone.

    The trainable module is the DKSModel, the eval model its backbone. So the `state_dict` of a checkpoint is that of
    the timm model, which `timm.create_model(checkpoint_path=...)` loads, and the branches are in its `task_state`.

    Args:
        net: The model to train.
        loss_fn: Loss of the list of logits, DKSLoss() when None.
        device: Device for task tensors/buffers
        dtype: Dtype for task tensors/buffers
        verbose: Enable info logging

    Raises:
        ValueError: The weights of the loss are for another number of classifiers.
    """

    def __init__(
            self,
            net: DKSModel,
            loss_fn: Optional[DKSLoss] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        loss_fn = DKSLoss() if loss_fn is None else loss_fn
        loss_fn.resolve_weights(1 + len(net.branches))
        super().__init__(net, loss_fn, device=device, dtype=dtype, verbose=verbose)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """Forward pass through backbone and branches, and the DKS loss.

        Args:
            input: Images (B, C, H, W)
            target: Class indices (B,), or dense targets (B, num_classes)

        Returns:
            Dictionary containing:
                - 'loss': Training loss
                - 'output': Logits of the backbone (B, num_classes)
                - 'logits': List of all logits, the backbone's first
                - 'ce', 'synergy': Reports of DKSLoss
        """
        logits = self.trainable_module(input)
        return {**self.criterion(logits, target), 'output': logits[0], 'logits': logits}

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the DKSModel for training, and its backbone by itself for evaluation."""
        self.eval_model = torch.compile(self.get_eval_model(), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The plain backbone, whatever wraps the DKSModel; the compiled one after `compile`."""
        model = super().get_eval_model(module=module, ema=ema)
        net = unwrap_model(model)
        return net.backbone if isinstance(net, DKSModel) else model

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Parameters to clip; exclude_head leaves out the classifiers of backbone and branches."""
        net = unwrap_model(self.trainable_module)
        heads = {id(p) for head in net.get_classifiers() for p in head.parameters()} if exclude_head else set()
        return [p for p in net.parameters() if id(p) not in heads]

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """State of the branches, with the stages they sit on."""
        net = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))
        return {'stages': list(net.stages), 'branches': net.branches.state_dict()}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        net = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))
        net.branches.load_state_dict(state['branches'], strict=strict)

    def load_checkpoint_state(
            self,
            state_dict: Dict[str, Any],
            task_state: Optional[Dict[str, Any]] = None,
            ema: bool = False,
            strict: bool = True,
    ) -> None:
        """Load backbone and branches.

        Raises:
            ValueError: The checkpoint has no branches, or is of another backbone or other branches. Nothing is loaded.
        """
        net = unwrap_model(self.get_trainable_module(ema=ema))
        if net is not None:
            if not task_state or 'branches' not in task_state:
                raise ValueError(
                    'the checkpoint holds no branches, so training with DKS cannot resume from it: '
                    'use --initial-checkpoint to start from its backbone'
                )
            stages = tuple(task_state['stages'])
            if stages != net.stages:
                raise ValueError(f'the checkpoint has branches on stages {stages}, the model on {net.stages}')
            if strict:
                _check_fit(net.backbone, state_dict, 'backbone')
                _check_fit(net.branches, task_state['branches'], 'branches')
        super().load_checkpoint_state(state_dict, task_state, ema=ema, strict=strict)


def _check_fit(module: nn.Module, state_dict: Dict[str, Any], name: str) -> None:
    """Refuse a state dict with other entries or shapes than the module's, naming the first of them."""
    theirs, ours = ({k: tuple(v.shape) for k, v in state.items()} for state in (state_dict, module.state_dict()))
    for key in {**ours, **theirs}:
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"the checkpoint does not fit the model's {name}: {key} is {theirs.get(key, 'missing')} in the "
                f"checkpoint and {ours.get(key, 'missing')} in the model"
            )
