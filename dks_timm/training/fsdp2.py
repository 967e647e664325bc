"""FSDP2, which Accelerate starts for sharded training: its conditions, and checkpoints that hold whole tensors.

Weights and the optimizer's state are cut up over the processes. A checkpoint is whole all the same, so that one process
can continue it, load it or export it.
"""
import os
from typing import Any, Dict, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..errors import OptionError, naming

# timm's optimizers whose updates work on parts of a weight; its others fail there.
OPTIMIZERS = (
    'adabelief', 'adadelta', 'adagrad', 'adam', 'adamax', 'adamc', 'adamw', 'adamwlegacy', 'adan', 'adanw', 'adopt',
    'adoptc', 'adoptw', 'lamb', 'lambc', 'lambcd', 'lambcw', 'lambw', 'laprop', 'lapropc', 'larc', 'lars', 'lion',
    'lionc', 'madgrad', 'madgradw', 'momentum', 'nadam', 'nadamc', 'nadamlegacy', 'nadamw', 'nesterov', 'nesterovw',
    'nlarc', 'nlars', 'radabelief', 'radam', 'radamlegacy', 'radamw', 'rmsprop', 'rmsproptf', 'rmsproptfc',
    'rmsproptfw', 'sgd', 'sgdc', 'sgdw')


def requested() -> bool:
    """Return True if the launcher's configuration asks for FSDP2 through the environment.

    Raises:
        OptionError: It asks for what is not supported.
    """
    if not parse_flag_from_env('ACCELERATE_USE_FSDP'):
        return False
    env = os.environ
    refused = {
        f'fsdp_version {env.get("FSDP_VERSION", "1")}': (
            env.get('FSDP_VERSION', '1') != '2', 'set fsdp_version: 2'),
        'fsdp_offload_params': (parse_flag_from_env('FSDP_OFFLOAD_PARAMS'), 'leave it out'),
        'fsdp_activation_checkpointing': (
            parse_flag_from_env('FSDP_ACTIVATION_CHECKPOINTING'), 'use --grad-checkpointing'),
        'fsdp_auto_wrap_policy SIZE_BASED_WRAP': (
            env.get('FSDP_AUTO_WRAP_POLICY', '').upper() == 'SIZE_BASED_WRAP',  # takes lists of branches for layers
            "use NO_WRAP, or TRANSFORMER_BASED_WRAP with the model's class of blocks"),
        f'dynamo_backend {env.get("ACCELERATE_DYNAMO_BACKEND", "NO")}': (
            env.get('ACCELERATE_DYNAMO_BACKEND', 'NO') != 'NO', 'leave it out'),
    }
    for name, (asked, instead) in refused.items():
        if asked:
            raise OptionError(f'accelerate config: {name} is not supported with FSDP2; {instead}')
    return True


def check(args) -> None:
    """Refuse flags that cannot work under FSDP2.

    Raises:
        OptionError: naming flag, value and reason.
    """
    def refuse(condition, subject, reason):
        if condition:
            raise OptionError(f'{subject}: not under FSDP2: {reason}')

    whole = 'looks at whole weights, and each process holds a part of them'
    refuse(args.model_ema, '--model-ema', f'the average {whole}; leave it out')
    refuse(args.channels_last, '--channels-last', 'weights must be contiguous; leave it out')
    refuse(args.torchcompile, f'--torchcompile {args.torchcompile}', 'compiled models are not supported; leave it out')
    refuse(args.clip_grad is not None and args.clip_mode == 'agc', '--clip-mode agc', f'it {whole}; use norm')
    refuse(args.dks and args.dks_every > 1, f'--dks-every {args.dks_every}',
           'updates in which branches have no gradients are not supported there; use --dks-batch-fraction')
    refuse(args.opt.lower() not in OPTIMIZERS, f'--opt {args.opt}', f'use one of {", ".join(OPTIMIZERS)}')
    streamed = args.dataset.lower().startswith(('hfids/', 'tfds/', 'wds/')) and args.val_split
    refuse(streamed, f'--dataset {args.dataset}',
           'processes would evaluate different numbers of batches, and wait for each other; use --val-split=')
    refuse(args.kd_model_name and args.kd_distill_type == 'feature' and not args.dks, '--kd-distill-type feature',
           f'evaluation of its student alone {whole}; use logit')


def plugin() -> FullyShardedDataParallelPlugin:
    """Return Accelerate's plugin, with weights in float32 and torch's autocast, as without FSDP2.

    FSDP2's own mixed precision would round BatchNorm's weights and statistics, too.
    """
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # it loads no buffers, and BatchNorm has some
    )


def started(accelerator: Accelerator) -> bool:
    """Return True if Accelerate runs FSDP2."""
    return accelerator.distributed_type == DistributedType.FSDP


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
