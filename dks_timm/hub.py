"""Publishing: a trained network as a folder that plain timm loads, with its model card."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config, resolve_input_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_input_config, load_checkpoint, save_for_hf
from timm.utils import load_checkpoint_metadata, unwrap_model

from .build import create_model
from .model import DKSModel, prune
from .options import create_parser

__all__ = ['check_export_dir', 'eval_results', 'export', 'export_checkpoint', 'run_settings']

PathLike = Union[str, os.PathLike]

# In the order in which they are put in place: timm does not load a folder without config.json, so an interrupted
# replacement never looks like a model.
_FILES = ('model.safetensors', 'README.md', 'config.json')

# What a card can be given: fields of its metadata, and facts that the template shows.
_CARD_METADATA = ('base_model', 'datasets', 'language', 'license', 'license_link', 'license_name', 'tags')
_CARD_FACTS = ('branches', 'command', 'dks', 'model_name', 'repo_id', 'training')

# Flags that say nothing about how a model was trained, or only where its owner keeps things.
_HOUSEKEEPING = {
    'checkpoint_hist', 'data', 'data_dir', 'experiment', 'export_dir', 'log_interval', 'output', 'overwrite',
    'recovery_interval', 'resume', 'workers',
}

# What timm's pretrained_cfg says about the weights that timm publishes under an architecture's name.
_SOURCE_FACTS = ('description', 'license', 'notes', 'origin_url', 'paper_ids', 'paper_name', 'tag')

_LOAD_BACK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model_dir, x_file, logits_file, num_threads, precision = sys.argv[1:]
torch.set_num_threads(int(num_threads))
torch.set_float32_matmul_precision(precision)
model = timm.create_model('local-dir:' + model_dir, pretrained=True).eval()
with torch.inference_mode():
    save_file({'logits': model(load_file(x_file)['x']).contiguous()}, logits_file)
"""


def check_export_dir(out_dir: PathLike, overwrite: bool = False) -> Path:
    """Check that a model may be written to a folder, without writing anything.

    Args:
        out_dir: Folder to export to; it need not exist.
        overwrite: Whether a model that is already there may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If it is no folder, cannot be written to, or holds a model or a README.md already.
    """
    out_dir = Path(out_dir)
    existing = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(f'out_dir is {str(out_dir)!r}, but {str(existing)!r} is a file; choose another folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f'out_dir is {str(out_dir)!r}, which is not writable; choose another folder')
    if out_dir.is_dir() and not overwrite:
        found = [p.name for p in sorted(out_dir.iterdir()) if p.name in _FILES or p.suffix in ('.safetensors', '.bin')]
        if found:
            raise ValueError(
                f'out_dir {str(out_dir)!r} already holds {", ".join(found)}; choose another folder or set overwrite')
    return out_dir


def eval_results(metrics: Mapping[str, float], dataset: str, split: str = 'validation') -> List[EvalResult]:
    """Bring timm's evaluation metrics of an exported model into the form of a card's ``model-index``.

    Args:
        metrics: Metrics of the backbone's classifier, in percent; ``top1`` and ``top5`` are taken.
        dataset: Name of the dataset that they were measured on; of a path, its last part is taken.
        split: Its split.
    """
    if os.path.exists(dataset):
        dataset = os.path.basename(os.path.abspath(dataset))
    names = {'top1': 'Top-1 accuracy of the backbone (%)', 'top5': 'Top-5 accuracy of the backbone (%)'}
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type='accuracy',
            metric_name=name,
            metric_value=float(metrics[key]),
        )
        for key, name in names.items() if key in metrics
    ]


def run_settings(args: Mapping[str, Any]) -> Dict[str, Any]:
    """The flags of ``train.py`` by which a run differs from its defaults, for ``card={'training': ...}``.

    Args:
        args: The arguments of the run.
    """
    defaults = vars(create_parser().parse_args([]))
    return {k: v for k, v in args.items() if k in defaults.keys() - _HOUSEKEEPING and v != defaults[k]}


