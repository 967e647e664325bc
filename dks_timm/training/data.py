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
)
from torchvision.transforms import RandomCrop

from ..errors import OptionError, naming
from . import readers
from .config import mixup_active
from .device_data import DeviceLoader, check_fit, decode
from .images import Stream

_logger = logging.getLogger(__name__)


def create_datasets(args):
    """Create the train dataset and, where --val-split names one, the evaluation dataset.

    Raises:
        OptionError: if the data is not there, or is not what the flags say, or holds more classes than --num-classes.
    """
    if args.data and not args.data_dir:
        args.data_dir = args.data
    readers.check_dataset(args)
    train = readers.create(args, 'train', is_training=True, seed=args.seed, repeats=args.epoch_repeats)
    val = readers.create(args, 'val', is_training=False) if args.val_split else None
    if val is not None and class_to_idx(val) != class_to_idx(train):
        differ = sorted(map(str, set(class_to_idx(val) or ()) ^ set(class_to_idx(train) or ())))
        names = ', '.join(differ[:5]) + (', ...' if len(differ) > 5 else '')
        raise OptionError(
            f'--val-split {args.val_split}: its classes are not those of --train-split {args.train_split} '
            f'({f"{names} in one of them only" if differ else "they are in another order"}); give the same folders, or '
            '--class-map'
        )
    check_num_classes(args.num_classes, train, val)
    return train, val


def class_to_idx(dataset):
    """The mapping of class names to indices, or None where the dataset does not tell."""
    for attribute in ('class_to_idx', 'class_name_to_idx'):
        if getattr(dataset.reader, attribute, None):
            return getattr(dataset.reader, attribute)
    return None


def label_names(dataset):
    """Class names in the order of the classifier's outputs, or None where not every output has one."""
    names = {index: str(name) for name, index in (class_to_idx(dataset) or {}).items()}
    return [names[i] for i in range(len(names))] if names and set(names) == set(range(len(names))) else None


def check_num_classes(num_classes, train, val=None):
    """Refuse a model with too few classes for the data, and warn of one with more; no number is no check."""
    if num_classes is None:
        return
    for what, dataset in (('training', train), ('evaluation', val)):
        present = _count_classes(dataset) if dataset is not None else 0
        if num_classes < present:
            raise OptionError(f'--num-classes {num_classes}: the {what} data has {present} classes')
    present = _count_classes(train)
    if 0 < present < num_classes:
        _logger.warning(f'The model has {num_classes} classes, the training data {present} (--num-classes).')


def _count_classes(dataset):
    classes = class_to_idx(dataset)
    return max(classes.values()) + 1 if classes else getattr(dataset.reader, 'num_labels', 0)


