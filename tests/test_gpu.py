"""A GPU does what a CPU does: losses, steps, precisions, compilation, averages, and going on bit for bit."""
import copy
import os
import subprocess

import pytest
import torch
from helpers.resume import assert_same_end, noise_flags, run, run_killed
from helpers.train import ROOT, image_folder, main, rows

from dks_timm import DKSLoss, DKSTask, create_dks_model

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='this machine has no CUDA device')]


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=GPU)])
def device(request):
    return request.param


@pytest.mark.parametrize('settings', [
    {}, dict(temperature=3., direction='to-backbone'), dict(teacher='ensemble', temperature=2.),
    dict(synergy='sigmoid')])
def test_the_loss_is_that_of_float64(device, settings):
    logits = [3 * torch.randn(64, 100, dtype=torch.float64) for _ in range(3)]
    target = torch.rand(64, 100, dtype=torch.float64) if 'synergy' in settings else torch.randint(100, (64,))
    found = []
    for dtype, place in ((torch.float64, 'cpu'), (torch.float32, device)):
        z = [x.to(place, dtype).requires_grad_() for x in logits]
        y = target.to(place, dtype if target.is_floating_point() else None)
        loss = DKSLoss(**settings)(z, y)['loss']
        found.append([x.cpu().double() for x in (loss.detach(), *torch.autograd.grad(loss, z))])
    for expected, x in zip(*found, strict=True):
        assert (x - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize('name, size', [('test_resnet', 64), ('test_vit', 160)])
def test_a_step_changes_weights_as_on_the_cpu(device, name, size):
    net = create_dks_model(name, num_classes=10, image_size=(size, size)).double()
    images, target = torch.randn(4, 3, size, size, dtype=torch.float64), torch.randint(10, (4,))
    ends = []
    for place in ('cpu', device):
        task = DKSTask(copy.deepcopy(net).to(place).train(), device=torch.device(place), verbose=False)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        task(images.to(place), target.to(place))['loss'].backward()
        optimizer.step()
        ends.append({key: value.cpu() for key, value in task.trainable_module.state_dict().items()})
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(ends[0][key], value) for key, value in net.state_dict().items())


ON_GPU = ['--amp --amp-dtype float16', '--torchcompile --amp']
ANYWHERE = ['', '--amp --amp-dtype bfloat16 --channels-last', '--model-ema --model-ema-decay 0.9 --dks-teacher ema']


@pytest.mark.parametrize('flags, device', [
    *(pytest.param(flags, 'cpu', marks=pytest.mark.slow) for flags in ANYWHERE),
    *(pytest.param(flags, 'cuda', marks=GPU) for flags in (*ANYWHERE, *ON_GPU))])
def test_a_run_learns(flags, device, tmp_path):
    main(*'--dataset digits --num-classes 10 --img-size 32 --in-chans 1 --model test_resnet --epochs 2 -b 32'.split(),
         *'--opt adamw --lr 0.01 --warmup-epochs 0 --workers 0 --data-on-device --no-aug --dks'.split(),
         *flags.split(), '--device', device, '--output', tmp_path, '--experiment', 'run')
    assert float(rows(tmp_path / 'run')[-1]['eval_top1']) > 70


def test_a_run_goes_on_bit_for_bit(device, tmp_path, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    flags = [*noise_flags(tmp_path), '--dks', '--model-ema', '--device', device, '--amp', '--amp-dtype', 'bfloat16',
             '--recovery-interval', '1', '--resume', 'auto']
    torch.use_deterministic_algorithms(True)
    try:
        run(tmp_path / 'whole', *flags)
        run_killed(tmp_path / 'parts', *flags, when=dict(epoch=1, done=3))
        run(tmp_path / 'parts', *flags)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_end(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='this machine has no CUDA device')
def test_out_of_memory_names_what_needs_less(tmp_path):
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(SystemExit, match='out of memory; give a smaller --batch-size'):
            main(*'--dataset synthetic --train-num-samples 256 --val-split= --model resnet50 -b 256 --epochs 1'.split(),
                 '--workers', 0, '--output', tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_in_small_without_one_and_leaves_out_what_is_done(tmp_path):
    data, out = image_folder(tmp_path / 'data', classes=20, count=4), tmp_path / 'out'
    command = ['bash', ROOT / 'benchmarks/gpu.sh', out, data, '--smoke']
    first, second = (
        subprocess.run(command, env={**os.environ, 'SCRATCH': str(tmp_path)}, capture_output=True, text=True)
        for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    parts = [line.partition(': done in ')[0] for line in first.stdout.splitlines()]
    assert parts == ['tests', 'steps eager', 'rows'] and second.stdout == first.stdout
    assert len([path for path in out.rglob('*') if path.is_file()]) <= 8
    assert (out / 'cifar100/mini_1_epochs/dks-0.jsonl').exists() and (out / 'step-cpu.csv').exists()
