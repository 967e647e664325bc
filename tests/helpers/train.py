"""Run train.py in this process or in two, on images made here."""
import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image

import train

ROOT = Path(__file__).parents[2]


def main(*argv, script=train):
    """Run train.py, or a copy of it, in this process and leave no trace of it in there."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        script.main([str(a) for a in argv])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def two_processes(*argv):
    """Run train.py in two processes that torchrun connects over gloo."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    out = subprocess.run(
        [*launcher, ROOT / 'train.py', *map(str, argv)],
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr


def rows(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


def image_folder(root, classes=2, count=8, size=32):
    """Noise images in train/ and validation/, the same in both."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            for split in ('train', 'validation'):
                (root / split / str(label)).mkdir(parents=True, exist_ok=True)
                image.save(root / split / str(label) / f'{i}.png')
    return root
