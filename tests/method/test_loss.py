"""The DKS objective against a pairwise float64 reference, and its contract."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, create_classification_loss

from dks_timm import create_dks_model
from dks_timm.method.loss import DIRECTIONS, DKSLoss, synergy_loss

BATCH, CLASSES = 6, 11
MATRIX = [[9.0, 0.5, 2.0, 0.0], [1.0, 9.0, 0.25, 1.5], [0.0, 0.75, 9.0, 1.0], [0.125, 0.0, 3.0, 9.0]]


def make_logits(num_classifiers=3, dtype=torch.float64, scale=2.0, seed=0, shape=(BATCH, CLASSES)):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(num_classifiers)
    ]


def make_target(kind='index', seed=1, shape=(BATCH, CLASSES)):
    generator = torch.Generator().manual_seed(seed)
    if kind == 'index':
        return torch.randint(shape[1], shape[:1], generator=generator)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return target if kind == 'unnormalized' else target / target.sum(1, keepdim=True)


def pair_matrix(logits, temperature=1.0):
    """Every divergence by itself: teacher row, student column."""
    soft = [F.log_softmax(z.double() / temperature, 1) for z in logits]
    return [
        [temperature ** 2 * F.kl_div(q, p.detach(), log_target=True, reduction='batchmean') for q in soft]
        for p in soft
    ]


def direction_mask(direction, num_classifiers):
    # Depth of the classifiers in the order of the list: the backbone, then the branches from shallow to deep.
    depth = [num_classifiers, *range(1, num_classifiers)]
    return [[
        p != q and dict(
            both=True, none=False,
            **{'top-down': depth[p] > depth[q], 'bottom-up': depth[p] < depth[q], 'to-backbone': q == 0}
        )[direction]
        for q in range(num_classifiers)] for p in range(num_classifiers)]


def reference(logits, target, ce_weight=1.0, synergy_weight=1.0, direction='both', temperature=1.0):
    num_classifiers = len(logits)
    ce_weight = [ce_weight] * num_classifiers if isinstance(ce_weight, float) else ce_weight
    if isinstance(synergy_weight, float):
        synergy_weight = [[synergy_weight] * num_classifiers] * num_classifiers
    mask = direction_mask(direction, num_classifiers)
    pairs = pair_matrix(logits, temperature)
    if target.ndim == 1:
        target = F.one_hot(target, logits[0].shape[1])
    ce = [-(target.double() * F.log_softmax(z.double(), 1)).sum(1).mean() for z in logits]
    loss = sum(w * c for w, c in zip(ce_weight, ce, strict=True))
    for p, q in itertools.product(range(num_classifiers), repeat=2):
        loss = loss + mask[p][q] * synergy_weight[p][q] * pairs[p][q]
    return loss, torch.stack(ce), torch.stack([torch.stack(row) for row in pairs])


def assert_equals_reference(loss_fn, logits, target, rtol=1e-10, **options):
    out = loss_fn(logits, target)
    loss, ce, synergy = reference(logits, target, **options)
    grads = torch.autograd.grad(out['loss'], logits)
    expected = torch.autograd.grad(loss, logits)
    close = dict(rtol=rtol, atol=rtol)
    torch.testing.assert_close(out['loss'].double(), loss, **close)
    torch.testing.assert_close(out['ce'].double(), ce.detach(), **close)
    torch.testing.assert_close(out['synergy'].double(), synergy.detach(), **close)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, **close)


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('direction', DIRECTIONS)
@pytest.mark.parametrize('target', ['index', 'dense', 'unnormalized'])
def test_value_and_gradient_equal_the_pairwise_form(target, direction, temperature):
    options = dict(direction=direction, temperature=temperature, ce_weight=0.5, synergy_weight=2.0)
    assert_equals_reference(DKSLoss(**options), make_logits(), make_target(target), **options)


@pytest.mark.parametrize('direction', DIRECTIONS)
def test_weights_per_classifier_and_per_pair_equal_the_pairwise_form(direction):
    options = dict(ce_weight=[1.0, 0.5, 0.0, 2.0], synergy_weight=MATRIX)
    tensors = {name: torch.tensor(value) for name, value in options.items()}
    for given in (options, tensors):
        assert_equals_reference(
            DKSLoss(direction=direction, **given), make_logits(4), make_target(), direction=direction, **options)


@pytest.mark.parametrize('weight', [0.25, MATRIX])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_synergy_loss_is_the_weighted_sum_of_the_pairs(weight, direction):
    logits = make_logits(4)
    loss = synergy_loss(logits, weight, direction, temperature=3.0)
    expected, _, _ = reference(logits, make_target(), 0.0, weight, direction, 3.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for grad, other in zip(
            torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_gradient_is_the_closed_form_of_the_paper(temperature, target='unnormalized'):
    logits, target = make_logits(), make_target(target)
    DKSLoss(temperature=temperature)(logits, target)['loss'].backward()
    soft = [F.softmax(z.detach() / temperature, 1) for z in logits]
    for z, q in zip(logits, soft, strict=True):
        label = target.sum(1, keepdim=True) * F.softmax(z.detach(), 1) - target
        expected = label + temperature * (len(soft) * q - sum(soft))
        torch.testing.assert_close(z.grad, expected / BATCH, rtol=1e-12, atol=1e-12)


def test_the_diagonal_of_a_matrix_is_ignored():
    weight = [[float('nan'), 2.0], [1.0, -1.0]]
    assert synergy_loss(make_logits(2), weight) == synergy_loss(make_logits(2), [[0.0, 2.0], [1.0, 0.0]])


def test_second_derivatives_equal_the_pairwise_form():
    logits, target = make_logits(), make_target('unnormalized')
    options = dict(temperature=2.0, ce_weight=0.5)
    vectors = [torch.randn_like(z) for z in logits]
    products = []
    for loss in (DKSLoss(**options)(logits, target)['loss'], reference(logits, target, **options)[0]):
        grads = torch.autograd.grad(loss, logits, create_graph=True)
        products.append(torch.autograd.grad(grads, logits, vectors))
    for product, expected in zip(*products, strict=True):
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


def test_kept_memory_is_linear_in_the_number_of_classifiers():
    def kept_elements(num_classifiers):
        kept = {}
        logits, target = make_logits(num_classifiers, torch.float32), make_target()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.update({x.untyped_storage().data_ptr(): x}) or x, lambda x: x):
            loss = DKSLoss(temperature=2.0)(logits, target)['loss']
        assert loss.requires_grad
        return sum(x.numel() for x in kept.values() if x.is_floating_point())

    two, three, six = map(kept_elements, (2, 3, 6))
    assert six - two == 4 * (three - two) and three - two <= 6 * BATCH * CLASSES


def test_an_image_without_label_learns_from_the_other_classifiers_alone():
    logits, target = make_logits(), make_target()
    target[1] = -100
    out = DKSLoss(synergy_weight=0.5)(logits, target)
    torch.testing.assert_close(out['ce'], torch.stack([F.cross_entropy(z, target) for z in logits]).detach())
    torch.testing.assert_close(out['synergy'], reference(logits, make_target())[2].detach())
    grads = torch.autograd.grad(out['loss'], logits)
    others = torch.autograd.grad(synergy_loss(logits, 0.5), logits)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad[1], other[1])


@pytest.mark.parametrize('criterion, target', [
    (None, 'index'), (None, 'dense'), (BinaryCrossEntropy(smoothing=0.0), 'index')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_classes_masked_by_infinite_logits_are_as_if_they_were_not_there(dtype, criterion, target):
    loss_fn = DKSLoss(criterion, temperature=0.5)
    logits, target = make_logits(dtype=dtype), make_target(target)
    whole = [F.pad(z.detach(), (1, 2), value=-float('inf')).requires_grad_() for z in logits]
    more = target + 1 if target.ndim == 1 else F.pad(target, (1, 2))
    found, expected = loss_fn(whole, more), loss_fn(logits, target)
    share = CLASSES / (CLASSES + 3) if isinstance(criterion, BinaryCrossEntropy) else 1  # a mean over classes
    torch.testing.assert_close(found['ce'], share * expected['ce'])
    torch.testing.assert_close(found['synergy'], share * expected['synergy'])
    for grad in torch.autograd.grad(found['loss'], whole):
        assert grad.isfinite().all() and not grad[:, [0, -2, -1]].any()


def test_transforms_of_functions_give_the_same_gradients():
    logits, target = make_logits(), make_target()
    loss_fn = DKSLoss(temperature=2.0)

    def loss_of(logits, target):
        return loss_fn(logits, target)['loss']

    expected = torch.autograd.grad(loss_of(logits, target), logits)
    for grad, other in zip(torch.func.grad(loss_of)(logits, target), expected, strict=True):
        torch.testing.assert_close(grad, other)
    # Of every image by itself; the loss is their mean.
    images = [z[:, None] for z in logits]
    for grad, other in zip(torch.func.vmap(torch.func.grad(loss_of))(images, target[:, None]), expected, strict=True):
        torch.testing.assert_close(grad[:, 0] / BATCH, other)
    for grad, other in zip(torch.func.jacrev(loss_of)(logits, target), expected, strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize('criterion', [None, torch.nn.MultiMarginLoss()])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_reports_are_detached_unweighted_and_complete(direction, criterion):
    logits, target = make_logits(), make_target()
    out = DKSLoss(criterion, 0.5, 3.0, direction, temperature=2.0)(logits, target)
    expected = torch.stack([torch.stack(row) for row in pair_matrix(logits, 2.0)])
    assert set(out) == {'loss', 'ce', 'synergy'}
    assert {value.dtype for value in out.values()} == {torch.float64}
    assert out['loss'].requires_grad and out['loss'].ndim == 0
    assert not out['ce'].requires_grad and out['ce'].shape == (3,)
    assert not out['synergy'].requires_grad and out['synergy'].shape == (3, 3)
    assert out['synergy'].diagonal().tolist() == [0, 0, 0]
    torch.testing.assert_close(out['synergy'], expected.detach())
    per_classifier = criterion or torch.nn.CrossEntropyLoss()
    torch.testing.assert_close(out['ce'], torch.stack([per_classifier(z, target).detach() for z in logits]))


# Criteria


def single_label_criteria():
    smooth = dict(smoothing=0.1)
    yield 'ce', create_classification_loss('ce'), 'index'
    yield 'ce smooth', create_classification_loss('ce', **smooth), 'index'
    yield 'ce soft', create_classification_loss('ce', soft_targets=True), 'dense'
    yield 'bce', create_classification_loss('bce', **smooth), 'index'
    yield 'bce soft', create_classification_loss('bce', soft_targets=True), 'dense'
    yield 'bce sum', create_classification_loss('bce', bce_sum=True, bce_target_thresh=0.2), 'dense'
    yield 'bce weight', create_classification_loss('bce', class_weight=torch.rand(CLASSES), pos_weight=2.0), 'index'
    yield 'asl', create_classification_loss('asl', **smooth), 'index'
    yield 'poly', create_classification_loss('poly', **smooth), 'index'
    yield 'poly soft', create_classification_loss('poly', soft_targets=True), 'dense'
    yield 'jsd', create_classification_loss('jsd', jsd_splits=3, **smooth), 'index'
    yield 'torch', torch.nn.CrossEntropyLoss(weight=torch.rand(CLASSES), ignore_index=3), 'index'
    yield 'function', F.cross_entropy, 'index'


@pytest.mark.parametrize(
    'criterion, target', [pytest.param(*rest, id=name) for name, *rest in single_label_criteria()])
def test_every_single_label_criterion_of_timm_may_have_the_softmax_synergy(criterion, target):
    logits, target = make_logits(dtype=torch.float32), make_target(target)
    target = target.float() if target.is_floating_point() else target
    loss_fn = DKSLoss(criterion, ce_weight=0.5, synergy_weight=2.0, temperature=2.0, synergy='softmax')
    out = loss_fn(logits, target)
    ce = [criterion(z, target) for z in logits]
    pairs = pair_matrix(logits, 2.0)
    expected = 0.5 * sum(ce) + 2.0 * sum(pairs[p][q] for p in range(3) for q in range(3) if p != q)
    torch.testing.assert_close(out['loss'].double(), expected, rtol=1e-6, atol=1e-6)  # rounding of float32
    torch.testing.assert_close(out['ce'], torch.stack(ce).detach())
    for grad, other in zip(
            torch.autograd.grad(out['loss'], logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(grad, other)


def test_a_criterion_that_does_not_reduce_is_refused():
    with pytest.raises(ValueError, match='criterion must return a scalar'):
        DKSLoss(torch.nn.CrossEntropyLoss(reduction='none'))(make_logits(), make_target())


# Precision


@pytest.mark.parametrize('criterion', [None, BinaryCrossEntropy()])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_low_precision_logits_are_computed_in_float32(autocast, dtype, criterion):
    logits, target = make_logits(dtype=dtype), make_target()
    exact = [z.detach().float().requires_grad_() for z in logits]
    expected = DKSLoss(criterion)(exact, target)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        out = DKSLoss(criterion)(logits, target)
    for name, value in out.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    for grad, other in zip(
            torch.autograd.grad(out['loss'], logits), torch.autograd.grad(expected['loss'], exact), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, other.to(dtype))


@pytest.mark.parametrize('case', ['huge', 'offset', 'masked', 'masked in one', 'one class', 'one image', 'underflow'])
@pytest.mark.parametrize('target', ['index', 'dense'])
def test_extreme_logits_give_finite_values_and_gradients(case, target):
    shape = {'one class': (BATCH, 1), 'one image': (1, CLASSES)}.get(case, (BATCH, CLASSES))
    logits, target = make_logits(dtype=torch.float32, shape=shape), make_target(target, shape=shape)
    with torch.no_grad():
        for i, z in enumerate(logits):
            if case == 'huge':
                z *= 1e4
            elif case == 'offset':
                z += 1e4
            elif case == 'underflow':
                z[:, i] += 500
            elif case == 'masked' or (case == 'masked in one' and i == 1):
                z[:, 0] = -1e9
    out = DKSLoss()(logits, target)
    loss, ce, synergy = reference(logits, target)
    for value, expected in ((out['loss'], loss), (out['ce'], ce), (out['synergy'], synergy)):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), expected, rtol=2e-3 if case == 'offset' else 1e-5, atol=1e-6)
    grads = torch.autograd.grad(out['loss'], logits)
    for grad, other in zip(grads, torch.autograd.grad(loss, logits), strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


# torch.compile


@pytest.mark.parametrize('options, target', [
    (dict(), 'dense'), (dict(temperature=2.0, direction='top-down'), 'index'),
    (dict(criterion=BinaryCrossEntropy()), 'dense')], ids=str)
def test_compiles_without_a_graph_break(options, target):
    torch.compiler.reset()
    logits, target = make_logits(dtype=torch.float32), make_target(target).float()
    target = target if target.ndim == 2 else target.long()
    loss_fn = DKSLoss(**options)
    expected = loss_fn(logits, target)
    compiled = torch.compile(loss_fn, backend='aot_eager', fullgraph=True)
    out = compiled(logits, target)
    for name in out:
        torch.testing.assert_close(out[name], expected[name])
    for grad, other in zip(
            torch.autograd.grad(out['loss'], logits), torch.autograd.grad(expected['loss'], logits), strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize('partial', [False, True])
def test_a_whole_step_compiles_without_a_graph_break(partial):
    torch.compiler.reset()
    net = create_dks_model('test_resnet', num_classes=CLASSES, batch_fraction=0.5 if partial else 1.0).train()
    net.apply(lambda m: m.eval() if isinstance(m, torch.nn.BatchNorm2d) else m)  # else the first run changes the second
    loss_fn = DKSLoss(temperature=2.0)
    images, target = torch.randn(BATCH, 3, 64, 64), make_target()

    def step(images, target):
        return loss_fn(net(images), target)

    results = []
    for function in (step, torch.compile(step, backend='aot_eager', fullgraph=True)):
        out = function(images, target)
        results.append([*out.values(), *torch.autograd.grad(out['loss'], net.parameters())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


# Training


def test_training_is_that_of_the_published_form():
    """As the authors' code has it: each pair by itself, teacher and student smoothed by an epsilon."""
    def published(logits, target):
        smoothed = [(z.softmax(1) + 1e-8) / (1 + 1e-8 * CLASSES) for z in logits]
        loss = sum(F.cross_entropy(z, target) for z in logits)
        for p, q in itertools.permutations(smoothed, 2):
            loss = loss + (p.detach() * (p.detach() / q).log()).sum(1).mean()
        return loss

    torch.manual_seed(0)
    images, target = torch.randn(64, 20), make_target(shape=(64, CLASSES))
    nets = [torch.nn.ModuleList([torch.nn.Sequential(
        torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, CLASSES)) for _ in range(3)]) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    losses = [[], []]
    for net, loss_fn, found in zip(nets, (published, lambda *x: DKSLoss()(*x)['loss']), losses, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(50):
            loss = loss_fn([branch(images) for branch in net], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    published_losses, ours = map(torch.stack, losses)
    assert ours[-1] < 0.7 * ours[0]
    torch.testing.assert_close(ours, published_losses, rtol=1e-5, atol=0)
    for parameter, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize('options, message', [
    (dict(ce_weight=[[1.0, 2.0]]), r'ce_weight must be .* a number or one per classifier, got \[\[1.0, 2.0\]\]'),
    (dict(ce_weight=-1), 'ce_weight must be finite and not negative.*, got -1'),
    (dict(synergy_weight=[[1.0, 1.0], [1.0]]), r'synergy_weight must be .* got \[\[1.0, 1.0\], \[1.0\]\]'),
    (dict(synergy_weight=float('inf')), 'synergy_weight must be finite and not negative.*, got inf'),
    (dict(direction='sideways'), 'direction must be one of both, .*, none, got .sideways.'),
    (dict(temperature=0), 'temperature must be a positive number, got 0'),
])
def test_bad_options_are_named_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        DKSLoss(**options)
    if 'ce_weight' not in options:
        options = {name.replace('synergy_', ''): value for name, value in options.items()}
        with pytest.raises(ValueError, match=message.replace('synergy_', '')):
            synergy_loss(make_logits(), **options)


@pytest.mark.parametrize('options, message', [
    (dict(ce_weight=[1.0] * 4), 'ce_weight is for 4 classifiers, but there are 3: give a number, or 3 of them'),
    (dict(synergy_weight=MATRIX), 'synergy_weight is for 4 classifiers, but there are 3: .* or a 3 x 3 matrix'),
])
def test_weights_for_another_number_of_classifiers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DKSLoss(**options)(make_logits(3), make_target())


@pytest.mark.parametrize('logits, message', [
    (make_logits(1), 'at least two classifiers, got 1'),
    (make_logits(1)[0], r'got one tensor of shape \(6, 11\)'),
    ([torch.zeros(6, 11), torch.zeros(6, 10)], r'one shape \(B, C\), got \[\(6, 11\), \(6, 10\)\]'),
    ([torch.zeros(6, 11, 2), torch.zeros(6, 11, 2)], r'one shape \(B, C\)'),
])
def test_bad_logits_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        DKSLoss()(logits, make_target())
    with pytest.raises(ValueError, match=message):
        synergy_loss(logits)


@pytest.mark.parametrize('target', [
    torch.zeros(5, dtype=torch.long), torch.zeros(6), torch.zeros(6, 10), torch.zeros(6, 1, dtype=torch.long)])
def test_a_target_that_fits_no_logits_is_refused(target):
    with pytest.raises(ValueError, match=r'target must be class indices of shape \(6,\) or dense of shape \(6, 11\)'):
        DKSLoss()(make_logits(), target)
