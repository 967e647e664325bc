"""The model card, made from a run: what was trained, how, and what was measured. Nothing else goes into it."""
import json
import os
import platform
import shlex
import shutil
import subprocess
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Mapping

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..errors import InputError, printable
from ..models import ARCHITECTURES
from ..runs.folder import best_epoch, dataset_name, read_run, read_summary, run_settings
from ..runs.pictures import curves_svg

# timm's metrics -> the Hub's name of their kind, and their own.
METRICS = dict(
    top1=('accuracy', 'Top-1 accuracy'), top5=('accuracy', 'Top-5 accuracy'),
    map=('mean_average_precision', 'Mean average precision'), micro_f1=('f1', 'Micro F1'), macro_f1=('f1', 'Macro F1'),
    sample_f1=('f1', 'Sample F1'))
# Entries of a card that the template shows; the rest is metadata.
FACTS = (
    'baseline', 'branches', 'command', 'converted_from', 'dks', 'multi_label', 'started_from', 'training')


def eval_results(metrics: Mapping[str, float], dataset: str, split: str = 'validation') -> List[EvalResult]:
    """Return timm's metrics of an exported model, in percent, as entries of a ``model-index``.

    They are ``top1`` and ``top5``; of several labels an image ``map``, ``micro_f1``, ``macro_f1`` and ``sample_f1``.
    ``dataset`` is the name of the dataset that they were measured on; of a path, its last part is taken.
    """
    dataset = dataset_name(dict(dataset=dataset))
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=kind,
            metric_name=f'{title} of the backbone (%)',
            metric_value=float(metrics[name]),
        )
        for name, (kind, title) in METRICS.items() if name in metrics
    ]


def provenance(args, command, model, label_names=None):
    """Return what a run's checkpoints carry beside their flags, so that each can be exported with a complete card.

    ``args`` are the arguments of the run, with its ``device`` and ``world_size``; ``command`` is a list of words.
    """
    device, processes = torch.device(args['device']), args['world_size']
    machine = f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores'
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type.upper()} ({machine})'
    software = [f'dks_timm {__version__}', *(f'{name} {version(name)}' for name in ('torch', 'timm', 'accelerate'))]
    return dict(
        command=printable(shlex.join(map(str, command))),
        commit=_git_commit(),
        hardware=hardware if processes == 1 else f'{processes} processes, each on {hardware}',
        software=', '.join(software),
        started_from=_started_from(args, model.pretrained_cfg),
        label_names=list(label_names) if label_names else None,
    )


