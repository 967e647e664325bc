"""The runner of the CIFAR-100 experiments: its runs, where they stop and continue, and the tables it writes."""
import fcntl
import json
import math
import pickle
import shlex
import statistics
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.functional import kl_div, log_softmax, softmax

import dks_timm
from dks_timm.training import config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import paper  # noqa: E402
import paper_plan  # noqa: E402
import paper_tables  # noqa: E402

# Stands in for train.py: logs and writes as it does, an epoch in a moment.
TRAINER = '''
import os, sys, time
from pathlib import Path
value = {a: b for a, b in zip(sys.argv, sys.argv[1:]) if a.startswith('--')}
epochs = int(value.get('--epochs', 4))
folder = Path(value['--output'], value['--experiment'])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / 'starts', 'a') as f:
    f.write('x')
if value['--seed'] == '13':
    raise SystemExit('no luck')
summary = folder / 'summary.csv'
if not summary.exists():
    summary.write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,train_top1_backbone\\n')
for epoch in range(len(summary.read_text().splitlines()) - 1, epochs):
    print(f'Epoch {epoch} [1/5]: loss 1', flush=True)
    time.sleep(float(os.environ['SECONDS_AN_EPOCH']))
    print(f'Epoch {epoch} [5/5]: loss 1', flush=True)
    with open(summary, 'a') as f:
        f.write(f'{epoch},1.23456789,2,{50 + epoch},90,0.1,33\\n')
'''


