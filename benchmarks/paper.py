#!/usr/bin/env python3
"""CIFAR-100 experiments: each network, method, seed and length is a run of train.py, continued where it stopped.

    python benchmarks/paper.py --list                             # every run, how far it is, and its command
    python benchmarks/paper.py --rows resnet20                    # with internet: torchvision fetches CIFAR-100
    python benchmarks/paper.py --data-dir CIFAR100                # all that is not finished yet, in the order of --list
    python benchmarks/paper.py --rows resnet20 --methods baseline dks --epochs 12 60 --seeds 0
    python benchmarks/paper.py --summarise

CIFAR100 is a folder of images, train/<class>/*.png and validation/<class>/*.png. Checkpoints go to --output, one line
of JSON an epoch to --results; a run whose lines are complete there is not run again, on whatever machine it was. A
second runner may be started beside a first, and takes other runs.
"""
import argparse
import csv
import fcntl
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import paper_tables
import psutil
from common import ROOT, processor
from paper_plan import METHODS, RECIPES, ROWS, Run, planned

KEPT = re.compile(r'lr|train_loss|train_ce_backbone|eval_loss|eval_top[15](_\w+)?')  # of the columns of summary.csv
PROGRESS = re.compile(r'Epoch (\d+) \[(\d+)/(\d+)\]')  # what train.py logs after the first and the last update


def arguments(args, run: Run):
    """Return the command that starts or continues a run, from the folder of train.py."""
    return [
        'train.py', '--config', from_root(RECIPES / f'{run.row}.yaml'),
        '--data-dir', from_root(data_dir(args, run.row)), '--seed', str(run.seed), *run.flags, *args.extra,
        '--output', from_root(args.output), '--experiment', run.name, '--resume', 'auto', '--checkpoint-hist', '1',
    ]


def data_dir(args, row: str) -> Path:
    """Return the folder of the images of a row."""
    if 'classes' in ROWS[row]:
        return Path(args.output, 'data', row)
    return Path(args.data_dir or Path(args.output, 'data', 'cifar100'))


def collect(run: Run, folder: Path, seconds, about) -> None:
    """Bring a run's lines up to date with its summary.csv.

    Args:
        folder: Of its checkpoints.
        seconds: Of an epoch's training, (wall clock, CPU time), by epoch.
        about: What else its lines say of these epochs: device and commit.
    """
    summary = folder / 'summary.csv'
    if not summary.exists():
        return
    old = {line['epoch']: line for line in run.lines()}
    lines = []
    with open(summary, newline='') as f:
        for row in csv.DictReader(f):
            line = dict(epoch=int(row.pop('epoch')))
            line.update((key, float(f'{float(value):.5g}')) for key, value in row.items() if KEPT.fullmatch(key))
            known = old.get(line['epoch'], {})
            if all(known.get(key) == value for key, value in line.items()):
                line = known  # with its timing
            if line['epoch'] in seconds:
                wall, cpu = seconds[line['epoch']]
                line.update(seconds=round(wall, 2), cpu_seconds=round(cpu, 2), **about)
            lines.append(line)
    if not lines:
        return
    run.results.parent.mkdir(parents=True, exist_ok=True)
    temporary = run.results.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    temporary.replace(run.results)


