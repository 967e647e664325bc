"""The datasets that ``--data-dir`` and ``--dataset`` name, created by timm or built in."""
import functools
import importlib
import logging
import os
import re
import sys
import tarfile

import numpy as np
import torch
import yaml
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ..errors import OptionError, closest, flag, naming
from . import labels
from .images import Images, Synthetic
from .streams import Stream

_logger = logging.getLogger(__name__)

# Folder names that timm takes for one another.
SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))

# timm's prefixes, with the package that each needs and what installs it.
PREFIXES = {
    'torch': ('torchvision', 'torchvision'),
    'hfds': ('datasets', '"dks-timm[readers]"'),
    'hfids': ('datasets', '"dks-timm[readers]"'),
    'wds': ('webdataset', '"dks-timm[readers]"'),
    'tfds': ('tensorflow_datasets', 'tensorflow-cpu tensorflow-datasets'),
}
BUILT_IN = ('digits', 'synthetic')
# Flags that kinds of dataset know nothing of.
FIELDS = ('class_map', 'input_key', 'target_key')
IGNORED = {'': ('target_key',), 'torch': FIELDS, 'digits': FIELDS, 'synthetic': FIELDS}

IMAGENET_SAMPLES = dict(train=1_281_167, val=50_000)

# What readers raise, and the packages behind them, where the data is not there or other than the flags say.
ERRORS = (AssertionError, LookupError, OSError, RuntimeError, ValueError, tarfile.TarError, yaml.YAMLError)

# Part of what they say, as a regular expression, and which flag it is about.
MEANINGS = {
    'pass `num_samples`|num_samples not specified': (
        '--{prefix}-num-samples: missing; {subject} does not say how many samples it has'),
    "Couldn't cast|Unsupported cast": '--input-key {key}: the field holds no images',
    'not found in info': (
        '{split}: no such split in an _info.json of --data-dir {root}; name one, or shards and how many samples they '
        'hold, as in train-{{000..099}}.tar|50000'
    ),
}


class ReaderDigits(Reader):
    """scikit-learn's handwritten digits: 1,797 real 8x8 gray images; of each class, every fifth one validates."""

    def __init__(self, split: str):
        super().__init__()
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise OptionError('--dataset digits: needs scikit-learn; pip install "dks-timm[demo]"') from None
        if not any(split in names for names in SPLITS):
            raise OptionError(f'--dataset digits: has no split "{split}"; it has train and validation')
        digits = load_digits()
        held_out = torch.zeros(len(digits.target), dtype=torch.bool)
        for label in range(10):
            held_out[(digits.target == label).nonzero()[0][4::5]] = True
        indices = (held_out if split in SPLITS[1] else ~held_out).nonzero().flatten().tolist()
        pixels = (digits.images * (255 / 16)).round().astype('uint8')
        self.samples = [(Image.fromarray(pixels[i]), int(digits.target[i])) for i in indices]
        self.class_to_idx = {str(label): label for label in range(10)}

    def __getitem__(self, index):
        return self.samples[index]

    def __len__(self):
        return len(self.samples)

    def _filename(self, index, basename=False, absolute=False):
        return f'{self.samples[index][1]}/{index}.png'


class ReaderSynthetic(Reader):
    """A few images of random pixels again and again, under all labels in turn."""

    def __init__(self, count: int, num_classes: int, seed: int):
        super().__init__()
        self.count, self.num_labels = count, num_classes
        # More than one, as BatchNorm magnifies what is left of a batch in which all images are the same.
        pixels = np.random.default_rng(seed).integers(256, size=(16, 256, 256, 3), dtype='uint8')
        self.images = [Image.fromarray(p) for p in pixels]

    def label(self, index):
        return index % self.num_labels

    def __getitem__(self, index):
        return self.images[index % len(self.images)], self.label(index)

    def __len__(self):
        return self.count

    def _filename(self, index, basename=False, absolute=False):
        return f'{self.label(index)}/{index}'


