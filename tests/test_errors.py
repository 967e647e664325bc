"""Whose error it is: bad input ends in one line, an error of the program in its traceback, and memory by its flags."""
import errno
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
from dks_timm.method.model import DKSModel
from dks_timm.method.task import DKSTask
from dks_timm.publishing import export, publish, push
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
    (timm, 'create_model', RuntimeError('a bug'), []),
    (timm, 'create_model', TypeError('a bug'), ['--model-kwargs', 'layers=[1,1,1,1]']),
    (build, '_architecture', TypeError('a bug'), []),
    (RESNET, 'forward', RuntimeError('a bug'), []),
    (RESNET, 'forward', AttributeError('a bug'), ['--dks']),
    (RESNET, 'set_grad_checkpointing', AttributeError('a bug'), ['--grad-checkpointing']),
    (RESNET, 'get_classifier', AttributeError('a bug'), ['--head-init-scale', '0.5']),
    (DKSModel, 'from_timm', ValueError('a bug'), ['--dks']),
    (plan, 'plan_tail', TypeError('a bug'), ['--dks']),
    (plan, 'copy_without_weights', TypeError('a bug'), ['--dks']),
    (plan.Trace, '__init__', AttributeError('a bug'), ['--dks', '--img-size', '64']),
    (DKSTask, '__init__', TypeError('a bug'), ['--dks']),
    (build, 'DKSLoss', ValueError('a bug'), ['--dks']),
    (build, 'create_optimizer_v2', TypeError('a bug'), []),
    (build, 'create_optimizer_v2', ValueError('a bug'), ['--opt', 'adamw', '--opt-betas', '0.9', '0.99']),
    (readers, 'ReaderImageFolder', AttributeError('a bug'), []),
    (readers, 'ReaderImageFolder', TypeError('a bug'), []),
    (data, 'create_loader', AssertionError('a bug'), []),
    (data, 'create_transform', ValueError('a bug'), ['--aa', 'rand-m9']),
    (images.BadImages, 'warn', ValueError('a bug'), ['--data-dir', 'bad/data']),
    (timm.task.ClassificationTask, '__init__', ValueError('a bug'), []),
    (timm.task.LogitDistillationTask, '__init__', ValueError('a bug'), ['--kd-model-name', 'local-dir:teacher']),
    (CheckpointSaver, 'save_checkpoint', RuntimeError('a bug'), []),
    (timm.task.ClassificationTask, 'compile', RuntimeError('a bug'), ['--torchcompile', 'eager']),
    (timm.task.ClassificationTask, 'forward', ValueError('a bug'), []),
    (publish, 'check_publishing', ValueError('a bug'), []),
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
    (timm, 'create_model', ['inspect', 'test_resnet', '--model-kwargs', 'layers=[1,1,1,1]']),
    (cost, 'exit_flops', ['inspect', 'test_resnet']),
    (push, 'check_request', ['push', 'm', 'me/model']),
])
@pytest.mark.parametrize('kind', [AttributeError, OSError, RuntimeError, ValueError])
def test_a_mistake_of_a_command_leaves_as_it_is(tmp_path, monkeypatch, owner, name, argv, kind):
    monkeypatch.chdir(tmp_path)
    for file in ('m/config.json', 'm/model.safetensors', 'm/README.md'):
        bad_inputs.write(file, '{"architecture": "test_resnet", "num_classes": 2}')(tmp_path)
    mistake = kind('a bug')
    breaking(monkeypatch, owner, name, mistake)
    with pytest.raises(kind) as e:
        cli.main(argv)
    assert e.value is mistake


def test_a_mistake_in_publishing_tells_how_to_go_on_and_leaves_as_it_is(command, monkeypatch, capfd):
    breaking(monkeypatch, export, 'describe_run', mistake := KeyError('a bug'))
    with pytest.raises(KeyError) as e:
        main(*command, '--export-dir', 'm')
    assert e.value is mistake
    assert 'dks-timm export' in capfd.readouterr().err


def test_an_export_that_was_not_kept_is_no_mistake(command, monkeypatch, capfd):
    breaking(monkeypatch, export, 'export', errors.ExportError('The exported model was not kept'))
    with pytest.raises(SystemExit) as e:
        main(*command, '--export-dir', 'm')
    assert e.value.code == 3
    assert 'Traceback' not in capfd.readouterr().err


# Memory


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:120] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 'allocate 4096000000000 bytes. Error code 12 (Cannot allocate memory)'),
]


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(('owner', 'name', 'flags'), [
    (timm, 'create_model', ['--model-kwargs', 'layers=[1,1,1,1]']),
    (timm.task.ClassificationTask, 'forward', []),  # the first batch
], ids=['model', 'training'])
def test_out_of_memory_names_what_needs_less(command, monkeypatch, capfd, owner, name, flags, error):
    breaking(monkeypatch, owner, name, error)
    with pytest.raises(SystemExit) as e:
        main(*command, *flags)
    for flag in ('--batch-size', '--img-size', '--grad-checkpointing'):
        assert flag in e.value.code  # which Python prints, and ends with exit code 1
    assert 'Traceback' in capfd.readouterr().err


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_a_checkpoint_is_not_damaged_where_there_is_no_memory_for_it(command, tmp_path, monkeypatch, error):
    main(*command)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    breaking(monkeypatch, checkpoint, 'load_checkpoint_metadata', error)
    with pytest.raises(SystemExit, match='out of memory'):
        main(*command, '--resume', 'auto', '--epochs', '2')
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == left


