"""`dks-timm report`: the page about runs and its pictures."""
import argparse
import csv
import functools
import html.parser
import http.server
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import train
from dks_timm.cli import main
from dks_timm.runs.charts import Line, chart, color, ticks
from dks_timm.training.metrics import THRESHOLDS

SVG = '{http://www.w3.org/2000/svg}'
HOSTILE = '<script>alert(1)<'
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def make_run(folder, top1=(40., 50., 60.), heads=('stage2', 'stage3'), checkpoint=True, **settings):
    """A folder as train.py leaves it; the last accuracy of the backbone is that of ``top1``."""
    settings = {'model': 'resnet18', 'dataset': 'digits', 'num_classes': 10, 'epochs': len(top1), 'seed': 0,
                'dks': bool(heads), **settings}
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))
    everyone = ['backbone', *heads]
    rows = []
    for epoch, value in enumerate(top1):
        row = dict(epoch=epoch, train_loss=9 - epoch, eval_loss=3 - 0.1 * epoch, eval_top1=value, eval_top5=99., lr=0.1)
        if heads:
            row.update((f'train_{key}_{head}', 1. + epoch) for key in ('top1', 'ce') for head in everyone)
            row.update((f'train_synergy_{a}_{b}', 1 / (1 + epoch)) for a in everyone for b in everyone if a != b)
            row.update((f'eval_top1_{head}', value - i) for i, head in enumerate((*heads, 'ensemble')))
            row.update((f'eval_loss_{head}', 2. - 0.1 * epoch) for head in heads)
            row.update((f'eval_agree_{a}_{b}', 80. + epoch)
                       for i, a in enumerate(everyone) for b in everyone[i + 1:])
        rows.append(row)
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
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
    return main(['report', *map(str, arguments)])


