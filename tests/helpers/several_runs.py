"""Run train.py several times in the processes of one launch, as every launch takes seconds.

    torchrun --nproc_per_node 2 tests/helpers/several_runs.py OUT.pt RUNS.json

RUNS.json holds a list of runs, each a dictionary: ``argv``, in which {rank} stands for that of the process, and where
wanted ``sharded`` (by FSDP2, which Accelerate starts on accelerators only; here it is told that it has, since it runs
on gloo as well), ``env``, and ``fault``, which one process meets at a batch: ``rank``, ``batch``
(counted from the run's first) and ``kind`` ('SIGTERM', 'SIGKILL', 'nan' or 'raise'). OUT.pt, with the rank before its
suffix, gets for each run the exit code, what was printed, and the tensors of the module that was trained.
"""
import contextlib
import io
import json
import logging
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import train
from dks_timm.training import distributed, loop


class ShardingAccelerator(Accelerator):
    """Accelerate's, with FSDP2 on the CPU."""

    def __init__(self, *, fsdp_plugin=None, **kwargs):
        super().__init__(fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state['distributed_type'] = DistributedType.FSDP


def run(argv, sharded=False, env=(), fault=None):
    """Run train.py; returns exit code, standard output and error, and what the module came to."""
    seen = {}

    class Trainer(loop.Trainer):
        batches = 0

        def to_device(self, x, y):
            x, y = super().to_device(x, y)
            self.batches += loop.utils.unwrap_model(self.task.get_trainable_module()).training
            if fault and self.batches == fault['batch'] and self.accelerator.process_index == fault['rank']:
                self.batches += 1
                if fault['kind'] == 'raise':
                    raise RuntimeError('this process has met a fault')
                elif fault['kind'] == 'nan':
                    x = x * torch.nan
                else:
                    os.kill(os.getpid(), getattr(signal, fault['kind']))
            return x, y

        @contextlib.contextmanager
        def running(self):
            with super().running():
                yield
            module = loop.utils.unwrap_model(self.task.get_trainable_module())
            seen.update((name, t.detach().clone()) for name, t in module.named_buffers())
            if not sharded:
                seen.update((name, t.detach().clone()) for name, t in module.named_parameters())

    variables = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2') if sharded else {}
    out, err = io.StringIO(), io.StringIO()
    handlers, level, code = logging.root.handlers[:], logging.root.level, 0
    with (
            mock.patch.dict(os.environ, {**variables, **dict(env)}),
            mock.patch.object(loop, 'Trainer', Trainer),
            mock.patch.object(distributed, 'Accelerator', ShardingAccelerator if sharded else Accelerator),
            mock.patch.object(PartialState, 'destroy_process_group'),  # the next run needs it
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
    ):
        try:
            train.main(argv)
        except SystemExit as e:
            code = e.code
        AcceleratorState._reset_state(reset_partial_state=True)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    return dict(code=code, out=out.getvalue(), err=err.getvalue(), tensors=seen)


if __name__ == '__main__':
    rank = int(os.environ['RANK'])
    results = []
    for kwargs in json.loads(Path(sys.argv[2]).read_text()):
        argv = [a.replace('{rank}', str(rank)) for a in kwargs['argv']]
        results.append(run(argv, kwargs.get('sharded'), kwargs.get('env', {}), kwargs.get('fault')))
        torch.save(results, Path(sys.argv[1]).with_suffix(f'.{rank}.pt'))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
