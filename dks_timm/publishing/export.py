"""A trained network as a folder that plain timm loads, with its model card and, if asked, its branches."""
import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch.nn as nn
from huggingface_hub import EvalResult
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_input_config, load_checkpoint, save_for_hf
from timm.utils import load_checkpoint_metadata, unwrap_model

from ..errors import UNREADABLE, InputError, naming
from ..method.create import load_checkpoint_branches, plain_tensors, save_branches
from ..method.model import DKSModel, prune
from ..training.build import check_model_name, create_model
from ..training.checkpoint import holds_weights
from ..training.config import check_types, create_parser
from .card import FACTS, METADATA, describe_run, write_card
from .push import FILES
from .verify import verify

__all__ = ['check_export_dir', 'export', 'export_checkpoint']

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

# What timm's pretrained_cfg says about the weights that timm publishes under an architecture's name.
_SOURCE_FACTS = ('description', 'license', 'notes', 'origin_url', 'paper_ids', 'paper_name', 'tag')


def check_export_dir(out_dir: PathLike, overwrite: bool = False) -> Path:
    """Check that a model may be written to a folder, without writing anything, and return the folder.

    Args:
        out_dir: Folder to export to; it need not exist.
        overwrite: Accept that a model is already there, which an export would replace.

    Raises:
        ValueError: If it is no folder, cannot be written to, or holds a model or a README.md already.
    """
    out_dir = Path(out_dir)
    existing = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f'out_dir is {str(out_dir)!r}, but {str(existing)!r} is a file; choose another folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f'out_dir is {str(out_dir)!r}, which is not writable; choose another folder')
    if out_dir.is_dir() and not overwrite:
        found = [p.name for p in sorted(out_dir.iterdir()) if p.name in FILES or p.suffix in ('.safetensors', '.bin')]
        if found:
            raise InputError(
                f'out_dir {str(out_dir)!r} already holds {", ".join(found)}; choose another folder or set overwrite')
    return out_dir


def export(
        out_dir: PathLike,
        net_or_model: nn.Module,
        *,
        card: Optional[Mapping[str, Any]] = None,
        model_args: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
        results: Optional[Sequence[EvalResult]] = None,
        keep_branches: bool = False,
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
        card: What to say in the card. Metadata: ``base_model``, ``base_model_relation``, ``datasets``, ``language``,
            ``license``, ``license_link``, ``license_name``, ``tags``. Facts: ``dks`` (whether it was trained with DKS)
            and ``branches`` (a table of the branches), both known of a DKSModel, ``command``, ``training`` (a mapping
            of settings and measurements), ``started_from`` (published weights), ``summary`` (the epochs, from
            :func:`dks_timm.runs.folder.read_summary`), ``baseline`` (from
            :func:`dks_timm.publishing.card.baseline`), ``model_name``
            (default: the name of the repository, without one architecture and data), ``repo_id`` on the Hub.
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm records them itself; they are
            only needed for a model that was not made by ``create_model``.
        data_config: The run's preprocessing, as ``timm.data.resolve_data_config`` gives it (``input_size``, ``mean``,
            ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``); default: the model's ``pretrained_cfg``.
        label_names: Class names in the order of the classifier's outputs.
        results: What was measured with these weights, for the card; see :func:`dks_timm.publishing.card.eval_results`.
        keep_branches: Write a DKSModel's branches beside the backbone, ``branches.safetensors`` and
            ``dks_config.json``: :func:`dks_timm.create_dks_model` then brings the whole network back. For timm the
            folder is the same.
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
    unknown = sorted(set(card) - {*METADATA, *FACTS})
    if unknown:
        accepted = ', '.join(sorted((*METADATA, *FACTS)))
        raise InputError(f'card has {", ".join(map(str, unknown))}; it takes {accepted}')
    if label_names is not None and len(label_names) > model.num_classes:
        raise InputError(f'label_names has {len(label_names)} names; the model has {model.num_classes} classes')
    if isinstance(net, DKSModel):
        card = {'dks': True, 'branches': net.describe(), **card}
    elif keep_branches:
        raise InputError(f'keep_branches needs a network with branches, not a {type(net).__name__}')

    created = not out_dir.exists()
    with naming(f'out_dir {str(out_dir)!r}', OSError):
        out_dir.mkdir(parents=True, exist_ok=True)
    try:
        # Inside the folder, because that is the file system where the files have to end up.
        with tempfile.TemporaryDirectory(prefix='.export-', dir=out_dir) as work_dir:
            model_dir = Path(work_dir, 'model')
            _save(model, model_dir, model_args, data_config, label_names, card.get('license'))
            if keep_branches:
                save_branches(net, model_dir)
            verify(net if keep_branches else model, model_dir)
            write_card(model, model_dir, card, results, out_dir.resolve().name, has_branches=keep_branches)
            mode = (model_dir / 'config.json').stat().st_mode
            (out_dir / 'config.json').unlink(missing_ok=True)
            for name in FILES:
                if (model_dir / name).exists():
                    (model_dir / name).chmod(mode)  # safetensors makes its files private
                    os.replace(model_dir / name, out_dir / name)
                else:
                    (out_dir / name).unlink(missing_ok=True)
    finally:
        if created and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return out_dir


