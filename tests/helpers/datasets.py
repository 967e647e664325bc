"""Small datasets for each of timm's readers."""
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dks_timm.training import config, data

CLASSES = 'abc'
COUNTS = dict(train=12, validation=6)
DATA_CONFIG = dict(
    input_size=(3, 8, 8), mean=(0.,) * 3, std=(1 / 255,) * 3, interpolation='bilinear', crop_pct=1.0,
    crop_mode='center')


def encoded(number, size=8, format='png'):
    """A gray image, by whose pixels it is known again."""
    file = io.BytesIO()
    Image.new('RGB', (size, size), (number,) * 3).save(file, format)
    return file.getvalue()


def make_folder(root):
    """Class folders: image number i is of class i % 3."""
    for split, count in COUNTS.items():
        for i in range(count):
            path = root / split / CLASSES[i % 3] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(i))
    return root


def make_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_tars(root):
    """A tar for each split, as timm's tar reader takes them."""
    for split, count in COUNTS.items():
        make_tar(root / f'{split}.tar', [(f'{CLASSES[i % 3]}/{i}.png', encoded(i)) for i in range(count)])
    return root


def make_mnist(root):
    """MNIST's files, which torchvision reads, with images of our own."""
    for split, count in dict(train=12, t10k=6).items():
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        for kind, array in dict(images=images, labels=np.arange(count, dtype=np.uint8) % 3).items():
            path = root / f'MNIST/raw/{split}-{kind}-idx{array.ndim}-ubyte'
            path.parent.mkdir(parents=True, exist_ok=True)
            magic = bytes([0, 0, 8, array.ndim])
            path.write_bytes(magic + np.array(array.shape, dtype='>i4').tobytes() + array.tobytes())
    return root


def make_shards(root, split='train', sizes=(6, 6), key='png', **fields):
    """Tars of images, labels and metadata, as webdataset reads them."""
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        files = []
        for i in (next(numbers) for _ in range(size)):
            meta = json.dumps(dict(kind=i % 3, x='y')).encode()
            sample = {key: encoded(i), 'cls': str(i % 3).encode(), 'json': meta, **fields}
            files += [(f'{i:04d}.{name}', content) for name, content in sample.items() if content is not None]
        make_tar(root / f'{split}-{shard}.tar', files)
    return root


def make_parquet(root, split='train', sizes=(6, 6), names=tuple(CLASSES), label=lambda i: i % 3, image=encoded):
    """Files of a Hugging Face dataset."""
    datasets = pytest.importorskip('datasets', reason='hfds/ and hfids/ need the package datasets')
    target = datasets.ClassLabel(names=list(names)) if names else datasets.Value(
        'string' if isinstance(label(0), str) else 'int64')
    features = datasets.Features(image=datasets.Image(), label=target, other=datasets.Value('int64'))
    numbers = iter(range(sum(sizes)))
    (root / 'data').mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        samples = [
            dict(image=dict(bytes=image(i), path=f'{i}.png'), label=label(i), other=i)
            for i in (next(numbers) for _ in range(size))
        ]
        datasets.Dataset.from_list(samples, features=features).to_parquet(
            root / f'data/{split}-{shard:05d}-of-{len(sizes):05d}.parquet')
    return root


def make_huggingface(root):
    make_parquet(root)
    return make_parquet(root, 'validation', sizes=(6,))


def make_web(root):
    pytest.importorskip('webdataset', reason='wds/ needs the package webdataset')
    make_shards(root)
    return make_shards(root, 'validation', sizes=(6,))


WEB = [
    '--dataset', 'wds/x', '--data-dir', '{root}', '--train-split', 'train-{{0..1}}.tar|12',
    '--val-split', 'validation-0.tar',
]
READERS = {
    'folder': (make_folder, ['--data-dir', '{root}'], list(CLASSES)),
    'tars': (make_tars, ['--data-dir', '{root}'], list(CLASSES)),
    'single tar': (make_tars, ['--data-dir', '{root}/train.tar'], list(CLASSES)),
    'torch/image_folder': (
        make_folder, ['--dataset', 'torch/image_folder', '--data-dir', '{root}'], list(CLASSES)),
    'torch/mnist': (
        make_mnist, ['--dataset', 'torch/mnist', '--data-dir', '{root}', '--num-classes', '10'],
        ['0 - zero', '1 - one', '2 - two', '3 - three', '4 - four', '5 - five', '6 - six', '7 - seven', '8 - eight',
         '9 - nine']),
    'hfds': (make_huggingface, ['--dataset', 'hfds/{root}', '--data-dir', '{root}-cache'], list(CLASSES)),
    'hfids': (
        make_huggingface, ['--dataset', 'hfids/{root}', '--data-dir', '{root}-cache', '--train-num-samples', '12',
                           '--val-num-samples', '6'], list(CLASSES)),
    'hfids downloaded': (
        make_huggingface, ['--dataset', 'hfids/{root}', '--data-dir', '{root}-cache', '--dataset-download'],
        list(CLASSES)),
    'wds': (make_web, WEB, None),
}


def make(name, root):
    """Make a reader's data; returns its flags."""
    maker, argv, _ = READERS[name]
    if name.startswith(('hfds', 'hfids')):
        pytest.importorskip('datasets', reason='hfds/ and hfids/ need the package datasets')
    maker(root)
    return [a.format(root=root) for a in argv]


def parse(*argv):
    return config.parse_args(['--num-classes', '3', '--workers', '0', '-b', '4', *map(str, argv)])[0]


def create_loaders(args, data_config=DATA_CONFIG, device='cpu', rank=0, world_size=1):
    """Return the loaders of one of several processes."""
    accelerator = SimpleNamespace(device=torch.device(device), process_index=rank, num_processes=world_size)
    model = SimpleNamespace(num_classes=args.num_classes)
    return data.create_loaders(args, *data.create_datasets(args), data_config, model, accelerator)


def loaders(*argv, **kwargs):
    return create_loaders(parse(*argv), **kwargs)[:2]


def numbers(loader):
    """The images of an epoch, by number, and their labels."""
    return [(int(v), int(label)) for x, y in loader for v, label in zip(x[:, 0, 0, 0].round(), y, strict=True)]
