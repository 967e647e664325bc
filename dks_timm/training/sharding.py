"""FSDP2 and DeepSpeed: whether Accelerate starts the one it was asked for, what cannot run under it, full checkpoints.

Both cut the optimizer's state up over the processes, FSDP2 also the weights. What is saved is whole all the same: a
checkpoint can be continued under another engine, or by one process.
"""
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.imports import is_deepspeed_available, is_transformers_available
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..errors import OptionError, flag, naming

FSDP2 = 'FSDP2'
DEEPSPEED = 'DeepSpeed'

_WHOLE = 'looks at whole weights, and each process holds a part of them'
_CONTIGUOUS = 'weights must be contiguous'
_COMPILE = 'compiled models are not supported there; leave it out'
# Flags that cannot be combined with an engine, and why.
_REFUSED = {
    FSDP2: dict(model_ema=f'the average {_WHOLE}', channels_last=_CONTIGUOUS, torchcompile=_COMPILE),
    DEEPSPEED: dict(channels_last=_CONTIGUOUS, torchcompile=_COMPILE),
}
# timm's optimizers that update every number by itself: DeepSpeed joins weights and cuts them up anywhere.
ELEMENTWISE = (
    'adabelief', 'adadelta', 'adagrad', 'adam', 'adamax', 'adamc', 'adamw', 'adamwlegacy', 'adan', 'adanw', 'adopt',
    'adoptc', 'adoptw', 'laprop', 'lapropc', 'lion', 'lionc', 'madgrad', 'madgradw', 'momentum', 'nadam', 'nadamc',
    'nadamlegacy', 'nadamw', 'nesterov', 'nesterovw', 'radabelief', 'radam', 'radamlegacy', 'radamw', 'rmsprop',
    'rmsproptf', 'rmsproptfc', 'rmsproptfw', 'sgd', 'sgdc', 'sgdw',
)
# FSDP2's pieces know the weight they are of, and take norms of the whole. timm's other optimizers fail on them.
OPTIMIZERS = {
    FSDP2: (*ELEMENTWISE, 'lamb', 'lambc', 'lambcd', 'lambcw', 'lambw', 'larc', 'lars', 'nlarc', 'nlars'),
    DEEPSPEED: ELEMENTWISE,
}


