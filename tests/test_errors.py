"""Whose error it is: bad input ends in one line, an error of the program in its traceback, and memory by its flags."""
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest
import timm
import torch
from test_train import main

from dks_timm import attach, build, cli, data, errors, hub, inspection, push, readers
from dks_timm.model import DKSModel
from dks_timm.task import DKSTask

ROOT = Path(__file__).parents[1]
RESNET = timm.models.resnet.ResNet


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Flags of a run on a few images."""
    monkeypatch.chdir(tmp_path)
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
    (attach, 'plan_tail', TypeError('a bug'), ['--dks']),
    (attach.Trace, '__init__', AttributeError('a bug'), ['--dks', '--img-size', '64']),
    (DKSTask, '__init__', TypeError('a bug'), ['--dks']),
    (build, 'DKSLoss', ValueError('a bug'), ['--dks']),
    (build, 'create_optimizer_v2', TypeError('a bug'), []),
    (build, 'create_optimizer_v2', ValueError('a bug'), ['--opt', 'adamw', '--opt-betas', '0.9', '0.99']),
    (readers, 'ImageDataset', AttributeError('a bug'), []),
    (readers, 'ImageDataset', TypeError('a bug'), []),
    (data, 'create_loader', AssertionError('a bug'), []),
    (data, 'create_transform', ValueError('a bug'), ['--aa', 'rand-m9']),
    (timm.task.ClassificationTask, '__init__', ValueError('a bug'), []),
    (timm.task.ClassificationTask, 'compile', RuntimeError('a bug'), ['--torchcompile', 'eager']),
    (timm.task.ClassificationTask, 'forward', ValueError('a bug'), []),
    (hub, 'check_publishing', ValueError('a bug'), []),
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
    (inspection, 'BranchBuilder', ['inspect', 'test_resnet']),
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
    breaking(monkeypatch, hub, 'describe_run', mistake := KeyError('a bug'))
    with pytest.raises(KeyError) as e:
        main(*command, '--export-dir', 'm')
    assert e.value is mistake
    assert 'dks-timm export' in capfd.readouterr().err


def test_an_export_that_was_not_kept_is_no_mistake(command, monkeypatch, capfd):
    breaking(monkeypatch, hub, 'export', errors.ExportError('The exported model was not kept'))
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
    (RESNET, 'forward', ['--dks', '--img-size', '64']),
    (timm.task.ClassificationTask, 'forward', []),  # the first batch
], ids=['model', 'branches', 'training'])
def test_out_of_memory_names_what_needs_less(command, monkeypatch, capfd, owner, name, flags, error):
    breaking(monkeypatch, owner, name, error)
    with pytest.raises(SystemExit) as e:
        main(*command, *flags)
    for flag in ('--batch-size', '--img-size', '--grad-checkpointing'):
        assert flag in e.value.code  # which Python prints, and ends with exit code 1
    assert 'Traceback' in capfd.readouterr().err


def test_memory_that_there_is_not(command):
    """The real thing: a classifier that is larger than the address space."""
    out = subprocess.run(
        [sys.executable, 'train.py', *command, '--num-classes', str(1 << 40)], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1, out.stderr
    assert 'Traceback' in out.stderr and 'out of memory; give a smaller --batch-size' in out.stderr.splitlines()[-1]


# What names bad input


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
