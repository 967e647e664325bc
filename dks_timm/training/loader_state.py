"""Train loaders that another process can continue after any batch, bit for bit.

Random numbers of timm's loaders come from the main process (the order of images; erasing, one batch ahead; without
workers everything else, too) and from workers, whose state runs on from epoch to epoch. The state of a loader is: the
main process's random states from before each batch that the loop has not got yet, each worker's from after the last
batch that the loop got, and those that orders and seeds were drawn from. Reading it draws no random number.
"""
import random
from collections import deque
from itertools import chain, count, islice
from typing import Any, Dict, NamedTuple, Optional

import numpy as np
import torch
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .._compat import replace_batch_sampler, tree_map_only
from .device_data import DeviceLoader
from .stopping import outlive_signals


def random_state(device: Optional[torch.device] = None) -> tuple:
    """Return the states of Python's, numpy's and torch's generators, and of torch's on a device."""
    _, keys, *rest = np.random.get_state()
    there = () if device is None or device.type == 'cpu' else (torch.get_device_module(device).get_rng_state(),)
    return random.getstate(), (keys.view(np.uint8), *rest), torch.get_rng_state(), *there


def set_random_state(state: tuple, device: Optional[torch.device] = None) -> None:
    """Set the generators to a state, also one from a checkpoint, in which arrays are tensors, or from a worker."""
    python, (keys, *rest), here, *there = state
    random.setstate(python)
    np.random.set_state(('MT19937', np.asarray(keys).view(np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(here))
    if there and device is not None and device.type != 'cpu':
        torch.get_device_module(device).set_rng_state(there[0])


def packed(state: Any) -> Any:
    """Return a state with tensors for arrays, as torch.load(weights_only=True) takes no arrays."""
    return tree_map_only(np.ndarray, lambda array: torch.from_numpy(array.copy()), state)


def begin_epoch(args, loader, mixup_fn, epoch: int) -> None:
    """Let a train loader draw the order of an epoch, and end Mixup at --mixup-off-epoch."""
    sampler = loader.batch_sampler if hasattr(loader.batch_sampler, 'set_epoch') else loader.sampler
    for part in (loader.dataset, sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if args.prefetcher and getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False
        elif mixup_fn is not None:
            mixup_fn.mixup_enabled = False


class Fetch(NamedTuple):
    """A batch that has come from a loader."""
    random: tuple  # state of the main process before it
    worker: int  # the worker that made it
    before: Optional[tuple]  # random states that it sent with its batch before, None where this was its first


class Fetches:
    """The batches of a train loader as they come out of its DataLoader, before timm's prefetcher gets them.

    Stands in for the DataLoader, and has its attributes. ``memory`` is the number of batches to remember: those of an
    update, and those that a prefetcher is ahead.
    """

    def __init__(self, loader, device: torch.device, memory: int = 2):
        self.loader, self.device = loader, device
        self.stream = isinstance(loader.dataset, IterableDataset)
        self.multi_epochs = isinstance(loader, MultiEpochsDataLoader)
        self.num_workers = getattr(loader, 'num_workers', 0)
        self.order = None
        if not isinstance(loader, DeviceLoader):
            self.collate_fn = loader.collate_fn  # timm's prefetcher looks for Mixup in it
            loader.collate_fn = _Collate(loader.collate_fn, loader.dataset)
            loader.worker_init_fn = _StartWorker(loader.worker_init_fn)
            if self.multi_epochs:
                self.order = loader.batch_sampler.sampler = _Order(loader.batch_sampler.sampler)
            elif not self.stream:
                self.order = _Order(loader.batch_sampler)
                replace_batch_sampler(loader, self.order)
        self.resumed: Optional[Dict[str, Any]] = None  # a state to start from
        self.seeds: Optional[torch.Tensor] = None  # torch's state that the workers' seeds were drawn from
        self.workers_mix = True  # if workers mix, which is settled when they start
        self.workers: Dict[int, tuple] = {}  # random states that each sent with its last batch
        self.workers_before: Dict[int, tuple] = {}  # the same at the beginning of the epoch
        self.turn = 0  # the worker whose batch is the first of the epoch
        self.number = 0  # how many batches of the epoch have come
        self.fetched: deque = deque(maxlen=memory)
        self.asked, self.asked_at = 0, None  # number of the batch asked for last, and the random state then

    def __getattr__(self, name):
        return getattr(self.__dict__['loader'], name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        resumed, self.resumed = self.resumed, None
        if resumed is None and self.number:
            if self.order is not None:
                self.order.begun.popleft()
            if self.multi_epochs and self.num_workers:
                self.turn = (self.turn + len(self)) % self.num_workers
        self.workers_before = dict(self.workers)
        self.number = resumed['start'] if resumed else 0
        self.fetched.clear()
        iterator = self._start(resumed)
        states = []
        if resumed:
            self._pass_over(iterator, resumed)
            states = [*resumed['ahead'], resumed['random']] if resumed['begun'] else []
        for _ in range(len(self) - self.number) if self.multi_epochs else count():
            if states:
                set_random_state(states.pop(0), self.device)
            self.asked, self.asked_at = self.number, random_state(self.device)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield self._receive(batch)

    def _start(self, resumed):
        """Return an iterator over the batches of the epoch that are left, behind those that have to be passed over."""
        loader = self.loader
        if isinstance(loader, DeviceLoader):
            loader.start = self.number
            return iter(loader)
        if resumed:
            if self.order is not None:
                self.order.again, self.order.skip = deque(resumed['passes']), resumed['start']
                self.order.idle = resumed['turn']
            loader.worker_init_fn.sent = self.workers
            if not self.num_workers and 0 in self.workers:
                loader.dataset.set_random_state(self.workers[0][1])
        if not self.num_workers and not self.multi_epochs:
            return iter(loader)

        mixing = getattr(self.collate_fn, 'mixup_enabled', True)
        if self.seeds is None:
            self.seeds, self.workers_mix = torch.get_rng_state(), mixing
        elif resumed:
            # Of the run that is continued, workers and iterator were there already: nothing may be drawn for them.
            loader.generator = torch.Generator()
            loader.generator.set_state(self.seeds)
        if mixing != self.workers_mix:
            self.collate_fn.mixup_enabled = self.workers_mix
        if self.multi_epochs:
            if loader.iterator is None:
                loader.iterator = DataLoader.__iter__(loader)
            iterator = loader.iterator
        else:
            iterator = iter(loader)
        if mixing != self.workers_mix:
            self.collate_fn.mixup_enabled = mixing
        loader.generator = None
        return iterator

    def _pass_over(self, iterator, resumed):
        """Bring an iterator to where the epoch goes on."""
        if self.stream:  # there is no other way than to read once more
            for _ in range(resumed['start']):
                self._receive(next(iterator))
            self.number = resumed['start']
            self.fetched.clear()
        elif self.num_workers:
            for _ in range(resumed['turn']):  # empty batches, after which it is the right worker's turn
                next(iterator)

    def _receive(self, batch):
        """Take a batch, and note the worker that sent it and its random state."""
        worker, sent = 0, None
        if not isinstance(self.loader, DeviceLoader):
            batch, (worker, sent) = batch
        self.fetched.append(Fetch(self.asked_at, worker, self.workers.get(worker)))
        if sent is not None:
            self.workers[worker] = sent
        self.number += 1
        return batch

    def state(self, done: int, now: bool = False) -> Dict[str, Any]:
        """Return the state to continue from, with ``done`` batches over; not ``now`` if the loop has got one more."""
        if self.resumed is not None:  # no batch has come since
            return {**self.resumed, 'random': random_state(self.device)}
        over = done >= len(self)
        known = self.number if now else self.asked
        ahead, workers = [], dict(self.workers)
        for number in range(self.number - 1, done - 1, -1):
            fetch = self.fetched[number - self.number]
            workers[fetch.worker] = fetch.before
            if number < known:
                ahead.insert(0, fetch.random)
        if self.stream and not over:
            workers = self.workers_before
        first = self.turn + done if self.multi_epochs or not over else 0
        return dict(
            begun=not over,
            start=0 if over else done,
            ahead=ahead,
            random=random_state(self.device) if now else self.asked_at,
            workers={number: sent for number, sent in workers.items() if sent is not None},
            turn=first % max(1, self.num_workers),
            passes=[*self.order.begun, *self.order.again][over:] if self.order is not None else [],
            seeds=self.seeds,
            workers_mix=self.workers_mix,
        )

    def resume(self, state: Dict[str, Any]) -> None:
        """Start from a state that :func:`packed` returned."""
        self.resumed = state
        self.workers, self.seeds, self.workers_mix = state['workers'], state['seeds'], state['workers_mix']
        self.turn = (state['turn'] - state['start']) % max(1, self.num_workers) if self.multi_epochs else 0


class _Order:
    """A batch sampler that can start within passes over the dataset that another process began.

    Attributes:
        begun: torch's random states from which passes began that the loop is not through with.
        again: Such states of passes to begin again.
        idle: Number of empty batches to begin with.
        skip: Number of batches of the first pass to leave out.
    """

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler
        self.begun, self.again, self.idle, self.skip = deque(), deque(), 0, 0

    def __getattr__(self, name):
        return getattr(self.__dict__['batch_sampler'], name)

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for _ in range(self.idle):
            yield []
        skip, self.skip, self.idle = self.skip, 0, 0
        now = torch.get_rng_state()
        again = bool(self.again)
        if again:
            torch.set_rng_state(self.again[0])
        self.begun.append(self.again.popleft() if again else now)
        batches = iter(self.batch_sampler)
        first = next(batches)  # draws the order
        if again:
            torch.set_rng_state(now)
        yield from islice(chain([first], batches), skip, None)


class _Collate:
    """A collate function that sends the worker's random state along with a batch; a batch may be empty."""

    def __init__(self, collate_fn, dataset):
        self.collate_fn, self.dataset = collate_fn, dataset

    def __call__(self, batch):
        if isinstance(batch, list) and not batch:
            return None
        data = self.collate_fn(batch)
        info = get_worker_info()
        dataset = info.dataset if info else self.dataset
        own = dataset.random_state() if hasattr(dataset, 'random_state') else None
        sent = (random_state() if info else None, own) if info or own else None
        if info:  # a tensor would be sent as a file of its own
            sent = tree_map_only(torch.Tensor, torch.Tensor.numpy, sent)
        return data, (info.id if info else 0, sent)


class _StartWorker:
    """Starts a loader's worker as timm does, or with the random state that its predecessor sent last."""

    def __init__(self, init_fn):
        self.init_fn = init_fn
        self.sent: Dict[int, tuple] = {}

    def __call__(self, number: int):
        if self.init_fn is not None:
            self.init_fn(number)
        outlive_signals()
        if number in self.sent:
            state, own = self.sent[number]
            set_random_state(state)
            if own:
                get_worker_info().dataset.set_random_state(own)


def persistent_loader(loader) -> Optional[DataLoader]:
    """Return the DataLoader of an evaluation if it starts its workers only once, and let these outlive signals."""
    loader = getattr(loader, 'loader', loader)
    if not getattr(loader, 'persistent_workers', False):
        return None
    loader.worker_init_fn = _StartWorker(loader.worker_init_fn)
    return loader
