"""Value, report and gradient of the DKS objective with softmax cross-entropy, for all classifiers at once.

One softmax per classifier (two where T != 1) carries everything. The pairs share them: a student's gradient is one
linear combination of probabilities, and the report a table of M x M dot products. Weights are plain floats, so nothing
is ever copied to or read from the logits' device.
"""
import math
import os
import warnings
from contextlib import nullcontext
from functools import cache, reduce
from types import ModuleType
from typing import Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

Vector = Tuple[float, ...]
Matrix = Tuple[Vector, ...]
LN_2 = math.log(2)
LOG2_E = 1 / LN_2
BLOCK = 2 ** 18  # elements of a classifier's logits, see _in_blocks


def apply_objective(
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        ce_weight: Vector,
        synergy_weight: Matrix,
        temperature: float,
        smoothing: float = 0.,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objective of `loss.DKSLoss` with softmax cross-entropy.

    Args:
        logits: One (B, C) tensor per classifier.
        target: Class indices (B,) as int64, a dense target (B, C) in the dtype of the computation with its smoothing
            applied, or None for synergy alone.
        ce_weight: Of every classifier.
        synergy_weight: Of every teacher (row) and student (column), with a zero diagonal.
        temperature: Of the synergy.
        smoothing: Of class indices.

    Returns:
        The loss, and without gradient the cross-entropies (M,) and divergences (M, M).
    """
    device = logits[0].device
    with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext():
        if torch.compiler.is_compiling():  # the compiler fuses the pairs into one pass
            loss, ce, synergy = _by_pairs(logits, target, ce_weight, synergy_weight, temperature, smoothing)
            return loss, ce.detach(), synergy.detach().clamp(min=0)
        fused = _load_fused(device)
        function = fused.FusedObjective if fused and fused.usable(logits) else Objective
        return function.apply(ce_weight, synergy_weight, temperature, smoothing, target, *logits)


def _by_pairs(
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        ce_weight: Vector,
        synergy_weight: Matrix,
        temperature: float,
        smoothing: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same pair by pair, all of it differentiable, any number of times. Arguments as of `apply_objective`."""
    dtype = compute_dtype(logits)
    log_probs = soft_log_probs = [z.log_softmax(1, dtype=dtype) for z in logits]
    if temperature != 1:
        soft_log_probs = [(z.to(dtype) / temperature).log_softmax(1) for z in logits]
    if target is None:
        ce = log_probs[0].new_zeros(len(logits))
    elif target.ndim == 2:
        ce = torch.stack([-(target * q).sum(1).mean() for q in log_probs])
    else:
        ce = torch.stack([F.nll_loss(q, target) for q in log_probs])
        if smoothing:
            ce = torch.lerp(ce, torch.stack([-q.mean() for q in log_probs]), smoothing)
    fixed = [q.detach() for q in soft_log_probs]
    teachers = [q.exp() for q in fixed]
    cross = torch.stack([torch.stack([  # see _evaluate
        (p * ((fixed[m] if m == n else q) - fixed[0])).sum(1).mean() for n, q in enumerate(soft_log_probs)
    ]) for m, p in enumerate(teachers)])
    synergy = (cross.diagonal().unsqueeze(1) - cross) * temperature ** 2
    return weighted_loss(ce, synergy, ce_weight, synergy_weight), ce, synergy


@cache
def _load_fused(device: torch.device) -> Optional[ModuleType]:
    """The fused kernels, where triton can compile them for the device."""
    if device.type != 'cuda' and os.environ.get('TRITON_INTERPRET') != '1':  # triton's switch to run on a CPU, slowly
        return None
    try:
        from . import objective_triton
        _assert_alike(objective_triton.FusedObjective, device)
    except ImportError:
        return None
    except Exception as error:  # a GPU that triton does not know, no C compiler, other numbers than the plain version's
        warnings.warn(f'The loss goes without its fused kernels, which failed: {error}', stacklevel=2)
        return None
    return objective_triton


def _assert_alike(function: type, device: torch.device) -> None:
    """Compare a function's values and gradients with those of the plain version."""
    weights = (1., 1., 1.), ((0., 1., 1.), (1., 0., 1.), (1., 1., 0.))
    generator = torch.Generator().manual_seed(0)
    results = []
    with torch.inference_mode(False), torch.enable_grad():
        logits = [torch.randn(2, 1100, generator=generator).to(device).requires_grad_() for _ in range(3)]
        target = torch.tensor([1, 1050], device=device)
        for candidate in (function, Objective):
            out = candidate.apply(*weights, 1., 0., target, *logits)
            results.append((*out, *torch.autograd.grad(out[0], logits)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Objective(torch.autograd.Function):
    """Closed form of value and gradient, which is written over the probabilities of the forward."""

    @staticmethod
    def forward(
            ctx,
            ce_weight: Vector,
            synergy_weight: Matrix,
            temperature: float,
            smoothing: float,
            target: Optional[torch.Tensor],
            *logits: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_classifiers, batch_size = len(logits), len(logits[0])
        probs = logits[0].new_empty((num_classifiers, *logits[0].shape), dtype=compute_dtype(logits))
        soft_probs = probs if temperature == 1 else torch.empty_like(probs)
        labels = [] if target is None else [target if target.is_floating_point() else target.unsqueeze(1)]
        found = [
            _evaluate(block[:num_classifiers], temperature, smoothing, *block[num_classifiers:])
            for block in _in_blocks(*logits, probs, soft_probs, *labels)]
        cross, *ce = found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]
        ce = ce[0].sum(0) * (-LN_2 / batch_size) if ce else probs.new_zeros(num_classifiers)
        cross = F.pad(cross.sum(0), (0, 0, 1, 0)).T
        synergy = (cross.diagonal().unsqueeze(1) - cross).clamp(min=0) * (LN_2 * temperature ** 2 / batch_size)

        ctx.options = ce_weight, synergy_weight, temperature, smoothing
        ctx.save_for_backward(target, *logits)
        ctx.kept = probs, soft_probs  # no saved tensors, as they will be written to
        ctx.mark_non_differentiable(ce, synergy)
        return weighted_loss(ce, synergy, ce_weight, synergy_weight), ce, synergy

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, *_) -> Tuple[Optional[torch.Tensor], ...]:
        target, *logits = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        if ctx.kept is None or torch.is_grad_enabled():
            grads = gradients(logits, target, *ctx.options, grad_loss, needed)
        else:
            kept, ctx.kept = ctx.kept, None
            grads = _combine(target, *kept, *ctx.options, grad_loss * (1 / len(logits[0])))
            grads = [g.to(z.dtype) if wanted else None for g, z, wanted in zip(grads, logits, needed, strict=True)]
        return None, None, None, None, None, *grads


def gradients(
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        ce_weight: Vector,
        synergy_weight: Matrix,
        temperature: float,
        smoothing: float,
        grad_loss: torch.Tensor,
        needed: Sequence[bool],
) -> List[Optional[torch.Tensor]]:
    """Gradients from nothing but the arguments, for a second backward; functions of the logits with create_graph.

    Args:
        grad_loss: Gradient of the loss, a scalar.
        needed: Whether the gradient of each classifier is wanted.
    """
    create_graph = torch.is_grad_enabled()
    if not create_graph:
        logits = [z.detach().requires_grad_(wanted) for z, wanted in zip(logits, needed, strict=True)]
    with torch.enable_grad():
        loss, *_ = _by_pairs(logits, target, ce_weight, synergy_weight, temperature, smoothing)
        inputs = [z for z, wanted in zip(logits, needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=create_graph))
    return [next(found) if wanted else None for wanted in needed]


def _evaluate(
        logits: Sequence[torch.Tensor],
        temperature: float,
        smoothing: float,
        probs: torch.Tensor,
        soft_probs: torch.Tensor,
        target: Optional[torch.Tensor] = None,
) -> List[torch.Tensor]:
    """The softmaxes of some rows, and what values are made of, with logarithms to base 2.

    Powers of 2 are fast on every CPU (torch takes exp from MKL, three times as slow on AMD's), and the change of base
    is part of the addition that takes the largest logit away.

    Args:
        probs: Where to write the probabilities, (M, B, C).
        soft_probs: Where to write those at the temperature.
        target: Class indices (B, 1) or dense (B, C).

    Returns:
        Sums over classes of every Q_p * (log2 Q_q - log2 Q_0), (B, M - 1, M) by branch q and teacher p; where there is
        a target, also of it times every log2 Q_q, (B, M).
    """
    for x, place, soft_place in zip(logits, probs.unbind(0), soft_probs.unbind(0), strict=True):
        largest = x.amax(1, keepdim=True).to(probs.dtype)
        torch.add(largest * -LOG2_E, x, alpha=LOG2_E, out=place)
        if temperature != 1:
            torch.add(largest * (-LOG2_E / temperature), x, alpha=LOG2_E / temperature, out=soft_place)
    labels = None
    if target is not None and target.is_floating_point():
        labels = _dot_products(target.unsqueeze(0), probs).squeeze(1)
    elif target is not None:
        labels = probs.gather(2, target.expand(len(logits), *target.shape))
        if smoothing:
            labels = torch.lerp(labels, probs.mean(2, keepdim=True), smoothing)
        labels = labels.squeeze(2).T
    # Differences, as classifiers that agree give small numbers, which keep their digits in float32.
    differences = soft_probs[1:] - soft_probs[0]
    log_sums = soft_log_sums = _normalize_exp2(probs)
    if temperature != 1:
        soft_log_sums = _normalize_exp2(soft_probs)
    cross = _dot_products(differences, soft_probs) - (soft_log_sums[1:] - soft_log_sums[0]).transpose(0, 1)
    if labels is None:
        return [cross]
    weight = target.sum(1, keepdim=True) if target.is_floating_point() else 1.
    return [cross, labels - weight * log_sums.squeeze(2).T]


def _normalize_exp2(x: torch.Tensor) -> torch.Tensor:
    """Turn x (M, B, C) into 2^x over its sum, in place. Returns the sums' logarithms to base 2, (M, B, 1)."""
    sums = x.exp2_().sum(2, keepdim=True)
    x.mul_(sums.reciprocal())
    return sums.log2_()


def _combine(
        target: Optional[torch.Tensor],
        probs: torch.Tensor,
        soft_probs: torch.Tensor,
        ce_weight: Vector,
        synergy_weight: Matrix,
        temperature: float,
        smoothing: float,
        scale: torch.Tensor,
) -> Sequence[torch.Tensor]:
    """Gradients as combinations of probabilities (M, B, C), in place of those at the temperature.

    Args:
        scale: Gradient of the loss by the batch size.
    """
    weight = pair_weight(synergy_weight)
    columns = list(zip(*synergy_weight, strict=True))  # what a student's teachers weigh
    pulls = [temperature * sum(column) for column in columns]
    if weight is None:
        columns = [[scale * (-temperature * w) if w else None for w in column] for column in columns]
    else:
        # A student's teachers are the sum of all classifiers, the same for all of them, less itself.
        columns = [[scale * (-temperature * weight) if weight else None] * len(probs)]
        pulls = [pull + temperature * weight for pull in pulls]
    pull, label = _multiples(scale, pulls), _multiples(scale, ce_weight)
    dense = target is not None and target.is_floating_point()
    own = label * (target.sum(1, keepdim=True) if dense else float(target is not None))
    if temperature == 1:
        own = own + pull
    for given, soft_given, *rows in _in_blocks(probs, soft_probs, *([own] if dense else [])):
        teachers = soft_given.unbind(0)
        taught = [_mix(teachers, column) for column in columns]
        taught = taught[0] if len(taught) == 1 else torch.stack(taught)
        if temperature != 1:
            taught = torch.addcmul(taught, soft_given, pull, out=soft_given)
        torch.addcmul(taught, given, rows[0] if dense else own, out=soft_given)
    if target is not None:
        _subtract_target(soft_probs, target, label, smoothing)
    return soft_probs.unbind(0)


def _multiples(scale: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """A scalar times the factor of every classifier: a scalar, where it is the same for all, or (M, 1, 1)."""
    if len(set(factors)) == 1:
        return scale * factors[0]
    return torch.stack([scale * factor for factor in factors])[:, None, None]


def _mix(probs: Sequence[torch.Tensor], factors: Sequence[Optional[torch.Tensor]]) -> torch.Tensor:
    """The sum of tensors (B, C) times scalars."""
    mixed = None
    for q, factor in zip(probs, factors, strict=True):
        if factor is not None:
            mixed = q * factor if mixed is None else mixed.addcmul_(q, factor)
    return torch.zeros_like(probs[0]) if mixed is None else mixed


def _subtract_target(grads: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, smoothing: float) -> None:
    """Take a target, smoothed and times a weight, from gradients (..., B, C), in place."""
    if target.ndim == 2:
        grads.addcmul_(target, -weight)
    else:
        shape = *grads.shape[:-1], 1
        grads.scatter_add_(-1, target.unsqueeze(1).expand(shape), (weight * (smoothing - 1)).expand(shape))
        if smoothing:
            grads.sub_(weight * (smoothing / grads.shape[-1]))


def weighted_loss(
        ce: torch.Tensor, synergy: torch.Tensor, ce_weight: Vector, synergy_weight: Matrix) -> torch.Tensor:
    """The loss of cross-entropies (M,) and divergences (M, M)."""
    loss = weighted_sum(ce, ce_weight)
    weight = pair_weight(synergy_weight)
    if weight is None:
        return loss + weighted_sum(synergy.flatten(), sum(synergy_weight, ()))
    return torch.add(loss, synergy.sum(), alpha=weight) if weight else loss


def weighted_sum(values: torch.Tensor, weights: Vector) -> torch.Tensor:
    if len(set(weights)) == 1 and weights[0]:
        return values.sum() if weights[0] == 1 else weights[0] * values.sum()
    return sum((w * value for value, w in zip(values, weights, strict=True) if w), values.new_zeros(()))


def pair_weight(matrix: Matrix) -> Optional[float]:
    """The weight of every pair, None where the pairs have different ones."""
    weights = {w for p, row in enumerate(matrix) for q, w in enumerate(row) if p != q}
    return weights.pop() if len(weights) == 1 else None


def compute_dtype(logits: Sequence[torch.Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (z.dtype for z in logits), torch.float32)


def _in_blocks(*tensors: torch.Tensor) -> Iterable[Sequence[torch.Tensor]]:
    """Go through tensors (..., B, any) some rows at a time, on a CPU: so few that its caches keep them.

    Args:
        tensors: The first has all classes.
    """
    blocks = tensors[0].shape[-2:].numel() // BLOCK + 1
    if blocks == 1 or tensors[0].device.type != 'cpu':
        return [tensors]
    return zip(*(x.chunk(blocks, -2) for x in tensors), strict=True)


def _dot_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Dot products (B, N, M) over the classes of x (N, B, C) and y (M, B, C)."""
    if _multiplies_exactly(y):
        return torch.bmm(x.permute(1, 0, 2), y.permute(1, 2, 0))
    return torch.stack([(x * q).sum(2).T for q in y.unbind(0)], 2)


def _multiplies_exactly(x: torch.Tensor) -> bool:
    """Whether matrix products keep the digits of x: not as TF32 or bfloat16, which users may allow for all of them."""
    if x.is_cuda or x.dtype == torch.float64:
        return not x.is_cuda
    try:
        return torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:  # set in several ways
        return False
