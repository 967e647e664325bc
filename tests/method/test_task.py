"""DKSTask in timm's own task loop: training, EMA, compile, clipping and checkpoints."""
import argparse
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.task import (
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver, dispatch_clip_grad, unwrap_model

from dks_timm import DKSLoss, DKSTask, create_dks_model
from dks_timm.method.task import DKSDistillationTask

MODEL = 'test_resnet'
NUM_CLASSES = 5


def make_task(loss_fn=None, **kwargs):
    net = create_dks_model(MODEL, num_classes=kwargs.pop('num_classes', NUM_CLASSES), **kwargs)
    return DKSTask(net, loss_fn, verbose=False)


def batch():
    return torch.randn(4, 3, 32, 32), torch.randint(NUM_CLASSES, (4,))


def train(task, steps=2):
    """Steps of timm's own loop."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.05, momentum=0.9)
    task.get_trainable_module().train()
    for step in range(steps):
        result = task(*batch())
        loss = result['loss']
        loss /= 1  # in place, as timm's loop does for accumulation
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    return optimizer


def assert_same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_other_state(a, b):
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_a_step_returns_the_loss_the_backbones_logits_and_all_logits():
    task = make_task(loss_fn=DKSLoss(synergy_weight=0.5))
    task.train()
    x, y = batch()
    result = task(x, y)
    assert set(result) == {'loss', 'output', 'logits', 'ce', 'synergy'}
    assert len(result['logits']) == 3
    assert result['output'] is result['logits'][0]
    assert result['output'].shape == (4, NUM_CLASSES)
    assert result['ce'].shape == (3,) and result['synergy'].shape == (3, 3)
    torch.testing.assert_close(result['loss'], result['ce'].sum() + 0.5 * result['synergy'].sum())
    result['loss'].backward()
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


def test_weights_for_another_number_of_classifiers_are_refused_before_training():
    with pytest.raises(ValueError, match='ce_weight is for 2 classifiers, but there are 3'):
        make_task(loss_fn=DKSLoss(ce_weight=[1.0, 1.0]))


def test_the_eval_model_is_the_plain_backbone():
    task = make_task()
    x, _ = batch()
    net = task.get_trainable_module()
    eval_model = task.get_eval_model().eval()
    assert eval_model is net.backbone
    assert type(eval_model) is type(timm.create_model(MODEL))
    assert torch.equal(eval_model(x), net.eval()(x))
    task.setup_ema()
    assert task.get_eval_model(ema=True) is unwrap_model(task.get_trainable_module(ema=True)).backbone
    assert task.get_eval_model(module=net) is net.backbone


def test_a_compiled_task_trains_and_evaluates_like_a_plain_one():
    torch.compiler.reset()
    plain, compiled = make_task(), make_task()
    compiled.get_trainable_module().load_state_dict(plain.get_trainable_module().state_dict())
    for task in (plain, compiled):
        task.setup_ema(decay=0.5)
        torch.manual_seed(2)
        train(task, steps=1)
    eval_model = compiled.compile(backend='eager')
    compiled.compile_ema(backend='eager')
    assert compiled.get_eval_model() is eval_model
    for task in (plain, compiled):
        torch.manual_seed(3)
        train(task, steps=1)
        task.get_eval_model().eval()
    x, _ = batch()
    for ema in (False, True):
        torch.testing.assert_close(compiled.get_eval_model(ema=ema)(x), plain.get_eval_model(ema=ema)(x))
        state, expected = (task.get_checkpoint_state(ema=ema) for task in (compiled, plain))
        key = 'state_dict_ema' if ema else 'state_dict'
        assert list(state[key]) == list(expected[key])


def test_clipping_reaches_everything_and_agc_leaves_out_every_classifier():
    task = make_task()
    net = task.get_trainable_module()
    heads = {id(p) for head in net.get_classifiers() for p in head.parameters()}
    assert len(heads) == 2 * 3  # weight and bias of backbone and two branches
    assert {id(p) for p in task.get_clip_parameters()} == {id(p) for p in net.parameters()}
    assert {id(p) for p in task.get_clip_parameters(exclude_head=True)} == {id(p) for p in net.parameters()} - heads
    task(*batch())['loss'].backward()
    before = {id(p): p.grad.clone() for p in net.parameters()}
    dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), value=1e-3, mode='agc')
    assert all(torch.equal(p.grad, before[id(p)]) for p in net.parameters() if id(p) in heads)
    assert any(not torch.equal(p.grad, before[id(p)]) for p in net.parameters() if id(p) not in heads)


# Checkpoints


def save(task, folder, optimizer):
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, args=argparse.Namespace(model=MODEL), task=task,
        checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, metric=50.0)
    return folder / 'last.pth.tar'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    task = make_task()
    task.setup_ema(decay=0.5)
    optimizer = train(task)
    return task, save(task, tmp_path_factory.mktemp('run'), optimizer)


def test_a_checkpoint_resumes_backbone_branches_ema_and_optimizer(checkpoint):
    task, path = checkpoint
    torch.manual_seed(1)
    other = make_task()
    optimizer = create_optimizer_v2(other.get_trainable_module(), opt='sgd', lr=0.1, momentum=0.9)
    assert_other_state(other.get_trainable_module().state_dict(), task.get_trainable_module().state_dict())
    assert resume_task_checkpoint(other, str(path), optimizer, log_info=False) == 4
    assert_same_state(other.get_trainable_module().state_dict(), task.get_trainable_module().state_dict())
    assert optimizer.param_groups[0]['lr'] == 0.05
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, str(path))
    assert_same_state(
        other.get_trainable_module(ema=True).module.state_dict(),
        task.get_trainable_module(ema=True).module.state_dict())
    assert_other_state(
        other.get_trainable_module(ema=True).module.state_dict(), other.get_trainable_module().state_dict())


def test_a_checkpoint_is_a_plain_timm_checkpoint_of_the_backbone(checkpoint):
    task, path = checkpoint
    for use_ema in (False, True):
        plain = timm.create_model(MODEL, num_classes=NUM_CLASSES)
        plain.load_state_dict(load_state_dict(str(path), use_ema=use_ema), strict=True)
        assert_same_state(plain.state_dict(), task.get_eval_model(ema=use_ema).state_dict())
    loaded = timm.create_model(MODEL, num_classes=NUM_CLASSES, checkpoint_path=str(path))
    assert_same_state(loaded.state_dict(), task.get_eval_model(ema=True).state_dict())


@pytest.mark.parametrize('saved, message', [
    (None, 'holds no branches.*--initial-checkpoint'),
    (dict(stages=(1, 2)), r'branches on stages \(1, 2\), the model on \(2, 3\)'),
    (dict(branches='conv'), "does not fit the model's branches: .* is missing there"),
    (dict(num_classes=7), r"fit the model's backbone: fc.weight is \(7, \d+\) there and \(5, \d+\) in the model"),
], ids=['backbone alone', 'other stages', 'other branches', 'other classes'])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_of_it_loaded(saved, message):
    task = make_task()
    before = {k: v.clone() for k, v in task.get_trainable_module().state_dict().items()}
    state = dict(state_dict=task.get_eval_model().state_dict()) if saved is None else (
        make_task(**saved).get_checkpoint_state())
    with pytest.raises(ValueError, match=message):
        task.load_checkpoint_state(**state)
    assert_same_state(task.get_trainable_module().state_dict(), before)


# Distributed


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('compiled', [False, True])
def test_a_distributed_task_keeps_plain_checkpoints_and_evaluation(process_group, compiled):
    torch.compiler.reset()
    task = make_task()
    net = task.get_trainable_module()
    task.setup_ema(decay=0.5)
    if compiled:
        train(task, steps=1)
        task.compile(backend='eager')
    task.prepare_distributed()
    assert isinstance(task.get_trainable_module(), torch.nn.parallel.DistributedDataParallel)
    with task.no_sync():
        task(*batch())['loss'].backward()
    train(task)
    assert unwrap_model(task.get_trainable_module()) is net
    assert unwrap_model(task.get_eval_model()) is net.backbone
    assert not isinstance(task.get_eval_model(), torch.nn.parallel.DistributedDataParallel)
    assert len(unwrap_model(task.get_trainable_module()).exits(batch()[0])) == 3
    state = task.get_checkpoint_state()
    plain = timm.create_model(MODEL, num_classes=NUM_CLASSES)
    plain.load_state_dict(state['state_dict'], strict=True)
    task.load_checkpoint_state(**state)


DISTILLATION = dict(
    logit=(MODEL, LogitDistillationTask),
    feature=(MODEL, FeatureDistillationTask),
    token=('deit_tiny_distilled_patch16_224', TokenDistillationTask),
)


def make_distillation_task(kind='logit', loss_fn=None, teacher=None, **weights):
    name, create = DISTILLATION[kind]
    kwargs = dict(img_size=32, depth=4, embed_dim=48) if kind == 'token' else {}
    net = create_dks_model(name, num_classes=NUM_CLASSES, **kwargs)
    teacher = teacher or timm.create_model('test_resnet', num_classes=NUM_CLASSES, channels=(8, 16, 24, 40)).eval()
    if kind != 'feature':
        weights.setdefault('temperature', 2.)
    distillation = create(net.backbone, teacher, torch.nn.CrossEntropyLoss(), verbose=False, **weights)
    task = DKSDistillationTask(net, distillation, loss_fn, verbose=False)
    return task.train(), teacher


def test_a_checkpoint_without_the_projection_to_a_teachers_features_is_refused():
    saved = make_distillation_task('logit')[0].get_checkpoint_state()
    with pytest.raises(ValueError, match="does not fit the model's projection"):
        make_distillation_task('feature')[0].load_checkpoint_state(**saved)


@pytest.mark.parametrize('direction', ['both', 'none'])
def test_a_teacher_is_one_more_term_of_the_dks_loss(direction):
    loss_fn = DKSLoss(direction=direction)
    task, teacher = make_distillation_task(loss_fn=loss_fn, task_loss_weight=0.5, distill_loss_weight=3.)
    x, y = batch()
    result = task(x, y)
    logits = [z.detach().requires_grad_() for z in result['logits']]
    teacher_probs = (teacher(x) / 2).softmax(-1).detach()
    kd_loss = 4 * F.kl_div((logits[0] / 2).log_softmax(-1), teacher_probs, reduction='batchmean')
    expected = 0.5 * loss_fn(logits, y)['loss'] + 3 * kd_loss
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['kd_loss'], kd_loss.detach())
    assert result['output'] is result['logits'][0] and len(result['logits']) == 3
    for z in result['logits']:
        z.retain_grad()
    result['loss'].backward()
    expected.backward()
    for z, wanted in zip(result['logits'], logits, strict=True):
        torch.testing.assert_close(z.grad, wanted.grad)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize('kind', DISTILLATION)
def test_every_kind_of_distillation_trains_the_same_backbone_as_timms_task_does_without_branches(kind):
    # With the labels and the branches weighted by 0, what is left is timm's distillation.
    torch.manual_seed(3)
    task, teacher = make_distillation_task(kind, task_loss_weight=0., distill_loss_weight=1.)
    backbone = deepcopy(task.trainable_module.backbone)
    projection = getattr(task.trainable_module, 'projection', None)
    _, create = DISTILLATION[kind]
    weights = dict(task_loss_weight=0., distill_loss_weight=1., **({} if kind == 'feature' else dict(temperature=2.)))
    plain = create(backbone, teacher, torch.nn.CrossEntropyLoss(), verbose=False, **weights).train()
    if projection is not None:
        plain.trainable_module.projection.load_state_dict(projection.state_dict())
    x, y = batch()
    result, wanted = task(x, y), plain(x, y)
    torch.testing.assert_close(result['loss'], wanted['loss'])
    torch.testing.assert_close(result['output'], wanted['output'])
    result['loss'].backward()
    wanted['loss'].backward()
    for p, q in zip(task.trainable_module.backbone.parameters(), backbone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('kind', DISTILLATION)
def test_distillation_with_dks_averages_saves_and_resumes_every_part_of_the_student(kind, tmp_path):
    task, teacher = make_distillation_task(kind)
    task.setup_ema(decay=0.5)
    optimizer = train(task, steps=1)  # the first update of an average is a copy
    before = {k: v.clone() for k, v in task.get_trainable_module().state_dict().items()}
    with torch.no_grad():
        for p in task.get_trainable_module().parameters():
            p.add_(1)
    task.update_ema(step=9)
    after, average = (unwrap_model(task.get_trainable_module(ema=ema)).state_dict() for ema in (False, True))
    assert before.keys() == after.keys() == average.keys()
    for key, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[key] + after[key]) / 2)
    path = save(task, tmp_path, optimizer)
    other, _ = make_distillation_task(kind, teacher=teacher)
    assert_other_state(other.get_trainable_module().state_dict(), after)
    resume_task_checkpoint(other, path)
    assert_same_state(other.get_trainable_module().state_dict(), after)
    timm.models.load_checkpoint(other.get_eval_model(), path)  # the plain backbone
