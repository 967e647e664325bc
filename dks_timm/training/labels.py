"""The fields that a reader takes images and labels from, and ``--class-map``, checked before the first batch."""
import json
import numbers
import os
import re

from timm.data.readers import class_map as timm_class_map
from timm.data.readers.targets import get_field, has_field

from ..errors import UNREADABLE, DataError, OptionError, naming, out_of_memory


class ClassMap(dict):
    """Indices of class names or labels, read from --class-map. Asking for one that it lacks is an error that says so.

    Args:
        path: A .txt or .pkl file, as timm's readers take it.
        root: Folder of the images, which the path may start from.

    Raises:
        OptionError: if it is not there or not a class map.
    """

    def __init__(self, path: str, root: str = ''):
        self.path = path
        wanted = 'wanted: a .txt of one class name a line, or a .pkl of a dict from name or label to index'
        try:
            super().__init__(timm_class_map.load_class_map(path, root))
        except UNREADABLE as e:
            if out_of_memory(e):
                raise
            raise OptionError(f'--class-map {path}: {" ".join(str(e).split())}; {wanted}') from e
        self.pop('', None)  # of an empty line
        for name, index in self.items():
            if not isinstance(index, int) or index < 0:
                raise OptionError(f'--class-map {path}: the index of "{name}" is {index!r}; {wanted}')
        if not self:
            raise OptionError(f'--class-map {path}: is empty; {wanted}')

    def __missing__(self, name):
        self.require([name])

    def require(self, names):
        """Refuse data with classes that the map has no index for: timm would leave them out, or stumble over them."""
        missing = sorted((name for name in names if name not in self), key=str)
        if missing:
            shown = ', '.join(map(str, missing[:5])) + (', ...' if len(missing) > 5 else '')
            form = '' if isinstance(missing[0], str) else ' (in a .pkl, as they are numbers)'
            raise DataError(
                f'--class-map {self.path}: has no index for {len(missing)} of the classes in the data ({shown}); '
                f'add them{form}, or leave them out of the data'
            )


def check_huggingface(reader, split_flag: str):
    """Refuse fields and labels that timm cannot train on, and give the reader the number and names of the classes.

    Args:
        reader: timm's ReaderHfds or ReaderHfids.
        split_flag: Flag and value of the split, for messages.

    Raises:
        OptionError: naming the flag at fault.
    """
    streamed = hasattr(reader, 'builder')
    if streamed:
        input_key, target_key = reader.input_key, reader.target_key
        with naming(split_flag, OSError, ValueError):
            stream = reader.builder.as_streaming_dataset(split=reader.split)
            features = stream.features or next(iter(stream), {})  # a sample, where the format has no features
    else:
        input_key, target_key, features = reader.image_key, reader.label_key, dict(reader.dataset.features)
        if reader.dataset.select_columns(input_key)[0][input_key] is None:  # timm adds an empty one where it is missing
            del features[input_key]
    _check_field('--input-key', input_key, features)
    _check_field('--target-key', target_key, features)
    image, feature = get_field(features, input_key), get_field(features, target_key)
    if not hasattr(image, 'decode_example') and not hasattr(image, 'convert'):
        raise OptionError(f'--input-key {input_key}: the field holds no images')
    if isinstance(feature, list) or hasattr(feature, 'feature'):
        raise OptionError(f'--target-key {target_key}: several labels an image are not supported; name another field')

    names = list(getattr(feature, 'names', None) or ())
    if not reader._source_names:  # private: timm ReaderHfids, which does not look at the features of a stream
        reader._source_names = dict(enumerate(names))
        if not reader.remap_class:
            reader.class_to_idx = {label: index for index, label in enumerate(names)}
    labels = set(range(len(names)))
    if not streamed and target_key in features:
        labels = set(reader.dataset.unique(target_key))
    if labels & {None, -1}:
        raise OptionError(f'{split_flag}: has images without a label; give a split that is labelled')
    if reader.remap_class:
        mapped = reader.class_to_idx
        mapped.require(label if label in mapped else reader._source_names.get(label, label) for label in labels)
        return
    if getattr(feature, 'dtype', '') == 'string':
        raise OptionError(f'--target-key {target_key}: holds text; give --class-map, a file of its values in order')
    for label in labels:
        if not isinstance(label, numbers.Integral) or label < 0:
            raise OptionError(f'--target-key {target_key}: holds {label!r}; wanted: whole numbers from 0')
    reader.num_labels = max(labels, default=-1) + 1


def check_shards(reader, split_flag: str):
    """Refuse shards of webdataset that are missing, and keys and a class map that do not fit their first sample.

    Shards that are not files of this machine are opened in training only.
    """
    import webdataset as wds
    paths = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    if any(re.match(r'\w{2,}:', path) for path in paths):
        return
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
        meta = json.loads(fields.get('json', '{}'))
        _check_field('--target-key', key, meta or fields)
        label = get_field(meta, key)
    elif 'cls' in fields:
        label = fields['cls'].decode()
    else:
        raise OptionError('--target-key: missing; the shards have no .cls files; name a field of their .json')
    try:
        label = int(label)
    except (TypeError, ValueError):
        raise OptionError(f'--target-key {key or "cls"}: holds {label!r}; wds/ labels are whole numbers') from None
    if reader.remap_class and label >= 0:
        reader.class_to_idx.require([label])


def check_tfds(reader, split_flag: str):
    """Refuse keys of fields that a TensorFlow dataset does not have."""
    _check_field('--input-key', reader.input_key, reader.builder.info.features)
    _check_field('--target-key', reader.target_key, reader.builder.info.features)


def _check_field(flag_name: str, key: str, fields):
    if not has_field(fields, key):
        raise OptionError(f'{flag_name} {key}: the data has no such field; it has {", ".join(sorted(fields))}')


CHECKS = dict(hfds=check_huggingface, hfids=check_huggingface, wds=check_shards, tfds=check_tfds)
