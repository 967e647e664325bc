"""Several processes and nodes, by DDP and FSDP2: the same numbers as one process, or a refusal that says why."""
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from accelerate import tracking
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import LoggerType
from accelerate.utils import launch as launchers
from helpers.train import ROOT, image_folder, main, rows
from PIL import Image
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from dks_timm import errors
from dks_timm.training import build, config, distributed, fsdp2

CONFIGS = ROOT / 'recipes/accelerate'
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
HAS_TENSORBOARD = importlib.util.find_spec('tensorboard') is not None


def several_runs(root, runs):
    """Results of tests/helpers/several_runs.py in two processes: for each process, by the names of the runs."""
    out, file = root / 'results.pt', root / 'runs.json'
    file.write_text(json.dumps([{**run, 'argv': [str(a) for a in run['argv']]} for run in runs.values()]))
    done = subprocess.run(
        [*TORCHRUN, '--standalone', '--nproc_per_node', '2', ROOT / 'tests/helpers/several_runs.py', out, file],
        cwd=root, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [dict(zip(runs, torch.load(out.with_suffix(f'.{rank}.pt')), strict=True)) for rank in (0, 1)]


def flags_for(data_dir):
    return [
        '--data-dir', data_dir, '--num-classes', '2', '--img-size', '32', '--device', 'cpu', '--workers', '0',
        '--no-aug', '--warmup-epochs', '0', '--sched', 'none', '--lr', '0.05', '--opt', 'momentum', '--momentum', '0',
        '--epochs', '1', '--dks',
    ]


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """Flags of a run on 16 noise images."""
    return flags_for(image_folder(tmp_path_factory.mktemp('noise')))


@pytest.fixture(scope='module')
def same(tmp_path_factory):
    """Flags of a run on 12 times the same image: any batch has the gradient of any other."""
    root = tmp_path_factory.mktemp('same')
    (root / 'train/0').mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for i in range(12):
        image.save(root / f'train/0/{i}.png')
    return [*flags_for(root), '--val-split', '', '--model', 'test_convnext']


# Branches in every second of six updates, and what moves weights without a gradient.
EVERY = ['--epochs', '2', '--dks-every', '2', '--momentum', '0.9', '--weight-decay', '0.1']


@pytest.fixture(scope='module')
def two(noise, same, tmp_path_factory):
    """Results of several runs in two processes, and the folder with what they wrote."""
    root = tmp_path_factory.mktemp('two')
    convnext = [*noise, '--model', 'test_convnext', '--output', root]
    # Without broadcasts in between, each process has BatchNorm statistics of its own until they are distributed.
    resnet = [*noise, '--model', 'test_resnet', '-b', '4', '--no-ddp-bb', '--output', root]
    adamw = ['--opt', 'adamw', '--lr', '1e-3', '--clip-grad', '0.5', '--recovery-interval', '1']
    vit = [*noise, *adamw, '--model', 'test_vit', '-b', '4', '--output', root]
    sharded = dict(sharded=True)
    blocks = dict(FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_TRANSFORMER_CLS_TO_WRAP='Block')
    image_folder(root / 'data0')
    image_folder(root / 'images0')
    image_folder(root / 'images1', count=12)
    log = ['--log-with', 'tensorboard'] if HAS_TENSORBOARD else []
    runs = dict(
        accumulated=dict(argv=[*convnext, '-b', '2', '--grad-accum-steps', '4']),
        short=dict(argv=[*same, '--output', root, '-b', '2', '--grad-accum-steps', '2']),
        every=dict(argv=[*same, *EVERY, '--output', root, '-b', '1', '--grad-accum-steps', '2']),
        own_bn=dict(argv=[*resnet, '--dist-bn', '']),
        reduce_bn=dict(argv=[*resnet, *log]),
        broadcast_bn=dict(argv=[*resnet, '--dist-bn', 'broadcast']),
        sync_bn=dict(argv=[*resnet, '--sync-bn']),
        ddp=dict(argv=[*resnet, *adamw, '--epochs', '2']),
        sharded=dict(**sharded, argv=[*resnet, *adamw, '--export-dir', root / 'model']),
        sharded_resumed=dict(**sharded, argv=[
            *resnet, *adamw, '--epochs', '2', '--resume', root / 'ddp/checkpoint-0.pth.tar']),
        ddp_resumed=dict(argv=[*resnet, *adamw, '--epochs', '2', '--resume', root / 'sharded/last.pth.tar']),
        whole_vit=dict(argv=vit),
        sharded_vit=dict(**sharded, env=blocks, argv=[*vit, '--grad-checkpointing']),
        no_such_block=dict(**sharded, env={**blocks, 'FSDP_TRANSFORMER_CLS_TO_WRAP': 'Blocc'}, argv=vit),
        # A folder for each process stands for the files of a node that shares none.
        first_node=dict(argv=[*resnet, '--output', root / 'node0']),
        own_checkpoint=dict(argv=[
            *resnet, '--output', root / 'node{rank}', '--resume', 'auto', '--experiment', 'first_node']),
        own_data=dict(argv=[*resnet, '--data-dir', root / 'data{rank}']),
        own_images=dict(argv=[*resnet, '--data-dir', root / 'images{rank}']),
        taken=dict(argv=[*resnet, '--output', root / 'data0/train/0/0.png']),
    )
    for name, run in runs.items():
        run['argv'] = ['--experiment', name, *run['argv']]
    return several_runs(root, runs), root


def codes(two, name):
    return [results[name]['code'] for results in two[0]]


def assert_same_summary(a, b, rel=1e-5, epochs=None):
    assert len(rows(a)) == len(rows(b)[:epochs]) > 0
    for x, y in zip(rows(a), rows(b)[:epochs], strict=True):
        assert list(x) == list(y)
        for name in x:
            assert float(x[name]) == pytest.approx(float(y[name]), rel=rel, abs=1e-6), name


def assert_same_checkpoint(a, b, **tolerance):
    """The same entries, shapes and, within the tolerance, values, in model and optimizer."""
    a, b = load_checkpoint_metadata(a), load_checkpoint_metadata(b)
    assert a.keys() == b.keys()
    pairs = [
        (a['state_dict'], b['state_dict']),
        (a['task_state']['branches'], b['task_state']['branches']),
        (a['optimizer']['state'], b['optimizer']['state']),
    ]
    for x, y in pairs:
        assert x.keys() == y.keys()
        torch.testing.assert_close(dict(x), dict(y), **tolerance)
    assert [g['params'] for g in a['optimizer']['param_groups']] == [
        g['params'] for g in b['optimizer']['param_groups']]


def weights(path):
    checkpoint = load_checkpoint_metadata(path)
    return {**checkpoint['state_dict'], **checkpoint['task_state']['branches']}


# Processes


def test_accumulation_in_two_processes_gives_the_step_of_the_whole_batch_in_one(two, noise, tmp_path):
    main(*noise, '--model', 'test_convnext', '-b', '16', '--output', tmp_path, '--experiment', 'whole')
    assert codes(two, 'accumulated') == [0, 0]
    torch.testing.assert_close(
        weights(two[1] / 'accumulated/last.pth.tar'), weights(tmp_path / 'whole/last.pth.tar'), rtol=1e-4, atol=1e-6)


def test_a_last_group_that_is_shorter_is_divided_by_its_own_length(two, same, tmp_path):
    # Three batches a process, two to a group, are two updates; so are two batches of one process.
    main(*same, '-b', '6', '--output', tmp_path, '--experiment', 'whole')
    torch.testing.assert_close(
        weights(two[1] / 'short/last.pth.tar'), weights(tmp_path / 'whole/last.pth.tar'), rtol=1e-4, atol=1e-6)


def test_updates_without_branches_are_those_of_one_process(two, same, tmp_path):
    assert codes(two, 'every') == [0, 0]
    main(*same, *EVERY, '-b', '4', '--output', tmp_path, '--experiment', 'one')
    torch.testing.assert_close(
        weights(two[1] / 'every/last.pth.tar'), weights(tmp_path / 'one/last.pth.tar'), rtol=1e-4, atol=1e-6)


def test_batchnorm_of_branches_is_distributed_like_the_backbones(two):
    own, reduced, broadcast = (
        [results[f'{name}_bn']['tensors'] for results in two[0]] for name in ('own', 'reduce', 'broadcast'))
    names = [name for name in own[0] if 'running_' in name]
    assert any(name.startswith('branches.') for name in names) and any(name.startswith('backbone.') for name in names)
    for name in names:
        assert not torch.equal(own[0][name], own[1][name]), name
        for tensors in (reduced, broadcast):
            assert torch.equal(tensors[0][name], tensors[1][name]), name
        assert torch.equal(broadcast[0][name], own[0][name]), name
        torch.testing.assert_close(reduced[0][name], (own[0][name] + own[1][name]) / 2)


def test_sync_bn_is_refused_on_the_cpu_which_has_none(two):
    assert codes(two, 'sync_bn') == [2, 2]
    assert '--sync-bn' in two[0][0]['sync_bn']['err'] and '--dist-bn' in two[0][0]['sync_bn']['err']


def test_sync_bn_converts_the_branches_too():
    args, _, _ = config.parse_args(['--model', 'test_resnet', '--num-classes', '2', '--dks', '--sync-bn'])
    two = types.SimpleNamespace(num_processes=2, device='cpu')
    net = build.place_model(args, build.create_model(args), (3, 32, 32), two)
    for part in (net.backbone, *net.branches):
        kinds = [type(m).__name__ for m in part.modules()]
        assert any('SyncBatchNorm' in kind for kind in kinds) and 'BatchNorm2d' not in kinds


@pytest.mark.skipif(not HAS_TENSORBOARD, reason='needs the package tensorboard')
def test_tensorboard_gets_the_numbers_of_the_summary_from_the_main_process_alone(two):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    files = list(two[1].rglob('events.out.tfevents.*'))
    assert files and all(two[1] / 'reduce_bn' in file.parents for file in files)
    scalars = {}
    for folder in {file.parent for file in files}:
        events = EventAccumulator(str(folder)).Reload()
        scalars.update((tag, [e.value for e in events.Scalars(tag)]) for tag in events.Tags()['scalars'])
    summary, = rows(two[1] / 'reduce_bn')
    assert scalars.pop('train_images_per_second')[0] > 0
    assert {name: [pytest.approx(float(value))] for name, value in summary.items()} == scalars


# Trackers in one process


def test_wandb_that_is_not_installed_is_refused(noise, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, 'get_available_trackers', lambda: [])
    with pytest.raises(SystemExit) as e:
        main(*noise, '--model', 'test_resnet', '--log-wandb', '--output', tmp_path / 'out')
    err = capfd.readouterr().err
    assert e.value.code == 2 and len(err.splitlines()) == 1
    assert '--log-wandb' in err and 'pip install wandb' in err
    assert not (tmp_path / 'out').exists()


def test_wandb_gets_project_name_tags_settings_and_the_numbers_of_the_summary(noise, tmp_path, monkeypatch):
    calls = []

    class Run:
        name = 'x'
        config = types.SimpleNamespace(update=lambda config, **kwargs: calls.append(('config', config)))

        def log(self, values, step=None, **kwargs):
            calls.append(('log', values, step))

        def finish(self):
            calls.append(('finish',))

    def init(**kwargs):
        calls.append(('init', kwargs))
        return Run()

    fake = types.ModuleType('wandb')
    fake.init, fake.config = init, Run.config
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setattr(tracking, '_available_trackers', [LoggerType.WANDB])
    main(*noise, '--model', 'test_resnet', '-b', '8', '--log-wandb', '--wandb-project', 'p', '--wandb-tags', 'a', 'b',
         '--output', tmp_path, '--experiment', 'x')
    kinds = [kind for kind, *_ in calls]
    assert kinds == ['init', 'config', 'log', 'finish']
    assert calls[0][1].items() >= dict(project='p', name='x', tags=['a', 'b']).items()
    assert calls[1][1]['lr'] == 0.05 and calls[1][1]['dks'] is True
    summary, = rows(tmp_path / 'x')
    assert calls[2][2] == 0 and calls[2][1].pop('train_images_per_second') > 0
    assert {k: pytest.approx(float(v)) for k, v in summary.items()} == calls[2][1]


# Nodes


@pytest.mark.slow
def test_two_nodes_come_to_the_same_as_two_processes_of_one(two, noise, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        (tmp_path / f'node{rank}').mkdir()
        nodes.append(subprocess.Popen(
            [*TORCHRUN, '--nnodes', '2', '--nproc_per_node', '1', '--node_rank', str(rank),
             '--master_addr', '127.0.0.1', '--master_port', str(port), ROOT / 'train.py', *map(str, noise),
             '--model', 'test_resnet', '-b', '4', '--no-ddp-bb', '--output', 'out', '--experiment', 'run',
             '--export-dir', 'model'],
            cwd=tmp_path / f'node{rank}', env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_summary(tmp_path / 'node0/out/run', two[1] / 'reduce_bn')
    assert timm.create_model(f'local-dir:{tmp_path}/node0/model', pretrained=True).num_classes == 2
    assert not list((tmp_path / 'node1').iterdir())
    assert 'Epoch 0' in outputs[0][1] and 'Best epoch' in outputs[0][0]
    assert 'Epoch 0' not in outputs[1][1] and not outputs[1][0]


@pytest.mark.parametrize('name, words', [
    ('own_checkpoint', ['--resume', 'no checkpoint', 'node0', 'every node']),
    ('own_data', ['--data-dir', 'data1', 'no such folder']),
    ('own_images', ['--data-dir', '2 batches', '3 batches', 'every node']),
    ('taken', ['--output', '0.png']),
])
def test_what_one_process_alone_misses_ends_all_of_them(two, name, words):
    assert codes(two, 'first_node') == [0, 0]
    assert codes(two, name) == [2, 2]
    error = two[0][0][name]['err'].splitlines()
    assert len(error) == 1 and all(word in error[0] for word in words), error
    assert not (two[1] / name).exists() and not (two[1] / 'node1').exists()


# Launchers


def launcher_env(*argv):
    """Return the variables that `accelerate launch` adds to the environment of a script."""
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args([*argv, 'train.py']))
    if args.use_fsdp or args.multi_gpu:
        env = {**launchers.prepare_multi_gpu_env(args), 'LOCAL_RANK': '0'}
    else:
        env = launchers.prepare_simple_launcher_cmd_env(args)[1]
    return {k: v for k, v in env.items() if os.environ.get(k) != v and k != 'PYTHONPATH'}


@pytest.mark.parametrize('name, asks_for', [
    ('multi_gpu', False), ('two_nodes', False), ('fsdp2', True)])
def test_accelerate_reads_every_config_and_asks_for_fsdp2_where_it_says_so(name, asks_for, monkeypatch):
    path = CONFIGS / f'{name}.yaml'
    launched = load_config_from_file(str(path))
    assert launched.num_processes == 8 * launched.num_machines
    assert f'--config_file recipes/accelerate/{name}.yaml' in path.read_text()
    for key, value in launcher_env('--config_file', str(path), '--machine_rank', '1').items():
        monkeypatch.setenv(key, value)
    distributed._check_launcher()
    assert fsdp2.requested(config.parse_args([])[0]) == asks_for


def test_every_config_is_tested():
    assert {p.stem for p in CONFIGS.iterdir()} == {'multi_gpu', 'two_nodes', 'fsdp2'}


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason='needs a machine without an accelerator')
def test_fsdp2_that_accelerate_does_not_start_is_refused_before_any_work(noise, tmp_path):
    out = subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', CONFIGS / 'fsdp2.yaml',
         '--num_processes', '1', '--main_process_port', '0', ROOT / 'train.py', *map(str, noise), '--output', 'out'],
        cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    said = [line for line in out.stderr.splitlines() if line.startswith('train.py: error: ')]
    assert len(said) == 1 and all(word in said[0] for word in ('FSDP2', 'MULTI_CPU', 'cpu', 'GPUs'))
    assert 'exitcode  : 2' in out.stderr and not list(tmp_path.iterdir())


def test_processes_that_accelerate_launch_leaves_out_are_missed(noise, tmp_path, monkeypatch, capfd):
    for key, value in launcher_env('--cpu', '--num_processes', '2').items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as e:
        main(*noise, '--output', tmp_path / 'out')
    err = capfd.readouterr().err.splitlines()
    assert e.value.code == 2 and 'torchrun --nproc_per_node' in err[-1] and '--num_processes' in err[-1]
    monkeypatch.setenv('WORLD_SIZE', '2')  # it was started by MPI or torchrun after all
    distributed._check_launcher()


def test_one_process_of_accelerate_launch_misses_nobody(monkeypatch):
    for key, value in launcher_env('--cpu', '--num_processes', '1').items():
        monkeypatch.setenv(key, value)
    distributed._check_launcher()


@pytest.mark.parametrize('env, words', [
    (dict(ACCELERATE_USE_MEGATRON_LM='true'), ['MEGATRON_LM', 'FSDP2']),
    (dict(ACCELERATE_USE_FSDP='true'), ['fsdp_version 1', 'fsdp_version: 2']),
    (dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_OFFLOAD_PARAMS='true'), ['fsdp_offload_params']),
    (dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_ACTIVATION_CHECKPOINTING='true'),
     ['fsdp_activation_checkpointing', '--grad-checkpointing']),
    (dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='SIZE_BASED_WRAP'),
     ['size_based_wrap', 'NO_WRAP']),
    (dict(ACCELERATE_USE_PARALLELISM_CONFIG='true', PARALLELISM_CONFIG_TP_SIZE='2'), ['PARALLELISM_CONFIG']),
    (dict(ACCELERATE_USE_DEEPSPEED='true'), ['DEEPSPEED', 'FSDP2']),
])
def test_what_an_accelerate_config_must_not_ask_for_is_refused(monkeypatch, env, words):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(errors.OptionError) as e:
        distributed._check_launcher()
        fsdp2.requested(config.parse_args([])[0])
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('flags, words', [
    ('--model-ema', ['--model-ema']),
    ('--channels-last', ['--channels-last']),
    ('--torchcompile', ['--torchcompile']),
    ('--clip-grad 1 --clip-mode agc', ['--clip-mode agc', 'norm']),
    ('--opt adahessian', ['--opt adahessian', 'adamw']),
    ('--opt lookahead_adamw', ['--opt lookahead_adamw', 'adamw']),
    ('--opt adafactor', ['--opt adafactor', 'lamb']),
    ('--kd-model-name x --kd-distill-type feature', ['--kd-distill-type feature', 'logit']),
    ('--dataset wds/x', ['--dataset wds/x', '--val-split=']),
])
def test_flags_that_cannot_work_under_fsdp2_are_refused_by_name(monkeypatch, flags, words):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '2')
    args, _, _ = config.parse_args(flags.split())
    with pytest.raises(errors.OptionError) as e:
        fsdp2.requested(args)
    assert all(word in str(e.value) for word in [*words, 'FSDP2']), e.value


