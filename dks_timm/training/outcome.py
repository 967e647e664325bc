"""What a run came to: a table at its end, and what it took."""
import sys
from datetime import timedelta
from typing import Mapping, Optional, Sequence, Tuple, Union

import torch

__all__ = ['cost_line', 'outcome_table']


def outcome_table(
        rows: Sequence[Mapping[str, str]],
        names: Sequence[str],
        best_epoch: Optional[int],
        without_ema: Optional[Mapping[int, Mapping[str, float]]] = None,
) -> str:
    """Accuracy and loss of every head in the best epoch and in the last one.

    Args:
        rows: Of summary.csv.
        names: Names of the classifiers, the backbone's first.
        best_epoch: That of model_best.pth.tar.
        without_ema: Where the rows are of an average of the weights, what these came to themselves, by epoch.
    """
    last = rows[-1]
    best = next((row for row in rows if row['epoch'] == str(best_epoch)), last)
    heads = [*names, 'ensemble'] if len(names) > 1 else ['model']
    if 'eval_top1' in last:
        columns = {'top-1 %': ('eval_top1', 2), 'loss': ('eval_loss', 4)}
    else:
        columns = {'train loss': ('train_loss', 4)}
        heads = heads[:1]
    epochs = [('Best epoch', best), ('Last epoch', last)]
    plain = [(without_ema or {}).get(int(row['epoch']), {}) for _, row in epochs]
    extra = ['without EMA'] if any(plain) else []
    first, width = max(map(len, [*heads, *extra])), 14

    def line(title, cells, width):
        return (title.ljust(first) + ''.join(cell.rjust(width) for cell in cells)).rstrip()

    lines = [
        line('', [f'{title} {row["epoch"]}' for title, row in epochs], width * len(columns)),
        line('', [*columns] * len(epochs), width),
    ]
    for i, head in enumerate(heads):
        keys = [(f'{column}_{head}' if i else column, digits) for column, digits in columns.values()]
        lines.append(line(head, [_cell(row.get(key), digits) for _, row in epochs for key, digits in keys], width))
        if i == 0 and extra:
            cells = [_cell(found.get(key.removeprefix('eval_')), digits) for found in plain for key, digits in keys]
            lines.append(line(*extra, cells, width))
    return '\n'.join(lines)


def _cell(value: Union[str, float, None], digits: int) -> str:
    return f'{float(value):.{digits}f}' if value not in (None, '') else ''


def cost_line(seconds: float, images_per_second: float, device: torch.device, processes: int = 1) -> str:
    """What a run took.

    Args:
        seconds: Over all parts of the run, with evaluation.
        images_per_second: In training, 0 where this part of the run has only evaluated.
        device: Of this process.
        processes: How many there are.
    """
    used, where = peak_memory(device)
    return ', '.join([
        f'{timedelta(seconds=round(seconds))} in all',
        *([f'{images_per_second:,.0f} images/s in training'] if images_per_second else []),
        f'at most {used / 2 ** 20:,.0f} MiB of {where}' + (' in the first process' if processes > 1 else ''),
    ])


def peak_memory(device: torch.device) -> Tuple[int, str]:
    """The most memory that tensors took on a GPU, or this process elsewhere, in bytes; and what memory that is."""
    module = getattr(torch, device.type, None)
    if hasattr(module, 'max_memory_allocated'):
        return module.max_memory_allocated(device), 'GPU memory'
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak, 'memory'
