"""The datasets that ``--data-dir`` and ``--dataset`` name, created by timm or built in."""
import logging
import os
import re
import tarfile
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageChops
from timm.data import create_dataset
from timm.data.readers import create_reader
from timm.data.readers.class_map import load_class_map
from timm.data.readers.targets import get_field, has_field

from ..errors import UNREADABLE, DataError, OptionError, closest, flag, naming, why
from .images import Images, Synthetic
from .streams import Stream

_logger = logging.getLogger(__name__)

# Folder names that timm takes for one another.
SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))

PREFIXES = ('torch', 'hfds', 'hfids', 'wds', 'tfds')
BUILT_IN = ('digits', 'multidigits', 'synthetic')
SINGLE_LABEL = ('', 'torch', 'digits', 'synthetic')
# Flags that kinds of dataset know nothing of; '' is folders and tars.
FIELDS = ('class_map', 'input_key', 'target_key')
IGNORED = {'': ('target_key',), **dict.fromkeys(('torch', *BUILT_IN), (*FIELDS, 'target_format'))}

IMAGENET_SAMPLES = dict(train=1_281_167, val=50_000)

# Errors of readers, and of the packages behind them, for data that is missing or other than the flags say.
ERRORS = (AssertionError, ImportError, LookupError, OSError, RuntimeError, ValueError, tarfile.TarError)

# Words in such errors, and what to do about them.
HINTS = {
    'ModuleNotFoundError': 'pip install "dks-timm[readers]"; for tfds/ tensorflow-cpu and tensorflow-datasets',
    'num_samples': 'give --{prefix}-num-samples',
    'not found in info': 'name the shards and how many samples they hold, as in train-{{000..099}}.tar|50000',
}


class Digits(list):
    """scikit-learn's handwritten digits: 1,797 real 8x8 gray images; of each class, every fifth one validates."""
    class_to_idx = {str(label): label for label in range(10)}

    def __init__(self, split: str):
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
        super().__init__((Image.fromarray(pixels[i]), int(digits.target[i])) for i in indices)


class MultiDigits(list):
    """Two or three different digits at random places of a gray canvas of 32x32 pixels, 8 to 16 pixels high.

    4,000 canvases for training and 1,000 for validation, the same ones every time, are made of the :class:`Digits` of
    their split. Digits may overlap; the brighter pixel is seen.
    """
    class_to_idx = Digits.class_to_idx
    size, counts = 32, (4000, 1000)

    def __init__(self, split: str):
        digits = Digits(split)
        rng = np.random.default_rng(len(digits))
        super().__init__(self._draw(digits, rng) for _ in range(self.counts[split not in SPLITS[0]]))

    def _draw(self, digits, rng):
        canvas, labels = Image.new('L', (self.size, self.size)), []
        count = rng.integers(2, 4)
        while len(labels) < count:
            image, label = digits[rng.integers(len(digits))]
            if label not in labels:
                labels.append(label)
                height = int(rng.integers(8, 17))
                left, top = rng.integers(self.size - height + 1, size=2).tolist()
                layer = Image.new('L', canvas.size)
                layer.paste(image.resize((height, height), Image.Resampling.BILINEAR), (left, top))
                canvas = ImageChops.lighter(canvas, layer)
        return canvas, labels


class ClassMap(dict):
    """Indices of class names or labels, read from --class-map. Asking for one that it lacks is an error that says so.

    The path, of a .txt or .pkl file as timm's readers take it, may start from the folder of the images.
    """

    def __init__(self, path: str, root: str = ''):
        self.path = path
        try:
            super().__init__(load_class_map(path, root))
            self.pop('', None)  # of an empty line
            if not all(isinstance(index, int) and index >= 0 for index in self.values()):
                raise ValueError('holds an index that is no whole number from 0')
        except (AssertionError, *UNREADABLE) as e:
            raise OptionError(
                f'--class-map {path}: {why(e)}; wanted: a .txt of one class name a line, or a .pkl of a dict from name '
                'or label to index'
            ) from e

    def __missing__(self, name):
        raise DataError(f'--class-map {self.path}: has no index for {name!r}, a class of the data; add it to the map')