def test_compiling_through_accelerate_is_refused_under_fsdp2(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '2')
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'INDUCTOR')
    with pytest.raises(errors.OptionError, match='dynamo_backend INDUCTOR'):
        fsdp2.requested(config.parse_args([])[0])


# FSDP2, in two processes on the CPU


def test_fsdp2_gives_ddps_digits_and_files(two):
    assert codes(two, 'sharded') == codes(two, 'sharded_vit') == [0, 0]
    assert_same_summary(two[1] / 'sharded', two[1] / 'ddp', epochs=1)  # bit for bit on some CPUs only
    assert_same_checkpoint(
        two[1] / 'sharded/last.pth.tar', two[1] / 'ddp/checkpoint-0.pth.tar', rtol=1e-4, atol=1e-6)
    assert {p.name for p in (two[1] / 'sharded').iterdir()} == {
        'args.yaml', 'summary.csv', 'checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar',
        'recovery-0-0.pth.tar', 'recovery-0-1.pth.tar'}


def test_fsdp2_that_gathers_block_by_block_and_recomputes_gives_ddps_digits(two):
    assert_same_summary(two[1] / 'sharded_vit', two[1] / 'whole_vit')
    assert codes(two, 'no_such_block') == [2, 2] and 'Blocc' in two[0][0]['no_such_block']['err']


