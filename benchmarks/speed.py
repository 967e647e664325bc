#!/usr/bin/env python3
"""The cost of DKS in training: a step, the loss, and train.py around the step.

    python benchmarks/speed.py step        # time, memory and FLOPs of a step: plain, deep supervision (DS), DKS
    python benchmarks/speed.py loss        # DKSLoss beside the authors' published form, and F.kl_div pair by pair
    python benchmarks/speed.py loop        # images/s of train.py beside those of the step
    python benchmarks/speed.py step --dtype bf16 --channels-last --compile --models resnet50 convnext_tiny

Each writes results/speed/<part>-cpu.md, on a GPU <part>-cuda.md. A step is plain PyTorch: forward, loss, backward and
SGD with momentum on one batch of random images. What is compared takes turns within one process, and ratios are
medians over the turns. The step's rows are also in a .csv, where a new measurement of a row replaces the old one.
"""
import argparse
import csv
import io
import itertools
import logging
import os
import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import ROOT, describe_machine, own_process, peak_growth, read_clock, table, take_turns
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import dks_timm

MODELS = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224')
VARIANTS = ('plain', 'DS', 'DKS')
HEADING = ('machine', 'dtype', 'layout', 'mode', 'flags')
NUMBERS = ('gflops', 'time_ratio', 'seconds', 'peak_mib')
COLUMNS = (*HEADING, 'model', 'batch_size', 'image_size', 'variant', *NUMBERS)
AT_ONCE = dict(cpu=1, cuda=3)  # settings that are compiled side by side, before they are timed one by one
# Classifiers, classes, batch size.
LOSSES = ((3, 10, 256), (3, 1000, 64), (3, 1000, 256), (3, 1000, 1024), (3, 21841, 256), (6, 1000, 256))


class Step:
    """A training step on one batch of random images.

    Args:
        setting: A row's dtype, layout, mode, model, batch_size and image_size, as the .csv has them.
        variant: One of VARIANTS.
        args: Arguments of the command line.
    """

    def __init__(self, setting, variant, args):
        self.variant, self.device, self.budget = variant, args.device, args.dks_budget
        self.name, self.image_size = setting['model'], int(setting['image_size'])
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as train.py does
        layout = torch.channels_last if setting['layout'] == 'channels_last' else torch.contiguous_format
        self.model = self.create_model().to(self.device, memory_format=layout)
        if variant == 'plain':
            self.task = ClassificationTask(self.model, torch.nn.CrossEntropyLoss(), device=torch.device(self.device))
        else:
            loss = dks_timm.DKSLoss(direction='none' if variant == 'DS' else 'both')
            self.task = dks_timm.DKSTask(self.model, loss, device=torch.device(self.device))
        if setting['mode'] == 'compiled':
            self.task.compile()
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=setting['dtype'] == 'bf16')
        self.optimizer = create_optimizer_v2(self.model, 'momentum', lr=1e-3, weight_decay=2e-5)
        shape = (int(setting['batch_size']), 3, self.image_size, self.image_size)
        self.images = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.target = torch.randint(self.model.num_classes, shape[:1], device=self.device)

    def create_model(self):
        kwargs = resolve_model_input_args(self.name, dict(img_size=self.image_size))
        if self.variant == 'plain':
            return timm.create_model(**kwargs)
        return dks_timm.create_dks_model(**kwargs, budget=self.budget, image_size=(self.image_size, self.image_size))

    def __call__(self):
        with self.autocast:
            loss = self.task(self.images, self.target)['loss']
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gflops(self):
        """Return the GFLOPs of one image's forward in training mode; a multiply-add counts as two."""
        with torch.device('meta'):
            model = self.create_model().train()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(self.images.to('meta'))
        return counter.get_total_flops() / len(self.images) / 1e9

    def peak_mib(self):
        """Return the most memory that tensors hold during a step, weights and optimizer included."""
        held = [*self.model.state_dict().values(), self.images]
        held += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return peak_growth(self, self.device) + sum(t.nbytes for t in held) / 2 ** 20


STEPS = {}  # of this process


