"""The epochs of a run on record: summary.csv, and trackers."""
import csv
import io
import os
from typing import Any, Dict, Mapping, Optional, Sequence

from .checkpoint import Output, write_text
from .flags import METRICS

TIMM_METRICS = ('loss', *(name for names in METRICS.values() for name in names if name != 'loss'))  # in timm's order


class Summary(Output):
    """The file summary.csv, whole at any time; rows from ``start_epoch`` on are dropped."""

    def __init__(self, path, start_epoch: int):
        self.path = path
        self.rows = []
        if os.path.exists(path):
            with open(path, newline='', errors='replace') as file:
                rows = [row for row in csv.DictReader(file, restval=None) if None not in {*row, *row.values()}]
            self.rows = [row for row in rows if row.get('epoch', '').isdigit() and int(row['epoch']) < start_epoch]
            self.write()

    def append(self, row: Mapping[str, Any]) -> None:
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
    """The summary and the trackers of a run, on the main process; rows from ``start_epoch`` on are dropped."""

    def __init__(self, args, accelerator, folder: str, start_epoch: int):
        self.accelerator = accelerator
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
            lr: float,
            skipped: Optional[int] = None,
            images_per_second: float = 0.,
    ) -> None:
        """Record an epoch: timm's columns, those of several heads, updates left out; the speed for trackers only."""
        row: Dict[str, Any] = dict(epoch=epoch, train_loss=train_metrics['loss'])
        row.update((f'eval_{name}', eval_metrics[name]) for name in TIMM_METRICS if name in eval_metrics)
        row['lr'] = lr
        if 'synergy' in train_metrics:
            for prefix, metrics in (('train', train_metrics), ('eval', eval_metrics)):
                row.update((f'{prefix}_{name}', v) for name, v in metrics.items() if f'{prefix}_{name}' not in row)
        if skipped is not None:
            row['skipped'] = skipped
        self.summary.append(row)
        if self.accelerator.log_with:
            more = dict(train_images_per_second=images_per_second) if images_per_second else {}
            self.trackers.attempt('The log of --log-with', self.accelerator.log, {**row, **more}, step=epoch)


def mean_lr(param_groups: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean of the learning rates of an optimizer's parameter groups, as timm notes it."""
    return sum(group['lr'] for group in param_groups) / len(param_groups)
