"""timm's data readers: which one `--dataset` names, and what it needs before it starts."""
import glob
import importlib.util
import io
import json
import logging
import numbers
import os
import re
import sys
import tarfile
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.targets import get_field, has_field

from ..errors import OptionError, closest, flag, naming, out_of_memory
from .images import Images, Stream, Synthetic

_logger = logging.getLogger(__name__)

# Folder names that timm takes for one another.
SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))

# Kinds of dataset, with those of the flags below that timm's reader of that kind understands.
FIELD_FLAGS = ('class_map', 'input_key', 'target_key')
BUILT_IN = ('digits', 'synthetic')
KINDS = {
    '': ('class_map', 'input_key'),
    'digits': (),
    'synthetic': (),
    'torch': (),
    'hfds': FIELD_FLAGS,
    'hfids': FIELD_FLAGS,
    'wds': FIELD_FLAGS,
    'tfds': FIELD_FLAGS,
}
PACKAGES = {
    'hfds': ('datasets', '"dks-timm[readers]"'),
    'hfids': ('datasets', '"dks-timm[readers]"'),
    'wds': ('webdataset', '"dks-timm[readers]"'),
    'tfds': ('tensorflow_datasets', 'tensorflow-cpu tensorflow-datasets'),
}

IMAGENET_SAMPLES = dict(train=1_281_167, val=50_000)


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
        self.samples = [(_png(digits.images[i]), int(digits.target[i])) for i in indices]
        self.class_to_idx = {str(label): label for label in range(10)}

    def __getitem__(self, index):
        png, label = self.samples[index]
        return io.BytesIO(png), label

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


def _png(pixels) -> bytes:
    """Encode an (8, 8) array of values 0 to 16 as timm's datasets expect images: as a file."""
    file = io.BytesIO()
    Image.fromarray((pixels * (255 / 16)).round().astype('uint8')).save(file, 'png')
    return file.getvalue()


class ReaderFolder(ReaderImageFolder):
    """timm's reader of folders, which a named pipe among the images does not keep waiting for ever."""

    def __getitem__(self, index):
        path, target = self.samples[index]
        return _open(path), target


def _open(path):
    return open(path, 'rb', opener=lambda path, flags: os.open(path, flags | getattr(os, 'O_NONBLOCK', 0)))


class ReaderTorch(Reader):
    """A torchvision dataset as a reader, so that :class:`Images` looks after it too."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset
        self.class_to_idx = getattr(dataset, 'class_to_idx', None)
        if hasattr(dataset, 'loader'):
            dataset.loader = _open  # Images decodes

    def __getitem__(self, index):
        return self.dataset[index]

    def __len__(self):
        return len(self.dataset)

    def _filename(self, index, basename=False, absolute=False):
        return self.dataset.samples[index][0] if hasattr(self.dataset, 'samples') else ''


def kind(args) -> str:
    """The kind of --dataset: '' for folders and tars, "digits", "synthetic", or timm's prefix in lower case."""
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
    name = kind(args)
    if name not in KINDS:
        known = [f'{k}/' for k in KINDS if k and k not in BUILT_IN]
        raise OptionError(
            f'--dataset {args.dataset}: no reader "{name}/"; there are {", ".join(known)}, "digits", "synthetic", and '
            f'for folders and tars --data-dir alone{closest(f"{name}/", known)}'
        )
    package, install = PACKAGES.get(name, ('', ''))
    if package and getattr(_find_spec(package), 'origin', None) is None:  # a mere folder of that name has none
        raise OptionError(f'--dataset {args.dataset}: needs the package {package}; pip install {install}')
    root = args.data_dir
    is_tar = not name and root and root.endswith('.tar')
    for dest in FIELD_FLAGS:
        value = getattr(args, dest)
        if value and (dest not in KINDS[name] or is_tar and dest == 'input_key'):
            data = f'--dataset {args.dataset}' if name else f'--data-dir {root}'
            raise OptionError(f'{flag(dest)} {value}: means nothing to {data}; leave it out')
    if args.target_key and ',' in args.target_key:
        raise OptionError(f'--target-key {args.target_key}: several labels an image are not supported; give one field')
    if not root:
        if not name:
            hint = f'; closest: {args.dataset}/' if args.dataset.lower() in KINDS else ''
            there = f' for --dataset {args.dataset}{hint}' if args.dataset else ''
            raise OptionError(f'--data-dir: missing{there}; give a folder of images, or --dataset')
        if name in ('torch', 'wds'):
            raise OptionError(f'--data-dir: missing; give the folder of --dataset {args.dataset}')
    elif not name:
        _check_folder(args)


