#!/usr/bin/env python3
"""Run our train.py and timm's own with the same flags, and compare summary.csv, args.yaml and checkpoints.

    python benchmarks/parity.py --timm-train path/to/pytorch-image-models/train.py    # writes results/parity.md
    python benchmarks/parity.py --timm-train ... --names sgd bce                      # only these, printed

timm's script is run from a copy in the work folder, so that it imports the installed timm. The copy has one change: its
DDP wrapper gets no device ids, as two processes could not start on a CPU otherwise.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import timm
import torch
import yaml
from common import ROOT, table, versions
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf
from timm.utils import load_checkpoint_metadata

from dks_timm.training.validate import validate as validate_here

BASE = '--num-classes 10 --img-size 32 --epochs 2 -b 32 -j 1 --device cpu --warmup-epochs 1'
CNN = '--model resnet10t --lr 0.05'
COMBINATIONS = {
    'sgd': CNN,
    'adamw, EMA': f'{CNN} --opt adamw --lr 1e-3 --model-ema --model-ema-decay 0.9',
    'EMA with warm-up, seed 7': f'{CNN} --model-ema --model-ema-warmup --seed 7',
    'mixup and cutmix, off after an epoch': f'{CNN} --mixup 0.2 --cutmix 1.0 --mixup-off-epoch 1',
    'mixup and cutmix, no prefetcher': f'{CNN} --mixup 0.2 --cutmix 1.0 --no-prefetcher',
    'BCE': f'{CNN} --bce-loss --bce-target-thresh 0.2 --mixup 0.1',
    'rand-augment, random erasing': f'{CNN} --aa rand-m9-mstd0.5 --reprob 0.5 --recount 2 --remode pixel',
    'gradient accumulation': f'{CNN} --grad-accum-steps 5 --sched-on-updates',
    'gradient accumulation, short last group': f'{CNN} --grad-accum-steps 8 -b 36 --model-ema --model-ema-decay 0.9',
    'no prefetcher, no workers': f'{CNN} --no-prefetcher --workers 0',
    'step schedule, noise, warm-up before': (
        f'{CNN} --epochs 4 --lr-noise 0.1 0.9 --sched step --decay-epochs 1 --warmup-epochs 2 --warmup-prefix '
        '--cooldown-epochs 1'),
    'plateau schedule': f'{CNN} --epochs 3 --sched plateau --patience-epochs 0',
    'evaluation every other epoch': f'{CNN} --epochs 3 --val-interval 2',
    'no evaluation': f'{CNN} --val-split=',
    'lamb, learning rate from --lr-base': '--model resnet10t --opt lamb --lr-base 0.01 --weight-decay 0.05',
    'head init, clipping': f'{CNN} --head-init-scale 0.1 --head-init-bias -2 --clip-grad 1.0 --smoothing 0',
    'adaptive clipping, layer decay': f'{CNN} --clip-grad 0.1 --clip-mode agc --layer-decay 0.7',
    'JSD, augmentation splits, split BN': (
        f'{CNN} --aug-splits 3 --jsd-loss --aa augmix-m5-w4-d2 --split-bn --resplit --reprob 0.3'),
    'lookahead': f'{CNN} --opt lookahead_adam --lr 1e-3',
    'ViT, layer decay, drop path': (
        '--model test_vit --model-kwargs img_size=32 --opt adamw --lr 1e-3 --layer-decay 0.75 --drop-path 0.1 '
        '--drop 0.1'),
    'scheduled image sizes': (
        f'{CNN} --train-img-sizes 24 32 40 --train-batch-sizes 40 32 16 --variable-batch-loss-scale linear'),
    'NaFlex': (
        '--model naflexvit_base_patch16_gap --model-kwargs embed_dim=64 depth=2 num_heads=2 --naflex-loader '
        '--naflex-train-seq-lens 4 9 16 --naflex-max-seq-len 9 --opt adamw --lr 1e-3 -b 8 --epochs 1'),
    'tar input': f'{CNN} --data-dir {{tars}} --train-split train.tar --val-split validation.tar',
    'channels_last, one channel, multi-epoch loader': (
        f'{CNN} --channels-last --use-multi-epochs-loader --crop-pct 1.0 --in-chans 1'),
    'no augmentation, adahessian': f'{CNN} --no-aug --opt adahessian --lr 0.05 --epochs 1',
    'distillation from logits': f'{CNN} --kd-model-name local-dir:{{teacher}} --distill-loss-weight 2',
    'distillation from features': f'{CNN} --kd-model-name local-dir:{{teacher}} --kd-distill-type feature',
    'resume of a checkpoint by timm': f'{CNN} --epochs 4 --model-ema --model-ema-decay 0.9 --resume {{checkpoint}}',
    'two processes, repeated augmentation': f'{CNN} --aug-repeats 2 -b 16',
    'two processes, gradient accumulation, EMA': f'{CNN} -b 8 --grad-accum-steps 4 --model-ema --model-ema-decay 0.9',
}


def make_data(work):
    """Digits as class folders of PNG files, 24 a class to train on and 8 to evaluate on, and the same as tars."""
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label]
        for split, part in (('train', images[:24]), ('validation', images[24:32])):
            folder = work / 'data' / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            for i, pixels in enumerate(part):
                Image.fromarray((pixels * 255 / 16).astype('uint8')).convert('RGB').save(folder / f'{i:02}.png')
    (work / 'tars').mkdir(exist_ok=True)
    for split in ('train', 'validation'):
        with tarfile.open(work / 'tars' / f'{split}.tar', 'w') as tar:
            for folder in sorted((work / 'data' / split).iterdir()):
                tar.add(folder, folder.name)


def make_teacher(work):
    """An untrained model in the form of a trained one."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model('resnet10t', num_classes=10), work / 'teacher', safe_serialization=True)


