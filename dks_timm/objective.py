"""Value, report and gradient of the DKS objective with softmax cross-entropy, for all classifiers at once.

One softmax per classifier (two where T != 1) carries everything. The pairs share them: a student's gradient is one
linear combination of probabilities, and the report a table of M x M dot products. Weights are plain floats, so nothing
is ever copied to or read from the logits' device.
"""
import os
import warnings
from functools import cache, reduce
from types import ModuleType
from typing import List, Optional, Sequence, Tuple, Union

import torch

Vector = Tuple[float, ...]
Matrix = Tuple[Vector, ...]
Probs = Union[torch.Tensor, List[torch.Tensor]]  # of every classifier, (M, B, C) or M times (B, C)
BLOCK = 2 ** 18  # elements of a classifier's logits, see _row_blocks


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
    fused = None if torch.compiler.is_compiling() else _load_fused(logits[0].device)
    function = fused.FusedObjective if fused and fused.usable(logits) else Objective
    with torch.autocast(logits[0].device.type, enabled=False):
        return function.apply(ce_weight, synergy_weight, temperature, smoothing, target, *logits)


@cache
def _load_fused(device: torch.device) -> Optional[ModuleType]:
    """The fused kernels, where triton can compile them for the device. Compiled code needs none."""
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
    """Closed form of value and gradient.

    Where tensors are run as they come, the gradient is written over the probabilities of the forward; a second backward
    makes these anew. Compiled code leaves such things to the compiler.
    """

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
        dtype = compute_dtype(logits)
        probs = soft_probs = None
        if not torch.compiler.is_compiling():
            shape = len(logits), *logits[0].shape
            probs = logits[0].new_empty(shape, dtype=dtype)
            soft_probs = probs if temperature == 1 else torch.empty_like(probs)
        sums = []
        for rows in _row_blocks(logits[0]):
            ce, cross, *found = _evaluate(
                *_take(rows, logits, target, probs, soft_probs), temperature, smoothing, dtype)
            sums.append((ce, cross))
        ce, cross = sums[0] if len(sums) == 1 else (sum(parts[1:], parts[0]) for parts in zip(*sums, strict=True))
        if probs is None:
            probs, soft_probs = found
        ce, synergy = ce / len(logits[0]), divergences(cross * (temperature / len(logits[0])))

        ctx.options = ce_weight, synergy_weight, temperature, smoothing
        if torch.compiler.is_compiling():
            ctx.save_for_backward(target, *logits, *probs, *(soft_probs if temperature != 1 else ()))
        else:
            ctx.save_for_backward(target, *logits)
            ctx.kept = probs, soft_probs  # no saved tensors, as they will be written to
        ctx.mark_non_differentiable(ce, synergy)
        return weighted_loss(ce, synergy, ce_weight, synergy_weight), ce, synergy

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, *_) -> Tuple[Optional[torch.Tensor], ...]:
        num_classifiers = len(ctx.options[0])
        target, *saved = ctx.saved_tensors
        logits = saved[:num_classifiers]
        if torch.compiler.is_compiling():
            probs, soft_probs, writable = saved[num_classifiers:2 * num_classifiers], saved[-num_classifiers:], False
        elif ctx.kept is None or torch.is_grad_enabled():
            return None, None, None, None, None, *gradients(
                logits, target, *ctx.options, grad_loss, ctx.needs_input_grad[5:])
        else:
            (probs, soft_probs), ctx.kept, writable = ctx.kept, None, True
        scale = grad_loss / len(logits[0])
        options = *ctx.options, scale, ctx.needs_input_grad[5:]
        if writable and pair_weight(ctx.options[1]) is not None:
            for rows in _row_blocks(logits[0]):
                _, *given = _take(rows, (), target, probs, soft_probs)
                _combine(*given, *options, in_place=True)
            grads = [g if needed else None for g, needed in zip(soft_probs, ctx.needs_input_grad[5:], strict=True)]
        else:
            grads = _combine(target, probs, soft_probs, *options)
        return None, None, None, None, None, *_as_logits(grads, logits)


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
    """Gradients of the objective from nothing but its arguments, themselves functions of the logits (create_graph).

    Args:
        grad_loss: Gradient of the loss, a scalar.
        needed: Whether the gradient of each classifier is wanted.
    """
    dtype = compute_dtype(logits)
    probs = soft_probs = _softmaxes(logits, dtype)
    if temperature != 1:
        soft_probs = _softmaxes(logits, dtype, temperature)
    grads = _combine(target, probs, soft_probs, ce_weight, synergy_weight, temperature, smoothing,
                     grad_loss / len(logits[0]), needed)
    return _as_logits(grads, logits)


