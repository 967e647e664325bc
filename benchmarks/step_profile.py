"""Where the time of a training step goes: what `step.py --profile` prints."""
import re
import resource
import time
from bisect import bisect_left
from collections import defaultdict

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode


class Clock(TorchDispatchMode):
    """Seconds of every operation of a step, by part of the model, way ('forward' or 'backward') and operation.

    Process time on a CPU, which other processes do not lengthen; on a GPU each operation is waited for. A part is a
    child of the backbone or of a branch, or of what it calls its stages or blocks. Autograd's numbers tell
    what part a backward operation belongs to.

    Args:
        step: The step to run under this mode.
    """

    def __init__(self, step):
        super().__init__()
        self.device = step.device
        self.now = time.process_time if self.device.type == 'cpu' else time.perf_counter
        self.times = defaultdict(float)
        self.running = []
        self.ends = []  # (number of its last node, part), ascending
        inner = r'(stages|blocks)\.\d+|(?!backbone$|branches$|template$|stages$|blocks$)\w+'
        part = re.compile(rf'(backbone\.|branches\.\d+\.(template\.)?)?({inner})')
        for name, module in [*step.model.named_modules(), ('loss', step.task.criterion)]:
            if part.fullmatch(name):
                module.register_forward_pre_hook(lambda module, args, name=name: self.running.append(name))
                module.register_forward_hook(self.leave)

    def leave(self, module, args, output):
        name = self.running.pop()
        output = output['loss'] if isinstance(output, dict) else output
        number = output.grad_fn._sequence_nr() if output.grad_fn is not None else -1
        if number > (self.ends[-1][0] if self.ends else -1):
            self.ends.append((number, name))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        node = torch._C._current_autograd_node()
        part = self.running[-1] if self.running else 'optimizer and rest'
        if node is not None:
            at = bisect_left(self.ends, (node._sequence_nr(), ''))
            part = self.ends[at][1] if at < len(self.ends) else 'optimizer and rest'
        start = self.now()
        output = func(*args, **(kwargs or {}))
        if self.device.type != 'cpu':
            torch.get_device_module(self.device).synchronize()
        self.times[part, 'forward' if node is None else 'backward', str(func.overloadpacket)] += self.now() - start
        return output


def show(step, rounds):
    """Print the times of a step's parts and operations, each the best of some rounds; on a GPU also those of kernels.

    On a CPU also what the system spends on memory: a page fault is a page that it hands out, filled with zeros.

    A compiled step has no parts left to tell apart: only its kernels are shown.
    """
    for _ in range(3):
        step()
    on_cpu = step.device.type == 'cpu'
    if on_cpu:
        before = resource.getrusage(resource.RUSAGE_SELF)
        step()
        user, system, faults = (
            getattr(resource.getrusage(resource.RUSAGE_SELF), name) - getattr(before, name)
            for name in ('ru_utime', 'ru_stime', 'ru_minflt'))
        print(f'a step: {user:.3f} s by the user, {system:.3f} s by the system, {faults} page faults')
    if step.args.torchcompile or not on_cpu:
        with profile() as found:
            step()
        print(found.key_averages().table(
            sort_by=f'self_{"cpu" if on_cpu else "device"}_time_total', row_limit=25, max_name_column_width=60))
    if step.args.torchcompile:
        return
    clock, best = Clock(step), {}
    for _ in range(rounds):
        clock.times.clear()
        clock.ends.clear()
        with clock:
            step()
        best = {key: min(seconds, best.get(key, seconds)) for key, seconds in clock.times.items()}
    parts, operations = defaultdict(lambda: defaultdict(float)), defaultdict(float)
    for (part, way, operation), seconds in best.items():
        parts[part][way] += seconds * 1e3
        operations[operation] += seconds * 1e3
    gflops = step.gflops()
    print(f'{"part":40}{"forward":>10}{"backward":>10} ms{"GFLOP":>9}{"GFLOP/s":>9}   (forward; rate: 3x that by time)')
    for part, ways in parts.items():
        count = gflops.get(part, 0.) * len(step.images)
        rate = f'{count:9.2f}{3e3 * count / sum(ways.values()):9.0f}' if count else ''
        print(f'{part:40}{ways["forward"]:10.2f}{ways["backward"]:10.2f}   {rate}')
    print()
    for operation, milliseconds in sorted(operations.items(), key=lambda item: -item[1])[:20]:
        print(f'{operation:40}{milliseconds:10.2f} ms')
    print(f'{"all":40}{sum(operations.values()):10.2f} ms')