class ReaderTorch(Reader):
    """A torchvision dataset as a reader, so that its images are decoded by :class:`Images`, too."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset
        self.class_to_idx = getattr(dataset, 'class_to_idx', None)
        if hasattr(dataset, 'loader'):
            dataset.loader = functools.partial(open, mode='rb')

    def __getitem__(self, index):
        return self.dataset[index]

    def __len__(self):
        return len(self.dataset)

    def _filename(self, index, basename=False, absolute=False):
        return self.dataset.samples[index][0] if hasattr(self.dataset, 'samples') else ''


def kind(args) -> str:
    """Return the kind of --dataset: '' for folders and tars, "digits", "synthetic", or timm's prefix in lower case."""
    if args.dataset in BUILT_IN:
        return args.dataset
    prefix, slash, _ = args.dataset.partition('/')
    return prefix.lower() if slash else ''


def check_dataset(args):
    """Refuse what can be seen to be wrong without reading data.

    Raises:
        OptionError: for an unknown kind of dataset, a missing package, a flag that means nothing to the reader, and
            a folder that is not there.
    """
    name, root, data = kind(args), args.data_dir, f'--dataset {args.dataset}'
    if name and name not in (*BUILT_IN, *PREFIXES):
        known = [f'{prefix}/' for prefix in PREFIXES]
        raise OptionError(
            f'{data}: no reader "{name}/"; there are {", ".join(known)}, "digits", "synthetic", and for folders and '
            f'tars --data-dir alone{closest(f"{name}/", known)}'
        )
    if name in PREFIXES:
        package, install = PREFIXES[name]
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise OptionError(f'{data}: needs the package {package} ({e}); pip install {install}') from e
    is_tar = not name and (root or '').endswith('.tar')
    for dest in IGNORED.get(name, ()) + (('input_key',) if is_tar else ()):
        if getattr(args, dest):
            data = data if name else f'--data-dir {root}'
            raise OptionError(f'{flag(dest)} {getattr(args, dest)}: means nothing to {data}; leave it out')
    if args.target_key and ',' in args.target_key:
        raise OptionError(f'--target-key {args.target_key}: several labels an image are not supported; give one field')
    if not root and not name:
        there = f' for {data}' if args.dataset else ''
        raise OptionError(f'--data-dir: missing{there}; give a folder of images, or --dataset')
    if not root and name in ('torch', 'wds'):
        raise OptionError(f'--data-dir: missing; give the folder of {data}')
    if not name:
        _check_folder(args)


def _check_folder(args):
    root = args.data_dir
    if not os.path.exists(root):
        raise OptionError(f'--data-dir {root}: no such folder')
    if not os.path.isdir(root) and not root.endswith('.tar'):
        raise OptionError(f'--data-dir {root}: neither a folder nor a .tar file')
    if os.path.isfile(root) and args.val_split:
        _logger.warning(f'--data-dir {root} has no splits: evaluation is on the training images (--val-split "").')
    for dest in ('train_split', 'val_split'):
        split = getattr(args, dest)
        whole = dest == 'train_split' and not args.val_split  # timm then trains on the folder itself
        if split and not whole and os.path.isdir(root) and split_root(root, split) == root:
            there = sorted(os.listdir(root))
            raise OptionError(
                f'{flag(dest)} {split}: --data-dir {root} has no such folder; it has '
                + (', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'nothing')
            )


def split_root(root: str, split: str) -> str:
    """Return the subfolder or tar with the name of a split or a synonym, or else the folder itself."""
    split = split.partition('[')[0]
    names = next((names for names in SPLITS if split in names), ())
    for name in (split, *names):
        for path in (os.path.join(root, name), os.path.join(root, f'{name}.tar')):
            if os.path.exists(path):
                return path
    return root


def create(args, prefix: str, is_training: bool, **kwargs):
    """Create the dataset of a split.

    Args:
        args: The configuration.
        prefix: "train" or "val", which flags are about the split.
        is_training: Whether a stream is shuffled and filled up to whole batches.
        **kwargs: More arguments for timm's create_dataset.

    Returns:
        :class:`Images` or :class:`Stream`.

    Raises:
        OptionError: if the data is not there, or not what the flags say.
    """
    name, split = kind(args), getattr(args, f'{prefix}_split')
    in_chans = args.in_chans or (args.input_size or [3])[0]
    img_mode = ('RGB' if in_chans == 3 else 'L') if args.input_img_mode is None else args.input_img_mode
    if name == 'synthetic':
        count = getattr(args, f'{prefix}_num_samples') or IMAGENET_SAMPLES[prefix]
        return Synthetic(ReaderSynthetic(count, args.num_classes or 1000, args.seed), img_mode, args.max_bad_images)
    if name == 'digits':
        reader = ReaderDigits(split)
    elif not name:
        reader = _create_folder_reader(args, split)
    else:
        reader = _create_reader(args, name, prefix, is_training=is_training, input_img_mode=img_mode, **kwargs)
    if hasattr(reader, 'is_training'):  # of timm's readers, those of streams
        return Stream(reader, args.max_bad_images)
    return Images(reader, img_mode, args.max_bad_images)


def _create_reader(args, name: str, prefix: str, **kwargs):
    """Return timm's reader of a dataset that a prefix of --dataset names, its fields and labels checked."""
    split = getattr(args, f'{prefix}_split')
    split_flag = f'--{prefix}-split {split}'
    subject = f'--dataset {args.dataset}, {split_flag}'
    errors = ERRORS
    if name in ('hfds', 'hfids'):
        import datasets
        errors += (datasets.exceptions.DatasetsError,)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
    class_map = labels.ClassMap(args.class_map) if args.class_map else None
    with naming(subject, *errors):
        try:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                class_map=class_map,
                download=args.dataset_download,
                batch_size=args.batch_size,
                input_key=args.input_key,
                target_key=args.target_key,
                num_samples=getattr(args, f'{prefix}_num_samples'),
                trust_remote_code=args.dataset_trust_remote_code,
                **kwargs,
            )
        except (*errors, TypeError) as e:
            meaning = next((meaning for said, meaning in MEANINGS.items() if re.search(said, str(e))), None)
            if meaning is None:
                raise
            raise OptionError(meaning.format(
                prefix=prefix, split=split_flag, subject=subject, root=args.data_dir, key=args.input_key)) from e
    if name == 'torch':
        return ReaderTorch(dataset)
    labels.CHECKS[name](dataset.reader, split_flag)
    return dataset.reader


