"""Who teaches whom: the ensemble of the classifiers, that of averaged weights, the backbone as the only student."""
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from timm.utils import unwrap_model

from dks_timm import DKSLoss, DKSTask, create_dks_model, synergy_loss
from dks_timm.method.loss import DIRECTIONS
from dks_timm.method.presets import PRESETS

BATCH, CLASSES = 6, 5


def some_logits(count=3):
    return [torch.randn(BATCH, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def distilled(student, teacher, temperature=1.):
    """KL(teacher || student), softened, a mean over the batch."""
    q, p = (F.log_softmax(z / temperature, 1) for z in (student, teacher.detach()))
    return temperature ** 2 * F.kl_div(q, p, log_target=True, reduction='batchmean')


def assert_equal_with_gradients(loss, expected, logits):
    torch.testing.assert_close(loss, expected)
    grads = [
        torch.autograd.grad(x, logits, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (loss, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('temperature', [1., 3.])
@pytest.mark.parametrize('weight, direction, weights', [
    (2., 'both', (2, 2, 2)), (2., 'to-backbone', (2, 0, 0)), ((.5, 0, 1), 'both', (.5, 0, 1)),
    ((.5, 3, 1), 'to-backbone', (.5, 0, 0)), (2., 'none', (0, 0, 0)),
])
def test_the_mean_of_all_logits_teaches_the_students_that_weight_and_direction_name(
        weight, direction, weights, temperature):
    logits = some_logits()
    mean = sum(logits) / len(logits)
    apart = torch.stack([distilled(z, mean, temperature) for z in logits])
    expected = (torch.tensor(weights) * apart).sum()
    found = synergy_loss(logits, weight, direction, temperature, teacher='ensemble')
    assert_equal_with_gradients(found, expected, logits)

    target = torch.randint(CLASSES, (BATCH,))
    ce = sum(F.cross_entropy(z, target) for z in logits)
    out = DKSLoss(None, 1., weight, direction, temperature, teacher='ensemble')(logits, target)
    assert_equal_with_gradients(out['loss'], ce + expected, logits)
    torch.testing.assert_close(out['ensemble'], apart.detach())
    torch.testing.assert_close(out['synergy'], DKSLoss(temperature=temperature)(logits, target)['synergy'])


def test_other_logits_can_be_the_ensemble_and_get_no_gradient():
    logits, teachers = some_logits(), some_logits(2)
    target = torch.randint(CLASSES, (BATCH,))
    loss_fn = DKSLoss(direction='to-backbone', temperature=2., teacher='ensemble')
    loss = loss_fn(logits, target, teachers)['loss']
    expected = sum(F.cross_entropy(z, target) for z in logits) + distilled(logits[0], sum(teachers) / 2, 2.)
    assert_equal_with_gradients(loss, expected, [*logits, *teachers])


def test_the_ensemble_of_several_labels_compares_every_class_by_itself():
    logits = some_logits()
    target = torch.randint(2, (BATCH, CLASSES)).double()
    out = DKSLoss(BinaryCrossEntropy(), teacher='ensemble')(logits, target)
    p = (sum(logits) / 3).detach().sigmoid()
    expected = sum(F.binary_cross_entropy_with_logits(z, target) for z in logits) + sum(
        F.binary_cross_entropy_with_logits(z, p) - F.binary_cross_entropy(p, p) for z in logits)
    assert_equal_with_gradients(out['loss'], expected, logits)


def test_branches_on_a_part_of_the_batch_make_the_ensemble_of_that_part():
    logits = some_logits()
    logits = [logits[0], logits[1][:2].detach().requires_grad_(), logits[2][:2].detach().requires_grad_()]
    target = torch.randint(CLASSES, (BATCH,))
    out = DKSLoss(teacher='ensemble', direction='to-backbone')(logits, target)
    part = [z[:2] for z in logits]
    expected = sum(F.cross_entropy(z, target[:len(z)]) for z in logits) + distilled(part[0], sum(part) / 3)
    assert_equal_with_gradients(out['loss'], expected, logits)


@pytest.mark.parametrize('count', [2, 3, 4])
def test_to_backbone_is_the_matrix_whose_first_column_teaches(count):
    logits = some_logits(count)
    matrix = [[1.] + [0.] * (count - 1)] * count
    assert_equal_with_gradients(synergy_loss(logits, 1., 'to-backbone'), synergy_loss(logits, matrix), logits)


def test_what_an_ensemble_cannot_do_is_refused():
    for direction in DIRECTIONS:
        if direction in ('top-down', 'bottom-up'):
            with pytest.raises(ValueError, match=f"must be both, to-backbone or none .*, got '{direction}'"):
                DKSLoss(direction=direction, teacher='ensemble')
        else:
            DKSLoss(direction=direction, teacher='ensemble')
    with pytest.raises(ValueError, match="teacher must be one of pairs, ensemble, got 'mean'"):
        DKSLoss(teacher='mean')
    with pytest.raises(ValueError, match='a number or one per classifier'):
        DKSLoss(synergy_weight=[[0, 1], [1, 0]], teacher='ensemble')
    with pytest.raises(ValueError, match='synergy_weight is for 2 classifiers, but there are 3'):
        DKSLoss(synergy_weight=[1, 0], teacher='ensemble').resolve_weights(3)
    with pytest.raises(ValueError, match="teachers are for teacher 'ensemble', not 'pairs'"):
        DKSLoss()(some_logits(), torch.randint(CLASSES, (BATCH,)), some_logits())


# The task


@pytest.fixture(scope='module')
def net():
    return create_dks_model('test_convnext', num_classes=CLASSES, image_size=(32, 32))


@pytest.mark.parametrize('fraction', [1., 0.5])
def test_averaged_weights_teach_in_evaluation_mode_and_learn_nothing(net, fraction):
    net.batch_fraction = fraction
    task = DKSTask(net.train(), DKSLoss(teacher='ensemble', temperature=2.), averaged_teacher=True, verbose=False)
    average = unwrap_model(task.setup_ema(decay=0.5))
    with torch.no_grad():
        for p in average.parameters():
            p.add_(0.05 * torch.randn_like(p))  # a teacher of its own
    images, target = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    out = task(images, target)
    teachers = average.eval().exits(images[:len(out['logits'][-1])])
    expected = task.criterion(out['logits'], target, teachers)
    torch.testing.assert_close(out['loss'], expected['loss'])
    torch.testing.assert_close(out['ensemble'], expected['ensemble'])
    assert not torch.allclose(out['loss'], task.criterion(out['logits'], target)['loss'])
    out['loss'].backward()
    assert all(p.grad is None for p in average.parameters())
    net.batch_fraction = 1.
    net.zero_grad()


def test_averaged_weights_are_a_teacher_only_where_the_ensemble_teaches(net):
    with pytest.raises(ValueError, match="averaged_teacher needs a DKSLoss with teacher 'ensemble', not 'pairs'"):
        DKSTask(net, averaged_teacher=True, verbose=False)
    task = DKSTask(net.train(), DKSLoss(teacher='ensemble'), averaged_teacher=True, verbose=False)
    with pytest.raises(ValueError, match=r'there is no average of the weights; call setup_ema\(\) first'):
        task(torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,)))


@pytest.mark.parametrize('start, ramp, scales', [
    (0, 0, [1, 1, 1, 1]), (2, 0, [0, 0, 1, 1]), (0, 3, [.25, .5, .75, 1]), (1, 1, [0, .5, 1, 1])])
def test_the_weight_of_the_synergy_grows_by_equal_steps(net, start, ramp, scales):
    task = DKSTask(net, DKSLoss(synergy_weight=2.), start_epoch=start, ramp=ramp, verbose=False)
    logits, target = some_logits(), torch.randint(CLASSES, (BATCH,))
    for epoch, scale in enumerate(scales):
        task.begin_update(epoch, num_updates=10 * epoch)
        out = task.criterion(logits, target)
        torch.testing.assert_close(out['loss'].detach(), out['ce'].sum() + 2 * scale * out['synergy'].sum())


def test_a_negative_ramp_is_refused(net):
    with pytest.raises(ValueError, match='ramp is -1; it must be 0 or more'):
        DKSTask(net, ramp=-1, verbose=False)


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_is_arguments_of_the_loss_for_any_number_of_classifiers(name):
    for count in (2, 4):
        logits, target = some_logits(count), torch.randint(CLASSES, (BATCH,))
        assert DKSLoss(**PRESETS[name])(logits, target)['loss'].isfinite()
    assert PRESETS['paper'] == {}
