"""A trained network as a folder that plain timm loads, with its model card and, if asked, its branches."""
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from huggingface_hub import EvalResult
from safetensors.torch import load_file, save_file
from timm.data import resolve_input_data_config
from timm.utils import unwrap_model

from .._compat import save_config_for_hf
from ..errors import ExportError, InputError, why
from ..method.create import create_dks_model, plain_tensors, save_branches
from ..method.model import DKSModel, prune
from ..models import ARCHITECTURES
from ..training.console import TITLES
from ..training.flags import METRICS
from ..training.trained import load_trained
from .card import describe_run, write_card
from .push import FILES

_logger = logging.getLogger(__name__)

_LOAD_BACK = Path(__file__).with_name('load_back.py')
# Entries of timm's pretrained_cfg about the weights that timm publishes under an architecture's name.
_SOURCE_FACTS = ('description', 'license', 'notes', 'origin_url', 'paper_ids', 'paper_name', 'tag')


def check_export_dir(out_dir: Union[str, Path], overwrite: bool = False) -> None:
    """Check that a model may be written to a folder, without writing anything.

    Raises:
        ValueError: If it is no folder, cannot be written to, or holds a model already and ``overwrite`` is not set.
    """
    out_dir = Path(out_dir)
    existing = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f'out_dir {str(out_dir)!r}: {str(existing)!r} is a file, or not writable; choose another one')
    found = [name for name in FILES if (out_dir / name).exists()]
    if found and not overwrite:
        raise InputError(
            f'out_dir {str(out_dir)!r} already holds {", ".join(found)}; choose another folder or set overwrite')


def export(
        out_dir: Union[str, Path],
        net_or_model: nn.Module,
        *,
        card: Optional[Mapping[str, Any]] = None,
        model_args: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
        results: Optional[Sequence[EvalResult]] = None,
        keep_branches: bool = False,
        onnx: bool = False,
        overwrite: bool = False,
) -> Path:
    """Write a network's backbone as a folder for ``timm.create_model('local-dir:...', pretrained=True)``.

    The folder gets ``config.json``, ``model.safetensors`` and a model card, ``README.md``. Before they are put in
    place, a fresh process loads them with timm alone, and its logits have to equal the backbone's bit for bit (on the
    CPU, in float32, for a fixed random input). The network is left as it is. Weights keep their precision; the
    statistics that split BatchNorm keeps of augmented images are left out.

    Args:
        out_dir: Folder to write to, created if need be.
        net_or_model: A DKSModel, or a timm model; may be wrapped (DDP, ``torch.compile``, EMA).
        card: What to say in the card. Facts: ``dks`` (whether it was trained with DKS) and ``branches`` (a table of the
            branches), both known of a DKSModel, ``multi_label`` (probability of a label for F1, None of exclusive
            classes), ``command``,
            ``training`` (a mapping of settings and measurements), ``started_from`` (published weights),
            ``converted_from`` (name of a file), ``summary`` (the epochs, from
            :func:`dks_timm.runs.folder.read_summary`), ``baseline`` (from
            :func:`dks_timm.publishing.card.baseline`), ``model_name`` (default: architecture and data), ``repo_id`` on
            the Hub. All else is metadata for ``huggingface_hub.ModelCardData``: ``license``, ``datasets``, ...
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm records them itself; they are
            only needed for a model that was not made by ``create_model``.
        data_config: The run's preprocessing, as ``timm.data.resolve_model_data_config`` gives it (``input_size``,
            ``mean``, ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``); default: the model's ``pretrained_cfg``.
        label_names: Class names in the order of the classifier's outputs.
        results: What was measured with these weights, for the card; see :func:`dks_timm.publishing.card.eval_results`.
        keep_branches: Write a DKSModel's branches beside the backbone, ``branches.safetensors`` and
            ``dks_config.json``: :func:`dks_timm.create_dks_model` then brings the whole network back. For timm the
            folder is the same.
        onnx: Write ``model.onnx``, too: images (B, C, H, W) to the backbone's logits in float32, for any B. If the
            package onnxruntime is installed, its logits are compared with timm's.
        overwrite: Replace a model that is already in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds a model already, an argument does not fit, or ``onnx`` needs missing packages.
        RuntimeError: If the loaded model is not the exported one, or torch has no ONNX of the architecture. Nothing is
            written or replaced then.

    Example:
        >>> import timm, dks_timm
        >>> net = dks_timm.create_dks_model('test_resnet', num_classes=10)
        >>> folder = dks_timm.export('out/my_net', net)
        >>> type(timm.create_model(f'local-dir:{folder}', pretrained=True)).__name__  # without dks_timm, too
        'ResNet'
    """
    out_dir = Path(out_dir)
    check_export_dir(out_dir, overwrite)
    check_onnx(onnx)
    net, model = unwrap_model(net_or_model), prune(net_or_model)
    card = dict(card or {})
    if label_names is not None and len(label_names) > model.num_classes:
        raise InputError(f'label_names has {len(label_names)} names; the model has {model.num_classes} classes')
    if isinstance(net, DKSModel):
        card = {'dks': True, 'branches': net.describe(), **card}
    elif keep_branches:
        raise InputError(f'keep_branches needs a network with branches, not a {type(net).__name__}')

    with tempfile.TemporaryDirectory(prefix='dks-timm-') as work_dir:
        work_dir = Path(work_dir)
        _save(model, work_dir, model_args, data_config, label_names, card.get('license'))
        if keep_branches:
            save_branches(net, work_dir)
        verify(net if keep_branches else model, work_dir)
        if onnx:
            _write_onnx(work_dir)
        write_card(model, work_dir, card, results, out_dir.resolve().name)
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in reversed(FILES):  # config.json first, without which there is no model to load
            (out_dir / name).unlink(missing_ok=True)
        for name in FILES:
            if (work_dir / name).exists():
                shutil.copyfile(work_dir / name, out_dir / name)
    return out_dir