def _git_commit():
    """Return the commit of the checkout that this code runs from, marked if files were changed; None without one."""
    root = Path(__file__).parents[2]
    if not (root / '.git').exists() or not shutil.which('git'):
        return None
    command = ['git', 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty= with changes']
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None


def _started_from(args, pretrained_cfg):
    """Return the repository on the Hub whose weights training began with, or None."""
    if not args['pretrained'] or args['pretrained_path'] or args['initial_checkpoint']:
        return None
    hub_id = pretrained_cfg.get('hf_hub_id') or ''
    if hub_id.endswith('/'):  # timm's own
        hub_id += f'{pretrained_cfg["architecture"]}.{pretrained_cfg["tag"]}'
    return hub_id or None


def describe_run(args, run_dir, epoch, metric, license=None, baseline_dir=None):
    """Return what a run noted about the weights of an epoch, as arguments of :func:`dks_timm.export`.

    Args:
        args: The arguments of the run, with its :func:`provenance` where it has one.
        epoch: Epoch of the weights, from 0.
        metric: What the run noted as their ``--eval-metric``, None if it did not evaluate these weights.
    """
    epochs = read_summary(Path(run_dir, 'summary.csv'))
    # A row with another metric is of other weights, or of another run.
    found = [row for row in epochs if row['epoch'] == epoch and row.get(f'eval_{args["eval_metric"]}', -1) == metric]
    training = {**run_settings(args), 'seed': args['seed'], 'epoch of these weights (from 0)': epoch}
    if args.get('train_seconds'):
        seconds = timedelta(seconds=round(args['train_seconds']))
        training['training time'] = f'{seconds} to this epoch (h:mm:ss, with evaluation)'
    training.update({key: args[key] for key in ('hardware', 'software', 'commit') if args.get(key)})
    if len(epochs) > 1 and found == [best_epoch(epochs, args['eval_metric'])]:
        training['chosen among the epochs by'] = f'{args["eval_metric"]} on the split {args["val_split"]}'
    dataset, started_from = dataset_name(args), args.get('started_from')
    card = dict(
        training=training,
        command=args.get('command'),
        started_from=started_from,
        summary=epochs,
        multi_label=args['multilabel_threshold'] if args['task'] == 'multilabel' else None,
        datasets=[dataset] if dataset else None,
        license=license,
        baseline=baseline(args, baseline_dir) if baseline_dir else None,
        base_model=started_from and started_from.partition('@')[0],
        base_model_relation=started_from and 'finetune',
    )
    metrics = {name: row[f'eval_{name}'] for row in found for name in METRICS if f'eval_{name}' in row}
    results = eval_results(metrics, dataset, args['val_split'])
    return dict(card=card, label_names=args.get('label_names'), results=results)


def baseline(args: Mapping[str, Any], folder: str) -> Dict[str, Any]:
    """Read the best epoch of a run of the same model on the same data; raise a ValueError if it is no such run."""
    try:
        other = read_run(folder)
    except InputError as e:
        raise InputError(f'baseline {str(folder)!r}: {e}') from e
    if not other.best:
        raise InputError(f'baseline {str(folder)!r} is no run with an evaluated epoch: {" ".join(other.notes)}')
    same = dict(model=lambda args: args['model'], data=dataset_name, task=lambda args: args['task'])
    for name, of in same.items():
        if of(args) != of(other.args):
            raise InputError(f'baseline {str(folder)!r} has {name} {of(other.args)!r}, this run {of(args)!r}')
    mine, theirs = run_settings(args), run_settings(other.args)
    differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k) and not k.startswith('dks'))
    return dict(
        metrics={title: other.best.get(f'eval_{name}') for name, (_, title) in METRICS.items()},
        dks=other.args['dks'],
        differ=[f'{k}: {mine.get(k)}, in the baseline {theirs.get(k)}' for k in differ],
    )


def write_card(model, model_dir, card, results, folder_name):
    """Write ``README.md``, and ``curves.svg`` where there are curves, beside a model's ``config.json``."""
    config = json.loads((model_dir / 'config.json').read_text())
    metadata = {key: value for key, value in card.items() if key not in FACTS and value}
    repo_id, curves = metadata.pop('repo_id', None), curves_svg(metadata.pop('summary', ()))
    data = [result.dataset_name for result in results or ()] or metadata.get('datasets')
    title = metadata.pop('model_name', f'{config["architecture"]} on {data[0]}' if data else config['architecture'])
    tags = ['timm', *(['dks'] if card.get('dks') else []), *metadata.pop('tags', ())]
    if results:
        metadata.update(eval_results=list(results), model_name=title)
    if curves:
        (model_dir / 'curves.svg').write_text(curves, encoding='utf-8')
    # The template lies at the top of the project; a wheel carries it inside the package.
    template = next(p for p in (Path(__file__).parents[i] / 'MODEL_CARD.md' for i in (1, 2)) if p.is_file())
    ModelCard.from_template(
        ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=tags, **metadata),
        template_path=str(template),
        config=config,
        needs_import=config['architecture'] in ARCHITECTURES,
        num_params=sum(p.numel() for p in model.parameters()),
        results=results,
        source=f'hf-hub:{repo_id}' if repo_id else f'local-dir:{printable(folder_name)}',
        title=title,
        curves=curves and 'curves.svg',
        has_branches=(model_dir / 'dks_config.json').exists(),
        has_onnx=(model_dir / 'model.onnx').exists(),
        **{name: card.get(name) for name in FACTS},
    ).save(model_dir / 'README.md')