def _create_folder_reader(args, split: str):
    """Return timm's reader of folders or tars, with a class for every image, and an index for every class."""
    root = split_root(args.data_dir, split)
    with naming(f'--data-dir {args.data_dir}', *ERRORS):
        if os.path.isdir(root) and not _holds_tars(root):
            _check_readable(args, root)
            reader = ReaderImageFolder(root, input_key=args.input_key)
            targets = [label for _, label in reader.samples]
        else:
            try:
                reader = ReaderImageInTar(root)
            except ValueError as e:
                raise OptionError(f'--data-dir {args.data_dir}: Found 0 images in {root}') from e
            targets, reader.class_to_idx = reader.targets.tolist(), reader.class_name_to_idx
    for name in {'', '.'} & set(reader.class_to_idx):
        stray = [i for i, label in enumerate(targets) if label == reader.class_to_idx[name]]
        raise OptionError(
            f'--data-dir {args.data_dir}: {len(stray)} images of {root} lie in no class folder, the first is '
            f'{reader.filename(stray[0])}; remove them, or give each class a folder'
        )
    if args.class_map:
        class_map = labels.ClassMap(args.class_map, root)
        class_map.require(reader.class_to_idx)
        index = {label: class_map[name] for name, label in reader.class_to_idx.items()}
        reader.class_to_idx = class_map
        if isinstance(reader, ReaderImageInTar):
            reader.targets = [index[label] for label in targets]
        else:
            reader.samples = [(path, index[label]) for path, label in reader.samples]
    return reader


def _holds_tars(root: str) -> bool:
    """True if a folder holds tars, one a class or many, and no folders: timm's tar reader reads them as one dataset."""
    entries = list(os.scandir(root))
    return any(e.name.endswith('.tar') for e in entries) and not any(e.is_dir() for e in entries)


def _check_readable(args, root: str):
    """Refuse folders that timm takes for empty ones, as they may not be read, or walks through again and again."""
    def refuse(error):
        raise OptionError(
            f'--data-dir {args.data_dir}: {error.filename} cannot be read ({error.strerror}); permit it, or remove it')

    for folder, _, _ in os.walk(root, onerror=refuse, followlinks=True):
        parent, target = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
        if os.path.islink(folder) and os.path.commonpath([parent, target]) == target:
            raise OptionError(
                f'--data-dir {args.data_dir}: {folder} is a link to a folder that it lies in itself; remove it')