def _save(model, folder, model_args, data_config, label_names, license):
    """Write ``model.safetensors`` and ``config.json``, with nothing in it about the weights that timm publishes."""
    save_file(plain_tensors(model.state_dict()), folder / 'model.safetensors')
    config_file = folder / 'config.json'
    save_config_for_hf(
        model,
        config_file,
        model_config=dict(label_names=list(label_names or ())),
        model_args=dict(model_args or {}),
        data_config=data_config,
    )
    config = json.loads(config_file.read_text())
    for fact in _SOURCE_FACTS:
        config['pretrained_cfg'].pop(fact, None)
    if license:
        config['pretrained_cfg']['license'] = license
    # transformers gives create_model the number of classes, and would do so twice. timm reads it from the level above.
    config.get('model_args', {}).pop('num_classes', None)
    config_file.write_text(json.dumps(config, indent=2))


def verify(net_or_model: nn.Module, folder: Path) -> None:
    """Check that timm loads a folder with the logits of the network that was written to it, for one random input.

    The logits are compared on the CPU in float32; of a DKSModel, whose branches were written, too, those of all heads.

    Raises:
        ExportError: If it cannot be loaded, or gives other logits.
    """
    config = json.loads((folder / 'config.json').read_text())
    input_size, logits_file = config['pretrained_cfg']['input_size'], folder / 'logits'
    settings = [json.dumps(input_size), str(torch.get_num_threads()), torch.get_float32_matmul_precision()]
    if config['architecture'] in ARCHITECTURES:
        settings.append(str(_LOAD_BACK.parents[2]))
    command = [sys.executable, _LOAD_BACK, folder, logits_file, *settings]
    loader = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if loader.returncode:
        reason = loader.stderr.strip().rpartition('\n')[-1]
        raise ExportError(f'The exported model was not kept, because timm cannot load it: {reason}')
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected, *of_branches = _logits(net_or_model, x)
    found = load_file(logits_file)['logits']
    if not torch.equal(found, expected):
        raise ExportError(
            'The exported model was not kept, because timm loads it with other logits; if it was changed after it was '
            'made, give the arguments that timm.create_model makes it with as model_args')
    if of_branches:
        with torch.random.fork_rng(devices=[]):
            _, *loaded = _logits(create_dks_model(f'local-dir:{folder}', pretrained=True), x)
        if not all(torch.equal(a, b) for a, b in zip(loaded, of_branches, strict=True)):
            raise ExportError('The exported model was not kept, because its branches load with other logits')


