"""Images of a dataset: an unreadable one is named in a warning, and the next one takes its place."""
import contextlib
import logging
import numbers
import tarfile
from functools import partial

import numpy as np
from PIL import Image
from timm.data import ImageDataset

from ..errors import DataError, out_of_memory, printable, why

_logger = logging.getLogger(__name__)

# Resizing brings the shorter side up to the input size: an image of 1 x 65,500 pixels, a small file, would take
# gigabytes.
MOST_ELONGATED = 500


class BadImage(ValueError):
    """An image that cannot be decoded, or not be used."""


@contextlib.contextmanager
def decoding():
    """Raise BadImage for whatever a decoder raises.

    For a broken file each decoder of Pillow raises what it happens to stumble over (KeyError, SyntaxError,
    struct.error, ...) and documents none of it.
    """
    try:
        yield
    except Exception as e:
        raise BadImage(why(e, 300)) from e


class BadImages:
    """Warns of images that cannot be read, and ends the run at more than so many in a row.

    Args:
        most: Value of --max-bad-images.
        then: What happens in place of such an image, for the warning.
    """

    def __init__(self, most: int, then: str):
        self.most = most
        self.then = then
        self.in_a_row = 0
        self.named = set()

    def add(self, name: str, error: Exception):
        """Warn of an image, once in a process.

        Raises:
            DataError: if it is one too many in a row.
            Exception: the decoder's, if memory ran out and it is one too many.
        """
        self.in_a_row += 1
        name, reason = printable(name), why(error, 300)
        self.warn(name, f'Bad image {name}: {reason}; {self.then}.')
        if self.in_a_row > self.most:
            if error.__cause__ and out_of_memory(error.__cause__):
                raise error.__cause__
            raise DataError(
                f'--max-bad-images {self.most}: {self.in_a_row} images in a row cannot be read, the last is {name} '
                f'({reason}); repair or remove them, or allow more'
            ) from None

    def warn(self, about: str, message: str):
        """Log a warning, the first time that it is about this."""
        if about not in self.named:
            self.named.add(about)
            _logger.warning(message)

    def convert(self, image, mode: str, name):
        """Convert an image to a Pillow mode, '' for its own.

        Of gray in 16 bits the upper 8 are kept, as Pillow keeps those of colour; its conversion of gray takes all
        values above 255 for white.

        Args:
            image: A Pillow image, decoded or not.
            mode: As of ``Image.convert``.
            name: Returns the image's name. Some readers read the file for it, so it is called only for a warning.

        Raises:
            BadImage: if it cannot be decoded, has pixels that have no meaning in 8 bits, or is no shape to resize.
        """
        if max(image.size) > MOST_ELONGATED * min(image.size):
            raise BadImage(f'{image.width} x {image.height} pixels are too far from a square')
        with decoding():
            image.load()
        if image.mode.startswith('I;16'):
            self.warn(image.mode, f'{printable(name())} has 16 bits a pixel; of all such images the upper 8 are used.')
            image = Image.fromarray((np.asarray(image) >> 8).astype('uint8'))
        elif image.mode in ('I', 'F'):
            low, high = image.getextrema()
            if low < 0 or high > 255 or image.mode == 'F' and 0 < high <= 1:
                raise BadImage(f'its pixels are numbers from {low:g} to {high:g}, not from 0 to 255')
        with decoding():
            return image.convert(mode) if mode else image


class Images(ImageDataset):
    """timm's ImageDataset, with BadImages in place of its retries.

    Readable images come out as timm's do, and nothing random is drawn for the others.

    Args:
        reader: A reader of timm, which may also return images that are decoded already.
        input_img_mode: Pillow mode that images are converted to.
        max_bad: Most unreadable images in a row.
    """

    def __init__(self, reader, input_img_mode: str, max_bad: int):
        super().__init__('', reader=reader, input_img_mode=input_img_mode)
        self.bad_images = BadImages(max_bad, 'the next one takes its place')
        self.num_classes = None  # set once the model is known

    def __getitem__(self, index):
        while True:
            try:
                image, target = self.reader[index]
                if not isinstance(image, Image.Image):
                    with decoding():
                        image = Image.open(image)
                image = self.bad_images.convert(image, self.input_img_mode, partial(self._name, index))
                break
            except (AssertionError, BadImage, OSError, tarfile.TarError) as e:  # timm's ReaderHfds asserts a file
                self.bad_images.add(self._name(index), e)
                index = (index + 1) % len(self.reader)
        self.bad_images.in_a_row = 0
        check_label(target, self.num_classes, partial(self._name, index))
        if self.transform is not None:
            image = self.transform(image)
        return image, -1 if target is None else target

    def _name(self, index):
        return self.reader.filename(index, absolute=True) or f'number {index}'


class Synthetic(Images):
    """Transforms a few images once in every worker and returns them for all: data that take no time beside a model."""

    def __init__(self, *args):
        super().__init__(*args)
        self.transformed = {}

    def __getitem__(self, index):
        key = self.transform, index % len(self.reader.images)
        if key not in self.transformed:
            self.transformed[key] = super().__getitem__(index)[0]
        return self.transformed[key], self.reader.label(index)


def check_label(label, num_classes, name=lambda: ''):
    """Refuse a label that no output of the model stands for; without a number of classes, any will do."""
    if num_classes and not (isinstance(label, numbers.Integral) and 0 <= label < num_classes):
        of = f' ({printable(name())})' if name() else ''
        raise DataError(
            f'--num-classes {num_classes}: the data holds label {label!r}{of}; wanted: 0 to {num_classes - 1}')
