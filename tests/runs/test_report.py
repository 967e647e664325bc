"""`dks-timm report`: the page about runs and its pictures."""
import argparse
import csv
import html.parser
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
import yaml
from helpers.train import image_folder, main, rows

from dks_timm import cli
from dks_timm.runs.folder import group_runs, read_run
from dks_timm.runs.pictures import INKS
from dks_timm.training.metrics import THRESHOLDS

SVG = '{http://www.w3.org/2000/svg}'
HOSTILE = '<script>alert(1)<'
BARE = dict(heads=(), dks=True)  # no columns and no pictures of branches


def make_run(folder, top1=(40., 50., 60.), heads=('stage2', 'stage3'), checkpoint=True, **settings):
    """A folder as train.py leaves it; the last accuracy of the backbone is that of ``top1``."""
    settings = {'model': 'resnet18', 'dataset': 'digits', 'num_classes': 10, 'epochs': len(top1), 'seed': 0,
                'dks': bool(heads), **settings}
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))
    everyone = ['backbone', *heads]
    epochs = []
    for epoch, value in enumerate(top1):
        row = dict(epoch=epoch, train_loss=9 - epoch, eval_loss=3 - 0.1 * epoch, eval_top1=value, eval_top5=99., lr=0.1)
        if heads:
            row.update((f'train_{key}_{head}', 1. + epoch) for key in ('top1', 'ce') for head in everyone)
            row.update((f'train_synergy_{a}_{b}', 1 / (1 + epoch)) for a in everyone for b in everyone if a != b)
            row.update((f'eval_top1_{head}', value - i) for i, head in enumerate((*heads, 'ensemble')))
            row.update((f'eval_loss_{head}', 2. - 0.1 * epoch) for head in heads)
            row.update((f'eval_agree_{a}_{b}', 80. + epoch)
                       for i, a in enumerate(everyone) for b in everyone[i + 1:])
        epochs.append(row)
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=epochs[0])
        writer.writeheader()
        writer.writerows(epochs)
    if checkpoint:
        exits = [dict(exit=head, threshold=t, leave=100 * (1 - t), top1=top1[-1] - 2 * (1 - t) * (i + 1))
                 for i, head in enumerate(heads) for t in THRESHOLDS]
        branches = [dict(to_stage=400_000_000 + 300_000_000 * i, branch=200_000_000) for i in range(len(heads))]
        args = argparse.Namespace(
            **settings, command='train.py --seed 0', hardware='CPU (x86_64, 2 cores)', software='torch 2.6.0',
            commit='0123456789abcdef' * 2 + '01234567 with changes', train_seconds=75., exits=exits if heads else None,
            exit_flops=dict(backbone=1_000_000_000, branches=branches) if heads else None)
        torch.save(dict(epoch=len(top1) - 1, args=args), folder / 'model_best.pth.tar')
    return folder


def report(*arguments):
    return cli.main(['report', *map(str, arguments)])


