"""Small images on the device: the PIL pipeline's pixels and distribution, shares of processes, and what is refused."""
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.datasets import create_loaders
from helpers.train import main, rows
from PIL import Image
from timm.task import evaluation_sample_limit

from dks_timm import errors
from dks_timm.training import config

SIZE = 8
CONFIG = dict(
    input_size=(3, SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), interpolation='bilinear', crop_pct=1.0)
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))]


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    """Folder of 2 classes with 11 images each, of which no two pixels are likely to be equal."""
    root, rng = tmp_path_factory.mktemp('noise'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in 'ab':
            (root / split / label).mkdir(parents=True)
            for i in range(11):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i:02}.png')
    return root


def parse(root, *argv):
    return config.parse_args([
        '--data-dir', str(root), '--num-classes', '2', '--workers', '0', '-b', '4', '--color-jitter', '0',
        *map(str, argv)])[0]


def loaders(args, data_config=CONFIG, **kwargs):
    return create_loaders(args, data_config, **kwargs)[:3]


def images(loader, epoch=0):
    loader.sampler.set_epoch(epoch) if hasattr(loader.sampler, 'set_epoch') else None
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def sort(x, y):
    """In an order that depends on the pixels alone."""
    order = sorted(range(len(x)), key=lambda i: x[i].flatten().tolist())
    return x[order], y[order]


def moves(source, pad):
    """The image that every (top, left, flipped) makes of every source image."""
    padded = torch.from_numpy(np.pad(source.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode='reflect'))
    span = range(2 * pad + 1)
    ways = [(top, left, flip) for top in span for left in span for flip in (False, True)]
    crops = {way: padded[:, :, way[0]:way[0] + SIZE, way[1]:way[1] + SIZE] for way in ways}
    return {image.numpy().tobytes(): way for way in ways for image in (crops[way].flip(-1) if way[2] else crops[way])}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('size', [SIZE, 12])
