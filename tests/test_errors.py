"""Whose error it is: bad input ends in one line, an error of the program in its traceback, and memory by its flags."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import bad_inputs
from helpers.train import main
from timm.utils import CheckpointSaver

from dks_timm import cli, errors
from dks_timm.method import cost, plan
from dks_timm.publishing import push
from dks_timm.training import build, checkpoint, data, images, readers

ROOT = Path(__file__).parents[1]
RESNET = timm.models.resnet.ResNet


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Flags of a run on a few images, in a folder that also has a teacher, and data that is not whole."""
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=2), tmp_path / 'teacher')
    bad_inputs.make_data(tmp_path / 'bad')
    bad_inputs.write('bad/data/train/a/0.png', 'no image')(tmp_path)
    return bad_inputs.Case('').command(bad_inputs.make_data(tmp_path))


def breaking(monkeypatch, owner, name, error):
    """Put an error in the place of a function."""
    def broken(*args, **kwargs):
        raise error
    monkeypatch.setattr(owner, name, broken)


# A function of this package or of a library, and what it could raise by a mistake in it.
MISTAKES = [
    (timm, 'create_model', AttributeError("'NoneType' object has no attribute 'x'"), []),
    (timm, 'create_model', TypeError('a bug'), []),
    (build, 'resolve_model_input_args', TypeError('a bug'), []),
    (RESNET, 'forward', AttributeError('a bug'), ['--dks']),
    (RESNET, 'set_grad_checkpointing', AttributeError('a bug'), ['--grad-checkpointing']),
    (plan, 'plan_tail', TypeError('a bug'), ['--dks']),
    (build, 'DKSLoss', ValueError('a bug'), ['--dks']),
    (build, 'create_optimizer_v2', TypeError('a bug'), []),
    (readers, 'create_reader', AttributeError('a bug'), []),
    (data, 'create_loader', AssertionError('a bug'), []),
    (images.BadImages, 'add', ValueError('a bug'), ['--data-dir', 'bad/data']),
    (timm.task.LogitDistillationTask, '__init__', TypeError('a bug'), ['--kd-model-name', 'local-dir:teacher']),
    (CheckpointSaver, 'save_checkpoint', RuntimeError('a bug'), []),
    (timm.task.ClassificationTask, 'forward', ValueError('a bug'), []),
]


@pytest.mark.parametrize(('owner', 'name', 'mistake', 'flags'), [
    pytest.param(*case, id=f'{case[0].__name__}.{case[1]}-{type(case[2]).__name__}') for case in MISTAKES])
def test_a_mistake_in_the_program_leaves_as_it_is(command, monkeypatch, owner, name, mistake, flags):
    breaking(monkeypatch, owner, name, mistake)
    with pytest.raises(type(mistake)) as e:
        main(*command, *flags)
    assert e.value is mistake


def test_a_mistake_has_exit_code_1_and_a_traceback_that_ends_with_it(command):
    script = 'import timm, train; timm.create_model = lambda *_, **__: None.x; train.main()'
    out = subprocess.run([sys.executable, '-c', script, *command], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1
    assert 'Traceback' in out.stderr and out.stderr.strip().endswith("'NoneType' object has no attribute 'x'")


@pytest.mark.parametrize(('owner', 'name', 'argv'), [
    (cost, 'exit_flops', ['inspect', 'test_resnet']),
    (push, 'check_request', ['push', 'm', 'me/model']),
])
@pytest.mark.parametrize('kind', [AttributeError, RuntimeError, ValueError])
def test_a_mistake_of_a_command_leaves_as_it_is(tmp_path, monkeypatch, owner, name, argv, kind):
    monkeypatch.chdir(tmp_path)
    for file in ('m/config.json', 'm/model.safetensors', 'm/README.md'):
        bad_inputs.write(file, '{"architecture": "test_resnet", "num_classes": 2}')(tmp_path)
    breaking(monkeypatch, owner, name, mistake := kind('a bug'))
    with pytest.raises(kind) as e:
        cli.main(argv)
    assert e.value is mistake


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:120] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 'allocate 4096000000000 bytes. Error code 12 (Cannot allocate memory)'),
    OSError(12, os.strerror(12)),
]


@pytest.mark.parametrize(('owner', 'name', 'flags'), [
    (timm, 'create_model', ['--model-kwargs', 'layers=[1,1,1,1]']),
    (timm.task.ClassificationTask, 'forward', []),  # the first batch
], ids=['model', 'training'])
def test_out_of_memory_names_what_needs_less(command, monkeypatch, capfd, owner, name, flags):
    breaking(monkeypatch, owner, name, MemoryError())
    with pytest.raises(SystemExit) as e:
        main(*command, *flags)
    for flag in ('--batch-size', '--img-size', '--grad-checkpointing'):
        assert flag in e.value.code  # which Python prints, and ends with exit code 1
    assert 'Traceback' in capfd.readouterr().err


def test_a_checkpoint_is_not_damaged_where_there_is_no_memory_for_it(command, tmp_path, monkeypatch):
    main(*command)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    breaking(monkeypatch, checkpoint, 'load_checkpoint_metadata', MemoryError())
    with pytest.raises(SystemExit, match='out of memory'):
        main(*command, '--resume', 'auto', '--epochs', '2')
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == left


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=str)
def test_the_ways_in_which_memory_runs_out(error):
    assert errors.out_of_memory(error)
    with pytest.raises(type(error)), errors.naming('--model x', Exception):
        raise error
    assert not errors.out_of_memory(RuntimeError('a bug'))


@pytest.mark.parametrize(('flags', 'words'), [
    ('--train-img-sizes 32 --train-size-random-mix 5', '--train-size-random-mix 5.0: must be at most 1'),
    ('--aa rand-w9', '--aa rand-w9: AssertionError: Unknown RandAugment'),
    ('--opt bnbadam', '--opt bnbadam: '),
    ('--dks --model test_vit --dks-branch-kwargs depth=0', '--dks-branch-kwargs has depth=0; test_vit cannot be made'),
    ('--model test_vit --dks --img-size 8', 'test_vit does not run on images of 8 x 8'),
    ('--kd-model-name local-dir:teacher --kd-distill-type token', '--kd-distill-type token: Model ResNet does not '),
])
def test_bad_input_is_named(command, capfd, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bnbadam wants a GPU, and a package
    with pytest.raises(SystemExit) as e:
        main(*command, *flags.split())
    line, = capfd.readouterr().err.splitlines()
    assert e.value.code == 2 and words in line, line


def test_an_argument_of_the_package_is_named_by_its_flag():
    with pytest.raises(errors.OptionError, match='^--dks-stages has 9, which'), errors.naming('--model x'):
        raise errors.InputError('stages has 9, which this model does not have')
