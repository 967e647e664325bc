"""What a run tells of each epoch: a row of summary.csv, values for trackers, a line."""
import os
from collections import OrderedDict
from typing import Any, Dict, Mapping, Optional, Sequence

from .checkpoints import Summary

__all__ = ['Records', 'epoch_line']


def epoch_line(title: str, names: Sequence[str], metrics: Mapping[str, float], **more: float) -> str:
    """The accuracy of every classifier, in a line.

    Args:
        title: What it begins with.
        names: Names of the classifiers, the backbone's first.
        metrics: Of an evaluation; {} where there was none.
        **more: Values to be named before them.
    """
    parts = [f'{name} {value:.4f}' for name, value in more.items()]
    if metrics:
        top1 = [f'{names[0]} {metrics["top1"]:.2f}'] + [
            f'{name[5:]} {value:.2f}' for name, value in metrics.items() if name.startswith('top1_')]
        parts += [f'eval loss {metrics["loss"]:.4f}', 'top-1 ' + ', '.join(top1)]
    return f'{title}: ' + ', '.join(parts)


class Records:
    """The summary and the trackers of a run. For the main process alone.

    Args:
        args: The command line.
        accelerator: Of the run; it holds the trackers.
        names: Names of the classifiers, the backbone's first.
        folder: The run's.
        name: The run's, for trackers.
        start_epoch: First epoch to come.
    """

    def __init__(self, args, accelerator, names: Sequence[str], folder: str, name: str, start_epoch: int):
        self.args, self.accelerator, self.names = args, accelerator, names
        self.summary = Summary(os.path.join(folder, 'summary.csv'), start_epoch)
        if accelerator.log_with:
            accelerator.project_configuration.logging_dir = folder
            wandb = dict(name=name, tags=args.wandb_tags)
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
    ) -> None:
        """Record an epoch: timm's columns first, ours after them.

        Args:
            epoch: Its number.
            train_metrics: From its training.
            eval_metrics: From its evaluation; {} where there was none.
            param_groups: Of the optimizer.
            skipped: Updates that were left out, None where none is.
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
        self.accelerator.log(row, step=epoch)

    def metrics_of(self, epoch: int) -> Dict[str, float]:
        """The evaluation metrics of an epoch, {} where there was no evaluation."""
        row = next((row for row in self.summary.rows if row['epoch'] == str(epoch)), {})
        return {name[5:]: float(value) for name, value in row.items() if name.startswith('eval_')}
