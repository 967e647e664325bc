"""The runner of the paper's experiments: its runs, where they stop and continue, and the tables it writes."""
import fcntl
import importlib.util
import json
import math
import re
import shlex
import statistics
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
from dks_timm import options

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('paper', ROOT / 'benchmarks' / 'paper.py')
paper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)

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
    monkeypatch.setattr(paper, 'RECIPES', tmp_path / 'recipes')
    monkeypatch.setattr(paper, 'ROWS', dict(small=dict(title='Small', paper=dict(baseline=40.0))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0')
    return tmp_path


def execute(*argv):
    return paper.main(['--data-dir', 'images', '--output', 'output', '--results', 'results', *map(str, argv)])


def lines(name):
    return [json.loads(line) for line in Path('results/small', f'{name}.jsonl').read_text().splitlines()]


def test_every_row_has_a_recipe_and_every_listed_command_parses(capsys):
    assert {p.stem for p in (ROOT / 'recipes' / 'cifar100').glob('*.yaml')} == set(paper.ROWS)
    assert paper.main(['--list']) == 0
    listed = capsys.readouterr().out.splitlines()
    seen = set()
    for line in listed:
        row, method, _, seed, *_ = line.split()
        argv = shlex.split(line[line.index(' python train.py ') + len(' python train.py '):])
        argv = [str(ROOT / a) if a.startswith('recipes/') else a for a in argv]
        args, _, _ = options.parse_args(argv)
        assert (args.seed, args.experiment, args.resume) == (int(seed), f'{row}-{method}-{seed}', 'auto')
        assert args.dks == (method != 'baseline')
        seen.add((row, method, int(seed)))
    assert len(seen) == len(listed)
    assert {row for row, _, _ in seen} == set(paper.ROWS)
    assert {method for _, method, _ in seen} == set(paper.METHODS)
    first = [tuple(line.replace('seed ', '').split()[1:3]) for line in listed[:4]]
    assert first == [('baseline', '0'), ('ds', '0'), ('dks', '0'), ('baseline', '1')]


@pytest.mark.parametrize('row, batch, decay, rates', [
    # Epochs at each learning rate.
    ('resnet32', 128, 1e-4, {0.1: 80, 0.01: 41, 0.001: 43}),
    ('resnet110', 128, 1e-4, {0.1: 80, 0.01: 41, 0.001: 43}),
    ('wrn_28_10', 128, 5e-4, {0.1: 59, 0.02: 60, 0.004: 40, 0.0008: 41}),
    ('wrn_28_10_dropout', 128, 5e-4, {0.1: 59, 0.02: 60, 0.004: 40, 0.0008: 41}),
    ('densenet_40_12', 64, 1e-4, {0.1: 149, 0.01: 75, 0.001: 76}),
])
def test_the_papers_rows_train_with_its_settings(row, batch, decay, rates):
    args, _, _ = options.parse_args(['--config', str(paper.RECIPES / f'{row}.yaml'), '--data-dir', 'DIR'])
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    (group,) = optimizer.param_groups  # BatchNorm and biases decay too
    assert (group['weight_decay'], group['momentum'], group['nesterov']) == (decay, 0.9, False)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    seen = Counter()
    for epoch in range(epochs):
        seen[round(group['lr'], 6)] += 1
        scheduler.step(epoch + 1)
    assert seen == rates
    assert (args.batch_size, args.smoothing, args.train_pad, args.hflip) == (batch, 0, 4, 0.5)
    assert [round(255 * v, 1) for v in args.mean + args.std] == [125.3, 123.0, 113.9, 63.0, 62.1, 66.7]


def loss_of(method):
    """The synergy of a method's flags, for three classifiers."""
    args, _, _ = options.parse_args(['--data-dir', 'DIR', *paper.METHODS[method][1]])
    weight = torch.tensor(args.dks_synergy_weight).reshape(-1, 3) if len(args.dks_synergy_weight) > 1 else 1.
    return lambda logits: dks_timm.synergy_loss(logits, weight, args.dks_direction)


def gradients(loss, logits):
    return torch.autograd.grad(loss(logits), logits)


def test_byot_lets_the_backbone_teach_the_branches_and_nobody_else():
    logits = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    backbone, *branches = gradients(loss_of('byot'), logits)
    assert backbone.abs().max() == 0
    for z, grad in zip(logits[1:], branches, strict=True):
        expected = kl_div(log_softmax(z, -1), softmax(logits[0].detach(), -1), reduction='batchmean')
        torch.testing.assert_close(grad, torch.autograd.grad(expected, z)[0])


def test_the_ensemble_teaches_the_backbone_its_mean_and_nobody_else():
    logits = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    backbone, *branches = gradients(loss_of('ensemble'), logits)
    assert all(grad.abs().max() == 0 for grad in branches)
    mean = sum(softmax(z.detach(), -1) for z in logits[1:]) / 2
    expected = kl_div(log_softmax(logits[0], -1), mean, reduction='batchmean')
    torch.testing.assert_close(backbone, torch.autograd.grad(expected, logits[0])[0])


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
    assert 0.05 < line.pop('seconds') < 30 and 0 <= line.pop('cpu_seconds') < 1 and line.pop('device')
    assert line == dict(epoch=2, train_loss=1.2346, eval_loss=2., eval_top1=52., eval_top5=90., lr=0.1)

    assert execute(*flags) == 0
    assert '4 of 4 runs are finished.' in capsys.readouterr().out
    assert Path('output', 'small-dks-0', 'starts').read_text() == 'x'
    assert execute('--list', *flags) == 0
    assert capsys.readouterr().out.count('finished') == 4


def test_time_is_up_at_a_checkpoint_and_the_rest_is_run_later(workplace, monkeypatch):
    flags = ['--methods', 'baseline', '--epochs', 80]
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0.1')
    assert execute(*flags, '--seeds', 0, 1, '--minutes', 3 / 60) == 0
    before = lines('baseline-0')
    assert 1 <= len(before) < 80 and not Path('output/small-baseline-1').exists()
    monkeypatch.setenv('SECONDS_AN_EPOCH', '0')
    assert execute(*flags, '--seeds', 0) == 0
    assert [line['epoch'] for line in lines('baseline-0')] == list(range(80))
    assert lines('baseline-0')[:len(before)] == before  # with what was measured then
    assert Path('output', 'small-baseline-0', 'starts').read_text() == 'xx'


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


def write(method, seed, top1, seconds, cpu, count=4):
    file = Path('results/small', f'{method}-{seed}.jsonl')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(dict(
        epoch=e, eval_top1=top1 - count + 1 + e, seconds=seconds, cpu_seconds=cpu, device='cpu, threads 1')) + '\n'
        for e in range(count)))


