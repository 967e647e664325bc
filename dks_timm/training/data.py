"""timm's datasets and loaders, wired as in timm's trainer."""
import logging
import warnings
from functools import partial

import torch
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_loader,
    create_naflex_loader,
    create_transform,
    resolve_data_config,
)
from timm.loss import CLASS_WEIGHT_METHODS, load_class_stats
from torchvision.transforms import Compose, RandomCrop

from ..errors import OptionError, flag, given_flags, naming
from . import readers
from .config import mixup_active
from .device_data import DeviceLoader, decode
from .images import LabelEncoder, check_label
from .streams import Stream, check_stream

_logger = logging.getLogger(__name__)

# Flags of the training images that timm's loaders take by the same name.
LOADER_FLAGS = (
    'batch_size', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'worker_seeding')


def create_datasets(args):
    """Create the train dataset and, where --val-split names one, the evaluation dataset.

    Raises:
        OptionError: if the data is not there, or is not what the flags say, or holds more classes than --num-classes.
    """
    readers.check_dataset(args)
    train = readers.create(args, 'train', is_training=True, seed=args.seed, repeats=args.epoch_repeats)
    val = readers.create(args, 'val', is_training=False) if args.val_split else None
    if val is not None and class_to_idx(val) != class_to_idx(train):
        differ = sorted(map(str, set(class_to_idx(val)) ^ set(class_to_idx(train))))
        raise OptionError(
            f'--val-split {args.val_split}: its classes are not those of --train-split {args.train_split} '
            f'({", ".join(differ[:5]) or "another order"}); give the same folders, or --class-map'
        )
    check_num_classes(args.num_classes, train)
    return train, val


def class_to_idx(dataset):
    """Return the mapping of class names to indices, empty where the dataset has no names."""
    return getattr(dataset.reader, 'class_to_idx', None) or {}


def label_names(dataset):
    """Return class names in the order of the classifier's outputs, or None where not every output has one."""
    names = {index: str(name) for name, index in class_to_idx(dataset).items()}
    return [names[i] for i in range(len(names))] if names and set(names) == set(range(len(names))) else None


def check_num_classes(num_classes, dataset):
    """Refuse a model with too few classes for the data, and warn of one with more; None is not checked."""
    present = max(class_to_idx(dataset).values(), default=-1) + 1
    if num_classes is not None and num_classes < present:
        raise OptionError(f'--num-classes {num_classes}: the training data has {present} classes')
    if num_classes is not None and 0 < present < num_classes:
        _logger.warning(f'The model has {num_classes} classes, the training data {present} (--num-classes).')


def resolve_preprocessing(args, model, **kwargs):
    """Return timm's data_config, with the channels of --in-chans, which timm itself heeds beside --img-size only."""
    data_config = resolve_data_config(vars(args), model=model, **kwargs)
    channels, *size = data_config['input_size']
    return {**data_config, 'input_size': (args.in_chans or channels, *size)}


def encode_targets(args, dataset, num_classes: int) -> None:
    """Have a dataset check the target of an image, after a class map, and encode it as the task takes it."""
    if args.task == 'multilabel':
        encode = LabelEncoder(num_classes, dense=args.target_format == 'multihot')
    else:
        encode = partial(check_label, num_classes=num_classes)
    class_map = getattr(dataset, 'target_transform', None)
    dataset.target_transform = Compose([class_map, encode]) if class_map else encode
    if hasattr(dataset.reader, 'iter_targets'):  # at hand without an image: a wrong form is found before training
        with naming(f'--target-key {args.target_key or "label"}: the data holds a value of another type', TypeError):
            first = next(dataset.reader.iter_targets(), None)
        if first is not None:
            dataset.target_transform(first)