def export(
        out_dir: PathLike,
        net_or_model: nn.Module,
        *,
        card: Optional[Mapping[str, Any]] = None,
        model_args: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
        results: Optional[Sequence[EvalResult]] = None,
        overwrite: bool = False,
) -> Path:
    """Write a network's backbone as a folder for ``timm.create_model('local-dir:...', pretrained=True)``.

    The folder gets ``config.json``, ``model.safetensors`` and a model card, ``README.md``. Before they are put in
    place, a fresh process loads them with timm alone, and its logits have to equal the backbone's bit for bit (on the
    CPU, in float32, for a fixed random input). The network is left as it is. Weights keep their precision.

    Args:
        out_dir: Folder to write to, created if need be.
        net_or_model: A DKSModel, or a timm model; may be wrapped (DDP, ``torch.compile``, EMA).
        card: What to say in the card. Metadata: ``base_model``, ``datasets``, ``language``, ``license``,
            ``license_link``, ``license_name``, ``tags``. Facts: ``dks`` (whether it was trained with DKS) and
            ``branches`` (a table of the branches), both known of a DKSModel, ``command``, ``training`` (a mapping of
            settings and measurements), ``model_name`` (default: the folder's name), ``repo_id`` on the Hub.
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm records them itself; they are
            only needed for a model that was not made by ``create_model``.
        data_config: The run's preprocessing, as ``timm.data.resolve_data_config`` gives it (``input_size``, ``mean``,
            ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``); default: the model's ``pretrained_cfg``.
        label_names: Class names in the order of the classifier's outputs.
        results: What was measured with these weights, for the card; see :func:`eval_results`.
        overwrite: Replace a model that is already in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds a model already, or an argument does not fit.
        RuntimeError: If the loaded model is not the exported one. Nothing is written or replaced then.
    """
    out_dir = check_export_dir(out_dir, overwrite)
    net, model = unwrap_model(net_or_model), prune(net_or_model)
    card = dict(card or {})
    unknown = sorted(set(card) - {*_CARD_METADATA, *_CARD_FACTS})
    if unknown:
        accepted = ', '.join(sorted((*_CARD_METADATA, *_CARD_FACTS)))
        raise ValueError(f'card has {", ".join(map(str, unknown))}; it takes {accepted}')
    if label_names is not None and len(label_names) > model.num_classes:
        raise ValueError(f'label_names has {len(label_names)} names; the model has {model.num_classes} classes')
    if isinstance(net, DKSModel):
        card = {'dks': True, 'branches': net.describe(), **card}

    created = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        # Inside the folder, because that is the file system where the files have to end up.
        with tempfile.TemporaryDirectory(prefix='.export-', dir=out_dir) as work_dir:
            model_dir = Path(work_dir, 'model')
            _save(model, model_dir, model_args, data_config, label_names, card.get('license'))
            _verify(model, model_dir)
            _write_card(model, model_dir, card, results, out_dir.resolve().name)
            (out_dir / 'config.json').unlink(missing_ok=True)
            for name in _FILES:
                os.replace(model_dir / name, out_dir / name)
    finally:
        if created and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return out_dir


def export_checkpoint(
        checkpoint: PathLike,
        out_dir: PathLike,
        use_ema: bool = True,
        overwrite: bool = False,
) -> Path:
    """Export a training checkpoint, with the arguments of its run.

    Args:
        checkpoint: A checkpoint that ``train.py`` (or timm's) has written. It is never unpickled beyond plain data.
        out_dir: Folder to write to, see :func:`export`.
        use_ema: Take the averaged weights where the checkpoint has them.
        overwrite: Replace a model that is already in the folder.
    """
    check_export_dir(out_dir, overwrite)
    if not Path(checkpoint).is_file():
        raise ValueError(f'checkpoint is {str(checkpoint)!r}, but there is no such file')
    try:
        state = load_checkpoint_metadata(str(checkpoint))
    except (RuntimeError, EOFError) as e:
        raise ValueError(f'checkpoint {str(checkpoint)!r} cannot be read: {e}') from e
    if not isinstance(state, dict) or not isinstance(state.get('args'), argparse.Namespace):
        raise ValueError(f'checkpoint {str(checkpoint)!r} does not say how its model was made; give one of a run')
    args = {**vars(create_parser().parse_args([])), **vars(state['args'])}
    no_weights = {'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': ''}
    net = create_model(argparse.Namespace(**{**args, **no_weights}))
    load_checkpoint(prune(net), str(checkpoint), use_ema=use_ema, filter_fn=_without_aux_bn)
    return export(
        out_dir,
        net,
        card={'training': {**run_settings(args), 'epoch of the checkpoint (from 0)': state.get('epoch')}},
        data_config=resolve_data_config(args, model=net),
        overwrite=overwrite,
    )


