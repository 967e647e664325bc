"""train.py from end to end: what a run leaves behind, how it resumes, and what it refuses."""
import importlib.util
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.train import ROOT, image_folder, main, rows, two_processes
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from dks_timm import cli
from dks_timm.training import config, loop

TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
DIGITS = [
    '--dataset', 'digits', '--num-classes', '10', '--model', 'test_resnet', '--img-size', '32', '--device', 'cpu',
    '--workers', '0', '-b', '32', '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', '1', '--hflip', '0',
    '--scale', '0.8', '1', '--color-jitter', '0', '--epochs', '2',
]


@pytest.fixture(scope='module')
def dks_run(tmp_path_factory):
    """The folder of a run with --dks, --model-ema and --export-dir, and what it printed."""
    root = tmp_path_factory.mktemp('dks')
    out = subprocess.run(
        [sys.executable, ROOT / 'train.py', *DIGITS, '--dks', '--model-ema', '--model-ema-decay', '0.5',
         '--output', root, '--experiment', 'run', '--export-dir', root / 'model', '--log-interval', '20'],
        cwd=root, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    return root, out.stdout.splitlines(), out.stderr.splitlines()


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """Flags of a run of three updates on 16 noise images, without augmentation."""
    root = image_folder(tmp_path_factory.mktemp('noise'))
    return [
        '--data-dir', root, '--num-classes', '2', '--img-size', '32', '--device', 'cpu', '--workers', '0', '-b', '8',
        '--no-aug', '--lr', '0.05', '--warmup-epochs', '0', '--model', 'test_resnet', '--epochs', '3',
    ]


def test_a_dks_run_leaves_timms_files(dks_run):
    root, _, _ = dks_run
    assert sorted(p.name for p in (root / 'run').iterdir()) == [
        'args.yaml', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar', 'model_best.pth.tar',
        'summary.csv',
    ]
    assert sorted(p.name for p in root.iterdir()) == ['model', 'run']
    assert yaml.safe_load((root / 'run/args.yaml').read_text())['dks'] is True


def test_a_dks_run_learns_and_records_every_classifier(dks_run):
    root, stdout, stderr = dks_run
    table = rows(root / 'run')
    assert list(table[0]) == TIMM_COLUMNS + [
        'train_top1_backbone', 'train_top1_stage2', 'train_top1_stage3',
        'train_ce_backbone', 'train_ce_stage2', 'train_ce_stage3', 'train_synergy',
        'train_synergy_backbone_stage2', 'train_synergy_backbone_stage3', 'train_synergy_stage2_backbone',
        'train_synergy_stage2_stage3', 'train_synergy_stage3_backbone', 'train_synergy_stage3_stage2',
        'eval_top1_stage2', 'eval_top1_stage3', 'eval_top1_ensemble', 'eval_loss_stage2', 'eval_loss_stage3',
        'eval_agree_backbone_stage2', 'eval_agree_backbone_stage3', 'eval_agree_stage2_stage3',
    ]
    assert [row['epoch'] for row in table] == ['0', '1']
    for name in ('', '_stage2', '_stage3', '_ensemble'):
        assert float(table[-1][f'eval_top1{name}']) > 80
    epoch_lines = [line for line in stderr if line.startswith('Epoch 1: ')]
    assert len(epoch_lines) == 1 and all(w in epoch_lines[0] for w in ('backbone', 'stage2', 'stage3', 'ensemble'))
    assert sum('images/s' in line and 'left' in line for line in stderr) == 2 * 4  # updates 1, 21, 41, and 45, the last


def test_a_run_ends_with_its_best_and_its_last_epoch_and_what_to_do_next(dks_run):
    root, stdout, _ = dks_run
    best, last = max(rows(root / 'run'), key=lambda row: float(row['eval_top1'])), rows(root / 'run')[-1]
    table = {line.split()[0]: line.split()[1:] for line in stdout if line.strip()}
    assert stdout[0].split() == ['Best', 'epoch', best['epoch'], 'Last', 'epoch', last['epoch']]
    for head, name in (('backbone', ''), ('stage2', '_stage2'), ('stage3', '_stage3')):
        assert table[head] == [
            f'{float(row[f"eval_{column}{name}"]):.{digits}f}'
            for row in (best, last) for column, digits in (('top1', 2), ('loss', 4))]
    assert table['ensemble'] == [f'{float(row["eval_top1_ensemble"]):.2f}' for row in (best, last)]
    assert any(re.fullmatch(r'0:\d\d:\d\d in all, \d+ images/s in training, at most [\d,]+ MiB of memory', line)
               for line in stdout)
    commands = [line.split() for line in stdout[stdout.index('Next:') + 1:]]
    assert commands == [
        ['dks-timm', 'report', str(root / 'run')], ['dks-timm', 'push', str(root / 'model'), 'OWNER/NAME']]


def test_the_exported_model_is_the_best_average_and_loads_with_timm_alone(dks_run):
    root, stdout, _ = dks_run
    load, = [line.strip() for line in stdout if 'timm.create_model' in line]
    assert load == f"model = timm.create_model('local-dir:{root / 'model'}', pretrained=True)"
    model = eval(load.partition('=')[2]).eval()
    best = max(rows(root / 'run'), key=lambda row: float(row['eval_top1']))
    train_transform = dict(is_training=False, **timm.data.resolve_data_config(model=model))
    from dks_timm.training.data import create_datasets
    args, _, _ = config.parse_args(DIGITS)
    _, val = create_datasets(args)
    val.transform = timm.data.create_transform(**train_transform)
    with torch.inference_mode():
        predicted = model(torch.stack([x for x, _ in val])).argmax(1)
    top1 = 100 * (predicted == torch.tensor([y for _, y in val])).double().mean().item()
    assert top1 == pytest.approx(float(best['eval_top1']))
    assert timm.models.load_state_dict(root / 'run/model_best.pth.tar').keys() == model.state_dict().keys()


@pytest.mark.slow
def test_an_average_over_more_updates_than_the_run_has_is_warned_of_and_compared_at_the_export(tmp_path, capfd):
    main(*DIGITS, '--model-ema', '--output', tmp_path, '--experiment', 'run', '--export-dir', tmp_path / 'model')
    out, err = capfd.readouterr()
    assert 'WARNING: --model-ema-decay 0.9998: the average is over 5,000 updates, but the run has 90' in err
    average, plain = (
        {line.split()[0]: float(line.split()[-2]) for line in out.splitlines()[2:4]}[name]
        for name in ('model', 'without'))
    assert plain > 60 > 50 > average == round(float(rows(tmp_path / 'run')[-1]['eval_top1']), 2)
    best = max(float(row['eval_top1']) for row in rows(tmp_path / 'run'))
    said, = re.findall('WARNING: Exported are the average of the weights .*', err)
    assert f'with {best:.2f} % top-1; the other has {plain:.2f} %: dks-timm export' in said

    command = said.partition('dks-timm ')[2].replace('DIR', str(tmp_path / 'plain')).split()
    assert cli.main(command) == 0 and command[-1] == '--no-ema'
    trained = load_checkpoint_metadata(tmp_path / 'run/last.pth.tar')['state_dict']
    exported = timm.models.load_state_dict(tmp_path / 'plain/model.safetensors')
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


def test_a_checkpoint_of_a_dks_run_is_safe_to_load_and_holds_the_plain_backbone(dks_run):
    root, _, _ = dks_run
    checkpoint = load_checkpoint_metadata(root / 'run/last.pth.tar')  # weights_only
    plain = timm.create_model('test_resnet', num_classes=10, checkpoint_path=str(root / 'run/last.pth.tar'))
    assert checkpoint['state_dict'].keys() == plain.state_dict().keys()
    assert checkpoint['task_state']['branches'] and checkpoint['task_state_ema']['branches']
    assert checkpoint['args'].dks and checkpoint['epoch'] == 1


def test_without_dks_the_columns_are_timms(noise, tmp_path):
    main(*noise, '--epochs', '1', '--output', tmp_path, '--experiment', 'plain')
    assert list(rows(tmp_path / 'plain')[0]) == TIMM_COLUMNS
    main(*noise, '--epochs', '1', '--output', tmp_path, '--experiment', 'no_eval', '--val-split', '')
    assert list(rows(tmp_path / 'no_eval')[0]) == ['epoch', 'train_loss', 'lr']


def test_the_run_is_named_as_timm_names_it(noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(*noise, '--epochs', '1')
    name, = os.listdir('output/train')
    assert name.endswith('-test_resnet-32') and name[:8].isdigit()


@pytest.mark.parametrize('dks', [[], ['--dks']])
def test_resume_continues_the_run(noise, tmp_path, capfd, dks):
    argv = [*noise, *dks, '--model-ema', '--opt', 'adamw', '--output', tmp_path]
    main(*argv, '--experiment', 'whole')
    whole = rows(tmp_path / 'whole')
    for path in ('last.pth.tar', 'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar'):
        (tmp_path / 'whole' / path).unlink()
    main(*argv, '--experiment', 'whole', '--resume', 'auto')
    resumed = rows(tmp_path / 'whole')
    best = max(resumed, key=lambda row: float(row['eval_top1']))['epoch']  # it may have been before the stop
    assert re.search(f'^ +Best epoch {best} +Last epoch 2$', capfd.readouterr().out.rpartition('Next:')[0][-900:], re.M)
    assert [row['epoch'] for row in resumed] == ['0', '1', '2']
    assert resumed[0] == whole[0] and [row['lr'] for row in resumed] == [row['lr'] for row in whole]
    # Without augmentation, the order of the batches alone is drawn anew.
    assert float(resumed[2]['eval_loss']) == pytest.approx(float(whole[2]['eval_loss']), rel=0.05)
    checkpoint = load_checkpoint_metadata(tmp_path / 'whole/last.pth.tar')
    assert checkpoint['epoch'] == 2 and checkpoint['optimizer']['state'][0]['step'] == 6
    assert [name for name, _ in checkpoint['saver']['checkpoint_files']].count('checkpoint-0.pth.tar') == 1


def test_resume_auto_finds_the_run_with_the_same_flags_and_says_when_it_has_finished(noise, tmp_path, capfd):
    argv = [*noise, '--epochs', '1', '--output', tmp_path, '--resume', 'auto']
    main(*argv)
    main(*argv, '--seed', '1')
    assert len(os.listdir(tmp_path)) == 2
    main(*argv)
    assert len(os.listdir(tmp_path)) == 2
    assert 'Nothing left to train' in capfd.readouterr().out


def test_resume_passes_over_a_checkpoint_that_is_not_complete(noise, tmp_path, capfd):
    argv = [*noise, '--output', tmp_path, '--experiment', 'x', '--resume', 'auto']
    main(*argv, '--epochs', '2')
    last = tmp_path / 'x/last.pth.tar'
    last.write_bytes(last.read_bytes()[:1000])
    os.utime(last)
    main(*argv)
    assert 'last.pth.tar is not complete' in capfd.readouterr().err
    assert [row['epoch'] for row in rows(tmp_path / 'x')] == ['0', '1', '2']


def test_the_same_seed_gives_the_same_weights_and_batches_with_dks_and_without(noise, tmp_path, monkeypatch):
    seen = {}

    class Recorder(loop.Trainer):
        def running(self):
            module = self.task.get_trainable_module()
            seen['weights'] = {k: v.clone() for k, v in getattr(module, 'backbone', module).state_dict().items()}
            seen['batches'] = []
            return super().running()

        def to_device(self, x, y):
            seen['batches'].append((x, y))
            return super().to_device(x, y)

    monkeypatch.setattr(loop, 'Trainer', Recorder)
    argv = [a for a in noise if a != '--no-aug'] + ['--output', tmp_path, '--drop', '0.2', '--reprob', '0.5']
    main(*argv)
    plain = dict(seen)
    main(*argv, '--dks')
    assert plain['weights'].keys() == seen['weights'].keys()
    assert all(torch.equal(v, seen['weights'][k]) for k, v in plain['weights'].items())
    assert len(plain['batches']) == len(seen['batches']) == 3 * (2 + 2)
    for (x, y), (x_dks, y_dks) in zip(plain['batches'], seen['batches'], strict=True):
        assert torch.equal(x, x_dks) and torch.equal(y, y_dks)


def changed_copy(path, old, new):
    """Return a copy of train.py as a module, in which one part is another."""
    text = (ROOT / 'train.py').read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_copy_of_train_py_trains_with_a_step_of_its_own(noise, tmp_path):
    """Scaled gradients, between clipping and the step: the loop around it stays as it is."""
    step = '        optimizer.step()\n'
    own = '        for p in task.get_trainable_module().parameters():\n            p.grad.mul_(factor)\n'
    weights = []
    for factor in (1., 0.5):
        script = changed_copy(tmp_path / f'my_train_{factor:g}.py', step, own.replace('factor', str(factor)) + step)
        main(*noise, '--dks', '--output', tmp_path, '--experiment', f'{factor:g}', script=script)
        weights.append(load_checkpoint_metadata(tmp_path / f'{factor:g}/last.pth.tar')['state_dict'])
    main(*noise, '--dks', '--output', tmp_path, '--experiment', 'plain')
    plain = load_checkpoint_metadata(tmp_path / 'plain/last.pth.tar')['state_dict']
    assert all(torch.equal(value, weights[0][name]) for name, value in plain.items())
    assert any(not torch.equal(value, weights[1][name]) for name, value in plain.items())


@pytest.mark.parametrize('flags', [
    '--model naflexvit_base_patch16_gap --model-kwargs embed_dim=48 depth=1 num_heads=2 --naflex-loader --in-chans 1 '
    '--naflex-train-seq-lens 4 --naflex-max-seq-len 4',
    '--model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 depth=1 embed_dim=48 --head-init-scale 0.1',
])
def test_gray_patch_sequences_and_two_heads_train(noise, tmp_path, flags):
    main(*noise, '--epochs', '1', *flags.split(), '--output', tmp_path)


def test_a_step_without_scale_loss_ends_with_an_error_that_names_it(noise, tmp_path):
    script = changed_copy(tmp_path / 'my_train.py', 'loss = update.scale_loss(output)', "loss = output['loss']")
    with pytest.raises(RuntimeError, match='update.scale_loss'):
        main(*noise, '--output', tmp_path, script=script)


def test_accumulated_gradients_are_those_of_the_whole_batch(noise, tmp_path):
    argv = [
        *noise, '--model', 'test_convnext', '--dks', '--dks-branches', 'tail', '--epochs', '1', '--output', tmp_path]
    main(*argv, '-b', '16', '--experiment', 'whole')
    main(*argv, '-b', '4', '--grad-accum-steps', '4', '--experiment', 'parts')
    whole, parts = (load_checkpoint_metadata(tmp_path / name / 'last.pth.tar') for name in ('whole', 'parts'))
    for name in ('state_dict', 'task_state'):
        a, b = (x[name] if name == 'state_dict' else x[name]['branches'] for x in (whole, parts))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dks', [
    pytest.param([], marks=pytest.mark.slow), ['--dks', '--dks-branches', 'tail']])