def requested() -> str:
    """The engine that Accelerate's launcher asks for through the environment: FSDP2, DEEPSPEED or '' (DDP or nothing).

    Raises:
        OptionError: It is none of these, its packages are missing, or the launcher has left processes out.
    """
    env = os.environ
    joined = ('LOCAL_RANK', 'WORLD_SIZE', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')
    # Its launcher of single processes sets the first of these, and the second where several were asked for.
    if 'ACCELERATE_USE_CPU' in env and 'MASTER_ADDR' in env and not any(name in env for name in joined):
        raise OptionError(
            'accelerate launch --num_processes: asks for several processes, but there is one, as on a CPU; '
            'start several by: torchrun --nproc_per_node N train.py ...'
        )
    if parse_flag_from_env('ACCELERATE_USE_MEGATRON_LM'):
        raise OptionError('accelerate config asks for Megatron-LM: not supported; use FSDP2 (fsdp_version: 2)')
    for kind in ('TP', 'CP', 'SP'):
        size = env.get(f'PARALLELISM_CONFIG_{kind}_SIZE', '1')
        if parse_flag_from_env('ACCELERATE_USE_PARALLELISM_CONFIG') and size != '1':
            raise OptionError(
                f'accelerate config: parallelism_config_{kind.lower()}_size {size} is not supported; use 1')
    if parse_flag_from_env('ACCELERATE_USE_FSDP'):
        if env.get('FSDP_VERSION', '1') != '2':
            raise OptionError('accelerate config: fsdp_version 1 is not supported; set fsdp_version: 2')
        for name in ('offload_params', 'activation_checkpointing'):
            if parse_flag_from_env(f'FSDP_{name.upper()}'):
                instead = 'use --grad-checkpointing' if name == 'activation_checkpointing' else 'leave it out'
                raise OptionError(f'accelerate config: fsdp_{name} is not supported; {instead}')
        if env.get('FSDP_AUTO_WRAP_POLICY', '').upper() == 'SIZE_BASED_WRAP':
            raise OptionError(
                'accelerate config: fsdp_auto_wrap_policy SIZE_BASED_WRAP takes lists of branches for layers; '
                "use NO_WRAP, or TRANSFORMER_BASED_WRAP with the model's class of blocks"
            )
        return FSDP2
    if parse_flag_from_env('ACCELERATE_USE_DEEPSPEED'):
        present = dict(deepspeed=is_deepspeed_available(), transformers=is_transformers_available())
        missing = ' '.join(name for name, there in present.items() if not there)
        if missing:  # Accelerate asks for both
            raise OptionError(f'accelerate config asks for DeepSpeed: not installed; pip install {missing}')
        return DEEPSPEED
    return ''


def check(engine: str, args) -> None:
    """Refuse flags that cannot work under an engine, by name.

    Raises:
        OptionError: naming flag and value.
    """
    if not engine:
        return
    backend = os.environ.get('ACCELERATE_DYNAMO_BACKEND', 'NO')
    if backend != 'NO':
        raise OptionError(f'accelerate config: dynamo_backend {backend}: not under {engine}: {_COMPILE}')

    def refuse(condition, subject, reason):
        if condition:
            raise OptionError(f'{subject}: not under {engine}: {reason}')

    for name, reason in _REFUSED[engine].items():
        refuse(getattr(args, name), flag(name), reason)
    refuse(args.clip_grad is not None and args.clip_mode == 'agc', '--clip-mode agc', f'it {_WHOLE}; use norm')
    refuse(args.dks and args.dks_every > 1, f'--dks-every {args.dks_every}',
           'updates in which branches have no gradients are not supported there; use --dks-batch-fraction')
    refuse(args.opt.lower() not in OPTIMIZERS[engine], f'--opt {args.opt}',
           f'use one of {", ".join(OPTIMIZERS[engine])}')
    if engine == FSDP2:
        streamed = args.dataset.lower().startswith(('hfids/', 'tfds/', 'wds/')) and args.val_split
        refuse(streamed, f'--dataset {args.dataset}',
               'processes would evaluate different numbers of batches, and wait for each other; use --val-split=')
        refuse(args.kd_model_name and args.kd_distill_type == 'feature' and not args.dks, '--kd-distill-type feature',
               'its student is evaluated apart from what FSDP2 gathers; use logit')
    else:
        refuse(args.clip_grad is not None and args.clip_mode == 'value', '--clip-mode value', 'it clips norms only')
        refuse(args.amp and args.amp_dtype == 'float16', '--amp-dtype float16', 'use bfloat16')
        refuse(args.on_nonfinite == 'skip', '--on-nonfinite skip', 'it updates within its backward pass; use stop')


def accelerator_kwargs(engine: str, args, mixed_precision: Optional[str]) -> Dict[str, Any]:
    """Arguments of Accelerator: precision and the engine's plugin, the rest of which the environment says.

    Precision means the same under every engine: weights in float32, and torch's autocast. The engines' own ways would
    round BatchNorm's weights or statistics too.

    Args:
        engine: From :func:`requested`.
        args: The command line.
        mixed_precision: 'no', 'fp16' or 'bf16', None for the launcher's.
    """
    if engine == FSDP2:
        plugin = FullyShardedDataParallelPlugin(
            mixed_precision_policy=MixedPrecisionPolicy(),
            cpu_ram_efficient_loading=False,  # it loads no buffers, and BatchNorm has some
        )
        return dict(mixed_precision=mixed_precision, fsdp_plugin=plugin)
    if engine == DEEPSPEED:
        plugin = DeepSpeedPlugin()
        config = plugin.deepspeed_config
        if plugin.zero_stage not in (1, 2):
            raise OptionError(
                f'accelerate config: zero_stage {plugin.zero_stage} is not supported; use 2, or FSDP2')
        for name in ('optimizer', 'param'):
            if getattr(plugin, f'offload_{name}_device') not in (None, 'none'):  # it replaces the optimizer by its own
                raise OptionError(f'accelerate config: offload_{name}_device is not supported; use none')
        # The flags decide what Accelerate would derive from its loaders, or make up.
        for key, value in dict(
                train_micro_batch_size_per_gpu=args.batch_size,
                gradient_accumulation_steps=args.grad_accum_steps,
                gradient_clipping=args.clip_grad or 0.,
        ).items():
            if config.get(key, 'auto') not in ('auto', value):
                raise OptionError(f'accelerate config: {key} {config[key]} contradicts the flags ({value}); drop it')
            config[key] = value
        mixed_precision = mixed_precision or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
        if mixed_precision == 'fp16':
            raise OptionError('accelerate config: mixed_precision fp16 is not supported under DeepSpeed; use bf16')
        if mixed_precision == 'bf16':
            config['torch_autocast'] = dict(enabled=True, dtype='bfloat16')
        return dict(mixed_precision='no', deepspeed_plugin=plugin)
    return dict(mixed_precision=mixed_precision)


def started(accelerator: Accelerator) -> str:
    """The engine that Accelerate runs: FSDP2, DEEPSPEED, or '' for another."""
    return {DistributedType.FSDP: FSDP2, DistributedType.DEEPSPEED: DEEPSPEED}.get(accelerator.distributed_type, '')


def confirm(engine: str, accelerator: Accelerator) -> None:
    """Refuse to run where Accelerate has started something else than it was asked for, as it does on a CPU.

    Raises:
        OptionError: naming both.
    """
    if started(accelerator) != engine:
        raise OptionError(
            f'accelerate config asks for {engine}, but Accelerate started {accelerator.distributed_type.value} on '
            f'{accelerator.device}; {engine} needs GPUs, and accelerate launch'
        )


def precision(accelerator: Accelerator) -> str:
    """Mixed precision of a run: 'no', 'fp16' or 'bf16'."""
    if started(accelerator) == DEEPSPEED:
        return 'bf16' if accelerator.deepspeed_plugin.deepspeed_config.get('torch_autocast') else 'no'
    return accelerator.mixed_precision


def autocast(accelerator: Accelerator):
    """Context of a forward pass; under DeepSpeed, Accelerate's own does nothing."""
    if started(accelerator) == DEEPSPEED:
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision(accelerator) == 'bf16')
    return accelerator.autocast()


