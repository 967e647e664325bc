"""--stop-epoch and --save-epochs: a run that ends before its schedule, and checkpoints to go on from."""
import csv

import pytest
import torch
import yaml
from helpers.train import main, rows

from dks_timm.training import checkpoint, stopping

SMALL = [
    '--dataset', 'digits', '--num-classes', '10', '--model', 'test_resnet', '--img-size', '32', '--device', 'cpu',
    '-b', '350', '--workers', '0', '--epochs', '1', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '2e-3',
    '--data-on-device', '--no-aug']


def test_a_milestone_that_could_not_be_written_is_not_another_one(tmp_path, monkeypatch):
    write = checkpoint._write

    def full(path, *args):
        if '/tmp.pth.tar' in str(path) and (tmp_path / 'x/last.pth.tar').exists():
            raise OSError(28, 'No space left on device')
        write(path, *args)

    monkeypatch.setattr(checkpoint, '_write', full)
    with pytest.raises(SystemExit) as e:
        main(*SMALL, '--epochs', '2', '--save-epochs', '1', '2', '--output', tmp_path, '--experiment', 'x')
    assert e.value.code == stopping.UNSAVED
    assert [file.name for file in (tmp_path / 'x').glob('milestone-*')] == ['milestone-1.pth.tar']


def test_a_run_is_found_again_by_settings_that_came_later_and_without_its_stop(tmp_path):
    argv = [*SMALL, '--epochs', '2', '--output', tmp_path]
    main(*argv, '--stop-epoch', '1')
    folder, = tmp_path.iterdir()
    settings = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != 'lr_decay_fn'}))
    main(*argv, '--resume', 'auto')
    assert [row['epoch'] for row in rows(folder)] == ['0', '1'] and len(list(tmp_path.iterdir())) == 1


def test_milestones_stay_and_a_run_stops_where_it_is_told(tmp_path):
    wsd = ['--epochs', '4', '--sched', 'wsd', '--sched-on-updates', '--output', tmp_path]
    main(*SMALL, *wsd, '--stop-epoch', '3', '--save-epochs', '1', '3', '--val-interval', '2', '--experiment', 'x')
    files = {file.name for file in (tmp_path / 'x').iterdir()}
    assert {'milestone-1.pth.tar', 'milestone-3.pth.tar'} < files
    with open(tmp_path / 'x/summary.csv', newline='') as f:
        found = list(csv.DictReader(f))
    assert [row['epoch'] for row in found] == ['0', '1', '2']
    assert float(found[-1]['lr']) == 2e-3  # of four epochs the last 0.8 decay
    epochs = [torch.load(tmp_path / f'x/milestone-{n}.pth.tar', weights_only=False)['epoch'] for n in (1, 3)]
    assert epochs == [0, 2]
    # A cooldown of its own from there: the schedule as if the run had gone on.
    main(*SMALL, *wsd, '--resume', tmp_path / 'x/milestone-3.pth.tar', '--experiment', 'y')
    assert [row['epoch'] for row in rows(tmp_path / 'y')] == ['3'] and float(rows(tmp_path / 'y')[0]['lr']) < 2e-3
