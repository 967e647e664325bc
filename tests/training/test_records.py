"""What a run records of each epoch."""
import csv

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dks_timm.training import config
from dks_timm.training.records import Records

NAMES = ['backbone', 'stage1']
TRAIN = dict(loss=2., top1_backbone=40., top1_stage1=30., ce_backbone=1., ce_stage1=1., synergy=0.5,
             synergy_backbone_stage1=0.25, synergy_stage1_backbone=0.75)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def record(folder, names, groups):
    """Record two epochs with TensorBoard; returns rows of summary.csv, scalars and texts by tag."""
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    args, _, _ = config.parse_args([])
    accelerator = Accelerator(cpu=True, log_with='tensorboard', project_dir=str(folder))
    records = Records(args, accelerator, names, str(folder), 0)
    train = TRAIN if len(names) > 1 else dict(loss=2., top1_backbone=40.)
    for epoch in range(2):
        records.write(epoch, train, dict(top1=50. + epoch), groups, images_per_second=100.)
    accelerator.end_training()
    found = events.EventAccumulator(str(folder / 'dks-timm')).Reload()
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    return rows, {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}, {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(tag)]
        for tag in found.Tags()['tensors']}


def test_tensorboard_gets_every_head_each_pair_and_the_matrix_epoch_by_epoch(tmp_path):
    rows, scalars, texts = record(tmp_path, NAMES, [dict(lr=0.5), dict(lr=0.5)])
    assert scalars.pop('train_images_per_second') == [(0, 100.), (1, 100.)] and 'images' not in ','.join(rows[0])
    assert scalars == {name: [(i, float(row[name])) for i, row in enumerate(rows)] for name in rows[0]}
    assert scalars['train_synergy_stage1_backbone'] == [(0, 0.75), (1, 0.75)] and scalars['lr'] == [(0, 0.5), (1, 0.5)]
    matrix = '| teacher | backbone | stage1 |\n| --- | --- | --- |\n| backbone | 0.0000 | 0.2500 |\n' \
             '| stage1 | 0.7500 | 0.0000 |'
    assert texts == {'train_synergy_matrix/text_summary': [(0, matrix), (1, matrix)]}


def test_a_plain_run_has_no_matrix_and_layer_decay_its_lowest_and_highest_learning_rate(tmp_path):
    _, scalars, texts = record(tmp_path, NAMES[:1], [dict(lr=0.25, lr_scale=0.5), dict(lr=0.5, lr_scale=1.)])
    assert set(scalars) == {
        'epoch', 'train_loss', 'eval_top1', 'lr', 'lr_lowest', 'lr_highest', 'train_images_per_second'}
    assert [scalars[name][0][1] for name in ('lr', 'lr_lowest', 'lr_highest')] == [0.375, 0.25, 0.5] and not texts
