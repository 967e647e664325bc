"""The folder of a training run, read back: also of a run that is still going, or was cut off."""
import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import yaml

from ..errors import UNREADABLE, InputError, OptionError
from ..training.config import check_types, create_parser

__all__ = ['Group', 'Run', 'best_epoch', 'dataset_name', 'group_runs', 'read_run', 'read_summary', 'run_settings']

PathLike = Union[str, os.PathLike]
Epoch = Dict[str, float]  # a row of summary.csv
_CHECKPOINTS = ('last.pth.tar', 'model_best.pth.tar')

# Flags that say nothing about how a model was trained, or only where its owner keeps things.
_HOUSEKEEPING = {
    'card_baseline', 'card_license', 'checkpoint_hist', 'data', 'data_dir', 'experiment', 'export_dir', 'hub_private',
    'hub_revision', 'hub_timeout', 'keep_branches', 'log_interval', 'output', 'overwrite', 'push_every_best',
    'push_to_hub', 'recovery_interval', 'resume', 'workers',
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
    """Return the epochs in a run's ``summary.csv``, without lines that are cut off or broken; [] without a file."""
    return _read_epochs(Path(path), [])


def _read_epochs(path: Path, notes: List[str]) -> List[Epoch]:
    try:
        text = path.read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        notes.append('There is no summary.csv yet: no epoch was completed.')
        return []
    *lines, cut_off = text.replace('\0', '').split('\n')
    header, *rows = list(csv.reader(lines)) or [[]]
    epochs: Dict[float, Epoch] = {}
    broken = int(bool(cut_off.strip()))
    for row in filter(None, rows):
        try:
            found = {name: float(value) for name, value in zip(header, row, strict=True) if value}
            epochs[int(found['epoch'])] = found
        except (KeyError, OverflowError, ValueError):
            broken += 1
    if broken:
        notes.append(f'Lines of summary.csv that are cut off or broken, and left out: {broken}.')
    elif not epochs:
        notes.append('summary.csv has no epoch yet.')
    return [epochs[epoch] for epoch in sorted(epochs)]


def best_epoch(epochs: Iterable[Epoch], metric: str) -> Optional[Epoch]:
    """Return the evaluated epoch with the best metric, the earliest of equals; None without any."""
    sign = 1 if metric == 'loss' else -1
    evaluated = [row for row in epochs if math.isfinite(row.get(f'eval_{metric}', math.nan))]
    return min(evaluated, key=lambda row: sign * row[f'eval_{metric}'], default=None)


@dataclass(eq=False)
class Run:
    """A run, as far as its folder tells.

    Attributes:
        folder: The folder.
        args: The arguments, with the defaults of those that were not noted.
        noted: The content of its checkpoints besides the weights: arguments, and what
            :func:`dks_timm.publishing.card.provenance` lists.
        epochs: Rows of summary.csv.
        notes: Sentences about files that are missing or broken.
        known: True if the arguments are those of the run, False if they are the defaults.
        name: Name of the folder.
    """
    folder: Path
    args: Dict[str, Any]
    noted: Dict[str, Any]
    epochs: List[Epoch]
    notes: List[str]
    known: bool = True
    name: str = ''

    def __post_init__(self):
        self.name = self.name or self.folder.resolve().name

    @property
    def heads(self) -> List[str]:
        """Names of the heads, the backbone's first."""
        columns = [name for row in self.epochs for name in row]
        found = [name.partition('_top1_')[2] for name in columns if name.startswith(('eval_top1_', 'train_top1_'))]
        return ['backbone', *(name for name in dict.fromkeys(found) if name not in ('backbone', 'ensemble'))]

    @property
    def method(self) -> str:
        """'baseline', 'DS' (branches that learn from the labels alone), 'DKS', or 'unknown'."""
        if not self.known:
            return 'unknown'
        if not self.args['dks']:
            return 'baseline'
        weights = self.args['dks_synergy_weight']
        alone = self.args['dks_direction'] == 'none' or not any(weights if isinstance(weights, list) else [weights])
        return 'DS' if alone else 'DKS'

    @property
    def finished(self) -> bool:
        """True if all epochs that were asked for are done."""
        epochs = self.args['epochs']
        return bool(self.epochs) and isinstance(epochs, int) and self.epochs[-1]['epoch'] + 1 >= epochs

    @property
    def best(self) -> Epoch:
        """The epoch of model_best.pth.tar; {} without an evaluation."""
        return best_epoch(self.epochs, self.args['eval_metric']) or {}

    @property
    def last(self) -> Epoch:
        """The last epoch with an evaluation; {} without one."""
        return next((row for row in reversed(self.epochs) if math.isfinite(row.get('eval_top1', math.nan))), {})


def read_run(folder: PathLike) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: The folder holds nothing of a run.
    """
    folder = Path(folder)
    advice = 'give the folder of a run, the one with its args.yaml'
    if not folder.is_dir():
        raise InputError(f'RUN {folder}: {"not a folder" if folder.exists() else "no such folder"}; {advice}')
    if not any((folder / name).is_file() for name in ('args.yaml', 'summary.csv', *_CHECKPOINTS)):
        if inside := sorted(path.parent.name for path in folder.glob('*/args.yaml')):
            advice = f'it holds the runs {", ".join(inside[:5])}{", ..." * (len(inside) > 5)}; give those'
        raise InputError(f'RUN {folder}: has no args.yaml, summary.csv or checkpoint; {advice}')
    notes: List[str] = []
    epochs = _read_epochs(folder / 'summary.csv', notes)
    noted = _read_checkpoints(folder, notes)
    settings = _read_settings(folder / 'args.yaml', notes)
    if settings is None and noted:
        notes.append('The arguments are those that a checkpoint holds.')
        settings = noted
    try:
        settings = settings and check_types(f'RUN {folder}', settings)
    except OptionError as e:
        notes.append(f'Settings are unknown: {e}.')
        settings = None
    args = {**vars(create_parser().parse_args([])), **(settings or {})}
    run = Run(folder, args, noted, epochs, notes, known=settings is not None)
    if epochs and run.known and not run.finished:
        notes.append(f'{epochs[-1]["epoch"] + 1:.0f} of {args["epochs"]} epochs are done.')
    return run


def _read_settings(path: Path, notes: List[str]) -> Optional[Dict[str, Any]]:
    try:
        settings = yaml.safe_load(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        notes.append('There is no args.yaml: settings are unknown.')
        return None
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        notes.append('args.yaml cannot be read: settings are unknown.')
        return None
    return {str(key): value for key, value in settings.items()}


def _read_checkpoints(folder: Path, notes: List[str]) -> Dict[str, Any]:
    """Return the arguments of the last checkpoint, else of the best; ``exits`` and ``exits_epoch`` of the best."""
    from timm.utils.checkpoint_saver import load_checkpoint_metadata

    found = {}
    for name in _CHECKPOINTS:
        if (folder / name).is_file():
            try:
                checkpoint = load_checkpoint_metadata(folder / name)
                found[name] = {**vars(checkpoint['args']), 'exits_epoch': checkpoint['epoch']}
            except UNREADABLE:
                notes.append(f'{name} is no whole checkpoint.')
    if not found:
        notes.append('There is no checkpoint: command, versions, machine, time and early exits are unknown.')
        return {}
    last, best = (found.get(name, {}) for name in _CHECKPOINTS)
    return {**(last or best), **{key: best.get(key) for key in ('exits', 'exits_epoch')}}


@dataclass(eq=False)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: By what it differs from the other groups.
        runs: The runs.
        settings: What they have in common, see :func:`run_settings`, with the data.
    """
    label: str
    runs: List[Run]
    settings: Dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def counted(self) -> List[Run]:
        """The runs that means are taken over: the finished ones, all where none is."""
        return [run for run in self.runs if run.finished] or self.runs

    @property
    def finished(self) -> bool:
        return all(run.finished and run.last for run in self.counted)

    def values(self, which: str) -> List[float]:
        """Return top-1 accuracies of the counted runs in their 'last' or 'best' epoch."""
        return [epoch['eval_top1'] for run in self.counted if 'eval_top1' in (epoch := getattr(run, which))]

    def curve(self, column: str) -> List[Tuple[float, List[float]]]:
        """Return the values of a column at the epochs that all counted runs have."""
        tables = [{row['epoch']: row[column] for row in run.epochs if math.isfinite(row.get(column, math.nan))}
                  for run in self.counted]
        return [(epoch, [table[epoch] for table in tables]) for epoch in sorted(set.intersection(*map(set, tables)))]


def group_runs(runs: Sequence[Run]) -> List[Group]:
    """Group runs that differ in their seed only, the baseline first, and name the groups by what they differ in."""
    groups: Dict[str, Group] = {}
    for run in runs:
        settings = {**run_settings(run.args), 'data': dataset_name(run.args)}
        settings = {k: v for k, v in settings.items() if k not in ('seed', 'wandb_tags', 'log_with', 'log_wandb')}
        groups.setdefault(repr(sorted(settings.items())), Group(run.method, [], settings)).runs.append(run)
    found = sorted(groups.values(), key=lambda g: ('baseline', 'DS', 'DKS', 'unknown').index(g.method))
    defaults = {**vars(create_parser().parse_args([])), 'data': ''}
    for group in found:
        # Within a method all that differs, between methods only what has nothing to do with them.
        keys = {
            key for other in found for key in differing(group.settings, other.settings)
            if other.method == group.method or not key.startswith('dks')}
        parts = [f'{key} {group.settings.get(key, defaults[key])}'
                 for key in sorted(keys, key=lambda key: (not key.startswith('dks'), key))]
        group.label = ', '.join([group.method, *parts])
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[str]:
    """Return the keys by which two settings differ."""
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