def test_the_table_has_mean_spread_difference_with_its_error_and_cost(workplace):
    base, ours = [60., 61., 63.], [64., 66.]
    for seed, top1 in enumerate(base):
        write('baseline', seed, top1, seconds=100, cpu=2. * 3 ** seed)  # each on a slower machine
    for seed, top1 in enumerate(ours):
        write('dks', seed, top1, seconds=1, cpu=(5., 18.)[seed])
    write('ds', 0, 99., 1, 1., count=3)  # one epoch short
    assert execute('--summarise') == 0
    text = Path('results/README.md').read_text()
    cells = {line.split('|')[1].strip(): [c.strip() for c in line.split('|')[2:-1]]
             for line in text.splitlines() if line.startswith('| ')}
    error = math.sqrt(statistics.variance(base) / 3 + statistics.variance(ours) / 2)
    flops = re.search(r'[\d.]+x', cells['DKS'][-1]).group()
    assert cells['baseline'] == ['3', '61.33 ± 1.53', '38.67', '40.0', '', '1.00x', '1.00x']
    assert cells['DKS'] == ['2', '65.00 ± 1.41', '35.00', '', f'+3.67 ± {error:.2f}', '2.75x', flops]
    assert float(flops[:-1]) > 1
    assert 'DS' not in cells and 'ds 0 (3 of 4 epochs)' in text

    assert '![accuracy by epoch](small.svg)' in text
    svg = ET.parse('results/small.svg').getroot()
    paths = [p.get('d') for p in svg.iterfind('.//{http://www.w3.org/2000/svg}path[@class="line"]')]
    ys = [[float(y) for y in re.findall(r' ([\d.]+)', path)] for path in paths]
    assert [len(line) for line in ys] == [4, 4]
    assert all(a > b for line in ys for a, b in zip(line, line[1:], strict=False))  # up with accuracy
    assert ys[1][-1] < ys[0][-1]
    assert 'DKS 65.00' in ''.join(svg.itertext())


