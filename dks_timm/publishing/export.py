"""Publishing: a trained network as a folder that plain timm loads, with its model card and, if asked, its branches."""
import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config, resolve_input_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_input_config, load_checkpoint, save_for_hf
from timm.utils import load_checkpoint_metadata, unwrap_model

from ..errors import UNREADABLE, ExportError, InputError, naming, why
from ..method.branch_files import load_checkpoint_branches, plain_tensors, save_branches
from ..method.create import create_dks_model
from ..method.model import DKSModel, prune
from ..models import ARCHITECTURES
from ..training.build import check_model_name, create_model
from ..training.checkpoint import holds_weights
from ..training.checks import check_numbers
from ..training.config import check_types, create_parser
from .card import FACTS, METADATA, baseline, describe_run, write_card
from .push import FILES, BackgroundPush, PushError, check_repository, finishing_line, push_folder

__all__ = ['check_export_dir', 'check_publishing', 'export', 'export_checkpoint', 'next_steps', 'publish',
           'push_every_best']

PathLike = Union[str, os.PathLike]

_logger = logging.getLogger(__name__)

# What timm's pretrained_cfg says about the weights that timm publishes under an architecture's name.
_SOURCE_FACTS = ('description', 'license', 'notes', 'origin_url', 'paper_ids', 'paper_name', 'tag')

_LOAD_BACK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model_dir, x_file, logits_file, num_threads, precision, package_dir = sys.argv[1:]
if package_dir:
    sys.path.append(package_dir)
    import dks_timm.models
torch.set_num_threads(int(num_threads))
torch.set_float32_matmul_precision(precision)
model = timm.create_model('local-dir:' + model_dir, pretrained=True).eval()
with torch.inference_mode():
    x = load_file(x_file)['x']
    logits = {'timm': model(x).contiguous()}
try:
    from transformers import AutoModelForImageClassification, TimmWrapperConfig
    model = AutoModelForImageClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits['transformers'] = model(x).logits.contiguous()
except ImportError:
    pass
except Exception as e:
    print(f'transformers cannot load it: {type(e).__name__}: {e}')
