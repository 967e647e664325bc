#!/usr/bin/env python3
"""What several processes exchange, what of it training waits for, and what training costs on many GPUs.

    python benchmarks/traffic.py                        # two processes; writes results/speed/traffic-cpu.md (-cuda.md)
    python benchmarks/traffic.py --model resnet50:224:128                     # on all GPUs of a machine
    python benchmarks/traffic.py --estimate             # the tables of docs/cost.md
    python benchmarks/traffic.py --estimate --images-per-second 900 550 --bandwidth 200 --network 40

The first wraps a model in DistributedDataParallel, with one setting after the other, in processes of its own. There,
steps that exchange gradients take turns with steps that do not (no_sync): the difference is what the exchange costs.
The second takes images/s of one GPU, plain and with DKS, as benchmarks/step.py measures them, and the bus bandwidths
that nccl-tests print for all-reduce, in one machine and between machines.
"""
import argparse
import json
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import describe_machine
from timm.task import ClassificationTask
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import dks_timm
from dks_timm.training import build, config

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    'default': {},  # 25 MiB
    'bucket_cap_mb=1': dict(bucket_cap_mb=1),
    'bucket_cap_mb=5': dict(bucket_cap_mb=5),
    'bucket_cap_mb=100': dict(bucket_cap_mb=100),
    'bucket_cap_mb=10000': dict(bucket_cap_mb=10000),  # one bucket: nothing overlaps
    'static_graph': dict(static_graph=True),
    'gradient_as_bucket_view': dict(gradient_as_bucket_view=True),
}
IMAGENET = 1_281_167  # training images
BACKWARD = 2 / 3  # of the arithmetic of a step
GPUS = (1, 8, 64)
PER_MACHINE = 8