def folder_of_images(root, classes, count):
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i:02}.png')
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with one small row, where the runner finds train.py, recipe and data."""
    (tmp_path / 'recipes').mkdir()
    (tmp_path / 'recipes' / 'small.yaml').write_text('model: test_resnet\nnum_classes: 3\nimg_size: 32\nepochs: 4\n')
    (tmp_path / 'train.py').write_text(TRAINER)
    (tmp_path / 'images' / 'train').mkdir(parents=True)
    monkeypatch.setattr(paper, 'ROOT', tmp_path)
    for module in (paper, paper_plan, paper_tables):
        monkeypatch.setattr(module, 'RECIPES', tmp_path / 'recipes')
        monkeypatch.setattr(module, 'ROWS', dict(small=dict(title='Small', paper=dict(baseline=40.0))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0')
    return tmp_path


def execute(*argv):
    return paper.main(['--data-dir', 'images', '--output', 'output', '--results', 'results', *map(str, argv)])


def lines(name, section='small'):
    return [json.loads(line) for line in Path('results', section, f'{name}.jsonl').read_text().splitlines()]


def test_every_row_has_a_recipe_and_every_listed_command_parses(capsys):
    assert {p.stem for p in (ROOT / 'recipes' / 'cifar100').glob('*.yaml')} == set(paper.ROWS)
    assert paper.main(['--list']) == 0
    listed = capsys.readouterr().out.splitlines()
    seen = []
    for line in listed:
        section, method, _, seed, *_ = line.split()
        argv = shlex.split(line[line.index(' python train.py ') + len(' python train.py '):])
        argv = [str(ROOT / a) if a.startswith('recipes/') else a for a in argv]
        args, _, _ = config.parse_args(argv)
        row = Path(argv[argv.index('--config') + 1]).stem
        assert section == (row if args.epochs == paper_plan.recipe(row)['epochs'] else f'{row}_{args.epochs}_epochs')
        assert (args.seed, args.experiment, args.resume) == (int(seed), f'{section}-{method}-{seed}', 'auto')
        assert args.dks == (method != 'baseline')
        assert args.dks_start_epoch == (args.epochs // 3 if method.endswith('_late') else 0)
        assert args.dks_off_epoch == (args.epochs // 2 if method in ('ds_half', 'dks_half') else 0)
        seen.append((row, args.epochs, method, int(seed)))
    assert len(set(seen)) == len(seen)
    assert {row for row, *_ in seen} == set(paper.ROWS)
    assert {method for _, _, method, _ in seen} == set(paper.METHODS)
    assert seen[:3] == [('resnet20', 24, method, 0) for method in ('baseline', 'ds', 'dks')]
    assert {epochs for row, epochs, *_ in seen if row == 'resnet20'} == {12, 24, 60, 120}


def epochs_at_each_rate(args):
    optimizer = torch.optim.SGD([torch.zeros(1)], args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    seen = Counter()
    for epoch in range(epochs):
        seen[round(optimizer.param_groups[0]['lr'], 6)] += 1
        scheduler.step(epoch + 1)
    return seen


def test_another_length_scales_the_schedule():
    run = paper_plan.Run('', 'resnet32', 'baseline', 0, 41)
    args, _, _ = config.parse_args(
        ['--config', str(paper.RECIPES / 'resnet32.yaml'), '--data-dir', 'DIR', *run.flags])
    assert epochs_at_each_rate(args) == {0.1: 19, 0.01: 10, 0.001: 12}


@pytest.mark.parametrize('row, batch, decay, rates', [
    # Epochs at each learning rate.
    ('resnet32', 128, 1e-4, {0.1: 80, 0.01: 41, 0.001: 43}),
    ('wrn_28_10', 128, 5e-4, {0.1: 59, 0.02: 60, 0.004: 40, 0.0008: 41}),
    ('densenet_40_12', 64, 1e-4, {0.1: 149, 0.01: 75, 0.001: 76}),
])
def test_the_papers_rows_train_with_its_settings(row, batch, decay, rates):
    args, _, _ = config.parse_args(['--config', str(paper.RECIPES / f'{row}.yaml'), '--data-dir', 'DIR'])
    assert epochs_at_each_rate(args) == rates
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    (group,) = optimizer.param_groups  # BatchNorm and biases decay too
    assert (group['weight_decay'], group['momentum'], group['nesterov']) == (decay, 0.9, False)
    assert (args.batch_size, args.smoothing, args.train_pad, args.hflip) == (batch, 0, 4, 0.5)
    assert [round(255 * v, 1) for v in args.mean + args.std] == [125.3, 123.0, 113.9, 63.0, 62.1, 66.7]


@pytest.mark.parametrize('method, temperature, times', [
    ('byot', 1, 1), ('to_backbone', 1, 1), ('to_backbone_t3', 3, 1), ('to_backbone_t4_x2', 4, 2),
    ('strong_to_backbone_t3', 3, 1)])
def test_a_method_teaches_those_that_its_title_names_and_nobody_else(method, temperature, times):
    args, _, _ = config.parse_args(['--data-dir', 'DIR', *paper.METHODS[method][1]])
    weight = args.dks_synergy_weight
    weight = torch.tensor(weight).reshape(3, 3) if len(weight) > 1 else weight[0]
    backbone, *branches = logits = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = torch.autograd.grad(dks_timm.synergy_loss(logits, weight, args.dks_direction, args.dks_temperature), logits)

    taught, teachers = ([backbone], branches) if method != 'byot' else (branches, [backbone])
    teachers = teachers[-1:] if method.startswith('strong') else teachers  # the branch that is twice as wide
    targets = [softmax(z.detach() / temperature, -1) for z in teachers]
    loss = times * temperature ** 2 * sum(
        kl_div(log_softmax(z / temperature, -1), target, reduction='batchmean') for z in taught for target in targets)
    expected = torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)


class Downloaded:
    """Stands in for torchvision's CIFAR100: the authors' files, of six images."""
    base_folder, classes = 'cifar-100-python', ['apple', 'fig']
    data = np.random.default_rng(0).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8)

    def __init__(self, root, download):
        assert download
        folder = Path(root, self.base_folder)
        folder.mkdir(parents=True)
        for file in ('train', 'test'):
            folder.joinpath(file).write_bytes(pickle.dumps(dict(
                data=self.data, fine_labels=[0, 1, 0, 1, 0, 1], filenames=[f'{file}_{i}.png' for i in range(6)])))


def test_without_data_dir_the_images_are_downloaded_once_under_their_authors_names(workplace, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.CIFAR100', Downloaded)
    argv = ['--output', 'output', '--results', 'results', '--methods', 'baseline', '--seeds']
    assert paper.main([*argv, '0']) == 0
    images = Path('output/data/cifar100')
    for split, name in (('train', 'train'), ('validation', 'test')):
        for i, pixels in enumerate(Downloaded.data):
            image = np.asarray(Image.open(images / split / Downloaded.classes[i % 2] / f'{name}_{i}.png'))
            assert (image == pixels.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    monkeypatch.setattr('torchvision.datasets.CIFAR100', None)
    assert paper.main([*argv, '1']) == 0


def test_the_subset_is_the_first_classes_and_their_first_training_images_by_name(tmp_path):
    source = folder_of_images(tmp_path / 'all', ['pear', 'apple', 'fig'], 5)
    for _ in range(2):  # a second time changes nothing
        paper.make_subset(source, tmp_path / 'part', classes=2, images=3)
        for split, count in (('train', 3), ('validation', 5)):
            files = sorted((tmp_path / 'part' / split).rglob('*.png'))
            assert [f.relative_to(tmp_path / 'part' / split).as_posix() for f in files] == [
                f'{name}/{i:02}.png' for name in ('apple', 'fig') for i in range(count)]
            assert all(f.resolve() == source / f.relative_to(tmp_path / 'part') for f in files)


def test_runs_side_by_side_leave_one_line_an_epoch_and_are_not_run_again(workplace, capsys, monkeypatch):
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0.3')
    flags = ['--methods', 'baseline', 'dks', '--seeds', 0, 1, '--jobs', 4]
    assert execute(*flags) == 0
    for name in ('baseline-0', 'baseline-1', 'dks-0', 'dks-1'):
        assert [(line['epoch'], line['eval_top1']) for line in lines(name)] == [(e, 50. + e) for e in range(4)]
        assert Path('output', f'small-{name}', 'starts').read_text() == 'x'
    line = lines('dks-0')[2]
    assert line.pop('seconds') > 0.05 and line.pop('cpu_seconds') >= 0
    assert line.pop('device').startswith('cpu: ') and line.pop('commit') == ''  # no repository here
    assert line == dict(epoch=2, train_loss=1.2346, eval_loss=2., eval_top1=52., eval_top5=90., lr=0.1)

    assert execute(*flags) == 0
    assert '4 of 4 runs are finished.' in capsys.readouterr().out
    assert Path('output', 'small-dks-0', 'starts').read_text() == 'x'
    assert execute('--list', *flags) == 0
    assert capsys.readouterr().out.count('finished') == 4


def test_time_is_up_at_a_checkpoint_and_the_rest_is_run_later(workplace, monkeypatch):
    flags = ['--methods', 'baseline', '--epochs', 80]
    name, section = 'small_80_epochs-baseline', 'small_80_epochs'
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0.1')
    assert execute(*flags, '--seeds', 0, 1, '--minutes', 3 / 60) == 0
    before = lines('baseline-0', section)
    assert 1 <= len(before) < 80 and not Path('output', f'{name}-1').exists()
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0')
    assert execute(*flags, '--seeds', 0) == 0
    assert [line['epoch'] for line in lines('baseline-0', section)] == list(range(80))
    assert lines('baseline-0', section)[:len(before)] == before  # with what was measured then
    assert Path('output', f'{name}-0', 'starts').read_text() == 'xx'


def test_a_run_that_fails_is_named_and_the_others_go_on(workplace, capsys):
    assert execute('--methods', 'baseline', '--seeds', 13, 0) == 1
    err = capsys.readouterr().err
    assert 'no luck' in err and 'failed: small-baseline-13;' in err
    assert len(lines('baseline-0')) == 4


def test_a_second_runner_leaves_alone_what_the_first_is_at(workplace, capsys):
    log = Path('output', 'small-baseline-0', 'log.txt')
    log.parent.mkdir(parents=True)
    with log.open('a') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert execute('--methods', 'baseline', '--seeds', 0, 1) == 0
    assert 'small-baseline-0: under way already' in capsys.readouterr().out
    assert not Path('results/small/baseline-0.jsonl').exists() and len(lines('baseline-1')) == 4


def test_missing_data_is_refused(workplace, capsys):
    with pytest.raises(SystemExit) as e:
        paper.main(['--data-dir', 'nowhere'])
    assert e.value.code == 2 and '--data-dir nowhere: must be a folder' in capsys.readouterr().err


def write(method, seed, top1, cpu=1., epochs=4, section='small', **more):
    """Lines of a run whose accuracy rises by a point an epoch, up to top1."""
    file = Path('results', section, f'{method}-{seed}.jsonl')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(dict(
        epoch=e, eval_top1=top1 - epochs + 1 + e, eval_loss=1., seconds=100, cpu_seconds=cpu, device='cpu: A',
        commit='abc', **more)) + '\n' for e in range(epochs)))


def table_after(heading, text):
    """Cells of the first table below a heading."""
    lines = text.partition(heading)[2].partition('\n## ')[0].splitlines()
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('| ')]


def test_the_table_has_every_classifier_difference_with_its_error_and_cost(workplace):
    base, ours = [60., 61., 63.], [64., 66.]
    for seed, top1 in enumerate(base):
        write('baseline', seed, top1, cpu=2. * 3 ** seed, train_loss=0.5)  # each on a slower machine
    for seed, top1 in enumerate(ours):
        write('dks', seed, top1, cpu=(5., 18.)[seed], eval_top1_stage1=50. + seed, eval_top1_ensemble=70.,
              train_loss=9., train_ce_backbone=0.25)
    write('ds', 0, 98.)
    with open('results/small/ds-0.jsonl') as f:
        short = f.readlines()[:3]
    Path('results/small/ds-0.jsonl').write_text(''.join(short))
    assert execute('--summarise') == 0
    text = Path('results/README.md').read_text()
    error = math.sqrt(statistics.variance(base) / 3 + statistics.variance(ours) / 2)
    flops = f'{paper_tables.forward_flops("small", "--dks")[1]:.2f}x'
    assert table_after('## Small, 4 epochs, float32', text) == [
        ['method', 'runs', 'backbone', 'branch on stage 1', 'ensemble', "the paper's backbone", 'against baseline',
         'loss', 'loss in training', 'training time', 'training FLOPs'],
        ['baseline', '3', '61.33 ± 1.53', '', '', '60.00', '', '1.000', '0.500', '1.00x', '1.00x'],
        ['DKS', '2', '65.00 ± 1.41', '50.50 ± 0.71', '70.00 ± 0.00', '', f'+3.67 ± {error:.2f}', '1.000', '0.250',
         '2.75x', flops]]
    assert float(flops[:-1]) > 1
    assert 'Trained on cpu: A, at commit abc.' in text
    assert 'Not finished: DS, seed 0 (3 of 4 epochs, backbone 97.00).' in text
    assert '![accuracy by epoch](small.svg)' in text and 'arithmetic.svg' not in text
    picture = ''.join(ET.parse('results/small.svg').getroot().itertext())
    assert 'baseline: 61.33' in picture and 'DKS: 65.00' in picture and 'DS:' not in picture


def test_the_table_has_the_baseline_over_more_epochs_and_methods_whose_branches_end_early(workplace):
    for method, top1 in (('baseline', 60.), ('ds', 61.), ('ds_half', 62.)):
        write(method, 0, top1)
    write('baseline', 0, 70., epochs=10, section='small_10_epochs')
    assert execute('--summarise') == 0
    text = Path('results/README.md').read_text()
    header, *rows = table_after('## Small, 4 epochs, float32', text)
    cells = [[row[header.index(title)] for title in ('method', 'runs', 'backbone', 'against baseline', 'against DS')]
             for row in rows]
    assert cells[0] == ['baseline', '1', '60.00', '', '']
    assert cells[-1] == ['baseline, 10 epochs', '1', '70.00', '+10.00', '+9.00']
    flops = dict(zip([row[0] for row in cells], [float(row[-1][:-1]) for row in rows], strict=True))
    assert flops['baseline, 10 epochs'] == 2.5
    half = paper.METHODS['ds_half'][0]
    assert flops[half] == pytest.approx((1 + flops['DS']) / 2, abs=0.01) and flops[half] > 1
    assert '![accuracy against FLOPs](small_arithmetic.svg)' in text


def test_train_py_logs_and_writes_what_the_runner_reads(workplace, monkeypatch):
    """One short run of the real thing."""
    monkeypatch.setattr(paper, 'ROOT', ROOT)
    paper.RECIPES.joinpath('small.yaml').write_text(
        'model: test_resnet\nnum_classes: 2\nimg_size: 32\nepochs: 2\nbatch_size: 4\nworkers: 0\ntrain_pad: 4\n'
        'color_jitter: 0\ndata_on_device: true\nwarmup_epochs: 0\nlr: 0.01\ndevice: cpu\n')
    folder_of_images(workplace / 'images2', 'ab', 6)
    argv = ['--data-dir', 'images2', '--output', 'output', '--results', 'results']
    assert paper.main([*argv, '--methods', 'baseline', '--seeds', '0']) == 0
    read = lines('baseline-0')
    assert [line['epoch'] for line in read] == [0, 1]
    assert all(0 <= line['eval_top1'] <= 100 and line['seconds'] >= 0 and line['lr'] > 0 for line in read)
    assert (workplace / 'output' / 'small-baseline-0' / 'last.pth.tar').exists()


def test_published_tables_are_those_of_the_published_lines_and_the_readme_shows_them(tmp_path):
    published = ROOT / 'results/cifar100'
    for file in published.glob('*/*.jsonl'):
        target = tmp_path / file.relative_to(published)
        target.parent.mkdir(exist_ok=True)
        target.write_text(file.read_text())
    assert execute('--summarise', '--results', str(tmp_path)) == 0
    text = (tmp_path / 'README.md').read_text()
    assert text == (published / 'README.md').read_text()
    assert {f.name for f in tmp_path.glob('*.svg')} == {f.name for f in published.glob('*.svg')}
    header, *rows = table_after('## ResNet-20, 24 epochs, bfloat16', text)
    for page, heading in (('README.md', '## Measured'), ('docs/method.md', '## Who should teach whom')):
        titles, *shown = table_after(heading, (ROOT / page).read_text())[:len(rows) + 1]
        cells = [[row[header.index(title)] for title in titles] for row in rows]
        shown = [row for row in shown if len(row) == len(titles)]
        assert [row[0] for row in shown[:3]] == ['baseline', 'DS', 'DKS']
        assert all(row in cells for row in shown)
