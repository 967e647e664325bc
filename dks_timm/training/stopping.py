"""How a run ends before its time, and the signals that ask for it."""
import atexit
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Optional

import torch

from ..errors import erase_bar

# Exit codes of train.py besides 0, 1 (failed), 2 (bad input) and 3 (push failed).
UNSAVED = 4
NONFINITE = 5
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume auto goes on


class Fault(Exception):
    """The end of a run, said in one line.

    Args:
        message: What happened, and what would do.
        code: Exit code.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Signals:
    """Notices SIGTERM and SIGINT, and lets all processes agree to stop. A second signal ends this process at once.

    Args:
        accelerator: Of the processes.
        steps: Batches in an update.
    """
    AGREE = 10  # batches within which processes find out that one of them has been told to stop
    ECHO = 1.  # seconds within which a launcher may pass on what the process has got already

    def __init__(self, accelerator, steps: int):
        self.accelerator = accelerator
        self.every = max(1, self.AGREE // steps)
        self.received: Optional[int] = None
        self.group = None
        if accelerator.num_processes > 1:
            # The flag stays on the CPU, so no device has to be waited for.
            self.group = torch.distributed.new_group(backend='gloo')

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if self.accelerator.is_main_process:
                name = signal.Signals(number).name
                os.write(2, f'{erase_bar()}{name}: stopping after this step; once more ends at once.\n'.encode())
        elif time.monotonic() - self.since > self.ECHO:
            os._exit(128 + number)

    def stop(self, step: int) -> bool:
        """Whether to stop here. All processes call it with the same steps, and get the same answer."""
        if self.group is None:
            return self.received is not None
        if step % self.every:
            return False
        told = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(told)


class Peers:
    """Ends this process where another one dies, whatever it is waiting for: some collectives wait for the dead.

    Each process listens to the next one, which takes its leave at the end. A connection that closes before is that of a
    process that died. That ends the one that listened, and so on round all of them.

    Args:
        accelerator: Of the processes.
    """

    def __init__(self, accelerator):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        if self.count > 1:
            self.group = torch.distributed.new_group(backend='gloo', timeout=timedelta(days=3650))

    def __enter__(self):
        if self.count > 1:
            self.thread = threading.Thread(target=self._listen, args=((self.rank + 1) % self.count,), daemon=True)
            self.thread.start()
            atexit.register(self._die)
        return self

    def __exit__(self, kind, *exc):
        if self.count > 1 and (kind is None or issubclass(kind, Fault)):  # all of them come to the same end
            torch.distributed.send(torch.zeros(1), (self.rank - 1) % self.count, group=self.group)
            self.thread.join()
            atexit.unregister(self._die)

    def _die(self):
        """End a process that has not taken its leave, as the interpreter's own end may abort a thread that listens."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _listen(self, peer: int):
        try:
            torch.distributed.recv(torch.zeros(1), peer, group=self.group)
        except RuntimeError:
            os.write(2, f'Process {peer} has died, so process {self.rank} ends, too.\n'.encode())
            os._exit(1)
