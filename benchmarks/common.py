"""Shared by the benchmarks: the machine's description, processes of their own, measurements in turns, tables."""
import gc
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for dks_timm and train.py, where they are not installed


def processor():
    """Return the CPU's name."""
    info = Path('/proc/cpuinfo')
    known = re.search(r'model name\s*:\s*(.*)', info.read_text()) if info.exists() else None
    return known[1] if known else platform.processor()


def versions(*packages):
    """Return the packages with their installed versions, separated by commas."""
    return ', '.join(f'{package} {version(package)}' for package in packages)


def describe_machine(device, threads):
    """Return a line that names the device, the CPU threads in use, and the versions of torch and timm."""
    name = processor() if device == 'cpu' else torch.cuda.get_device_name(device)
    return f'{name}, {threads} of {os.cpu_count()} CPU threads, {versions("torch", "timm")}'


def own_process():
    """Return an executor with one fresh process, free of what other measurements left behind."""
    return ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))


def read_clock(device):
    """Return seconds: of this process on a CPU, which other programs hardly lengthen, by the wall on a GPU."""
    if device == 'cpu':
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(calls, rounds, repeats, device):
    """Time several functions in turns, so that a busy moment of the machine meets all of them.

    Args:
        calls: Functions by name.
        rounds: Turns of each. One more comes first, to warm up, and is not timed.
        repeats: Calls in a turn.
        device: 'cpu' or 'cuda'.

    Returns:
        A list with the seconds of a call in each turn, by name.
    """
    times = {name: [] for name in calls}
    for turn in range(1 + rounds):
        for name, call in calls.items():
            start = read_clock(device)
            for _ in range(repeats):
                call()
            if turn:
                times[name].append((read_clock(device) - start) / repeats)
    return times


def peak_growth(call, device):
    """Return the MiB by which the memory of tensors grows at most during a call.

    On a CPU they are taken from the profiler's record of allocations.
    """
    gc.collect()
    if device == 'cpu':
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        with tempfile.NamedTemporaryFile(suffix='.json') as file:
            found.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())['traceEvents']
        return max(e['args']['Total Allocated'] for e in events if e['name'] == '[memory]') / 2 ** 20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def table(columns, rows, left=None):
    """Return the lines of a Markdown table.

    Args:
        columns: Titles.
        rows: Lists of cells.
        left: Number of columns that are aligned to the left; None aligns all of them there.
    """
    left = len(columns) if left is None else left
    rule = '|---' * left + '|---:' * (len(columns) - left) + '|'
    return [f'| {" | ".join(columns)} |', rule, *(f'| {" | ".join(map(str, row))} |' for row in rows)]
