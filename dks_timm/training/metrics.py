"""Loss and accuracy of every head in training and evaluation, agreement of heads, and early exits."""
from functools import partial
from itertools import combinations, permutations
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid, softmax

# Confidences from which on an image leaves at a branch; at 0 all do.
THRESHOLDS = (0., 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


class Totals:
    """Sums over the training samples of an epoch, kept on the device until they are asked for; ``count`` of them.

    Of ``multi_label`` targets, predictions are not counted.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str], multi_label: bool = False):
        self.accelerator = accelerator
        self.names, self.multi_label = names, multi_label
        self.count = self.branch_count = 0  # samples
        zeros = partial(torch.zeros, device=accelerator.device)
        dtype = torch.float32 if accelerator.device.type == 'mps' else torch.float64  # as timm's evaluator
        self.loss = zeros((), dtype=dtype)
        self.hits = zeros(len(names), dtype=torch.int64)
        self.ce = zeros(len(names), dtype=dtype)
        self.synergy = zeros(len(names), len(names), dtype=dtype)
        self.ensemble = zeros(len(names), dtype=dtype)
        self.ensemble_teaches = False

    @torch.no_grad()
    def update(self, out: Dict[str, Any], loss: torch.Tensor, target: torch.Tensor, batch_size: int) -> None:
        """Add the task's output for a batch, its loss (a scalar) and target, (B,) or (B, num_classes)."""
        # Little happens for each classifier by itself: on a GPU, every operation is a kernel to launch.
        logits = out.get('logits') or [out['output']]
        if isinstance(logits[0], (tuple, list)):
            logits = logits[0][:1]
        running, part = len(logits), len(logits[-1])  # branches may rest, or run on the first samples only
        if not self.multi_label:
            self._count_hits([z.argmax(dim=-1) for z in logits], target, part)
        self.loss.add_(loss, alpha=batch_size)
        self.count += batch_size
        if len(self.names) > 1:
            self.ce[:1].add_(out['ce'][:1], alpha=batch_size)
        if running > 1:
            self.ce[1:].add_(out['ce'][1:], alpha=part)
            self.synergy.add_(out['synergy'], alpha=part)
            if 'ensemble' in out:
                self.ensemble.add_(out['ensemble'], alpha=part)
                self.ensemble_teaches = True
            self.branch_count += part

    def _count_hits(self, predicted, target, part):
        if target.ndim > 1:
            target = target.argmax(dim=-1)
        hits = (torch.stack([p[:part] for p in predicted]) == target[:part]).sum(dim=1)
        if part < len(predicted[0]):
            hits[0].add_((predicted[0][part:] == target[part:]).sum())
        self.hits[:len(predicted)].add_(hits)

    def state_dict(self) -> Dict[str, Any]:
        """Return the sums and counts so far, of this process."""
        own = 'accelerator', 'names', 'multi_label'
        state = {name: value for name, value in vars(self).items() if name not in own}
        return {name: value.to('cpu', copy=True) if torch.is_tensor(value) else value for name, value in state.items()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.accelerator.device) if torch.is_tensor(value) else value)

    def compute(self, reduce: bool = False) -> Dict[str, float]:
        """Return the means so far, of this process or of all; a branch's are over the samples that it ran on."""
        branches = [self.branch_count] * (len(self.names) - 1)
        names, sums, counts = ['loss'], [self.loss[None]], [self.count]
        if not self.multi_label:
            names += [f'top1_{name}' for name in self.names]
            sums, counts = [*sums, 100 * self.hits], [*counts, self.count, *branches]
        if branches:
            pairs = list(permutations(self.names, 2))
            names += [*(f'ce_{name}' for name in self.names), 'synergy']
            names += [f'synergy_{teacher}_{student}' for teacher, student in pairs]
            beside_diagonal = self.synergy.flatten()[1:].view(len(branches), -1)[:, :-1].flatten()
            sums += [self.ce, self.synergy.sum()[None] / len(pairs), beside_diagonal]
            counts += [self.count, *branches, self.branch_count, *[self.branch_count] * len(pairs)]
        if self.ensemble_teaches:
            names += [f'synergy_ensemble_{name}' for name in self.names]
            sums, counts = [*sums, self.ensemble], [*counts, *[self.branch_count] * len(self.names)]
        sums = torch.cat(sums)
        totals = torch.stack([sums, sums.new_tensor(counts)])
        if reduce:
            totals = self.accelerator.reduce(totals)
        means = (totals[0] / totals[1]).tolist()
        return dict(zip(names, means, strict=True))