def copy_timm_script(path, work):
    text = path.read_text()
    wanted = 'task.prepare_distributed(device_ids=[device],'
    if wanted not in text:
        sys.exit(f'--timm-train {path}: has no line with {wanted!r}; use a train.py of timm 1.0.29 to 1.0.31')
    copy = work / 'timm' / 'train.py'
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(text.replace(wanted, 'task.prepare_distributed(device_ids=None,'))
    return copy


def run(script, flags, out, who, processes=1):
    shutil.rmtree(out / who, ignore_errors=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    command = [*launcher, str(script), *BASE.split(), *flags.split(), '--output', str(out), '--experiment', who]
    done = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(command)}\n{done.stderr}')


def compare(out):
    """Largest difference and its column: points for accuracies, relative for the rest; and what else differs."""
    tables = []
    for who in ('ours', 'timm'):
        with open(out / who / 'summary.csv', newline='') as f:
            rows = list(csv.reader(f))
        tables.append([rows[0], *(r for r in rows[1:] if r[0] != 'epoch')])  # timm repeats the header after a resume
    ours, timm = tables
    if ours[0] != timm[0] or len(ours) != len(timm):
        return float('inf'), 'columns or rows', 'differ'
    worst = (0., '')
    for a, b in zip(ours[1:], timm[1:], strict=True):
        for column, x, y in zip(ours[0], map(float, a), map(float, b), strict=True):
            difference = abs(x - y) / (1 if 'top' in column else max(abs(y), 1e-12))
            if not difference <= worst[0]:  # a NaN is a difference too
                worst = difference, column
    keys = [checkpoint_keys(out / who / 'last.pth.tar') for who in ('ours', 'timm')]
    settings = [yaml.safe_load((out / who / 'args.yaml').read_text()) for who in ('ours', 'timm')]
    names = [sorted(p.name for p in (out / who).iterdir()) for who in ('ours', 'timm')]
    same = all(settings[0].get(k) == v for k, v in settings[1].items() if k != 'experiment')
    return *worst, 'equal' if same and names[0] == names[1] and keys[0] == keys[1] else 'differ'


def checkpoint_keys(path):
    """Names of what a checkpoint holds, and of its weights and their average."""
    checkpoint = load_checkpoint_metadata(path)
    return sorted(checkpoint), [list(checkpoint.get(k) or ()) for k in ('state_dict', 'state_dict_ema')]


