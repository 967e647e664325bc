"""Synergy between classifiers of several labels an image: each class by itself, against a float64 reference."""
import itertools

import pytest
import torch
import torch.nn as nn
from timm.loss import MULTI_LABEL_LOSS_TYPES, BinaryCrossEntropy, create_classification_loss
from torch.distributions import Bernoulli, kl_divergence

from dks_timm.method.loss import DKSLoss, synergy_loss

BATCH, CLASSES = 6, 11


def make_logits(num_classifiers=3, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(num_classifiers)]


def make_target(soft=False):
    target = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return target if soft else (target > 0.7).double()


def pairs(logits, temperature=1.0, sum_classes=False):
    """Divergences by torch.distributions in float64: teacher row, student column."""
    each = [Bernoulli(logits=z.double() / temperature) for z in logits]
    fixed = [Bernoulli(logits=z.detach().double() / temperature) for z in logits]
    return [[
        temperature ** 2 * kl_divergence(p, q).sum() / (BATCH if sum_classes else BATCH * CLASSES) for q in each]
        for p in fixed]


def criterion_of(loss_type, **settings):
    counts = dict(class_counts=[3.0] * CLASSES, num_samples=10) if loss_type == 'db' else {}
    return create_classification_loss(loss_type, multi_label=True, **counts, **settings)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('soft', [False, True])
def test_value_and_gradient_equal_a_reference(soft, temperature):
    logits, target = make_logits(), make_target(soft)
    out = DKSLoss(synergy='sigmoid', ce_weight=0.5, synergy_weight=2.0, temperature=temperature)(logits, target)
    table = pairs(logits, temperature)
    ce = [nn.functional.binary_cross_entropy_with_logits(z, target) for z in logits]
    loss = 0.5 * sum(ce) + 2.0 * sum(table[p][q] for p, q in itertools.permutations(range(3), 2))
    torch.testing.assert_close(out['loss'], loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out['ce'], torch.stack(ce).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        out['synergy'], torch.stack([torch.stack(row) for row in table]).detach(), rtol=1e-10, atol=1e-12)
    grads, expected = (torch.autograd.grad(value, logits) for value in (out['loss'], loss))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('direction, teaches', [('top-down', [(0, 1)]), ('bottom-up', [(1, 0)]), ('none', [])])
def test_directions_are_those_of_single_labels(direction, teaches):
    logits = make_logits(2)
    expected = sum((pairs(logits)[p][q] for p, q in teaches), torch.zeros((), dtype=torch.float64))
    found = synergy_loss(logits, direction=direction, synergy='sigmoid')
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('temperature', [0.5, 4.0])
def test_logits_of_ten_thousand_are_safe(dtype, temperature):
    values = torch.tensor([1e4, -1e4, 50.0, 0.0])
    both = [values.repeat(4, 1).to(dtype).requires_grad_(), values.repeat(4, 1).T.to(dtype).requires_grad_()]
    loss = synergy_loss(both, temperature=temperature, synergy='sigmoid')
    each = [z.detach().double() / temperature for z in both]
    expected = 0.
    for p, q in itertools.permutations(each, 2):  # by definition, without the overflow of a logit of a probability
        log = nn.functional.logsigmoid
        expected += (p.sigmoid() * (log(p) - log(q)) + (-p).sigmoid() * (log(-p) - log(-q))).mean()
    torch.testing.assert_close(loss.double(), temperature ** 2 * expected, rtol=1e-5, atol=0)
    for grad in torch.autograd.grad(loss, both):
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize('criterion, sums', [
    *[(criterion_of(loss_type), loss_type in ('asl', 'twoway', 'zlpr')) for loss_type in MULTI_LABEL_LOSS_TYPES],
    (criterion_of('bce', bce_sum=True), True), (criterion_of('asl', asl_reduction='mean'), False),
    (BinaryCrossEntropy(), False), (nn.BCEWithLogitsLoss(), False), (nn.BCEWithLogitsLoss(reduction='sum'), True),
], ids=lambda value: type(value).__name__)
def test_the_synergy_goes_by_the_criterion(criterion, sums):
    logits = make_logits(dtype=torch.float32)
    out = DKSLoss(criterion)(logits, make_target().float())
    expected = torch.stack([torch.stack(row) for row in pairs(logits, sum_classes=sums)]).detach()
    torch.testing.assert_close(out['synergy'], expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out['ce'], torch.stack([criterion(z, make_target().float()) for z in logits]).detach())


@pytest.mark.parametrize('criterion', [None, nn.CrossEntropyLoss()])
def test_exclusive_classes_stay_the_default(criterion):
    assert DKSLoss(criterion).synergy == 'softmax'


def test_binary_cross_entropy_of_single_labels_may_have_either_synergy():
    logits, target = make_logits(dtype=torch.float32), torch.arange(BATCH)
    softmax, sigmoid = (DKSLoss(BinaryCrossEntropy(), synergy=name)(logits, target) for name in ('softmax', 'sigmoid'))
    assert torch.equal(softmax['ce'], sigmoid['ce']) and not torch.allclose(softmax['synergy'], sigmoid['synergy'])


@pytest.mark.parametrize('loss_type', MULTI_LABEL_LOSS_TYPES)
def test_softmax_synergy_of_multi_label_criteria_is_refused_with_the_reason(loss_type):
    criterion = criterion_of(loss_type)
    with pytest.raises(ValueError, match=f"^synergy 'softmax' .*exclusive classes.*{type(criterion).__name__}"):
        DKSLoss(criterion, synergy='softmax')


def test_an_unknown_synergy_is_refused():
    for create in (lambda: DKSLoss(synergy='cosine'), lambda: synergy_loss(make_logits(), synergy='cosine')):
        with pytest.raises(ValueError, match="synergy must be one of softmax, sigmoid, got 'cosine'"):
            create()


@pytest.mark.parametrize('target', [torch.arange(BATCH), torch.zeros(BATCH, CLASSES, dtype=torch.long)])
def test_without_criterion_the_target_is_dense(target):
    with pytest.raises(ValueError, match=r'target must be dense, of shape \(6, 11\)'):
        DKSLoss(synergy='sigmoid')(make_logits(), target)