class Page(html.parser.HTMLParser):
    """The text of a page, its elements, and what they refer to."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.references, self.text, self.open = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open
        self.text = ' '.join(' '.join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.references += [
            value for name, value in attrs if name in ('src', 'href', 'xlink:href') and not value.startswith('#')]
        if tag not in ('meta', 'link'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text.append(data)


def read(folder):
    """The page of a report and its pictures, after what has to hold for all of them."""
    page = Page(folder / 'index.html')
    pictures = {path.stem: ET.fromstring(path.read_text()) for path in folder.glob('*.svg')}
    assert set(page.references) == {'data:,', *(f'{name}.svg' for name in pictures)}
    for text in (page.source, *(path.read_text() for path in folder.glob('*.svg'))):
        assert not re.search(r'https?://(?!www\.w3\.org/)|@import|url\((?!#)|\bnan\b|\binf\b', text)
    for figure in re.findall(r'<figure>(.*?)</figure>', page.source, re.S):
        assert ET.fromstring(figure).tag == f'{SVG}svg'
    return page, pictures


@pytest.fixture(scope='module')
def real_run(tmp_path_factory):
    """A run of train.py with --dks: two epochs on noise."""
    root = tmp_path_factory.mktemp('real')
    main(
        '--data-dir', image_folder(root / 'noise', classes=3, count=4), '--num-classes', 3, '--model', 'test_resnet',
        '--img-size', 32, '--dks', '--device', 'cpu', '--workers', 0, '-b', 6, '--opt', 'adamw', '--warmup-epochs', 0,
        '--no-aug', '--epochs', 2, '--output', root, '--experiment', 'run')
    return root / 'run'


def texts(picture):
    return [''.join(text.itertext()) for text in picture.iter(f'{SVG}text')]


def test_a_real_run_becomes_a_page_with_all_it_recorded(real_run, capsys):
    assert report(real_run) == 0
    assert capsys.readouterr().out == f'{real_run}/report/index.html\n'
    page, pictures = read(real_run / 'report')
    assert set(pictures) == {
        'accuracy', 'accuracy-training', 'loss', 'loss-training', 'teaching-backbone', 'teaching-stage2',
        'teaching-stage3', 'agreement', 'exits'}
    assert page.elements.count('figure') == len(pictures)
    for words in ('Heads', 'Who teaches whom', 'How often heads agree', 'Early exits', 'machine CPU',
                  'versions dks_timm', 'opt adamw'):
        assert words in page.text
    epochs = rows(real_run)
    best = max(float(row['eval_top1']) for row in epochs)
    assert f'test_resnet on noise: {best:.2f}% top-1' in page.text
    last = {name: float(value) for name, value in epochs[-1].items() if value}
    for column in ('eval_top1_stage2', 'eval_top1_stage3', 'eval_top1_ensemble'):
        assert f'{last[column]:.2f}%' in page.text
    assert f'stage2, stage3 {last["eval_agree_stage2_stage3"]:.1f}' in texts(pictures['agreement'])
    for teacher, student in (('backbone', 'stage2'), ('stage3', 'backbone')):
        value = last[f'train_synergy_{teacher}_{student}']
        assert f'{teacher} {value:.3f}' in texts(pictures[f'teaching-{student}'])
        assert f'{teacher} {value:.3f}' in page.text
    assert 'class="notes"' not in page.source


def test_the_same_run_gives_the_same_bytes(real_run, tmp_path):
    assert report(real_run, '--output', tmp_path / 'a') == report(real_run, '--output', tmp_path / 'b') == 0
    for path in (tmp_path / 'a').iterdir():
        assert path.read_bytes() == (tmp_path / 'b' / path.name).read_bytes()


def test_the_page_is_dark_where_its_reader_wants_it_and_the_files_are_light(tmp_path):
    assert report(make_run(tmp_path / 'run')) == 0
    page, _ = read(tmp_path / 'run/report')
    colors = set(re.findall('#[0-9a-f]{6}', (tmp_path / 'run/report/agreement.svg').read_text()))
    assert colors == {INKS[name][0] for name in ('ink', 'muted', 'rule', 'paper', 'c0', 'c1', 'c2')}
    light, dark = re.findall(r':root {([^{}]*--paper[^{}]*)}', page.source)
    for name, (of_light, of_dark) in INKS.items():
        assert f'--{name}:{of_light};' in light and f'--{name}:{of_dark};' in dark
    figures = ''.join(re.findall(r'<figure>(.*?)</figure>', page.source, re.S))
    assert 'var(--c2)' in figures and not re.search('#[0-9a-f]{6}[^0-9a-f]', figures)


def test_only_a_picture_needs_matplotlib():
    script = 'import sys, train, dks_timm.runs.report, dks_timm.publishing.card; assert "matplotlib" not in sys.modules'
    subprocess.run([sys.executable, '-c', script], check=True)


def test_gain_over_the_baseline_is_that_of_the_last_epochs(tmp_path, capsys):
    runs = [make_run(tmp_path / f'dks{s}', (30., 99., top1), **BARE, seed=s) for s, top1 in enumerate((55., 57.))]
    runs += [make_run(tmp_path / f'base{s}', (20., 98., top1), heads=(), seed=s) for s, top1 in enumerate((50., 52.))]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, pictures = read(tmp_path / 'out')
    # Two runs of each, two points apart: the deviation is sqrt(2), the error of the difference sqrt(2/2 + 2/2).
    assert 'DKS backbone 56.00%, baseline 51.00%: +5.00 ± 1.41 points' in page.text
    assert re.search(r'baseline 0, 1 51\.00 ± 1\.41 98\.00 ± 0\.00 0:01:15 '
                     r'DKS 0, 1 56\.00 ± 1\.41 \+5\.00 ± 1\.41 99\.00 ± 0\.00 0:01:15', page.text)
    assert {'DKS 56.00', 'baseline 51.00'} <= set(texts(pictures['comparison']))
    assert page.source.count('fill-opacity: 0.16') == 4 and page.elements.count('details') == 4 + 1
    assert all(run.name in page.text for run in runs)


def test_without_a_baseline_no_gain_is_claimed(tmp_path):
    runs = [make_run(tmp_path / f'dks{seed}', (30., 55. + seed), **BARE, seed=seed) for seed in range(2)]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert '2 runs side by side' in page.text and 'DKS 0, 1 55.50 ± 0.71' in page.text and 'points' not in page.text
    # Nor against another model.
    other = make_run(tmp_path / 'other', (40., 50.), heads=(), model='resnet50')
    assert report(runs[0], other, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert '2 runs side by side' in page.text and 'these runs differ in model' in page.text
    assert 'baseline, model resnet50' in page.text


def test_groups_differ_in_more_than_the_seed_and_are_named_by_it(tmp_path):
    runs = [
        make_run(tmp_path / 'a', heads=(), lr=0.5),
        make_run(tmp_path / 'b', lr=0.5),
        make_run(tmp_path / 'c', lr=0.5, seed=7, experiment='x', output='elsewhere'),
        make_run(tmp_path / 'd', lr=0.5, dks_direction='none'),
        make_run(tmp_path / 'e', lr=0.5, dks_temperature=2.0),
    ]
    found = [(group.label, [run.args['seed'] for run in group.runs]) for group in group_runs(list(map(read_run, runs)))]
    assert found == [
        ('baseline', [0]), ('DS', [0]), ('DKS, dks_temperature 1.0', [0, 7]), ('DKS, dks_temperature 2.0', [0])]


def test_an_unfinished_run_is_in_no_mean(tmp_path):
    runs = [make_run(tmp_path / 'a', (50., 60.), **BARE), make_run(tmp_path / 'b', (10.,), **BARE, seed=1, epochs=2),
            make_run(tmp_path / 'c', (50., 55.), heads=())]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert 'DKS backbone 60.00%, baseline 55.00%: +5.00 points' in page.text
    assert 'means of 1 DKS and 1 baseline runs' in page.text
    assert 'b: 1 of 2 epochs are done.' in page.text and 'Not in the means, because unfinished: b.' in page.text


def test_early_exits_cost_what_their_images_pay_for(tmp_path):
    folder = make_run(tmp_path / 'run', (50., 60.))
    assert report(folder) == 0
    page, _ = read(folder / 'report')
    # Stage 2 costs 400 + 200 MFLOPs. At 0.9, 10% leave there, 90% pay for the other 600, too; accuracy is 0.2 lower.
    assert 'backbone 1,000.0 1.00 60.00% 1.00 stage2 600.0 0.60 10.0% 59.80% 1.14' in page.text
    assert 'stage3 900.0 0.90 10.0% 59.60% 1.17' in page.text
    # All leave there: 0.6 of the cost for 58%. Within a point: from 0.5 on, where half of them leave for 0.9.
    assert ('If images leave at stage2 from a confidence of 0.5 on, 50.0% do: 59.00% top-1 for 0.90 of the '
            "backbone's FLOPs, within a point of the backbone (60.00%)") in page.text


def break_checkpoint(folder):
    (folder / 'model_best.pth.tar').write_bytes((folder / 'model_best.pth.tar').read_bytes()[:300])


def edit(name, change):
    def breaking(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return breaking


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize('breaking, notes', [
    (remove('summary.csv'), ['There is no summary.csv yet']),
    (edit('summary.csv', lambda b: b.split(b'\n')[0] + b'\n'), ['summary.csv has no epoch yet']),
    (edit('summary.csv', lambda b: b[:-5]), ['cut off or broken, and left out: 1', '2 of 3 epochs are done']),
    (edit('summary.csv', lambda b: b + b'3,what\n\xff\0,,\n'), ['cut off or broken, and left out: 2']),
    (remove('args.yaml'), ['There is no args.yaml', 'The arguments are those that a checkpoint holds']),
    (edit('args.yaml', lambda b: b[:-3] + b': ['), ['args.yaml cannot be read']),
    (edit('args.yaml', lambda b: b''), ['args.yaml cannot be read']),
    (remove('model_best.pth.tar'), ['There is no checkpoint']),
    (break_checkpoint, ['model_best.pth.tar is no whole checkpoint', 'There is no checkpoint']),
    (lambda f: [remove('args.yaml')(f), remove('model_best.pth.tar')(f)], ['settings are unknown']),
])
def test_what_is_missing_or_broken_is_noted(breaking, notes, tmp_path):
    folder = make_run(tmp_path / 'run')
    breaking(folder)
    found = ' '.join(read_run(folder).notes)
    assert all(note in found for note in notes) and bool(found) == bool(notes)


@pytest.mark.parametrize('breaking', [
    remove('summary.csv'), remove('args.yaml'), remove('model_best.pth.tar'),
    edit('summary.csv', lambda b: b.replace(b'60.0', b'nan')),
])
def test_a_run_of_which_something_is_missing_has_a_page(breaking, tmp_path):
    folder = make_run(tmp_path / 'run', heads=('stage2',))
    breaking(folder)
    assert report(folder) == 0 and report(folder, make_run(tmp_path / 'b', heads=()), '--output', tmp_path / 'out') == 0
    for out in (folder / 'report', tmp_path / 'out'):
        page, _ = read(out)
        assert all(note in page.text for note in read_run(folder).notes)


@pytest.mark.parametrize('make, message', [
    (lambda root: [root / 'none'], r'RUN .*none: no such folder; give the folder of a run'),
    (lambda root: [make_run(root / 'a') / 'args.yaml'], r'RUN .*args.yaml: not a folder'),
    (lambda root: [root], r'has no args.yaml, summary.csv or checkpoint; give the folder of a run'),
    (lambda root: [make_run(root / 'a').parent], r'it holds the runs a; give those'),
    (lambda root: [make_run(root / 'a'), root / 'none'], r'RUN .*none: no such folder'),
    (lambda root: [make_run(root / 'a'), '--output', root / 'a/args.yaml'], r'--output .*args.yaml: is a file'),
])
def test_what_is_no_run_is_refused_in_one_line(make, message, tmp_path, capsys):
    assert report(*make(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.count('\n') == 1 and not out
    assert not list(tmp_path.rglob('index.html'))


def test_a_page_of_somebody_else_is_left_alone_and_an_earlier_report_replaced(tmp_path, capsys):
    run, out = make_run(tmp_path / 'run'), tmp_path / 'out'
    out.mkdir()
    (out / 'index.html').write_text('<p>mine')
    (out / 'drawing.svg').write_text('<svg/>')
    assert report(run, '--output', out) == 2 and 'is no report' in capsys.readouterr().err
    assert (out / 'index.html').read_text() == '<p>mine'
    (out / 'index.html').unlink()
    assert report(run, '--output', out) == 0 and (out / 'exits.svg').exists()
    assert report(make_run(tmp_path / 'plain', heads=()), '--output', out) == 0
    assert {p.name for p in out.iterdir()} == {
        'accuracy.svg', 'drawing.svg', 'index.html', 'loss.svg', 'loss-training.svg'}


def test_hostile_names_are_text(tmp_path):
    folder = make_run(tmp_path / HOSTILE, heads=('<img src=x onerror=alert(2)>', '"]]>&amp;\x07'), model=f'm{HOSTILE}',
                      dataset='</title><script>', experiment='</style>')
    assert report(folder) == 0
    assert report(folder, make_run(tmp_path / 'b', heads=()), '--output', tmp_path / 'out') == 0
    for out in (folder / 'report', tmp_path / 'out'):
        page, pictures = read(out)
        assert not {'script', 'img'} & set(page.elements)
        assert HOSTILE in page.text and '<img src=x onerror=alert(2)>' in page.text and ']]>&amp;\ufffd' in page.text
        assert len(pictures) >= 5


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_is_one(tmp_path):
    a, b = make_run(tmp_path / 'a/run'), make_run(tmp_path / 'b/run', heads=())
    assert report(a, b, a, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert page.source.count('<details>') == 3 and f'{tmp_path}/a/run' in page.text and f'{tmp_path}/b/run' in page.text
