"""Every fault here is caused: kills within a save, full disks, damaged files, signals, non-finite numbers."""
import csv
import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from helpers.resume import Killed, assert_same_end, noise_flags, plain, run
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from dks_timm.training import checkpoint, config, loop, stopping
from dks_timm.training.stopping import Guard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    return noise_flags(tmp_path_factory.mktemp('noise'))


def rows(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


def code_of(folder, *argv):
    """The exit code of a run."""
    try:
        run(folder, *argv)
    except SystemExit as e:
        return e.code
    return 0


# Checkpoints

def find(folder):
    """Return the checkpoint that --resume auto finds in a folder."""
    argv = ['--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    args, _, text = config.parse_args(argv)
    return checkpoint.find_resume(args, text)


METRICS = [3., 5., 4., 6.]


def train_and_save(folder):
    """Train a tiny model for four epochs, each with a recovery checkpoint within, from where the folder says."""
    path = find(folder)
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    saver = checkpoint.Saver(
        model, torch.optim.SGD(model.parameters()), checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=2)
    done = 0
    if path:
        found = load_checkpoint_metadata(path)
        model.load_state_dict(found['state_dict'])
        done = found['saver']['run']['steps']
        saver.resume(path)
    for step in range(done, 8):
        with torch.no_grad():
            model.weight += 1
        epoch, saver.run = step // 2, dict(over=step % 2 == 1, steps=step + 1)
        if step % 2:
            saver.save_checkpoint(epoch, METRICS[epoch])
        else:
            saver.save_recovery(epoch, 0)


def files(folder):
    """Of which step each file of a folder is."""
    return {
        file.name: load_checkpoint_metadata(file)['state_dict']['weight'][0, 0].item() for file in folder.iterdir()}


def test_a_run_killed_at_any_call_to_the_file_system_goes_on_from_the_newest_whole_checkpoint(tmp_path, monkeypatch):
    calls, kill_at = 0, None

    def killing(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return original(*args, **kwargs)
        return call

    for name in ('replace', 'link', 'unlink', 'remove', 'fsync'):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    (tmp_path / 'whole').mkdir()
    train_and_save(tmp_path / 'whole')
    total, whole = calls, files(tmp_path / 'whole')
    assert whole == {
        'last.pth.tar': 8, 'model_best.pth.tar': 8, 'checkpoint-1.pth.tar': 4, 'checkpoint-3.pth.tar': 8,
        'recovery-2-0.pth.tar': 5, 'recovery-3-0.pth.tar': 7}
    for at in range(1, total + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        calls, kill_at = 0, at
        with pytest.raises(Killed):
            train_and_save(folder)
        kill_at = None
        train_and_save(folder)
        assert files(folder) == whole, at


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp('file') / 'x.pth.tar'
    torch.save(dict(epoch=1, state_dict=dict(a=torch.randn(50, 50), b=torch.arange(9)), note='text'), path)
    return path


def test_a_checkpoint_that_is_cut_off_anywhere_is_recognised(written, tmp_path):
    data = written.read_bytes()
    assert checkpoint.damage(written) == ''
    for length in {*range(0, len(data), 97), len(data) - 1}:
        (tmp_path / 'x').write_bytes(data[:length])
        assert checkpoint.damage(tmp_path / 'x'), length


def test_a_checkpoint_with_wrong_bytes_is_recognised_unless_nothing_of_it_is_lost(written, tmp_path):
    data, rng, harmless = written.read_bytes(), random.Random(0), 0
    for i in range(300):
        bad, at = bytearray(data), rng.randrange(len(data))
        if i % 2:
            bad[at] ^= 1 << rng.randrange(8)
        else:
            bad[at:at + 512] = bytes(len(bad[at:at + 512]))
        (tmp_path / 'x').write_bytes(bad)
        if not checkpoint.damage(tmp_path / 'x'):
            good, found = (torch.load(path, weights_only=True) for path in (written, tmp_path / 'x'))
            assert plain(good) == plain(found)
            harmless += 1
    assert harmless < 60  # between the parts of a file


def test_a_damaged_checkpoint_that_is_named_is_refused(noise, tmp_path, written, capfd):
    data = bytearray(written.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / 'bad.pth.tar').write_bytes(data)
    assert code_of(tmp_path / 'x', *noise, '--resume', tmp_path / 'bad.pth.tar') == 2
    line, = capfd.readouterr().err.splitlines()
    assert '--resume' in line and 'bad.pth.tar' in line and 'checksum' in line


def test_damaged_checkpoints_are_named_and_passed_over(noise, tmp_path, caplog):
    run(tmp_path / 'whole', *noise, '--recovery-interval', '3')
    run(tmp_path / 'parts', *noise, '--recovery-interval', '3', '--epochs', '2')
    folder = tmp_path / 'parts'
    for name, damage in (('last', lambda data: data[:1000]), ('model_best', bytes), ('checkpoint-1', lambda data: b'')):
        path = folder / f'{name}.pth.tar'
        data = path.read_bytes()
        path.unlink()  # they are one file
        path.write_bytes(damage(data))
    assert find(folder) == str(folder / 'recovery-1-2.pth.tar')
    assert 'last.pth.tar is not complete' in caplog.text and 'checkpoint-1.pth.tar is not complete' in caplog.text


# Disks

@pytest.fixture
def full_disk(monkeypatch):
    """Let writing to files of that description fail, as long as the list is not empty."""
    failing = []
    original = checkpoint._File.write

    def write(self, data):
        if any(word in str(self.raw.name) for word in failing):
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return original(self, data)

    monkeypatch.setattr(checkpoint._File, 'write', write)
    return failing


@pytest.mark.parametrize('what', ['.pth.tar', 'summary.csv'])
def test_a_run_goes_on_while_the_disk_is_full_and_saves_when_there_is_room(noise, tmp_path, full_disk, capfd, what):
    run(tmp_path / 'whole', *noise)

    class Trainer(loop.Trainer):
        def updates(self, epoch):
            full_disk[:] = [what] if epoch < 2 else []
            return super().updates(epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'Trainer', Trainer)
        assert code_of(tmp_path / 'parts', *noise) == 0
    err = capfd.readouterr().err
    assert err.count('No space left on device') == 1 and 'training goes on' in err and 'is written again' in err
    assert rows(tmp_path / 'parts') == rows(tmp_path / 'whole')
    last, last2 = (load_checkpoint_metadata(tmp_path / n / 'last.pth.tar')['state_dict'] for n in ('whole', 'parts'))
    assert plain(last) == plain(last2)
    assert not list((tmp_path / 'parts').glob('*tmp*'))


def test_a_run_goes_on_while_its_output_is_read_only(noise, tmp_path, monkeypatch, capfd):
    """As root, whom permissions do not stop: files cannot be opened, nor renamed."""
    read_only, open_, replace, save_image = [], checkpoint._File.__init__, os.replace, torchvision.utils.save_image

    def refusing(original):
        def call(*args, **kwargs):
            if read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return original(*args, **kwargs)
        return call

    monkeypatch.setattr(checkpoint._File, '__init__', refusing(open_))
    monkeypatch.setattr(os, 'replace', refusing(replace))
    monkeypatch.setattr(torchvision.utils, 'save_image', refusing(save_image))

    class Trainer(loop.Trainer):
        def updates(self, epoch):
            read_only[:] = [True] * (epoch < 2)
            return super().updates(epoch)

    monkeypatch.setattr(loop, 'Trainer', Trainer)
    assert code_of(tmp_path / 'x', *noise, '--save-images') == 0
    err = capfd.readouterr().err
    assert err.count('Read-only file system') == 3 and err.count('is written again') == 3
    assert len(rows(tmp_path / 'x')) == 3 and (tmp_path / 'x/last.pth.tar').exists()


def test_a_run_that_cannot_save_its_end_keeps_what_was_there_and_exits_with_4(noise, tmp_path, full_disk, capfd):
    run(tmp_path / 'x', *noise, '--epochs', '2')
    before = {f.name: f.read_bytes() for f in (tmp_path / 'x').iterdir() if f.name != 'args.yaml'}

    class Trainer(loop.Trainer):
        def running(self):
            full_disk.append('tmp')
            return super().running()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'Trainer', Trainer)
        assert code_of(tmp_path / 'x', *noise, '--resume', 'auto') == stopping.UNSAVED == 4
    assert 'No space left on device' in capfd.readouterr().err.splitlines()[-1]
    assert {f.name: f.read_bytes() for f in (tmp_path / 'x').iterdir() if f.name != 'args.yaml'} == before
    full_disk.clear()
    assert code_of(tmp_path / 'x', *noise, '--resume', 'auto') == 0 and len(rows(tmp_path / 'x')) == 3


def test_a_file_size_limit_of_the_system_is_survived(tmp_path, monkeypatch):
    """The real thing: the kernel refuses to let a file grow, within torch.save."""
    saver = checkpoint.Saver(
        torch.nn.Linear(300, 300), torch.optim.SGD([torch.zeros(1)]), checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, 1.)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        saver.save_checkpoint(1, 2.)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert 'File too large' in saver.failure
    assert sorted(f.name for f in tmp_path.iterdir()) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar']
    assert load_checkpoint_metadata(tmp_path / 'last.pth.tar')['epoch'] == 0
    saver.save_checkpoint(2, 3.)
    assert not saver.failure and load_checkpoint_metadata(tmp_path / 'model_best.pth.tar')['epoch'] == 2


# Signals

def signalled(number, **when):
    """A Trainer that sends its process a signal in the middle of an update, or of an evaluation."""
    class Trainer(loop.Trainer):
        def to_device(self, x, y):
            if self.fetches.number == when.get('batch') and self.task.get_trainable_module().training:
                os.kill(os.getpid(), number)
                when.clear()
            if 'evaluation' in when and not self.task.get_trainable_module().training:
                os.kill(os.getpid(), number)
                when.clear()
            return super().to_device(x, y)
    return Trainer


@pytest.mark.parametrize('flags, number, when', [
    ('', signal.SIGTERM, dict(batch=3)),
    ('--workers 2 --reprob 0.5', signal.SIGINT, dict(batch=2)),
    ('--grad-accum-steps 3', signal.SIGTERM, dict(batch=2)),
    ('--model-ema --workers 1', signal.SIGTERM, dict(evaluation=True)),
])
def test_a_signal_ends_a_run_after_its_step_with_75_and_everything_saved(noise, tmp_path, capfd, flags, number, when):
    argv = [*noise, *flags.split()]
    run(tmp_path / 'whole', *argv)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'Trainer', signalled(number, **when))
        assert code_of(tmp_path / 'parts', *argv) == stopping.STOPPED == 75
    assert '--resume auto' in capfd.readouterr().err.splitlines()[-1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / 'parts/last.pth.tar').exists()
    run(tmp_path / 'parts', *argv, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


def test_a_second_signal_ends_the_process_at_once():
    code = (
        'import os, signal, types\n'
        'from dks_timm.training import stopping\n'
        'stopping.Signals.ECHO = 0.\n'
        'accelerator = types.SimpleNamespace(num_processes=1, is_main_process=True)\n'
        'with stopping.Signals(accelerator, 1) as signals:\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        '    print(signals.stop(0), flush=True)\n'
        '    os.kill(os.getpid(), signal.SIGINT)\n'
        '    print("still there")\n'
    )
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 128 + signal.SIGINT and out.stdout == 'True\n' and 'SIGTERM' in out.stderr


# Numbers

def test_a_run_that_diverges_stops_before_its_weights_are_not_finite(noise, tmp_path, capfd):
    argv = [*noise, '--lr', '1e25', '--warmup-epochs', '0', '--sched', 'none']
    assert code_of(tmp_path / 'x', *argv) == stopping.NONFINITE == 5
    line = capfd.readouterr().err.splitlines()[-1]
    assert 'epoch 0, update' in line and '--on-nonfinite skip' in line
    saved, = (tmp_path / 'x').glob('recovery-0-*.pth.tar')
    state = load_checkpoint_metadata(saved)['state_dict']
    assert all(t.isfinite().all() for t in state.values())


def spoiled(batches, head=None):
    """A Trainer for which the second image of some batches is NaN, or a classifier's loss for them."""
    class Trainer(loop.Trainer):
        number = -1

        def to_device(self, x, y):
            x, y = super().to_device(x, y)
            if self.task.get_trainable_module().training:
                self.number += 1
                if self.number in batches and head is None:
                    x = x.clone()
                    x[1] = torch.nan
            return x, y

        def running(self):
            forward = self.task.forward

            def spoiled_forward(x, y):
                out = forward(x, y)
                if self.number in batches:
                    ce = out['ce'].clone()
                    ce[head] = torch.inf
                    out = {**out, 'ce': ce, 'loss': out['loss'] * torch.nan}
                return out

            if head is not None:
                self.task.forward = spoiled_forward
            return super().running()
    return Trainer


def code_of_spoiled(trainer, folder, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'Trainer', trainer)
        return code_of(folder, *argv)


@pytest.mark.parametrize('flags, batches, update', [
    ('', {7}, 'epoch 1, update 3 of 5'),
    ('--workers 1 --grad-accum-steps 2', {8}, 'epoch 1, update 2 of 3'),
    ('--data-on-device --model-ema', {5}, 'epoch 1, update 1 of 5'),
])
def test_a_nonfinite_update_is_named_and_the_run_goes_on_from_before_it(
        noise, tmp_path, capfd, flags, batches, update):
    argv = [*noise, '--no-aug', *flags.split()]
    run(tmp_path / 'whole', *argv)
    capfd.readouterr()
    assert code_of_spoiled(spoiled(batches), tmp_path / 'parts', *argv) == 5
    line = capfd.readouterr().err.splitlines()[-1]
    assert update in line and 'the loss of backbone is nan' in line and '--on-nonfinite skip' in line
    run(tmp_path / 'parts', *argv, '--resume', 'auto')
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


def test_a_classifier_whose_loss_is_not_finite_is_named(noise, tmp_path, capfd):
    assert code_of_spoiled(spoiled({1}, head=2), tmp_path / 'x', *noise, '--dks') == 5
    assert 'the loss of stage3 is inf' in capfd.readouterr().err.splitlines()[-1]


def test_a_skipped_update_changes_nothing_and_is_counted(noise, tmp_path, capfd):
    kept = []

    class Trainer(spoiled({6, 12})):
        def _state(self):
            states = [self.task.get_checkpoint_state(), self.task.get_checkpoint_state(ema=True)]
            return plain([states, self.optimizer.state_dict()['state']])

        def running(self):
            keep = self.guard.keep
            self.guard.keep = lambda: (keep(), kept.append(self._state()))
            return super().running()

        def leave_out(self, update):
            super().leave_out(update)
            assert self._state() == kept[-1]
            kept.append('compared')

    argv = [*noise, '--on-nonfinite', 'skip', '--model-ema']
    assert code_of_spoiled(Trainer, tmp_path / 'x', *argv) == 0
    assert kept.count('compared') == 2
    assert [row['skipped'] for row in rows(tmp_path / 'x')] == ['0', '1', '1']
    assert all(float(row['train_loss']) < 10 for row in rows(tmp_path / 'x'))
    err = capfd.readouterr().err
    assert 'epoch 1, update 2 of 5' in err and '2 updates with a non-finite loss or gradient were left out' in err


def test_a_run_without_a_finite_update_stops_also_where_updates_are_skipped(noise, tmp_path, capfd):
    assert code_of_spoiled(spoiled(range(99)), tmp_path / 'x', *noise, '--on-nonfinite', 'skip') == 5
    assert 'every update of epoch 0' in capfd.readouterr().err.splitlines()[-1]


def test_nonfinite_weights_are_never_saved(noise, tmp_path, capfd):
    class Trainer(loop.Trainer):
        def _end_training(self, epoch, *args):
            super()._end_training(epoch, *args)
            if epoch == 1:
                next(self.task.get_trainable_module().parameters()).data[0] = torch.inf

    assert code_of_spoiled(Trainer, tmp_path / 'x', *noise) == 5
    assert 'weights are not finite' in capfd.readouterr().err.splitlines()[-1]
    assert load_checkpoint_metadata(tmp_path / 'x/last.pth.tar')['epoch'] == 0


def test_with_a_gradient_scaler_losses_count_and_gradients_are_its_own_affair():
    args, _, _ = config.parse_args([])
    module = torch.nn.Linear(2, 1, bias=False)
    task = types.SimpleNamespace(get_trainable_module=lambda: module)
    optimizer = torch.optim.SGD(module.parameters())
    accelerator = types.SimpleNamespace(
        scaler=object(), num_processes=1, reduce=lambda x: x)
    for scale, finite in ((1., True), (torch.inf, True), (torch.nan, True)):
        guard = Guard(args, accelerator, task, optimizer, ['backbone'])
        loss = module(torch.ones(1, 2)).sum()
        loss.register_hook(lambda grad, scale=scale: grad * scale)
        guard.mark(loss).backward()
        assert guard.clip([loss]) == finite
        assert not guard.clip([loss, loss * torch.nan])
    accelerator.scaler = None
    for scale in (1., torch.inf, torch.nan):
        optimizer.zero_grad()
        loss = module(torch.ones(1, 2)).sum()
        loss.register_hook(lambda grad, scale=scale: grad * scale)
        guard.mark(loss).backward()
        assert guard.clip([loss]) == (scale == 1)
    # The gradient may be finite where the loss is not.
    optimizer.zero_grad()
    loss = module(torch.ones(1, 2)).sum()
    guard.mark(loss + torch.inf).backward()
    assert not guard.clip([loss])


# Several processes

@pytest.fixture(scope='module')
def together(noise, tmp_path_factory):
    """Runs in the three processes of one launch, of which one meets a fault: folder, results, what the launcher said.

    Of three numbers, unlike of two, the sum depends on the order.
    """
    root = tmp_path_factory.mktemp('together')

    def of(name, *flags, fault=None):
        argv = [*noise, '-b', '2', *flags, '--output', root, '--experiment', name, '--resume', 'auto']
        return dict(argv=[str(a) for a in argv], fault=fault)

    plain = '--workers', '1', '--reprob', '0.5', '--model-ema'
    own = '--no-ddp-bb', '--dist-bn', '', '--aug-repeats', '2'  # each process has statistics of its own
    runs = dict(
        plain=of('plain', *plain),
        told=of('told', *plain, fault=dict(rank=1, batch=7, kind='SIGTERM')),
        told_on=of('told', *plain),
        spoiled=of('spoiled', *plain, fault=dict(rank=1, batch=7, kind='nan')),
        spoiled_on=of('spoiled', *plain),
        own=of('own', *own),
        own_told=of('own_told', *own, fault=dict(rank=0, batch=3, kind='SIGTERM')),
        own_told_on=of('own_told', *own),
        dies=of('dies', *plain, fault=dict(rank=1, batch=6, kind='raise')),
    )
    out, file = root / 'results.pt', root / 'runs.json'
    file.write_text(json.dumps(list(runs.values())))
    launched = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '3',
         ROOT / 'tests/helpers/several_runs.py', out, file],
        cwd=root, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=600)
    # Of the last one there is no result.
    results = [
        dict(zip(runs, torch.load(out.with_suffix(f'.{rank}.pt')), strict=False)) for rank in range(3)]
    assert [len(result) for result in results] == [len(runs) - 1] * 3, launched.stderr
    return root, results, launched


@pytest.mark.parametrize('whole, parts', [('plain', 'told'), ('plain', 'spoiled'), ('own', 'own_told')])
def test_processes_end_together_and_go_on_bit_for_bit(together, whole, parts):
    root, results, _ = together
    assert [result[whole]['code'] for result in results] == [0] * 3
    assert [result[parts]['code'] for result in results] == [5 if parts == 'spoiled' else 75] * 3
    assert [result[f'{parts}_on']['code'] for result in results] == [0] * 3
    for result in results:
        for key, tensor in result[whole]['tensors'].items():
            assert torch.equal(tensor, result[f'{parts}_on']['tensors'][key]), key
    assert_same_end(root / whole, root / parts)


def test_processes_stop_within_ten_batches(together):
    root, results, _ = together
    epoch, update = re.search(r'told to stop, in epoch (.) after update (.)', results[0]['told']['err']).groups()
    assert 7 <= 4 * int(epoch) + int(update) <= 7 + 10


def test_the_process_whose_numbers_went_wrong_is_named(together):
    line = together[1][0]['spoiled']['err'].splitlines()[-1]
    assert 'the loss of backbone is nan in process 1' in line


def test_a_process_that_raises_ends_the_others_and_is_heard(together):
    _, _, launched = together
    assert launched.returncode != 0
    assert 'RuntimeError: this process has met a fault' in launched.stderr


def test_a_process_that_is_killed_ends_the_others_workers_and_all(noise, tmp_path):
    argv = [*noise, '--workers', '2', '--output', tmp_path, '--experiment', 'x']
    (tmp_path / 'runs.json').write_text(json.dumps(
        [dict(argv=[str(a) for a in argv], fault=dict(rank=1, batch=2, kind='SIGKILL'))]))
    # Done when all that can write to its output have ended.
    launched = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         ROOT / 'tests/helpers/several_runs.py', tmp_path / 'results.pt', tmp_path / 'runs.json'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert launched.returncode != 0 and 'exitcode  : -9' in launched.stderr
    assert not (tmp_path / 'results.0.pt').exists()
