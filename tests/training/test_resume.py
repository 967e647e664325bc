"""A run that is killed and continued ends like one that was not: the same bits in its weights, the same summary.csv."""

import pytest
import timm
import torch
from helpers.datasets import make
from helpers.resume import assert_same_end, noise_flags, plain, run, run_killed
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils.checkpoint_saver import load_checkpoint_metadata


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    return noise_flags(tmp_path_factory.mktemp('noise'))


CASES = [
    ('', dict(done=3, epoch=1)),
    ('--epochs 2', dict(over=True, epoch=0)),
    ('--workers 1 --reprob 0.5 --remode pixel --recount 2', dict(done=1, epoch=0)),
    ('--workers 2 --mixup 0.3 --cutmix 1 --mixup-mode elem --reprob 0.5', dict(done=5, epoch=1)),
    ('--workers 3 --cutmix 1 --mixup-mode pair --aa rand-m9-mstd0.5', dict(done=2, epoch=0)),
    ('--workers 2 --mixup 1 --mixup-off-epoch 1', dict(done=2, epoch=1)),
    ('--mixup 1 --mixup-off-epoch 1 --no-prefetcher --reprob 0.5', dict(done=3, epoch=0)),
    ('--workers 2 --no-prefetcher --cutmix 1 --mixup-mode batch', dict(done=3, epoch=2)),
    ('--workers 2 --use-multi-epochs-loader --reprob 0.3', dict(done=4, epoch=1)),
    ('--workers 4 --use-multi-epochs-loader --worker-seeding part', dict(over=True, epoch=1)),
    ('--use-multi-epochs-loader --mixup 0.5', dict(done=2, epoch=1)),
    ('--train-img-sizes 24 32 --train-size-schedule progressive --workers 2', dict(done=2, epoch=1)),
    ('--aug-splits 2 --jsd-loss --aa augmix-m5-w4-d2 --workers 1', dict(done=3, epoch=1)),
    ('--data-on-device --train-pad 2 --mixup 0.5 --mixup-mode elem --color-jitter 0', dict(done=3, epoch=1)),
    ('--grad-accum-steps 3 --sched-on-updates --model-ema --model-ema-warmup', dict(done=1, epoch=1)),
    ('--grad-accum-steps 2 --workers 2 --clip-grad 0.1', dict(done=3, epoch=0)),
    ('--model test_vit --img-size 32 --opt adamw --drop 0.2 --drop-path 0.2 --layer-decay 0.7', dict(done=2, epoch=1)),
    ('--sched plateau --patience-epochs 0 --lr-noise 0.1 --eval-metric loss', dict(over=True, epoch=1)),
    ('--sched plateau --patience-epochs 0 --warmup-epochs 0', dict(done=2, epoch=2)),
    ('--val-interval 2 --epochs 4 --opt lookahead_adamw', dict(done=5, epoch=2)),
    ('--val-split= --sched none', dict(over=True, epoch=1)),
    ('--dks --dks-every 2 --dks-start-epoch 1 --dks-ramp 1 --dks-teacher ema --model-ema --model-ema-decay 0.9',
     dict(done=3, epoch=1)),
    ('--model naflexvit_base_patch16_gap --model-kwargs embed_dim=48 depth=1 num_heads=2 --naflex-loader '
     '--naflex-train-seq-lens 4 9 --naflex-max-seq-len 4 --mixup 0.3 --workers 2', dict(done=1, epoch=1)),
    ('--checkpoint-hist 1', dict(over=True, epoch=1)),
]


@pytest.mark.parametrize('flags, when', CASES, ids=[flags or 'plain' for flags, _ in CASES])
def test_a_killed_run_goes_on_bit_for_bit(noise, tmp_path, flags, when):
    argv = [*noise, *flags.split()]
    run(tmp_path / 'whole', *argv)
    interval = ['--recovery-interval', when['done']] if 'done' in when else []
    run_killed(tmp_path / 'parts', *argv, *interval, when=when)
    run(tmp_path / 'parts', *argv, *interval, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('reader', ['wds', 'hfids'])
@pytest.mark.parametrize('when', [dict(done=2, epoch=1), dict(over=True, epoch=1)], ids=['within', 'after'])
def test_a_stream_goes_on_bit_for_bit(noise, tmp_path, monkeypatch, reader, workers, when):
    if reader == 'hfids':
        config = pytest.importorskip('datasets.config', reason='hfids/ needs the package datasets')
        # The package sleeps for 5 s after every pass, until its threads have ended.
        monkeypatch.setattr(config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0, raising=False)
    argv = [*noise, '--data-dir', '', *make(reader, tmp_path / 'data'), '--num-classes', '3', '--workers', workers]
    interval = ['--recovery-interval', 2]
    run(tmp_path / 'whole', *argv)
    run_killed(tmp_path / 'parts', *argv, *interval, when=when)
    run(tmp_path / 'parts', *argv, *interval, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('flags, kills', [
    ('--use-multi-epochs-loader', [dict(done=2, epoch=0), dict(done=4, epoch=0), dict(over=True, epoch=0),
                                   dict(done=2, epoch=2)]),
    ('', [dict(done=2, epoch=1), dict(done=4, epoch=1)]),  # no evaluation in between
])
def test_a_run_that_was_killed_often_ends_like_one_that_was_not(noise, tmp_path, flags, kills):
    argv = [*noise, '--workers', '2', '--reprob', '0.5', *flags.split()]
    run(tmp_path / 'whole', *argv)
    for when in kills:
        run_killed(tmp_path / 'parts', *argv, '--recovery-interval', '2', '--resume', 'auto', when=when)
    run(tmp_path / 'parts', *argv, '--recovery-interval', '2', '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('flags, said', [
    ('-b 6', 'batch_size 4 there and 6 here'),
    ('--grad-accum-steps 2', 'accumulation 1 there and 2 here'),
    ('--workers 1', 'workers 0 there and 1 here'),
])
def test_a_run_that_cannot_go_on_exactly_says_so_and_goes_on(noise, tmp_path, capfd, flags, said):
    run_killed(tmp_path / 'x', *noise, '--recovery-interval', '2', when=dict(done=2, epoch=1))
    run(tmp_path / 'x', *noise, *flags.split(), '--resume', 'auto')
    assert said in capfd.readouterr().err
    assert (tmp_path / 'x/summary.csv').read_text().count('\n') == 1 + 3


def test_a_checkpoint_of_timms_goes_on_as_timm_does_and_timm_reads_ours(noise, tmp_path, capfd):
    run_killed(tmp_path / 'x', *noise, '--recovery-interval', '2', when=dict(done=2, epoch=1))
    recovery = tmp_path / 'x/recovery-1-1.pth.tar'
    checkpoint = load_checkpoint_metadata(recovery)
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=2), criterion=torch.nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(task.trainable_module, opt='sgd', lr=1., weight_decay=2e-5)
    assert resume_task_checkpoint(task, str(recovery), optimizer) == 2  # the epoch after, as timm has it
    assert plain(task.trainable_module.state_dict()) == plain(checkpoint['state_dict'])
    del checkpoint['saver']['run']
    torch.save(checkpoint, tmp_path / 'timm.pth.tar')
    run(tmp_path / 'y', *noise, '--resume', tmp_path / 'timm.pth.tar')
    assert [line.split(',')[0] for line in (tmp_path / 'y/summary.csv').read_text().splitlines()] == ['epoch', '2']