def test_two_processes_give_the_loss_and_gradients_of_one_with_the_same_global_batch(noise, tmp_path, dks):
    # One batch is all the data, so the order does not matter; plain SGD keeps the gradient readable in the weights.
    argv = [
        *noise, '--model', 'test_convnext', '--opt', 'momentum', '--momentum', '0', *dks, '--output', tmp_path]
    main(*argv, '-b', '16', '--experiment', 'one')
    two_processes(*argv, '-b', '8', '--experiment', 'two')
    one, two = rows(tmp_path / 'one'), rows(tmp_path / 'two')
    assert list(one[0]) == list(two[0]) and len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5, abs=1e-6), name
    one, two = (load_checkpoint_metadata(tmp_path / name / 'last.pth.tar') for name in ('one', 'two'))
    states = [(one['state_dict'], two['state_dict'])]
    if dks:
        states.append((one['task_state']['branches'], two['task_state']['branches']))
    for a, b in states:
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_evaluation_in_two_processes_counts_every_image_once(tmp_path):
    root = image_folder(tmp_path / 'data', count=5)  # 10 images: 3 batches of 4, and 5 a process
    (root / 'validation/0/0.png').unlink()  # 9: no even share
    argv = [
        '--data-dir', root, '--num-classes', '2', '--img-size', '32', '--device', 'cpu', '--workers', '0', '-b', '4',
        '--model', 'test_convnext', '--epochs', '1', '--warmup-epochs', '0', '--lr', '1e-9', '--output', tmp_path,
    ]
    main(*argv, '--experiment', 'one')
    two_processes(*argv, '--experiment', 'two')
    one, two = rows(tmp_path / 'one')[0], rows(tmp_path / 'two')[0]
    for name in ('eval_loss', 'eval_top1'):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-5)