def test_checkpoints_of_fsdp2_and_ddp_continue_each_other(two):
    for name in ('sharded_resumed', 'ddp_resumed'):
        assert codes(two, name) == [0, 0]
        assert rows(two[1] / name)[-1]['epoch'] == '1'
        for key, value in rows(two[1] / 'ddp')[1].items():
            assert float(rows(two[1] / name)[-1][key]) == pytest.approx(float(value), rel=1e-4), (name, key)
        assert_same_checkpoint(two[1] / name / 'last.pth.tar', two[1] / 'ddp/last.pth.tar', rtol=1e-3, atol=1e-5)


def test_fsdp2_exports_a_model_for_timm_alone(two):
    model = timm.create_model(f'local-dir:{two[1]}/model', pretrained=True)
    best = load_checkpoint_metadata(two[1] / 'sharded/model_best.pth.tar')['state_dict']
    assert best.keys() == model.state_dict().keys()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_the_page_on_scaling_names_existing_files_and_flags():
    text = (ROOT / 'docs/scaling.md').read_text()
    for path in re.findall(r'(?:recipes|tests|benchmarks)/[\w/]+\.(?:yaml|py)', text):
        assert (ROOT / path).is_file(), path
    known = {o for action in config.create_parser()._actions for o in action.option_strings}
    launchers_own = {
        '--config_file', '--num_processes', '--cpu', '--nproc_per_node', '--nnodes', '--node_rank', '--master_addr',
        '--master_port'}
    assert set(re.findall(r'--[a-z][\w-]+', text)) <= known | launchers_own
