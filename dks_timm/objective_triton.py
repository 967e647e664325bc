"""The objective on a GPU: fused kernels for value, report and gradient.

A program takes one row of all classifiers. It reads the logits by online softmax, so that any number of classes will
do, and leaves a handful of numbers for the means over the batch. While the row is in the caches it also writes the
gradient, as for a loss whose own gradient is 1: logits are read once, gradients written once, and backward finds its
work done. It looks at the gradient of the loss on the device, and does the work again where that is not 1 (gradient
accumulation, loss scaling, a second backward): one more read and write, as for a scaling, but rounded once. Float16
could not hold the small gradients that a scaled loss is to lift, so there backward alone writes them.
"""
from typing import Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .objective import Matrix, Vector, compute_dtype, gradients

MAX_BLOCK = 1024  # classes at a time


def usable(logits: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels take these logits. They compute in float32."""
    return compute_dtype(logits) == torch.float32 and all(z.device == logits[0].device for z in logits)


class FusedObjective(torch.autograd.Function):
    """See `objective.Objective`."""

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
        ctx.options = ce_weight, synergy_weight, temperature, smoothing
        at_once = all(ctx.needs_input_grad[5:]) and all(z.dtype != torch.float16 for z in logits)
        grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits] if at_once else None
        size = num_classifiers ** 2
        rows = logits[0].new_empty((num_classifiers * 4 + 1 + size, batch_size), dtype=torch.float32)
        stats, ce_rows, cross_rows = rows.split((3 * num_classifiers + 1, num_classifiers, size))
        loss, ce, synergy = (
            rows.new_empty(shape) for shape in ((), num_classifiers, (num_classifiers, num_classifiers)))
        _launch(_forward_kernel, logits, target, ctx.options, grads, stats, ce_rows, cross_rows, WRITE=at_once)
        with torch.cuda.device_of(loss):
            _mean_kernel[(1,)](
                ce_rows, cross_rows, loss, ce, synergy, ce_weight, sum(synergy_weight, ()), batch_size,
                M=num_classifiers, LABELS=target is not None, BLOCK=MAX_BLOCK)
        ctx.save_for_backward(target, *logits)
        ctx.kept = stats, grads
        ctx.mark_non_differentiable(ce, synergy)
        return loss, ce, synergy

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor, *_) -> Tuple[Optional[torch.Tensor], ...]:
        target, *logits = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            return None, None, None, None, None, *gradients(logits, target, *ctx.options, grad_loss, needed)
        stats, grads = ctx.kept
        ctx.kept = stats, None  # they are the caller's from now on
        written = grads is not None
        if not written:
            grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]
        _launch(_backward_kernel, logits, target, ctx.options, grads, stats, grad_loss, WRITTEN=written)
        return None, None, None, None, None, *(g if wanted else None for g, wanted in zip(grads, needed, strict=True))


def _launch(kernel, logits, target, options, grads, *others, **flags):
    ce_weight, synergy_weight, temperature, smoothing = options
    batch_size, num_classes = logits[0].shape
    logits = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
    target_ndim = 0 if target is None else target.ndim
    block = min(triton.next_power_of_2(num_classes), MAX_BLOCK)
    num_warps = min(max(triton.next_power_of_2(len(logits)) * block // 1024, 1), 8)
    with torch.cuda.device_of(logits[0]):
        kernel[(batch_size,)](
            tuple(logits), tuple(z.stride(0) for z in logits), target.contiguous() if target_ndim else None,
            tuple(grads) if grads else None, *others, ce_weight, sum(synergy_weight, ()), temperature, smoothing,
            batch_size, num_classes, M=len(logits), TARGET=target_ndim, SOFT=temperature != 1, SMOOTH=smoothing != 0,
            BLOCK=block, num_warps=num_warps, **flags)


@triton.jit
def _forward_kernel(
        logits,  # M times (B, C)
        strides,  # of their rows
        target,  # (B,) where TARGET is 1, (B, C) where it is 2
        grads,  # M times (B, C), written where WRITE
        stats,  # (3 * M + 1, B): maxima, 1 / normalizers at T = 1, 1 / normalizers at T, sum of the target
        ce,  # (M, B)
        cross,  # (M, M, B)
        ce_weight,
        pair_weight,  # M * M numbers, row by row
        temperature,
        smoothing,
        batch_size,
        num_classes,
        M: tl.constexpr,
        TARGET: tl.constexpr,
        SOFT: tl.constexpr,
        SMOOTH: tl.constexpr,
        WRITE: tl.constexpr,
        BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cool = 1. / temperature
    # What is summed up are differences, from a level of every classifier near its maximum and from the backbone: so
    # classifiers that agree give small numbers, whose differences keep their digits in float32.
    cols = tl.arange(0, BLOCK)
    levels = ()
    for m in tl.static_range(M):
        z = tl.load(logits[m] + row * strides[m] + cols, mask=cols < num_classes, other=-float('inf')).to(tl.float32)
        levels = levels + (tl.max(z, 0),)
    tops = levels
    sums = ()
    soft_sums = ()
    labelled = ()  # sum_c target * (z - level)
    totals = ()  # sum_c (z - level)
    for m in tl.static_range(M):  # noqa: B007
        sums = sums + (0.,)
        soft_sums = soft_sums + (0.,)
        labelled = labelled + (0.,)
        totals = totals + (0.,)
    dots = ()  # sum_c exp((z_p - top_p) / T) * (z_q - z_0), of teacher p and student q > 0
    for pair in tl.static_range(M * (M - 1)):  # noqa: B007
        dots = dots + (0.,)
    mass = 0.

    for start in range(0, num_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < num_classes
        values = ()
        deltas = ()
        for m in tl.static_range(M):
            z = tl.load(logits[m] + row * strides[m] + cols, mask=inside, other=-float('inf')).to(tl.float32)
            values = values + (z,)
            if m:
                deltas = deltas + (tl.where(inside, (z - values[0]) - (levels[m] - levels[0]), 0.),)
        if TARGET == 2:
            y = tl.load(target + row * num_classes + cols, mask=inside, other=0.)
            mass += tl.sum(y, 0)
        old_tops, old_sums, old_soft_sums, old_dots = tops, sums, soft_sums, dots
        old_labelled, old_totals = labelled, totals
        tops = ()
        sums = ()
        soft_sums = ()
        labelled = ()
        totals = ()
        dots = ()
        for m in tl.static_range(M):
            top = tl.maximum(old_tops[m], tl.max(values[m], 0))
            probs = tl.exp(values[m] - top)
            shrink = tl.exp(old_tops[m] - top)
            tops = tops + (top,)
            sums = sums + (old_sums[m] * shrink + tl.sum(probs, 0),)
            if SOFT:
                probs = tl.exp((values[m] - top) * cool)
                shrink = tl.exp((old_tops[m] - top) * cool)
                soft_sums = soft_sums + (old_soft_sums[m] * shrink + tl.sum(probs, 0),)
            else:
                soft_sums = soft_sums + (sums[m],)
            for n in tl.static_range(M - 1):
                dots = dots + (old_dots[m * (M - 1) + n] * shrink + tl.sum(probs * deltas[n], 0),)
            if TARGET == 2:
                labelled = labelled + (old_labelled[m] + tl.sum(tl.where(inside, y * (values[m] - levels[m]), 0.), 0),)
            else:
                labelled = labelled + (0.,)
            if SMOOTH:
                totals = totals + (old_totals[m] + tl.sum(tl.where(inside, values[m] - levels[m], 0.), 0),)
            else:
                totals = totals + (0.,)

    if TARGET == 1:
        label = tl.load(target + row)
        mass = 1.
    inverses = ()
    soft_inverses = ()
    for m in tl.static_range(M):
        inverses = inverses + (1. / sums[m],)
        soft_inverses = soft_inverses + (1. / soft_sums[m],)
        tl.store(stats + m * batch_size + row, tops[m])
        tl.store(stats + (M + m) * batch_size + row, inverses[m])
        tl.store(stats + (2 * M + m) * batch_size + row, soft_inverses[m])
        rise = tops[m] - levels[m]
        if TARGET == 1:
            known = (label >= 0) & (label < num_classes)  # the loss of any other label is NaN
            z = tl.load(logits[m] + row * strides[m] + label, mask=known, other=float('nan')).to(tl.float32)
            picked = z - tops[m]
            if SMOOTH:
                picked += smoothing * ((totals[m] / num_classes - rise) - picked)
            tl.store(ce + m * batch_size + row, tl.log(sums[m]) - picked)
        if TARGET == 2:
            tl.store(ce + m * batch_size + row, mass * (tl.log(sums[m]) + rise) - labelled[m])
        for n in tl.static_range(M - 1):
            shift = (tops[n + 1] - levels[n + 1]) - (tops[0] - levels[0])
            shift += temperature * (tl.log(soft_sums[n + 1]) - tl.log(soft_sums[0]))
            mean = dots[m * (M - 1) + n] * soft_inverses[m] - shift
            tl.store(cross + (m * M + n + 1) * batch_size + row, temperature * mean)
    tl.store(stats + 3 * M * batch_size + row, mass)
    if WRITE:
        _write_gradient(
            logits, strides, target, grads, row, tops, inverses, soft_inverses, mass, ce_weight, pair_weight,
            temperature, smoothing, 1. / batch_size, num_classes, M, TARGET, SOFT, BLOCK)


@triton.jit
def _mean_kernel(
        ce_rows,  # (M, B)
        cross_rows,  # (M, M, B), without those of the first student
        loss,
        ce,  # (M,)
        synergy,  # (M, M)
        ce_weight,
        pair_weight,
        batch_size,
        M: tl.constexpr,
        LABELS: tl.constexpr,
        BLOCK: tl.constexpr,
):
    total = 0.
    for m in tl.static_range(M):
        mean = 0.
        if LABELS:
            mean = _mean(ce_rows + m * batch_size, batch_size, BLOCK)
            if ce_weight[m] != 0.:
                total += ce_weight[m] * mean
        tl.store(ce + m, mean)
        own = 0.
        if m:
            own = _mean(cross_rows + m * (M + 1) * batch_size, batch_size, BLOCK)
        for n in tl.static_range(M):
            divergence = 0.
            if m != n:
                divergence = own
                if n:
                    divergence -= _mean(cross_rows + (m * M + n) * batch_size, batch_size, BLOCK)
                divergence = tl.where(divergence < 0., 0., divergence)  # NaN stays NaN
                if pair_weight[m * M + n] != 0.:
                    total += pair_weight[m * M + n] * divergence
            tl.store(synergy + m * M + n, divergence)
    tl.store(loss, total)


@triton.jit
def _mean(values, count, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        sums += tl.load(values + cols, mask=cols < count, other=0.)
    return tl.sum(sums, 0) / count


@triton.jit
def _backward_kernel(
        logits,
        strides,
        target,
        grads,
        stats,
        grad_loss,  # a scalar
        ce_weight,
        pair_weight,
        temperature,
        smoothing,
        batch_size,
        num_classes,
        M: tl.constexpr,
        TARGET: tl.constexpr,
        SOFT: tl.constexpr,
        SMOOTH: tl.constexpr,
        WRITTEN: tl.constexpr,  # whether grads holds the gradients for grad_loss = 1
        BLOCK: tl.constexpr,
):
    scale = tl.load(grad_loss)
    if WRITTEN:
        if scale == 1.:
            return
    row = tl.program_id(0).to(tl.int64)
    tops = ()
    inverses = ()
    soft_inverses = ()
    for m in tl.static_range(M):
        tops = tops + (tl.load(stats + m * batch_size + row),)
        inverses = inverses + (tl.load(stats + (M + m) * batch_size + row),)
        soft_inverses = soft_inverses + (tl.load(stats + (2 * M + m) * batch_size + row),)
    mass = tl.load(stats + 3 * M * batch_size + row)
    _write_gradient(
        logits, strides, target, grads, row, tops, inverses, soft_inverses, mass, ce_weight, pair_weight,
        temperature, smoothing, scale / batch_size, num_classes, M, TARGET, SOFT, BLOCK)


@triton.jit
def _write_gradient(
        logits,
        strides,
        target,
        grads,
        row,
        tops,
        inverses,
        soft_inverses,
        mass,
        ce_weight,
        pair_weight,
        temperature,
        smoothing,
        scale,
        num_classes,
        M: tl.constexpr,
        TARGET: tl.constexpr,
        SOFT: tl.constexpr,
        BLOCK: tl.constexpr,
):
    cool = 1. / temperature
    for start in range(0, num_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < num_classes
        probs = ()
        soft_probs = ()
        for m in tl.static_range(M):
            z = tl.load(logits[m] + row * strides[m] + cols, mask=inside, other=-float('inf')).to(tl.float32) - tops[m]
            probs = probs + (tl.exp(z) * inverses[m],)
            if SOFT:
                soft_probs = soft_probs + (tl.exp(z * cool) * soft_inverses[m],)
            else:
                soft_probs = soft_probs + (probs[m],)
        if TARGET == 1:
            y = tl.where(cols == tl.load(target + row), 1. - smoothing, 0.) + smoothing / num_classes
        if TARGET == 2:
            y = tl.load(target + row * num_classes + cols, mask=inside, other=0.)
        for m in tl.static_range(M):
            pull = 0.
            teachers = tl.zeros((BLOCK,), tl.float32)
            for n in tl.static_range(M):
                if n != m:
                    pull += pair_weight[n * M + m]
                    teachers += pair_weight[n * M + m] * soft_probs[n]
            grad = temperature * (pull * soft_probs[m] - teachers)
            if TARGET:
                grad += ce_weight[m] * (mass * probs[m] - y)
            tl.store(grads[m] + row * num_classes + cols, (scale * grad).to(grads[m].dtype.element_ty), mask=inside)
