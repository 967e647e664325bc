"""The records that a run keeps of each epoch."""
import csv

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dks_timm.training import config
from dks_timm.training.records import Records

TRAIN = dict(loss=2., top1_backbone=40., top1_stage1=30., ce_backbone=1., ce_stage1=1., synergy=0.5,
             synergy_backbone_stage1=0.25, synergy_stage1_backbone=0.75)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_tensorboard_gets_the_row_of_every_epoch_and_the_speed(tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    args, _, _ = config.parse_args([])
    accelerator = Accelerator(cpu=True, log_with='tensorboard', project_dir=str(tmp_path))
    records = Records(args, accelerator, str(tmp_path), 0)
    for epoch in range(2):
        records.write(epoch, TRAIN, dict(top1=50. + epoch), lr=0.5, images_per_second=100.)
    accelerator.end_training()
    found = events.EventAccumulator(str(tmp_path / 'dks-timm')).Reload()
    with open(tmp_path / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}
    assert scalars.pop('train_images_per_second') == [(0, 100.), (1, 100.)] and 'images' not in ','.join(rows[0])
    assert scalars == {name: [(i, float(row[name])) for i, row in enumerate(rows)] for name in rows[0]}
    assert scalars['train_synergy_stage1_backbone'] == [(0, 0.75), (1, 0.75)] and scalars['lr'] == [(0, 0.5), (1, 0.5)]


def test_the_row_of_a_plain_run_has_timms_columns_alone(tmp_path):
    args, _, _ = config.parse_args([])
    records = Records(args, Accelerator(cpu=True), str(tmp_path), 0)
    records.write(0, dict(loss=2., top1_backbone=40.), dict(loss=1., top1=50., top5=90.), lr=0.5)
    assert list(records.summary.rows[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