def class_stats(args, dataset, num_classes: int):
    """Return the number of images of each class and of all, or None where the loss asks for neither.

    They are those of --class-stats or, without it, of the training data (after :func:`encode_targets`), where labels
    can be had without the images.

    Raises:
        OptionError: There is no such file, or it is of other classes, or the data has to be read for its labels.
    """
    weights = ('loss_class_weight', 'loss_pos_weight')
    asked = [name for name in weights if {*(getattr(args, name) or ())} & {*CLASS_WEIGHT_METHODS}]
    asked += ['loss'] * (args.loss == 'db')
    if not asked:
        return None
    if args.class_stats:
        with naming(f'--class-stats {args.class_stats}', LookupError, OSError, TypeError, ValueError):
            counts, num_samples = load_class_stats(args.class_stats)
    else:
        reader = dataset.reader
        samples = getattr(reader, 'samples', reader if isinstance(reader, list) else None)
        if hasattr(reader, 'iter_targets'):
            targets = reader.iter_targets()
        elif hasattr(reader, 'targets'):  # of tars and of torchvision, a tensor, an array or a list
            targets = torch.as_tensor(reader.targets).tolist()
        elif samples is not None:
            targets = [sample[1] for sample in samples]
        else:
            raise OptionError(
                f'{flag(asked[0])}: needs counts of classes, which --dataset {args.dataset} does not tell; '
                'give --class-stats FILE, from class_weights.py of timm')
        counts, num_samples = torch.zeros(num_classes, dtype=torch.float64), 0
        for target in map(dataset.target_transform, targets):
            num_samples += 1
            if torch.is_tensor(target):  # several labels
                counts += target
            else:
                counts[target] += 1
    if len(counts) != num_classes:
        raise OptionError(f'--class-stats {args.class_stats}: is of {len(counts)} classes, the model of {num_classes}')
    return counts, num_samples


def model_dtype(args):
    """Return the dtype of weights and images, None for torch's own."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def create_loaders(args, train, val, data_config, model, accelerator):
    """Create timm's loaders of two datasets (``val`` may be None), by timm's ``data_config``.

    Returns:
        Train loader, evaluation loader or None, the Mixup that the loop has to apply itself or None, and the
        batch size that learning rate and gradients are scaled by.

    Raises:
        OptionError: for flags that these data, or this many processes, cannot have.
    """
    _check_loaders(args, train, data_config, accelerator)
    encode_targets(args, train, model.num_classes)
    train_kwargs = {**_common_kwargs(args, data_config, accelerator), **_train_kwargs(args, data_config)}
    mixup = _create_mixup(args, model.num_classes) if mixup_active(args) else None
    if args.data_on_device:
        create = partial(_create_device_loader, accelerator=accelerator)
    elif args.naflex_loader:
        create = partial(_create_naflex_loader, mixup=mixup, model=model, accelerator=accelerator)
    else:
        create = partial(_create_image_loader, mixup=mixup)
    names = 'train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'naflex_patch_sizes', 'naflex_patch_size_probs'
    sizes = given_flags(args, *names)
    with naming(sizes, *[AssertionError, ValueError] * bool(sizes)):  # timm's checks of them
        loader_train = create(args, train, data_config, train_kwargs)
    loader_eval = create_eval_loader(args, val, data_config, model, accelerator) if val is not None else None
    if not len(loader_train):
        raise OptionError(f'--batch-size {args.batch_size}: the training split does not fill one batch')
    if isinstance(train, Stream):
        count, of = len(train) * accelerator.num_processes, train.reader.num_samples
        _logger.info(f'An epoch of {args.dataset} is {count:,} images, of {of:,}: whole batches for every worker.')
        # torch takes it for a mistake that processes have different shares.
        warnings.filterwarnings('ignore', 'Length of IterableDataset')
    scheduled = args.train_img_sizes is not None
    batch_size = loader_train.batch_sampler.average_batch_size if scheduled else float(args.batch_size)
    return loader_train, loader_eval, mixup if type(mixup) is Mixup else None, batch_size


def create_eval_loader(args, dataset, data_config, model, accelerator, **kwargs):
    """Create timm's loader of the images of an evaluation, by timm's ``data_config``; kwargs are arguments of it."""
    encode_targets(args, dataset, model.num_classes)
    kwargs = {
        **_common_kwargs(args, data_config, accelerator), **_eval_kwargs(args, data_config, accelerator), **kwargs}
    if args.data_on_device:
        transform = create_transform(
            data_config['input_size'], crop_pct=data_config['crop_pct'], interpolation=data_config['interpolation'],
            use_prefetcher=True)
        return _device_loader(
            args, dataset, transform, f'--val-split {args.val_split}', data_config, accelerator,
            batch_size=kwargs['batch_size'], is_training=False)
    if args.naflex_loader:
        return create_naflex_loader(
            dataset, patch_size=_patch_size(model), max_seq_len=args.naflex_max_seq_len,
            **_patch_layout(args, data_config), **kwargs)
    return create_loader(dataset, input_size=data_config['input_size'], **kwargs)


def _check_loaders(args, train, data_config, accelerator):
    if args.aug_repeats and accelerator.num_processes == 1:
        raise OptionError(f'--aug-repeats {args.aug_repeats:g}: repeats over several processes, and this is one')
    if isinstance(train, Stream):
        check_stream(args, train, accelerator)
    channels, *size = data_config['input_size']
    if args.no_prefetcher and len(data_config['mean']) != channels:
        raise OptionError(f'--no-prefetcher: needs --mean and --std for images of {channels} channels')
    size = min(size)
    if args.train_pad is not None and args.train_pad >= size:
        raise OptionError(f'--train-pad {args.train_pad}: must be below the image size {size}')
    if args.aa:
        with naming(f'--aa {args.aa}', AssertionError, ValueError):
            create_transform(data_config['input_size'], is_training=True, auto_augment=args.aa)


def _common_kwargs(args, data_config, accelerator):
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype(args) or torch.float32,
        device=accelerator.device,
        distributed=accelerator.num_processes > 1,
        use_prefetcher=args.prefetcher,
    )


def _train_kwargs(args, data_config):
    """Return the arguments for timm's train loader that say how to augment and batch."""
    fixed = args.no_aug or not args.train_interpolation
    return dict(
        **{name: getattr(args, name) for name in LOADER_FLAGS},
        is_training=True,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=data_config['interpolation'] if fixed else args.train_interpolation,
        num_workers=args.workers,
    )


