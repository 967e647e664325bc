"""The processes of a run: started by Accelerate, and of one mind about input and files."""
import contextlib
import ctypes
import importlib
import logging
import os
import sys
from typing import Optional, Set

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    gather_object,
    parse_flag_from_env,
)
from timm import utils

from ..errors import InputError, OptionError, SharedError, closest, naming
from . import fsdp2

_logger = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def create_accelerator(args, given: Set[str]) -> Accelerator:
    """Start Accelerate on the device and in the precision that the flags or the launcher ask for, and seed.

    Without --device, the best device present is taken. --amp and --amp-dtype win over the launcher.

    Raises:
        OptionError: The machine does not have what was asked for.
    """
    _check_launcher()
    sharded = fsdp2.requested(args)
    for module in args.device_modules or ():
        with naming(f'--device-modules {module}', ImportError):
            importlib.import_module(module)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        # The fastest of several kernels is another one from run to run.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    on_cpu = _resolve_device(args, given)
    with naming('accelerate launch', ValueError):  # of a precision or backend that is not to be had
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=_resolve_precision(args, given, on_cpu),
            fsdp_plugin=fsdp2.plugin() if sharded else None,
            log_with=_resolve_trackers(args),
            project_dir=args.output or './output/train',
            # Groups of batches are divided as timm does, and not by Accelerate.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # The launcher's has become --torchcompile.
            dynamo_plugin=TorchDynamoPlugin(backend='no'),
            kwargs_handlers=[DistributedDataParallelKwargs(
                broadcast_buffers=not args.no_ddp_bb,
                find_unused_parameters=args.dks and (args.dks_every > 1 or args.dks_off_epoch > 0),
            )],
        )
    if sharded and not accelerator.is_fsdp2:  # as on a CPU
        raise OptionError(
            f'accelerate config asks for FSDP2, but Accelerate started {accelerator.distributed_type.value} on '
            f'{accelerator.device}; FSDP2 needs GPUs, and accelerate launch')
    if accelerator.device.type == 'cpu':
        if accelerator.mixed_precision == 'fp16':
            raise OptionError('--amp-dtype float16: not on a CPU; use --amp-dtype bfloat16')
        if accelerator.num_processes > 1 and args.sync_bn:
            raise OptionError('--sync-bn: torch has none for the CPU; --dist-bn reduce averages after every epoch')
        keep_freed_memory()
    _logger.info(
        f'Training on {accelerator.device}, process {accelerator.process_index} of {accelerator.num_processes}, '
        + 'FSDP2, ' * sharded + f'mixed precision {accelerator.mixed_precision}.')
    utils.random_seed(args.seed, accelerator.process_index)
    return accelerator


def _check_launcher() -> None:
    """Refuse kinds of parallel training that are not supported, and processes that the launcher did not start."""
    env = os.environ
    joined = ('LOCAL_RANK', 'WORLD_SIZE', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')
    # The launcher of single processes sets the first of these, and the second where several were asked for.
    if 'ACCELERATE_USE_CPU' in env and 'MASTER_ADDR' in env and not any(name in env for name in joined):
        raise OptionError(
            'accelerate launch --num_processes: asks for several processes, but there is one, as on a CPU; '
            'start several by: torchrun --nproc_per_node N train.py ...')
    for name in ('MEGATRON_LM', 'DEEPSPEED', 'PARALLELISM_CONFIG'):
        if parse_flag_from_env(f'ACCELERATE_USE_{name}'):
            raise OptionError(f'accelerate config asks for {name}: not supported; use FSDP2 (fsdp_version: 2)')


def _resolve_device(args, given: Set[str]) -> bool:
    """Check the device, hand it to Accelerate, and return True for the CPU."""
    if 'device' not in given:
        on_cpu = not torch.accelerator.is_available()
        if on_cpu:
            _logger.info('No accelerator found: training on the CPU.')
        return on_cpu
    with naming(f'--device {args.device}', RuntimeError):
        device = torch.device(args.device)
    module = getattr(torch, device.type, None)
    present = device.type == 'cpu' or (module is not None and module.is_available())
    if not present or (device.index or 0) >= (1 if device.type == 'cpu' else module.device_count()):
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
        raise OptionError(f'--device {args.device}: is not on this machine; use --device {best}')
    if device.type != 'cpu' and int(os.environ.get('WORLD_SIZE', 1)) == 1:
        os.environ['ACCELERATE_TORCH_DEVICE'] = str(device)
    return device.type == 'cpu'


def _resolve_precision(args, given: Set[str], on_cpu: bool) -> Optional[str]:
    """Return Accelerate's name of the precision, None for the launcher's."""
    if not args.amp:
        return 'no' if 'amp' in given else None
    if on_cpu and 'amp_dtype' not in given:
        _logger.info('--amp on the CPU: bfloat16.')
        return 'bf16'
    return dict(float16='fp16', bfloat16='bf16')[args.amp_dtype]


def _resolve_trackers(args):
    """Check the trackers that are asked for, and return their names or None."""
    trackers = args.log_with + ['wandb'] * args.log_wandb
    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise OptionError(f'--log-with {tracker}: no tracker of Accelerate{closest(tracker, LOGGER_TYPE_TO_CLASS)}')
        if tracker not in [str(t) for t in get_available_trackers()]:
            flag = f'--log-with {tracker}' if tracker in args.log_with else '--log-wandb'
            raise OptionError(f'{flag}: {tracker} is not installed; pip install {tracker}')
    return trackers or None


def keep_freed_memory() -> bool:
    """Have malloc keep the memory of freed tensors for the next step. Settings in the environment win.

    glibc hands blocks above 32 MiB back to the system at once, and gets them anew page by page, each filled with
    zeros: a tenth of the CPU time of a step where gradients or activations are of that size. Returns True if it does.
    """
    given = any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ)
    mallopt = None if given or sys.platform != 'linux' else getattr(ctypes.CDLL(None), 'mallopt', None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


@contextlib.contextmanager
def refuse_together():
    """Refuse bad input in all processes where one of them does: the others, on other nodes perhaps, would wait."""
    try:
        yield
    except SharedError:
        raise
    except InputError as e:
        share(str(e))
        raise
    else:
        share()


def share(refusal: str = '', facts: Optional[dict] = None) -> None:
    """Raise a SharedError in all processes if one refuses, or has other facts (values by name)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    told = gather_object([(refusal, facts)])
    if refusal:
        return
    for rank, (other, _) in enumerate(told):
        if other:
            raise SharedError(f'{other} (process {rank})')
    for name, value in (facts or {}).items():
        for rank, (_, theirs) in enumerate(told):
            if theirs is not None and theirs[name] != value:
                raise SharedError(
                    f'{name}: process {rank} has {theirs[name]}, process {torch.distributed.get_rank()} {value}; '
                    'every node needs the same files'
                )
