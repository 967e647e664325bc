import logging
import os
import random

# Before anything imports huggingface_hub: what a test does not serve itself must fail, not reach for the network.
os.environ['HF_HUB_OFFLINE'] = '1'
# Before anything imports torch: the models here are too small for threads, and several processes share the machine.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch
from helpers import bad_inputs


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A run in this process sets the root logger up for its console."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A case's own folder, where a run leaves no trace but in ``out``."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return bad_inputs.make_data(tmp_path)
