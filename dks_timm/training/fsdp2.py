"""FSDP2, which Accelerate starts for sharded training: its conditions, and checkpoints that hold whole tensors.

Weights and the optimizer's state are cut up over the processes. A checkpoint is whole all the same, so that one process
can continue it, load it or export it.
"""
import os
from typing import Any, Dict, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from .._compat import tree_map_only
from ..errors import OptionError, naming

# timm's optimizers whose updates work on parts of a weight; its others fail there.
OPTIMIZERS = (
    'adabelief', 'adadelta', 'adagrad', 'adam', 'adamax', 'adamc', 'adamw', 'adamwlegacy', 'adan', 'adanw', 'adopt',
    'adoptc', 'adoptw', 'lamb', 'lambc', 'lambcd', 'lambcw', 'lambw', 'laprop', 'lapropc', 'larc', 'lars', 'lion',
    'lionc', 'madgrad', 'madgradw', 'momentum', 'nadam', 'nadamc', 'nadamlegacy', 'nadamw', 'nesterov', 'nesterovw',
    'nlarc', 'nlars', 'radabelief', 'radam', 'radamlegacy', 'radamw', 'rmsprop', 'rmsproptf', 'rmsproptfc',
    'rmsproptfw', 'sgd', 'sgdc', 'sgdw')


def requested(args) -> bool:
    """Return True if the launcher asks for FSDP2 through the environment.

    Raises:
        OptionError: naming a setting or flag that does not work with it.
    """
    if not parse_flag_from_env('ACCELERATE_USE_FSDP'):
        return False
    settings = (
        ('FSDP_VERSION', '1', '1', 'set fsdp_version: 2'),
        ('FSDP_OFFLOAD_PARAMS', '', 'true', 'leave it out'),
        ('FSDP_ACTIVATION_CHECKPOINTING', '', 'true', 'use --grad-checkpointing'),
        ('FSDP_AUTO_WRAP_POLICY', '', 'size_based_wrap', 'use NO_WRAP or TRANSFORMER_BASED_WRAP'),  # cuts branches off
    )
    for name, default, unsupported, instead in settings:
        if os.environ.get(name, default).lower() == unsupported:
            raise OptionError(f'accelerate config: {name.lower()} {unsupported} is not supported; {instead}')
    if (backend := os.environ.get('ACCELERATE_DYNAMO_BACKEND', 'NO')) != 'NO':
        raise OptionError(f'accelerate config: dynamo_backend {backend} is not supported with FSDP2; leave it out')

    whole = 'it looks at whole weights, and each process holds a part of them'
    alone = 'updates in which branches have no gradients are not supported; use --dks-batch-fraction'
    flags = (
        (args.model_ema, '--model-ema', whole),
        (args.channels_last, '--channels-last', 'weights must be contiguous'),
        (args.torchcompile, f'--torchcompile {args.torchcompile}', 'compiled models are not supported'),
        (args.clip_grad is not None and args.clip_mode == 'agc', '--clip-mode agc', f'{whole}; use norm'),
        (args.dks and args.dks_every > 1, f'--dks-every {args.dks_every}', alone),
        (args.dks and args.dks_off_epoch, f'--dks-off-epoch {args.dks_off_epoch}', alone),
        (args.opt.lower() not in OPTIMIZERS, f'--opt {args.opt}', f'use one of {", ".join(OPTIMIZERS)}'),
        (args.dataset.lower().startswith(('hfids/', 'tfds/', 'wds/')) and args.val_split, f'--dataset {args.dataset}',
         'processes would evaluate different numbers of batches, and wait for each other; use --val-split='),
        (args.kd_model_name and args.kd_distill_type == 'feature' and not args.dks, '--kd-distill-type feature',
         f'{whole} in an evaluation; use logit'),
    )
    for refused, subject, reason in flags:
        if refused:
            raise OptionError(f'{subject}: not under FSDP2: {reason}')
    return True


def plugin() -> FullyShardedDataParallelPlugin:
    """Return Accelerate's plugin, with weights in float32 and torch's autocast, as without FSDP2.

    FSDP2's own mixed precision would round BatchNorm's weights and statistics, too.
    """
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # it loads no buffers, and BatchNorm has some
    )


class Shards:
    """A model and its optimizer, prepared by FSDP2.

    Stands in for task and optimizer before timm's CheckpointSaver, which only the main process has: every process calls
    :meth:`gather`, then the main one saves.
    """

    def __init__(self, accelerator: Accelerator, task, optimizer: torch.optim.Optimizer):
        self.is_main_process = accelerator.is_main_process
        self.task = task
        module = task.get_trainable_module()
        for tensor in (*module.parameters(), *module.buffers()):  # DDP does so by itself
            torch.distributed.broadcast(tensor.data, 0)
        resumed = optimizer.state_dict()
        with naming('accelerate config', ValueError):  # names a class of blocks that the model does not have
            accelerator.state.fsdp_plugin.set_auto_wrap_policy(module)
        task.trainable_module, self.optimizer = accelerator.prepare(module, optimizer)
        if hasattr(module, 'exits'):
            register_fsdp_forward_method(module, 'exits')  # evaluation calls it, and it needs whole weights, too
        if resumed['state']:
            self._load(resumed)
        self._model_state: Dict[str, Any] = {}
        self._optimizer_state: Dict[str, Any] = {}

    def gather(self) -> None:
        """Gather the states on the main process. All processes have to call it."""
        self._model_state, self._optimizer_state = tree_map_only(
            torch.Tensor, self._whole, (self.task.get_checkpoint_state(), self.optimizer.state_dict()))

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = None) -> Dict[str, Any]:
        """Return the gathered state, as a task does; there is no average under FSDP2."""
        return {} if ema else self._model_state

    def state_dict(self) -> Dict[str, Any]:
        """Return the gathered state, as an optimizer does."""
        return self._optimizer_state

    def _whole(self, tensor: torch.Tensor) -> Optional[torch.Tensor]:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.cpu() if self.is_main_process else None

    def _load(self, state: Dict[str, Any]) -> None:
        """Distribute the state of an optimizer."""
        params = [p for group in self.optimizer.param_groups for p in group['params']]
        for i, held in state['state'].items():
            p = params[i]
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    placements = p.placements if value.shape == p.shape else None  # None: whole on every process
                    held[key] = distribute_tensor(value.to(p.device), p.device_mesh, placements)
        self.optimizer.load_state_dict(state)