def work(rank, args, dks, setting, folder):
    """One of the processes that take a setting's measure; the first writes it down."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device, rank) if args.device != 'cpu' else torch.device('cpu')
    if args.device != 'cpu':
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        'gloo' if args.device == 'cpu' else None, init_method=f'file://{folder}/store', rank=rank,
        world_size=args.processes)
    name, size, batch = args.model.split(':')
    torch.manual_seed(0)
    if dks:
        model = dks_timm.create_dks_model(name, num_classes=1000).to(device)
        task = dks_timm.DKSTask(model, device=device, verbose=False)
    else:
        model = timm.create_model(name, num_classes=1000).to(device)
        task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    task.trainable_module = ddp = DistributedDataParallel(
        model, device_ids=None if args.device == 'cpu' else [rank], **setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(int(batch), 3, int(size), int(size), device=device)
    target = torch.randint(1000, (int(batch),), device=device)

    def step(exchange):
        with nullcontext() if exchange else ddp.no_sync():
            task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure(run):
        """(wall seconds of the slowest process, CPU seconds of all)"""
        dist.barrier()
        start = time.perf_counter(), time.process_time()
        run()
        if args.device != 'cpu':
            torch.accelerator.synchronize()
        spent = torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]], device=device)
        wall, cpu = spent.clone(), spent.clone()
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
        return wall[0].item(), cpu[1].item()

    for _ in range(3):  # DDP makes its buckets anew after the first
        step(True)
    known = ddp._get_ddp_logging_data()
    size, buckets = known['total_parameter_size_bytes'], known['num_buckets_reduced']
    gradients = torch.zeros(size // 4, device=device)
    runs = dict(
        exchange=lambda: step(True), alone=lambda: step(False), all_reduce=lambda: dist.all_reduce(gradients))
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(measure(run))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device != 'cpu':
        memory = torch.accelerator.max_memory_allocated()
    if rank == 0:
        best = {name: [min(values) for values in zip(*found, strict=True)] for name, found in times.items()}
        Path(folder, 'found.json').write_text(json.dumps(dict(size=size, buckets=buckets, memory=memory, **best)))
    dist.destroy_process_group()


def measure(args, dks, setting):
    with tempfile.TemporaryDirectory() as folder:
        # A fork saves the imports of every process; CUDA does not survive it.
        method = 'fork' if args.device == 'cpu' else 'spawn'
        mp.start_processes(work, (args, dks, setting, folder), args.processes, start_method=method)
        return json.loads(Path(folder, 'found.json').read_text())


def table(args):
    """Markdown: one row for every setting, without and with branches."""
    name, size, batch = args.model.split(':')
    lines = [
        f'# What {args.processes} processes exchange', '',
        f'`python benchmarks/traffic.py{"".join(f" {a}" for a in sys.argv[1:])}` on '
        f'{describe_machine(args.device, args.threads)} for each process.', '',
        f'Steps of {name} at {size} px, batches of {batch} a process, under DistributedDataParallel with the setting. '
        f'Seconds are the best of {args.rounds}, of the slower process; "exposed" is what the exchange adds to a step, '
        'as a part of an all-reduce of the same bytes alone. CPU time is that of all processes, memory the most that '
        f'one held{", program and all" if args.device == "cpu" else " on its GPU"}.', '',
        '| | setting | gradients, MB | buckets | step alone, s | with exchange | all-reduce alone, s | exposed '
        '| CPU time | with exchange | memory, MiB |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    print(*lines, sep='\n')
    for name in args.settings:
        setting = SETTINGS[name]
        for dks in (False, True):
            found = measure(args, dks, setting)
            (alone, alone_cpu), (both, both_cpu), reduce = found['alone'], found['exchange'], found['all_reduce'][0]
            lines.append(
                f'| {"DKS" if dks else "plain"} | {name} | {found["size"] / 1e6:.1f} | {found["buckets"]} | '
                f'{alone:.3f} | {both / alone:.2f}x | {reduce:.3f} | {(both - alone) / reduce:.0%} | {alone_cpu:.2f} | '
                f'{both_cpu / alone_cpu:.2f}x | {found["memory"] / 2 ** 20:.0f} |')
            print(lines[-1], flush=True)
    return lines


class Costs:
    """What training takes by a recipe, plain (index 0) and with DKS (1).

    Attributes:
        parameters: Of the backbone, and of backbone and branches.
        gflops: Of the forward pass of an image, a multiply-add counted as two.
    """

    def __init__(self, recipe):
        self.args = config.parse_args(['--config', str(recipe), '--dks', '--num-classes', '1000'])[0]
        with torch.device('meta'):
            model = build.create_model(self.args)
            image = torch.empty(1, 3, self.args.img_size, self.args.img_size)
        self.parameters, self.gflops = [], []
        for part, forward in ((model.backbone, model.backbone), (model, model.exits)):
            self.parameters.append(sum(p.numel() for p in part.parameters()))
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                forward(image)
            self.gflops.append(counter.get_total_flops() / 1e9)

    @property
    def images(self):
        """Of the whole training."""
        return IMAGENET * self.args.epochs

    def rate(self, dks, tflops):
        """Images/s that so many TFLOP/s give: backward takes twice the arithmetic of forward."""
        return tflops * 1e3 / (3 * self.gflops[dks])

    def all_reduce(self, dks, gpus, bandwidth, network):
        """Seconds to exchange the float32 gradients of a step, at the bus bandwidth (GB/s) of what is slowest."""
        slowest = bandwidth if gpus <= PER_MACHINE else min(bandwidth, network)
        return self.moved(dks, gpus) / slowest

    def moved(self, dks, gpus):
        """GB that each GPU sends in an all-reduce of the gradients."""
        return 2 * (gpus - 1) / gpus * 4 * self.parameters[dks] / 1e9

    def hours(self, dks, gpus, rate, bandwidth, network):
        """Of the whole training, with as much of the exchange as fits behind the backward pass, and with none there."""
        step, exchange = self.args.batch_size / rate, self.all_reduce(dks, gpus, bandwidth, network)
        steps = self.images / (gpus * self.args.batch_size)
        return [steps * s / 3600 for s in (step + max(0., exchange - BACKWARD * step), step + exchange)]


def estimate(args, costs):
    """Markdown: what a step computes and exchanges, and how long training takes on 1, 8 and 64 GPUs."""
    lines = [
        '| | parameters | gradients, float32 | GFLOP of an image, forward | forward, backward | EFLOP of training |',
        '|---|---|---|---|---|---|',
    ]
    for name, count, gflops in zip(('plain', 'DKS'), costs.parameters, costs.gflops, strict=True):
        lines.append(
            f'| {name} | {count / 1e6:.1f} M | {4 * count / 1e6:.0f} MB | {gflops:.1f} | {3 * gflops:.1f} | '
            f'{3 * gflops * costs.images / 1e9:.1f} |')
    rates = args.images_per_second or [costs.rate(dks, args.tflops) for dks in (0, 1)]
    wire = dict(bandwidth=args.bandwidth, network=args.network)
    lines += [
        '', '| GPUs | | images/s of one | its step | all-reduce | hidden from | training, hours | over plain |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for gpus in GPUS:
        hours = [costs.hours(dks, gpus, rates[dks], **wire) for dks in (0, 1)]
        for dks, name in enumerate(('plain', 'DKS')):
            step = costs.args.batch_size / rates[dks]
            hidden = f'{costs.moved(dks, gpus) / (BACKWARD * step):.0f} GB/s' if gpus > 1 else ''
            ratios = [x / y for x, y in zip(hours[dks], hours[0], strict=True)]
            lines.append(
                f'| {gpus} | {name} | {rates[dks]:.0f} | {1e3 * step:.0f} ms | '
                f'{1e3 * costs.all_reduce(dks, gpus, **wire):.0f} ms | {hidden} | {to(hours[dks], "{:.2g}")} | '
                f'{to(ratios, "{:.2f}x") if dks else ""} |')
    return lines


def to(values, form):
    """A range, or one value where both ends look alike."""
    return ' to '.join(dict.fromkeys(form.format(v) for v in sorted(values)))


def create_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0].replace('\n', ' '))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    parser.add_argument('--model', default='resnet18:64:16', metavar='NAME:SIZE:BATCH', help='batch of one process')
    parser.add_argument('--processes', type=int, metavar='N', help='2 on a CPU, all GPUs')
    parser.add_argument('--settings', nargs='+', choices=SETTINGS, default=list(SETTINGS), metavar='NAME',
                        help=f'of DDP: {", ".join(SETTINGS)}')
    parser.add_argument('--rounds', type=int, default=12, metavar='N', help='turns of each kind of step')
    parser.add_argument('--threads', type=int, default=1, metavar='N', help='of each process')
    parser.add_argument('--results', type=Path, metavar='FILE', help='file to write')
    group = parser.add_argument_group('estimate')
    group.add_argument('--estimate', action='store_true', help='print what training costs, and stop')
    group.add_argument('--recipe', type=Path, default=ROOT / 'recipes' / 'paper_resnet152.yaml', metavar='FILE')
    group.add_argument('--images-per-second', type=float, nargs=2, metavar='X', help='of one GPU, plain and with DKS')
    group.add_argument('--tflops', type=float, default=100., metavar='X',
                       help='what a GPU keeps up in such a network, where images/s are not known')
    group.add_argument('--bandwidth', type=float, default=200., metavar='GB/s', help='bus bandwidth within a machine')
    group.add_argument('--network', type=float, default=10., metavar='GB/s', help='bus bandwidth between machines')
    return parser


def main():
    args = create_parser().parse_args()
    if args.estimate:
        print('\n'.join(estimate(args, Costs(args.recipe))))
        return
    args.processes = args.processes or (2 if args.device == 'cpu' else torch.accelerator.device_count())
    path = args.results or ROOT / 'results' / 'speed' / f'traffic-{args.device}.md'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(table(args)) + '\n')


if __name__ == '__main__':
    main()