def kind(args) -> str:
    """Return the kind of --dataset: '' for folders and tars, "digits", "synthetic", or timm's prefix in lower case."""
    prefix, slash, _ = args.dataset.partition('/')
    return args.dataset if args.dataset in BUILT_IN else prefix.lower() if slash else ''


def check_dataset(args):
    """Refuse what can be seen to be wrong without reading data.

    Raises:
        OptionError: for an unknown kind of dataset, a flag that means nothing to it, and a folder that is not there.
    """
    name, root = kind(args), args.data_dir
    if name not in ('', *PREFIXES, *BUILT_IN):
        known = [f'{prefix}/' for prefix in PREFIXES]
        raise OptionError(
            f'--dataset {args.dataset}: no reader "{name}/"; there are {", ".join(known)}, {", ".join(BUILT_IN)}, and '
            f'for folders and tars --data-dir alone{closest(f"{name}/", known)}'
        )
    data = f'--dataset {args.dataset}' if name else f'--data-dir {root}'
    if args.task == 'multilabel' and name in SINGLE_LABEL:
        raise OptionError(
            f'--task multilabel: {data} has one label for each image; give hfds/, hfids/, wds/, tfds/ or multidigits')
    if args.task == 'multilabel' and name == 'wds' and not args.target_key:
        raise OptionError('--task multilabel: wds/ needs --target-key, the field of the .json files with the labels')
    if args.task != 'multilabel' and name == 'multidigits':
        raise OptionError('--dataset multidigits: has several labels for each image; give --task multilabel')
    is_tar = not name and (root or '').endswith('.tar')
    for dest in IGNORED.get(name, ()) + (('input_key',) if is_tar else ()):
        if getattr(args, dest):
            raise OptionError(f'{flag(dest)} {getattr(args, dest)}: means nothing to {data}; leave it out')
    if not root and name in ('', 'torch', 'wds'):
        data = f'the folder of --dataset {args.dataset}' if args.dataset else 'a folder of images, or --dataset'
        raise OptionError(f'--data-dir: missing; give {data}')
    if name:
        return
    if not os.path.isdir(root) and not (is_tar and os.path.exists(root)):
        raise OptionError(f'--data-dir {root}: no such folder or .tar file')
    if is_tar and args.val_split and args.train_split:
        _logger.warning(f'--data-dir {root} has no splits: evaluation is on the training images (--val-split "").')
    for dest in ('train_split', 'val_split'):
        split = getattr(args, dest)
        whole = is_tar or dest == 'train_split' and not args.val_split  # timm then trains on the folder itself
        if split and not whole and split_root(root, split) == root:
            there = ', '.join(sorted(os.listdir(root))[:8]) or 'nothing'
            itself = '' if args.train_split else '; "" is the folder itself'
            raise OptionError(f'{flag(dest)} {split}: --data-dir {root} has no such folder; it has {there}{itself}')


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
    """Create the dataset of the split that the flags of a prefix, "train" or "val", are about.

    Raises:
        OptionError: if the data is not there, or not what the flags say.
    """
    name, split = kind(args), getattr(args, f'{prefix}_split')
    in_chans = args.in_chans or (args.input_size or [3])[0]
    img_mode = ('RGB' if in_chans == 3 else 'L') if args.input_img_mode is None else args.input_img_mode
    if name == 'synthetic':
        count = getattr(args, f'{prefix}_num_samples') or IMAGENET_SAMPLES[prefix]
        return Synthetic(count, args.num_classes or 1000, img_mode, args.seed)
    if name in ('digits', 'multidigits'):
        digits = (Digits if name == 'digits' else MultiDigits)(split)
        return Images(digits, img_mode, args.max_bad_images)
    if not name:
        return _create_folder(args, split, img_mode)
    reader = _create_reader(args, prefix, is_training=is_training, input_img_mode=img_mode, **kwargs)
    if hasattr(reader, 'is_training'):  # of timm's readers, those of streams
        return Stream(reader, args.max_bad_images)
    return Images(reader, img_mode, args.max_bad_images)


