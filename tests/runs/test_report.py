"""`dks-timm report`: the page about runs and its pictures."""
import argparse
import csv
import html.parser
import itertools
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
from dks_timm.runs.report import write_report

TEXT = '{http://www.w3.org/2000/svg}text'
HOSTILE = '<script>alert(1)<'
BARE = dict(heads=(), dks=True)  # no columns and no pictures of branches


def make_run(folder, top1=(40., 50., 60.), heads=('stage2', 'stage3'), **settings):
    """A folder as train.py leaves it; the last accuracy of the backbone is that of ``top1``."""
    settings = dict(model='resnet18', dataset='digits', epochs=len(top1), seed=0, dks=bool(heads)) | settings
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
            row.update((f'eval_agree_{a}_{b}', 80. + epoch) for a, b in itertools.combinations(everyone, 2))
        epochs.append(row)
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=epochs[0])
        writer.writeheader()
        writer.writerows(epochs)
    exits = [
        dict(exit=head, threshold=t, leave=100 * (1 - t), top1=top1[-1] - 2 * (1 - t) * (i + 1))
        for i, head in enumerate(heads) for t in (0., 0.5, 0.9)]
    branches = [dict(to_stage=(4 + 3 * i) * 10**8, branch=2 * 10**8) for i in range(len(heads))]
    args = argparse.Namespace(
        **settings, command='train.py', exits=exits, exit_flops=dict(backbone=10**9, branches=branches))
    for name in ('last', 'model_best'):
        torch.save(dict(epoch=len(top1) - 1, args=args), folder / f'{name}.pth.tar')
    return folder


def report(*arguments):
    return cli.main(['report', *map(str, arguments)])


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, source):
        super().__init__()
        self.source, self.elements, self.text = source, [], ''
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)

    def handle_data(self, data):
        if self.elements and self.elements[-1] != 'style':
            self.text = ' '.join([*self.text.split(), *data.split()])


def write(*runs, out=None):
    """Write a report; its page and the texts of its pictures, after what has to hold for all of them."""
    path = write_report(runs, out)
    page, files = Page(path.read_text()), {path.name: path.read_text() for path in path.parent.glob('*.svg')}
    assert set(re.findall('href="([^"#]+)"', page.source)) == set(files)
    for text in (page.source, *files.values()):
        assert not re.search(r'https?://(?!www\.w3\.org/)|@import|url\((?!#)|\bnan\b|\binf\b', text)
    figures = [ET.fromstring(figure) for figure in re.findall(r'<figure>(.*?)</figure>', page.source, re.S)]
    assert len(figures) == len(files)
    pictures = {name.partition('-')[2].removesuffix('.svg'): ET.fromstring(svg) for name, svg in files.items()}
    return page, {name: [''.join(text.itertext()) for text in svg.iter(TEXT)] for name, svg in pictures.items()}


def test_a_real_run_becomes_a_page_with_all_it_recorded(tmp_path, capsys):
    main(
        '--data-dir', image_folder(tmp_path / 'noise', classes=3, count=4), '--num-classes', 3, '--model',
        'test_resnet', '--img-size', 32, '--dks', '--device', 'cpu', '--workers', 0, '-b', 6, '--opt', 'adamw',
        '--warmup-epochs', 0, '--no-aug', '--epochs', 2, '--output', tmp_path, '--experiment', 'run')
    run = tmp_path / 'run'
    assert report(run) == 0
    assert capsys.readouterr().out.endswith(f'\n{run}/report/index.html\n')
    page, pictures = write(run)
    assert set(pictures) == {
        'top-1-accuracy-evaluation', 'top-1-accuracy-training', 'loss-evaluation', 'loss-of-the-labels-training',
        'backbone-learns-from', 'stage2-learns-from', 'stage3-learns-from', 'same-class', 'top-1-accuracy-by-cost'}
    for words in ('test_resnet on noise', 'hardware CPU', 'software dks_timm', 'opt adamw', 'seed 42'):
        assert words in page.text
    epochs = [{name: float(value) for name, value in row.items() if value} for row in rows(run)]
    best, last = max(epochs, key=lambda row: row['eval_top1']), epochs[-1]
    assert f'backbone {best["eval_top1"]:.2f} {last["eval_top1"]:.2f} {last["eval_loss"]:.3f}' in page.text
    assert f'ensemble {best["eval_top1_ensemble"]:.2f} {last["eval_top1_ensemble"]:.2f}' in page.text
    assert f'stage2, stage3 {last["eval_agree_stage2_stage3"]:#.4g}' in pictures['same-class']
    for teacher, student in (('backbone', 'stage2'), ('stage3', 'backbone')):
        value = last[f'train_synergy_{teacher}_{student}']
        assert f'{teacher} {value:#.4g}' in pictures[f'{student}-learns-from']
    assert 'class="note"' not in page.source


