#!/usr/bin/env python3
"""Time, memory and FLOPs of a training step: plain, with deep supervision (DS), with DKS; as ratios within one run.

    python benchmarks/step.py                  # float32, eager; writes results/speed/step-cpu.md, on a GPU step-cuda.md
    python benchmarks/step.py --all            # also bfloat16, channels_last and compiled: the whole table
    python benchmarks/step.py --models resnet18 vit_small_patch16_224 --dtype bf16 --channels-last --compile
    python benchmarks/step.py --models resnet18 --profile                  # where the time goes, printed
    python benchmarks/step.py --models resnet18 -- --dks-budget 1.5        # flags of train.py, for DS and DKS

A step is that of train.py, made by its functions from its flags, on random images that stay on the device. Every
measurement has a process of its own, in which the variants take turns. Rows that the .csv has already are kept, so a
run that was stopped goes on; --again measures them anew.
"""
import argparse
import csv
import gc
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import step_profile
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dks_timm.training import build, config, distributed, sharding

ROOT = Path(__file__).resolve().parent.parent
MODELS = {  # batch size on a CPU, on a GPU
    'resnet18': (16, 256),
    'resnet50': (8, 256),
    'resnet152': (4, 128),
    'convnext_tiny': (8, 128),
    'vit_small_patch16_224': (8, 256),
    'efficientnet_b0': (16, 256),
    'wrn_28_10_cifar': (8, 128),
}
VARIANTS = {'plain': [], 'DS': ['--dks', '--dks-direction', 'none'], 'DKS': ['--dks']}
CHECKS = {  # ways to know every step whether training still goes well; each reads one number from the device
    'loss': lambda loss, gradients: math.isfinite(loss),
    'gradient': lambda loss, gradients: math.isfinite(torch.nn.utils.get_total_norm(gradients)),  # train.py's
}
HEADING = ('machine', 'dtype', 'layout', 'mode', 'flags')
NUMBERS = ('gflops', 'time_ratio', 'seconds', 'wall_seconds', 'peak_mib')
COLUMNS = (*HEADING, 'model', 'batch_size', 'image_size', 'variant', *NUMBERS, *(f'check_{name}' for name in CHECKS))
NOTES = '## Where the time goes'  # in the results, what follows it is written by hand and kept


