"""What an evaluation measures: loss and accuracy of every head, and of all together."""
from collections import OrderedDict
from itertools import combinations
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.task import TrainingTask
from torch.nn.functional import softmax

__all__ = ['THRESHOLDS', 'HeadCounts', 'HeadMetrics']

# Confidences from which on an image leaves at a branch; 0 is all of them.
THRESHOLDS = (0., 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


class HeadCounts:
    """Counts over the images of an evaluation, kept on the device until they are asked for.

    Args:
        names: Names of the classifiers, the backbone's first.
        device: Device of the logits.
        max_samples: Images to count, as in timm's evaluators: those beyond it are padding of a sampler.
    """

    def __init__(self, names: Sequence[str], device: torch.device, max_samples: Optional[int] = None):
        self.names = tuple(names)
        self.max_samples = max_samples
        self.seen = 0
        # In single precision as the logits, as a threshold in double precision may lie between two of its numbers.
        self.thresholds = torch.tensor(THRESHOLDS, device=device)
        heads, branches = len(self.names), len(self.names) - 1
        self.sizes = [heads ** 2, branches * len(THRESHOLDS), branches * len(THRESHOLDS)]
        self.counts = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: Of each classifier (B, num_classes).
            target: Class indices (B,).
        """
        z = torch.stack([z.float() for z in logits])  # (M, B, C)
        if self.max_samples is not None:
            count = max(0, self.max_samples - self.seen)
            z, target = z[:, :count], target[:count]
        self.seen += len(target)
        predicted = z.argmax(dim=-1)
        agree = (predicted[:, None] == predicted).sum(dim=-1)  # (M, M); the diagonal counts the images

        right = predicted == target
        leave = z[1:].softmax(dim=-1).amax(dim=-1)[..., None] >= self.thresholds  # (M - 1, B, T)
        left_right = torch.where(leave, right[1:, :, None], right[0, :, None])
        self.counts += torch.cat([agree.flatten(), leave.sum(dim=1).flatten(), left_right.sum(dim=1).flatten()])

    def compute(self, distributed: bool = False) -> Tuple[Dict[str, float], List[Dict[str, Any]]]:
        """What was counted, in this process or in all, in percent of the images.

        Returns:
            ``agree_<a>_<b>`` for each pair of classifiers; and for each branch and threshold a row with ``exit`` (the
            branch's name), ``threshold``, ``leave`` (images whose confidence there reaches the threshold) and ``top1``
            (accuracy where the backbone answers for the rest).
        """
        counts = self.counts.clone()
        if distributed:
            torch.distributed.all_reduce(counts)
        agree, leave, right = (part.tolist() for part in counts.split(self.sizes))
        percent = 100 / max(1, agree[0])
        heads = len(self.names)
        agreement = OrderedDict(
            (f'agree_{self.names[a]}_{self.names[b]}', percent * agree[a * heads + b])
            for a, b in combinations(range(heads), 2))
        places = [(name, threshold) for name in self.names[1:] for threshold in THRESHOLDS]
        return agreement, [
            dict(exit=name, threshold=threshold, leave=percent * left, top1=percent * correct)
            for (name, threshold), left, correct in zip(places, leave, right, strict=True)]


class HeadMetrics:
    """Metrics of the heads over an evaluation, as timm's evaluators compute them.

    Args:
        task: The task, which creates the evaluators.
        names: Names of the classifiers, the backbone's first.
        device: Device of the logits.
        max_samples: Images to count; those beyond it are padding of a sampler.
        tta: Augmented images in a row that are one image, whose logits are averaged.
    """

    def __init__(
            self,
            task: TrainingTask,
            names: Sequence[str],
            device: torch.device,
            max_samples: Optional[int] = None,
            tta: int = 0,
    ):
        self.classifiers = len(names)
        self.names = (*names, 'ensemble') if len(names) > 1 else tuple(names)
        self.tta = tta
        self.evaluators = [task.create_evaluator(max_samples=max_samples) for _ in self.names]
        self.counts = HeadCounts(names, device, max_samples) if len(names) > 1 else None

    def update(self, logits: Union[torch.Tensor, Sequence[torch.Tensor]], target: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: What the model returned, (B, num_classes), or a list of it with one entry a classifier at least.
            target: Class indices (B,).
        """
        logits = list(logits) if isinstance(logits, (tuple, list)) else [logits]
        logits = [z.float() for z in logits[:self.classifiers]]
        if self.tta > 1:
            logits = [z.unfold(0, self.tta, self.tta).mean(dim=2) for z in logits]
            target = target[::self.tta]
        if self.counts is not None:
            self.counts.update(logits, target)
            logits.append(sum(softmax(z, dim=-1) for z in logits).log())
        for evaluator, z in zip(self.evaluators, logits, strict=True):
            evaluator.update(z, target)

    def compute(self, distributed: bool = False) -> Tuple[Dict[str, float], Optional[List[Dict[str, Any]]]]:
        """What was measured, exact for any number of processes.

        Returns:
            ``loss``, ``top1`` and ``top5`` of the backbone; of several heads also ``top1_<branch>``, ``top1_ensemble``
            (mean of the probabilities), ``loss_<branch>``, and ``agree_<a>_<b>``, the percentage of images to which
            two heads give one class. And what leaving at a branch is worth, see :class:`HeadCounts`, or None.
        """
        results = [evaluator.compute(distributed=distributed) for evaluator in self.evaluators]
        metrics = OrderedDict(results[0])
        for name, result in zip(self.names[1:], results[1:], strict=True):
            metrics[f'top1_{name}'] = result['top1']
        if self.counts is None:
            return metrics, None
        metrics.update((f'loss_{n}', r['loss']) for n, r in zip(self.names[1:-1], results[1:-1], strict=True))
        agreement, exits = self.counts.compute(distributed=distributed)
        metrics.update(agreement)
        return metrics, exits
