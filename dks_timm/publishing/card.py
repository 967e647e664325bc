"""The model card, made from a run: what was trained, how, and what was measured. Nothing else goes into it."""
import json
import os
import platform
import re
import shlex
import subprocess
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..errors import InputError, naming, printable
from ..models import ARCHITECTURES
from ..runs.folder import best_epoch, dataset_name, read_run, read_summary, run_settings
from ..runs.pictures import curves_svg
from ..training.config import create_parser
from .push import local_name

__all__ = ['baseline', 'describe_run', 'eval_results', 'provenance', 'write_card']

PathLike = Union[str, os.PathLike]

# What a card can be given: fields of its metadata, and facts that the template shows.
METADATA = (
    'base_model', 'base_model_relation', 'datasets', 'language', 'license', 'license_link', 'license_name', 'tags')
FACTS = ('baseline', 'branches', 'command', 'dks', 'model_name', 'repo_id', 'started_from', 'summary', 'training')

# What a card calls the rest of a run's provenance.
_PROVENANCE = (('hardware', 'hardware'), ('software', 'software'), ('commit of dks_timm', 'commit'))


def eval_results(metrics: Mapping[str, float], dataset: str, split: str = 'validation') -> List[EvalResult]:
    """Return timm's evaluation metrics of an exported model as entries of a card's ``model-index``.

    Args:
        metrics: Metrics of the backbone's classifier, in percent; ``top1`` and ``top5`` are taken.
        dataset: Name of the dataset that they were measured on; of a path, its last part is taken.
        split: Its split.
    """
    dataset = dataset_name(dict(dataset=dataset))
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type='accuracy',
            metric_name=f'Top-{k} accuracy of the backbone (%)',
            metric_value=float(metrics[f'top{k}']),
        )
        for k in (1, 5) if f'top{k}' in metrics
    ]


