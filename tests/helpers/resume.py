"""Runs that are killed, and what they come to."""
import os

import numpy as np
import pytest
import torch
from helpers.train import main
from PIL import Image
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from dks_timm.training import loop


class Killed(BaseException):
    """Ends a run without a chance to do anything more."""


def noise_flags(root):
    """Flags of a run of 3 epochs of 5 batches of noise images, with augmentation; the images come into the folder."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(11):
                image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                image.save(root / split / str(label) / f'{i}.png')
    return [
        '--data-dir', root, '--num-classes', '2', '--img-size', '24', '--device', 'cpu', '-b', '4', '--lr', '0.05',
        '--warmup-epochs', '1', '--model', 'test_resnet', '--epochs', '3', '--workers', '0',
    ]


def run(folder, *argv):
    main(*argv, '--output', folder.parent, '--experiment', folder.name)


def run_killed(folder, *argv, when):
    """Start a run, and kill it when a checkpoint of that description has been written."""
    class Trainer(loop.Trainer):
        def _save(self, *args, **place):
            best = super()._save(*args, **place)
            if when.items() <= place.items():
                raise Killed
            return best

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, 'Trainer', Trainer)
        run(folder, *argv)


def plain(value):
    """A value that can be compared: tensors as their type and their bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def end(folder):
    """Return the end of a run: its last and best checkpoint without times and paths, summary.csv, file names."""
    found = {}
    for name in ('last', 'model_best'):
        checkpoint = load_checkpoint_metadata(folder / f'{name}.pth.tar')
        del checkpoint['args']
        found.update({f'{name} {key}': plain(value) for key, value in checkpoint.items()})
    return found, (folder / 'summary.csv').read_bytes(), sorted(os.listdir(folder))


def assert_same_end(whole, parts):
    (weights, summary, files), (weights2, summary2, files2) = end(whole), end(parts)
    assert summary == summary2
    for key in {**weights, **weights2}:
        assert weights[key] == weights2[key], key
    assert [f for f in files2 if not f.startswith('recovery')] == [f for f in files if not f.startswith('recovery')]