def prepare(setting, args):
    """Build the three variants, and compile and warm them by a first step."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    STEPS.update((variant, Step(setting, variant, args)) for variant in VARIANTS)
    for step in STEPS.values():
        step()
    if args.device != 'cpu':
        torch.cuda.empty_cache()  # for the processes beside this one


def measure_step(setting, args):
    """Return the rows of the .csv for a setting that was prepared in this process."""
    times = take_turns(STEPS, args.rounds, 1 if args.device == 'cpu' else 10, args.device)
    rows = []
    for variant, step in STEPS.items():
        ratios = [own / plain for own, plain in zip(times[variant], times['plain'], strict=True)]
        rows.append(dict(
            **setting, variant=variant, gflops=f'{step.gflops():.4f}', time_ratio=f'{statistics.median(ratios):.4f}',
            seconds=f'{min(times[variant]):.6f}', peak_mib=f'{step.peak_mib():.1f}'))
    return rows


def run_step(args):
    path = args.results / f'step-{args.device}.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = list(settings(args))
    while waiting:
        batch, waiting = waiting[:AT_ONCE[args.device]], waiting[AT_ONCE[args.device]:]
        with ExitStack() as stack:
            processes = [stack.enter_context(own_process()) for _ in batch]
            prepared = [p.submit(prepare, setting, args) for p, setting in zip(processes, batch, strict=True)]
            for future in prepared:
                future.result()
            for process, setting in zip(processes, batch, strict=True):
                new = process.submit(measure_step, setting, args).result()
                process.shutdown()  # and give its memory to the next
                rows = list(csv.DictReader(path.open(newline=''))) if path.exists() else []
                rows = [row for row in rows if not setting.items() <= row.items()] + new
                rows.sort(key=lambda row: [row[key] for key in HEADING])
                with path.open('w', newline='') as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
                    writer.writeheader()
                    writer.writerows(rows)
                path.with_suffix('.md').write_text(step_page(rows, args.device))
                print(*step_page(new, args.device).splitlines()[-3:], sep='\n', flush=True)


def step_page(rows, device):
    """Return the page of the step: a table for each machine, precision, layout and mode."""
    cpu = device == 'cpu'
    lines = [
        f'# A training step on a {"CPU" if cpu else "GPU"}', '',
        'By `python benchmarks/speed.py step`: forward, loss, backward, and SGD with momentum. FLOPs are those of '
        'convolutions and matrix products in a forward with branches over the plain one. Time is '
        f'{"process time of one thread" if cpu else "wall time"} over that of the plain step in the same turn, the '
        'median of all turns; "over FLOPs" is the ratio of times by the ratio of FLOPs. Images/s are those of the '
        'fastest turn. Memory is the most that tensors hold at once, weights and momentum included, over that of the '
        'plain step. DS is deep supervision: branches that learn the labels and teach nobody.',
    ]
    tables = defaultdict(list)
    for plain, ds, dks in zip(*[iter(rows)] * 3, strict=True):
        ratios = {name: [float(row[name]) / float(plain[name]) for row in (ds, dks)] for name in NUMBERS}
        flops, times = ratios['gflops'][1], ratios['time_ratio']
        cells = [plain['model'], f'{plain["batch_size"]} x {plain["image_size"]} px', f'{float(plain["gflops"]):.2f}']
        cells += [f'{x:.2f}' for x in (flops, *times, *(t / flops for t in times), ratios['peak_mib'][1])]
        cells += [f'{int(row["batch_size"]) / float(row["seconds"]):.3g}' for row in (plain, ds, dks)]
        tables[tuple(plain[key] for key in HEADING)].append(cells)
    columns = (
        'model', 'batch', 'plain GFLOPs', 'FLOPs', 'time, DS', 'time, DKS', 'over FLOPs, DS', 'over FLOPs, DKS',
        'memory', 'images/s, plain', 'DS', 'DKS')
    for (machine, dtype, layout, mode, flags), cells in sorted(tables.items()):
        title = f'## {dtype}, {layout}, {mode}' + f', `{flags}`' * bool(flags)
        lines += ['', title, '', f'{machine}.', '', *table(columns, cells, left=2)]
    return '\n'.join(lines) + '\n'


def ours(logits, target):
    return dks_timm.DKSLoss()(logits, target)['loss']


def published(logits, target):
    """Return the loss as the authors' code forms it: two softmaxes a pair, an epsilon on both (sundw2014/DKS)."""
    epsilon = 1e-8
    smoothed = [(z.softmax(1) + epsilon) / (1 + epsilon * z.shape[1]) for z in logits]
    loss = sum(F.cross_entropy(z, target) for z in logits)
    for p, q in itertools.permutations(smoothed, 2):
        loss = loss + (p.detach() * (p.detach() / q).log()).sum(1).mean()
    return loss