def export_checkpoint(
        checkpoint: PathLike,
        out_dir: PathLike,
        use_ema: bool = True,
        *,
        keep_branches: bool = False,
        license: Optional[str] = None,
        baseline_dir: Optional[PathLike] = None,
        repo_id: Optional[str] = None,
        overwrite: bool = False,
        top1_without_ema: Optional[Mapping[str, float]] = None,
) -> Path:
    """Export a training checkpoint, with the arguments of its run and what its folder says about it.

    Args:
        checkpoint: A checkpoint that ``train.py`` (or timm's) has written. It is never unpickled beyond plain data.
        out_dir: Folder to write to, see :func:`export`.
        use_ema: Take the averaged weights where the checkpoint has them.
        keep_branches: See :func:`export`.
        license: License of the weights, for the card.
        baseline_dir: Folder of another run to show beside this one in the card.
        repo_id: Repository on the Hub that the card is for.
        overwrite: Replace a model that is already in the folder.
        top1_without_ema: Accuracy (%) of the weights themselves in this and other checkpoints of the run, by path. If
            not given, that of this checkpoint counts.

    Returns:
        The folder.

    Raises:
        ValueError: If the checkpoint is not one of a run, or an argument does not fit.
    """
    check_export_dir(out_dir, overwrite)
    state, args = _read_checkpoint(checkpoint, use_ema)
    net = create_model(argparse.Namespace(**{
        **args, 'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': ''}))
    with naming(f'checkpoint {str(checkpoint)!r}', RuntimeError):  # what torch raises for weights of another model
        # Without the statistics that split BatchNorm keeps for training only.
        load_checkpoint(prune(net), str(checkpoint), use_ema=use_ema, filter_fn=lambda state, _: plain_tensors(state))
        if keep_branches and isinstance(net, DKSModel):
            load_checkpoint_branches(net, str(checkpoint), use_ema)
    # The run evaluated its average where it had one at hand; a recovery checkpoint lies between two evaluations.
    evaluated_ema = args['model_ema'] and not args['model_ema_force_cpu']
    is_ema = use_ema and 'state_dict_ema' in state
    if 'state_dict_ema' in state:
        top1 = args.get('top1_by_ema') or {}
        others = (is_ema and top1_without_ema) or {checkpoint: top1.get(not is_ema)}
        _note_weights(is_ema, top1.get(is_ema), others)
    described = describe_run(
        args,
        Path(checkpoint).parent,
        state.get('epoch'),
        metric=state.get('metric') if is_ema == evaluated_ema else None,
        license=license,
        baseline_dir=baseline_dir,
    )
    described['card']['repo_id'] = repo_id
    return export(
        out_dir,
        net,
        data_config=resolve_data_config(args, model=net),
        keep_branches=keep_branches,
        overwrite=overwrite,
        **described,
    )


def _read_checkpoint(checkpoint: PathLike, use_ema: bool) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return a checkpoint's content and the arguments of its run, both checked; see :func:`export_checkpoint`."""
    subject = f'checkpoint {str(checkpoint)!r}'
    if not Path(checkpoint).is_file():
        raise InputError(f'checkpoint is {str(checkpoint)!r}, but there is no such file')
    with naming(f'{subject} cannot be read', *UNREADABLE):
        state = load_checkpoint_metadata(str(checkpoint))
    if not isinstance(state, dict) or not isinstance(state.get('args'), argparse.Namespace):
        raise InputError(f'{subject} does not say how its model was made; give one of a run')
    args = {**vars(create_parser().parse_args([])), **check_types(subject, vars(state['args']))}
    check_model_name(args['model'], f'{subject}: model')
    if not holds_weights(state, ema=use_ema):
        raise InputError(f'{subject} holds no weights by name; give one of a run')
    return state, args


def _note_weights(is_ema: bool, top1: Optional[float], others: Mapping[str, Optional[float]]) -> None:
    """Log which weights of a run with an average are exported, with a warning if the others are better.

    Args:
        is_ema: The average is exported.
        top1: Accuracy (%) of what is exported, None if that is not known.
        others: Accuracy of what is not, by the path of its checkpoint.
    """
    text = 'the average of the weights (--model-ema)' if is_ema else 'the weights themselves, not their average'
    path, other = max(others.items(), key=lambda item: item[1] or 0.)
    if top1 is None or other is None:
        _logger.info(f'Exported are {text}.')
        return
    text = f'Exported are {text}, with {top1:.2f} % top-1; the other has {other:.2f} %'
    if other > top1 + 1:
        _logger.warning(f'{text}: dks-timm export {path} DIR{" --no-ema" * is_ema}')
    else:
        _logger.info(f'{text}.')


def _make_plain(model: nn.Module, state_dict: Dict[str, Any], prefix: str, metadata: Dict[str, Any]):
    """Replace the tensors of a state dict by what safetensors takes; a hook of ``state_dict()``."""
    tensors = plain_tensors(state_dict)
    state_dict.clear()
    state_dict.update(tensors)


def _save(model, model_dir, model_args, data_config, label_names, license):
    """Write ``model.safetensors`` and ``config.json``, with nothing in it about the weights that timm publishes."""
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
    hook = model.register_state_dict_post_hook(_make_plain)
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
    # transformers gives create_model the number of classes, and would do so twice. timm reads it from the level above.
    config_file = model_dir / 'config.json'
    config = json.loads(config_file.read_text())
    config.get('model_args', {}).pop('num_classes', None)
    config_file.write_text(json.dumps(config, indent=2))