def _eval_kwargs(args, data_config, accelerator):
    # Streams cannot be divided evenly between many workers of many processes.
    few_workers = accelerator.num_processes > 1 and readers.kind(args) in ('tfds', 'wds')
    return dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        num_workers=min(2, args.workers) if few_workers else args.workers,
        crop_pct=data_config['crop_pct'],
    )


def _create_mixup(args, num_classes: int):
    """Return a Mixup for the loop to apply, or one that the loader applies as it collates."""
    kwargs = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        multi_label=args.task == 'multilabel',
    )
    if args.naflex_loader:
        return NaFlexMixup(**kwargs)
    mixup = FastCollateMixup if args.prefetcher and not args.data_on_device else Mixup
    return mixup(mode=args.mixup_mode, cutmix_minmax=args.cutmix_minmax, **kwargs)


def _create_image_loader(args, train, data_config, train_kwargs, mixup):
    if args.aug_splits:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    loader = create_loader(
        train,
        input_size=data_config['input_size'],
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        collate_fn=mixup if isinstance(mixup, FastCollateMixup) else None,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **train_kwargs,
    )
    if args.train_pad is not None:
        # In place of the resized crop, which comes first.
        train.transform.transforms[:1] = [
            *_fit(data_config, train_kwargs['interpolation']).transforms[:-1],
            RandomCrop(data_config['input_size'][1:], padding=args.train_pad, padding_mode='reflect'),
        ]
    return loader


def _fit(data_config, interpolation, **kwargs):
    """Return the transform that resizes an image's shorter side to the input size and crops the middle of the other."""
    if interpolation == 'random':
        interpolation = data_config['interpolation']
    return create_transform(
        data_config['input_size'], crop_pct=1.0, interpolation=interpolation, use_prefetcher=True, **kwargs)


def _create_device_loader(args, train, data_config, train_kwargs, accelerator):
    transform = _fit(data_config, train_kwargs['interpolation'], is_training=args.no_aug, no_aug=args.no_aug)
    moves = {} if args.no_aug else dict(pad=args.train_pad, hflip=args.hflip, vflip=args.vflip)
    return _device_loader(
        args, train, transform, f'--train-split {args.train_split}', data_config, accelerator,
        batch_size=args.batch_size, is_training=True, **moves)


def _device_loader(args, dataset, transform, split, data_config, accelerator, **kwargs):
    return DeviceLoader(
        dataset,
        *decode(dataset, transform, data_config['input_size'], accelerator.device, args.workers, split),
        mean=data_config['mean'],
        std=data_config['std'],
        dtype=model_dtype(args) or torch.float32,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **kwargs,
    )


def _create_naflex_loader(args, train, data_config, train_kwargs, mixup, model, accelerator):
    patches = dict(patch_size=_patch_size(model))
    if args.naflex_patch_sizes:
        patches = dict(patch_size_choices=args.naflex_patch_sizes, patch_size_choice_probs=args.naflex_patch_size_probs)
    return create_naflex_loader(
        train,
        train_seq_lens=args.naflex_train_seq_lens,
        mixup_fn=mixup,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **patches,
        **_patch_layout(args, data_config),
        **train_kwargs,
    )


def _patch_size(model):
    return model.get_patch_size() if hasattr(model, 'get_patch_size') else (16, 16)


def _patch_layout(args, data_config):
    return dict(patchify_channels_last=not args.naflex_patchify_channels_first, channels=data_config['input_size'][0])
