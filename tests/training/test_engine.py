"""The Accelerate loop's parts: where it runs, what it counts, which checkpoint it resumes."""
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import timm.utils
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dks_timm import errors
from dks_timm.training import checkpoint, config, distributed
from dks_timm.training.metrics import Totals


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start(*argv):
    args, given, _ = config.parse_args(list(argv))
    return distributed.create_accelerator(args, given), args


@pytest.mark.skipif(torch.accelerator.is_available(), reason='needs a machine without an accelerator')
def test_without_device_flag_and_accelerator_the_cpu_is_taken_and_said(caplog):
    with caplog.at_level(logging.INFO):
        accelerator, _ = start()
    assert accelerator.device.type == 'cpu' and 'training on the CPU' in caplog.text


@pytest.mark.parametrize('argv, env, precision', [
    ([], None, 'no'),
    ([], 'bf16', 'bf16'),
    (['--amp'], None, 'bf16'),
    (['--amp', '--amp-dtype', 'bfloat16'], 'no', 'bf16'),
])
def test_amp_flags_win_over_the_launcher_and_mean_bfloat16_on_the_cpu(monkeypatch, argv, env, precision):
    if env:
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', env)
    accelerator, _ = start('--device', 'cpu', *argv)
    assert accelerator.mixed_precision == precision


def test_a_launcher_that_asks_for_float16_on_the_cpu_is_refused(monkeypatch):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')
    with pytest.raises(errors.OptionError, match='float16: not on a CPU'):
        start('--device', 'cpu')


@pytest.mark.slow
@pytest.mark.skipif('CS_GNU_LIBC_VERSION' not in getattr(os, 'confstr_names', ()), reason='needs glibc')
def test_memory_that_a_tensor_frees_serves_the_next_one(monkeypatch):
    code = (
        'import resource, torch\n'
        'from dks_timm.training import config, distributed\n'
        'args, given, _ = config.parse_args(["--device", "cpu"])\n'
        'distributed.create_accelerator(args, given)\n'
        'for _ in range(8):\n'  # it may take a few until blocks of the size lie where they fit
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    torch.ones(64 << 20, dtype=torch.uint8)\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n'
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    pages = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert int(pages) < 100  # of 16,384
    monkeypatch.setenv('MALLOC_ARENA_MAX', '8')
    assert not distributed.keep_freed_memory()


def test_random_numbers_start_where_timms_do():
    start('--device', 'cpu', '--seed', '7')
    drawn = torch.rand(1), np.random.rand(), random.random()
    timm.utils.random_seed(7, 0)
    assert drawn == (torch.rand(1), np.random.rand(), random.random())


def test_totals_are_means_over_samples():
    totals = Totals(Accelerator(cpu=True), ['backbone', 'stage2'])
    logits = [torch.eye(4), torch.eye(4).flip(0)]
    synergy = torch.tensor([[0., 3.], [5., 0.]])
    report = dict(output=logits[0], logits=logits, ce=torch.tensor([1., 2.]), synergy=synergy)
    totals.update(report, torch.tensor(1.), torch.tensor([0, 1, 2, 0]), 4)
    half = dict(report, logits=[z[:2] for z in logits], ce=torch.tensor([4., 8.]))
    totals.update(half, torch.tensor(4.), torch.eye(4)[[0, 0]], 2)  # soft targets
    assert totals.count == 6
    assert totals.compute(reduce=True) == pytest.approx({
        'loss': (4 * 1 + 2 * 4) / 6, 'top1_backbone': 100 * (3 + 1) / 6, 'top1_stage2': 100 * (1 + 0) / 6,
        'ce_backbone': (4 * 1 + 2 * 4) / 6, 'ce_stage2': (4 * 2 + 2 * 8) / 6, 'synergy': 4.,
        'synergy_backbone_stage2': 3., 'synergy_stage2_backbone': 5.,
    })
    totals.update(dict(half, ensemble=torch.tensor([1., 0.])), torch.tensor(4.), torch.tensor([0, 1]), 2)
    totals.update(dict(report, ensemble=torch.tensor([3., 2.])), torch.tensor(1.), torch.tensor([0, 1, 2, 0]), 4)
    means = totals.compute()
    assert [means[f'synergy_ensemble_{name}'] for name in totals.names] == [14 / 12, 8 / 12]  # of all samples


def save(path, age):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(epoch=0), path)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_resume_auto_takes_the_newest_complete_checkpoint_of_the_experiment(tmp_path):
    args, _, text = config.parse_args(['--resume', 'auto', '--output', str(tmp_path), '--experiment', 'x'])
    assert checkpoint.find_resume(args, text) == ''
    save(tmp_path / 'x/checkpoint-0.pth.tar', age=30)
    save(tmp_path / 'x/last.pth.tar', age=20)
    save(tmp_path / 'x/recovery-1-9.pth.tar', age=10)
    save(tmp_path / 'x/tmp.pth.tar', age=0)
    save(tmp_path / 'y/last.pth.tar', age=0)
    assert checkpoint.find_resume(args, text) == str(tmp_path / 'x/recovery-1-9.pth.tar')
    (tmp_path / 'x/recovery-1-9.pth.tar').write_bytes(b'half')
    assert checkpoint.find_resume(args, text) == str(tmp_path / 'x/last.pth.tar')


def test_resume_auto_without_experiment_takes_the_newest_run_of_the_same_flags(tmp_path):
    argv = ['--output', str(tmp_path)]
    for name, more, age in (('a', [], 20), ('b', [], 10), ('c', ['--seed', '1'], 0)):
        save(tmp_path / name / 'last.pth.tar', age)
        (tmp_path / name / 'args.yaml').write_text(config.parse_args([*argv, *more])[2])
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd/args.yaml').write_text('')
    args, _, text = config.parse_args([*argv, '--resume', 'auto'])
    assert checkpoint.find_resume(args, text) == str(tmp_path / 'b/last.pth.tar')


def test_a_named_checkpoint_is_taken_as_it_is(tmp_path):
    save(tmp_path / 'any.pth.tar', 0)
    args, _, text = config.parse_args(['--resume', str(tmp_path / 'any.pth.tar')])
    assert checkpoint.find_resume(args, text) == args.resume
