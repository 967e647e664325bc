"""Bad inputs, written by hand, and what each gets.

test_bad_inputs.py and test_hostile.py hold the product to this list, benchmarks/bad_inputs.py shows what it did.
"""
import argparse
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

# Exit codes of train.py and dks-timm.
RAN, ENDED, REFUSED = 0, 1, 2

# In front of a case's flags for train.py; {root} is the case's own folder, which holds four images of each of two
# classes in data/train, two of each in data/validation.
COMMON = [
    '--data-dir', '{root}/data', '--num-classes', '2', '--model', 'test_resnet', '--img-size', '32', '--device', 'cpu',
    '--workers', '0', '-b', '4', '--epochs', '1', '--warmup-epochs', '0', '--output', '{root}/out', '--experiment', 'x',
]


class Case(NamedTuple):
    """A bad input.

    Attributes:
        name: What is bad.
        argv: Flags of train.py after COMMON, with {root}; for ``dks-timm``, with that in front.
        make: Brings the input about in the folder.
        code: Exit code.
        words: What the last line has to say; where the run trains, what its warnings do.
    """
    name: str
    argv: Sequence[str] = ()
    make: Callable[[Path], None] = lambda root: None
    code: int = REFUSED
    words: Union[str, Tuple[str, ...]] = ()

    def command(self, root) -> list:
        common = [] if self.argv[:1] == ['dks-timm'] else COMMON
        return [word.replace('{root}', str(root)) for word in [*common, *self.argv]]

    def expected(self, root) -> list:
        words = [self.words] if isinstance(self.words, str) else self.words
        return [word.replace('{root}', str(root)) for word in words]


def picture(size=(24, 20), mode='RGB', seed=0):
    """An image of noise."""
    width, height = size
    noise = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image, format='png', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_data(root: Path, classes=('a', 'b'), counts=(('train', 4), ('validation', 2))) -> Path:
    """Image folders: root/data/SPLIT/CLASS/NUMBER.png."""
    for split, count in counts:
        for label, name in enumerate(classes):
            folder = root / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f'{i}.png').write_bytes(encoded(picture(seed=10 * label + i)))
    return root


def write(path: str, content: Union[bytes, str] = b'') -> Callable[[Path], None]:
    """Return a function that writes a file below a case's folder."""
    def make(root):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode('utf-8', 'surrogatepass') if isinstance(content, str) else content)
    return make


