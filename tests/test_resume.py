"""A run that is killed and continued ends like one that was not: the same bits in its weights, the same summary.csv."""
import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.utils._pytree import tree_flatten

from dks_timm import engine
from test_train import main


class Killed(BaseException):
    """Ends a run without a chance to do anything more."""


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """Flags of a run of 3 epochs of 5 updates on 20 noise images, with augmentation."""
    root = tmp_path_factory.mktemp('noise')
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


@pytest.fixture
def kill(monkeypatch):
    """Let the run that comes next be killed after so many updates."""
    def after(updates):
        class Trainer(engine.Trainer):
            def _save(self, *args, **kwargs):
                result = super()._save(*args, **kwargs)
                if kwargs.get('updates') == updates:
                    raise Killed
                return result
        patch = pytest.MonkeyPatch()
        patch.setattr(engine, 'Trainer', Trainer)
        return patch
    return after


def run(folder, *argv):
    main(*argv, '--output', folder.parent, '--experiment', folder.name)


def end(folder):
    """What a run comes to: everything in its last checkpoint but times, and summary.csv."""
    checkpoint = load_checkpoint_metadata(folder / 'last.pth.tar')
    del checkpoint['args']
    leaves, structure = tree_flatten(checkpoint)
    leaves = [(str(x.dtype), x.tolist()) if torch.is_tensor(x) else x for x in leaves]
    return leaves, str(structure), (folder / 'summary.csv').read_bytes()


CASES = [
    '',
    '--workers 2 --reprob 0.5 --remode pixel',
]


@pytest.mark.parametrize('flags', CASES)
@pytest.mark.parametrize('updates', [3, 5, 7])
def test_resume(noise, tmp_path, kill, flags, updates):
    argv = [*noise, *flags.split(), '--recovery-interval', '1']
    run(tmp_path / 'whole', *argv)
    patch = kill(updates)
    with pytest.raises(Killed):
        run(tmp_path / 'parts', *argv)
    patch.undo()
    run(tmp_path / 'parts', *argv, '--resume', 'auto')
    whole, parts = end(tmp_path / 'whole'), end(tmp_path / 'parts')
    assert whole[2] == parts[2]
    assert whole == parts