class Page(html.parser.HTMLParser):
    """The text of a page, its elements, and what they refer to."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.references, self.text, self.open = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open, 'elements that are not closed'
        self.text = ' '.join(' '.join(self.text).replace('\N{NARROW NO-BREAK SPACE}', ' ').split())

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.references += [value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'srcset', 'data')]
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
        assert not re.search(r'https?://(?!www\.w3\.org/2000/svg")|@import|url\(|\bnan\b|\binf\b', text)
    for figure in re.findall(r'<figure>(.*?)</figure>', page.source, re.S):
        assert ET.fromstring(figure).tag == f'{SVG}svg'
    return page, pictures


@pytest.fixture(scope='module')
def real_run(tmp_path_factory):
    """A run of train.py with --dks: two epochs on noise."""
    root = tmp_path_factory.mktemp('real')
    for split, label, i in itertools.product(('train', 'validation'), 'abc', range(4)):
        (root / 'noise' / split / label).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(ord(label) + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / 'noise' / split / label / f'{i}.png')
    try:
        train.main([
            '--data-dir', str(root / 'noise'), '--num-classes', '3', '--model', 'test_resnet', '--img-size', '32',
            '--dks', '--device', 'cpu', '--workers', '0', '-b', '6', '--opt', 'adamw', '--warmup-epochs', '0',
            '--no-aug', '--epochs', '2', '--output', str(root), '--experiment', 'run'])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return root / 'run'


def test_a_real_run_becomes_a_page_with_all_it_recorded(real_run, capsys):
    assert report(real_run) == 0
    assert capsys.readouterr().out == f'{real_run}/report/index.html\n'
    page, pictures = read(real_run / 'report')
    assert set(pictures) == {'accuracy', 'loss', 'teaching', 'agreement', 'exits'}
    for words in ('Heads', 'Who teaches whom', 'How often heads agree', 'Early exits', 'machine CPU',
                  'versions dks_timm', 'opt adamw'):
        assert words in page.text
    with open(real_run / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    best = max(float(row['eval_top1']) for row in rows)
    assert f'test_resnet on noise: {best:.2f} % top-1' in page.text
    for column in ('eval_top1_stage2', 'eval_top1_stage3', 'eval_top1_ensemble', 'eval_agree_stage2_stage3'):
        assert f'{float(rows[-1][column]):.{2 if "top1" in column else 1}f}' in page.text
    for teacher, student in (('backbone', 'stage2'), ('stage3', 'backbone')):
        assert f'{float(rows[-1][f"train_synergy_{teacher}_{student}"]):.3f}' in page.text
    assert len(pictures['teaching'].findall(f'{SVG}svg')) == 3 and page.elements.count('figure') == 4 + 3 + 1 + 1
    assert 'notes' not in re.findall(r'<ul class="(\w+)"', page.source)


def test_gain_over_the_baseline_is_that_of_the_last_epochs(tmp_path, capsys):
    runs = [make_run(tmp_path / f'dks{seed}', (30., 99., top1), seed=seed) for seed, top1 in enumerate((55., 57.))]
    runs += [make_run(tmp_path / f'base{s}', (20., 98., top1), heads=(), seed=s) for s, top1 in enumerate((50., 52.))]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, pictures = read(tmp_path / 'out')
    assert 'DKS backbone 56.00 %, baseline 51.00 %: +5.00 points' in page.text
    # Two runs of each, two points apart: the deviation is sqrt(2), the error of the difference sqrt(2/2 + 2/2).
    assert 'standard error of the difference is 1.41 points' in page.text
    assert re.search(r'baseline 0, 1 51\.00 ± 1\.41 98\.00 ± 0\.00 0:01:15 '
                     r'DKS 0, 1 56\.00 ± 1\.41 \+5\.00 99\.00 ± 0\.00 0:01:15', page.text)
    bands = [path for path in pictures['comparison'].iter(f'{SVG}path') if path.get('fill-opacity')]
    assert len(bands) == 4 and page.elements.count('details') == 4 + 1
    assert all(run.name in page.text for run in runs)


def test_without_a_baseline_no_gain_is_claimed(tmp_path):
    runs = [make_run(tmp_path / f'dks{seed}', (30., 55. + seed), seed=seed) for seed in range(2)]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert 'DKS backbone 55.50 ± 0.71 % top-1' in page.text and 'against baseline' not in page.text
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
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    rows = re.findall(r'<th scope="row"><i [^>]*></i>([^<]*)</th><td>([\d, ]*)</td>', page.source.split('</table>')[0])
    assert rows == [
        ('baseline', '0'), ('DS', '0'), ('DKS, dks_temperature 1.0', '0, 7'), ('DKS, dks_temperature 2.0', '0')]


def test_an_unfinished_run_is_in_no_mean(tmp_path):
    runs = [make_run(tmp_path / 'a', (50., 60.)), make_run(tmp_path / 'b', (10.,), seed=1, epochs=2),
            make_run(tmp_path / 'c', (50., 55.), heads=())]
    assert report(*runs, '--output', tmp_path / 'out') == 0
    page, _ = read(tmp_path / 'out')
    assert 'DKS backbone 60.00 %, baseline 55.00 %: +5.00 points' in page.text and 'DKS: 1 run,' in page.text
    assert 'b: 1 of 2 epochs are done.' in page.text and 'Not in the means, because unfinished: b.' in page.text


def test_early_exits_cost_what_their_images_pay_for(tmp_path):
    folder = make_run(tmp_path / 'run', (50., 60.))
    assert report(folder) == 0
    page, _ = read(folder / 'report')
    # Stage 2: at 0.9, 10 % leave after 400 + 200 MFLOPs, 90 % pay for the other 600, too; accuracy is 0.2 lower.
    assert 'stage2 10.0 % 59.80 % 1.140 1.14×' in page.text and 'stage3 10.0 % 59.60 % 1.170 1.17×' in page.text
    # All leave there: 0.6 of the cost for 58 %. Within a point: from 0.5 on, where half of them leave for 0.9.
    assert ('If images leave at stage2 from a confidence of 0.5 on, 50.0 % do: 59.00 % top-1 for 0.90 of the '
            "backbone's FLOPs, within a point of the backbone (60.00 %)") in page.text
    for row in ('backbone 60.00 % 60.00 % 2.900 1.000 1.00×', 'stage3 59.00 % 59.00 % 1.900 0.900 0.90×'):
        assert row in page.text


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
    (edit('summary.csv', lambda b: b''), ['summary.csv has no epoch yet']),
    (edit('summary.csv', lambda b: b.split(b'\n')[0] + b'\n'), ['summary.csv has no epoch yet']),
    (edit('summary.csv', lambda b: b[:30]), ['The last line of summary.csv is cut off']),
    (edit('summary.csv', lambda b: b[:-5]), ['The last line of summary.csv is cut off', '2 of 3 epochs are done']),
    (edit('summary.csv', lambda b: b + b'3,what\n\xff\0,,\n'), ['2 lines of summary.csv could not be read']),
    (edit('summary.csv', lambda b: b.replace(b'60.0', b'nan')), []),
    (remove('args.yaml'), ['There is no args.yaml', 'The arguments are those that a checkpoint holds']),
    (edit('args.yaml', lambda b: b[:-3] + b': ['), ['args.yaml cannot be read']),
    (edit('args.yaml', lambda b: b[:-3]), ['args.yaml does not end with a line break: it may be cut off']),
    (edit('args.yaml', lambda b: b''), ['args.yaml holds no arguments']),
    (remove('model_best.pth.tar'), ['There is no checkpoint']),
    (break_checkpoint, ['model_best.pth.tar is no whole checkpoint', 'There is no checkpoint']),
    (lambda f: [remove('args.yaml')(f), remove('model_best.pth.tar')(f)], ['settings are unknown']),
    (lambda f: [remove('args.yaml')(f), remove('summary.csv')(f)], ['There is no summary.csv yet']),
    (lambda f: [remove('model_best.pth.tar')(f), remove('summary.csv')(f)], ['There is no checkpoint']),
])
def test_what_is_missing_is_a_note_on_the_page(breaking, notes, tmp_path):
    folder = make_run(tmp_path / 'run')
    breaking(folder)
    whole = make_run(tmp_path / 'whole', heads=())
    assert report(folder) == 0 and report(folder, whole, '--output', tmp_path / 'both') == 0
    for text in (read(folder / 'report')[0].text, read(tmp_path / 'both')[0].text):
        for note in notes:
            assert note in text
        assert 'Traceback' not in text


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
    assert sorted(p.name for p in out.iterdir()) == ['accuracy.svg', 'drawing.svg', 'index.html', 'loss.svg']


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
    assert page.text.count('2 runs: ') == 1 and f'{tmp_path}/a/run' in page.text and f'{tmp_path}/b/run' in page.text


@pytest.mark.parametrize('low, high', [(0, 1), (0.001, 0.0013), (97.1, 99.9), (-3, 250), (5, 5), (0, 0), (1e9, 1.1e9)])
def test_ticks_are_few_round_and_enclose(low, high):
    found = ticks(low, high)
    assert found[0] <= low and high <= found[-1] and 3 <= len(found) <= 8
    step = found[1] - found[0]
    assert any(math.isclose(step / 10 ** math.floor(math.log10(step)), m) for m in (1, 2, 2.5, 5, 10))


def test_labels_keep_apart_and_stay_on_the_chart():
    lines = [Line(f'head{i}', [(0, 0), (5, 60 + i / 100)], color(i), value='60.00') for i in range(7)]
    svg = ET.fromstring(chart('x', lines))
    places = sorted(float(t.get('y')) for t in svg.iter(f'{SVG}text') if t.get('class') == 'label')
    assert len(places) == 7 and min(b - a for a, b in zip(places, places[1:], strict=False)) >= 14
    assert places[0] > 0 and places[-1] < 270


PROBE = '''<!doctype html><body style="margin:0"><iframe style="border:0;width:%dpx;height:800px"></iframe><script>
const frame = document.querySelector('iframe'), out = {};
const load = src => new Promise(done => { const i = new Image(); i.onload = () => done(i.naturalWidth);
  i.onerror = () => done(0); i.src = src; });
frame.onload = async () => {
  const doc = frame.contentDocument, root = doc.documentElement;
  doc.querySelectorAll('details').forEach(d => d.open = true);
  out.overflow = root.scrollWidth - root.clientWidth;
  out.empty = [...doc.querySelectorAll('figure > svg')].filter(s => s.getBoundingClientRect().height < 100).length;
  out.figures = doc.querySelectorAll('figure > svg').length;
  out.color = frame.contentWindow.getComputedStyle(root).backgroundColor;
  doc.getSelection().selectAllChildren(doc.body);
  out.selected = doc.getSelection().toString();
  const links = [...doc.querySelectorAll('footer a')];
  out.pictures = await Promise.all(links.map(a => load('report/' + a.getAttribute('href'))));
  document.body.innerHTML = '<pre></pre>';
  document.querySelector('pre').textContent = 'RESULT' + JSON.stringify(out) + 'END';
};
frame.src = 'report/index.html';
</script>'''


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium (Debian: apt-get install chromium)')
@pytest.mark.parametrize('width, dark', [(390, False), (1280, True)])
def test_a_browser_shows_the_page(width, dark, tmp_path):
    runs = [make_run(tmp_path / 'dks'), make_run(tmp_path / 'baseline', heads=())]
    assert report(*runs, '--output', tmp_path / 'site/report') == 0
    (tmp_path / 'site/probe.html').write_text(PROBE % width)
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Server, directory=tmp_path / 'site')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = subprocess.run(
            [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
             '--disable-component-update', '--no-first-run', f'--user-data-dir={tmp_path / "profile"}',
             '--enable-logging=stderr', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
             f'--blink-settings=preferredColorScheme={0 if dark else 1}', '--virtual-time-budget=20000', '--dump-dom',
             f'http://127.0.0.1:{server.server_port}/probe.html'],
            capture_output=True, text=True, timeout=300)
        server.shutdown()
    result = re.search('RESULT(.*)END', shown.stdout, re.S)
    assert result, shown.stderr[-2000:]
    found = json.loads(html.unescape(result[1]))
    page, pictures = read(tmp_path / 'site/report')
    assert 'CONSOLE' not in shown.stderr.replace('favicon.ico', '')
    assert found['overflow'] <= 0
    assert found['figures'] == page.elements.count('figure') and found['empty'] == 0
    assert len(found['pictures']) == len(pictures) and all(found['pictures'])
    for text in ('DKS backbone 60.00', 'learns from', 'Same class, %', 'epoch', 'stage3'):  # the last ones within SVG
        assert text in found['selected'].replace('\N{NARROW NO-BREAK SPACE}', ' ')
    assert found['color'] == ('rgb(21, 24, 28)' if dark else 'rgb(255, 255, 255)')
    wanted = {'/probe.html', '/report/index.html', *(f'/report/{name}.svg' for name in pictures)}
    assert set(asked) - {'/favicon.ico'} == wanted  # the probe's own page has no icon
