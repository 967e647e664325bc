"""The epochs of a run on record: summary.csv, and trackers."""
import csv
import io
import os
from collections import OrderedDict
from typing import Any, Dict, Mapping, Optional, Sequence

from .checkpoint import Output, write_text

__all__ = ['Records', 'Summary']


class Summary(Output):
    """The file summary.csv, whole at any time.

    Args:
        path: Of the file; rows of earlier epochs are kept.
        start_epoch: First epoch to come.
    """

    def __init__(self, path, start_epoch: int):
        self.path = path
        self.rows = []
        if os.path.exists(path):
            with open(path, newline='', errors='replace') as file:
                rows = [row for row in csv.DictReader(file, restval=None) if None not in {*row, *row.values()}]
            self.rows = [row for row in rows if row.get('epoch', '').isdigit() and int(row['epoch']) < start_epoch]
            self.write()

    def append(self, row: Dict[str, Any]) -> None:
        self.rows.append({name: str(value) for name, value in row.items()})
        self.write()

    def write(self) -> None:
        text = io.StringIO(newline='')
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in self.rows for name in row)), restval='')
        if self.rows:
            writer.writeheader()
        writer.writerows(self.rows)
        self.attempt('summary.csv', write_text, self.path, text.getvalue())


class Records:
    """The summary and the trackers of a run, on the main process.

    Args:
        args: The configuration.
        accelerator: Of the run; it holds the trackers.
        names: Names of the classifiers, the backbone's first.
        folder: The run's.
        start_epoch: First epoch to come.
    """

    def __init__(self, args, accelerator, names: Sequence[str], folder: str, start_epoch: int):
        self.args, self.accelerator, self.names = args, accelerator, names
        self.summary = Summary(os.path.join(folder, 'summary.csv'), start_epoch)
        self.trackers = Output()
        if accelerator.log_with:
            accelerator.project_configuration.logging_dir = folder
            wandb = dict(name=os.path.basename(folder), tags=args.wandb_tags)
            if args.wandb_resume_id:
                wandb.update(id=args.wandb_resume_id, resume='must')
            accelerator.init_trackers(
                args.wandb_project or 'dks-timm',
                config={k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in vars(args).items()},
                init_kwargs=dict(wandb=wandb),
            )

    def write(
            self,
            epoch: int,
            train_metrics: Mapping[str, float],
            eval_metrics: Mapping[str, float],
            param_groups: Sequence[Mapping[str, Any]],
            skipped: Optional[int] = None,
            images_per_second: float = 0.,
    ) -> None:
        """Record an epoch: timm's columns first, ours after them.

        Args:
            epoch: Its number.
            train_metrics: From its training.
            eval_metrics: From its evaluation; {} where there was none.
            param_groups: Of the optimizer.
            skipped: Updates that were left out, None for no such column.
            images_per_second: In training, 0 where that is not known. For trackers only.
        """
        row = OrderedDict(epoch=epoch, train_loss=train_metrics['loss'])
        row.update((f'eval_{name}', eval_metrics[name]) for name in ('loss', 'top1', 'top5') if name in eval_metrics)
        lrs = [group['lr'] for group in param_groups]
        row['lr'] = sum(lrs) / len(lrs)
        if len(self.names) > 1:
            for prefix, metrics in (('train', train_metrics), ('eval', eval_metrics)):
                row.update((f'{prefix}_{name}', v) for name, v in metrics.items() if f'{prefix}_{name}' not in row)
        if skipped is not None:
            row['skipped'] = skipped
        self.summary.append(row)
        if self.accelerator.log_with:
            self.trackers.attempt('The log of --log-with', self._track, row, param_groups, images_per_second)

    def _track(self, row, param_groups, images_per_second):
        """Log an epoch: its row, values that differ between machines, and the synergy matrix."""
        epoch = row['epoch']
        more = {}
        if images_per_second:
            more['train_images_per_second'] = images_per_second
        if any('lr_scale' in group for group in param_groups):  # --layer-decay
            lrs = [group['lr'] for group in param_groups]
            more.update(lr_lowest=min(lrs), lr_highest=max(lrs))
        self.accelerator.log({**row, **more}, step=epoch)
        if 'train_synergy' not in row:
            return
        columns = ['teacher', *self.names]
        matrix = [
            [teacher, *(row.get(f'train_synergy_{teacher}_{student}', 0.) for student in self.names)]
            for teacher in self.names]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, 'log_table'):
                tracker.log_table('train_synergy_matrix', columns=columns, data=matrix, step=epoch)
            elif tracker.name == 'tensorboard':  # shows text as Markdown
                tracker.log({'train_synergy_matrix': _markdown(columns, matrix)}, step=epoch)


def _markdown(columns, rows):
    numbers = [[name, *(f'{value:.4f}' for value in values)] for name, *values in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [columns, ['---'] * len(columns), *numbers])