def test_an_ensemble_that_teaches_is_among_the_teachers(tmp_path):
    run = make_run(tmp_path / 'run', dks_teacher='ensemble')
    lines = (run / 'summary.csv').read_text().splitlines()
    values = ['train_synergy_ensemble_stage2', '0.5', '0.25', '0.125']
    (run / 'summary.csv').write_text(''.join(f'{line},{v}\n' for line, v in zip(lines, values, strict=True)))
    pictures = {path.stem.split('-', 1)[1]: path.read_text() for path in write_report([run]).parent.glob('*.svg')}
    assert 'ensemble 0.1250' in pictures['stage2-learns-from']
    assert 'ensemble' not in pictures['backbone-learns-from']


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / 'run')
    a, b = (write_report([run], tmp_path / out).parent for out in 'ab')
    assert {path.name: path.read_bytes() for path in a.iterdir()} == {
        path.name: path.read_bytes() for path in b.iterdir()}


def test_the_page_is_dark_where_its_reader_wants_it_and_the_files_are_light(tmp_path):
    page, _ = write(make_run(tmp_path / 'run'))
    picture, = tmp_path.glob('run/report/*-same-class.svg')
    colors = set(re.findall('#[0-9a-f]{6}', picture.read_text()))
    assert colors == {INKS[name][0] for name in ('ink', 'muted', 'rule', 'paper', 'c0', 'c1', 'c2')}
    light, dark = re.findall(r':root {([^{}]*--paper[^{}]*)}', page.source)
    for name, (of_light, of_dark) in INKS.items():
        assert f'--{name}:{of_light};' in light and f'--{name}:{of_dark};' in dark
    figures = ''.join(re.findall(r'<figure>(.*?)</figure>', page.source, re.S))
    assert 'var(--c2)' in figures and not re.search('#[0-9a-f]{6}[^0-9a-f]', figures)


@pytest.mark.slow
def test_only_a_picture_needs_matplotlib():
    script = 'import sys, train, dks_timm.runs.report, dks_timm.publishing.card; assert "matplotlib" not in sys.modules'
    subprocess.run([sys.executable, '-c', script], check=True)


def test_gain_over_the_baseline_is_that_of_the_last_epochs(tmp_path):
    runs = [make_run(tmp_path / f'dks{s}', (30., 99., top1), **BARE, seed=s) for s, top1 in enumerate((55., 57.))]
    runs += [make_run(tmp_path / f'base{s}', (20., 98., top1), heads=(), seed=s) for s, top1 in enumerate((50., 52.))]
    without_baseline, _ = write(*runs[:2], out=tmp_path)
    assert 'DKS 0, 1 56.00 ± 1.41 99.00 ± 0.00' in without_baseline.text
    page, pictures = write(*runs, runs[0], out=tmp_path)  # a second report in its place
    # Two runs of each, two points apart: the deviation is sqrt(2), the error of the difference sqrt(2/2 + 2/2).
    assert 'baseline 0, 1 51.00 ± 1.41 98.00 ± 0.00 ' in page.text
    assert 'DKS 0, 1 56.00 ± 1.41 +5.00 ± 1.41 99.00 ± 0.00' in page.text
    assert {'DKS 56.00', 'baseline 51.00'} <= set(pictures['top-1-accuracy-of-the-backbone'])
    assert page.source.count('fill-opacity: 0.16') == 2 and page.elements.count('details') == 1 + 4


def test_groups_differ_in_more_than_the_seed_and_are_named_by_it(tmp_path):
    settings = (
        dict(heads=(), model='resnet50'), {}, dict(seed=7), dict(dks_direction='none'), dict(dks_temperature=2.0))
    groups = group_runs([read_run(make_run(tmp_path / str(i), **of_run)) for i, of_run in enumerate(settings)])
    assert {label: [run.args['seed'] for run in runs] for label, runs in groups.items()} == {
        'baseline, model resnet50': [0], 'DS, model resnet18': [0],
        'DKS, dks_temperature 1.0, model resnet18': [0, 7], 'DKS, dks_temperature 2.0, model resnet18': [0]}