@pytest.mark.parametrize('flags', [
    '--aug-splits 3 --jsd-loss --aa augmix-m5-w4-d2 --split-bn --resplit --reprob 0.3',
    '--train-img-sizes 24 32 40 --train-batch-sizes 8 8 4 --variable-batch-loss-scale linear',
    '--mixup 0.2 --cutmix 1 --mixup-off-epoch 1 --epochs 2 --no-prefetcher',
    '--bce-loss --bce-target-thresh 0.2 --head-init-scale 0.1 --head-init-bias -1',
    '--opt lookahead_adamw --layer-decay 0.7 --clip-grad 0.1 --clip-mode agc --drop-path 0.1',
    '--channels-last --grad-checkpointing --model-dtype bfloat16',
    '--torchcompile eager --model-ema',
    '--model-ema --model-ema-force-cpu --val-interval 2 --epochs 3',
    '--recovery-interval 1 --save-images --log-interval 1 --eval-metric loss',
    '--val-split= --sched plateau',
    '--dks-branches conv --dks-stages 1 2 3 --dks-direction top-down --dks-temperature 2 --dks-ce-weight 1 .5 .5 .5',
    '--dks-synergy-weight 0 1 2 3 0 4 5 6 0 --dks-branch-kwargs layers=(1,1,2,1) --sync-bn',
    '--dks-budget 1.6 --in-chans 1 --tta 2',
    '--model test_vit --opt adamw --lr 1e-3 --smoothing 0',
])
def test_timms_switches_work_with_dks(noise, tmp_path, flags):
    main(*(a for a in noise if a != '--no-aug'), '--epochs', '1', '--dks', *flags.split(), '--output', tmp_path,
         '--experiment', 'x')
    assert all(np.isfinite([float(v) for v in row.values()]).all() for row in rows(tmp_path / 'x'))


