"""Datasets and loaders: the built-in digits, and what is refused before training."""
import logging

import numpy as np
import pytest
import torch
from helpers.datasets import create_loaders
from PIL import Image

from dks_timm import errors
from dks_timm.training import config, data

DATA_CONFIG = dict(
    input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0, crop_mode='center')


def parse(*argv):
    return config.parse_args(['--num-classes', '10', '--workers', '0', *map(str, argv)])[0]


def folder(root, **splits):
    """Make an image folder; splits map a name to (classes, images a class)."""
    for split, (classes, count) in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (20, 16), (i, 0, 0)).save(root / split / name / f'{i}.png')
    return root


def refusal(*argv):
    with pytest.raises(errors.OptionError) as e:
        data.create_datasets(parse(*argv))
    return str(e.value)


def test_digits_are_1797_images_in_two_splits_that_share_none():
    train, val = data.create_datasets(parse('--dataset', 'digits'))
    images = [np.asarray(dataset[i][0].convert('L')).tobytes() for dataset in (train, val) for i in range(len(dataset))]
    assert (len(train), len(val), len(images)) == (1442, 355, 1797)
    for dataset in (train, val):
        counts = np.bincount([label for _, label in (dataset[i] for i in range(len(dataset)))], minlength=10)
        assert counts.min() > 0.9 * counts.max()
    from sklearn.datasets import load_digits
    original = sorted((d / 16 * 255).round().astype('uint8').tobytes() for d in load_digits().images)
    assert sorted(images) == original


@pytest.mark.parametrize('argv, channels', [([], 3), (['--in-chans', '1'], 1)])
def test_digits_come_as_batches_of_the_size_and_channels_asked_for(argv, channels):
    config = {**DATA_CONFIG, 'input_size': (channels, 16, 16), 'mean': (0.5,) * channels, 'std': (0.5,) * channels}
    train, val, mixup_fn, batch_size = create_loaders(parse('--dataset', 'digits', '-b', 32, *argv), config)
    x, y = next(iter(train))
    assert x.shape == (32, channels, 16, 16) and y.shape == (32,) and y.dtype == torch.int64
    assert len(train) == 1442 // 32 and len(val) == -(-355 // 32)
    assert mixup_fn is None and batch_size == 32


def test_the_positional_folder_is_the_data_dir(tmp_path):
    train, val = data.create_datasets(parse(folder(tmp_path, train=('ab', 2), val=('ab', 1))))
    assert (len(train), len(val)) == (4, 2)


def test_without_a_validation_split_the_folder_itself_may_be_the_training_data(tmp_path):
    train, val = data.create_datasets(parse('--data-dir', folder(tmp_path, **{'.': ('ab', 3)}), '--val-split', ''))
    assert len(train) == 6 and val is None


@pytest.mark.parametrize('argv, words', [
    ([], ['--data-dir', '--dataset']),
    (['--data-dir', '{root}/empty'], ['--train-split train', 'it has nothing']),
    (['--data-dir', '{root}', '--class-map', 'nowhere.txt'], ['--class-map nowhere.txt', '.txt', '.pkl']),
    (['--dataset', 'digits', '--val-split', 'test'], ['--dataset digits', '"test"', 'validation']),
    (['--dataset', 'digits', '--num-classes', '9'], ['--num-classes 9', '10 classes']),
    (['--dataset', 'torch/no_such'], ['--dataset torch/no_such']),
    (['--dataset', 'torch/cifar10', '--data-dir', '{root}'], ['--dataset torch/cifar10', 'not found']),
])
def test_data_that_is_not_there_is_refused_by_name(tmp_path, argv, words):
    root = folder(tmp_path, train=('ab', 2), validation=('ab', 1))
    (root / 'empty').mkdir()
    message = refusal(*(a.format(root=root) for a in argv))
    assert all(word in message for word in words), message


def test_more_classes_than_the_data_has_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        data.create_datasets(parse('--dataset', 'digits', '--num-classes', '12'))
    assert '12 classes' in caplog.text and '10' in caplog.text


def test_repeated_augmentation_in_one_process_is_refused():
    with pytest.raises(errors.OptionError, match='--aug-repeats 3'):
        create_loaders(parse('--dataset', 'digits', '--aug-repeats', 3))


def test_the_configuration_stays_as_it_was(tmp_path):
    args = parse('--data-dir', folder(tmp_path, train=('ab', 4), validation=('ab', 1)), '--mixup', '0.2', '-b', 4)
    before = dict(vars(args))
    create_loaders(args)
    assert vars(args) == before


def test_mixup_makes_soft_targets():
    train, *_ = create_loaders(parse('--dataset', 'digits', '--mixup', '0.2', '-b', 8))
    _, y = next(iter(train))
    assert y.shape == (8, 10) and torch.allclose(y.sum(1), torch.ones(8))


def test_label_names_are_in_the_order_of_the_outputs(tmp_path):
    train, _ = data.create_datasets(parse('--data-dir', folder(tmp_path, train=(['10', '9'], 1)), '--val-split', ''))
    assert data.label_names(train) == ['9', '10']