def _without_aux_bn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Leave out the statistics that split BatchNorm keeps for training only."""
    return {k: v for k, v in state_dict.items() if '.aux_bn.' not in k}


def _plain_tensors(model: nn.Module, state_dict: Dict[str, Any], prefix: str, metadata: Dict[str, Any]):
    """State dict hook: what safetensors takes are contiguous tensors that share no memory (no tied weights)."""
    tensors = _without_aux_bn(state_dict, model)
    state_dict.clear()
    for name, tensor in tensors.items():
        state_dict[name] = tensor.to('cpu', copy=True, memory_format=torch.contiguous_format)


def _save(model, model_dir, model_args, data_config, label_names, license):
    pretrained_cfg = {k: None for k in _SOURCE_FACTS if model.pretrained_cfg.get(k)}
    if license:
        pretrained_cfg['license'] = license
    if data_config is not None:
        data_config = dict(data_config)
        # timm's resolve_data_config keeps three channels for a model of one; its loaders adapt mean and std.
        channels = get_model_input_config(model)['input_size'][0]
        if 'input_size' in data_config:
            data_config['input_size'] = (channels, *data_config['input_size'][1:])
        for key in {'mean', 'std'} & set(data_config):
            data_config[key] = tuple(adapt_to_chs(data_config[key], channels))
        # Complete, so that recommendations for timm's own weights (test size and crop) do not stay beside it.
        data_config.update(resolve_input_data_config(model, data_config))
    hook = model.register_state_dict_post_hook(_plain_tensors)
    try:
        save_for_hf(
            model,
            model_dir,
            model_config=dict(pretrained_cfg=pretrained_cfg, label_names=list(label_names or ())),
            model_args=dict(model_args or {}),
            safe_serialization=True,
            data_config=data_config,
        )
    finally:
        hook.remove()
    shutil.copymode(model_dir / 'config.json', model_dir / 'model.safetensors')  # safetensors makes it private


def _write_card(model, model_dir, card, results, folder_name):
    config = json.loads((model_dir / 'config.json').read_text())
    model_name = card.get('model_name') or folder_name
    metadata = {k: card[k] for k in _CARD_METADATA if k in card}
    if results:
        metadata.update(eval_results=list(results), model_name=model_name)
    metadata['tags'] = ['timm', *(['dks'] if card.get('dks') else []), *(card.get('tags') or [])]
    package = Path(__file__).parent
    # The template lies at the top of the project; a wheel carries it inside the package.
    template = next(p for p in (package / 'MODEL_CARD.md', package.parent / 'MODEL_CARD.md') if p.is_file())
    ModelCard.from_template(
        ModelCardData(library_name='timm', pipeline_tag='image-classification', **metadata),
        template_path=str(template),
        architecture=config['architecture'],
        num_classes=config['num_classes'],
        num_params=sum(p.numel() for p in model.parameters()),
        preprocessing=config['pretrained_cfg'],
        label_names=config.get('label_names'),
        results=results,
        source=f'hf-hub:{card["repo_id"]}' if card.get('repo_id') else f'local-dir:{folder_name}',
        **{k: card.get(k) for k in _CARD_FACTS if k != 'model_name'},
        title=model_name,
    ).save(model_dir / 'README.md')


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits (B, num_classes) of a copy of the model on the CPU, in float32 and eval mode."""
    copy = deepcopy(model).to('cpu', torch.float32).eval()
    for tensor in chain(copy.parameters(), copy.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # channels_last sums in another order
    for module in copy.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            module.init_non_persistent_buffers()  # tables that no file has: the cast must not leave them rounded
    with torch.inference_mode(), torch.autocast('cpu', enabled=False):
        return copy(x)


def _verify(model: nn.Module, model_dir: Path):
    input_size = json.loads((model_dir / 'config.json').read_text())['pretrained_cfg']['input_size']
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected = _logits(model, x)

    x_file, logits_file = model_dir.with_name('x.safetensors'), model_dir.with_name('logits.safetensors')
    save_file({'x': x}, x_file)
    loader = subprocess.run(
        [
            sys.executable, '-c', _LOAD_BACK, model_dir.absolute(), x_file.absolute(), logits_file.absolute(),
            # Both may change the order or the precision of sums.
            str(torch.get_num_threads()), torch.get_float32_matmul_precision(),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if loader.returncode:
        reason = loader.stderr.strip().rpartition('\n')[-1]
        raise RuntimeError(f'The exported model was not kept, because timm cannot load it: {reason}')
    loaded = load_file(logits_file)['logits']
    if loaded.shape != expected.shape or not torch.allclose(loaded, expected, rtol=0, atol=0, equal_nan=True):
        difference = (loaded - expected).abs().max().item() if loaded.shape == expected.shape else float('nan')
        raise RuntimeError(
            'The exported model was not kept, because timm loads it with other logits than it was exported with '
            f'(largest difference {difference:.3g}). If it was changed after it was made, '
            'give the arguments that timm.create_model makes it with as model_args.'
        )