def kl_div(logits, target):
    """Return the loss by F.kl_div for each pair, on one log-softmax a classifier."""
    log_probs = [z.log_softmax(1) for z in logits]
    loss = sum(F.nll_loss(q, target) for q in log_probs)
    for p, q in itertools.permutations(log_probs, 2):
        loss = loss + F.kl_div(q, p.detach(), log_target=True, reduction='batchmean')
    return loss


def measure_loss(shape, args):
    """Return cells: milliseconds of each form, then the MiB that it holds beside logits and gradients."""
    torch.set_num_threads(args.threads)
    classifiers, classes, batch_size = shape
    logits = [(2 * torch.randn(batch_size, classes, device=args.device)).requires_grad_() for _ in range(classifiers)]
    target = torch.randint(classes, (batch_size,), device=args.device)
    forms = (ours, torch.compile(ours, dynamic=False), kl_div, published)
    losses = [form(logits, target).item() for form in forms]
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=0.01, atol=0)  # the epsilon takes up to 0.1 %
    calls = [lambda form=form: torch.autograd.grad(form(logits, target), logits) for form in forms]
    times = take_turns(dict(enumerate(calls)), 4 * args.rounds, 1 if args.device == 'cpu' else 20, args.device)
    gradients = sum(z.nbytes for z in logits) / 2 ** 20
    found = [1e3 * statistics.median(seconds) for seconds in times.values()]
    found += [peak_growth(call, args.device) - gradients for call in calls]
    return [f'{x:,}' for x in shape] + [f'{x:.3g}' for x in found]


def run_loss(args):
    names = ('ours', 'compiled', 'kl_div', 'published')
    columns = ['M', 'C', 'B', *(f'{name}, {unit}' for unit in ('ms', 'MiB') for name in names)]
    rows = []
    for shape in LOSSES:
        with own_process() as process:
            rows.append(process.submit(measure_loss, shape, args).result())
    write_page(args, 'loss', f'# The loss on a {args.device.upper()}', (
        'Forward and backward in float32, by `python benchmarks/speed.py loss`, which defines the forms. M '
        f'classifiers, C classes, a batch of B. {"CPU" if args.device == "cpu" else "Wall"} time in ms, the median of '
        f'{4 * args.rounds} turns, and the most memory in MiB that is held beside logits and gradients.'),
        table(columns, rows, left=0))


def measure_loop(setting, variant, args):
    """Return a row: train.py and the bare step take turns, some updates each, during an epoch of train.py."""
    import train

    torch.set_num_threads(args.threads)
    step = Step(setting, variant, args)
    updates = 4 if args.device == 'cpu' else 100  # many beside the batches that workers load during the other turn
    seconds, done, began = [], 0, None

    def take_turn(optimizer, *_):
        """Called after each step of an optimizer: at the end of a turn of train.py, let the bare step have its turn."""
        nonlocal done, began
        if optimizer is step.optimizer:
            return
        done += 1
        if done % updates:
            return
        ended = read_clock(args.device)
        for _ in range(updates):
            step()
        if began is not None:  # the first turn warms up
            seconds.append((ended - began, read_clock(args.device) - ended))
        began = read_clock(args.device)

    register_optimizer_step_post_hook(take_turn)
    size, batch = setting['image_size'], int(setting['batch_size'])
    flags = [
        '--model', setting['model'], '--img-size', size, '--batch-size', batch, '--device', args.device, '--opt',
        'momentum', '--lr', 0.001, '--dataset', 'synthetic', '--train-num-samples', batch * updates * (args.rounds + 1),
        '--val-split', '', '--epochs', 1, '--workers', 0 if args.device == 'cpu' else 8, '--log-interval', updates]
    flags += ['--amp', '--amp-dtype', 'bfloat16'] * (args.dtype == 'bf16') + ['--channels-last'] * args.channels_last
    flags += ['--torchcompile'] * args.compile + ['--dks'] * (variant == 'DKS')
    flags += ['--dks-budget', args.dks_budget] * (variant == 'DKS' and args.dks_budget is not None)
    with tempfile.TemporaryDirectory() as output, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        train.main([str(flag) for flag in [*flags, '--output', output]])
    ratios = sorted(bare / loop for loop, bare in seconds)
    loop, bare = (batch * updates / statistics.median(column) for column in zip(*seconds, strict=True))
    quarter = len(ratios) // 4
    return [
        setting['model'], size, batch, variant, f'{bare:.1f}', f'{loop:.1f}', f'{statistics.median(ratios):.3f}',
        f'{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}']


