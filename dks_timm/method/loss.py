"""The DKS objective: the classification loss of every classifier, and the synergy between every two of them.

    L = sum_m ce_weight[m] * CE(target, z_m)  +  sum_{p != q} synergy_weight[p, q] * T^2 * KL(stopgrad(Q_p) || Q_q)

for the logits z_m (B, C) of M classifiers, with Q_m = softmax(z_m / T) and every term a mean over the batch. With the
ensemble as teacher, the mean of all logits takes the place of every z_p, and the sum is over students q alone. Where an
image may have several labels, Q_m are C independent distributions, those of Bernoulli(sigmoid(z_m / T)), and their
divergences are a mean or a sum over the classes, as the classification loss is.
Sun, Yao, Zhou, Zhao: Deeply-supervised Knowledge Synergy, CVPR 2019, section 3, https://arxiv.org/abs/1906.00675
"""
import math
from contextlib import nullcontext
from functools import reduce
from typing import Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import loss as timm_loss

from ..errors import InputError

DIRECTIONS = ('both', 'top-down', 'bottom-up', 'to-backbone', 'none')
TEACHERS = ('pairs', 'ensemble')
SYNERGIES = ('softmax', 'sigmoid')

_WHOLE_SET = (timm_loss.TwoWayLoss, timm_loss.ZlprLoss)  # of all labels of an image at once, no mean over classes
_MULTI_LABEL = (
    *_WHOLE_SET, timm_loss.AsymmetricLossMultiLabel, timm_loss.DistributionBalancedLoss,
    timm_loss.PolyBinaryCrossEntropy, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
)
_BINARY = (timm_loss.BinaryCrossEntropy, nn.BCEWithLogitsLoss)  # also of single labels

_MASKED = -1e30  # takes the place of -inf: its probability is 0 too, and 0 times it is 0

Vector = Tuple[float, ...]
Matrix = Tuple[Vector, ...]
Weight = Union[float, Sequence[float], Sequence[Sequence[float]], torch.Tensor]


def synergy_loss(
        logits: Sequence[torch.Tensor],
        weight: Weight = 1.0,
        direction: str = 'both',
        temperature: float = 1.0,
        synergy: str = 'softmax',
        teacher: str = 'pairs',
) -> torch.Tensor:
    """Return the weighted sum of the divergences of classifiers from their teachers, which are fixed.

    Source: Sun et al., CVPR 2019, section 3. Weight 1, both directions and temperature 1 are the paper's.

    Args:
        logits: One (B, C) tensor per classifier: the backbone's, then the branches' from shallow to deep.
        weight: A number for all pairs, or an M x M matrix (teacher row, student column, diagonal ignored). With teacher
            'ensemble' a number for all students, or one per student.
        direction: Who teaches: 'both', 'top-down' (deeper teaches shallower, the backbone is the deepest),
            'bottom-up', 'to-backbone' (branches teach the backbone), 'none'. Multiplies the weight.
        temperature: Divides the logits; the divergences are scaled by its square.
        synergy: What is compared: 'softmax', the distributions over exclusive classes, or 'sigmoid', that of each class
            by itself (an extension of the paper's to several labels an image), a mean over the classes.
        teacher: 'pairs', every classifier teaches every other, or 'ensemble', the mean of all logits teaches everyone
            (direction 'both') or the backbone alone ('to-backbone'); after Lan et al., NeurIPS 2018,
            https://arxiv.org/abs/1806.04606, without their gate.

    Returns:
        A scalar in nats, a mean over the batch, in float32 at least. Only the students get a gradient. A class whose
        logit is -inf is one with probability 0.

    Raises:
        ValueError: Logits of one classifier or of different shapes, a weight that is negative, not finite, or for
            another number of classifiers, an unknown direction, synergy or teacher, a direction that the teacher does
            not have, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> from dks_timm import synergy_loss
        >>> backbone, branch = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> synergy_loss([backbone, branch], direction='top-down')  # the backbone teaches
        tensor(0.6031)
        >>> synergy_loss([backbone, branch], direction='bottom-up')  # the branch teaches
        tensor(1.3250)
        >>> synergy_loss([backbone, branch], weight=0.5)
        tensor(0.9640)
        >>> synergy_loss([backbone, branch], teacher='ensemble', direction='to-backbone')  # both teach the backbone
        tensor(0.1296)
    """
    _check_logits(logits)
    _check_options(direction, temperature, synergy, teacher)
    weight = _parse_weight('weight', weight, ndim=2 if teacher == 'pairs' else 1)
    matrix = _teaching('weight', weight, direction, teacher, len(logits))
    with _no_autocast(logits[0].device):
        logits = _to_float(logits)
        log_probs = _log_probs(logits, temperature, synergy)
        ensemble = _ensemble(logits, temperature, synergy) if teacher == 'ensemble' else []
        return _synergy(log_probs, ensemble, matrix, _scale(logits, temperature, synergy))[0]