def check_onnx(onnx: bool = True) -> None:
    """Raise ValueError where ONNX is wanted and a package that torch writes it with is missing."""
    missing = [name for name in ('onnx', 'onnxscript') if onnx and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {' and '.join(missing)}, not installed here; pip install 'dks-timm[onnx]'")


def _write_onnx(folder):
    """Write ``model.onnx``, for batches of any size, of what timm loads from a folder; compare it with onnxruntime."""
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    # Beside it, torch writes model.onnx.data for weights of more than 1.5 GB.
    path, generator = folder / 'model.onnx', torch.Generator().manual_seed(0)
    images = torch.randn(3, *model.pretrained_cfg['input_size'], generator=generator)
    try:
        torch.onnx.export(
            model, (images,), path, input_names=['images'], output_names=['logits'], dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim('batch')},), external_data=False)
    except RuntimeError as e:
        reason = why(e.__cause__ or e)
        raise ExportError(f'The exported model was not kept, because torch has no ONNX of it: {reason}') from e
    if importlib.util.find_spec('onnxruntime') is None:
        _logger.warning('model.onnx was not compared with the model: that needs the package onnxruntime')
        return
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (images, images[:1]):
        found = torch.from_numpy(session.run(None, {'images': batch.numpy()})[0])
        with torch.inference_mode():
            expected = model(batch)
        if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():  # not <=: NaN is other, too
            raise ExportError('The exported model was not kept, because model.onnx has other logits')


def _logits(model, x):
    """Return the logits (B, num_classes) of every classifier of a copy of the model, on the CPU and in float32."""
    copy = deepcopy(model).to('cpu', torch.float32).eval()
    for tensor in chain(copy.parameters(), copy.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # channels_last sums in another order
    for module in copy.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            module.init_non_persistent_buffers()  # tables that no file has: the cast must not leave them rounded
    with torch.inference_mode(), torch.autocast('cpu', enabled=False):
        return copy.exits(x) if isinstance(copy, DKSModel) else [copy(x)]


def export_checkpoint(
        checkpoint, out_dir, use_ema=True, keep_branches=False, license=None, baseline_dir=None, onnx=False,
        overwrite=False, without_ema=None):
    """Export a training checkpoint, with the arguments of its run and what its folder says about it.

    Args:
        checkpoint, use_ema: See :func:`dks_timm.training.trained.load_trained`.
        baseline_dir: Folder of another run to show beside this one in the card.
        without_ema: Top-1 accuracy or mAP (%) of the weights themselves in other checkpoints of the run, by path.

    Raises:
        ValueError: If the checkpoint is not one of a run, or an argument does not fit.
    """
    check_export_dir(out_dir, overwrite)
    check_onnx(onnx)
    net, args, state = load_trained(checkpoint, use_ema, with_branches=keep_branches)
    is_ema = use_ema and 'state_dict_ema' in state
    if 'state_dict_ema' in state:
        found = args.get('metric_by_ema') or {}
        others = is_ema and without_ema or {checkpoint: found.get(not is_ema)}
        _note_weights(is_ema, found.get(is_ema), others, TITLES[METRICS[args['task']][0]])
    # The run evaluated its average where it had one at hand; a recovery checkpoint lies between two evaluations.
    evaluated_ema = args['model_ema'] and not args['model_ema_force_cpu']
    metric = state.get('metric') if is_ema == evaluated_ema else None
    return export(
        out_dir,
        net,
        data_config=resolve_input_data_config(prune(net), args),
        keep_branches=keep_branches,
        onnx=onnx,
        overwrite=overwrite,
        **describe_run(args, Path(checkpoint).parent, state.get('epoch'), metric, license, baseline_dir),
    )


def _note_weights(is_ema, metric, others, title):
    """Log which weights of a run with an average are exported, with a warning if the others are better by a point.

    ``metric`` is theirs (%) and ``others`` that of the other kind by the path of its checkpoint, where known.
    """
    text = 'the average of the weights (--model-ema)' if is_ema else 'the weights themselves, not their average'
    path, other = max(others.items(), key=lambda item: item[1] or 0)
    if metric is not None and other is not None:
        text += f', with {metric:.2f} % {title}; the other has {other:.2f} %'
        if other > metric + 1:
            _logger.warning(f'Exported are {text}: dks-timm export {path} DIR{" --no-ema" * is_ema}')
            return
    _logger.info(f'Exported are {text}.')