def table_after(heading, text):
    lines = text.partition(heading)[2].splitlines()
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line.startswith('| ')]


def test_cheaper_settings_have_a_table_of_cost_gain_and_share_of_the_full_gain(workplace):
    for method, top1 in dict(
            baseline=[60., 62.], dks=[64., 66.], dks_fraction=[63., 65.], dks_every=[62.]).items():
        for seed, value in enumerate(top1):
            write(method, seed, value, seconds=1, cpu=3. if method == 'dks' else 2.)
    write('dks_budget_1.3', 0, 99., 1, 1., count=3)
    assert execute('--summarise') == 0
    text = Path('results/README.md').read_text()
    header, *table = table_after('### Cheaper DKS', text)
    assert header[3] == 'training FLOPs' and header[-1] == 'share of the full gain'
    cells = {row[1].strip('`'): row for row in table}
    assert list(cells) == ['--dks', '--dks --dks-batch-fraction 0.15625', '--dks --dks-every 6']
    full = float(cells['--dks'][3][:-1])
    costs = [float(row[3][:-1]) for row in table]
    assert costs[1:] == pytest.approx([1 + (full - 1) * 0.15625, 1 + (full - 1) / 6], abs=0.01) and full > 1
    # A mean of two has the variance 1, as every part of the share has: 1 + 0.75 ** 2 + 0.25 ** 2 over the gain of 4.
    error = 100 * math.sqrt(1 + 0.75 ** 2 + 0.25 ** 2) / 4
    assert [row[-2:] for row in table] == [
        ['+4.00 ± 1.41', '100 %'], ['+3.00 ± 1.41', f'75 ± {error:.0f} %'], ['+1.00', '25 %']]
    assert 'dks_budget_1.3 0 (3 of 4 epochs)' in text.partition('### Cheaper DKS')[2]
    assert {row[0] for row in table_after('## Small', text.partition('###')[0])} == {'method', 'baseline', 'DKS'}
    picture = Path('results/small.svg').read_text()
    assert picture.count('class="line"') == 2


def test_cheaper_settings_that_less_arithmetic_shall_buy_cost_at_most_1_3_of_the_mini_protocols_baseline():
    recipe = str(paper.RECIPES / 'mini.yaml')
    costs = {method: paper.training_flops(recipe, *paper.METHODS[method][1]) for method in ('dks', *paper.CHEAPER)}
    assert costs['dks'] == costs['dks_late'] == pytest.approx(2.75, abs=0.01)
    cheap = [method for method, cost in costs.items() if cost <= 1.3]
    assert cheap == ['dks_fraction', 'dks_fraction_weighted', 'dks_every', 'dks_budget_1.3', 'dks_conv',
                     'dks_budget_bottom_up', 'dks_budget_late']
    assert costs['dks_budget_1.5'] <= 1.5


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
    assert (tmp_path / 'mini.svg').read_text() == (published / 'mini.svg').read_text()
    readme = (ROOT / 'README.md').read_text().partition('## On your own data')[0]
    columns = [0, 1, 2, 5, 6, 7]
    ours = [[row[i] for i in columns] for row in table_after('## ResNet-20', text.partition('###')[0])]
    assert table_after('## Measured', readme) == ours and len(ours) == 6