def each(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(root):
        for maker in makers:
            maker(root)
    return make


# One image of each split is another file.

BAD = ('Bad image {root}/data/train/a/1.png', 'Bad image {root}/data/validation/a/1.png')


def image_case(name, content, code=RAN, words=BAD) -> Case:
    make = each(write('data/train/a/1.png', content), write('data/validation/a/1.png', content))
    return Case(f'image: {name}', (), make, code, words)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is of some size, and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def frames(format, **options):
    return encoded(picture(), format, save_all=True, append_images=[picture(seed=1)], **options)


PNG, JPEG = encoded(picture()), encoded(picture((64, 64)), 'jpeg')
GRAY16 = Image.fromarray((np.arange(480, dtype=np.uint16) * 136).reshape(20, 24))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # on its side

IMAGES = [
    image_case('of no bytes', b''),
    image_case('PNG cut off', PNG[:len(PNG) // 2]),
    image_case('PNG without its checksums, all pixels there', PNG[:-20], words=()),
    image_case('PNG with a byte flipped', PNG[:200] + bytes([PNG[200] ^ 255]) + PNG[201:]),
    image_case('JPEG cut off', JPEG[:700]),
    image_case('JPEG of nothing but a header', JPEG[:2]),
    image_case('text', 'hello'),
    image_case('page of an error', '<!DOCTYPE html><html><h1>404 Not Found</h1></html>'),
    image_case('SVG', '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    image_case('pickle', pickle.dumps([1])),
    image_case('random bytes', random.Random(0).randbytes(500)),
    image_case('zeros', bytes(500)),
    image_case('pointer of Git LFS', 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'),
    image_case('TIFF cut off', encoded(picture(), 'tiff')[:300]),
    image_case('DDS of an unknown kind', encoded(picture(), 'dds').replace(b'\x40\0\0\0', b'\0\0\0\x40')),
    image_case('bomb that says 60,000 x 60,000', png_header(60_000, 60_000), words=(*BAD, 'decompression bomb')),
    image_case('bomb that says 2^31 - 1 x 1', png_header(2 ** 31 - 1, 1)),
    image_case('gray of 16 bits', encoded(GRAY16), words=()),
    image_case('CMYK', encoded(picture(mode='CMYK'), 'jpeg'), words=()),
    image_case('YCbCr', encoded(picture(mode='YCbCr'), 'jpeg'), words=()),
    image_case('palette', encoded(picture(mode='P')), words=()),
    image_case('palette with transparency', encoded(picture(mode='P'), transparency=bytes(range(256))), words=()),
    image_case('RGB with alpha', encoded(picture(mode='RGBA')), words=()),
    image_case('gray with alpha', encoded(picture(mode='LA')), words=()),
    image_case('gray', encoded(picture(mode='L')), words=()),
    image_case('1 bit', encoded(picture(mode='1')), words=()),
    image_case('1 x 1 pixel', encoded(picture((1, 1))), words=()),
    image_case('animated GIF', frames('gif'), words=()),
    image_case('animated PNG', frames('png'), words=()),
    image_case('animated WebP', frames('webp'), words=()),
    image_case('JPEG on its side', encoded(picture(), 'jpeg', exif=EXIF), words=()),
    image_case('broken colour profile', encoded(picture(), 'jpeg', icc_profile=b'hello'), words=()),
    image_case('JPEG with bytes after its end', JPEG + bytes(99), words=()),
]


# The folder of the images is not as it should be.

def remove(*names) -> Callable[[Path], None]:
    def make(root):
        for name in names:
            for file in sorted((root / 'data').glob(name), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
    return make


def rename(old, new):
    return lambda root: (root / 'data' / old).rename(root / 'data' / new)


def mkdir(name):
    return lambda root: (root / 'data' / name).mkdir(parents=True)


def link(name, target):
    return lambda root: (root / 'data' / name).symlink_to(str(target).replace('{root}', str(root)))


def fill(root):
    for file in (root / 'data/train').rglob('*.png'):
        file.write_bytes(b'')


NAMES = ['a b', ' ', 'a\nb', 'a\tb', "it's", '"', 'ä', '猫', '😀', '²', '$(touch PWNED)', '%s', '{0}', '-b', 'x' * 251,
         'a\udcffb', '\x1b[31m', 'PNG']


def odd_names(root):
    for name in NAMES:
        (root / f'data/train/a/{name}.png').write_bytes(PNG)
    (root / 'data/train/a/1.PNG').write_bytes(PNG)


NINE = ('-b', '9')  # all images in one batch
FOLDERS = [
    Case('folder named as an image', (), mkdir('train/a/folder.jpg'), RAN),
    Case('link to nowhere', NINE, link('train/a/link.png', 'nowhere'), RAN,
         'Bad image {root}/data/train/a/link.png'),
    Case('link to itself', NINE, link('train/a/link.png', 'link.png'), RAN,
         'Bad image {root}/data/train/a/link.png'),
    Case('link to a device', NINE, link('train/a/zero.png', '/dev/zero'), RAN,
         'Bad image {root}/data/train/a/zero.png'),
    Case('odd file names', (), odd_names, RAN),
    Case('bad image with a line break in its name', NINE, write('data/train/a/a\n\x1b[2J b.png'), RAN,
         'Bad image {root}/data/train/a/a\\n\\x1b[2J b.png: '),
    Case('files that are no images', (), each(
        *(write(f'data/train/a/{name}', 'x') for name in ('Thumbs.db', '.DS_Store', 'labels.csv', 'x.jpg.txt', 'jpg'))),
         RAN),
    Case('file beside the classes that is no image', (), write('data/train/README.md', 'x'), RAN),
    Case("another system's shadow of an image", NINE, write('data/train/a/._1.png', b'\0\x05\x16\x07'), RAN,
         'Bad image {root}/data/train/a/._1.png'),
    Case('image beside the class folders', (), write('data/train/stray.png', PNG), REFUSED,
         ('--data-dir {root}/data', 'images outside of class folders')),
    Case('no class folders', (), each(
        rename('train/a/0.png', 'train/0.png'), remove('train/*/*', 'train/a', 'train/b')), REFUSED,
         ('--data-dir {root}/data', 'images outside of class folders')),
    Case('empty class', (), mkdir('train/c'), RAN),
    Case('no image in a class of the training split', (), remove('train/b/*'), REFUSED,
         ('--val-split validation', '(b)')),
    Case('class missing from the validation split', (), remove('validation/b/*'), REFUSED,
         ('--val-split validation', '(b)')),
    Case('class of the validation split alone', (), each(mkdir('validation/c'), write('data/validation/c/0.png', PNG)),
         REFUSED, ('--val-split validation', '(c)')),
    Case('more classes than --num-classes', ('--num-classes', '1'), code=REFUSED,
         words=('--num-classes 1', 'the training data has 2 classes')),
    Case('one class only', ('--num-classes', '1'), remove('*/b/*'), RAN),
    Case('no images', (), remove('train/*/*'), REFUSED, ('--data-dir {root}/data', 'Found 0 images')),
    Case('no images to validate on', (), remove('validation/*/*'), REFUSED, ('--data-dir', 'Found 0 images')),
    Case('no data', ('--data-dir', '{root}/nowhere'), words='--data-dir {root}/nowhere: no such folder'),
    Case('data that is a file', ('--data-dir', '{root}/data/train/a/0.png'), words='no such folder or .tar file'),
    Case('no such split', ('--val-split', 'test'), words=('--val-split test', 'it has train, validation')),
    Case('every image bad', (), fill, ENDED, ('--max-bad-images 10', '11 images in a row', 'repair or remove them')),
    Case('no bad image allowed', ('--max-bad-images', '0'), write('data/train/a/1.png'), ENDED,
         ('--max-bad-images 0', '{root}/data/train/a/1.png', 'allow more')),
    Case('every image bad, on the device', ('--data-on-device', '--no-aug'), fill, REFUSED, '--max-bad-images 10'),
    Case('bad image, on the device', ('--data-on-device', '--no-aug'), write('data/train/a/1.png'), RAN,
         'Bad image {root}/data/train/a/1.png'),
    Case('batch larger than the data', ('-b', '9'), words=('--batch-size 9', 'does not fill one batch')),
    Case('batch larger than the data, on the device', ('-b', '9', '--data-on-device', '--no-aug'),
         words=('--batch-size 9', 'does not fill one batch')),
    Case('one image left for the last batch', ('-b', '3'), remove('train/a/0.png'), RAN),
    Case('one image left for the last batch, on the device', ('-b', '3', '--data-on-device', '--no-aug'),
         remove('train/a/0.png'), RAN),
    Case('one image to evaluate at a time', ('-vb', '1'), code=RAN),
    Case('one image to evaluate on', ('--val-split', 'val'), each(
        remove('validation/*/*', 'validation/*', 'validation'), write('data/val/a/0.png', PNG),
        write('data/val/b/0.png')), RAN, 'Bad image {root}/data/val/b/0.png'),
    Case('batches of one without BatchNorm', ('-b', '1', '--model', 'test_convnext'), code=RAN),
    Case('images smaller than the model takes', ('--model', 'test_vit', '--img-size', '7'),
         words=('--model test_vit', 'input size (3, 7, 7)')),
]


# Readers of other kinds.

def tar(name, *members) -> Callable[[Path], None]:
    """Return a function that writes a tar of (name, bytes), or of whole TarInfos."""
    def make(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / name, 'w') as file:
            for member, content in members:
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return make


def special(name, kind, target='') -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def shard(name, *samples, key='png') -> Callable[[Path], None]:
    """Return a function that writes a shard of webdataset, of dicts of fields or labels of good images."""
    members = []
    for i, sample in enumerate(samples):
        fields = sample if isinstance(sample, dict) else {key: PNG, 'cls': str(sample).encode()}
        members += [(f'{i}.{field}', content) for field, content in fields.items()]
    return tar(name, *members)


def parquet(labels, names=None, kind=None) -> Callable[[Path], None]:
    """Return a function that writes a Hugging Face dataset of both splits, labels by split."""
    def make(root):
        import datasets
        datasets.disable_progress_bars()
        label = datasets.ClassLabel(names=names) if names else datasets.Value(kind or 'int64')
        features = datasets.Features(image=datasets.Image(), label=label)
        for split, values in labels.items():
            (root / 'hf/data').mkdir(parents=True, exist_ok=True)
            columns = dict(image=[dict(bytes=PNG, path='x.png')] * len(values), label=values)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(
                root / f'hf/data/{split}-00000-of-00001.parquet')
    return make


HF = ('--dataset', 'hfds/{root}/hf', '--data-dir', '{root}/cache')
WDS = ('--dataset', 'wds/x', '--data-dir', '{root}', '--train-split', 'train.tar|8', '--val-split', 'train.tar|8')
LABELS = [0, 1] * 4

TAR = ('--data-dir', '{root}/x.tar', '--val-split', '')
READERS = [
    Case('tar of no images', TAR, tar('x.tar', ('a/x.txt', b'x')),
         words='--data-dir {root}/x.tar'),
    Case('tar that is none', TAR, write('x.tar', 'hello'),
         words='--data-dir {root}/x.tar'),
    Case('tar with an image in no class', TAR, tar('x.tar', ('0.png', PNG)),
         words=('--data-dir {root}/x.tar', 'images outside of class folders')),
    Case('tar that leads out of itself', TAR, tar(
        'x.tar', *((f'../../{i}/{c}/0.png', PNG) for i in 'xy' for c in 'ab'), ('/etc/a/0.png', PNG),
        ('/b/1.png', PNG), (special('a/link.png', tarfile.SYMTYPE, '/etc/passwd'), b''),
        (special('a/hard.png', tarfile.LNKTYPE, '/etc/passwd'), b''), (special('a/tty.png', tarfile.CHRTYPE), b''),
        (special('b/pipe.png', tarfile.FIFOTYPE), b'')), RAN),
    Case('labels of a dataset above --num-classes', HF, parquet(dict(train=[0, 2] * 4, validation=[0, 1])), ENDED,
         ('--num-classes 2', 'the data holds label 2', 'wanted: 0 to 1')),
    Case('labels to validate on above --num-classes', HF, parquet(dict(train=LABELS, validation=[0, 5])), ENDED,
         ('--num-classes 2', 'the data holds label 5')),
    Case('negative labels', HF, parquet(dict(train=[0, -5] * 4, validation=[0])), ENDED, 'the data holds label -5'),
    Case('labels that are fractions', HF, parquet(dict(train=[0., 0.5] * 4, validation=[0.]), kind='float64'), REFUSED,
         'the data holds label 0.'),
    Case('labels that are text', HF, parquet(dict(train=['a', 'b'] * 4, validation=['a']), kind='string'), REFUSED,
         ('the data holds label', '--class-map')),
    Case('labels that are missing', HF, parquet(dict(train=[0, None] * 4, validation=[0])), ENDED,
         'the data holds label None'),
    Case('dataset of no rows', HF, parquet(dict(train=[], validation=[0])),
         words=('--dataset hfds/{root}/hf', '--train-split train')),
    Case('dataset that is not there', HF, words=('--dataset hfds/{root}/hf', '--train-split train')),
    Case('label in a shard above --num-classes', WDS, shard('train.tar', *LABELS[1:], 7), ENDED,
         ('--num-classes 2', 'the data holds label 7', 'wanted: 0 to 1')),
    Case('label in a shard that is text', WDS, shard('train.tar', 'x', *LABELS), RAN,
         'Bad image 0 of {root}/train.tar: invalid literal for int'),
    Case('bad image in a shard', WDS, shard('train.tar', *LABELS, dict(png=b'', cls=b'0')), RAN,
         'Bad image 8 of {root}/train.tar'),
    Case('shard of no samples', WDS, write('train.tar', 'hello'), ENDED, '--train-split: a worker found no image'),
    Case('shard that is not there', WDS, words=('--train-split train.tar|8', 'train.tar is not there')),
    Case('class map of no text', ('--class-map', '{root}/map.txt'), write('map.txt', b'\xff\xfe'),
         words=('--class-map {root}/map.txt', '.txt of one class name a line')),
    Case('class map that lacks a class', ('--class-map', '{root}/map.txt'), write('map.txt', 'a\nc\n'),
         words=('--class-map {root}/map.txt', 'no index for', "'b'")),
]


# Command lines and recipes that make no sense.

def flags(line: str, *words) -> Case:
    return Case(line, line.split(), words=words)


def recipe(text: str, *words) -> Case:
    return Case(f'recipe: {text[:40]}', ['-c', '{root}/r.yaml'], write('r.yaml', text), words=('--config', *words))


COMMANDS = [
    flags('--no-such-flag', '--no-such-flag', 'no such flag'),
    flags('--moddel x', '--moddel', 'closest: --model'),
    flags('--epochs ten', '--epochs', "'ten'"),
    flags('--epochs', '--epochs', 'expected one argument'),
    flags('--lr nan', '--lr nan', 'finite'),
    flags('--lr 1e400', '--lr inf', 'finite'),
    flags('--batch-size -1', '--batch-size -1', 'at least 1'),
    flags('--img-size 99999999999', '--img-size 99999999999', 'at most 16384'),
    flags('--input-size 3 -1 0', '--input-size -1', 'at least 1'),
    flags('--seed 99999999999999999999', '--seed 99999999999999999999', 'at most'),
    flags('--crop-pct 1e-9', '--crop-pct 1e-09', 'at least 0.05'),
    flags('--smoothing 1', '--smoothing 1.0', 'below 1'),
    flags('--ratio 0 1', '--ratio 0.0', 'above 0'),
    flags('--layer-decay 1e30', '--layer-decay 1e+30', 'at most 1'),
    flags('--sched cosin', '--sched', "'cosin'", 'cosine'),
    flags('--opt sdg', '--opt sdg', 'closest: sgd'),
    flags('--opt adamw --opt-betas 0.9', '--opt adamw'),
    flags('--opt sgd --opt-kwargs no_such=1', '--opt sgd', 'no_such'),
    flags('--opt sgd --opt-kwargs lr=1', '--opt sgd', "'lr'"),
    flags('--model resnet81', '--model resnet81', 'closest: resnet18'),
    flags('--model test_resnet.nosuch', '--model test_resnet.nosuch', 'nosuch'),
    flags('--model evil:x', '--model evil:x', 'hf-hub, local-dir'),
    flags('--model-kwargs num_classes=3', "--model-kwargs {'num_classes': 3}", 'multiple values'),
    flags('--model-kwargs no_such=3', "--model-kwargs {'no_such': 3}", 'no_such'),
    flags('--model-kwargs layers=x', "--model-kwargs {'layers': 'x'}"),
    flags('--gp nosuch', '--gp', 'nosuch'),
    flags('--in-chans 2', '--in-chans 2', '--input-img-mode L'),
    flags('--in-chans 9', '--in-chans 9', '--input-img-mode'),
    flags('--input-size 2 32 32', '--input-size 2', '--input-img-mode L'),
    flags('--bn-momentum 0', '--bn-momentum 0.0', 'unexpected'),
    flags('--train-img-sizes 24 32 --train-batch-sizes 8', '--train-batch-sizes [8]'),
    flags('--train-img-sizes 24 32 --train-size-probs 0 0', '--train-size-probs [0.0, 0.0]'),
    flags('--train-img-sizes 24 32 --aug-splits 2', '--train-img-sizes', '--aug-splits'),
    flags('--train-img-sizes 24 32 --train-batch-sizes 7 8 --mixup 0.2', '--train-batch-sizes', 'even'),
    flags('--aug-splits 2 --no-aug', '--aug-splits 2', '--no-aug'),
    flags('--naflex-loader --no-prefetcher', '--naflex-loader', '--no-prefetcher'),
    flags('--input-img-mode P', '--input-img-mode', "'P'", "'RGB'"),
    flags('--device nosuch', '--device nosuch'),
    flags('--device-modules no.such.module', '--device-modules no.such.module'),
    flags('--kd-model-name nosuch', '--kd-model-name nosuch', 'no such model'),
    flags('--dks --dks-stages 99', '--dks-stages has 99', 'choose from the stages'),
    flags('--dks --dks-budget 1.001', '--dks-budget is 1.001', 'the cheapest'),
    flags('--dks --dks-ce-weight 1 2', '--dks-ce-weight 1.0 2.0', 'give 1, or 3'),
    flags('--dks --dks-branch-kwargs 9.x=1', "--dks-branch-kwargs has '9.x'"),
    flags('--torchcompile nosuch', '--torchcompile nosuch'),
    flags('--log-with nosuch', '--log-with nosuch'),
    flags('--push-to-hub ../../x', '--push-to-hub', 'give owner/name'),
    flags('--dataset nosuch/x', '--dataset nosuch/x', 'no reader'),
    flags('--train-num-samples 0', '--train-num-samples 0', 'at least 1'),
    flags('--aa nosuch', '--aa nosuch', 'augmix'),
    flags('--train-pad 99', '--train-pad 99', 'below the image size'),
    flags('--task multi', '--task', "'multi'", 'multilabel'),
    flags('--task multilabel', '--task multilabel', '--data-dir {root}/data has one label', 'multidigits'),
    flags('--dataset digits --task multilabel', '--task multilabel', '--dataset digits has one label'),
    flags('--dataset multidigits', '--dataset multidigits', '--task multilabel'),
    flags('--dataset multidigits --task multilabel --num-classes 4', '--num-classes 4', '10 classes'),
    flags('--target-format multihot', '--target-format multihot', 'needs --task multilabel'),
    flags('--target-format onehot', '--target-format', "'onehot'", 'multihot'),
    flags('--target-key a,b', '--target-key a,b', 'need --task multilabel'),
    flags('--multilabel-threshold 1', '--multilabel-threshold 1.0', 'below 1'),
    flags('--multilabel-threshold 0.3', '--multilabel-threshold 0.3', 'needs --task multilabel'),
    flags('--eval-metric map', '--eval-metric map', 'top1, top5, loss'),
    flags('--task multilabel --eval-metric top1', '--eval-metric top1', 'map, micro_f1'),
    flags('--task multilabel --kd-model-name test_resnet', '--kd-model-name test_resnet', 'not with --task multilabel'),
    flags('--loss focal', '--loss', "'focal'", 'asl'),
    flags('--loss jsd', '--loss jsd', 'needs --aug-splits'),
    flags('--loss zlpr', '--loss zlpr', 'requires multi-label targets'),
    flags('--loss ce --bce-loss', '--loss ce', '--bce-loss'),
    flags('--loss ce --bce-sum', '--loss ce', 'bce'),
    flags('--asl-clip 0.1', '--asl-clip', 'needs --loss asl'),
    flags('--loss asl --mixup 0.2', '--loss asl', 'does not support Mixup/CutMix'),
    flags('--loss bce --loss-class-weight 1,2,3', '--loss-class-weight 1,2,3', '3 weights for 2 classes'),
    flags('--loss bce --loss-class-weight 1 2 3', '--loss-class-weight 1 2 3', '3 weights for 2 classes'),
    flags('--loss bce --loss-class-weight much', '--loss-class-weight much'),
    flags('--loss bce --loss-pos-weight inv_freq', '--loss-pos-weight inv_freq', 'neg_pos'),
    flags('--loss bce --loss-class-weight inv_freq --class-stats no.json', '--class-stats no.json', 'No such file'),
    Case('class counts of other classes', (
        *'--loss bce --loss-class-weight inv_freq --class-stats {root}/c.json'.split(),),
         write('c.json', '{"pos_counts": [1, 2, 3], "num_samples": 6}'), words=('--class-stats', 'is of 3 classes')),
    Case('class counts without counts', (
        *'--loss bce --loss-class-weight inv_freq --class-stats {root}/c.json'.split(),),
         write('c.json', '{"num_samples": 6}'), words=('--class-stats', 'pos_counts')),
    flags('--sched wsd --lr-decay-fn square', '--lr-decay-fn', "'square'", '1-sqrt'),
    flags('--sched wsd --decay-epochs 9', '--sched wsd', 'decay 9'),
    flags('--lr-decay-fn linear', '--lr-decay-fn linear', 'needs --sched wsd or rsqrt'),
    flags('--sched wsd --lr-stable-timescale 3', '--lr-stable-timescale 3.0', 'needs --sched rsqrt'),
    flags('--loss-weight-beta 0.5', '--loss-weight-beta', 'needs --loss-class-weight'),
    flags('--class-stats no.json', '--class-stats no.json', 'needs --loss-class-weight'),
    flags('--epochs 4 --stop-epoch 1 --dks --dks-start-epoch 2', '--dks-start-epoch 2', 'the 1 epochs'),
    flags('--stop-epoch 0', '--stop-epoch 0', 'at least 1'),
    flags('--save-epochs 0', '--save-epochs 0', 'at least 1'),
    flags('--dks --dks-preset best', '--dks-preset', "'best'", 'distill'),
    flags('--dks-preset distill', '--dks-preset', 'needs --dks'),
    flags('--dks --dks-teacher ensemble --dks-direction top-down', '--dks-direction top-down', 'to-backbone'),
    flags('--dks --dks-teacher ensemble --dks-synergy-weight 1 2', '--dks-synergy-weight 1.0 2.0', 'give 1, or 3'),
    flags('--dks --dks-teacher ema', '--dks-teacher ema', 'needs --model-ema'),
    flags('--dks --dks-teacher ema --model-ema --model-ema-force-cpu', '--dks-teacher ema', '--model-ema-force-cpu'),
    flags('--dks --dks-ramp -1', '--dks-ramp -1', 'at least 0'),
    flags('--dks --dks-synergy cosine', '--dks-synergy', "'cosine'", 'sigmoid'),
    flags('--dataset multidigits --task multilabel --num-classes 10 --dks --dks-synergy softmax',
          "--dks-synergy 'softmax'", "use 'sigmoid'"),
    Case('argument that clears the screen', ['--model', '\x1b[2J'], words='--model \\x1b[2J'),
    Case('argument with line breaks', ['--aa', 'a\nb'], words='--aa a b'),
    Case('argument of 100,000 letters', ['--model', 'x' * 100_000], words=('--model xxx', ' ... ')),
    Case('argument of bytes that are no text', ['--model', '\udcff'], words='--model \\udcff'),
    recipe('epoch: 3', '"epoch: 3"', 'closest: epochs'),
    recipe('epochs: ten', '"epochs: ten"', 'a whole number'),
    recipe('scale: [0.5, a]', '"scale: [0.5, \'a\']"', 'a list'),
    recipe('model: null', '"model: None"', 'text'),
    recipe('[1, 2]', 'holds a list'),
    recipe('a: [', 'not YAML'),
    recipe('lr: !!float x', 'not YAML', 'ValueError'),
    recipe('? [1]\n: 2', 'not YAML'),
    recipe('lr: ' + '9' * 5000, 'not YAML', 'digits'),
    recipe('seed: 99999999999999999999', '--seed 99999999999999999999', 'at most')._replace(words='--seed 9999'),
    recipe('lr: &a [*a]', '"lr: [[', 'a number'),
    recipe('\x00', 'not YAML'),
    Case('recipe that is no text', ['-c', '{root}/r.yaml'], write('r.yaml', b'\xff\xfe\xfa'),
         words=('--config', 'not YAML')),
    Case('recipe that is not there', ['-c', '{root}/r.yaml'], words=('--config {root}/r.yaml', 'No such file')),
    Case('recipe that is a folder', ['-c', '{root}/data'], words=('--config {root}/data', 'directory')),
]


# Files that would run code, and names that would lead elsewhere. The file PWNED must never be.

class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, root):
        self.file = str(root / 'PWNED')

    def __reduce__(self):
        return os.system, (f'touch {self.file!r}',)


def pickled(name) -> Callable[[Path], None]:
    return lambda root: write(name, pickle.dumps({'a': Payload(root), 'b': 1}))(root)


def saved(name, legacy=False, **content) -> Callable[[Path], None]:
    """Return a function that saves a dictionary with torch; a value may be a function of the folder."""
    def make(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        state = {key: value(root) if callable(value) else value for key, value in content.items()}
        torch.save(state, root / name, _use_new_zipfile_serialization=not legacy)
    return make


def config(name, **more) -> Callable[[Path], None]:
    text = json.dumps(dict(architecture='test_resnet', num_classes=2, pretrained_cfg={}, **more))
    return write(f'{name}/config.json', text)


LAYOUT = dict(stages=[2], branches='auto', branch_kwargs={}, budget=None, image_size=None)
LOCAL = ['--model', 'local-dir:{root}/m', '--pretrained']
RESUME = ('--resume', '{root}/x.pth')
PLAIN = 'holds something other than plain weights'


def published(**layout):
    """A model with branches beside it, as they are published."""
    def make(root):
        import timm
        from safetensors.torch import save_file
        config('m')(root)
        save_file(timm.create_model('test_resnet', num_classes=2).state_dict(), root / 'm/model.safetensors')
        write('m/dks_config.json', json.dumps({**LAYOUT, **layout}))(root)
        pickled('m/branches.safetensors')(root)
    return make


def cifar(root):
    for name in ('batches.meta', 'test_batch', *(f'data_batch_{i}' for i in range(1, 6))):
        pickled(f'cifar-10-batches-py/{name}')(root)


def run_of(**args):
    return saved('x.pth', state_dict={}, args=argparse.Namespace(model='test_resnet', **args))


HOSTILE = [
    Case('--resume: a checkpoint that runs code', RESUME, saved('x.pth', x=Payload), words=('--resume', PLAIN)),
    Case('--resume: a pickle', RESUME, pickled('x.pth'), words='--resume {root}/x.pth'),
    Case('--resume: text', RESUME, write('x.pth', 'hello'), words='--resume {root}/x.pth'),
    Case('--resume: nothing', RESUME, write('x.pth'), words='--resume {root}/x.pth'),
    Case('--resume: a list', RESUME, lambda root: torch.save([1], root / 'x.pth'), words='holds a list'),
    Case('--initial-checkpoint: runs code', ('--initial-checkpoint', '{root}/x.pth'), saved('x.pth', x=Payload),
         words=('--initial-checkpoint {root}/x.pth', PLAIN)),
    Case('--initial-checkpoint: runs code, in the old format', ('--initial-checkpoint', '{root}/x.pth'),
         saved('x.pth', legacy=True, x=Payload), words=('--initial-checkpoint {root}/x.pth', PLAIN)),
    Case('--initial-checkpoint: a pickle', ('--initial-checkpoint', '{root}/x.pth'), pickled('x.pth'),
         words=('--initial-checkpoint {root}/x.pth', PLAIN)),
    Case('--initial-checkpoint: a pickle that calls itself safe', ('--initial-checkpoint', '{root}/x.safetensors'),
         pickled('x.safetensors'), words=('--initial-checkpoint {root}/x.safetensors', 'SafetensorError')),
    Case('--initial-checkpoint: a pickle that calls itself an array', ('--initial-checkpoint', '{root}/x.npz'),
         pickled('x.npz'), words='--initial-checkpoint {root}/x.npz'),
    Case('--initial-checkpoint: another model', ('--initial-checkpoint', '{root}/x.pth'),
         saved('x.pth', state_dict={'x': torch.zeros(1)}), words=('--initial-checkpoint {root}/x.pth', 'x')),
    Case('--pretrained-path: runs code', ('--pretrained', '--pretrained-path', '{root}/x.pth'),
         saved('x.pth', x=Payload), words=('--pretrained-path {root}/x.pth', PLAIN)),
    Case('local-dir: weights that run code', LOCAL, each(config('m'), saved('m/pytorch_model.bin', x=Payload)),
         words=('--model local-dir:{root}/m', PLAIN)),
    Case('local-dir: safetensors that are a pickle', LOCAL, each(config('m'), pickled('m/model.safetensors')),
         words=('--model local-dir:{root}/m', 'SafetensorError')),
    Case('local-dir: config of no JSON', LOCAL, write('m/config.json', '{'), words='--model local-dir:{root}/m'),
    Case('local-dir: no architecture', LOCAL, write('m/config.json', '{"architecture": "../../x"}'),
         words=('--model local-dir:{root}/m', '../../x')),
    Case('published branches that are a pickle', [*LOCAL, '--dks'], published(), words='SafetensorError'),
    Case('published branches that name a file', [*LOCAL, '--dks'],
         published(branch_kwargs={'checkpoint_path': '/etc/passwd'}), words=('dks_config.json', 'not accepted')),
    Case('published branches on text', [*LOCAL, '--dks'], published(stages='abc'), words='--dks-stages'),
    Case('teacher that runs code', ['--kd-model-name', 'local-dir:{root}/m'],
         each(config('m'), saved('m/pytorch_model.bin', x=Payload)),
         words=('--kd-model-name local-dir:{root}/m', PLAIN)),
    Case('teacher that is a pickle', ['--kd-model-name', 'local-dir:{root}/m'],
         each(config('m'), pickled('m/model.safetensors')), words='--kd-model-name local-dir:{root}/m'),
    Case('class map that runs code', ('--class-map', '{root}/x.pkl'), pickled('x.pkl'),
         words=('--class-map {root}/x.pkl', 'not permitted', '.txt of one class name a line')),
    Case('dataset of torchvision that runs code', ('--dataset', 'torch/cifar10', '--data-dir', '{root}'), cifar,
         words=('--dataset torch/cifar10', 'not found or corrupted')),
    Case('dataset with a script', HF, write('hf/hf.py', 'import os; os.system("touch PWNED")'),
         words=('--dataset hfds/{root}/hf', '--train-split train')),
    Case('shard with a pickle', WDS, lambda root: shard(
        'train.tar', *({'png': PNG, 'cls': b'0', 'pyd': pickle.dumps(Payload(root)), 'pickle': pickle.dumps(
            Payload(root))} for _ in range(8)))(root), RAN),
    Case('export: a checkpoint that runs code', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'],
         saved('x.pth', x=Payload), words=("checkpoint '{root}/x.pth'", PLAIN)),
    Case('export: a pickle', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'], pickled('x.pth'),
         words=("checkpoint '{root}/x.pth'", PLAIN)),
    Case('export: arguments that run code', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'],
         saved('x.pth', args=lambda root: argparse.Namespace(model=Payload(root))), words=PLAIN),
    Case('export: a number for a model', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'],
         saved('x.pth', args=argparse.Namespace(model=5)), words='"model: 5" is not text'),
    Case('export: a list for a mapping', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'],
         run_of(model_kwargs=[1]), words='"model_kwargs: [1]" is not a mapping'),
    Case('export: no weights', ['dks-timm', 'export', '{root}/x.pth', '{root}/out'], run_of(num_classes=2),
         words=("checkpoint '{root}/x.pth'", 'Missing key')),
    Case('push: a folder of no model', ['dks-timm', 'push', '{root}/data', 'owner/name'],
         words=("folder '{root}/data'", 'no config.json')),
    Case('inspect: a name that leads elsewhere', ['dks-timm', 'inspect', '../../x'], words='MODEL ../../x'),
    Case('inspect: a config of no model', ['dks-timm', 'inspect', 'local-dir:{root}/m'], write('m/config.json', '{}'),
         words='MODEL local-dir:{root}/m'),
    Case('inspect: an argument that is a file', ['dks-timm', 'inspect', 'test_resnet', '--model-kwargs',
                                                 'checkpoint_path=/etc/passwd'], words='checkpoint_path'),
    Case('report: a folder of no run', ['dks-timm', 'report', '{root}/data'], words='RUN {root}/data'),
    recipe('!!python/object/apply:os.system ["touch PWNED"]', 'not YAML'),
    recipe('model: !!python/object/apply:os.system ["touch PWNED"]', 'not YAML'),
    recipe('dataset_trust_remote_code: true', 'runs code from elsewhere', '--dataset-trust-remote-code'),
    recipe('device_modules: [antigravity]', 'runs code from elsewhere', '--device-modules'),
    recipe('data_dir: "pipe:touch PWNED; cat"', 'runs code from elsewhere', '--data-dir'),
    Case("baseline's arguments that run code", ('--card-baseline', '{root}/run'), each(
        write('run/args.yaml', '!!python/object/apply:os.system ["touch PWNED"]'), write('run/summary.csv')),
         words='--card-baseline'),
    Case("baseline's arguments of other types", ('--card-baseline', '{root}/run'), each(
        write('run/args.yaml', 'dataset: 7'), write('run/summary.csv')), words=('--card-baseline', '"dataset: 7"')),
    Case('experiment above the output', ('--experiment', '../x'), words=('--experiment ../x', 'inside --output')),
    Case('experiment above the output, in the middle', ('--experiment', 'a/../../x'), words='inside --output'),
    Case('experiment with a root of its own', ('--experiment', '/tmp/x'), words='inside --output'),
    Case('experiment that is a link', ('--experiment', 'link'), each(
        lambda root: (root / 'out').mkdir(), lambda root: (root / 'out/link').symlink_to(root)),
         words=('--experiment link', 'inside --output')),
    Case('experiment of 300 letters', ('--experiment', 'x' * 300), words='File name too long'),
    Case('output that is a file', ('--output', '{root}/data/train/a/0.png'),
         words='--output {root}/data/train/a/0.png'),
    Case('export into a file', ('--export-dir', '{root}/data/train/a/0.png'), words='is a file'),
    Case('export over a model', ('--export-dir', '{root}/m'), config('m'), words=('already holds', 'set overwrite')),
]

CASES = [*IMAGES, *FOLDERS, *READERS, *COMMANDS, *HOSTILE]

# Words to make command lines of, and values to make recipes of.
WORDS = [
    '', '-1', '0', '1', '2', '0.5', 'nan', 'inf', '1e400', '9' * 30, '\u0663', 'a\nb', '\x1b[2J', '../../x',
    '/etc', '.', '-', '[', '(' * 200, 'x=1', '=', '=1', 'a=(', 'a=' + '9' * 5000, 'True', 'null', '0x10', '1_0',
    '1e3', '\xe9', '%s', '%(prog)s', '{}', '@file', ' 3', 'auto', 'none', 'rand-m9', 'x' * 5000, '/dev/null',
]
VALUES = [
    '', 'null', '[]', '{}', '[[]]', '{a: 1}', '.nan', '.inf', '1e400', '9' * 30, '9' * 5000,
    '2001-01-01', '2001-99-99', '!!int x', '!!float x', '!!binary "%"', '!!set {a}',
    '!!str', '"a\\nb"', '"\\uDCFF"', 'yes', '1:30', '&a [*a]', '*b', '!!python/name:os.system',
    '- 1', '{[1]: 2}', '{1: 2}', '[1, 2]', '[a, 1, true]', 'true', '-1', '0', '3', '0.5', '"3"', '[.nan]', 'x',
    '../../x', '|\n  a\n  b', '<<: 1',
]