def _ensemble(logits: Sequence[torch.Tensor], temperature: float, synergy: str) -> List[torch.Tensor]:
    """Return the log-probabilities of the mean of the logits, in a list."""
    return _log_probs([torch.stack([z.detach() for z in logits]).mean(0)], temperature, synergy)


def _scale(logits: Sequence[torch.Tensor], temperature: float, synergy: str, sum_classes: bool = False) -> float:
    """Return the factor of a sum over batch and classes: temperature squared, and what makes it a mean."""
    count, classes = logits[-1].shape
    return temperature ** 2 / max(count * (1 if synergy == 'softmax' or sum_classes else classes), 1)


def _synergy(log_probs, ensemble, weight: Matrix, scale: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum of all divergences, and every single one (teacher row, student column) without gradient.

    Teachers are the classifiers, and after them the ensemble where there is one.

    Of KL(p || q) = sum p log p - sum p log q only the second part depends on the student, so all teachers of a student
    give it the gradient of one product with their weighted sum. What autograd keeps is linear in M.
    """
    fixed = [q.detach() for q in log_probs]
    log_teachers = [*fixed, *ensemble]
    teachers = [q.exp() for q in log_teachers]
    divergences = scale * torch.stack([
        torch.stack([(p * (own - q)).sum() for q in fixed]) for p, own in zip(teachers, log_teachers, strict=True)])
    divergences = divergences.clamp(min=0)
    loss = _weighted_sum(divergences.flatten(), sum(weight, ()))
    for q, column in zip(log_probs, zip(*weight, strict=True), strict=True):
        cross_entropy = -scale * (_weighted_sum(teachers, column) * q).sum()
        loss = loss + (cross_entropy - cross_entropy.detach())  # the loss has the value, this adds the gradient
    return loss, divergences


class DKSLoss(nn.Module):
    """Classification loss of every classifier plus their synergy (Sun et al., CVPR 2019, section 3).

    The criterion is called once per classifier.

    Args:
        criterion: A function of (logits, target) that returns a scalar. None is softmax cross-entropy of class indices
            or dense targets; with synergy 'sigmoid' binary cross-entropy of dense targets, a mean over classes.
        ce_weight: Weight of the classification losses, a number or one per classifier.
        synergy_weight: Weight of the synergy, see `synergy_loss`.
        direction: Who teaches whom, see `synergy_loss`.
        temperature: Of the synergy, see `synergy_loss`.
        synergy: What classifiers compare, see `synergy_loss`. None goes by the criterion: 'sigmoid' for binary
            cross-entropy and timm's multi-label losses, else 'softmax'. 'sigmoid' is a sum over the classes where the
            criterion is one (its `sum_classes`, its `reduction`, and the losses of whole label sets), else a mean.
        teacher: 'pairs' or 'ensemble', see `synergy_loss`.

    Attributes:
        synergy_scale: Factor of the synergy's weight; 0 leaves plain deep supervision.

    Raises:
        ValueError: A criterion for multi-label targets with 'softmax', which is of exclusive classes; a weight that is
            negative or not finite, an unknown direction, synergy or teacher, a direction that the teacher does not
            have, or a temperature that is not positive.

    Example:
        >>> import torch, dks_timm
        >>> logits = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]  # a backbone and two branches
        >>> out = dks_timm.DKSLoss(synergy_weight=0.5)(logits, torch.arange(8))
        >>> torch.allclose(out['loss'], out['ce'].sum() + 0.5 * out['synergy'].sum())
        True
        >>> out['loss'].backward()
    """

    def __init__(
            self,
            criterion: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
            ce_weight: Weight = 1.0,
            synergy_weight: Weight = 1.0,
            direction: str = 'both',
            temperature: float = 1.0,
            synergy: Optional[str] = None,
            teacher: str = 'pairs',
    ):
        super().__init__()
        multi_label = isinstance(criterion, _MULTI_LABEL) or getattr(criterion, 'smooth_dense', False)
        if synergy is None:
            synergy = 'sigmoid' if multi_label or isinstance(criterion, _BINARY) else 'softmax'
        _check_options(direction, temperature, synergy, teacher)
        if multi_label and synergy == 'softmax':
            raise InputError(
                f"synergy 'softmax' compares distributions over exclusive classes, and criterion "
                f"{type(criterion).__name__} is for multi-label targets: use 'sigmoid'")
        self.criterion = criterion
        self.synergy = synergy
        self.sum_classes = (
            isinstance(criterion, _WHOLE_SET) or getattr(criterion, 'sum_classes', False)
            or getattr(criterion, 'reduction', 'mean') in ('batchmean', 'sum'))
        self.ce_weight = _parse_weight('ce_weight', ce_weight, ndim=1)
        self.synergy_weight = _parse_weight('synergy_weight', synergy_weight, ndim=2 if teacher == 'pairs' else 1)
        self.teacher = teacher
        self.direction = direction
        self.temperature = float(temperature)
        self.synergy_scale = 1.

    def resolve_weights(self, num_classifiers: int) -> Tuple[Vector, Matrix]:
        """Return the weights of M classifiers, and of every teacher (row) and student (column), direction applied.

        The matrix is M x M with a zero diagonal. With teacher 'ensemble' it has one more row, and zeros in all others.

        Raises:
            ValueError: Weights were given for another number of classifiers.
        """
        vector = _resolve_weight('ce_weight', self.ce_weight, 1, num_classifiers)
        return vector, _teaching(
            'synergy_weight', self.synergy_weight, self.direction, self.teacher, num_classifiers)

    def forward(
            self,
            logits: Sequence[torch.Tensor],
            target: torch.Tensor,
            teachers: Optional[Sequence[torch.Tensor]] = None,
    ) -> Dict[str, torch.Tensor]:
        """Return the loss of a batch and its parts.

        Args:
            logits: One (B, C) tensor per classifier: the backbone's, then the branches' from shallow to deep. Those of
                branches may all be (n, C), for the first n samples: their criterion, which has to be a mean, and the
                synergy are means over n.
            target: Class indices (B,), where -100 stands for an image without label, a dense distribution (B, C),
                labels of each class by itself (B, C), or what the criterion takes. Images without label learn from the
                other classifiers alone.
            teachers: With teacher 'ensemble', the logits whose mean teaches, those of an averaged model say: any number
                of tensors (B, C), or (n, C) where branches have those. None takes the classifiers' own.

        Returns:
            'loss', the weighted sum and the only entry with a gradient; 'ce' (M,), the criterion of every classifier;
            'synergy' (M, M), the divergence of every teacher (row) and student (column), temperature squared included;
            with teacher 'ensemble' also 'ensemble' (M,), that of the ensemble and every student. All but the loss are
            unweighted batch means, and cover what a weight or the direction leaves out.

        Raises:
            ValueError: Logits of one classifier or of different shapes, a target or `teachers` that do not fit, weights
                for another number of classifiers, or a criterion that returns something other than a scalar.
            IndexError: A class index that the logits do not have (on a CPU).
        """
        count = _check_logits(logits, partial=True)
        if teachers is not None and self.teacher != 'ensemble':
            raise ValueError(f"teachers are for teacher 'ensemble', not {self.teacher!r}")
        ce_weight, synergy_weight = self.resolve_weights(len(logits))
        synergy_weight = tuple(tuple(self.synergy_scale * w for w in row) for row in synergy_weight)
        with _no_autocast(logits[0].device):
            logits = _to_float(logits)
            log_probs = plain = _log_probs(logits, self.temperature, self.synergy)
            if self.criterion is None and self.temperature != 1:
                plain = _log_probs(logits, 1.0, self.synergy)
            ce = torch.stack([self._label_loss(z, q, target[:len(z)]) for z, q in zip(logits, plain, strict=True)])
            log_probs = [q if len(q) == count else q[:count] for q in log_probs]
            scale = _scale(logits, self.temperature, self.synergy, self.sum_classes)
            ensemble = []
            if self.teacher == 'ensemble':
                teachers = _to_float(teachers) if teachers else [z[:count] for z in logits]
                ensemble = _ensemble(teachers, self.temperature, self.synergy)
            loss, divergences = _synergy(log_probs, ensemble, synergy_weight, scale)
            loss = loss + _weighted_sum(ce, ce_weight)
        reports = {'ce': ce.detach(), 'synergy': divergences[:len(logits)]}
        return {'loss': loss, **reports, **({'ensemble': divergences[-1]} if ensemble else {})}

    def forward_backbone(self, logits: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the part of the loss that is left where the branches have not run, of the backbone's logits (B, C).

        The 'loss' is its weighted criterion, 'ce' (1,) the same without weight or gradient.
        """
        weight = self.ce_weight[0] if isinstance(self.ce_weight, tuple) else self.ce_weight
        with _no_autocast(logits.device):
            logits = _to_float([logits])
            ce = self._label_loss(*logits, *_log_probs(logits, 1.0, self.synergy), target)
        return {'loss': weight * ce, 'ce': ce.detach()[None]}

    def _label_loss(self, logits: torch.Tensor, log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the criterion of one classifier."""
        if self.criterion is None:
            return (_cross_entropy if self.synergy == 'softmax' else _binary_cross_entropy)(log_probs, target)
        loss = self.criterion(logits, target)
        if loss.ndim:
            raise ValueError(f'criterion must return a scalar, got shape {tuple(loss.shape)}')
        return loss


def _weighted_sum(values: Sequence[torch.Tensor], weights: Vector) -> torch.Tensor:
    """Sum values times weights; a zero weight leaves its value out, be it finite or not."""
    terms = [value if w == 1 else w * value for value, w in zip(values, weights, strict=True) if w]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(values[0])


def _log_probs(logits: Sequence[torch.Tensor], temperature: float, synergy: str) -> List[torch.Tensor]:
    """Return the log-probabilities of C exclusive classes (B, C), or of each class and of its absence (B, 2 C)."""
    scaled = [z if temperature == 1 else z / temperature for z in logits]
    if synergy == 'softmax':
        return [z.log_softmax(1) for z in scaled]
    return [torch.cat([F.logsigmoid(z), F.logsigmoid(-z)], dim=1) for z in scaled]


def _to_float(logits: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Return the logits in one dtype, float32 at least, without -inf."""
    dtype = reduce(torch.promote_types, (z.dtype for z in logits), torch.float32)
    return [z.to(dtype).clamp(min=_MASKED) for z in logits]


def _no_autocast(device: torch.device) -> ContextManager:
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _cross_entropy(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the softmax cross-entropy, a mean over the images that have a label."""
    shape = log_probs.shape
    if target.shape == shape and target.is_floating_point():
        return -(target * log_probs).sum(1).mean()
    if target.shape != shape[:1] or target.is_floating_point():
        raise ValueError(
            f'target must be class indices of shape {tuple(shape[:1])} or dense of shape {tuple(shape)}, '
            f'got {target.dtype} of shape {tuple(target.shape)}')
    return F.nll_loss(log_probs, target.long())


def _binary_cross_entropy(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy, a mean over images and classes."""
    present, absent = log_probs.chunk(2, dim=1)
    if target.shape != present.shape or not target.is_floating_point():
        raise ValueError(
            f'target must be dense, of shape {tuple(present.shape)}, got {target.dtype} of shape {tuple(target.shape)}')
    return -(target * present + (1 - target) * absent).mean()


def _check_logits(logits: Sequence[torch.Tensor], partial: bool = False) -> int:
    """Return how many samples all classifiers have logits of; where partial, the backbone may have more."""
    if isinstance(logits, torch.Tensor):
        raise ValueError(
            f'logits must be a list with those of every classifier, got one tensor of shape {tuple(logits.shape)}: '
            'a DKSModel returns the list in training mode')
    if len(logits) < 2:
        raise ValueError(f'logits must come from at least two classifiers, got {len(logits)}')
    whole, last = logits[0], logits[-1]
    shape = last.shape if partial and 0 < len(last) < len(whole) else whole.shape
    if whole.ndim != 2 or whole.shape[1:] != shape[1:] or any(z.shape != shape for z in logits[1:]):
        raise ValueError(
            f'logits must all have one shape (B, C), got {[tuple(z.shape) for z in logits]}'
            + '; those of branches alone may all be of the first n samples' * partial)
    return shape[0]


def _check_options(direction: str, temperature: float, synergy: str, teacher: str) -> None:
    for name, value, known in (
            ('direction', direction, DIRECTIONS), ('synergy', synergy, SYNERGIES), ('teacher', teacher, TEACHERS)):
        if value not in known:
            raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')
    if teacher == 'ensemble' and direction in ('top-down', 'bottom-up'):
        raise ValueError(f'direction must be both, to-backbone or none where the ensemble teaches, got {direction!r}')
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f'temperature must be a positive number, got {temperature!r}')


def _parse_weight(name: str, weight: Weight, ndim: int) -> Union[float, Vector, Matrix]:
    """Return a number as float, a vector (ndim 1) or square matrix (ndim 2) as nested tuples of floats."""
    def parse(given, depth):
        return tuple(parse(w, depth - 1) for w in given) if depth else float(given)

    if hasattr(weight, 'tolist'):
        weight = weight.tolist()
    depth = ndim if isinstance(weight, (list, tuple)) else 0
    try:
        parsed = parse(weight, depth)
        rows = parsed if depth == 2 else (parsed,) if depth == 1 else ((parsed,),)
        numbers = [w for p, row in enumerate(rows) for q, w in enumerate(row) if depth < 2 or p != q]  # no diagonal
        square = depth < 2 or all(len(row) == len(rows) for row in rows)
        fits = square and all(math.isfinite(w) and w >= 0 for w in numbers)
    except (TypeError, ValueError):  # from float() and tuple(), of anything but numbers and rows of them
        fits = False
    if not fits:
        accepted = 'one per classifier' if ndim == 1 else 'an M x M matrix (teacher row, student column)'
        raise ValueError(f'{name} must be finite and not negative, a number or {accepted}, got {weight!r}')
    return parsed


def _resolve_weight(name: str, weight: Union[float, Vector, Matrix], ndim: int, count: int) -> Union[Vector, Matrix]:
    """Return the weight of every one of so many classifiers (ndim 1), or of every pair of them (ndim 2)."""
    if not isinstance(weight, tuple):
        return (weight,) * count if ndim == 1 else ((weight,) * count,) * count
    if len(weight) != count:
        accepted = f'{count} of them' if ndim == 1 else f'a {count} x {count} matrix'
        raise ValueError(
            f'{name} is for {len(weight)} classifiers, but there are {count}: give a number, or {accepted}')
    return weight


def _teaching(
        name: str, weight: Union[float, Vector, Matrix], direction: str, teacher: str, count: int) -> Matrix:
    """Return the weight of every teacher (row) and student (column), zero where the direction has no such pair."""
    if teacher == 'ensemble':
        students = dict(both=count, none=0).get(direction, 1)
        weights = _resolve_weight(name, weight, 1, count)[:students] + (0.,) * (count - students)
        return ((0.,) * count,) * count + (weights,)
    depth = (count, *range(1, count))  # the backbone comes first and is the deepest

    def teaches(p, q):
        names = {'both', 'top-down' if depth[p] > depth[q] else 'bottom-up'} | ({'to-backbone'} if q == 0 else set())
        return p != q and direction in names

    matrix = _resolve_weight(name, weight, 2, count)
    return tuple(tuple(w if teaches(p, q) else 0. for q, w in enumerate(row)) for p, row in enumerate(matrix))