def test_an_unfinished_run_is_in_no_mean(tmp_path):
    runs = [
        make_run(tmp_path / 'a', (50., 60.), **BARE), make_run(tmp_path / 'b', (10.,), **BARE, seed=1, epochs=2),
        make_run(tmp_path / 'c', (50., 55.), heads=()), make_run(tmp_path / 'd', (9.,), dks_direction='none', epochs=2)]
    page, _ = write(*runs, out=tmp_path)
    assert 'baseline 0 55.00 55.00 DS 0 9.00 9.00 DKS 0 60.00 +5.00 60.00' in page.text


def test_early_exits_cost_what_their_images_pay_for(tmp_path):
    page, pictures = write(make_run(tmp_path / 'run', (50., 60.)))
    # Stage 2 costs 400 + 200 MFLOPs. At 0.9, 10% leave there, 90% pay for the other 600, too; accuracy is 0.2 lower.
    assert 'backbone 1,000.0 1.00 60.00 1.00 stage2 600.0 0.60 10.0 59.80 1.14' in page.text
    assert 'stage3 900.0 0.90 10.0 59.60 1.17' in page.text
    assert 'stage2 58.00' in pictures['top-1-accuracy-by-cost']  # where all leave


@pytest.mark.parametrize('name, change, note', [
    ('summary.csv', lambda b: b'', '0 of 3 epochs are done'),
    ('summary.csv', lambda b: b[:-5], '2 of 3 epochs are done'),
    ('summary.csv', lambda b: b.replace(b'60.0', b'nan') + b'3,what\n4\n\xff,,\n', ''),
    ('last.pth.tar', lambda b: b[:300], 'A checkpoint is missing or broken'),
    ('model_best.pth.tar', None, 'A checkpoint is missing or broken'),
])
def test_a_run_of_which_something_is_missing_or_broken_has_a_page_that_says_so(name, change, note, tmp_path):
    folder = make_run(tmp_path / 'run', heads=('stage2',))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(content))
    for page, _ in (write(folder), write(folder, make_run(tmp_path / 'b', heads=()), out=tmp_path)):
        assert f'{folder}: {note}' in page.text and page.source.count('class="note"') == bool(note)


def emptied(folder):
    (folder / 'args.yaml').write_text('')
    return folder


@pytest.mark.parametrize('make, message', [
    (lambda root: [root / 'none'], r'RUN .*none: has no args.yaml; give the folder of a run'),
    (lambda root: [make_run(root / 'a'), root], r'RUN .*: has no args.yaml; give the folder of a run'),
    (lambda root: [emptied(make_run(root / 'a'))], r'RUN .*a: TypeError'),
    (lambda root: [make_run(root / 'a', epochs='x')], r'RUN .*a: "epochs: x" is not a whole number'),
    (lambda root: [make_run(root / 'a'), '--output', root / 'a/args.yaml'], r'--output .*args.yaml: .*File exists'),
])
def test_what_is_no_run_is_refused_in_one_line(make, message, tmp_path, capsys):
    assert report(*make(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.count('\n') == 1 and not out
    assert not list(tmp_path.rglob('index.html'))


def test_a_page_of_somebody_else_is_left_alone(tmp_path, capsys):
    run, page = make_run(tmp_path / 'run'), tmp_path / 'index.html'
    page.write_text('<p>mine')
    assert report(run, '--output', tmp_path) == 2 and f'--output {tmp_path}: holds an' in capsys.readouterr().err
    assert page.read_text() == '<p>mine' and not list(tmp_path.glob('*.svg'))


def test_hostile_names_are_text(tmp_path):
    heads = '<img src=x onerror=alert(2)>', '"]]>&amp;'
    folder = make_run(tmp_path / HOSTILE, heads=heads, model=f'm{HOSTILE}', dataset='</title><script>\x07')
    for page, pictures in (write(folder), write(folder, make_run(tmp_path / 'b', heads=()), out=tmp_path)):
        assert not {'script', 'img'} & set(page.elements)
        assert HOSTILE in page.text and '<img src=x onerror=alert(2)>' in page.text and ']]>&amp;' in page.text
        assert '</title><script>\\x07' in page.text and len(pictures) >= 5
