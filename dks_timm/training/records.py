"""What a run tells of each epoch: a row of summary.csv, values for trackers, a line."""
import os
from collections import OrderedDict
from typing import Any, Mapping, Optional, Sequence

from .checkpoint import Output, Summary

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
        self.trackers = Output()
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
            images_per_second: float = 0.,
    ) -> None:
        """Record an epoch: timm's columns first, ours after them.

        Args:
            epoch: Its number.
            train_metrics: From its training.
            eval_metrics: From its evaluation; {} where there was none.
            param_groups: Of the optimizer.
            skipped: Updates that were left out, None where none is.
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
        """Hand an epoch to the trackers: its row, what changes from one machine to another, and who taught whom."""
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
