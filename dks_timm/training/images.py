"""timm's datasets for what a run meets on the way: images that cannot be read, labels that no output stands for.

`Images` are picked by number, a `Stream` comes as it comes.
"""
import logging
import numbers
import struct
from collections import deque
from functools import partial

import numpy as np
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset

from ..errors import DataError, out_of_memory, printable, why

_logger = logging.getLogger(__name__)

_TWISTER = struct.Struct('<625I')  # a state of Python's random.Random

# What a file raises that is not the image it says it is is anyone's guess: each decoder of Pillow has its own.
UNREADABLE = Exception

# Times that an image may be as long as it is wide. Resizing brings the shorter side up to the input size: an image of
# 1 x 65,500 pixels, a small file, would take gigabytes.
MOST_ELONGATED = 500


class BadImages:
    """Warns of images that cannot be read, and ends the run at more than so many in a row.

    Args:
        most: --max-bad-images.
        then: What happens in place of such an image, as the warning says it.
    """

    def __init__(self, most: int, then: str):
        self.most = most
        self.then = then
        self.in_a_row = 0
        self.named = set()
        self.name = ''  # of the last good image, where a stream knows it

    def good(self):
        self.in_a_row = 0

    def bad(self, name, error):
        """Name a bad image, once in a worker.

        Raises:
            DataError: if it is one too many. Where there is no memory left for it, that error.
        """
        self.in_a_row += 1
        name, reason = printable(name), why(error, 300)
        self.warn(name, f'Bad image {name}: {reason}; {self.then}.')
        if self.in_a_row > self.most:
            if isinstance(error, Exception) and out_of_memory(error):
                raise error
            raise DataError(
                f'--max-bad-images {self.most}: {self.in_a_row} images in a row cannot be read, the last is {name} '
                f'({reason}); repair or remove them, or allow more'
            ) from None

    def warn(self, about, message):
        if about not in self.named:
            self.named.add(about)
            _logger.warning(message)

    def convert(self, image, mode, name):
        """Bring an image to a Pillow mode, '' for its own.

        Of gray in 16 bits the upper 8 are kept, as Pillow itself keeps those of colour; else it takes all above 255 for
        white. The name is asked for where it is needed: a reader may have to read the file for it.

        Raises:
            ValueError: for pixels that have no meaning in 8 bits, and a shape that cannot be resized.
        """
        if max(image.size) > MOST_ELONGATED * min(image.size):
            raise ValueError(f'{image.width} x {image.height} pixels are too far from a square')
        if image.mode.startswith('I;16'):
            self.warn(image.mode, f'{printable(name())} has 16 bits a pixel; of all such images the upper 8 are used.')
            image = Image.fromarray((np.asarray(image) >> 8).astype('uint8'))
        elif image.mode in ('I', 'F'):
            low, high = image.getextrema()
            if low < 0 or high > 255 or image.mode == 'F' and 0 < high <= 1:
                raise ValueError(f'its pixels are numbers from {low:g} to {high:g}, not from 0 to 255')
        if mode:
            return image.convert(mode)
        image.load()
        return image


class Images(ImageDataset):
    """timm's ImageDataset, for whatever Pillow raises: an image that cannot be read gives way to the next one.

    Readable images come out as timm's do, and nothing random is drawn for the others.

    Args:
        reader: A timm reader; it may also give images that are decoded already.
        input_img_mode: Pillow mode that images are converted to.
        max_bad: Most unreadable images in a row.
    """

    def __init__(self, reader, input_img_mode: str, max_bad: int):
        super().__init__('', reader=reader, input_img_mode=input_img_mode)
        self.bad_images = BadImages(max_bad, 'the next one takes its place')
        self.num_classes = None  # set where it is known

    def __getitem__(self, index):
        while True:
            try:
                img, target = self.reader[index]
                if not isinstance(img, Image.Image):
                    img = Image.open(img)
                img = self.bad_images.convert(img, self.input_img_mode, partial(self._name, index))
                break
            except UNREADABLE as e:
                self.bad_images.bad(self._name(index), e)
                index = (index + 1) % len(self.reader)
        self.bad_images.good()
        check_label(target, self.num_classes, partial(self._name, index))
        if self.transform is not None:
            img = self.transform(img)
        return img, -1 if target is None else target

    def _name(self, index):
        return self.reader.filename(index, absolute=True) or f'number {index}'


def check_label(label, num_classes, name=lambda: ''):
    """Refuse a label that no output of the model stands for; no number of classes is no check."""
    if num_classes and not (isinstance(label, numbers.Integral) and 0 <= label < num_classes):
        of = f' ({printable(name())})' if name() else ''
        raise DataError(
            f'--num-classes {num_classes}: the data holds label {label!r}{of}; wanted: 0 to {num_classes - 1}')


class Synthetic(Images):
    """Transforms a few images once, in every worker, and gives them for all: data that takes no time beside a model."""

    def __init__(self, *args):
        super().__init__(*args)
        self.given = {}

    def __getitem__(self, index):
        key = self.transform, index % len(self.reader.images)
        if key not in self.given:
            self.given[key] = super().__getitem__(index)[0]
        return self.given[key], self.reader.label(index)