def _create_reader(args, prefix: str, **kwargs):
    """Return timm's reader, or torchvision's dataset, that a prefix of --dataset names."""
    split = getattr(args, f'{prefix}_split')
    subject = f'--dataset {args.dataset}, --{prefix}-split {split}'
    class_map = ClassMap(args.class_map) if args.class_map else None
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
            target_format=args.target_format,
            num_samples=getattr(args, f'{prefix}_num_samples'),
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except ERRORS as e:
        hint = next((f'; {hint.format(prefix=prefix)}' for said, hint in HINTS.items() if said in why(e)), '')
        raise OptionError(f'{subject}: {why(e)}{hint}') from e
    if kind(args) == 'torch':
        if hasattr(dataset, 'loader'):
            dataset.loader = partial(open, mode='rb')  # for Images to decode
        return dataset
    with naming(subject, *ERRORS):
        if kind(args) == 'wds':
            _check_shards(dataset.reader)
        else:
            _check_fields(dataset.reader)
    return dataset.reader


def _check_shards(reader):
    """Refuse shards that are not there, which webdataset passes over with a warning."""
    for name in reader.split_info.filenames:
        path = os.path.join(reader.root, name)
        if not re.match(r'\w{2,}:', path) and not os.path.exists(path):  # not s3:, https:, pipe: and the like
            raise FileNotFoundError(f'{path} is not there')


def _check_fields(reader):
    """Refuse fields that a dataset of ``hfds/``, ``hfids/`` or ``tfds/`` lacks; give ``hfids/`` its class names."""
    if hasattr(reader, 'dataset'):  # to which timm adds an empty field for images where there is none
        input_key, target_keys = reader.image_key, reader.target_keys or [reader.label_key]
        fields = {name: value for name, value in reader.dataset[0].items() if value is not None}
    else:
        input_key, target_keys = reader.input_key, reader.target_keys or [reader.target_key]
        if hasattr(reader.builder, 'as_streaming_dataset'):
            reader.builder.as_streaming_dataset(split=reader.split)  # finds out the fields of files without a card
        fields = reader.builder.info.features or {}
    for name, key in (('--input-key', input_key), *(('--target-key', key) for key in target_keys)):
        if fields and not has_field(fields, key):
            raise OptionError(f'{name} {key}: the data has no such field; it has {", ".join(sorted(fields))}')
    feature = get_field(fields, target_keys[0]) if fields and len(target_keys) == 1 else None
    while hasattr(feature, 'feature'):  # of a list
        feature = feature.feature
    names = getattr(feature, 'names', None)
    if names and not reader._source_names:  # private: timm ReaderHfids, which looks for names in the card alone
        reader._source_names = dict(enumerate(names))
        if not reader.remap_class:
            reader.class_to_idx = {name: index for index, name in enumerate(names)}


def _create_folder(args, split: str, img_mode: str):
    """Return the images of folders or of a tar, with a class for every image, and an index for every class."""
    root = split_root(args.data_dir, split)
    with naming(f'--data-dir {args.data_dir}', *ERRORS):
        reader = create_reader('', root=root, input_key=args.input_key)
    if hasattr(reader, 'class_name_to_idx'):  # of a tar
        reader.class_to_idx = reader.class_name_to_idx
    if {'', '.'} & set(reader.class_to_idx):
        raise OptionError(f'--data-dir {args.data_dir}: {root} has images outside of class folders; move them')
    target_transform = None
    if args.class_map:  # timm's readers leave out images of classes that it lacks
        class_map = ClassMap(args.class_map, root)
        target_transform = {label: class_map[name] for name, label in reader.class_to_idx.items()}.__getitem__
        reader.class_to_idx = class_map
    return Images(reader, img_mode, args.max_bad_images, target_transform)