def run_loop(args):
    columns = ('model', 'size', 'batch', '', 'step, images/s', 'train.py, images/s', 'ratio', 'middle half')
    rows = []
    for setting, variant in itertools.product(settings(args), ('plain', 'DKS')):
        with own_process() as process:
            rows.append(process.submit(measure_loop, setting, variant, args).result())
        print(*rows[-1], sep=' | ', flush=True)
    write_page(args, 'loop', f'# train.py on a {args.device.upper()}', (
        f'By `python benchmarks/speed.py loop`, {setting["dtype"]}, {setting["layout"]}, {setting["mode"]}. Images/s '
        f'by {"process" if args.device == "cpu" else "wall"} time; ratio: those of train.py on synthetic data over '
        f'those of the bare step, the median of {args.rounds} turns, and their middle half.'),
        table(columns, rows, left=1))


def settings(args):
    """Yield the settings to measure, with the names and values that they have in the .csv."""
    for model in args.models:
        default = timm.get_pretrained_cfg(model).input_size[-1]
        for size in args.img_size or [default]:
            yield dict(
                machine=describe_machine(args.device, args.threads),
                dtype=args.dtype,
                layout='channels_last' if args.channels_last else 'contiguous',
                mode='compiled' if args.compile else 'eager',
                flags='' if args.dks_budget is None else f'--dks-budget {args.dks_budget}',
                model=model,
                batch_size=str(args.batch_size),
                image_size=str(size),
            )


def write_page(args, part, title, introduction, lines):
    text = [title, '', introduction, '', f'{describe_machine(args.device, args.threads)}.', '', *lines]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f'{part}-{args.device}.md').write_text('\n'.join(text) + '\n')
    print(*text, sep='\n')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('step', 'loss', 'loop'))
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='MODEL', help=f'timm names: {" ".join(MODELS)}')
    parser.add_argument('--batch-size', type=int, metavar='N', help='8 on a CPU, 128 on a GPU')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='N', help="one or more; the model's if not given")
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32', help='bf16 by autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--dks-budget', type=float, metavar='X', help='budget of the branches, for DS and DKS')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='turns of each variant; four times for loss')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads: 1 when measuring a CPU, else all')
    parser.add_argument('--results', type=Path, default=ROOT / 'results/speed', metavar='DIR')
    args = parser.parse_args()
    for model in args.models:
        if not timm.is_model(model):
            parser.error(f'--models {model}: timm has no such model')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: this machine has no CUDA device; use --device cpu')
    args.batch_size = args.batch_size or (8 if args.device == 'cpu' else 128)
    args.threads = args.threads or (1 if args.device == 'cpu' else os.cpu_count())
    # glibc hands memory back and fetches it anew otherwise, which train.py prevents.
    os.environ.setdefault('MALLOC_MMAP_MAX_', '0')
    os.environ.setdefault('MALLOC_TRIM_THRESHOLD_', '-1')
    dict(step=run_step, loss=run_loss, loop=run_loop)[args.part](args)


if __name__ == '__main__':
    main()
