"""The fused kernels, run by triton's interpreter on the CPU, against the plain version in float64.

The interpreter must be chosen before triton is imported, so the tests themselves run in a process of their own.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loss import MATRIX, make_logits, make_target
from timm.loss import LabelSmoothingCrossEntropy

from dks_timm import DKSLoss, objective, synergy_loss

pytest.importorskip('triton', reason='triton is not installed')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
interpreted = pytest.mark.skipif(not INTERPRETED, reason='runs in the process of test_kernels_under_the_interpreter')
ROOT = Path(__file__).resolve().parent.parent


def run_interpreted(*args):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore::RuntimeWarning', *args]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason='starts this very process')
def test_kernels_under_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason='starts this very process')
def test_kernels_keep_the_contract_of_the_loss():
    # Not those of what the plain version alone keeps, nor the largest: the interpreter is slow.
    left_out = ('kept_memory', 'takes_the_memory', 'float32_stays_close', 'compile')
    run_interpreted('tests/test_loss.py', '-k', ' and '.join(f'not {name}' for name in left_out))


def evaluate(loss_fn, logits, target, scale=1.0):
    out = loss_fn(logits, target)
    return out, torch.autograd.grad(out['loss'] * scale, [z for z in logits if z.requires_grad])


def assert_equals_plain(loss_fn, logits, target, scale=1.0, rtol=1e-6):
    out, grads = evaluate(loss_fn, logits, target, scale)
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in logits]
    expected, expected_grads = evaluate(loss_fn, exact, target, scale)
    assert type(out['loss'].grad_fn).__name__ == 'FusedObjectiveBackward'
    for name, value in out.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=rtol, atol=rtol)
    for grad, z, other in zip(grads, [z for z in logits if z.requires_grad], expected_grads, strict=True):
        assert grad.dtype == z.dtype
        rounding = torch.finfo(z.dtype).eps  # not half of it, as the interpreter cuts bfloat16 off
        torch.testing.assert_close(
            grad.double(), other, rtol=rounding + rtol, atol=2e-7 * float(other.abs().max()) + 1e-8 * scale)


@interpreted
@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('direction', ['both', 'top-down', 'none'])
@pytest.mark.parametrize('target', ['index', 'dense', 'unnormalized'])
def test_value_report_and_gradient_equal_the_plain_version(target, direction, temperature):
    loss_fn = DKSLoss(direction=direction, temperature=temperature, ce_weight=[1.0, 0.0, 0.5], synergy_weight=2.0)
    assert_equals_plain(loss_fn, make_logits(dtype=torch.float32), make_target(target))


@interpreted
@pytest.mark.parametrize('num_classifiers, temperature', [(2, 1.0), (5, 3.0)])
def test_more_classes_than_fit_in_a_block(num_classifiers, temperature):
    shape = 2, 2500
    for target in (make_target(shape=shape), make_target('dense', shape=shape)):
        assert_equals_plain(
            DKSLoss(temperature=temperature), make_logits(num_classifiers, torch.float32, shape=shape), target)


@interpreted
@pytest.mark.parametrize('shape, smoothing', [((5, 7), 0.4), ((2, 2500), 0.1)])
def test_label_smoothing_equals_the_plain_version(shape, smoothing):
    loss_fn = DKSLoss(LabelSmoothingCrossEntropy(smoothing))
    assert_equals_plain(loss_fn, make_logits(dtype=torch.float32, shape=shape), make_target(shape=shape))


@interpreted
@pytest.mark.parametrize('direction', ['both', 'bottom-up'])
def test_weights_of_every_pair_equal_the_plain_version(direction):
    loss_fn = DKSLoss(synergy_weight=MATRIX, direction=direction, ce_weight=[0.0, 0.5, 1.0, 2.0])
    assert_equals_plain(loss_fn, make_logits(4, torch.float32), make_target())
    logits = make_logits(4, torch.float32)
    exact = [z.detach().double().requires_grad_() for z in logits]
    torch.testing.assert_close(
        objective.apply_objective(logits, None, (0.,) * 4, loss_fn.resolve_weights(4)[1], 2.0)[0].double(),
        objective.apply_objective(exact, None, (0.,) * 4, loss_fn.resolve_weights(4)[1], 2.0)[0])


@interpreted
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1.0, 1024.0])
def test_half_precision_is_computed_in_float32_and_rounded_once(scale, dtype):
    shape = 4, 300
    assert_equals_plain(DKSLoss(), make_logits(dtype=dtype, shape=shape), make_target(shape=shape), scale)


@interpreted
def test_classifiers_may_differ_in_dtype_and_layout():
    first, second, third = make_logits(dtype=torch.float32)
    second = second.detach().to(torch.bfloat16).requires_grad_()
    third = third.detach().T.contiguous().T.requires_grad_()
    assert_equals_plain(DKSLoss(), [first, second, third], make_target())


@interpreted
def test_gradients_are_written_once_where_the_loss_is_not_scaled():
    logits = make_logits(dtype=torch.float32)
    loss = DKSLoss()(logits, make_target())['loss']
    written = [grad.clone() for grad in loss.grad_fn.kept[1]]
    for grad in loss.grad_fn.kept[1]:
        grad.fill_(7)  # whoever writes again overwrites it
    assert all(grad.eq(7).all() for grad in torch.autograd.grad(loss, logits, retain_graph=True))
    for scale in (1, 4):  # these are somebody's by now
        grads = torch.autograd.grad(scale * loss, logits, retain_graph=True)
        for grad, other in zip(grads, written, strict=True):
            torch.testing.assert_close(grad, scale * other)


@interpreted
def test_a_scaled_loss_gets_its_gradients_in_backward():
    logits = make_logits(dtype=torch.float32)
    expected = torch.autograd.grad(DKSLoss()(logits, make_target())['loss'], logits)
    scaled = torch.autograd.grad(DKSLoss()(logits, make_target())['loss'] / 8, logits)
    for grad, other in zip(scaled, expected, strict=True):
        torch.testing.assert_close(8 * grad, other)


@interpreted
def test_a_frozen_classifier_teaches_and_gets_no_gradient():
    logits = make_logits(dtype=torch.float32)
    logits[1] = logits[1].detach()
    assert_equals_plain(DKSLoss(), logits, make_target())


@interpreted
def test_second_derivatives_are_those_of_the_plain_version():
    logits = make_logits(dtype=torch.float32)
    exact = [z.detach().double().requires_grad_() for z in logits]
    vectors = [torch.randn_like(z) for z in exact]
    products = []
    for inputs in (logits, exact):
        loss = DKSLoss(temperature=2.0)(inputs, make_target())['loss']
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        products.append(torch.autograd.grad(grads, inputs, [v.to(inputs[0]) for v in vectors]))
    for product, expected in zip(*products, strict=True):
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_a_label_that_is_no_class_makes_the_loss_nan():
    target = make_target()
    target[2] = 11
    assert DKSLoss()(make_logits(dtype=torch.float32), target)['loss'].isnan()


@interpreted
def test_float64_takes_the_plain_version():
    assert type(synergy_loss(make_logits()).grad_fn).__name__ == 'ObjectiveBackward'


@interpreted
@pytest.mark.parametrize('fault, complaint', [('fails', 'no compiler'), ('skips the gradient', 'not close')])
def test_kernels_that_fail_or_are_wrong_are_replaced_by_the_plain_version_with_a_warning(monkeypatch, fault, complaint):
    from dks_timm import objective_triton
    launch = objective_triton._launch

    def faulty(kernel, *args, **flags):
        if fault == 'fails':
            raise RuntimeError('no compiler')
        launch(kernel, *args, **{name: name == 'WRITTEN' and value for name, value in flags.items()})

    monkeypatch.setattr(objective_triton, '_launch', faulty)
    objective._load_fused.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f'(?s)goes without its fused kernels, which failed: .*{complaint}'):
            out = DKSLoss()(make_logits(dtype=torch.float32), make_target())
    finally:
        objective._load_fused.cache_clear()
    assert type(out['loss'].grad_fn).__name__ == 'ObjectiveBackward'


@pytest.mark.skipif(INTERPRETED, reason='about the process without it')
def test_cpu_logits_never_load_the_kernels():
    DKSLoss()(make_logits(dtype=torch.float32), make_target())
    assert 'dks_timm.objective_triton' not in sys.modules