@pytest.mark.parametrize('flags', [
    pytest.param('--kd-distill-type logit --model-ema --torchcompile eager', marks=pytest.mark.slow),
    '--kd-distill-type feature --distill-loss-weight 2',
    '--kd-distill-type token --model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 depth=4 embed_dim=48 '
    '--task-loss-weight 0.3',
])
def test_a_teacher_and_dks_train_one_backbone(noise, tmp_path, flags):
    teacher = timm.create_model('test_resnet', num_classes=2, channels=(8, 16, 24, 40))
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', safe_serialization=True)
    main(*noise, '--dks', '--kd-model-name', f'local-dir:{tmp_path / "teacher"}', *flags.split(),
         '--epochs', '1', '--output', tmp_path, '--experiment', 'x')
    main(*noise, '--dks', '--kd-model-name', f'local-dir:{tmp_path / "teacher"}', *flags.split(),
         '--epochs', '2', '--output', tmp_path, '--experiment', 'x', '--resume', 'auto')
    table = rows(tmp_path / 'x')
    assert len(table) == 2 and all(np.isfinite([float(v) for v in row.values()]).all() for row in table)
    checkpoint = load_checkpoint_metadata(tmp_path / 'x/last.pth.tar')
    assert ('projection' in checkpoint['task_state']) == ('feature' in flags)