save_file(logits, logits_file)
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
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f'out_dir is {str(out_dir)!r}, which cannot be made: {e.strerror}; choose another') from e
    try:
        # Inside the folder, because that is the file system where the files have to end up.
        with tempfile.TemporaryDirectory(prefix='.export-', dir=out_dir) as work_dir:
            model_dir = Path(work_dir, 'model')
            _save(model, model_dir, model_args, data_config, label_names, card.get('license'))
            if keep_branches:
                save_branches(net, model_dir)
            _verify(net if keep_branches else model, model_dir)
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

    Raises:
        ValueError: If the checkpoint is not one of a run, or an argument does not fit.
    """
    check_export_dir(out_dir, overwrite)
    if not Path(checkpoint).is_file():
        raise InputError(f'checkpoint is {str(checkpoint)!r}, but there is no such file')
    with naming(f'checkpoint {str(checkpoint)!r} cannot be read', *UNREADABLE):
        state = load_checkpoint_metadata(str(checkpoint))
    if not isinstance(state, dict) or not isinstance(state.get('args'), argparse.Namespace):
        raise InputError(f'checkpoint {str(checkpoint)!r} does not say how its model was made; give one of a run')
    subject = f'checkpoint {str(checkpoint)!r}'
    args = {**vars(create_parser().parse_args([])), **check_types(subject, vars(state['args']))}
    check_numbers(argparse.Namespace(**args))
    if not holds_weights(state, ema=use_ema):
        raise InputError(f'{subject} holds no weights by name; give one of a run')
    no_weights = {'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': ''}
    check_model_name(args['model'], f'{subject}: model')
    net = create_model(argparse.Namespace(**{**args, **no_weights}))
    with naming(subject, RuntimeError):  # torch's word for weights of another model
        load_checkpoint(prune(net), str(checkpoint), use_ema=use_ema, filter_fn=_without_aux_bn)
        if keep_branches and isinstance(net, DKSModel):
            load_checkpoint_branches(net, str(checkpoint), use_ema)
    # The run evaluated its average where it had one at hand; a recovery checkpoint lies between two evaluations.
    evaluated_ema = args['model_ema'] and not args['model_ema_force_cpu']
    is_ema = use_ema and 'state_dict_ema' in state
    if 'state_dict_ema' in state:
        top1 = args.get('top1_by_ema') or {}
        _say_which_weights(is_ema, top1.get(is_ema), top1.get(not is_ema), checkpoint)
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


def check_publishing(args: argparse.Namespace, args_text: str, model: nn.Module, label_names: Optional[List[str]]):
    """Before training: see that what the flags ask for can be published. A Hub out of reach is only a warning.

    Args:
        args: The command line.
        args_text: What goes into args.yaml.
        model: The model to be trained.
        label_names: Class names in the order of the classifier's outputs.

    Raises:
        OptionError: If it cannot.
    """
    if args.card_baseline:
        with naming(f'--card-baseline {args.card_baseline}'):
            baseline(yaml.safe_load(args_text), args.card_baseline)
    if not args.push_to_hub:
        return
    config = dict(
        architecture=model.pretrained_cfg['architecture'], num_classes=model.num_classes, label_names=label_names)
    try:
        with naming(f'--push-to-hub {args.push_to_hub}'):
            warnings = check_repository(
                args.push_to_hub, config, args.hub_private, args.hub_revision, args.overwrite_repository)
    except PushError as e:
        warnings = [f'{e}; training goes on, and the push is tried at its end']
    for warning in warnings:
        _logger.warning(f'--push-to-hub {args.push_to_hub}: {warning}')


def push_every_best(args: argparse.Namespace, run_dir: Optional[str]) -> Optional[BackgroundPush]:
    """What pushes the best checkpoints while training goes on; None where that was not asked for."""
    if not args.push_every_best or run_dir is None:
        return None
    flags = ['--push-to-hub', args.push_to_hub]
    for name in ('hub_timeout', 'card_license', 'card_baseline'):
        if getattr(args, name) is not None:
            flags += [f'--{name.replace("_", "-")}', str(getattr(args, name))]
    if args.hub_revision and not args.hub_revision.startswith('tag:'):
        flags += ['--hub-revision', args.hub_revision]
    flags += ([] if args.hub_private else ['--no-hub-private']) + _no_ema(args)
    flags += ['--keep-branches'] * args.keep_branches + ['--overwrite'] * args.overwrite_repository
    return BackgroundPush(Path(run_dir, 'model_best.pth.tar'), flags)


def publish(args: argparse.Namespace, trainer: Any, model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """After training: export the best weights, push them where that was asked for, and say how to go on.

    Args:
        args: The command line, with the run's :func:`dks_timm.publishing.card.provenance`.
        trainer: The Trainer, for its best checkpoint.
        model: The trained model; it takes on the best weights.
        data_config: The run's preprocessing.

    Raises:
        SystemExit: With code 3, after a word on what is left to do, if the model or the Hub did not take it. The
            checkpoints are there all the same, and the exported folder if it was the push.
    """
    run_dir, saver = trainer.output_dir, trainer.saver
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    best = os.path.join(run_dir, 'model_best.pth.tar')
    try:
        model = trainer.load_best(model)
        if trainer.without_ema:
            kept = {epoch: os.path.join(run_dir, f'checkpoint-{epoch}.pth.tar') for epoch in trainer.without_ema}
            kept = {epoch: path for epoch, path in kept.items() if os.path.exists(path)}
            epoch = max(kept, key=lambda epoch: trainer.without_ema[epoch]['top1'], default=None)
            if epoch is not None and args.eval_metric == 'top1':
                _say_which_weights(True, saver.best_metric, trainer.without_ema[epoch]['top1'], kept[epoch])
        if args.keep_branches:
            load_checkpoint_branches(model, best, use_ema=args.model_ema and not args.model_ema_force_cpu)
        described = describe_run(
            vars(args), run_dir, saver.best_epoch, saver.best_metric, args.card_license, args.card_baseline)
        described['card']['repo_id'] = args.push_to_hub
        # Only a run with this very name could have left a model in its folder.
        overwrite = args.overwrite or not args.export_dir
        export(
            out_dir, model, data_config=data_config, keep_branches=args.keep_branches, overwrite=overwrite, **described)
    except Exception as e:
        _fail(f'--export-dir {out_dir}', e, f'The checkpoints are in {run_dir}. To export the best one:',
              _export_line(args, run_dir, out_dir))
    alone = 'dks_timm' if model.pretrained_cfg['architecture'] in ARCHITECTURES else 'timm alone'
    print(f'Exported to {out_dir}: a fresh process with {alone} loads it, with bit-identical logits:')
    print(f"    model = timm.create_model('local-dir:{out_dir}', pretrained=True)")
    if not args.push_to_hub:
        return
    where = (args.push_to_hub, args.hub_private, args.hub_revision, args.overwrite_repository)
    try:
        print(f'Pushed to {push_folder(out_dir, *where, timeout=args.hub_timeout)}')
    except Exception as e:
        _fail(f'--push-to-hub {args.push_to_hub}', e, f'The model is in {out_dir}. To push it:',
              finishing_line(out_dir, *where))


def next_steps(args: argparse.Namespace, run_dir: str) -> str:
    """The commands that look at a run and publish it, but for what its flags have done already.

    Args:
        args: The command line of the run.
        run_dir: Its folder.
    """
    out_dir = args.export_dir or os.path.join(run_dir, 'export')
    steps = [shlex.join(['dks-timm', 'report', run_dir])]
    if not args.export_dir and not args.push_to_hub:
        steps.append(_export_line(args, run_dir, out_dir))
    if not args.push_to_hub:
        steps.append(finishing_line(out_dir, 'OWNER/NAME', args.hub_private))
    return '\n'.join(['Next:', *(f'    {command}' for command in steps)])


def _export_line(args: argparse.Namespace, run_dir: str, out_dir: str) -> str:
    """The shell command that exports the best weights of a run."""
    best = os.path.join(run_dir, 'model_best.pth.tar')
    return shlex.join(
        ['dks-timm', 'export', best, out_dir, *_no_ema(args), *['--keep-branches'] * args.keep_branches])


def _no_ema(args: argparse.Namespace) -> List[str]:
    """Flags for exporting the weights that are evaluated: an average kept on the CPU is not."""
    return ['--no-ema'] if args.model_ema_force_cpu else []


def _say_which_weights(is_ema: bool, top1: Optional[float], others: Optional[float], checkpoint: PathLike) -> None:
    """Of a run with an average of its weights: say which are exported, and warn where the others are better.

    Args:
        is_ema: Whether it is the average.
        top1: Accuracy of what is exported, None if that is not known.
        others: The best of what is not.
        checkpoint: Where the others are.
    """
    names = {True: 'the average of the weights (--model-ema)', False: 'the weights themselves, not their average'}
    text = f'Exported are {names[is_ema]}'
    if top1 is None or others is None:
        _logger.info(f'{text}.')
        return
    text += f', with {top1:.2f} % top-1; the other has {others:.2f} %'
    if others > top1 + 1:
        _logger.warning(f'{text}: dks-timm export {checkpoint} DIR{" --no-ema" * is_ema}')
    else:
        _logger.info(f'{text}.')


def _fail(subject: str, error: Exception, where: str, command: str):
    """Say what is left to do, and end; where the program is at fault, by its error."""
    print(f'train.py: error: {subject}: {why(error)}\n{where}\n    {command}', file=sys.stderr)
    if not isinstance(error, (ExportError, InputError, OSError, PushError)):
        raise error
    raise SystemExit(3)


def _without_aux_bn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Leave out the statistics that split BatchNorm keeps for training only."""
    return {k: v for k, v in state_dict.items() if '.aux_bn.' not in k}