def model_dtype(args):
    """dtype of weights and images, None for torch's own."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def create_loaders(args, train, val, data_config, model, accelerator):
    """Create timm's loaders, with Mixup where it was asked for.

    Args:
        train: Train dataset.
        val: Evaluation dataset or None.
        data_config: What timm's resolve_data_config says.
        model: Tells its patch size to --naflex-loader.
        device: Where batches go.

    Returns:
        Train loader, evaluation loader or None, the Mixup that the loop has to apply itself or None, and the
        batch size that learning rate and gradients are scaled by.
    """
    device, distributed = accelerator.device, accelerator.num_processes > 1
    args = __import__('argparse').Namespace(**{**vars(args), 'num_classes': model.num_classes, 'rank': accelerator.process_index, 'world_size': accelerator.num_processes, 'distributed': distributed})
    if args.aug_repeats and not args.distributed:
        raise OptionError(f'--aug-repeats {args.aug_repeats:g}: repeats over several processes, and this is one')
    if isinstance(train, Stream):
        readers.check_stream(args, train)
    for dataset in (train, val):
        if dataset is not None:
            dataset.num_classes = args.num_classes
    channels = data_config['input_size'][0]
    if args.no_prefetcher and len(data_config['mean']) != channels:
        raise OptionError(f'--no-prefetcher: needs --mean and --std for images of {channels} channels')
    common = dict(
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype(args) or torch.float32,
        device=device,
        distributed=args.distributed,
        use_prefetcher=args.prefetcher,
    )
    train_interpolation = args.train_interpolation
    if args.no_aug or not train_interpolation:
        train_interpolation = data_config['interpolation']
    augmentation = dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=train_interpolation,
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
    )
    evaluation = dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        # Streams cannot be divided evenly between many workers of many processes.
        num_workers=min(2, args.workers) if args.distributed and readers.kind(args) in ('tfds', 'wds')
        else args.workers,
        crop_pct=data_config['crop_pct'],
    )
    if args.train_pad is not None and args.train_pad >= min(data_config['input_size'][1:]):
        raise OptionError(f'--train-pad {args.train_pad}: must be below the image size {data_config["input_size"][-1]}')
    create = _create_naflex_loaders if args.naflex_loader else _create_image_loaders
    if args.data_on_device:
        create = _create_device_loaders
    if args.aa:
        of_training = partial(create_transform, data_config['input_size'], is_training=True)
        with naming(f'--aa {args.aa}', AssertionError, ValueError):
            of_training(auto_augment=args.aa)
    patch_size = model.get_patch_size() if hasattr(model, 'get_patch_size') else (16, 16)
    loader_train, loader_eval, mixup_fn = create(
        args, train, val, data_config, {**common, **augmentation}, {**common, **evaluation}, patch_size)
    if not len(loader_train):
        raise OptionError(f'--batch-size {args.batch_size}: the training split does not fill one batch')
    for dataset in (train, val):
        if isinstance(dataset, Stream):
            # torch takes it for a mistake that processes have different shares.
            warnings.filterwarnings('ignore', 'Length of IterableDataset')
    if isinstance(train, Stream):
        _logger.info(
            f'An epoch of {args.dataset} is {len(train) * args.world_size:,} images, of {train.reader.num_samples:,}: '
            'whole batches for every worker of every process.'
        )
    scheduled = args.train_img_sizes is not None
    batch_size = loader_train.batch_sampler.average_batch_size if scheduled else float(args.batch_size)
    return loader_train, loader_eval, mixup_fn, batch_size


def _mixup_kwargs(args):
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def _create_image_loaders(args, train, val, data_config, train_kwargs, eval_kwargs, patch_size):
    collate_fn = mixup_fn = None
    if mixup_active(args):
        mixup = FastCollateMixup if args.prefetcher else Mixup
        mixup_fn = mixup(mode=args.mixup_mode, cutmix_minmax=args.cutmix_minmax, **_mixup_kwargs(args))
        if args.prefetcher:
            collate_fn, mixup_fn = mixup_fn, None
    if args.aug_splits:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    loader_train = create_loader(
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
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **train_kwargs,
    )
    if args.train_pad is not None:
        # In the place of the resized crop, which comes first.
        size = data_config['input_size'][1:]
        train.transform.transforms[:1] = [
            *_fit(data_config, train_kwargs['interpolation']).transforms[:-1],
            RandomCrop(size, padding=args.train_pad, padding_mode='reflect'),
        ]
    loader_eval = None
    if val is not None:
        loader_eval = create_loader(val, input_size=data_config['input_size'], **eval_kwargs)
    return loader_train, loader_eval, mixup_fn


def _fit(data_config, interpolation, **kwargs):
    """Transform that brings an image to the input size: its shorter side, and of the longer one the middle."""
    if interpolation == 'random':
        interpolation = data_config['interpolation']
    return create_transform(
        data_config['input_size'], crop_pct=1.0, interpolation=interpolation, use_prefetcher=True, **kwargs)


def _create_device_loaders(args, train, val, data_config, train_kwargs, eval_kwargs, patch_size):
    size, device = data_config['input_size'], train_kwargs['device']
    check_fit([d for d in (train, val) if d is not None], size, device)
    common = dict(
        mean=data_config['mean'],
        std=data_config['std'],
        dtype=train_kwargs['img_dtype'],
        seed=args.seed,
        rank=args.rank,
        world_size=args.world_size,
    )
    augmentation = {} if args.no_aug else dict(pad=args.train_pad, hflip=args.hflip, vflip=args.vflip)
    whole = dict(is_training=True, no_aug=True) if args.no_aug else {}
    loader_train = DeviceLoader(
        train,
        *decode(train, _fit(data_config, train_kwargs['interpolation'], **whole), size, device, args.workers,
                f'--train-split {args.train_split}'),
        batch_size=args.batch_size,
        is_training=True,
        **augmentation,
        **common,
    )
    loader_eval = None
    if val is not None:
        transform = create_transform(
            size, crop_pct=data_config['crop_pct'], interpolation=data_config['interpolation'], use_prefetcher=True)
        loader_eval = DeviceLoader(
            val,
            *decode(val, transform, size, device, args.workers, f'--val-split {args.val_split}'),
            batch_size=eval_kwargs['batch_size'],
            is_training=False,
            **common,
        )
    mixup_fn = None
    if mixup_active(args):
        mixup_fn = Mixup(mode=args.mixup_mode, cutmix_minmax=args.cutmix_minmax, **_mixup_kwargs(args))
    return loader_train, loader_eval, mixup_fn


def _create_naflex_loaders(args, train, val, data_config, train_kwargs, eval_kwargs, patch_size):
    patches = dict(patch_size=patch_size)
    if args.naflex_patch_sizes:
        patches = dict(
            patch_size_choices=args.naflex_patch_sizes,
            patch_size_choice_probs=args.naflex_patch_size_probs,
        )
    layout = dict(patchify_channels_last=not args.naflex_patchify_channels_first)
    loader_train = create_naflex_loader(
        train,
        train_seq_lens=args.naflex_train_seq_lens,
        mixup_fn=NaFlexMixup(**_mixup_kwargs(args)) if mixup_active(args) else None,
        rank=args.rank,
        world_size=args.world_size,
        **patches,
        **layout,
        **train_kwargs,
    )
    loader_eval = None
    if val is not None:
        loader_eval = create_naflex_loader(
            val, patch_size=patch_size, max_seq_len=args.naflex_max_seq_len, **layout, **eval_kwargs)
    return loader_train, loader_eval, None
