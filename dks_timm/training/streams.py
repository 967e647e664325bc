"""Datasets that are read in order, divided over processes and workers."""
from timm.data import IterableImageDataset

from ..errors import DataError, OptionError, flag, why
from .images import BadImages


class Stream(IterableImageDataset):
    """timm's IterableImageDataset, with every sample in one process and one worker only.

    In training, timm gives each worker of each process its own shards. The worker reads its part of an epoch from
    them, in whole batches, and starts over where they end. With fewer shards of ``wds/`` than workers, all of them read
    all shards here, and each keeps its part of the samples. In evaluation every sample is read once."""

    def __init__(self, reader, max_bad: int):
        super().__init__('', reader=reader)
        self.bad_images = BadImages(max_bad, 'passed over')
        self.shuffler_state = None  # to start from

    def __iter__(self):
        # For training, tfds/ starts again in every epoch.
        if self.reader.ds is None and not getattr(self.reader, 'reinit_each_iter', False):
            self._start()
        empty = True
        for image, target in super().__iter__():
            empty, self.bad_images.in_a_row = False, 0
            yield image, target
        if empty and self.reader.is_training:
            raise DataError('--train-split: a worker found no image that can be read in its shards')

    def random_state(self):
        """Return the state of the shuffler of ``wds/``; other readers start from a seed in every epoch."""
        shuffler = self._shuffler()
        return shuffler.getstate() if shuffler else self.shuffler_state

    def set_random_state(self, state):
        """Have the shuffler start from a state."""
        self.shuffler_state = state

    def _shuffler(self):
        stages = getattr(self.reader.ds, 'pipeline', ())
        # private: webdataset FilterFunction.kw
        return next((stage.kw['rng'] for stage in stages if 'rng' in getattr(stage, 'kw', ())), None)

    def _start(self):
        """Let the reader open its pipeline in this worker; then correct its shares, and name bad images."""
        reader = self.reader
        try:
            reader._lazy_init()  # private: timm ReaderHfids, ReaderTfds, ReaderWds
        except RuntimeError as e:  # of ReaderHfids, for more workers than shards
            raise DataError(f'--workers: {why(e)}') from e
        if not reader.is_training:
            reader.dist_num_replicas = 1  # else timm cuts or pads the processes' shares to one length
        if hasattr(reader.ds, 'pipeline'):
            self._correct_wds(reader)
        elif hasattr(reader.ds, 'cast_column'):
            self._correct_hfids(reader)

    def _correct_wds(self, reader):
        import webdataset
        # private: timm ReaderWds, whose stages are [shards, ..., split, open shards, ..., decode, rename]
        stages = reader.ds.pipeline
        if reader.is_training and len(reader.split_info.filenames) < reader.global_num_workers:
            i = stages.index(reader._split_by_node_and_worker)
            stages[i], stages[i + 1] = stages[i + 1], stages[i]  # split samples in place of shards
        timms_decode, = stages[-2].args  # private: webdataset FilterFunction.args

        def decode(sample):
            try:
                decoded = timms_decode(sample)  # None for a sample that timm leaves out, as it has no label
            except Exception as e:  # whatever a decoder stumbles over
                self.bad_images.add(f'{sample["__key__"]} of {sample["__url__"]}', e)
                return None
            return decoded and dict(image=decoded['jpg'], target=decoded['target'])

        stages[-2:] = [webdataset.map(decode)]  # which leaves out what is None
        if self.shuffler_state:
            self._shuffler().setstate(self.shuffler_state)

    def _correct_hfids(self, reader):
        key = reader.input_key
        feature = (reader.ds.features or {}).get(key)

        def decode(sample):
            try:
                return {key: feature.decode_example(sample[key])}
            except Exception as e:  # whatever a decoder stumbles over
                self.bad_images.add((sample[key] or {}).get('path') or 'without a name', e)
                return {key: None}

        if hasattr(feature, 'decode_example'):
            undecoded = reader.ds.cast_column(key, type(feature)(decode=False))
            reader.ds = undecoded.map(decode).filter(lambda sample: sample[key] is not None)


def check_stream(args, stream: Stream, accelerator):
    """Refuse flags that a training stream cannot heed; raise OptionError naming the flag."""
    data = f'--dataset {args.dataset}'
    refused = (
        'aug_repeats', 'aug_splits', 'data_on_device', 'naflex_loader', 'train_img_sizes', 'use_multi_epochs_loader')
    for dest in refused:
        if getattr(args, dest):
            raise OptionError(f'{flag(dest)}: {data} is a stream; give a dataset whose images can be picked by number')
    if args.dataset.lower().startswith('tfds/') and accelerator.num_processes > 1 and not args.workers:
        raise OptionError(f'--workers 0: {data} is split by workers; in several processes give at least 1')
