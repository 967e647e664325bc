#!/usr/bin/env python3
"""Train the same small networks under DDP, FSDP2 and DeepSpeed on GPUs, and compare losses, checkpoints and exports.

    python benchmarks/engines.py                   # all GPUs of this machine; writes results/engines.md
    python benchmarks/engines.py --processes 2

Every row is two runs of train.py for each engine, started by accelerate launch with the configs in recipes/accelerate:
one of a single update, whose training loss is that of the initial weights, and one of a few epochs with an export.
DeepSpeed takes part where its package is installed.
"""
import argparse
import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import yaml
from timm.utils import load_checkpoint_metadata

from dks_timm.training.readers import ReaderDigits

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = dict(DDP='multi_gpu', FSDP2='fsdp2', DeepSpeed='deepspeed_zero2')
# Without broadcasts of BatchNorm's statistics, which DDP alone has, all engines compute the same.
BASE = '--dataset digits --num-classes 10 --img-size 32 --no-aug --workers 0 --warmup-epochs 0 --dks --no-ddp-bb'
SGD, ADAMW = '--opt momentum --lr 0.02', '--opt adamw --lr 5e-4'
CASES = {
    'ResNet-18, float32': f'--model resnet18 {SGD}',
    'ResNet-18, bfloat16': f'--model resnet18 {SGD} --amp --amp-dtype bfloat16',
    'ResNet-18, float16': f'--model resnet18 {SGD} --amp --amp-dtype float16',
    'ResNet-18, groups of 4, clipped': f'--model resnet18 {SGD} --grad-accum-steps 4 --clip-grad 1.0',
    'ViT, float32': f'--model test_vit {ADAMW}',
    'ViT, bfloat16, block by block': f'--model test_vit {ADAMW} --amp --amp-dtype bfloat16 --grad-checkpointing',
}
WRAPPED = dict(fsdp_auto_wrap_policy='TRANSFORMER_BASED_WRAP', fsdp_transformer_layer_cls_to_wrap='Block')
EPOCHS = 5


def run(engine, case, out, processes, *flags):
    """Run train.py under an engine and return its folder; a line of its error where it fails."""
    config = yaml.safe_load((ROOT / f'recipes/accelerate/{CONFIGS[engine]}.yaml').read_text())
    if engine == 'FSDP2' and 'block by block' in case:
        config['fsdp_config'].update(WRAPPED)
    out.mkdir(parents=True)
    (out / 'accelerate.yaml').write_text(yaml.safe_dump(config))
    command = [
        sys.executable, '-m', 'accelerate.commands.launch', '--config_file', out / 'accelerate.yaml',
        '--num_processes', str(processes), '--main_process_port', '0', ROOT / 'train.py', *BASE.split(),
        *CASES[case].split(), '--output', out, '--experiment', 'run', *map(str, flags),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    (out / 'log.txt').write_text(done.stdout + done.stderr)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if 'Error' in line or 'error: ' in line] or ['no message']
        raise RuntimeError(f'{engine}, {case}: {said[0].strip()} ({out / "log.txt"})')
    return out / 'run'


def last_row(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return {name: float(value) for name, value in list(csv.DictReader(f))[-1].items()}


def shapes(folder):
    """Names and shapes of all tensors in the last checkpoint of a run."""
    checkpoint = load_checkpoint_metadata(folder / 'last.pth.tar')
    found = {}

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = tuple(value.shape)
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f'{name}/{key}', part)

    for name in ('state_dict', 'task_state', 'optimizer'):
        walk(name, checkpoint[name])
    return found


def difference_in_files(folder, reference, export_dir):
    """What is wrong with a run's checkpoint, compared with another run's, and with its export; '' if nothing."""
    ours, theirs = shapes(folder), shapes(reference)
    differ = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if differ:
        name = differ[0]
        return f'{len(differ)} tensors differ: {name} is {ours.get(name)}, under DDP {theirs.get(name)}'
    model = timm.create_model(f'local-dir:{export_dir}', pretrained=True).eval()
    best = load_checkpoint_metadata(folder / 'model_best.pth.tar')['state_dict']
    if not all(torch.equal(value, best[name]) for name, value in model.state_dict().items()):
        return 'the export holds other weights than the best checkpoint'
    return ''


def compare(case, engines, work, processes):
    """Rows of the table: one for each engine."""
    images = len(ReaderDigits('train').samples) // processes
    lines, reference = [], {}
    for engine in engines:
        if engine == 'DeepSpeed' and 'float16' in case.split(', '):
            lines.append(f'| {case} | {engine} | refused | | | |')
            continue
        out = work / engine / case.replace(', ', '_').replace(' ', '_')
        parts = 4 if 'groups of 4' in case else 1
        try:
            folder = run(engine, case, out / 'first', processes, '-b', images // parts, '--epochs', 1)
            first = last_row(folder)['train_loss']
            folder = run(
                engine, case, out / 'whole', processes, '-b', 64 // parts, '--epochs', EPOCHS,
                '--export-dir', out / 'model')
            row = last_row(folder)
            reference.setdefault('first', first)
            reference.setdefault('folder', folder)
            files = difference_in_files(folder, reference['folder'], out / 'model') or "as DDP's"
            lines.append(
                f'| {case} | {engine} | {first:.6f} | {abs(first / reference["first"] - 1):.1e} | '
                f'{row["train_loss"]:.4f}, {row["eval_top1"]:.2f} | {files} |')
        except RuntimeError as e:
            lines.append(f'| {case} | {engine} | {e} | | | |')
        print(lines[-1], flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--processes', type=int, help='number of GPUs, all if not given')
    parser.add_argument('--work', type=Path, help='folder for the runs, a temporary one if not given')
    parser.add_argument('--results', type=Path, default=ROOT / 'results/engines.md', help='what to write')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print('engines.py: FSDP2 and DeepSpeed are compared on GPUs, and this machine has none', file=sys.stderr)
        sys.exit(2)
    processes = args.processes or torch.cuda.device_count()
    engines = [name for name in CONFIGS if name != 'DeepSpeed' or importlib.util.find_spec('deepspeed')]
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        lines = [line for case in CASES for line in compare(case, engines, work, processes)]
    packages = ['torch', 'timm', 'accelerate', *(['deepspeed'] if 'DeepSpeed' in engines else [])]
    flags = [f'* {case}: `{CASES[case]}`' for case in CASES]
    args.results.write_text('\n'.join([
        '# Engines', '',
        f'`python benchmarks/engines.py --processes {processes}` on {processes} x {torch.cuda.get_device_name()}, '
        f'{", ".join(f"{package} {version(package)}" for package in packages)}. All runs have the flags `{BASE}`; the '
        'first loss is that of all images at the initial weights, in one update; the last columns are of a run of '
        f'{EPOCHS} epochs with batches of 64 a process.', '',
        '| network | engine | first loss | relative difference | training loss, top-1 | checkpoint and export |',
        '|---|---|---:|---:|---|---|', *lines, '', *flags,
    ]) + '\n')


if __name__ == '__main__':
    main()