class Stream(IterableImageDataset):
    """timm's IterableImageDataset, with every sample in one process and one worker only.

    In training, timm gives each worker of each process its own shards, from which it reads as many whole batches as
    make up its part of an epoch; at the end it starts over with its shards to fill the last one. Here workers share
    out samples where there are too few shards for them. In evaluation every sample is read once.

    Args:
        reader: A timm reader of a stream.
        max_bad: Most unreadable images in a row; ``tfds/`` decodes on its own, and raises.
    """

    def __init__(self, reader, max_bad: int):
        super().__init__('', reader=reader)
        self.bad_images = BadImages(max_bad, 'passed over')
        self.num_classes = None  # set where it is known
        self.names = deque(maxlen=1 << 14)  # of the last images, '' where they have none
        self.shuffler_state = None  # to start from

    def __iter__(self):
        reader = self.reader
        # For training, tfds/ starts again in every epoch.
        if reader.ds is None and not getattr(reader, 'reinit_each_iter', False):
            self._start()
        count = 0
        for img, target in self._samples():
            self.bad_images.good()
            check_label(target, self.num_classes)
            self.names.append(self.bad_images.name)
            yield img if self.transform is None else self.transform(img), target
            count += 1
        if reader.is_training and count < reader._num_samples_per_worker():
            raise DataError('--train-split: a worker found no image that can be read in its shards')

    def take_names(self):
        """The names of the images that came since the last call, where they have any."""
        names = [name for name in self.names if name]
        self.names.clear()
        return names

    def random_state(self):
        """The state of the generator that samples of wds/ are shuffled by; others start from a seed in every epoch."""
        shuffler = self._shuffler()
        return shuffler.getstate() if shuffler else self.shuffler_state

    def set_random_state(self, state):
        self.shuffler_state = state

    def _shuffler(self):
        stages = getattr(self.reader.ds, 'pipeline', ())
        return next((stage.kw['rng'] for stage in stages if 'rng' in getattr(stage, 'kw', ())), None)

    def _samples(self):
        try:
            yield from self.reader
        except KeyError as e:
            if not self.reader.remap_class:
                raise
            raise DataError(f'--class-map: has no index for label {e}; add it, or leave it out of the data') from None

    def _start(self):
        """Let the reader open its pipeline in this worker, and then correct it."""
        reader = self.reader
        reader._lazy_init()
        if not reader.is_training:
            reader.dist_num_replicas = 1  # what timm cuts or pads the processes' shares to one length by
        if hasattr(reader.ds, 'pipeline'):  # wds/
            stages = reader.ds.pipeline  # [shards, ..., split, open shards, ..., decode, rename]
            if reader.is_training and len(reader.split_info.filenames) < reader.global_num_workers:
                i = stages.index(reader._split_by_node_and_worker)
                stages[i], stages[i + 1] = stages[i + 1], stages[i]  # split samples in place of shards
            decode, = stages[-2].args
            decode.keywords['image_mode'] = ''  # converted here
            stages[-2] = lambda samples: self._decode_wds(samples, decode)
            if self.shuffler_state:
                self._shuffler().setstate(self.shuffler_state)
        elif hasattr(reader.ds, 'cast_column'):  # hfids/
            feature = (reader.ds.features or {}).get(reader.input_key)
            if getattr(feature, 'decode', False):
                undecoded = reader.ds.cast_column(reader.input_key, type(feature)(decode=False))
                reader.ds = _Decoded(undecoded, reader.input_key, feature, self.bad_images, reader.input_img_mode)

    def _decode_wds(self, samples, decode):
        from timm.data.readers.reader_wds import WdsTargetKeyError
        key = self.reader.input_key.split(';')[0]
        for sample in samples:
            name = f'{sample["__key__"]} of {sample["__url__"]}'
            try:
                decoded = decode(sample)
                if decoded is None:  # timm's way to leave out a sample without a label
                    continue
                image = self.bad_images.convert(decoded['jpg'], self.reader.input_img_mode, partial(str, name))
            except WdsTargetKeyError as e:
                raise DataError(f'--target-key: {e}') from None
            except UNREADABLE as e:
                self.bad_images.bad(name, f'it has no {e}' if isinstance(e, KeyError) else e)
            else:
                self.bad_images.name = name
                yield {key: image, 'target': decoded['target']}


class _Decoded:
    """A Hugging Face IterableDataset whose images are decoded here, so that a bad one does not end it."""

    def __init__(self, ds, key, feature, bad_images, mode):
        self.ds, self.key, self.feature, self.bad_images, self.mode = ds, key, feature, bad_images, mode
        self.num_shards = getattr(ds, 'num_shards', None)
        self.set_epoch = ds.set_epoch

    def __iter__(self):
        for number, sample in enumerate(self.ds):
            value = sample[self.key]
            name = (value or {}).get('path') or f'number {number} of the stream'
            try:
                image = self.bad_images.convert(self.feature.decode_example(value), self.mode, partial(str, name))
            except UNREADABLE as e:
                self.bad_images.bad(name, e)
            else:
                self.bad_images.name = name
                yield {**sample, self.key: image}
