"""What an evaluation measures: loss and accuracy of every head, and of all together."""
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.task import TrainingTask
from torch.nn.functional import softmax

from ..method.exits import HeadCounts

__all__ = ['HeadMetrics']


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
