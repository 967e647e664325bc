"""Images of a dataset: an unreadable one is named in a warning, and the next one takes its place."""
import logging
import numbers
import tarfile

import numpy as np
from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget
from torch.utils.data import Dataset

from ..errors import DataError, printable, why

_logger = logging.getLogger(__name__)


class BadImage(OSError):
    """An image that cannot be decoded."""


class BadImages:
    """Warns of images that cannot be read, and ends the run at more than so many in a row.

    Args:
        most: Value of --max-bad-images.
        then: What happens in place of such an image, for the warning.
    """

    def __init__(self, most: int, then: str):
        self.most, self.then = most, then
        self.in_a_row = 0
        self.named = set()

    def add(self, name: str, error: Exception):
        """Warn of an image, once in a process; raise DataError if it is one too many in a row."""
        self.in_a_row += 1
        name, reason = printable(name), why(error, 300)
        if name not in self.named:
            self.named.add(name)
            _logger.warning(f'Bad image {name}: {reason}; {self.then}.')
        if self.in_a_row > self.most:
            raise DataError(
                f'--max-bad-images {self.most}: {self.in_a_row} images in a row cannot be read, the last is {name} '
                f'({reason}); repair or remove them, or allow more'
            ) from None


def decode(image, mode: str) -> Image.Image:
    """Decode an image file, unless it is a Pillow image already, and convert it to a mode; '' keeps its own.

    Raises:
        BadImage: for whatever Pillow raises: of a broken file, each of its decoders raises what it happens to stumble
            over (KeyError, SyntaxError, struct.error, ...), and documents none of it.
    """
    try:
        image = image if isinstance(image, Image.Image) else Image.open(image)
        image.load()
        return image.convert(mode) if mode else image
    except Exception as e:
        raise BadImage(why(e, 300)) from e


def check_label(label, num_classes: int):
    """Return a label, and refuse one that no output of the model stands for."""
    if isinstance(label, (list, tuple)):
        raise DataError(f'--task classification: the data holds the labels {label!r} of one image; give multilabel')
    if not (isinstance(label, numbers.Integral) and 0 <= label < num_classes):
        raise DataError(
            f'--num-classes {num_classes}: the data holds label {label!r}; '
            f'wanted: 0 to {num_classes - 1}, or a --class-map to these')
    return label


class LabelEncoder(MultiLabelTarget):
    """timm's encoder of several labels as (num_classes,), whose refusals name the flags."""

    def __call__(self, target):
        try:
            return super().__call__(target)
        except (RuntimeError, TypeError, ValueError) as e:  # torch's of what is no list of numbers, and timm's
            form, wanted = 'multihot', 'so many numbers from 0 to 1; lists of class indices are --target-format indices'
            if not self.dense:
                form, wanted = 'indices', 'a list of class indices; vectors of 0 and 1 are --target-format multihot'
            raise DataError(
                f'--target-format {form} with --num-classes {self.num_classes}: the data holds {target!r}; '
                f'wanted: {wanted}, and a single index is without --task multilabel') from e


class Images(ImageDataset):
    """timm's ImageDataset, which passes over files of any kind that cannot be decoded, and names them.

    Readable images come out as timm's do, and nothing random is drawn for the others. The reader is one of timm's or a
    dataset of torchvision, of files or of images that are decoded already; ``max_bad`` is --max-bad-images.
    """

    def __init__(self, reader, input_img_mode: str, max_bad: int, target_transform=None):
        super().__init__('', reader=reader, input_img_mode=input_img_mode, target_transform=target_transform)
        self.bad_images = BadImages(max_bad, 'the next one takes its place')

    def __getitem__(self, index):
        while True:
            try:
                image, target = self.reader[index]
                image = decode(image, self.input_img_mode)
                break
            except (AssertionError, OSError, tarfile.TarError) as e:  # timm's ReaderHfds asserts that there is a file
                self.bad_images.add(self._name(index), e)
                index = (index + 1) % len(self.reader)
        self.bad_images.in_a_row = 0
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image if self.transform is None else self.transform(image), target

    def _name(self, index):
        if hasattr(self.reader, 'filename'):
            name = self.reader.filename(index, absolute=True)
        else:  # of torchvision, image_folder has names
            name = self.reader.samples[index][0] if hasattr(self.reader, 'samples') else ''
        return name or f'number {index}'


class Synthetic(Dataset):
    """Random pixels under all labels in turn, which take no time beside a model.

    A few images come again and again; each worker transforms them once.
    """
    reader = None  # neither files nor names of classes

    def __init__(self, count: int, num_classes: int, mode: str, seed: int):
        self.count, self.num_labels = count, num_classes
        # More than one, as BatchNorm magnifies what is left of a batch in which all images are the same.
        pixels = np.random.default_rng(seed).integers(256, size=(16, 256, 256, 3), dtype='uint8')
        self.images = [Image.fromarray(p).convert(mode) for p in pixels]
        self.transform = None
        self.transformed = {}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        number = index % len(self.images)
        key = self.transform, number
        if key not in self.transformed:
            image = self.images[number]
            self.transformed[key] = image if self.transform is None else self.transform(image)
        return self.transformed[key], index % self.num_labels