def _find_spec(package):
    with suppress(ImportError, ValueError):
        return importlib.util.find_spec(package)


def _check_folder(args):
    root = args.data_dir
    if not os.path.exists(root):
        raise OptionError(f'--data-dir {root}: no such folder')
    if not os.path.isdir(root):
        if not root.endswith('.tar'):
            raise OptionError(f'--data-dir {root}: neither a folder nor a .tar file')
        if args.val_split:
            _logger.warning(f'--data-dir {root} has no splits: evaluation is on the training images (--val-split "").')
        return
    for dest in ('train_split', 'val_split'):
        split = getattr(args, dest)
        whole = dest == 'train_split' and not args.val_split  # timm then trains on the folder itself
        if split and not whole and _split_root(root, split) == root:
            there = sorted(os.listdir(root))
            raise OptionError(
                f'{flag(dest)} {split}: --data-dir {root} has no such folder; it has '
                + (', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'nothing')
            )


def _split_root(root: str, split: str) -> str:
    """Where a split lies in a folder: the subfolder or tar of its name or a synonym, or else the folder itself."""
    name = split.partition('[')[0]
    if os.path.isdir(root):
        for candidate in (name, *next((names for names in SPLITS if name in names), ())):
            for path in (os.path.join(root, candidate), os.path.join(root, f'{candidate}.tar')):
                if os.path.exists(path):
                    return path
    return root


def _holds_tars(root: str) -> bool:
    """Whether a folder holds nothing but tars, one a class or many, which timm's tar reader reads as one dataset."""
    return os.path.isdir(root) and bool(glob.glob(os.path.join(glob.escape(root), '*.tar'))) and not any(
        entry.is_dir() for entry in os.scandir(root))


def create(args, prefix: str, is_training: bool, **kwargs):
    """Let timm create the dataset of one split, and see to its bad images.

    Args:
        prefix: "train" or "val", which flags are about the split.
        is_training: Whether a stream is shuffled and filled up to whole batches.
        **kwargs: More arguments for timm's create_dataset.

    Returns:
        :class:`Images` or :class:`Stream`.

    Raises:
        OptionError: if the data is not there, or not what the flags say.
    """
    name, root, split = kind(args), args.data_dir, getattr(args, f'{prefix}_split')
    in_chans = args.in_chans or (args.input_size or [3])[0]
    img_mode = ('RGB' if in_chans == 3 else 'L') if args.input_img_mode is None else args.input_img_mode
    if name == 'digits':
        return Images(ReaderDigits(split), img_mode, args.max_bad_images)
    if name == 'synthetic':
        count = getattr(args, f'{prefix}_num_samples') or IMAGENET_SAMPLES[prefix]
        return Synthetic(ReaderSynthetic(count, args.num_classes or 1000, args.seed), img_mode, args.max_bad_images)
    if not name:
        root = _split_root(root, split)
    if name in ('hfds', 'hfids') and not sys.stderr.isatty():
        import datasets
        datasets.disable_progress_bars()
    class_map = _load_class_map(args, '' if name else root) if args.class_map else None
    split_flag = f'--{prefix}-split {split}'
    subject = f'--dataset {args.dataset}, {split_flag}' if args.dataset else f'--data-dir {args.data_dir}, {split_flag}'
    with naming(subject, *_complaints(name)):
        try:
            if not name:
                dataset = ImageDataset('', reader=_create_folder_reader(args, root, class_map))
            else:
                dataset = create_dataset(
                    args.dataset,
                    root=root,
                    split=split,
                    is_training=is_training,
                    class_map=class_map,
                    download=args.dataset_download,
                    batch_size=args.batch_size,
                    input_img_mode=img_mode,
                    input_key=args.input_key,
                    target_key=args.target_key,
                    num_samples=getattr(args, f'{prefix}_num_samples'),
                    trust_remote_code=args.dataset_trust_remote_code,
                    **kwargs,
                )
        except Exception as e:
            if 'num_samples' in str(e):
                raise OptionError(
                    f'--{prefix}-num-samples: missing; --dataset {args.dataset} does not say how many samples its '
                    f'split {split} has'
                ) from e
            if not name and 'not enough values to unpack' in str(e):
                raise OptionError(f'{subject}: Found 0 images in {root}') from e
            if name == 'hfds' and 'cast' in str(e):
                raise OptionError(f'--input-key {args.input_key or "image"}: the field holds no images') from e
            if 'not found in info' in str(e):
                raise OptionError(
                    f'{split_flag}: no such split in an _info.json of --data-dir {root}; name one, or shards and how '
                    'many samples they hold, as in train-{000..099}.tar|50000'
                ) from e
            raise
        finally:
            if not name and class_map is not None:
                _check_class_map(args, class_map.missing)
    reader = dataset.reader if hasattr(dataset, 'reader') else ReaderTorch(dataset)
    if name in ('hfds', 'hfids'):
        _check_huggingface(args, reader, split_flag)
    elif name == 'wds':
        _check_shards(args, reader, split_flag)
    elif name == 'tfds':
        _check_field('--input-key', reader.input_key, reader.builder.info.features)
        _check_field('--target-key', reader.target_key, reader.builder.info.features)
    if isinstance(dataset, IterableImageDataset):
        return Stream(reader, args.max_bad_images)
    return Images(reader, img_mode, args.max_bad_images)


def _create_folder_reader(args, root: str, class_map):
    """timm's reader of folders or tars, where every image has a class, and no folder is left out without a word."""
    if _holds_tars(root) or os.path.isfile(root):
        reader = ReaderImageInTar(root, class_map or '')
        classes, labels = reader.class_name_to_idx, reader.targets
    else:
        _check_readable(args, root)
        reader = ReaderFolder(root, class_map or '', args.input_key)
        classes, labels = reader.class_to_idx, [label for _, label in reader.samples]
    for name in {'', '.'} & set(classes):
        stray = [reader.filename(i) for i, label in enumerate(labels) if label == classes[name]]
        raise OptionError(
            f'--data-dir {args.data_dir}: {len(stray)} images of {root} lie in no class folder, the first is '
            f'{stray[0]}; remove them, or give each class a folder'
        )
    return reader


def _check_readable(args, root: str):
    def refuse(error):
        raise OptionError(
            f'--data-dir {args.data_dir}: {error.filename} cannot be read ({error.strerror}); permit it, or remove it')

    for folder, subfolders, _ in os.walk(root, onerror=refuse, followlinks=True):
        for path in (os.path.join(folder, name) for name in subfolders):
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath([os.path.realpath(folder), target]) == target:
                raise OptionError(
                    f'--data-dir {args.data_dir}: {path} is a link to a folder that it lies in itself; remove it')


class ClassMap(dict):
    """Indices of class names, which remembers the names that a reader did not find in it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.missing = set()

    def __contains__(self, name):
        found = super().__contains__(name)
        if not found:
            self.missing.add(name)
        return found


def _load_class_map(args, root: str) -> ClassMap:
    """Read --class-map, a path from here or from the folder of the split.

    Raises:
        OptionError: if it is not there or not a class map.
    """
    path = args.class_map
    wanted = 'wanted: a .txt of one class name a line, or a .pkl of a dict from name or label to index'
    try:
        class_map = ClassMap(load_class_map(path, root))
    except Exception as e:  # what unpickling raises is anyone's guess
        if out_of_memory(e):
            raise
        raise OptionError(f'--class-map {path}: {" ".join(str(e).split())}; {wanted}') from e
    class_map.pop('', None)  # of an empty line
    for name, index in class_map.items():
        if not isinstance(index, int) or index < 0:
            raise OptionError(f'--class-map {path}: the index of "{name}" is {index!r}; {wanted}')
    if not class_map:
        raise OptionError(f'--class-map {path}: is empty; {wanted}')
    return class_map


def _complaints(name: str):
    """What readers raise, and the packages behind them, where data is not there or other than the flags say."""
    found = (AssertionError, LookupError, OSError, RuntimeError, ValueError, tarfile.TarError)
    if name in ('hfds', 'hfids'):
        import yaml
        from datasets.exceptions import DatasetsError
        found += (DatasetsError, yaml.YAMLError)
    return found


def _check_class_map(args, missing):
    """Refuse a class map that has no index for classes of the data, which timm would leave out or stumble over."""
    if missing:
        names = [name or 'images outside a class folder' for name in sorted(map(str, missing))]
        shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
        raise OptionError(
            f'--class-map {args.class_map}: has no index for {len(names)} of the classes in the data ({shown}); '
            'add them, or leave them out of the data'
        )


def _check_field(flag_name, key, fields):
    if not has_field(fields, key):
        raise OptionError(f'{flag_name} {key}: the data has no such field; it has {", ".join(sorted(fields))}')


def _check_huggingface(args, reader, split_flag):
    if kind(args) == 'hfds':
        features, input_key, target_key = reader.dataset.features, reader.image_key, reader.label_key
        if reader.dataset.select_columns(input_key)[0][input_key] is None:  # timm adds an empty one where it is missing
            _check_field('--input-key', input_key, set(features) - {input_key})
    else:
        with naming(split_flag, *_complaints('hfids')):
            stream = reader.builder.as_streaming_dataset(split=reader.split)
            features = stream.features or next(iter(stream), {})
        input_key, target_key = reader.input_key, reader.target_key
        _check_field('--input-key', input_key, features)
        if stream.features and not hasattr(get_field(features, input_key), 'decode_example'):
            raise OptionError(f'--input-key {input_key}: the field holds no images')
    _check_field('--target-key', target_key, features)
    feature = get_field(features, target_key)
    if isinstance(feature, list) or hasattr(feature, 'feature'):
        raise OptionError(f'--target-key {target_key}: several labels an image are not supported; name another field')

    names = list(getattr(feature, 'names', None) or ())
    if not reader._source_names:  # of a stream, timm does not look at the features
        reader._source_names = dict(enumerate(names))
        if not reader.remap_class:
            reader.class_to_idx = {label: index for index, label in enumerate(names)}
    labels = set(range(len(names)))
    if kind(args) == 'hfds' and target_key in features:
        labels = set(reader.dataset.unique(target_key))
    if labels & {None, -1}:
        raise OptionError(f'{split_flag}: has images without a label; give a split that is labelled')
    if reader.remap_class:
        known = set(reader.class_to_idx)
        _check_class_map(args, {
            reader._source_names.get(label, label) for label in labels
            if not {label, reader._source_names.get(label)} & known
        })
        return
    text = [label for label in labels if isinstance(label, str)] or getattr(feature, 'dtype', '') == 'string'
    if text:
        raise OptionError(f'--target-key {target_key}: holds text; give --class-map, a file of its values in order')
    for label in labels:
        if not isinstance(label, numbers.Integral) or label < 0:
            raise OptionError(f'--target-key {target_key}: holds {label!r}; wanted: whole numbers from 0')
    reader.num_labels = max(labels, default=-1) + 1


def _check_shards(args, reader, split_flag):
    import webdataset as wds
    paths = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    if any(re.match(r'\w{2,}:', path) for path in paths):
        return  # pipes and remote files are opened by who reads them
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise OptionError(
            f'{split_flag}: --data-dir {reader.root} has no {os.path.relpath(missing[0], reader.root)} '
            f'({len(missing)} of {len(paths)} shards are missing)'
        )
    stages = wds.SimpleShardList(paths), wds.tarfile_to_samples(handler=wds.ignore_and_continue)
    sample = next(iter(wds.DataPipeline(*stages)), None)
    if sample is None:
        raise OptionError(f'{split_flag}: no sample can be read from the shards in --data-dir {reader.root}')
    fields = {name: value for name, value in sample.items() if not name.startswith('__')}
    if not any(name in fields for name in reader.input_key.split(';')):
        _check_field('--input-key', reader.input_key, fields)
    key = reader.target_key or reader.split_info.alt_label
    if key:
        _check_field('--target-key', key, json.loads(fields.get('json', '{}')) or fields)
        label = get_field(json.loads(fields['json']), key)
    elif 'cls' in fields:
        label = fields['cls'].decode()
    else:
        raise OptionError(f'--target-key: missing; {sample["__url__"]} has no .cls files; name a field of its .json')
    try:
        label = int(label)
    except (TypeError, ValueError):
        raise OptionError(f'--target-key {key or "cls"}: holds {label!r}; wds/ labels are whole numbers') from None
    if reader.remap_class and label >= 0:
        if not any(isinstance(name, int) for name in reader.class_to_idx):
            raise OptionError(
                f'--class-map {args.class_map}: holds names, wds/ labels are numbers; wanted: a .pkl of a dict from '
                'label to index'
            )
        _check_class_map(args, {label} - set(reader.class_to_idx))


def check_stream(args, stream):
    """Refuse what timm cannot do with a training stream on this many processes and workers.

    Raises:
        OptionError: naming the flag at fault.
    """
    reader, data = stream.reader, f'--dataset {args.dataset}'
    for dest in ('aug_repeats', 'aug_splits', 'naflex_loader', 'train_img_sizes', 'use_multi_epochs_loader'):
        if getattr(args, dest):
            raise OptionError(f'{flag(dest)}: {data} is a stream; give a dataset whose images can be picked by number')
    if kind(args) == 'tfds' and args.distributed and not args.workers:
        raise OptionError(f'--workers 0: {data} is split by workers; in several processes give at least 1')
    if kind(args) == 'hfids' and not reader.download and args.workers > 1:
        shards = getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', args.workers)
        if shards % args.world_size == 0:  # else every process reads all shards, and keeps its part of the samples
            shards //= args.world_size
        if shards < args.workers:
            raise OptionError(
                f'--workers {args.workers}: {data} has {shards} shards for that many workers of a process; '
                f'give --workers {shards}, or hfds/'
            )
