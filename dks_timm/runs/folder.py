"""The folder of a training run, read back: also of a run that is still going, or was cut off."""
import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Union

import yaml
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..errors import UNREADABLE, InputError, naming
from ..training.config import check_types, create_parser
from ..training.flags import METRICS

PathLike = Union[str, os.PathLike]
Epoch = Dict[str, float]  # a row of summary.csv

METHODS = ('baseline', 'DS', 'DKS')  # DS: branches that learn from the labels alone
# Names of the backbone's columns, made like those of other heads -> timm's.
_OF_BACKBONE = dict(
    eval_top1_backbone='eval_top1', eval_map_backbone='eval_map', eval_loss_backbone='eval_loss',
    train_ce_backbone='train_loss')
# Flags that say nothing about how a model was trained, or only where its owner keeps things.
_HOUSEKEEPING = {
    'card_baseline', 'card_license', 'checkpoint_hist', 'data', 'data_dir', 'device', 'experiment', 'export_dir',
    'hub_private', 'hub_revision', 'hub_timeout', 'keep_branches', 'log_interval', 'log_wandb', 'log_with',
    'output', 'overwrite', 'push_every_best', 'push_to_hub', 'recovery_interval', 'resume', 'save_epochs',
    'wandb_tags', 'workers',
}


def run_settings(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the flags of ``train.py`` by which a run differs from its defaults, for ``card={'training': ...}``.

    Args:
        args: The arguments of the run.
    """
    defaults = vars(create_parser().parse_args([]))
    return {k: v for k, v in args.items() if k in defaults.keys() - _HOUSEKEEPING and v != defaults[k]}


def dataset_name(args: Mapping[str, Any]) -> str:
    """Return the name of the dataset of a run; of a path, its last part."""
    dataset = str(args.get('dataset') or args.get('data_dir') or args.get('data') or '')
    return os.path.basename(os.path.abspath(dataset)) if os.path.exists(dataset) else dataset


def read_summary(path: PathLike) -> List[Epoch]:
    """Return the epochs in a run's ``summary.csv``, by epoch; [] without a file.

    Rows that are cut off or broken are left out, and so are values that are not finite.
    """
    try:
        text = Path(path).read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return []
    epochs = {}
    for row in csv.DictReader(text.rpartition('\n')[0].splitlines()):
        try:
            values = {name: float(value) for name, value in row.items() if value != ''}
            epochs[int(values['epoch'])] = {name: value for name, value in values.items() if math.isfinite(value)}
        except (KeyError, TypeError, ValueError):  # TypeError: a row is too short or too long
            continue
    return [epochs[epoch] for epoch in sorted(epochs)]


def best_epoch(epochs: Iterable[Epoch], metric: str) -> Optional[Epoch]:
    """Return the evaluated epoch with the best metric, the earliest of equals; None without any."""
    sign = 1 if metric == 'loss' else -1
    evaluated = [row for row in epochs if f'eval_{metric}' in row]
    return min(evaluated, key=lambda row: sign * row[f'eval_{metric}'], default=None)


@dataclass(eq=False)
class Run:
    """A run, as far as its folder tells.

    Attributes:
        args: The arguments, with the defaults of those that ``args.yaml`` does not name.
        epochs: Rows of ``summary.csv``. The backbone's columns are there under its name, too: ``eval_top1_backbone``.
        noted: What checkpoints hold besides weights: command, machine, versions, time, early exits and their costs.
        notes: Sentences about what is missing.
    """
    folder: Path
    args: Dict[str, Any]
    epochs: List[Epoch]
    noted: Dict[str, Any]
    notes: List[str] = field(default_factory=list)

    @property
    def heads(self) -> List[str]:
        """Names of the heads, the backbone's first."""
        columns = dict.fromkeys(name for row in self.epochs for name in row)
        found = [name.removeprefix('train_ce_') for name in columns if name.startswith('train_ce_')]
        return found or ['backbone']

    @property
    def method(self) -> str:
        """One of :data:`METHODS`."""
        if not self.args['dks']:
            return 'baseline'
        weights = self.args['dks_synergy_weight']
        alone = self.args['dks_direction'] == 'none' or not any(weights if isinstance(weights, list) else [weights])
        return 'DS' if alone else 'DKS'

    @property
    def finished(self) -> bool:
        """True if all epochs that were asked for are done."""
        return bool(self.epochs) and self.epochs[-1]['epoch'] + 1 >= self.wanted

    @property
    def wanted(self) -> int:
        """Number of epochs that were asked for."""
        return min(self.args['epochs'], self.args['stop_epoch'] or self.args['epochs'])

    @property
    def best(self) -> Epoch:
        """The epoch of model_best.pth.tar; {} without an evaluation."""
        return best_epoch(self.epochs, self.args['eval_metric']) or {}

    @property
    def last(self) -> Epoch:
        """The last epoch with an evaluation; {} without one."""
        return next((row for row in reversed(self.epochs) if f'eval_{self.metric}' in row), {})

    @property
    def metric(self) -> str:
        """Name of the metric that heads are compared by: top1, or map where an image may have several labels."""
        return METRICS[self.args['task']][0]


def read_run(folder: PathLike) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: The folder has no ``args.yaml`` of a run.
    """
    folder = Path(folder)
    if not (folder / 'args.yaml').is_file():
        raise InputError(f'RUN {folder}: has no args.yaml; give the folder of a run')
    with naming(f'RUN {folder}', OSError, TypeError, ValueError, yaml.YAMLError):
        settings = dict(yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8')))
        settings = check_types(f'RUN {folder}', settings)
    epochs = read_summary(folder / 'summary.csv')
    for row in epochs:
        for name, column in _OF_BACKBONE.items():
            if column in row:
                row.setdefault(name, row[column])
    last, best = _checkpoint_args(folder / 'last.pth.tar'), _checkpoint_args(folder / 'model_best.pth.tar')
    noted = {**(last or best), 'exits': best.get('exits')}  # measured with the best weights
    run = Run(folder, {**vars(create_parser().parse_args([])), **settings}, epochs, noted)
    if not run.finished:
        run.notes.append(f'{len(epochs)} of {run.wanted} epochs are done.')
    if not last or not best:
        run.notes.append('A checkpoint is missing or broken: early exits, command, versions or time may be unknown.')
    return run


def _checkpoint_args(path: Path) -> Dict[str, Any]:
    try:
        return vars(load_checkpoint_metadata(path)['args'])
    except (TypeError, *UNREADABLE):
        return {}


def group_runs(runs: Sequence[Run]) -> Dict[str, List[Run]]:
    """Return groups of runs that differ in their seed only, the baseline first, by labels that tell them apart.

    A label is the method and the settings that differ: all between groups of one method, between methods all but DKS's.
    """
    defaults = vars(create_parser().parse_args([]))
    settings = [{**defaults, **run_settings(run.args), 'data': dataset_name(run.args), 'seed': None} for run in runs]
    groups: Dict[str, List[Run]] = {}
    for run, mine in sorted(zip(runs, settings, strict=True), key=lambda pair: METHODS.index(pair[0].method)):
        keys = {
            key for other, theirs in zip(runs, settings, strict=True) for key in mine
            if mine[key] != theirs[key] and (other.method == run.method or not key.startswith('dks'))}
        label = ', '.join([run.method, *(f'{key} {mine[key]}' for key in sorted(keys))])
        groups.setdefault(label, []).append(run)
    return groups