class HeadCounts:
    """Counts over the images of an evaluation, kept on the device; those beyond ``max_samples`` are padding."""

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
        """Count a batch, by the logits of each classifier (B, num_classes) and class indices (B,)."""
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
        """Return the counts of this process or of all, in percent of the images.

        They are ``agree_<a>_<b>`` for each pair of classifiers; and for each branch, ``exit``, and ``threshold`` a row
        with the images that ``leave`` and ``top1``, the accuracy where the backbone answers for the rest.
        """
        counts = self.counts.clone()
        if distributed:
            torch.distributed.all_reduce(counts)
        agree, leave, right = (part.tolist() for part in counts.split(self.sizes))
        percent = 100 / max(1, agree[0])
        heads = len(self.names)
        agreement = {
            f'agree_{self.names[a]}_{self.names[b]}': percent * agree[a * heads + b]
            for a, b in combinations(range(heads), 2)}
        places = [(name, threshold) for name in self.names[1:] for threshold in THRESHOLDS]
        return agreement, [
            dict(exit=name, threshold=threshold, leave=percent * left, top1=percent * correct)
            for (name, threshold), left, correct in zip(places, leave, right, strict=True)]


def ensemble(logits: Sequence[torch.Tensor], multi_label: bool = False) -> torch.Tensor:
    """Return logits (B, num_classes) of the mean of the probabilities of several classifiers."""
    if not multi_label:
        return sum(softmax(z, dim=-1) for z in logits).log()
    stacked = torch.stack(list(logits))
    return logsigmoid(stacked).logsumexp(dim=0) - logsigmoid(-stacked).logsumexp(dim=0)


class HeadMetrics:
    """Metrics of the heads over an evaluation, by the evaluators of a timm TrainingTask.

    Images beyond ``max_samples`` are padding. Logits of ``tta`` views in a row, which are of one image, are averaged.
    Agreement of heads and early exits are of tasks with one label an image.
    """

    def __init__(self, task, names: Sequence[str], device, max_samples: Optional[int] = None, tta: int = 0):
        self.classifiers = len(names)
        self.names = (*names, 'ensemble') if len(names) > 1 else tuple(names)
        self.tta = tta
        self.evaluators = [task.create_evaluator(max_samples=max_samples) for _ in self.names]
        self.metric = self.evaluators[0].default_metric  # the one that heads are compared by
        self.several = len(names) > 1
        count = self.several and self.metric == 'top1'
        self.counts = HeadCounts(names, device, max_samples) if count else None

    def update(self, logits: Union[torch.Tensor, Sequence[torch.Tensor]], target: torch.Tensor) -> None:
        """Count a batch, by the model's output, (B, num_classes) or a list of these, and targets of the task."""
        logits = list(logits) if isinstance(logits, (tuple, list)) else [logits]
        logits = [z.float() for z in logits[:self.classifiers]]
        if self.tta > 1:
            logits = [z.unfold(0, self.tta, self.tta).mean(dim=2) for z in logits]
            target = target[::self.tta]
        if self.counts is not None:
            self.counts.update(logits, target)
        if self.several:
            logits.append(ensemble(logits, multi_label=self.metric == 'map'))
        for evaluator, z in zip(self.evaluators, logits, strict=True):
            evaluator.update(z, target)

    def compute(self, distributed: bool = False) -> Tuple[Dict[str, float], Optional[List[Dict[str, Any]]]]:
        """Return the metrics, exact for any number of processes, and of several heads the rows of early exits.

        The metrics are ``loss``, ``top1`` and ``top5`` of the backbone; of several heads also ``top1_<branch>``,
        ``loss_<branch>``, ``top1_ensemble`` and those of :meth:`HeadCounts.compute`. With several labels an image, they
        are ``loss``, ``map``, ``micro_f1``, ``macro_f1`` and ``sample_f1``; ``map_<branch>``, ``loss_<branch>`` and
        ``map_ensemble``, and there are no rows.
        """
        results = [evaluator.compute(distributed=distributed) for evaluator in self.evaluators]
        metrics = dict(results[0])
        for name, result in zip(self.names[1:], results[1:], strict=True):
            metrics[f'{self.metric}_{name}'] = result[self.metric]
        metrics.update((f'loss_{n}', r['loss']) for n, r in zip(self.names[1:-1], results[1:-1], strict=True))
        if self.counts is None:
            return metrics, None
        agreement, exits = self.counts.compute(distributed=distributed)
        metrics.update(agreement)
        return metrics, exits