@pytest.mark.parametrize('argv', [['--train-pad', 0, '--hflip', 0], ['--no-aug']], ids=['no pad', 'no aug'])
def test_without_augmentation_pixels_are_those_of_the_pil_pipeline(noise, device, argv, size):
    config = dict(CONFIG, input_size=(3, size, size), crop_pct=SIZE / size)
    expected = loaders(parse(noise, '-b', 22, *argv), config)
    actual = loaders(parse(noise, '-b', 22, *argv, '--data-on-device'), config, device=device)
    for ours, timms in zip(actual[:2], expected[:2], strict=True):
        for a, b in zip(sort(*images(ours)), sort(*images(timms)), strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize('device', DEVICES)
def test_every_shift_and_flip_is_as_likely_as_in_the_pil_pipeline(noise, device):
    epochs = 60
    made_by = moves(images(loaders(parse(noise, '--no-aug', '-b', 22))[0])[0], pad=1)
    assert len(made_by) == 22 * 18
    counts = []
    for more in ([], ['--data-on-device']):
        loader, _, _ = loaders(parse(noise, '-b', 22, '--train-pad', 1, *more), device=device if more else 'cpu')
        seen = Counter(made_by[x.numpy().tobytes()] for epoch in range(epochs) for x in images(loader, epoch)[0].cpu())
        counts.append(torch.tensor([seen[way] for way in sorted(set(made_by.values()))]).double())
    for count in counts:
        expected = count.sum() / len(count)
        # Chi-squared with 17 degrees of freedom is below 41 in 999 of 1000 cases.
        assert ((count - expected) ** 2 / expected).sum() < 41
    assert counts[0].sum() == counts[1].sum() == 22 * epochs


def test_an_epoch_depends_on_seed_and_number_alone(noise):
    argv = ['--train-pad', 2, '--data-on-device', '--seed', 1]
    state = torch.get_rng_state()
    first, again = (loaders(parse(noise, *argv))[0] for _ in range(2))
    images(first, 0)
    x, y = images(first, 1)
    assert torch.equal(images(again, 1)[0], x) and torch.equal(images(again, 1)[1], y)
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing that the model would miss


def test_neighbouring_seeds_are_not_the_same_epochs_one_later(noise):
    orders = set()
    for seed in range(3):
        sampler = loaders(parse(noise, '--no-aug', '--data-on-device', '--seed', seed))[0].sampler
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9


def test_processes_share_one_permutation_and_evaluation_counts_every_image_once(noise):
    def share(rank, world):
        return loaders(parse(noise, '--train-pad', 2, '--data-on-device'), rank=rank, world_size=world)

    alone, alone_eval, _ = share(0, 1)
    shares = [share(rank, 4) for rank in range(4)]
    whole = {tuple(x.flatten().tolist()) for x in images(alone, 3)[0]}
    parts = [{tuple(x.flatten().tolist()) for x in images(t, 3)[0]} for t, _, _ in shares]
    # 22 images: 5 batches of 4 alone; of four processes, one batch of 4 each.
    assert [len(part) for part in parts] == [4] * 4
    assert len(set.union(*parts)) == 16 and len(whole & set.union(*parts)) >= 14

    assert len({len(e) for _, e, _ in shares}) == 1  # collectives stay in step
    seen = [images(e)[1][:evaluation_sample_limit(e)] for _, e, _ in shares]
    assert sum(map(len, seen)) == 22 and torch.cat(seen).sum() == images(alone_eval)[1].sum() == 11
    assert evaluation_sample_limit(alone_eval) == 22


def test_the_loader_answers_like_timms(noise):
    timms, ours = (loaders(parse(noise, '--train-pad', 2, *more))[:2] for more in ([], ['--data-on-device']))
    for a, b in zip(ours, timms, strict=True):
        assert len(a) == len(b) == len(list(a))
        assert len(a.dataset) == len(b.dataset) == 22
        for (x, y), (u, v) in zip(a, b, strict=True):
            assert (x.shape, x.dtype, x.stride(), y.shape, y.dtype) == (u.shape, u.dtype, u.stride(), v.shape, v.dtype)


def test_batches_are_mixed_by_the_loop(noise):
    loader, _, mixup = loaders(parse(noise, '--train-pad', 2, '--data-on-device', '--mixup', 0.5, '--smoothing', 0))
    _, soft = mixup(*next(iter(loader)))
    assert soft.shape == (4, 2) and torch.allclose(soft.sum(1), torch.ones(4))


def test_train_pad_changes_the_first_transform_and_no_other(noise):
    padded, plain = (parse(noise, '--color-jitter', 0.3, '--aa', '3a', *more)
                     for more in (['--train-pad', 3], []))
    before, after = (loaders(args)[0].dataset.transform.transforms for args in (plain, padded))
    assert [type(t).__name__ for t in after[:3]] == ['Resize', 'CenterCrop', 'RandomCrop']
    assert (after[2].padding, after[2].padding_mode, after[2].size) == (3, 'reflect', (SIZE, SIZE))
    assert [str(t) for t in after[3:]] == [str(t) for t in before[1:]]


@pytest.mark.parametrize('argv, words', [
    (['--data-on-device'], '--data-on-device: does not do resized crops; give --train-pad, or --no-aug'),
    (['--data-on-device', '--train-pad', 2, '--color-jitter', 0.4], '--color-jitter 0.4: not with --data-on-device'),
    (['--data-on-device', '--no-aug', '--aug-repeats', 3], '--data-on-device: cannot be combined with --aug-repeats'),
    (['--train-pad', 2, '--scale', 0.5, 1], '--train-pad 2: cannot be combined with --scale'),
])
def test_what_is_not_carried_out_is_refused_by_name(noise, argv, words):
    with pytest.raises(errors.OptionError) as e:
        parse(noise, *argv)
    assert words in str(e.value)


def test_a_pad_as_large_as_the_image_is_refused(noise):
    with pytest.raises(errors.OptionError, match=f'--train-pad {SIZE}: must be below the image size {SIZE}'):
        loaders(parse(noise, '--train-pad', SIZE))


def test_a_run_that_stops_and_resumes_ends_as_one_that_does_not(noise, tmp_path):
    def run(folder, *argv):
        main(
            '--data-dir', noise, '--num-classes', '2', '--model', 'test_resnet', '--img-size', '32', '-b', '8',
            '--workers', '0', '--device', 'cpu', '--train-pad', '4', '--color-jitter', '0', '--data-on-device',
            '--lr', '0.05', '--warmup-epochs', '0', '--sched', 'constant', '--dks', '--dks-branches', 'conv',
            '--output', tmp_path, '--experiment', folder, *argv)
        return rows(tmp_path / folder)

    whole = run('whole', '--epochs', '3')
    run('parts', '--epochs', '1')
    assert run('parts', '--epochs', '3', '--resume', 'auto') == whole
    assert len({row['train_loss'] for row in whole}) == 3