class Shards:
    """Model and optimizer under an engine that cuts them up.

    Stands in for task and optimizer before timm's CheckpointSaver, which only the main process has: every process calls
    :meth:`gather`, then the main one saves what came together.

    Args:
        engine: FSDP2 or DEEPSPEED.
        accelerator: Of that engine.
        task: Its trainable module is prepared here.
        optimizer: Of that module, on all its parameters, perhaps with a resumed state.

    Attributes:
        optimizer: The prepared optimizer.
    """

    def __init__(self, engine: str, accelerator: Accelerator, task, optimizer: torch.optim.Optimizer):
        self.engine = engine
        self.is_main_process = accelerator.is_main_process
        self.task = task
        module = task.get_trainable_module()
        for tensor in (*module.parameters(), *module.buffers()):  # DDP does so by itself
            torch.distributed.broadcast(tensor.data, 0)
        resumed = optimizer.state_dict()
        self.groups: List[List[nn.Parameter]] = [group['params'] for group in optimizer.param_groups]
        if engine == FSDP2:
            with naming('accelerate config', ValueError):  # names a class of blocks that the model does not have
                accelerator.state.fsdp_plugin.set_auto_wrap_policy(module)
        task.trainable_module, self.optimizer = accelerator.prepare(module, optimizer)
        if engine == DEEPSPEED and precision(accelerator) == 'bf16':
            if not getattr(task.trainable_module, 'torch_autocast_enabled', bool)():
                raise OptionError('--amp: this version of DeepSpeed has no torch_autocast; pip install -U deepspeed')
        if engine == FSDP2 and hasattr(module, 'exits'):
            register_fsdp_forward_method(module, 'exits')  # evaluation calls it, and it needs whole weights too
        if resumed['state']:
            (self._load_fsdp2 if engine == FSDP2 else self._load_deepspeed)(resumed)
        self._model_state: Dict[str, Any] = {}
        self._optimizer_state: Dict[str, Any] = {}

    def gather(self) -> None:
        """Put the states together, on the main process. All processes have to call it."""
        optimizer = self.optimizer.state_dict() if self.engine == FSDP2 else self._deepspeed_state()
        self._model_state, self._optimizer_state = tree_map_only(
            torch.Tensor, self._whole, (self.task.get_checkpoint_state(), optimizer))

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = None) -> Dict[str, Any]:
        """What a task answers; an average, which only DeepSpeed allows, is whole on every process."""
        return self.task.get_checkpoint_state(ema=True) if ema else self._model_state

    def state_dict(self) -> Dict[str, Any]:
        """What an optimizer answers."""
        return self._optimizer_state

    def _whole(self, tensor: torch.Tensor) -> Optional[torch.Tensor]:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.cpu() if self.is_main_process else None

    def _load_fsdp2(self, state: Dict[str, Any]) -> None:
        params = [p for group in self.optimizer.param_groups for p in group['params']]
        for i, held in state['state'].items():
            p = params[i]
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    placements = p.placements if value.shape == p.shape else None  # None: whole on every process
                    held[key] = distribute_tensor(value.to(p.device), p.device_mesh, placements)
        self.optimizer.load_state_dict(state)

    def _deepspeed_state(self) -> Dict[str, Any]:
        state: Dict[str, Any] = dict(state={}, param_groups=[])
        count = 0
        optimizer = self.optimizer.optimizer.optimizer  # within Accelerate's and DeepSpeed's
        for params, group in zip(self.groups, optimizer.param_groups, strict=True):
            joined = group['params'][0]  # this process's part of the group's weights, one after another
            group = {**group, 'params': [count + i for i in range(len(params))]}
            state['param_groups'].append(group)
            count += len(params)
            held = optimizer.state.get(joined, {})
            if held:
                for i, p in zip(group['params'], params, strict=True):
                    state['state'][i] = {k: _join(p, v) if _is_like(v, joined) else v for k, v in held.items()}
        return state

    def _load_deepspeed(self, state: Dict[str, Any]) -> None:
        optimizer = self.optimizer.optimizer.optimizer
        for params, group, saved in zip(self.groups, optimizer.param_groups, state['param_groups'], strict=True):
            joined = group['params'][0]
            for i, p in zip(saved['params'], params, strict=True):
                for key, value in state['state'].get(i, {}).items():
                    if _is_like(value, p):
                        part = optimizer.state[joined].setdefault(key, torch.zeros_like(joined))
                        for there, here in _fragments(p, value, part):
                            here.copy_(there)
                    else:
                        optimizer.state[joined][key] = value
            group.update({key: value for key, value in saved.items() if key != 'params'})


def _fragments(p: nn.Parameter, whole: torch.Tensor, joined: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """The part of a parameter that DeepSpeed has given this process, if any: of a tensor like it, and of what it holds.
    """
    mapping = p._hp_mapping
    if mapping is not None:
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield whole.view(-1).narrow(0, there.start, there.numel), joined.narrow(0, here.start, here.numel)


def _join(p: nn.Parameter, held: torch.Tensor) -> torch.Tensor:
    """What all processes hold for a parameter, in its shape."""
    whole = torch.zeros_like(p, dtype=held.dtype)
    for there, here in _fragments(p, whole, held):
        there.copy_(here)
    torch.distributed.all_reduce(whole)
    return whole


def _is_like(value: Any, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tensor.shape