class Step:
    """One training step of train.py on one batch of random images.

    Args:
        flags: Flags of train.py.

    Attributes:
        model: The model, neither compiled nor wrapped.
    """

    def __init__(self, flags):
        self.args, given, _ = config.parse_args(['--opt', 'momentum', '--lr', '0.001', *flags])
        self.accelerator = distributed.create_accelerator(self.args, given)
        self.device = self.accelerator.device
        self.model = build.create_model(self.args)
        self.args.num_classes = self.model.num_classes
        size = resolve_data_config(vars(self.args), model=self.model)['input_size']
        self.model = build.place_model(self.args, self.model, size, self.accelerator)
        self.task = build.create_task(self.args, self.model, self.accelerator)
        optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(cfg=self.args))
        if self.args.torchcompile:
            self.task.compile(backend=self.args.torchcompile)
        self.task.trainable_module, self.optimizer = self.accelerator.prepare(
            self.task.get_trainable_module(), optimizer)
        images = torch.randn(self.args.batch_size, *size, device=self.device)
        self.images = images.contiguous(
            memory_format=torch.channels_last if self.args.channels_last else torch.contiguous_format)
        self.target = torch.randint(self.model.num_classes, images.shape[:1], device=self.device)

    def synchronize(self):
        if self.device.type != 'cpu':
            torch.get_device_module(self.device).synchronize()

    def __call__(self, check=None):
        with sharding.autocast(self.accelerator):
            out = self.task(self.images, self.target)
        self.accelerator.backward(out['loss'])
        if check is not None:
            check(out['loss'].detach(), [p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gflops(self):
        """Forward GFLOPs of one image in training mode, a multiply-add counted as two, by module; '' is the model."""
        with torch.device('meta'):
            model = build.create_model(self.args).train()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(self.images.to('meta'))
        counts = {name.partition('.'): sum(found.values()) for name, found in counter.get_flop_counts().items()}
        return {
            path: count / len(self.images) / 1e9
            for (root, _, path), count in counts.items() if root == type(model).__name__}

    def peak_mib(self):
        """Most memory that tensors hold during a step: weights, optimizer state, batch, and what the step allocates."""
        held = [*self.model.state_dict().values(), self.images]
        held += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        grown = peak_growth(self, self.device.type)
        return grown + sum(t.nbytes for t in held) / 2 ** 20


def peak_growth(call, device):
    """MiB by which the memory that tensors hold grows at most during a call. On a CPU, from the profiler's record."""
    gc.collect()
    if device == 'cpu':
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        with tempfile.NamedTemporaryFile(suffix='.json') as file:
            found.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())['traceEvents']
        return max(e['args']['Total Allocated'] for e in events if e['name'] == '[memory]') / 2 ** 20
    device = torch.get_device_module(device)
    before = device.memory_allocated()
    device.reset_peak_memory_stats()
    call()
    return (device.max_memory_allocated() - before) / 2 ** 20


def take_turns(steps, rounds, repeats, synchronize):
    """(process time, wall time) in seconds of a call of each, by name and turn.

    Args:
        steps: Callables by name.
        rounds: Turns of each.
        repeats: Calls in a turn.
        synchronize: Waits for the device.
    """
    times = defaultdict(list)
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            start = time.process_time(), time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            times[name].append(((time.process_time() - start[0]) / repeats, (time.perf_counter() - start[1]) / repeats))
    return times


def best(times):
    """The least process time and the least wall time."""
    return tuple(map(min, zip(*times, strict=True)))


def check_costs(step, rounds, repeats):
    """Seconds that each of CHECKS adds to a step."""
    if step.device.type != 'cpu':  # the wait for a number leaves the device idle, which only whole steps show
        steps = {name: partial(step, check) for name, check in (('', None), *CHECKS.items())}
        times = take_turns(steps, rounds, repeats, step.synchronize)
        return {name: best(times[name])[1] - best(times[''])[1] for name in CHECKS}
    costs = {}

    def by_themselves(loss, gradients):
        checks = {name: partial(check, loss, gradients) for name, check in CHECKS.items()}
        costs.update((name, best(found)[0]) for name, found in take_turns(checks, 5, 5, step.synchronize).items())

    step(by_themselves)
    return costs


def make_step(setting, variant, args):
    """A step in a process of its own."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    flags = ['--model', setting['model'], '--batch-size', setting['batch_size'], '--img-size', setting['image_size']]
    flags += ['--amp', '--amp-dtype', 'bfloat16'] * (setting['dtype'] == 'bf16')
    flags += ['--channels-last'] * (setting['layout'] == 'channels_last')
    flags += ['--torchcompile'] * (setting['mode'] == 'compiled')
    branches = VARIANTS[variant] and [*VARIANTS[variant], *shlex.split(setting['flags'])]
    return Step([*flags, '--device', args.device, *branches])


def measure(setting, args):
    """Rows of the .csv for one setting."""
    steps = {variant: make_step(setting, variant, args) for variant in VARIANTS}
    on_cpu = args.device == 'cpu'
    for step in steps.values():
        for _ in range(2 if on_cpu else 10):
            step()
    rows = {variant: dict(**setting, variant=variant) for variant in VARIANTS}
    turns = dict(rounds=args.rounds, repeats=1 if on_cpu else 10)
    times = take_turns(steps, **turns, synchronize=steps['plain'].synchronize)
    for variant, found in times.items():
        seconds, wall = best(found)[not on_cpu], best(found)[1]
        ratios = [own[not on_cpu] / plain[not on_cpu] for own, plain in zip(found, times['plain'], strict=True)]
        rows[variant].update(
            time_ratio=f'{statistics.median(ratios):.4f}', seconds=f'{seconds:.6f}', wall_seconds=f'{wall:.6f}')
    for variant, step in steps.items():
        rows[variant].update(gflops=f'{step.gflops()[""]:.4f}', peak_mib=f'{step.peak_mib():.1f}')
    costs = check_costs(steps['DKS'], **turns)
    rows['DKS'].update((f'check_{name}', f'{seconds:.2e}') for name, seconds in costs.items())
    return list(rows.values())


def show_profile(setting, args):
    for variant in ('plain', 'DKS'):
        step = make_step(setting, variant, args)
        print(f'\n{setting["model"]}, {variant}, batch of {len(step.images)}')
        step_profile.show(step, args.rounds)


def describe_machine(device, threads):
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path('/proc/cpuinfo')
        known = re.search(r'model name\s*:\s*(.*)', info.read_text()) if info.exists() else None
        name = known[1] if known else platform.processor()
    packages = ', '.join(f'{package} {version(package)}' for package in ('torch', 'timm'))
    return f'{name}, {threads} of {os.cpu_count()} CPU threads, {packages}'


def report(rows, on_cpu):
    """Markdown: a table for every setting."""
    clock, checked = 'wall time', 'as what a step with it takes longer'
    memory = ''
    if on_cpu:
        clock, checked = 'process time of one thread', 'by itself, as nothing overlaps on a CPU'
        memory = ", by the profiler's record of allocations; scratch memory inside kernels is not in it"
    lines = [
        f'# A training step on a {"CPU" if on_cpu else "GPU"}', '',
        'Forward, loss, backward, and SGD with momentum. FLOPs are those of convolutions and matrix products in a '
        f'forward with branches over the plain one. Time is {clock} over that of the plain step of the same round, the '
        'median of the rounds of a run in which the variants take turns; "over FLOPs" is the ratio of times by the '
        'ratio of FLOPs, images/s are those of the fastest round by the same clock. Memory is the most that tensors '
        f'hold at once, weights and momentum included{memory}. DS is `--dks --dks-direction none`. The last columns '
        'are what it adds to a DKS step to read whether its loss, or the norm of its gradient, is finite; timed '
        f'{checked}.',
    ]
    tables = defaultdict(list)
    for plain, ds, dks in zip(*[iter(rows)] * 3, strict=True):
        ratios = {name: [float(row[name]) / float(plain[name]) for row in (ds, dks)] for name in NUMBERS}
        flops, times, seconds = ratios['gflops'][1], ratios['time_ratio'], float(dks['seconds'])
        cells = [plain['model'], f'{plain["batch_size"]} x {plain["image_size"]} px', f'{float(plain["gflops"]):.2f}']
        cells += [f'{x:.2f}' for x in (flops, *times, *(t / flops for t in times), ratios['peak_mib'][1])]
        cells += [f'{int(row["batch_size"]) / float(row["seconds"]):.3g}' for row in (plain, ds, dks)]
        cells += [f'{c * 1e6:.0f} µs, {c / seconds:.1%}' for c in (float(dks[f'check_{name}']) for name in CHECKS)]
        tables[tuple(plain[key] for key in HEADING)].append(f'| {" | ".join(cells)} |')
    for (machine, dtype, layout, mode, flags), body in sorted(tables.items()):
        lines += [
            '', f'## {dtype}, {layout}, {mode}' + f', `{flags}`' * bool(flags), '', machine + '.', '',
            '| model | batch | plain GFLOPs | FLOPs | time, DS | time, DKS | over FLOPs, DS | over FLOPs, DKS | memory '
            '| images/s, plain | DS | DKS | check of loss | of gradient |', '|---|---|' + '---:|' * 12, *body]
    return '\n'.join(lines) + '\n'


def create_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], epilog='Flags after -- go to train.py, for DS and DKS.')
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='MODEL', help=', '.join(MODELS))
    parser.add_argument('--batch-size', type=int, metavar='N', help='by model and device if not given')
    parser.add_argument('--img-size', type=int, metavar='N', help="the model's own if not given")
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32',
                        help='fp32 with TF32 where a GPU has it; bf16 by autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--all', action='store_true', help='every combination of the last three')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads: 1 when measuring a CPU, else all')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='turns of each variant')
    parser.add_argument('--profile', action='store_true', help='print where the time goes, and write nothing')
    parser.add_argument('--again', action='store_true', help='measure also what the .csv has')
    parser.add_argument('--results', type=Path, default=ROOT / 'results/speed', metavar='DIR')
    return parser


def settings(args, flags):
    """The settings to measure, with the names and values that they have in the .csv."""
    combinations = [(args.dtype, args.channels_last, args.compile)]
    if args.all:
        combinations = product(('fp32', 'bf16'), (False, True), (False, True))
    for (dtype, channels_last, compiled), model in product(combinations, args.models):
        batch_sizes = MODELS.get(model, (16, 128))
        yield dict(
            machine=describe_machine(args.device, args.threads),
            dtype=dtype,
            layout='channels_last' if channels_last else 'contiguous',
            mode='compiled' if compiled else 'eager',
            flags=shlex.join(flags),
            model=model,
            batch_size=str(args.batch_size or batch_sizes[args.device != 'cpu']),
            image_size=str(args.img_size or timm.get_pretrained_cfg(model).input_size[-1]),
        )


def in_own_process(function, *args):
    """Call a function where no other has left memory, precision or compiled code behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
    parser = create_parser()
    args = parser.parse_args(argv)
    for model in args.models:
        if not timm.is_model(model):
            parser.error(f'--models {model}: timm has no such model')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: is not on this machine; use --device cpu')
    args.threads = args.threads or (1 if args.device == 'cpu' else os.cpu_count())
    table = args.results / f'step-{args.device}.csv'
    for setting in settings(args, flags):
        if args.profile:
            in_own_process(show_profile, setting, args)
        elif args.again or not any(setting.items() <= row.items() for row in read(table)):
            new = [{key: row.get(key, '') for key in COLUMNS} for row in in_own_process(measure, setting, args)]
            rows = [row for row in read(table) if not setting.items() <= row.items()] + new
            rows.sort(key=lambda row: [row[key] for key in HEADING])
            write(table, rows, COLUMNS, report(rows, args.device == 'cpu'), NOTES)
            print(report(new, args.device == 'cpu'), flush=True)


def read(table):
    return list(csv.DictReader(table.open(newline=''))) if table.exists() else []


def write(table, rows, columns, page, notes):
    """Write a .csv, and next to it a page in Markdown.

    Args:
        page: Of the rows.
        notes: The heading from which on the page is written by hand, and kept.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open('w', newline='') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    path = table.with_suffix('.md')
    kept = ''.join(path.read_text().partition(notes)[1:]) if path.exists() else ''
    path.write_text(page + f'\n{kept}' * bool(kept))


if __name__ == '__main__':
    main()