def test_mixed_precision_on_the_cpu_is_bfloat16_and_said(noise, tmp_path, capfd):
    main(*noise, '--epochs', '1', '--dks', '--amp', '--output', tmp_path / 'runs', '--export-dir', tmp_path / 'model')
    out = capfd.readouterr()
    assert '--amp on the CPU: bfloat16' in out.err and 'mixed precision bf16' in out.err
    assert 'bit-identical' in out.out


REFUSED = [
    (['--model', 'resnet19'], ['--model resnet19', 'resnet18']),
    (['--model', 'hf-hub:'], ['--model hf-hub:']),
    (['--model', 'local-dir:nowhere'], ['--model local-dir:nowhere']),
    (['--model-kwargs', 'depht=3'], ['--model test_resnet', 'depht']),
    (['--opt', 'adamm'], ['--opt adamm', 'adam']),
    (['--opt-kwargs', 'betaas=1'], ['--opt sgd', 'betaas']),
    (['--device', 'cuda'], ['--device cuda', '--device cpu']),
    (['--device', 'gpu'], ['--device gpu']),
    (['--amp', '--amp-dtype', 'float16'], ['--amp-dtype float16', 'bfloat16']),
    (['--num-classes', '1'], ['--num-classes 1', '2 classes']),
    (['--data-dir', 'nowhere'], ['--data-dir nowhere', 'no such folder']),
    (['--val-split', 'test'], ['--val-split test', 'train', 'validation']),
    (['--model', 'vit_tiny_patch16_224'], ['--model vit_tiny_patch16_224', '(3, 32, 32)', '224']),
    (['--sched', 'plateau', '--sched-on-updates'], ['--sched plateau']),
    (['--in-chans', '1', '--no-prefetcher'], ['--no-prefetcher', '--mean']),
    (['--device-modules', 'no_such_module'], ['--device-modules no_such_module']),
    (['--log-with', 'tensorbored'], ['--log-with tensorbored', 'tensorboard']),
    (['--initial-checkpoint', '{tmp}/file'], ['--initial-checkpoint', 'file']),
    (['--initial-checkpoint', '{tmp}/other.pth'], ['--initial-checkpoint', 'other.pth', '--model test_resnet']),
    (['--grad-checkpointing', '--model', 'vgg11'], ['--grad-checkpointing', '--model vgg11']),
    (['--naflex-loader'], ['--naflex-loader', '--model test_resnet']),
    (['--torchcompile', 'nobackend'], ['--torchcompile nobackend']),
    (['--torchcompile', '--torchcompile-mode', 'fast'], ['--torchcompile-mode fast', 'max-autotune']),
    (['--kd-model-name', 'resnet19'], ['--kd-model-name resnet19']),
    (['--dks', '--kd-distill-type', 'token', '--kd-model-name', 'local-dir:nowhere'], ['--kd-model-name', 'nowhere']),
    (['--export-dir', '{tmp}/taken'], ['--export-dir', 'taken', 'config.json']),
    (['--output', '{tmp}/file'], ['--output', 'file']),
    (['--resume', '{tmp}/file'], ['--resume', 'file']),
    (['--dks', '--dks-stages', '7'], ['--dks-stages', '7', '48 channels']),
    (['--dks', '--dks-stages', '4'], ['--dks-stages', '4', 'last']),
    (['--dks', '--dks-branch-kwargs', '1.layers=(1,1,1,1)'], ['--dks-branch-kwargs', '1.layers', '2, 3']),
    (['--dks', '--dks-budget', '1.0'], ['--dks-budget', '1.0']),
    (['--dks', '--dks-ce-weight', '1', '0.5'], ['--dks-ce-weight 1.0 0.5', '3 classifiers']),
    (['--dks', '--dks-synergy-weight', '1', '2', '3', '4'], ['--dks-synergy-weight 1.0 2.0 3.0 4.0', '9']),
]


