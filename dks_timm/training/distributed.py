"""The processes of a run: how Accelerate starts them, and what they tell each other."""
import contextlib
import ctypes
import importlib
import logging
import os
import sys
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, TorchDynamoPlugin
from timm import utils

from ..errors import InputError, OptionError, SharedError, closest, naming
from . import sharding

_logger = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def create_accelerator(args, given) -> Accelerator:
    """Start Accelerate on the device and in the precision that the flags or the launcher ask for.

    Where --device was not given the best device present is taken. --amp and --amp-dtype win over the launcher.
    As timm's does, sets ``device``, ``distributed``, ``world_size``, ``rank`` and ``local_rank`` in args, and seeds.
    """
    engine = sharding.requested()
    sharding.check(engine, args)
    for module in args.device_modules or ():
        with naming(f'--device-modules {module}', ImportError):
            importlib.import_module(module)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    on_cpu = not torch.accelerator.is_available()
    if 'device' in given:
        device = _check_device(args.device)
        on_cpu = device.type == 'cpu'
        if not on_cpu and int(os.environ.get('WORLD_SIZE', 1)) == 1:
            os.environ['ACCELERATE_TORCH_DEVICE'] = str(device)
    elif on_cpu:
        _logger.info('No accelerator found: training on the CPU.')

    precision = None
    if args.amp:
        if on_cpu and 'amp_dtype' not in given:
            _logger.info('--amp on the CPU: bfloat16.')
            args.amp_dtype = 'bfloat16'
        precision = dict(float16='fp16', bfloat16='bf16')[args.amp_dtype]
    elif 'amp' in given:
        precision = 'no'

    trackers = args.log_with + ['wandb'] * args.log_wandb
    for tracker in trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise OptionError(f'--log-with {tracker}: no tracker of Accelerate{closest(tracker, LOGGER_TYPE_TO_CLASS)}')
        if tracker not in [str(t) for t in get_available_trackers()]:
            flag = f'--log-with {tracker}' if tracker in args.log_with else '--log-wandb'
            raise OptionError(f'{flag}: {tracker} is not installed; pip install {tracker}')

    with naming('accelerate launch', ValueError):  # of a precision or backend that is not to be had
        accelerator = Accelerator(
            **sharding.accelerator_kwargs(engine, args, precision),
            cpu=on_cpu,
            log_with=trackers or None,
            project_dir=args.output or './output/train',
            # Groups of batches are divided here, as timm does, and not by Accelerate.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # The launcher's has become --torchcompile.
            dynamo_plugin=TorchDynamoPlugin(backend='no'),
            kwargs_handlers=[DistributedDataParallelKwargs(
                broadcast_buffers=not args.no_ddp_bb,
                find_unused_parameters=args.dks and args.dks_every > 1,
            )],
        )
    sharding.confirm(engine, accelerator)
    if accelerator.device.type == 'cpu' and accelerator.mixed_precision == 'fp16':
        raise OptionError('--amp-dtype float16: not on a CPU; use --amp-dtype bfloat16')
    if accelerator.device.type == 'cpu' and accelerator.num_processes > 1 and args.sync_bn:
        raise OptionError('--sync-bn: torch has none for the CPU; --dist-bn reduce averages after every epoch')
    if accelerator.device.type == 'cpu':
        keep_freed_memory()
    args.device = str(accelerator.device)
    args.distributed = accelerator.num_processes > 1
    args.world_size = accelerator.num_processes
    args.rank = accelerator.process_index
    args.local_rank = accelerator.local_process_index
    _logger.info(
        f'Training on {args.device}, process {args.rank} of {args.world_size}, '
        + (f'{engine}, ' if engine else '') + f'mixed precision {sharding.precision(accelerator)}.'
    )
    utils.random_seed(args.seed, args.rank)
    return accelerator


def keep_freed_memory() -> bool:
    """Have malloc keep what tensors free, as the next step needs it again. Settings in the environment win.

    glibc hands blocks above 32 MiB back to the system at once, and gets them anew page by page, each filled with
    zeros: a tenth of the CPU time of a step where gradients or activations are of that size.

    Returns:
        Whether it was asked to, and did not refuse: only glibc knows how.
    """
    given = any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ)
    if given or not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def _check_device(name: str) -> torch.device:
    with naming(f'--device {name}', RuntimeError):
        device = torch.device(name)
    module = getattr(torch, device.type, None)
    present = device.type == 'cpu' or (module is not None and module.is_available())
    if not present or (device.index or 0) >= (1 if device.type == 'cpu' else module.device_count()):
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
        raise OptionError(f'--device {name}: is not on this machine; use --device {best}')
    return device


@contextlib.contextmanager
def refuse_together():
    """Refuse bad input in all processes where one of them does."""
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
    """Let all processes know whether one refuses its input, and compare what they have to agree on.

    Else the others, on other nodes perhaps, would wait for it for ever. All processes have to call this.

    Args:
        refusal: Why this process stops, or ''.
        facts: Values by what they are called in a message.

    Raises:
        SharedError: Another process refuses, or facts differ.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    told = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (refusal, facts))
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
