"""Datasets that are read in order, divided over processes and workers."""
from functools import partial

from timm.data import IterableImageDataset

from ..errors import DataError, OptionError, flag
from .images import BadImage, BadImages, check_label, decoding


class Stream(IterableImageDataset):
    """timm's IterableImageDataset, with every sample in one process and one worker only.

    In training, timm gives each worker of each process its own shards. The worker reads its part of an epoch from
    them, in whole batches, and starts over where they end. With fewer shards than workers, all of them read all shards
    here, and each keeps its part of the samples. In evaluation every sample is read once.

    Args:
        reader: A reader of timm for a stream.
        max_bad: Most unreadable images in a row; ``tfds/`` decodes on its own, and raises.
    """

    def __init__(self, reader, max_bad: int):
        super().__init__('', reader=reader)
        self.bad_images = BadImages(max_bad, 'passed over')
        self.num_classes = None  # set once the model is known
        self.shuffler_state = None  # to start from

    def __iter__(self):
        reader = self.reader
        # For training, tfds/ starts again in every epoch.
        if reader.ds is None and not getattr(reader, 'reinit_each_iter', False):
            self._start()
        count = 0
        for img, target in reader:
            self.bad_images.in_a_row = 0
            check_label(target, self.num_classes)
            yield img if self.transform is None else self.transform(img), target
            count += 1
        if reader.is_training and count < reader._num_samples_per_worker():  # private: timm Reader
            raise DataError('--train-split: a worker found no image that can be read in its shards')

    def random_state(self):
        """Return the state of the shuffler of ``wds/``; other readers start from a seed in every epoch."""
        shuffler = self._shuffler()
        return shuffler.getstate() if shuffler else self.shuffler_state

    def set_random_state(self, state):
        self.shuffler_state = state

    def _shuffler(self):
        stages = getattr(self.reader.ds, 'pipeline', ())
        # private: webdataset PipelineStage.kw
        return next((stage.kw['rng'] for stage in stages if 'rng' in getattr(stage, 'kw', ())), None)

    def _start(self):
        """Let the reader open its pipeline in this worker; then correct its shares, and decode images here."""
        self.reader._lazy_init()  # private: timm ReaderHfids, ReaderTfds, ReaderWds
        if not self.reader.is_training:
            self.reader.dist_num_replicas = 1  # else timm cuts or pads the processes' shares to one length
        if hasattr(self.reader.ds, 'pipeline'):
            self._correct_wds(self.reader)
        elif hasattr(self.reader.ds, 'cast_column'):
            self._correct_hfids(self.reader)

    def _correct_wds(self, reader):
        # private: timm ReaderWds; webdataset's stages are [shards, ..., split, open shards, ..., decode, rename]
        stages = reader.ds.pipeline
        if reader.is_training and len(reader.split_info.filenames) < reader.global_num_workers:
            i = stages.index(reader._split_by_node_and_worker)
            stages[i], stages[i + 1] = stages[i + 1], stages[i]  # split samples in place of shards
        decode, = stages[-2].args
        decode.keywords['image_mode'] = ''  # converted here

        def decode_and_rename(sample):
            decoded = decode(sample)  # None for a sample that timm leaves out, as it has no label
            return decoded and dict(image=decoded['jpg'], target=decoded['target'])

        stages[-2:] = [partial(self._readable, 'image', decode_and_rename)]
        if self.shuffler_state:
            self._shuffler().setstate(self.shuffler_state)

    def _correct_hfids(self, reader):
        key = reader.input_key
        feature = (reader.ds.features or {}).get(key)
        if getattr(feature, 'decode', False):
            undecoded = reader.ds.cast_column(key, type(feature)(decode=False))
            reader.ds = _Decoded(undecoded, partial(
                self._readable, key, lambda sample: {**sample, key: feature.decode_example(sample[key])}))

    def _readable(self, key: str, decode, samples):
        """Yield samples with their images, ``sample[key]``, decoded and converted; pass over the unreadable ones."""
        for number, sample in enumerate(samples):
            if '__url__' in sample:
                name = f'{sample["__key__"]} of {sample["__url__"]}'
            else:
                name = (sample[key] or {}).get('path') or f'number {number} of the stream'
            try:
                with decoding():
                    decoded = decode(sample)
                if decoded is None:
                    continue
                decoded[key] = self.bad_images.convert(decoded[key], self.reader.input_img_mode, partial(str, name))
            except BadImage as e:
                self.bad_images.add(name, e)
            else:
                yield decoded


class _Decoded:
    """A Hugging Face IterableDataset whose images are decoded outside of it, so that a bad one does not end it."""

    def __init__(self, ds, decode):
        self.ds, self.decode = ds, decode
        self.set_epoch = ds.set_epoch

    def __iter__(self):
        return self.decode(self.ds)


def check_stream(args, stream: Stream, accelerator):
    """Refuse flags that a training stream cannot heed on this many processes and workers.

    Raises:
        OptionError: naming the flag at fault.
    """
    reader, data = stream.reader, f'--dataset {args.dataset}'
    refused = (
        'aug_repeats', 'aug_splits', 'data_on_device', 'naflex_loader', 'train_img_sizes', 'use_multi_epochs_loader')
    for dest in refused:
        if getattr(args, dest):
            raise OptionError(f'{flag(dest)}: {data} is a stream; give a dataset whose images can be picked by number')
    if hasattr(reader, 'reinit_each_iter') and accelerator.num_processes > 1 and not args.workers:  # tfds/
        raise OptionError(f'--workers 0: {data} is split by workers; in several processes give at least 1')
    if hasattr(reader, 'download') and not reader.download and args.workers > 1:  # hfids/
        shards = getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', args.workers)
        if shards % accelerator.num_processes == 0:  # else every process reads all shards, and keeps a part of each
            shards //= accelerator.num_processes
        if shards < args.workers:
            raise OptionError(
                f'--workers {args.workers}: {data} has {shards} shards for that many workers of a process; '
                f'give --workers {shards}, or hfds/'
            )