def test_images_are_not_bad_where_there_is_no_memory_for_them(command, monkeypatch):
    breaking(monkeypatch, images.BadImages, 'convert', MemoryError())
    with pytest.raises(SystemExit, match='out of memory'):
        main(*command)


@pytest.mark.parametrize('error', [
    *OUT_OF_MEMORY, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), RuntimeError('CUDA error: out of memory'),
    RuntimeError('unable to mmap 96 bytes from file <x>: Cannot allocate memory (12)')], ids=str)
def test_the_ways_in_which_memory_runs_out(error):
    assert errors.out_of_memory(error)
    assert not errors.out_of_memory(RuntimeError('a bug'))


def test_memory_that_there_is_not(command):
    """The real thing: a classifier that is larger than the address space."""
    out = subprocess.run(
        [sys.executable, 'train.py', *command, '--num-classes', str(1 << 40)], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1, out.stderr
    assert 'Traceback' in out.stderr and 'out of memory; give a smaller --batch-size' in out.stderr.splitlines()[-1]


# What names bad input


@pytest.mark.parametrize(('flags', 'words'), [
    ('--train-img-sizes 32 48 --train-size-probs 0 0', '--train-size-probs [0.0, 0.0]: must add up to more than 0'),
    ('--train-img-sizes 32 --train-size-random-mix 5', '--train-size-random-mix 5.0: must be at most 1'),
    ('--aa rand-w9', '--aa rand-w9: AssertionError: Unknown RandAugment'),
    ('--opt bnbadam', '--opt bnbadam: '),
    ('--model-kwargs features_only=True', "'features_only': True}: has no classifier to train"),
    ('--model-kwargs channels=[1,2]', "'channels': [1, 2]}: input size (3, 32, 32): "),
    ('--dks --model test_vit --dks-branch-kwargs depth=0', '--dks-branch-kwargs has depth=0; test_vit cannot be made'),
    ('--model test_vit --dks --img-size 8', 'test_vit does not run on images of 8 x 8'),
    ('--kd-model-name local-dir:teacher --kd-distill-type token', '--model test_resnet has no distillation token'),
])
def test_bad_input_is_named(command, capfd, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # bnbadam wants a GPU, and a package
    with pytest.raises(SystemExit) as e:
        main(*command, *flags.split())
    line, = capfd.readouterr().err.splitlines()
    assert e.value.code == 2 and words in line, line


def test_a_part_of_a_checkpoint_that_is_not_loaded_may_be_anything(command, tmp_path):
    main(*command)
    checkpoint = torch.load(tmp_path / 'out/x/last.pth.tar', weights_only=False)
    torch.save({**checkpoint, 'model': 'test_resnet', 'state_dict_ema': None}, tmp_path / 'odd.pth')
    main(*command, '--epochs', '2', '--experiment', 'y', '--resume', tmp_path / 'odd.pth')
    assert cli.main(['export', str(tmp_path / 'odd.pth'), str(tmp_path / 'm')]) == 0


@pytest.mark.parametrize(('part', 'value'), [('epoch', 'x'), ('version', None), ('optimizer', [1])])
def test_a_part_of_another_type_is_named(command, tmp_path, capfd, part, value):
    main(*command)
    checkpoint = torch.load(tmp_path / 'out/x/last.pth.tar', weights_only=False)
    torch.save({**checkpoint, part: value}, tmp_path / 'odd.pth')
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        main(*command, '--epochs', '2', '--experiment', 'y', '--resume', tmp_path / 'odd.pth')
    assert e.value.code == 2
    assert f'--resume {tmp_path}/odd.pth: its {part} is a {type(value).__name__}' in capfd.readouterr().err


def test_an_argument_of_the_package_is_named_by_its_flag():
    with pytest.raises(errors.OptionError, match='^--dks-stages has 9, which'), errors.naming('--model x'):
        raise errors.InputError('stages has 9, which this model does not have')


def test_a_complaint_of_a_library_is_named_where_it_was_expected():
    with pytest.raises(errors.OptionError, match='^--opt x: a rate'), errors.naming('--opt x', ValueError):
        raise ValueError('a rate')
    with pytest.raises(ValueError, match='^a rate') as e, errors.naming('--opt x', TypeError):
        raise ValueError('a rate')
    assert not isinstance(e.value, errors.InputError)


@pytest.mark.parametrize(('without', 'kind'), [(lambda: None, errors.OptionError), (lambda: 1 / 0, TypeError)])
def test_what_fails_without_the_value_too_is_none_of_its_fault(without, kind):
    with pytest.raises(kind), errors.naming('--opt x', Exception, without=without):
        raise TypeError('no such argument')
