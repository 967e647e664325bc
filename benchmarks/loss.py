#!/usr/bin/env python3
"""Time and memory of the loss: DKSLoss against the pairs of classifiers one by one; forward and backward.

    python benchmarks/loss.py             # writes results/speed/loss-cpu.md, on a GPU loss-cuda.md

The forms of one and the same loss, unit weights, class indices:

    ours        DKSLoss
    compiled    DKSLoss under torch.compile
    kl_div      each pair by F.kl_div, on one log-softmax per classifier
    published   each pair by itself: two softmaxes, an epsilon of 1e-8 on both, as the authors' code has it

Every setting has a process of its own, in which the forms take turns.
"""
import argparse
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from step import ROOT, describe_machine, in_own_process, peak_growth

from dks_timm import DKSLoss
from dks_timm.training import distributed

# Classifiers, classes, batch size.
SETTINGS = ((3, 10, 256), (3, 1000, 64), (3, 1000, 256), (3, 1000, 1024), (3, 21841, 256), (6, 1000, 256))


def ours(logits, target):
    return DKSLoss()(logits, target)['loss']


def published(logits, target):
    """The sum over pairs as the authors' code forms it (wrn_DKS of github.com/sundw2014/DKS)."""
    epsilon = 1e-8
    smoothed = [(z.softmax(1) + epsilon) / (1 + epsilon * z.shape[1]) for z in logits]
    loss = sum(F.cross_entropy(z, target) for z in logits)
    for p, q in itertools.permutations(smoothed, 2):
        loss = loss + (p.detach() * (p.detach() / q).log()).sum(1).mean()
    return loss


def kl_div(logits, target):
    log_probs = [z.log_softmax(1) for z in logits]
    loss = sum(F.nll_loss(q, target) for q in log_probs)
    for p, q in itertools.permutations(log_probs, 2):
        loss = loss + F.kl_div(q, p.detach(), log_target=True, reduction='batchmean')
    return loss


def time_on_cpu(call):
    """Seconds that the calling thread computes."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def time_on_gpu(call):
    """Seconds between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(setting, device, rounds):
    """Milliseconds (median) and MiB beside logits and gradients of each form, by name."""
    classifiers, classes, batch_size = setting
    if device == 'cpu':
        torch.set_num_threads(1)
        distributed.keep_freed_memory()  # as train.py does
    logits = [(2 * torch.randn(batch_size, classes, device=device)).requires_grad_() for _ in range(classifiers)]
    target = torch.randint(classes, (batch_size,), device=device)
    forms = dict(ours=ours, compiled=torch.compile(ours, dynamic=False), kl_div=kl_div, published=published)
    losses = [form(logits, target).item() for form in forms.values()]
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=0.01, atol=0)  # the epsilon takes up to 0.1 %
    calls = {name: lambda form=form: torch.autograd.grad(form(logits, target), logits) for name, form in forms.items()}
    times = {name: [] for name in calls}
    timed = time_on_cpu if device == 'cpu' else time_on_gpu
    for turn in range(3 + rounds):
        for name, call in calls.items():
            seconds = timed(call)
            if turn >= 3:
                times[name].append(1e3 * seconds)
    gradients = sum(z.nbytes for z in logits) / 2 ** 20
    return {name: (statistics.median(times[name]), peak_growth(call, device) - gradients)
            for name, call in calls.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=20, metavar='N', help='turns of each form')
    args = parser.parse_args()
    clock = 'CPU time of one thread' if args.device == 'cpu' else 'Time on the GPU'
    names = ('ours', 'compiled', 'kl_div', 'published')
    lines = [
        f'# The loss on a {"CPU" if args.device == "cpu" else "GPU"}', '',
        'Forward and backward in float32, by `python benchmarks/loss.py`, which defines the forms. M classifiers, C '
        f'classes, a batch of B. {clock} in ms, the median of {args.rounds} turns, and the most memory in '
        'MiB that is held beside logits and gradients.', '', f'{describe_machine(args.device, 1)}.', '',
        f'| M | C | B | {" | ".join(f"{name}, {unit}" for unit in ("ms", "MiB") for name in names)} |',
        '|' + '---:|' * (3 + 2 * len(names))]
    for setting in SETTINGS:
        found = in_own_process(measure, setting, args.device, args.rounds)
        cells = [f'{x:,}' for x in setting] + [f'{found[name][i]:.3g}' for i in range(2) for name in names]
        lines.append(f'| {" | ".join(cells)} |')
        print(lines[-1], flush=True)
    ROOT.joinpath(f'results/speed/loss-{args.device}.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