def from_root(path) -> str:
    """The path as seen from the folder of train.py, which is where runs are started."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Job:
    """A run under way. Reads what train.py logs, to know when epochs begin and end."""

    def __init__(self, run: Run, command, folder: Path, deadline: float, env, about):
        self.run, self.folder, self.deadline, self.about = run, folder, deadline, about
        self.seconds = {}
        self.stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / 'log.txt', 'a')
        fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second runner beside this one takes other runs
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self):
        usage = psutil.Process(self.process.pid)
        boundary = first = None
        for text in self.process.stdout:
            self.log.write(text)
            self.log.flush()
            match = PROGRESS.search(text)
            if match is None or self.stopped:
                continue
            epoch, update, updates = map(int, match.groups())
            now = time.monotonic()
            try:
                cpu = sum(usage.cpu_times()[:2])
            except psutil.Error:
                cpu = 0.
            if update == 1:
                # The checkpoint of the epoch before is complete: the place to stop.
                collect(self.run, self.folder, self.seconds, self.about)
                length = now - boundary if boundary else 0.
                if boundary and now + length > self.deadline:
                    self.stop()
                    continue
                boundary, first = now, (now, cpu)
            elif update == updates > 1 and first is not None:
                # The first update is not in it, so neither are evaluation, checkpoint and the start of the program.
                scale = updates / (updates - 1)
                self.seconds[epoch] = ((now - first[0]) * scale, (cpu - first[1]) * scale)

    def stop(self):
        """End it where it is; what is lost is the epoch that has begun."""
        self.stopped = True
        self.process.terminate()

    def poll(self):
        """None while it runs, then whether it went well."""
        if self.process.poll() is None:
            if time.monotonic() > self.deadline and not self.stopped:
                self.stop()
            return None
        self.thread.join()
        collect(self.run, self.folder, self.seconds, self.about)
        self.log.close()
        return self.stopped or self.process.returncode == 0


def download(folder: Path) -> None:
    """Have torchvision fetch CIFAR-100, and write it as a folder of images, named as its authors named them."""
    from PIL import Image
    from torchvision.datasets import CIFAR100
    if (folder / 'validation').is_dir():
        return
    source = CIFAR100(folder, download=True)  # checks the files' sums
    for split, file in (('train', 'train'), ('validation', 'test')):
        if (folder / split).is_dir():
            continue
        batch = pickle.loads(Path(folder, source.base_folder, file).read_bytes(), encoding='latin1')
        partial = folder / f'{split}.partial'
        for name in source.classes:
            (partial / name).mkdir(parents=True, exist_ok=True)
        for pixels, label, name in zip(batch['data'], batch['fine_labels'], batch['filenames'], strict=True):
            image = Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0))
            image.save(partial / source.classes[label] / name)
        partial.rename(folder / split)


def make_subset(source: Path, target: Path, classes: int, images: int) -> None:
    """Link the first classes by name, and of each its first training images by name and all for validation."""
    for name in sorted(p.name for p in (source / 'train').iterdir() if p.is_dir())[:classes]:
        for split, count in (('train', images), ('validation', None)):
            (target / split / name).mkdir(parents=True, exist_ok=True)
            for file in sorted((source / split / name).iterdir())[:count]:
                link = target / split / name / file.name
                if not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(file.resolve())


def execute(args, runs) -> int:
    """Run what is not finished, several at once, until all is done or time is up. Returns an exit code."""
    import torch
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    waiting = deque(run for run in runs if not run.finished)
    print(f'{len(runs) - len(waiting)} of {len(runs)} runs are finished.', flush=True)
    if waiting and not args.data_dir:
        args.data_dir = str(Path(args.output, 'data', 'cifar100'))
        download(Path(args.data_dir))
    for row in sorted({run.row for run in waiting if 'classes' in ROWS[run.row]}):
        make_subset(Path(args.data_dir), data_dir(args, row), ROWS[row]['classes'], ROWS[row]['images'])
    threads = os.environ.get('OMP_NUM_THREADS') or str(max(1, os.cpu_count() // args.jobs))
    env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONUNBUFFERED='1')
    device = f'cpu: {processor()} ({torch.backends.cpu.get_cpu_capability()}), threads {threads}'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name() + (f', {args.jobs} jobs' if args.jobs > 1 else '')
    commit = subprocess.run(['git', 'rev-parse', '--short=7', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    about = dict(device=device, commit=commit.stdout.strip())

    jobs, failed = [], []

    def interrupt(*_):
        waiting.clear()
        for job in jobs:
            job.stop()

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    while waiting or jobs:
        while waiting and len(jobs) < args.jobs and time.monotonic() < deadline:
            run = waiting.popleft()
            if run.finished:
                continue
            command = arguments(args, run)
            try:
                jobs.append(Job(run, command, Path(args.output, run.name).resolve(), deadline, env, about))
            except BlockingIOError:
                print(f'{time.strftime("%H:%M:%S")} {run.name}: under way already', flush=True)
            else:
                print(f'{time.strftime("%H:%M:%S")} {run.name}: {shlex.join(command)}', flush=True)
        if not jobs:
            break
        time.sleep(0.2)
        for job in list(jobs):
            well = job.poll()
            if well is None:
                continue
            jobs.remove(job)
            if job.stopped:
                waiting.clear()  # time is up
            lines = job.run.lines()
            state = f'{len(lines)} of {job.run.epochs} epochs'
            if lines:
                state += f', top-1 {lines[-1]["eval_top1"]:.2f}'
            print(f'{time.strftime("%H:%M:%S")} {job.run.name}: {state}' + ('' if well else ', failed'), flush=True)
            if not well:
                failed.append(job.run)
                print((job.folder / 'log.txt').read_text()[-1500:], file=sys.stderr, flush=True)
    if failed:
        print(f'failed: {", ".join(run.name for run in failed)}; see log.txt in {args.output}/<run>', file=sys.stderr)
        return 1
    return 0


def create_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        epilog='Arguments after -- go to train.py, for instance: -- --amp --amp-dtype bfloat16')
    parser.add_argument('--list', action='store_true', help='show the runs with their commands, and stop')
    parser.add_argument('--summarise', action='store_true', help='write tables and curves, and stop')
    parser.add_argument('--data-dir', metavar='DIR', help='CIFAR-100 as folders of images; default: a download')
    parser.add_argument('--rows', nargs='+', choices=ROWS, metavar='ROW', help=', '.join(ROWS))
    parser.add_argument('--methods', nargs='+', choices=METHODS, metavar='METHOD', help=', '.join(METHODS))
    parser.add_argument('--seeds', nargs='+', type=int, metavar='S')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at once')
    parser.add_argument('--minutes', type=float, metavar='N', help='stop after the last epoch that fits')
    parser.add_argument('--epochs', nargs='+', type=int, metavar='N', help='other lengths than the recipe\'s')
    parser.add_argument('--output', default=str(ROOT / 'output' / 'paper'), metavar='DIR', help='checkpoints and logs')
    parser.add_argument('--results', default=str(ROOT / 'results' / 'cifar100'), metavar='DIR', help='lines and tables')
    return parser


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    extra = []
    if '--' in argv:
        argv, extra = argv[:argv.index('--')], argv[argv.index('--') + 1:]
    parser = create_parser()
    args = parser.parse_args(argv)
    args.extra = extra
    if args.summarise:
        paper_tables.summarise(args.results)
        return 0
    runs = planned(args.results, args.rows, args.methods, args.seeds, args.epochs)
    if args.list:
        for run in runs:
            lines = len(run.lines())
            state = 'finished' if run.finished else f'{lines} of {run.epochs} epochs'
            command = shlex.join(arguments(args, run))
            print(f'{run.section:18} {run.method:14} seed {run.seed}  {state:18} python {command}')
        return 0
    if args.data_dir and not Path(args.data_dir, 'train').is_dir():
        parser.error(f'--data-dir {args.data_dir}: must be a folder with train/<class>/* and validation/<class>/*')
    return execute(args, runs)


if __name__ == '__main__':
    sys.exit(main())
