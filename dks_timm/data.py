"""timm's datasets and loaders, wired as in timm's trainer, and a small dataset that needs no download."""
import io
import logging
import os

import torch
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    Mixup,
    NaFlexMixup,
    create_dataset,
    create_loader,
    create_naflex_loader,
    create_transform,
)
from timm.data.readers.reader import Reader
from torchvision.transforms import RandomCrop

from .device_data import DeviceLoader, check_fit, decode
from .options import OptionError, mixup_active, naming

_logger = logging.getLogger(__name__)

# Folder names that timm takes for one another.
SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


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


def _png(pixels) -> bytes:
    """Encode an (8, 8) array of values 0 to 16 as timm's datasets expect images: as a file."""
    file = io.BytesIO()
    Image.fromarray((pixels * (255 / 16)).round().astype('uint8')).save(file, 'png')
    return file.getvalue()


def create_datasets(args):
    """Create the train dataset and, where --val-split names one, the evaluation dataset.

    Raises:
        OptionError: if the data is not there, or holds more classes than --num-classes.
    """
    if args.data and not args.data_dir:
        args.data_dir = args.data
    if not args.dataset:
        _check_folder(args)
    in_chans = args.in_chans or (args.input_size or [3])[0]
    img_mode = ('RGB' if in_chans == 3 else 'L') if args.input_img_mode is None else args.input_img_mode

    def create(split, is_training, num_samples, **kwargs):
        if args.dataset == 'digits':
            return ImageDataset('', reader=ReaderDigits(split), input_img_mode=img_mode)
        with naming(
                f'--dataset {args.dataset}' if args.dataset else f'--data-dir {args.data_dir}',
                AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError,
        ):
            return create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                is_training=is_training,
                class_map=args.class_map,
                download=args.dataset_download,
                batch_size=args.batch_size,
                input_img_mode=img_mode,
                input_key=args.input_key,
                target_key=args.target_key,
                num_samples=num_samples,
                trust_remote_code=args.dataset_trust_remote_code,
                **kwargs,
            )

    train = create(args.train_split, True, args.train_num_samples, seed=args.seed, repeats=args.epoch_repeats)
    val = create(args.val_split, False, args.val_num_samples) if args.val_split else None
    if val is not None and class_to_idx(val) != class_to_idx(train):
        differ = sorted(set(class_to_idx(val) or ()) ^ set(class_to_idx(train) or ()))
        raise OptionError(
            f'--val-split {args.val_split}: its classes are not those of --train-split {args.train_split} '
            f'({", ".join(differ[:5])} in one of them only); give the same folders, or --class-map'
        )
    check_num_classes(args.num_classes, train)
    return train, val


def _check_folder(args):
    root = args.data_dir
    if not root:
        raise OptionError('--data-dir: missing; give a folder of images, or --dataset')
    if not os.path.exists(root):
        raise OptionError(f'--data-dir {root}: no such folder')
    if not os.path.isdir(root):
        if not root.endswith('.tar'):
            raise OptionError(f'--data-dir {root}: neither a folder nor a .tar file')
        return
    for flag, split in (('--train-split', args.train_split), ('--val-split', args.val_split)):
        name = split.partition('[')[0]
        names = next((names for names in SPLITS if name in names), (name,))
        whole = flag == '--train-split' and not args.val_split  # timm then trains on the folder itself
        if not whole and not any(os.path.exists(os.path.join(root, n)) for n in names):
            there = sorted(os.listdir(root))
            raise OptionError(
                f'{flag} {split}: --data-dir {root} has no such folder; it has '
                + (', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'nothing')
            )


def class_to_idx(dataset):
    """The mapping of class names to indices, or None where the dataset does not tell."""
    for source in (getattr(dataset, 'reader', None), dataset):
        for attribute in ('class_to_idx', 'class_name_to_idx'):
            if getattr(source, attribute, None):
                return getattr(source, attribute)
    return None


def label_names(dataset):
    """Class names in the order of the classifier's outputs, or None where not every output has one."""
    names = {index: str(name) for name, index in (class_to_idx(dataset) or {}).items()}
    return [names[i] for i in range(len(names))] if names and set(names) == set(range(len(names))) else None


def check_num_classes(num_classes, dataset):
    """Refuse a model with too few classes for the data, and warn of one with more; no number is no check."""
    classes = class_to_idx(dataset)
    if num_classes is None or classes is None:
        return
    present = max(classes.values()) + 1
    if num_classes < present:
        raise OptionError(f'--num-classes {num_classes}: the training data has {present} classes')
    if num_classes > present:
        _logger.warning(f'The model has {num_classes} classes, the training data {present} (--num-classes).')


def model_dtype(args):
    """dtype of weights and images, None for torch's own."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def create_loaders(args, train, val, data_config, model, device):
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
    if args.aug_repeats and not args.distributed:
        raise OptionError(f'--aug-repeats {args.aug_repeats:g}: repeats over several processes, and this is one')
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
        num_workers=min(2, args.workers) if args.distributed and args.dataset.startswith(('tfds/', 'wds/'))
        else args.workers,
        crop_pct=data_config['crop_pct'],
    )
    if args.train_pad is not None and args.train_pad >= min(data_config['input_size'][1:]):
        raise OptionError(f'--train-pad {args.train_pad}: must be below the image size {data_config["input_size"][-1]}')
    create = _create_naflex_loaders if args.naflex_loader else _create_image_loaders
    if args.data_on_device:
        create = _create_device_loaders
    patch_size = model.get_patch_size() if hasattr(model, 'get_patch_size') else (16, 16)
    with naming('data loader', AssertionError, RuntimeError, TypeError):
        loader_train, loader_eval, mixup_fn = create(
            args, train, val, data_config, {**common, **augmentation}, {**common, **evaluation}, patch_size)
    if not len(loader_train):
        raise OptionError(f'--batch-size {args.batch_size}: the training split does not fill one batch')
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