def _as_logits(
        grads: Sequence[Optional[torch.Tensor]], logits: Sequence[torch.Tensor]) -> List[Optional[torch.Tensor]]:
    return [grad if grad is None else grad.to(z.dtype) for grad, z in zip(grads, logits, strict=True)]


def _evaluate(
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        probs: Optional[torch.Tensor],
        soft_probs: Optional[torch.Tensor],
        temperature: float,
        smoothing: float,
        dtype: torch.dtype,
) -> Tuple[torch.Tensor, torch.Tensor, Probs, Probs]:
    """Of some rows, the sums of cross-entropies (M,) and of Q_p * log Q_q (M, M), and the softmaxes.

    Args:
        probs: Where to write the softmaxes, (M, B, C), if not None.
        soft_probs: The same for those at the temperature.
    """
    probs = _softmaxes(logits, dtype, out=probs)
    top = torch.stack([x.amax(1) for x in logits]).to(dtype)
    log_norm = _log_norm(probs)
    if target is None:
        ce = top.new_zeros(len(logits))
    elif target.ndim == 1:
        picked = torch.cat([x.gather(1, target[:, None]) for x in logits], 1).T.to(dtype)
        if smoothing:
            picked = torch.lerp(picked, torch.stack([x.mean(1, dtype=dtype) for x in logits]), smoothing)
        ce = (top - picked + log_norm).sum(1)
    else:
        picked = torch.stack([(target * (x - t[:, None])).sum(1) for x, t in zip(logits, top, strict=True)])
        ce = (target.sum(1) * log_norm - picked).sum(1)

    if temperature == 1:
        soft_probs = probs
    else:
        soft_probs = _softmaxes(logits, dtype, temperature, soft_probs)
        log_norm = _log_norm(soft_probs)
    # A divergence needs sum_c Q_p * (log Q_p - log Q_q). With log-probabilities measured from the backbone's,
    # classifiers that agree give small numbers, whose differences keep their digits in float32.
    shift = (top - top[0]) + temperature * (log_norm - log_norm[0])
    first = logits[0].to(dtype)
    cross = [top.new_zeros(len(logits))]
    for x, s in zip(logits[1:], shift[1:], strict=True):
        cross.append(_dot_products(soft_probs, (x - first).sub_(s[:, None])))
    return ce, torch.stack(cross, 1), probs, soft_probs


def _combine(
        target: Optional[torch.Tensor],
        probs: Probs,
        soft_probs: Probs,
        ce_weight: Vector,
        synergy_weight: Matrix,
        temperature: float,
        smoothing: float,
        scale: torch.Tensor,
        needed: Sequence[bool],
        in_place: bool = False,
) -> List[Optional[torch.Tensor]]:
    """Gradients as combinations of probabilities, in place of those at the temperature where all pairs weigh the same.

    Args:
        scale: Gradient of the loss by the batch size.
    """
    num_classifiers, (batch_size, num_classes) = len(probs), probs[0].shape

    # Where all pairs have one weight, a student's teachers are the sum of all classifiers less itself. Not for second
    # derivatives: its own part of the sum is no fixed teacher.
    weight = None if torch.is_grad_enabled() else pair_weight(synergy_weight)
    shared = scale.new_zeros(())
    if weight:
        shared = torch.add(soft_probs[0], soft_probs[1])
        for q in soft_probs[2:]:
            shared += q
        shared *= scale * (-temperature * weight)

    scaled = {}

    def by(factor):
        if factor not in scaled:
            scaled[factor] = scale * factor
        return scaled[factor]

    grads = [None] * num_classifiers
    index = target[:, None] if target is not None and target.ndim == 1 else None
    for m in range(num_classifiers):
        if not needed[m]:
            continue
        grad, pull = shared, 0.
        if weight is None:
            pull = sum(row[m] for row in synergy_weight)
            for q, row in zip(soft_probs, synergy_weight, strict=True):
                if row[m]:
                    grad = torch.addcmul(grad, q.detach(), by(-temperature * row[m]))
        else:
            pull = num_classifiers * weight
        mass = ce_weight[m] if target is not None else 0.
        by_mass = by
        if target is not None and index is None:
            mass, by_mass = mass * target.sum(1, keepdim=True), scale.mul
        out = soft_probs[m] if in_place else None
        if temperature == 1:
            grad = torch.addcmul(grad, probs[m], by_mass(pull + mass), out=out)
        else:
            grad = torch.addcmul(grad, soft_probs[m], by(temperature * pull), out=out)
            grad.addcmul_(probs[m], by_mass(mass))
        if index is not None:
            grad.scatter_add_(1, index, by(ce_weight[m] * (smoothing - 1)).expand(batch_size, 1))
            if smoothing:
                grad.sub_(by(ce_weight[m] * smoothing / num_classes))
        elif target is not None:
            grad.addcmul_(target, by(-ce_weight[m]))
        grads[m] = grad
    return grads