def read_with_timms_tools(timm_scripts, work, ours):
    """Let timm's validate.py and avg_checkpoints.py read the checkpoints of a run with --dks; rows of a table."""
    out = work / 'tools'
    run(ours, f'--data-dir {work / "data"} {CNN} --dks --model-ema --model-ema-decay 0.9', out, 'ours')
    with open(out / 'ours' / 'summary.csv', newline='') as f:
        recorded = float(list(csv.DictReader(f))[-1]['eval_top1'])

    def script(name, *arguments):
        copy = shutil.copy(timm_scripts / name, work / 'timm')
        command = [sys.executable, copy, *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{" ".join(command)}\n{done.stderr}')
        return done.stdout

    def validate(checkpoint, *arguments):
        printed = script(
            'validate.py', '--data-dir', work / 'data', '--split', 'validation', '--model', 'resnet10t',
            '--num-classes', 10, '--img-size', 32, '--device', 'cpu', '-j', 1, '-b', 32, '--use-train-size',
            '--checkpoint', checkpoint, *arguments)
        return json.loads(printed.partition('--result')[2])['top1']

    last = out / 'ours' / 'last.pth.tar'
    found = validate(last, '--use-ema')
    by_us = validate_here(str(last), {})['heads']['backbone']
    averaged = out / 'averaged.pth'
    averaged.unlink(missing_ok=True)
    script('avg_checkpoints.py', '--input', out / 'ours', '--output', averaged)
    return [
        ('`validate.py --use-ema`', 'last.pth.tar of a run with `--dks`',
         f'top-1 {found:.3f}, in summary.csv {recorded:.3f}, by `dks-timm validate` {by_us["top1"]:.3f}'),
        ('`avg_checkpoints.py`, `validate.py`', 'its checkpoints', f'top-1 {validate(averaged):.3f}'),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--timm-train', type=Path, required=True, help="timm's own train.py")
    parser.add_argument('--work', type=Path, default=Path('output/parity'), help='folder for data and runs')
    parser.add_argument('--names', nargs='+', choices=COMBINATIONS, help='only these, printed')
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_data(work)
    make_teacher(work)
    scripts = dict(ours=ROOT / 'train.py', timm=copy_timm_script(args.timm_train, work))

    rows = []
    for name, flags in COMBINATIONS.items():
        if args.names and name not in args.names:
            continue
        out = work / name.replace(' ', '_').replace(',', '')
        flags = f'--data-dir {work / "data"} {flags}'
        if '{checkpoint}' in flags:
            first = flags.partition(' --resume')[0]
            run(scripts['timm'], first, out, 'first')
        flags = flags.format(
            tars=work / 'tars', teacher=work / 'teacher', checkpoint=out / 'first' / 'checkpoint-1.pth.tar')
        for who, script in scripts.items():
            run(script, flags, out, who, processes=2 if name.startswith('two processes') else 1)
        difference, column, rest = compare(out)
        rows.append((name, f'`{COMBINATIONS[name]}`', f'{difference:.2g}', column, rest))
        print(*rows[-1], sep=' | ', flush=True)
    if not args.names:
        tools = read_with_timms_tools(args.timm_train.resolve().parent, work, scripts['ours'])
        (ROOT / 'results' / 'parity.md').write_text('\n'.join([
            "# The same digits as timm's script", '',
            '`python benchmarks/parity.py --timm-train path/to/pytorch-image-models/train.py` runs both scripts with '
            f'the flags `{BASE}` and those of the row, on a CPU in float32 '
            f'({versions("torch", "timm", "accelerate")}). '
            'The difference is the largest in summary.csv, relative, or in percentage points for top-1 and top-5; 0 is '
            'equality to the last digit. The last column compares args.yaml, the names of the files, and the keys of '
            'the last checkpoint and of its weights.', '',
            *table(('combination', 'flags', 'largest difference', 'column', 'settings and files'), rows), '',
            "timm's other scripts read our checkpoints:", '',
            *table(('script', 'reads', 'finds'), tools),
        ]) + '\n')


if __name__ == '__main__':
    main()
