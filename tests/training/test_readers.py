"""timm's data readers: each one trains, images that cannot be read are passed over, streams are split without loss."""
import collections
import importlib.util
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from helpers.datasets import (
    CLASSES,
    COUNTS,
    DATA_CONFIG,
    READERS,
    WEB,
    encoded,
    loaders,
    make,
    make_folder,
    make_huggingface,
    make_parquet,
    make_shards,
    make_tar,
    make_web,
    numbers,
    parse,
)
from helpers.train import ROOT, main, rows, two_processes

from dks_timm import errors
from dks_timm.training import data


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """datasets sleeps for five seconds at the end of a stream."""
    if importlib.util.find_spec('datasets'):
        monkeypatch.setattr('datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.05)


def refusal(*argv):
    with pytest.raises(errors.OptionError) as e:
        loaders(*argv)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('name', READERS)
def test_every_reader_trains_and_evaluates(tmp_path, name):
    argv = make(name, tmp_path / 'data')
    main('--num-classes', '3', *argv, '--img-size', '32', '--device', 'cpu', '--workers', '0', '-b', '4',
         '--model', 'test_resnet', '--epochs', '1', '--warmup-epochs', '0', '--output', tmp_path, '--experiment', 'x')
    row, = rows(tmp_path / 'x')
    assert np.isfinite([float(v) for v in row.values()]).all()


@pytest.mark.parametrize('name', READERS)
def test_every_image_comes_once_with_its_label_and_names_for_the_labels(tmp_path, name):
    argv = make(name, tmp_path / 'data')
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train, val = data.create_datasets(parse(*argv))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert data.label_names(train) == READERS[name][2]
    train, val = loaders(*argv, '--no-aug')
    assert sorted(numbers(train)) == [(i, i % 3) for i in range(12)]
    assert sorted(numbers(val)) == [(i, i % 3) for i in range(12 if name == 'single tar' else 6)]


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('name', ['folder', 'tars', 'torch/image_folder', 'hfds', 'hfids', 'wds'])
def test_readable_images_come_out_as_timms_own_with_the_same_random_numbers(tmp_path, name, workers):
    argv = [*make(name, tmp_path), '--workers', workers, '--aa', 'rand-m9', '--reprob', '0.5']
    args = parse(*argv)
    root = args.data_dir if name != 'tars' else f'{args.data_dir}/train.tar'

    def timms():
        dataset = timm.data.create_dataset(
            args.dataset, root, args.train_split, is_training=True, batch_size=4, seed=42,
            num_samples=args.train_num_samples)
        return timm.data.create_loader(
            dataset, (3, 8, 8), 4, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
            re_prob=0.5, re_mode='pixel', interpolation='random', mean=DATA_CONFIG['mean'], std=DATA_CONFIG['std'],
            num_workers=workers, device=torch.device('cpu'))

    def batches(loader):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return [b for _ in range(2) for b in loader]

    ours, wanted = batches(loaders(*argv)[0]), batches(timms())
    assert len(ours) == len(wanted) == 6
    for (x, y), (x_timm, y_timm) in zip(ours, wanted, strict=True):
        assert torch.equal(x, x_timm) and torch.equal(y, y_timm)


def test_tensorflow_datasets_train_and_evaluate(tmp_path):
    tfds = pytest.importorskip('tensorflow_datasets', reason='tfds/ needs the package tensorflow_datasets')

    class Gray(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = dict(
                image=tfds.features.Image(shape=(None, None, 3)), label=tfds.features.ClassLabel(names=list(CLASSES)))
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(count) for split, count in COUNTS.items()}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, dict(image=np.full((8, 8, 3), i, dtype=np.uint8), label=i % 3)

    Gray(data_dir=tmp_path).download_and_prepare()
    train, val = loaders('--dataset', 'tfds/gray', '--data-dir', tmp_path, '--no-aug')
    assert data.label_names(train.dataset) == list(CLASSES)
    assert len(numbers(train)) == 12 and sorted(numbers(val)) == [(i, i % 3) for i in range(6)]


# Bad images

TRUNCATED = encoded(7, 32)[:-40]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_is_named_and_the_next_one_takes_its_place(tmp_path, capfd, workers):
    root = make_folder(tmp_path)
    for split in ('train', 'validation'):
        (root / split / 'b/1.png').write_bytes(TRUNCATED)
    logging.basicConfig(force=True)
    train, val = loaders('--data-dir', root, '--no-aug', '--workers', workers)
    seen = [[number for number, _ in numbers(loader)] for loader in (train, train, val)]
    logging.basicConfig(force=True, handlers=[])
    # The next one in order of the files: a/0 a/3 ... b/1 b/4 b/7 b/10 c/2 ...
    for numbers_seen, count in zip(seen, (12, 12, 6), strict=True):
        assert collections.Counter(numbers_seen) == collections.Counter([*(set(range(count)) - {1}), 4])
    bad = [line for line in capfd.readouterr().err.splitlines() if 'Bad image' in line]
    assert len(bad) == 2  # once each, whatever the epoch
    assert f'{root}/train/b/1.png' in bad[0] and f'{root}/validation/b/1.png' in bad[1]


def test_a_bad_image_of_a_tar_a_torch_folder_and_hugging_face_is_named(tmp_path, caplog):
    tar = tmp_path / 'train.tar'
    make_tar(tar, [('a/0.png', encoded(0)), ('a/1.png', b''), ('b/2.png', TRUNCATED), ('b/3.png', encoded(3))])
    assert [n for n, _ in numbers(loaders('--data-dir', tar, '--val-split', '', '-b', 1, '--no-aug')[0])]
    root = make_folder(tmp_path / 'folder')
    (root / 'train/c/5.png').write_bytes(TRUNCATED)
    numbers(loaders('--dataset', 'torch/image_folder', '--data-dir', root, '--val-split', '')[0])
    make_parquet(tmp_path / 'hf', image=lambda i: TRUNCATED if i == 5 else encoded(i))
    numbers(loaders('--dataset', f'hfds/{tmp_path}/hf', '--data-dir', tmp_path / 'cache', '--val-split', '')[0])
    for name in ('a/1.png', 'b/2.png', f'{root}/train/c/5.png', '5.png'):
        assert f'Bad image {name}: ' in caplog.text


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_of_a_stream_is_named_and_passed_over(tmp_path, capfd, workers):
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    root = make_shards(tmp_path / 'web', sizes=(4,))
    make_tar(root / 'train-1.tar', [
        ('bad.png', TRUNCATED), ('bad.cls', b'0'), ('none.cls', b'1'), ('good.png', encoded(9)), ('good.cls', b'0')])
    make_parquet(tmp_path / 'hf', sizes=(6,), image=lambda i: TRUNCATED if i == 1 else encoded(i))
    flags = ['--workers', workers, '-b', 2, '--no-aug']
    web = ['--dataset', 'wds/x', '--data-dir', root, '--train-split', 'train-{0..1}.tar|4', '--val-split',
           'train-{0..1}.tar', '--max-bad-images', 2]
    hf = ['--dataset', f'hfids/{tmp_path}/hf', '--train-num-samples', 6, '--val-num-samples', 6, '--val-split', 'train']
    logging.basicConfig(force=True)
    train, val = loaders(*web, *flags)
    assert len(numbers(train)) == 4
    assert sorted(n for n, _ in numbers(val)) == [0, 1, 2, 3, 9]
    train, val = loaders(*hf, *flags)
    assert len(numbers(train)) == 6 and {n for n, _ in numbers(train)} <= {0, 2, 3, 4, 5}
    assert sorted(n for n, _ in numbers(val)) == [0, 2, 3, 4, 5]
    logging.basicConfig(force=True, handlers=[])
    out = capfd.readouterr().err
    for name in (f'bad of {root}/train-1.tar', f'none of {root}/train-1.tar', '1.png'):
        assert f'Bad image {name}: ' in out


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('reader', ['folder', 'wds', 'hfids'])
def test_more_bad_images_in_a_row_than_allowed_are_an_error_that_names_the_last(tmp_path, reader, workers):
    if reader == 'folder':
        root = make_folder(tmp_path)
        for path in (root / 'train').rglob('*.png'):
            path.write_bytes(TRUNCATED)
        argv = ['--data-dir', root]
    elif reader == 'wds':
        pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
        argv = [a.format(root=make_shards(tmp_path, png=TRUNCATED)) for a in WEB[:-2]] + ['--val-split', '']
    else:
        make_parquet(tmp_path, sizes=(12,), image=lambda i: TRUNCATED)
        argv = ['--dataset', f'hfids/{tmp_path}', '--train-num-samples', '12', '--val-split', '']
    with pytest.raises(errors.DataError, match='^--max-bad-images 3: 4 images in a row .* the last is .*(png|train-)'):
        numbers(loaders(*argv, '--workers', workers, '--max-bad-images', 3)[0])


def test_as_many_bad_images_in_a_row_as_allowed_do_not_end_the_run(tmp_path):
    root = make_folder(tmp_path)
    for path in [*(root / 'train/b').iterdir()][:3]:
        path.write_bytes(b'')
    assert len(numbers(loaders('--data-dir', root, '--max-bad-images', 3)[0])) == 12


def test_the_number_of_bad_images_allowed_is_timms(monkeypatch):
    assert parse('--dataset', 'digits').max_bad_images == timm.data.dataset._ERROR_RETRY == 10
    monkeypatch.setenv('TIMM_DATASET_MAX_RETRIES', '4')
    assert parse('--dataset', 'digits').max_bad_images == 4


# Streams in several processes

SPLIT = '''
import json, sys
import datasets.config, torch
sys.path.insert(0, {tests!r})
from helpers.datasets import loaders, numbers

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05
torch.distributed.init_process_group('gloo')
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
seen = []
for argv in json.load(open(sys.argv[1])):
    train, val = loaders(*argv, rank=rank, world_size=world)
    epochs = []
    for epoch in range(2):
        train.dataset.set_epoch(epoch)
        epochs.append([n for n, _ in numbers(train)])
    seen.append(dict(train=epochs, val=[n for n, _ in numbers(val)], batches=len(train)))
with open(sys.argv[1] + str(rank), 'w') as f:
    json.dump(seen, f)
'''


def web(shards, count):
    names = f'train-{{{{0..{shards - 1}}}}}.tar|{count}'
    return [
        '--dataset', 'wds/x', '--data-dir', f'{{root}}/web{shards}', '--train-split', names, '--val-split', names,
        '--workers', '2']


def hugging_face(shards, count, workers):
    return [
        '--dataset', f'hfids/{{root}}/hf{shards}', '--data-dir', '{root}-cache', '--val-split', 'train',
        '--train-num-samples', str(count), '--val-num-samples', str(count), '--workers', workers]


# Flags, images in the data, and whether each is seen exactly once in an epoch: where whole batches divide them.
SPLITS = {
    'wds, 4 shards': (web(4, 32), 32, True),
    'wds, 1 shard': (web(1, 32), 32, True),
    'wds, 3 shards': (web(3, 21), 21, False),
    'hfids, 4 shards': (hugging_face(4, 32, '2'), 32, True),
    'hfids, 1 shard': (hugging_face(1, 32, '0'), 32, True),
    'hfids, 3 shards': (hugging_face(3, 21, '2'), 21, False),
}


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    """For each of SPLITS, what two processes read of it: {name: [process 0, process 1]}."""
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    root = tmp_path_factory.mktemp('split')
    for sizes in ((8,) * 4, (9, 5, 7), (32,)):
        make_shards(root / f'web{len(sizes)}', sizes=sizes)
        make_parquet(root / f'hf{len(sizes)}', sizes=sizes)
    argvs = [[a.format(root=root) for a in argv] + ['--no-aug'] for argv, _, _ in SPLITS.values()]
    (root / 'argvs').write_text(json.dumps(argvs))
    (root / 'split.py').write_text(SPLIT.format(tests=str(Path(__file__).parents[1])))
    out = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', root / 'split.py',
         root / 'argvs'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    seen = [json.loads((root / f'argvs{rank}').read_text()) for rank in range(2)]
    return dict(zip(SPLITS, zip(*seen, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('name', SPLITS)
def test_evaluation_of_a_stream_in_two_processes_counts_every_image_once(split, name):
    assert sorted(split[name][0]['val'] + split[name][1]['val']) == list(range(SPLITS[name][1]))


@pytest.mark.parametrize('name', SPLITS)
def test_two_processes_share_no_image_of_a_stream_and_run_equally_many_batches(split, name):
    _, count, exact = SPLITS[name]
    for a, b in zip(*(process['train'] for process in split[name]), strict=True):
        assert not set(a) & set(b)
        assert len(a) == len(b) == 4 * split[name][0]['batches'] == 4 * split[name][1]['batches']
        if exact:
            assert sorted(a + b) == list(range(count))
    for process in split[name]:
        assert process['train'][0] != process['train'][1]  # the next epoch is in another order


@pytest.mark.slow
def test_a_run_on_a_shard_in_two_processes_evaluates_as_one_process_does(tmp_path):
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    make_shards(tmp_path / 'data', sizes=(21,))  # in evaluation all for one process, in training half for each
    argv = [
        '--dataset', 'wds/x', '--data-dir', tmp_path / 'data', '--train-split', 'train-0.tar|21', '--val-split',
        'train-0.tar', '--num-classes', '3', '--img-size', '32', '--device', 'cpu', '--workers', '1', '-b', '4',
        '--model', 'test_convnext', '--epochs', '1', '--warmup-epochs', '0', '--lr', '1e-9', '--output', tmp_path,
    ]
    main(*argv, '--experiment', 'one')
    two_processes(*argv, '--experiment', 'two')
    one, two = rows(tmp_path / 'one')[0], rows(tmp_path / 'two')[0]
    for name in ('eval_loss', 'eval_top1'):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-5)


# Class maps, fields and labels


def write_map(path, content):
    path.write_bytes(pickle.dumps(content) if path.suffix == '.pkl' else content.encode())
    return path


@pytest.mark.parametrize('name', ['folder', 'tars', 'hfds', 'hfids'])
def test_a_class_map_decides_the_labels_and_names_the_outputs(tmp_path, name):
    argv = [*make(name, tmp_path), '--class-map', write_map(tmp_path / 'map.txt', 'c\nd\nb\na\n\n'), '--num-classes', 4]
    train, _ = loaders(*argv, '--no-aug')
    assert sorted(numbers(train)) == sorted((i, [3, 2, 0][i % 3]) for i in range(12))
    assert data.label_names(train.dataset) == ['c', 'd', 'b', 'a']


def test_a_class_map_of_labels_reads_shards(tmp_path):
    argv = [*make('wds', tmp_path), '--class-map', write_map(tmp_path / 'map.pkl', {0: 2, 1: 1, 2: 0})]
    assert sorted(numbers(loaders(*argv, '--no-aug')[0])) == [(i, 2 - i % 3) for i in range(12)]


def test_a_class_map_may_lie_with_the_images(tmp_path):
    root = make_folder(tmp_path)
    for split in COUNTS:
        write_map(root / split / 'map.txt', 'c\nb\na\n')
    assert data.label_names(loaders('--data-dir', root, '--class-map', 'map.txt')[0].dataset) == ['c', 'b', 'a']


def test_input_and_target_keys_name_the_fields(tmp_path):
    make_parquet(tmp_path / 'hf')
    flags = ['--data-dir', tmp_path / 'cache', '--val-split', '', '--no-aug', '--num-classes', 12]
    flags += ['--target-key', 'other']
    for reader in ('hfds', 'hfids'):
        train, _ = loaders('--dataset', f'{reader}/{tmp_path}/hf', *flags, '--train-num-samples', 12)
        assert sorted(numbers(train)) == [(i, i) for i in range(12)]
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    make_shards(tmp_path, key='bmp', png=encoded(99), cls=None)
    argv = [a.format(root=tmp_path) for a in WEB[:-2]] + ['--val-split', '', '--no-aug', '--target-key', 'kind']
    assert sorted(numbers(loaders(*argv, '--input-key', 'bmp')[0])) == [(i, i % 3) for i in range(12)]
    root = make_folder(tmp_path / 'folder')
    (root / 'train/a/0.png').rename(root / 'train/a/0.bmp')
    assert len(loaders('--data-dir', root, '--input-key', '.png')[0].dataset) == 11


def test_text_labels_need_a_class_map(tmp_path):
    make_parquet(tmp_path, names=(), label=lambda i: CLASSES[i % 3])
    argv = ['--data-dir', tmp_path / 'cache', '--val-split', '', '--train-num-samples', 12]
    for reader in ('hfds', 'hfids'):
        data_flags = ['--dataset', f'{reader}/{tmp_path}', *argv]
        with pytest.raises(errors.DataError, match="--num-classes 3: the data holds label '[abc]'.* --class-map"):
            numbers(loaders(*data_flags)[0])
        train, _ = loaders(*data_flags, '--class-map', write_map(tmp_path / 'map.txt', 'a\nb\nc'), '--no-aug')
        assert sorted(numbers(train)) == [(i, i % 3) for i in range(12)]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_label_out_of_range_in_a_stream_is_named(tmp_path, workers):
    argv = [*make('wds', tmp_path), '--workers', workers]
    with pytest.raises(errors.DataError, match='^--num-classes 2: the data holds label 2; wanted: 0 to 1, or a'):
        numbers(loaders(*argv, '--num-classes', 2)[0])


@pytest.mark.parametrize('name', ['hfds', 'hfids', 'wds'])
def test_a_class_that_the_class_map_misses_is_named(tmp_path, name):
    class_map = write_map(tmp_path / 'map.pkl', {0: 0, 1: 1} if name == 'wds' else {'a': 0, 'b': 1})
    with pytest.raises(errors.DataError, match='^--class-map .*map.pkl: has no index for (2|.c.), a class of the data'):
        numbers(loaders(*make(name, tmp_path), '--class-map', class_map)[0])


@pytest.mark.parametrize('argv, reason', [
    (['--input-key', 'bmp'], "didn't find .'bmp'. in .*'png'"),
    (['--target-key', 'fine'], "'fine'. not found in the json .* available keys: .'kind', 'x'."),
])
def test_shards_without_the_fields_named_hold_no_readable_images(tmp_path, argv, reason):
    with pytest.raises(errors.DataError, match=f'--max-bad-images 10: 11 images in a row .*{reason}'):
        numbers(loaders(*make('wds', tmp_path), *argv)[0])


@pytest.mark.slow
def test_more_workers_than_shards_of_hugging_face_are_refused(tmp_path):
    with pytest.raises(errors.DataError, match='^--workers: .* 2 shard.* Reduce the number of loader workers'):
        numbers(loaders(*make('hfids', tmp_path), '--workers', 3)[0])


FOLDER = ['--data-dir', '{tmp}/folder']
HFDS = ['--dataset', 'hfds/{tmp}/hf', '--data-dir', '{tmp}/cache']
HFIDS = ['--dataset', 'hfids/{tmp}/hf', '--train-num-samples', '12', '--val-num-samples', '6']
WDS = [a.replace('{root}', '{tmp}/web') for a in WEB]
REFUSED = [
    (['--dataset', 'hdfs/x'], ['--dataset hdfs/x', 'no reader "hdfs/"', 'closest: hfds/']),
    (['--dataset', 'wds/x', '--data-dir', '{tmp}/web'], ['--train-split train', 'train-{000..099}.tar|50000']),
    ([*HFDS, '--val-split', 'test'], ['--val-split test', 'train', 'validation']),
    ([*HFIDS, '--val-split', 'test'], ['--val-split test', 'train', 'validation']),
    ([*WDS, '--val-split', 'test-{{0..1}}.tar'], ['--val-split test-{0..1}.tar', 'test-0.tar is not']),
    ([*WDS, '--train-split', 'train-{{0..5}}.tar'], ['train-{0..5}.tar', 'give --train-num-samples']),
    (HFIDS[:2], ['give --train-num-samples']),
    ([*HFDS, '--input-key', 'img'], ['--input-key img', 'it has image, label, other']),
    ([*HFIDS, '--input-key', 'img'], ['--input-key img', 'it has image, label, other']),
    ([*HFDS, '--target-key', 'fine'], ['--target-key fine', 'it has image, label, other']),
    ([*FOLDER, '--target-key', 'x'], ['--target-key x', 'means nothing to --data-dir']),
    (['--dataset', 'torch/image_folder', *FOLDER, '--class-map', 'x'], ['--class-map x', 'torch/image_folder']),
    ([*FOLDER, '--class-map', '{tmp}/other.txt'], ['--class-map', 'no index for \'a\'']),
    ([*WDS, '--aug-splits', '3'], ['--aug-splits', 'wds/x', 'stream']),
]


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
    """Data of every reader, and a class map of other classes."""
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    root = tmp_path_factory.mktemp('everything')
    make_folder(root / 'folder')
    make_huggingface(root / 'hf')
    make_web(root / 'web')
    write_map(root / 'other.txt', 'x\ny\n')
    return root


@pytest.mark.parametrize('argv, words', REFUSED, ids=[' '.join(argv) for argv, _ in REFUSED])
def test_what_a_reader_cannot_do_is_refused_by_name(everything, argv, words):
    message = refusal(*(a.format(tmp=everything) for a in argv))
    assert message.startswith('--') and all(word in message for word in words), message


@pytest.mark.parametrize('dataset, package', [('hfds/x', 'datasets'), ('hfids/x', 'datasets'), ('wds/x', 'webdataset')])
def test_a_reader_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch, dataset, package):
    for name in [name for name in sys.modules if re.match(f'(timm.data.readers.reader_.*ds|{package})(\\.|$)', name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal('--dataset', dataset, '--data-dir', tmp_path)
    assert f'--dataset {dataset}' in message and package in message and 'pip install' in message