def _plain_tensors(model: nn.Module, state_dict: Dict[str, Any], prefix: str, metadata: Dict[str, Any]):
    """State dict hook: what safetensors takes."""
    tensors = plain_tensors(state_dict)
    state_dict.clear()
    state_dict.update(tensors)


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
    # transformers gives create_model the number of classes, and would do so twice. timm reads it from the level above.
    config_file = model_dir / 'config.json'
    config = json.loads(config_file.read_text())
    config.get('model_args', {}).pop('num_classes', None)
    config_file.write_text(json.dumps(config, indent=2))


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


def _verify(net_or_model: nn.Module, model_dir: Path):
    model = net_or_model.backbone if isinstance(net_or_model, DKSModel) else net_or_model
    input_size = json.loads((model_dir / 'config.json').read_text())['pretrained_cfg']['input_size']
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected, *of_branches = _logits(net_or_model, x)

    x_file, logits_file = model_dir.with_name('x.safetensors'), model_dir.with_name('logits.safetensors')
    save_file({'x': x}, x_file)
    loader = subprocess.run(
        [
            sys.executable, '-c', _LOAD_BACK, model_dir.absolute(), x_file.absolute(), logits_file.absolute(),
            # Both may change the order or the precision of sums.
            str(torch.get_num_threads()), torch.get_float32_matmul_precision(),
            # timm alone does not know the architectures of this package.
            Path(__file__).parents[2] if model.pretrained_cfg['architecture'] in ARCHITECTURES else '',
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if loader.returncode:
        reason = loader.stderr.strip().rpartition('\n')[-1]
        raise ExportError(f'The exported model was not kept, because timm cannot load it: {reason}')
    found = load_file(logits_file)
    loaded = found['timm']
    if loaded.shape != expected.shape or not torch.allclose(loaded, expected, rtol=0, atol=0, equal_nan=True):
        difference = (loaded - expected).abs().max().item() if loaded.shape == expected.shape else float('nan')
        raise ExportError(
            'The exported model was not kept, because timm loads it with other logits than it was exported with '
            f'(largest difference {difference:.3g}). If it was changed after it was made, '
            'give the arguments that timm.create_model makes it with as model_args.'
        )
    if 'transformers cannot load it' in loader.stdout:
        _logger.warning(f'The exported model is for timm alone: {loader.stdout.strip()}')
    elif not torch.allclose(found.get('transformers', loaded), loaded, rtol=0, atol=0, equal_nan=True):
        _logger.warning('The exported model is for timm alone: transformers loads it with other logits')
    if of_branches:
        with torch.random.fork_rng(devices=[]):
            _, *loaded = _logits(create_dks_model(f'local-dir:{model_dir}', pretrained=True), x)
        if not all(torch.equal(a, b) for a, b in zip(loaded, of_branches, strict=True)):
            raise ExportError('The exported model was not kept, because its branches load with other logits')