def weighted_loss(
        ce: torch.Tensor, synergy: torch.Tensor, ce_weight: Vector, synergy_weight: Matrix) -> torch.Tensor:
    """The loss of cross-entropies (M,) and divergences (M, M)."""
    loss = weighted_sum(ce, ce_weight)
    weight = pair_weight(synergy_weight)
    if weight is None:
        return loss + weighted_sum(synergy.flatten(), sum(synergy_weight, ()))
    return torch.add(loss, synergy.sum(), alpha=weight) if weight else loss


def divergences(cross: torch.Tensor) -> torch.Tensor:
    """Divergences from sum_c Q_p * log Q_q of every teacher p and student q, up to a number per teacher."""
    return (cross.diagonal()[:, None] - cross).clamp(min=0)


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


def _row_blocks(logits: torch.Tensor) -> List[Optional[slice]]:
    """Rows to go through together, None for all: on a CPU, few enough for its caches to hold between two operations."""
    if torch.compiler.is_compiling() or logits.device.type != 'cpu' or logits.numel() <= BLOCK:
        return [None]
    batch_size, num_classes = logits.shape
    step = max(BLOCK // num_classes, 1)
    return [slice(start, start + step) for start in range(0, batch_size, step)]


def _take(
        rows: Optional[slice],
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        probs: Optional[torch.Tensor],
        soft_probs: Optional[torch.Tensor],
) -> Tuple[Sequence[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Some rows of each."""
    if rows is None:
        return logits, target, probs, soft_probs
    target = None if target is None else target[rows]
    return [z[rows] for z in logits], target, probs[:, rows], soft_probs[:, rows]


def _softmaxes(
        logits: Sequence[torch.Tensor],
        dtype: torch.dtype,
        temperature: float = 1.,
        out: Optional[torch.Tensor] = None,
) -> Probs:
    """Probabilities of every classifier, in one tensor (M, B, C) where that is given."""
    probs = []
    for m, x in enumerate(logits):
        if temperature != 1:
            x = x.to(dtype) / temperature
        probs.append(torch.softmax(x, 1, dtype=dtype, out=None if out is None else out[m]))
    return probs if out is None else out


def _log_norm(probs: Probs) -> torch.Tensor:
    """Log-normalizer of logits less their maximum, (M, B)."""
    top = probs.amax(2) if isinstance(probs, torch.Tensor) else torch.stack([p.amax(1) for p in probs])
    return -top.log()


def _dot_products(probs: Probs, values: torch.Tensor) -> torch.Tensor:
    """Dot products of every classifier's probabilities with values (B, C): (M,)."""
    if isinstance(probs, torch.Tensor) and _multiplies_exactly(probs):
        return torch.bmm(values[:, None], probs.permute(1, 2, 0)).sum(0)[0]  # many times faster than its transpose
    # Not torch.dot, whose float32 error grows with B * C.
    return torch.stack([(q * values).sum() for q in probs])


def _multiplies_exactly(x: torch.Tensor) -> bool:
    """Whether matrix products keep the digits of x: not as TF32 or bfloat16, which users may allow for all of them."""
    if x.is_cuda or x.dtype == torch.float64:
        return not x.is_cuda
    try:
        return torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:  # set in several ways
        return False
