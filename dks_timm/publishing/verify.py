"""The check of an exported folder: a fresh process loads it, and its logits have to be the network's, bit for bit."""
import json
import logging
import subprocess
import sys
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import List

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from ..errors import ExportError
from ..method.create import create_dks_model
from ..method.model import DKSModel, prune
from ..models import ARCHITECTURES

__all__ = ['verify']

_logger = logging.getLogger(__name__)

_LOAD_BACK = Path(__file__).with_name('load_back.py')


def verify(net_or_model: nn.Module, model_dir: Path) -> None:
    """Check that timm loads a folder with the logits of the network that was written to it, for one random input.

    The logits are compared on the CPU in float32. transformers, where it is installed, is only worth a warning.

    Args:
        net_or_model: A timm model, or a DKSModel whose branches were written, too.
        model_dir: Folder with ``config.json`` and ``model.safetensors``. Beside it, two files are written.

    Raises:
        ExportError: If it cannot be loaded, or gives other logits.
    """
    input_size = json.loads((model_dir / 'config.json').read_text())['pretrained_cfg']['input_size']
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected, *of_branches = _logits(net_or_model, x)

    input_file, logits_file = model_dir.with_name('input.safetensors'), model_dir.with_name('logits.safetensors')
    save_file({'x': x}, input_file)
    needs_import = prune(net_or_model).pretrained_cfg['architecture'] in ARCHITECTURES
    loader = subprocess.run(
        [
            sys.executable, _LOAD_BACK, model_dir.absolute(), input_file.absolute(), logits_file.absolute(),
            '--threads', str(torch.get_num_threads()),
            '--matmul-precision', torch.get_float32_matmul_precision(),
            *(['--import-from', _LOAD_BACK.parents[2]] if needs_import else []),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if loader.returncode:
        reason = loader.stderr.strip().rpartition('\n')[-1]
        raise ExportError(f'The exported model was not kept, because timm cannot load it: {reason}')
    found = load_file(logits_file)
    if not _same(found['timm'], expected):
        raise ExportError(
            'The exported model was not kept, because timm loads it with other logits than it was exported with '
            f'(largest difference {(found["timm"] - expected).abs().max():.3g}). If it was changed after it was made, '
            'give the arguments that timm.create_model makes it with as model_args.'
        )
    if 'transformers cannot load it' in loader.stdout:
        _logger.warning(f'The exported model is for timm alone: {loader.stdout.strip()}')
    elif not _same(found.get('transformers', expected), expected):
        _logger.warning('The exported model is for timm alone: transformers loads it with other logits')
    if of_branches:
        with torch.random.fork_rng(devices=[]):
            _, *loaded = _logits(create_dks_model(f'local-dir:{model_dir}', pretrained=True), x)
        if not all(torch.equal(a, b) for a, b in zip(loaded, of_branches, strict=True)):
            raise ExportError('The exported model was not kept, because its branches load with other logits')


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _logits(model: nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    """Logits (B, num_classes) of every classifier of a copy of the model on the CPU, in float32 and eval mode."""
    copy = deepcopy(model).to('cpu', torch.float32).eval()
    for tensor in chain(copy.parameters(), copy.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # channels_last sums in another order
    for module in copy.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            module.init_non_persistent_buffers()  # tables that no file has: the cast must not leave them rounded
    with torch.inference_mode(), torch.autocast('cpu', enabled=False):
        return copy.exits(x) if isinstance(copy, DKSModel) else [copy(x)]
