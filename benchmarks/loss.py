#!/usr/bin/env python3
"""Time and memory of the loss: DKSLoss against the pairs of classifiers one by one; forward and backward.

    python benchmarks/loss.py             # writes results/speed/loss-cpu.md, on a GPU loss-cuda.md
    python benchmarks/loss.py --all       # every combination of classifiers, classes and batch size that fits in memory
    python benchmarks/loss.py --classifiers 3 --classes 1000 --batch-sizes 256 --again
    python benchmarks/loss.py --classifiers 3 --classes 1000 --batch-sizes 256 --profile  # where the time goes, printed

The forms of one and the same loss, unit weights, class indices:

    published   each pair by itself: two softmaxes, an epsilon of 1e-8 on both, as the authors' code has it
    kl_div      each pair by F.kl_div, on one log-softmax per classifier
    ours        DKSLoss; on a GPU its fused kernel
    plain       on a GPU: DKSLoss without that kernel
    compiled    DKSLoss under torch.compile
    copy        on a GPU: no loss, only its traffic: all logits read once, and as much written

Every setting has a process of its own, in which the forms take turns. Rows that the .csv has already are kept, so a run
that was stopped goes on; --again measures them anew.
"""
import argparse
import os
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from step import ROOT, describe_machine, in_own_process, peak_growth, read, write
from torch.profiler import profile

from dks_timm import DKSLoss, objective, processes

CLASSIFIERS, CLASSES, BATCH_SIZES = (2, 3, 4, 5, 6), (10, 1000, 21841), (64, 256, 1024)
HEADLINE = (3, 1000, 256)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
SETTING = ('machine', 'dtype', 'classifiers', 'classes', 'batch_size')
COLUMNS = (*SETTING, 'form', 'seconds', 'extra_mib')
NOTES = '## Notes'  # in the results, what follows it is written by hand and kept


def published(logits, target):
    """The sum over pairs as the authors' code forms it (wrn_DKS of github.com/sundw2014/DKS)."""
    epsilon = 1e-8

    def smoothed(z):
        return (z.float().softmax(1) + epsilon) / (1 + epsilon * z.shape[1])

    loss = sum(F.cross_entropy(z.float(), target) for z in logits)
    for teacher in logits:
        for student in logits:
            if teacher is not student:
                p, q = smoothed(teacher.detach()), smoothed(student)
                loss = loss + (p * (p / q).log()).sum(1).mean()
    return loss


def kl_div(logits, target):
    log_probs = [z.float().log_softmax(1) for z in logits]
    loss = sum(F.nll_loss(q, target) for q in log_probs)
    for teacher in log_probs:
        for student in log_probs:
            if teacher is not student:
                loss = loss + F.kl_div(student, teacher.detach(), log_target=True, reduction='batchmean')
    return loss


def ours():
    loss_fn = DKSLoss()
    return lambda logits, target: loss_fn(logits, target)['loss']


def plain():
    loss = ours()

    def without_kernels(*args):
        with mock.patch.object(objective, '_load_fused', lambda device: None):
            return loss(*args)

    return without_kernels


def create_forms(args):
    forms = dict(published=published, kl_div=kl_div, ours=ours())
    if args.device != 'cpu':
        forms['plain'] = plain()
    if args.compile:
        forms['compiled'] = torch.compile(ours(), fullgraph=True, dynamic=False)
    return forms