def provenance(
        args: Mapping[str, Any],
        argv: Sequence[str],
        model: nn.Module,
        label_names: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Return what a run's checkpoints carry beside their flags, so that each can be exported with a complete card.

    Args:
        args: The arguments of the run, with its ``world_size``.
        argv: The command line without the program.
        model: The model that is trained.
        label_names: Class names in the order of the classifier's outputs.
    """
    return dict(
        command=shlex.join(['train.py', *map(str, argv)]),
        commit=_git_commit(),
        hardware=_hardware(args),
        software=', '.join(
            [f'dks_timm {__version__}', *(f'{name} {version(name)}' for name in ('torch', 'timm', 'accelerate'))]),
        started_from=_started_from(args, model),
        label_names=list(label_names) if label_names else None,
    )


def _git_commit() -> Optional[str]:
    """Return the commit of the checkout that this code runs from, marked if files were changed; None without one."""
    def git(*command):
        out = subprocess.run(['git', *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return out.stdout.strip()

    try:
        git('ls-files', '--error-unmatch', Path(__file__).name)  # else the checkout is one that we are installed in
        return git('describe', '--always', '--abbrev=40', '--exclude=*', '--dirty= with changes')
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(args: Mapping[str, Any]) -> str:
    device = torch.device(args.get('device') or 'cpu')
    if device.type == 'cuda' and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    elif device.type == 'cpu':
        name = f'CPU ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)'
    else:
        name = device.type
    count = args.get('world_size', 1)
    return name if count == 1 else f'{count} processes, each on {name}'


def _started_from(args: Mapping[str, Any], model: nn.Module) -> Optional[str]:
    """Return the repository on the Hub whose weights training began with, or None."""
    if not args['pretrained'] or args.get('pretrained_path') or args.get('initial_checkpoint'):
        return None
    source, _, name = args['model'].rpartition(':')
    if source:
        return name if source.startswith('hf') else None
    cfg = model.pretrained_cfg
    hub_id = cfg.get('hf_hub_id') or ''
    if hub_id.endswith('/') and cfg.get('tag'):
        hub_id += f'{cfg["architecture"]}.{cfg["tag"]}'
    return hub_id or None


def describe_run(
        args: Mapping[str, Any],
        run_dir: PathLike,
        epoch: int,
        metric: Optional[float],
        license: Optional[str] = None,
        baseline_dir: Optional[PathLike] = None,
) -> Dict[str, Any]:
    """Gather what a run noted about the weights of one of its epochs.

    Args:
        args: The arguments of the run, with its :func:`provenance` where it has one.
        run_dir: The run's folder, with its ``summary.csv``.
        epoch: Epoch of the weights, from 0.
        metric: What the run noted as their ``--eval-metric``, None if it did not evaluate these weights.
        license: Of the weights.
        baseline_dir: Folder of another run to show beside this one, see :func:`baseline`.

    Returns:
        The arguments ``card``, ``label_names`` and ``results`` of :func:`dks_timm.export`.
    """
    epochs = read_summary(Path(run_dir, 'summary.csv'))
    row = next((row for row in epochs if row['epoch'] == epoch), {})
    if metric is None or row.get(f'eval_{args["eval_metric"]}') != metric:
        row = {}  # of other weights, or another run
    metrics = {name[5:]: value for name, value in row.items() if name in ('eval_top1', 'eval_top5')}
    dataset = dataset_name(args)
    training = {**run_settings(args), 'seed': args['seed'], 'epoch of these weights (from 0)': epoch}
    if args.get('train_seconds'):
        seconds = timedelta(seconds=round(args['train_seconds']))
        training['training time'] = f'{seconds} to this epoch (h:mm:ss, with evaluation)'
    training.update((name, args[key]) for name, key in _PROVENANCE if args.get(key))
    card = dict(
        training=training,
        command=args.get('command'),
        started_from=args.get('started_from'),
        summary=epochs,
        datasets=[dataset] if dataset else None,
        license=license,
    )
    if card['started_from']:
        card.update(base_model=card['started_from'].partition('@')[0], base_model_relation='finetune')
    if baseline_dir:
        with naming(f'--card-baseline {baseline_dir}', OSError):
            settings = yaml.safe_load(Path(run_dir, 'args.yaml').read_text())
        card['baseline'] = baseline(settings, baseline_dir)
    if len(epochs) > 1 and metrics and row == best_epoch(epochs, args['eval_metric']):
        training['chosen among the epochs by'] = f'{args["eval_metric"]} on the split {args["val_split"]}'
    return dict(
        card={key: value for key, value in card.items() if value},
        label_names=args.get('label_names'),
        results=eval_results(metrics, dataset, args['val_split']),
    )


def baseline(settings: Mapping[str, Any], folder: PathLike) -> Dict[str, Any]:
    """Read the best epoch of another run of the same model on the same data, to show beside this one.

    Args:
        settings: The arguments of this run, as in its ``args.yaml``.
        folder: Folder of the other run.

    Returns:
        Its ``top1``, ``top5`` and ``dks``, and ``differ``: settings of the two that are not the same, besides those of
        DKS.

    Raises:
        ValueError: If it is no such run.
    """
    other = read_run(folder)
    if not other.known:
        raise InputError(f'baseline {str(folder)!r} is no folder of a run: {" ".join(other.notes)}')
    if not other.best:
        raise InputError(f'baseline {str(folder)!r} has no evaluated epoch in its summary.csv')
    mine = {**vars(create_parser().parse_args([])), **settings}
    for name, of in (
            ('model', lambda args: args['model']),
            ('data', dataset_name),
            ('evaluation split', lambda args: args['val_split']),
    ):
        if of(mine) != of(other.args):
            raise InputError(f'baseline {str(folder)!r} has {name} {of(other.args)!r}, this run {of(mine)!r}')
    mine, theirs = run_settings(mine), run_settings(other.args)
    differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k) and not k.startswith('dks'))
    return dict(
        top1=other.best.get('eval_top1'),
        top5=other.best.get('eval_top5'),
        dks=other.args['dks'],
        differ=[f'{k}: {mine.get(k)}, in the baseline {theirs.get(k)}' for k in differ],
    )


def write_card(
        model: nn.Module,
        model_dir: Path,
        card: Mapping[str, Any],
        results: Optional[Sequence[EvalResult]],
        folder_name: str,
        has_branches: bool = False,
) -> None:
    """Write ``README.md``, and ``curves.svg`` where there are curves, beside a model's ``config.json``."""
    config = json.loads((model_dir / 'config.json').read_text())
    repo_id = card.get('repo_id')
    model_name = card.get('model_name') or (
        repo_id.rpartition('/')[2] if repo_id else local_name(config['architecture'], results, card.get('datasets')))
    metadata = {k: card[k] for k in METADATA if k in card}
    if results:
        metadata.update(eval_results=list(results), model_name=model_name)
    metadata['tags'] = ['timm', *(['dks'] if card.get('dks') else []), *(card.get('tags') or [])]
    curves = curves_svg(card.get('summary') or [])
    if curves:
        (model_dir / 'curves.svg').write_text(curves, encoding='utf-8')
    package = Path(__file__).parents[1]
    # The template lies at the top of the project; a wheel carries it inside the package.
    template = next(p for p in (package / 'MODEL_CARD.md', package.parent / 'MODEL_CARD.md') if p.is_file())
    facts = {k: card.get(k) for k in FACTS if k not in ('model_name', 'summary')}
    facts['training'] = {k: _cell(v) for k, v in (card.get('training') or {}).items()}
    facts['command'] = printable(facts['command'] or '')  # a line break would end the block that it stands in
    ModelCard.from_template(
        ModelCardData(library_name='timm', pipeline_tag='image-classification', **metadata),
        template_path=str(template),
        architecture=config['architecture'],
        needs_import=config['architecture'] in ARCHITECTURES,
        num_classes=config['num_classes'],
        num_params=sum(p.numel() for p in model.parameters()),
        preprocessing=config['pretrained_cfg'],
        label_names=config.get('label_names'),
        results=[replace(r, dataset_name=_cell(r.dataset_name)) for r in results or ()],
        source=f'hf-hub:{repo_id}' if repo_id else f'local-dir:{printable(folder_name)}',
        title=_cell(model_name),
        curves='curves.svg' if curves else None,
        has_branches=has_branches,
        **facts,
    ).save(model_dir / 'README.md')


def _cell(value: Any) -> str:
    """Return a value as text that stays within a cell of a Markdown table."""
    return printable(re.sub(r'\s+', ' ', str(value))).replace('|', r'\|').replace('<', '&lt;')
