"""The cost of the training loop beside the step: values read from the device, operations; and synthetic data."""
import csv
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.operations import Operations
from timm.data import create_loader
from timm.utils import AverageMeter

import dks_timm
import train
from dks_timm.training import config, loop, readers
from dks_timm.training.metrics import Totals

SYNTHETIC = [
    '--dataset', 'synthetic', '--val-split', '', '--num-classes', '10', '--img-size', '32', '--workers', '0', '-b', '4',
    '--model', 'test_resnet', '--device', 'cpu', '--opt', 'momentum', '--lr', '0.01', '--epochs', '1', '--no-aug',
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def count_operations(tmp_path, monkeypatch):
    """Train an epoch of so many updates with train.py, and count what the loop asks of torch."""
    counted = Operations()

    original = loop.Trainer.updates

    def updates(self, epoch):
        with counted:
            yield from original(self, epoch)

    monkeypatch.setattr(loop.Trainer, 'updates', updates)

    def run(updates, *flags):
        nonlocal counted
        counted = Operations()
        train.main([*SYNTHETIC, '--train-num-samples', str(4 * updates), '--output', str(tmp_path), *flags])
        return counted

    return run


def test_reads_are_counted_however_they_are_written():
    x = torch.arange(3.)
    with Operations() as counted:
        x.sum().item(), float(x.sum()), bool(x[0] > 1), x.tolist(), x.numpy(), torch.equal(x, x), x[x > 1]
    assert counted.reads == 7
    with Operations() as counted:
        x.view(3, 1).sum().detach()
    assert counted.reads == 0 and counted.counts == Counter(sum=1)


@pytest.mark.parametrize('flags', [
    [],
    ['--dks', '--dks-batch-fraction', '0.5', '--dks-every', '2', '--clip-grad', '1'],
    ['--dks', '--amp', '--model-ema', '--mixup', '0.2', '--sched-on-updates'],
])
def test_an_update_reads_at_most_one_value_and_metrics_none(count_operations, flags):
    few, many = (count_operations(updates, '--log-interval', '100', *flags) for updates in (2, 6))
    assert many.counts['convolution'] == 3 * few.counts['convolution'] > 0
    assert many.reads - few.reads <= 4
    shown = count_operations(6, '--log-interval', '1', *flags)
    assert shown.reads - many.reads == 4  # lines, but for the first and the last update, which always have one


@pytest.mark.parametrize('classifiers, part, most', [(1, 8, 6), (3, 8, 11), (3, 5, 14), (6, 8, 14)])
def test_counting_a_batch_takes_few_operations_and_no_transfer(classifiers, part, most):
    names = ['backbone', *map(str, range(1, classifiers))]
    logits = [torch.randn(8 if m == 0 else part, 10) for m in range(classifiers)]
    report = dict(logits=logits, ce=torch.rand(classifiers), synergy=torch.zeros(classifiers, classifiers))
    totals, loss, target = Totals(Accelerator(cpu=True), names), torch.rand(()), torch.arange(8)
    with Operations() as counted:
        totals.update(report if classifiers > 1 else dict(output=logits[0]), loss, target, 8)
    assert counted.reads == 0 and counted.counts.total() <= most
    assert not {'copy_', '_to_copy', 'scalar_tensor'} & set(counted.counts)


def test_mean_loss_has_the_digits_of_timms_meter():
    totals, meter = Totals(Accelerator(cpu=True), ['backbone']), AverageMeter()
    for batch_size in (7, 16, 3) * 20:
        loss = torch.rand(()) * 5
        totals.update(dict(output=torch.randn(batch_size, 4)), loss, torch.zeros(batch_size).long(), batch_size)
        meter.update(loss.item(), batch_size)
    assert totals.compute()['loss'] == meter.avg


def synthetic(prefix='train', **kwargs):
    args, _, _ = config.parse_args(SYNTHETIC[:6] + ['--train-num-samples', '40', '--val-num-samples', '20'])
    vars(args).update(kwargs)
    return readers.create(args, prefix, is_training=prefix == 'train')


def test_synthetic_images_are_read_and_augmented_once():
    dataset, calls = synthetic(), Counter()

    def transform(image):
        calls.update([image.getpixel((0, 0))])
        return image

    dataset.transform = transform
    images, labels = zip(*(dataset[i] for i in [*range(40), *range(40)]), strict=True)
    assert len(calls) == len(set(map(id, images))) > 1 and set(calls.values()) == {1}
    assert Counter(labels) == dict.fromkeys(range(10), 8)


def test_synthetic_data_depend_on_the_seed_alone():
    pixels = [synthetic(seed=seed)[3][0].tobytes() for seed in (1, 1, 2)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_synthetic_data_are_as_many_as_imagenet_or_as_the_flags_say():
    assert (len(synthetic()), len(synthetic('val'))) == (40, 20)
    assert len(synthetic(train_num_samples=None)) == 1281167
    assert len(synthetic('val', val_num_samples=None)) == 50000
    assert synthetic(num_classes=None)[999][1] == 999


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_synthetic_data_go_through_timms_loader(use_prefetcher):
    loader = create_loader(
        synthetic(in_chans=1), input_size=(1, 24, 24), batch_size=8, is_training=True, num_workers=2, mean=(0.5,),
        std=(0.5,), use_prefetcher=use_prefetcher, device=torch.device('cpu'), pin_memory=False)
    x, y = next(iter(loader))
    assert x.shape == (8, 1, 24, 24) and x.dtype == torch.float32 and y.shape == (8,)


def test_a_run_on_synthetic_data_evaluates_and_stays_finite(tmp_path):
    train.main([
        *SYNTHETIC, '--train-num-samples', '24', '--val-num-samples', '8', '--val-split', 'validation', '--dks',
        '--output', str(tmp_path), '--experiment', 'run'])
    with open(tmp_path / 'run' / 'summary.csv', newline='') as f:
        row = next(csv.DictReader(f))
    assert 0 < float(row['eval_loss']) < 10 and 0 < float(row['train_loss']) < 30


@pytest.mark.parametrize('name, size', [('resnet18', 64), ('test_vit', 160)])
def test_a_forward_has_the_operations_of_backbone_and_branches_and_no_more(name, size):
    net = dks_timm.create_dks_model(name, num_classes=10).train()
    x = torch.randn(2, 3, size, size)
    net(x)  # the first time at a size, its shapes are looked up
    features = {}
    handles = [
        net.backbone.get_submodule(branch.source).register_forward_hook(
            lambda module, args, output, source=branch.source: features.update({source: output}))
        for branch in net.branches]
    parts = []
    with Operations() as counted:
        net.backbone(x)
    parts.append(counted.counts)
    for handle in handles:
        handle.remove()
    for branch in net.branches:
        with Operations() as counted:
            branch(x, features[branch.source])
        parts.append(counted.counts)
    with Operations() as counted:
        net(x)
    assert counted.counts == sum(parts, Counter()) and counted.reads == 0 and len(parts) == 3