def time_on_cpu(call):
    """Seconds that the calling thread computes."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def time_on_gpu(call, repeats=10):
    """Seconds between two events around some calls, by call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def as_graph(call):
    """The same work as one CUDA graph, so that the GPU is timed and not Python."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def create_calls(setting, args):
    """Forward and backward of each form by name, and the logits of all."""
    torch.set_num_threads(args.threads)
    if args.device == 'cpu':
        processes.keep_freed_memory()  # as in train.py; pages fetched anew would be half the time of some forms
    shape = int(setting['batch_size']), int(setting['classes'])
    logits = [
        (2 * torch.randn(shape)).to(args.device, DTYPES[setting['dtype']]).requires_grad_()
        for _ in range(int(setting['classifiers']))]
    target = torch.randint(shape[1], shape[:1], device=args.device)
    forms = create_forms(args)
    losses = {name: form(logits, target).item() for name, form in forms.items()}
    if not all(abs(loss / losses['kl_div'] - 1) < 0.01 for loss in losses.values()):  # the epsilon takes up to 0.1 %
        raise SystemExit(f'The forms do not agree: {losses}')
    calls = {
        name: lambda form=form: torch.autograd.grad(form(logits, target), logits) for name, form in forms.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    return calls, logits


def show_profile(setting, args, count=50):
    """Print the time of each form where none takes turns with it, and what the operations of DKSLoss take."""
    calls, _ = create_calls(setting, args)
    on_cpu = args.device == 'cpu'
    for name, call in calls.items():
        seconds = min((time_on_cpu if on_cpu else time_on_gpu)(call) for _ in range(args.rounds))
        print(f'{name} by itself: {seconds * 1e3:.3g} ms')
    with profile() as found:
        for _ in range(count):
            calls['ours']()
    print(f'ours, {count} calls:')
    print(found.key_averages().table(
        sort_by=f'self_{"cpu" if on_cpu else "device"}_time_total', row_limit=20, max_name_column_width=40))


def measure(setting, args):
    """Rows of the .csv for one setting."""
    calls, logits = create_calls(setting, args)
    gradients = sum(z.nbytes for z in logits) / 2 ** 20
    memory = {name: f'{peak_growth(call, args.device) - gradients:.3f}' for name, call in calls.items()}
    timed = time_on_cpu
    if args.device != 'cpu':
        timed = time_on_gpu
        sources = [z.detach() for z in logits]
        copies = [torch.empty_like(z) for z in sources]
        calls['copy'] = lambda: [copy.copy_(z) for copy, z in zip(copies, sources, strict=True)]
        calls = {name: as_graph(call) for name, call in calls.items()}
    times = defaultdict(list)
    headline = (len(logits), *reversed(logits[0].shape)) == HEADLINE
    end = time.perf_counter() + args.seconds
    for turn in range(args.rounds):
        if turn >= 5 and not headline and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(timed(call))
    return [
        dict(**setting, form=name, seconds=f'{min(times[name]):.3e}', extra_mib=memory.get(name, ''))
        for name in calls]


def settings(args):
    """The settings to measure, with the names and values that they have in the .csv."""
    every = list(product(args.classifiers, args.classes, args.batch_sizes))
    if not (args.all or args.chosen):  # along one axis at a time
        every = [case for case in every if sum(a != b for a, b in zip(case, HEADLINE, strict=True)) <= 1]
    for dtype, (classifiers, classes, batch_size) in product(args.dtype, every):
        needed = 4 * batch_size * classes * classifiers * (3 * classifiers + 5)  # bytes, of the published form
        if needed > args.memory * 2 ** 30:
            print(f'{classifiers} x {batch_size} x {classes} takes {needed / 2 ** 30:.1f} GiB: left out, see --memory')
            continue
        yield dict(
            machine=describe_machine(args.device, args.threads), dtype=dtype, classifiers=str(classifiers),
            classes=str(classes), batch_size=str(batch_size))


def report(rows, on_cpu):
    """Markdown: a table for every machine and precision."""
    clock = 'CPU time of one thread' if on_cpu else 'time on the GPU of a CUDA graph, by events around ten replays'
    lines = [
        f'# The loss on a {"CPU" if on_cpu else "GPU"}', '',
        'Forward and backward of DKS with unit weights and class indices, by `python benchmarks/loss.py`, which also '
        f'defines the forms. M classifiers, C classes, a batch of B. Time is {clock}, the best of 40 rounds (fewer '
        'where they take long, never for M = 3, C = 1,000, B = 256), the forms taking turns. Memory is what a form '
        'needs beside the logits and their gradients: the most that tensors allocated meanwhile hold at once, less the '
        'gradients' + ", by the profiler's record; scratch memory inside kernels is not in it" * on_cpu
        + '. "over ours" is that form divided by ours.',
    ]
    tables = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        heading, case = (tuple(row[key] for key in keys) for keys in (SETTING[:2], SETTING[2:]))
        tables[heading][case][row['form']] = row
    for (machine, dtype), cases in tables.items():
        others = [name for name in ('published', 'kl_div', 'plain', 'compiled', 'copy') if any(
            name in forms for forms in cases.values())]
        for title, key, unit, factor in (('Time', 'seconds', 'ms', 1e3), ('Memory', 'extra_mib', 'MiB', 1.)):
            shown = [name for name in others if any(forms.get(name, {}).get(key) for forms in cases.values())]
            lines += [
                '', f'## {title}, {dtype}', '', machine + '.', '',
                f'| M | C | B | ours, {unit} | ' + ' | '.join(f'{name}, {unit} | over ours' for name in shown) + ' |',
                '|' + '---:|' * (4 + 2 * len(shown))]
            for case, forms in sorted(cases.items(), key=lambda item: [int(x) for x in item[0]]):
                found = {name: float(row[key]) for name, row in forms.items() if row[key]}
                cells = [*(f'{int(x):,}' for x in case), f'{factor * found["ours"]:.3g}']
                for name in shown:
                    value = found.get(name)
                    cells += ['', ''] if value is None else [f'{factor * value:.3g}', f'{value / found["ours"]:.2f}']
                lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def create_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--classifiers', type=int, nargs='+', metavar='M', help=f'{CLASSIFIERS} if not given')
    parser.add_argument('--classes', type=int, nargs='+', metavar='C', help=f'{CLASSES} if not given')
    parser.add_argument('--batch-sizes', type=int, nargs='+', metavar='B', help=f'{BATCH_SIZES} if not given')
    parser.add_argument('--all', action='store_true', help=f'all combinations, not only those that differ from '
                        f'{HEADLINE} in one number')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, help='of the logits; fp32, on a GPU also bf16')
    parser.add_argument('--no-compile', dest='compile', action='store_false', help='leave the compiled form out')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads: 1 when measuring a CPU, else all')
    parser.add_argument('--rounds', type=int, default=40, metavar='N', help='turns of each form')
    parser.add_argument('--seconds', type=float, default=20., metavar='S', help='after which 5 turns will do')
    parser.add_argument('--memory', type=float, default=4., metavar='GIB', help='settings that need more are left out')
    parser.add_argument('--profile', action='store_true', help='print where the time goes, and write nothing')
    parser.add_argument('--again', action='store_true', help='measure also what the .csv has')
    parser.add_argument('--results', type=Path, default=ROOT / 'results/speed', metavar='DIR')
    return parser


def main(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: is not on this machine; use --device cpu')
    on_cpu = args.device == 'cpu'
    args.threads = args.threads or (1 if on_cpu else os.cpu_count())
    args.dtype = args.dtype or (['fp32'] if on_cpu else ['fp32', 'bf16'])
    args.chosen = bool(args.classifiers or args.classes or args.batch_sizes)
    args.classifiers, args.classes, args.batch_sizes = (
        args.classifiers or CLASSIFIERS, args.classes or CLASSES, args.batch_sizes or BATCH_SIZES)
    table = args.results / f'loss-{args.device}.csv'
    for setting in settings(args):
        if args.profile:
            in_own_process(show_profile, setting, args)
        elif args.again or not any(setting.items() <= row.items() for row in read(table)):
            new = in_own_process(measure, setting, args)
            rows = [row for row in read(table) if not setting.items() <= row.items()] + new
            write(table, rows, COLUMNS, report(rows, on_cpu), NOTES)
            print(report(new, on_cpu), flush=True)


if __name__ == '__main__':
    main()