@pytest.mark.parametrize('argv, words', REFUSED, ids=[' '.join(argv) for argv, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(noise, tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/config.json').write_text('{}')
    (tmp_path / 'file').write_text('text')
    torch.save(timm.create_model('test_convnext', num_classes=2).state_dict(), tmp_path / 'other.pth')
    before = sorted(tmp_path.rglob('*'))
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(SystemExit) as e:
        main(*noise, *(a.format(tmp=tmp_path) for a in argv))
    assert e.value.code == 2
    out = capfd.readouterr()
    assert len(out.err.splitlines()) == 1 and not out.out
    assert all(word in out.err for word in words), out.err
    assert sorted(tmp_path.rglob('*')) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < 10


def test_a_refusal_in_a_fresh_process_is_one_line_and_exit_code_2(noise, tmp_path):
    out = subprocess.run(
        [sys.executable, ROOT / 'train.py', *map(str, noise), '--dks', '--dks-stages', '4'],
        cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2 and not out.stdout
    assert len(out.stderr.splitlines()) == 1 and '--dks-stages' in out.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('first, then, words', [
    ([], ['--dks'], ['--initial-checkpoint']),
    ([], ['--model', 'test_resnet', '--num-classes', '3'], ['test_resnet', '3 classes']),
    ([], ['--model', 'test_convnext'], ['test_resnet', 'test_convnext']),
    ([], ['--opt', 'adamw', '--opt-kwargs', 'filter_bias_and_bn=False'], ['--no-resume-opt']),
    (['--dks'], ['--dks', '--dks-stages', '1', '3'], ['stages']),
])
def test_a_checkpoint_that_does_not_fit_is_refused(noise, tmp_path, capfd, first, then, words):
    main(*noise, '--epochs', '1', '--output', tmp_path, '--experiment', 'x', *first)
    capfd.readouterr()
    path = tmp_path / 'x/last.pth.tar'
    with pytest.raises(SystemExit) as e:
        main(*noise, '--output', tmp_path, '--experiment', 'y', *then, '--resume', path)
    assert e.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in ['--resume', str(path), *words]), lines
    assert not (tmp_path / 'y').exists()


def test_dks_can_start_from_the_backbone_of_a_plain_run(noise, tmp_path):
    main(*noise, '--epochs', '1', '--output', tmp_path, '--experiment', 'plain')
    main(*noise, '--epochs', '1', '--output', tmp_path, '--experiment', 'dks', '--dks', '--lr', '1e-9',
         '--initial-checkpoint', tmp_path / 'plain/last.pth.tar')
    plain, dks = (load_checkpoint_metadata(tmp_path / name / 'last.pth.tar') for name in ('plain', 'dks'))
    torch.testing.assert_close(plain['state_dict']['fc.weight'], dks['state_dict']['fc.weight'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('recipe', sorted((ROOT / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    args, _, _ = config.parse_args(['--config', str(recipe)])
    assert timm.is_model(args.model)
