"""Small image datasets held on the training device as uint8, and augmented there in whole batches.

At the size of CIFAR a network is faster than the Python that decodes and crops its images one by one. Here they are
decoded once, by timm's own transforms; reflect pad, random crop, flips and normalization then take a few operations a
batch.
"""
import logging
import time
from typing import Sequence, Tuple

import numpy as np
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import adapt_to_chs, fast_collate
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

_logger = logging.getLogger(__name__)


class DeviceLoader:
    """Batches of a dataset that lies on the device, with the interface of timm's loaders.

    Order and augmentation of an epoch depend on the seed and on its number (``sampler.set_epoch``) alone: not on the
    device, the number of processes, or other draws of random numbers.

    Args:
        images: uint8 (N, C, H, W), decoded from ``dataset``.
        targets: (N,) or (N, num_classes).
        batch_size: Images a batch of this process, the ``rank``-th of ``world_size``.
        is_training: Shuffle, augment, and leave out a last batch that is not full.
        pad: Pixels of reflection on each side, out of which a crop of the image's own size is taken.
    """
    batch_sampler = None
    start = 0  # batches of the next epoch that are left out

    def __init__(
            self,
            dataset,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            is_training: bool,
            mean: Sequence[float],
            std: Sequence[float],
            pad: int = 0, hflip: float = 0., vflip: float = 0.,
            dtype: torch.dtype = torch.float32,
            seed: int = 0, rank: int = 0, world_size: int = 1,
    ):
        self.dataset, self.images, self.targets = dataset, images, targets
        self.batch_size, self.is_training = batch_size, is_training
        self.pad, self.hflip, self.vflip = pad, hflip, vflip
        self.dtype, self.seed = dtype, seed
        channels = images.shape[1]
        self.mean, self.std = (
            torch.tensor([255 * v for v in adapt_to_chs(values, channels)], dtype=dtype, device=images.device)
            .view(1, channels, 1, 1) for values in (mean, std))
        if is_training:
            self.sampler = DistributedSampler(dataset, world_size, rank, seed=_mix(seed))
        else:
            self.sampler = OrderedDistributedSampler(dataset, world_size, rank)

    def __len__(self):
        count = len(self.sampler)
        return count // self.batch_size if self.is_training else -(-count // self.batch_size)

    def __iter__(self):
        """Yield normalized images (B, C, H, W) and their targets."""
        device = self.images.device
        order = torch.tensor(list(self.sampler), device=device)
        moves = None
        if self.is_training and (self.pad or self.hflip or self.vflip):
            moves = [m.to(device) for m in self._draw(self.sampler.epoch)]
        batches = order.split(self.batch_size)[:len(self)]  # indices of images
        start, self.start = self.start, 0
        for index in batches[start:]:
            images = self.images[index] if moves is None else self._move(index, *(m[index] for m in moves))
            yield images.to(self.dtype).sub_(self.mean).div_(self.std), self.targets[index]

    def _draw(self, epoch: int):
        """Draw for each image the crop's top and left within the padded image, and whether to flip it: (N,) each."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        count = len(self.images)
        top, left = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        across, down = torch.rand(2, count, generator=generator)
        return top, left, across < self.hflip, down < self.vflip

    def _move(self, index, top, left, hflip, vflip):
        """Pad, crop and flip images by gathering every pixel from its place in the image."""
        _, channels, height, width = self.images.shape
        rows = _source(height, top - self.pad, vflip)
        columns = _source(width, left - self.pad, hflip)
        planes = torch.arange(channels, device=index.device)
        return self.images[
            index[:, None, None, None], planes[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _source(size: int, shift: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Return (B, size): the source index of each pixel of a line that is shifted, reflected at its ends and flipped."""
    line = torch.arange(size, device=shift.device)
    line = torch.where(flip[:, None], line.flip(0), line) + shift[:, None]
    return size - 1 - (size - 1 - line.abs()).abs()


def _mix(*numbers: int) -> int:
    """Return a seed of 32 bits, as torch takes it, made of several numbers; neighbouring ones give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def decode(dataset, transform, input_size: Tuple[int, int, int], device, workers: int, name: str):
    """Read a whole dataset of PIL images; return images, uint8 (N, C, H, W), and targets (N,), on the device."""
    start = time.monotonic()
    dataset.transform = transform
    # A generator of its own: the global random state is the same afterwards.
    loader = DataLoader(
        dataset, batch_size=256, num_workers=workers, collate_fn=fast_collate, generator=torch.Generator())
    images, targets = torch.empty(len(dataset), *input_size, dtype=torch.uint8), []
    for place, (batch, target) in zip(images.split(256), loader, strict=True):
        place.copy_(batch)
        targets.append(target)
    _logger.info(
        f'{name} on {device}: {len(images):,} images of {"x".join(map(str, input_size))}, {images.nbytes / 1e6:,.0f} '
        f'MB, decoded in {time.monotonic() - start:.1f} s'
    )
    return images.to(device), torch.cat(targets).to(device)
