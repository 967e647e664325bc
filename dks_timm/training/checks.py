"""Values and combinations of flags that cannot work.

Nothing here imports torch or timm at module level.
"""
import math
import os
import re

from ..errors import OptionError, flag, shown

# What lets a run load code that its user has to trust.
RUNS_CODE = ('dataset_trust_remote_code', 'device_modules')
CHOICES = dict(
    amp_dtype=('float16', 'bfloat16'),
    model_dtype=('float32', 'float16', 'bfloat16'),
    clip_mode=('norm', 'value', 'agc'),
    sched=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'),
    lr_base_scale=('', 'linear', 'sqrt'),
    interpolation=('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    train_interpolation=('', 'random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    train_crop_mode=('rrc', 'rkrc', 'rkrr'),
    remode=('const', 'rand', 'pixel'),
    mixup_mode=('batch', 'pair', 'elem', 'half'),
    dist_bn=('', 'reduce', 'broadcast'),
    worker_seeding=('all', 'part'),
    eval_metric=('top1', 'top5', 'loss'),
    kd_loss_type=('kl',),
)
LARGEST = 2 ** 63 - 1  # whole number that torch takes
# Least and, where there is one, most that a number may be.
RANGES = {
    **dict.fromkeys(
        ('num_classes', 'in_chans', 'batch_size', 'validation_batch_size', 'epochs', 'lr_base_size', 'log_interval',
         'val_interval', 'checkpoint_hist', 'train_num_samples', 'val_num_samples', 'train_batch_sizes',
         'train_batches_per_epoch', 'recount', 'lr_cycle_limit', 'naflex_train_seq_lens', 'naflex_max_seq_len',
         'naflex_patch_sizes', 'kd_student_feature_dim', 'kd_teacher_feature_dim', 'dks_every'), (1, None)),
    **dict.fromkeys(('img_size', 'input_size', 'train_img_sizes'), (1, 16384)),
    'crop_pct': (0.05, 2),
    'layer_decay': (0, 1),
    'aug_splits': (0, 64),
    'train_size_schedule_spread': (0, None),
    'seed': (0, 2 ** 32 - 1),
    **dict.fromkeys(
        ('workers', 'recovery_interval', 'start_epoch', 'warmup_epochs', 'cooldown_epochs', 'lr', 'lr_base', 'mixup',
         'cutmix', 'color_jitter', 'clip_grad', 'tta', 'train_pad', 'distill_loss_weight', 'task_loss_weight',
         'weight_decay', 'decay_milestones', 'patience_epochs', 'epoch_repeats', 'aug_repeats', 'min_lr',
         'warmup_lr', 'mixup_off_epoch', 'scale', 'train_size_probs', 'naflex_patch_size_probs', 'dks_ce_weight',
         'dks_synergy_weight', 'dks_start_epoch', 'max_bad_images'), (0, None)),
    **dict.fromkeys(
        ('hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
         'mixup_switch_prob', 'momentum', 'smoothing', 'drop', 'drop_path', 'drop_block', 'drop_connect',
         'model_ema_decay', 'dks_batch_fraction', 'train_size_random_mix'), (0, 1)),
}
ABOVE_ZERO = ('kd_temperature', 'dks_temperature', 'dks_batch_fraction', 'std', 'ratio', 'decay_epochs', 'lr_cycle_mul')
# Pillow's modes that timm's transforms take, with their channels.
IMAGE_MODES = dict(L=1, LA=2, RGB=3, YCbCr=3, HSV=3, RGBA=4, RGBX=4, CMYK=4)


def check_numbers(args) -> None:
    """Refuse numbers outside their range.

    Raises:
        OptionError: naming flag, value and what would do.
    """
    for name, value in vars(args).items():
        least, most = RANGES.get(name, (None, None))
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, int) and not -LARGEST <= number <= LARGEST:
                raise OptionError(f'{flag(name)} {shown(number)}: must be at most {LARGEST} either way')
            if not math.isfinite(number):
                raise OptionError(f'{flag(name)} {number}: must be a finite number')
            if least is not None and number < least:
                raise OptionError(f'{flag(name)} {number}: must be at least {least}')
            if most is not None and number > most:
                raise OptionError(f'{flag(name)} {number}: must be at most {most}')
            if name in ABOVE_ZERO and number <= 0:
                raise OptionError(f'{flag(name)} {number}: must be above 0')


def check(args, given) -> None:
    """Refuse values and combinations that cannot work, by name.

    Raises:
        OptionError: naming flag, value and what would do.
    """
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        if value is not None and value not in choices:
            raise OptionError(f'{flag(name)} {value}: must be one of {", ".join(c or repr(c) for c in choices)}')
    check_numbers(args)
    for name, value in vars(args).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and re.search('[\0\ud800-\udfff]', text):
                raise OptionError(f'{flag(name)} {text}: holds a NUL, or bytes that are not UTF-8; rename it')
    for name in ('resume', 'initial_checkpoint', 'pretrained_path'):
        path = getattr(args, name)
        if path and path != 'auto' and not os.path.isfile(path):
            raise OptionError(f'{flag(name)} {path}: no such file')

    def refuse(condition, message):
        if condition:
            raise OptionError(message)

    refuse(args.fuser, f'--fuser {args.fuser}: TorchScript fusers are not supported; use --torchcompile')
    refuse(args.torchscript, '--torchscript: not supported; use --torchcompile')
    root = os.path.realpath(args.output or './output/train')
    folder = os.path.realpath(os.path.join(root, args.experiment))  # links followed
    refuse(folder != root and not folder.startswith(os.path.join(root, '')),
           f'--experiment {args.experiment}: must stay inside --output, and leads to {folder}; give a plain name')
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        refuse(value is not None and len(value) != 2, f'{flag(name)} {value}: must be two numbers, least and most')
    in_chans = args.in_chans or (args.input_size or [3])[0]
    refuse(args.input_size and args.input_size[0] != in_chans,
           f'--in-chans {in_chans}: --input-size {args.input_size} says {(args.input_size or [3])[0]}; give the same')
    mode, channels = args.input_img_mode, f'--in-chans {in_chans}'
    if args.input_size and not args.in_chans:
        channels = f'--input-size {args.input_size}'
    subject = f'--input-img-mode {mode}: does not give {in_chans} channels ({channels})'
    if mode is None:
        mode = 'RGB' if in_chans == 3 else 'L'
        subject = f'{channels}: images are read as {mode} where no --input-img-mode is given'
    refuse(IMAGE_MODES.get(mode) != in_chans,
           f'{subject}; there are ' + ', '.join(f'{name} with {count}' for name, count in IMAGE_MODES.items()))
    refuse(args.lr_noise and len(args.lr_noise) > 2,
           f'--lr-noise {args.lr_noise}: must be one number, where noise begins, or two, where it begins and ends')
    refuse(args.pretrained_path and not args.pretrained,
           f'--pretrained-path {args.pretrained_path}: needs --pretrained')
    eval_batch = args.validation_batch_size or args.batch_size
    refuse(args.tta > 1 and eval_batch % args.tta,
           f'--tta {args.tta}: evaluation batches of {eval_batch} (-vb) must be a multiple of it')
    for name in ('mean', 'std'):
        value = getattr(args, name)
        refuse(value is not None and len(value) not in (1, in_chans),
               f'{flag(name)} {value}: must be one number, or one for each of {in_chans} channels')
    policies = ('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a')
    refuse(args.aa and args.aa.split('-')[0] not in policies,
           f'--aa {args.aa}: must be, or start with, one of {", ".join(policies)}')
    refuse(mixup_active(args) and args.batch_size % 2, f'--batch-size {args.batch_size}: must be even for mixup')
    refuse(args.amp and args.model_dtype not in (None, 'float32'),
           f'--model-dtype {args.model_dtype}: cannot be combined with --amp; use one of the two')
    refuse(args.aug_splits == 1, f'--aug-splits {args.aug_splits}: must be 0 or at least 2')
    refuse(args.smoothing >= 1, f'--smoothing {args.smoothing}: must be below 1')
    refuse(args.jsd_loss and args.aug_splits < 2, '--jsd-loss: needs --aug-splits 2 or more')
    refuse(args.split_bn and not (args.aug_splits > 1 or args.resplit), '--split-bn: needs --aug-splits or --resplit')
    refuse(args.split_bn and args.sync_bn, '--split-bn: cannot be combined with --sync-bn; use one of the two')
    refuse(args.aug_splits and mixup_active(args),
           f'--aug-splits {args.aug_splits}: cannot be combined with --mixup or --cutmix; use one of the two')
    refuse(args.aug_splits and args.no_prefetcher,
           f'--aug-splits {args.aug_splits}: only the prefetcher puts splits together; leave --no-prefetcher out')
    refuse(args.wandb_resume_id and not args.resume, f'--wandb-resume-id {args.wandb_resume_id}: needs --resume')
    sizes = args.train_img_sizes
    refuse(args.naflex_loader and sizes is not None, '--naflex-loader: cannot be combined with --train-img-sizes')
    refuse(args.naflex_loader and args.use_multi_epochs_loader,
           '--naflex-loader: cannot be combined with --use-multi-epochs-loader')
    refuse(args.naflex_loader and args.aug_splits, '--naflex-loader: cannot be combined with --aug-splits')
    for name, of in (
            ('train_batch_sizes', 'train_img_sizes'),
            ('train_size_probs', 'train_img_sizes'),
            ('naflex_patch_size_probs', 'naflex_patch_sizes'),
    ):
        values, choices = getattr(args, name), getattr(args, of)
        refuse(values is not None and choices is not None and len(values) != len(choices),
               f'{flag(name)} {values}: needs one value for each of {flag(of)} {choices}')
        refuse(name.endswith('_probs') and values is not None and not sum(values),
               f'{flag(name)} {values}: must add up to more than 0')

    if args.train_pad is not None:
        for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'train_img_sizes', 'naflex_loader'):
            refuse(name in given and given[name] not in (None, False),
                   f'{flag(name)}: cannot be combined with --train-pad; use one of the two')
    if args.data_on_device:
        refuse(args.train_pad is None and not args.no_aug,
               '--data-on-device: does not do resized crops; give --train-pad, or --no-aug')
        refuse(args.mixup_mode == 'half', '--mixup-mode half: not with --data-on-device; use batch, pair or elem')
        # What --no-aug switches off anyway does not matter.
        left_out = [] if args.no_aug else [
            'color_jitter', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob', 'resplit']
        for name in (*left_out, 'aug_repeats', 'aug_splits', 'train_img_sizes', 'naflex_loader', 'no_prefetcher'):
            value = getattr(args, name)
            refuse(value, f'{flag(name)}{"" if value is True else f" {value}"}: not with --data-on-device'
                   + ('; use --color-jitter 0' if name == 'color_jitter' else '; leave out one of the two'))

    for name in ('hub_revision', 'hub_timeout', 'push_every_best'):
        refuse(getattr(args, name) and not args.push_to_hub, f'{flag(name)}: needs --push-to-hub')
    refuse(args.hub_timeout is not None and not args.hub_timeout > 0,
           f'--hub-timeout {args.hub_timeout}: must be above 0')
    refuse(args.keep_branches and not args.dks, '--keep-branches: needs --dks')

    if not args.dks:
        set_without = [name for name in given if name.startswith('dks_')]
        refuse(set_without and 'dks' not in given, f'{flag(min(set_without, default=""))}: needs --dks')
        return
    refuse(args.naflex_loader, '--naflex-loader: patch sequences cannot be combined with --dks')
    for name in ('aug_splits', 'split_bn'):
        refuse(args.dks_batch_fraction < 1 and getattr(args, name),
               f'--dks-batch-fraction {args.dks_batch_fraction}: cannot be combined with {flag(name)}; use --dks-every')
    refuse(args.dks_batch_fraction < 1 and args.dks_batch_fraction * args.batch_size <= 1,
           f'--dks-batch-fraction {args.dks_batch_fraction}: leaves one image of {args.batch_size} for the branches; '
           f'give more than {1 / args.batch_size:g}')
    refuse(args.dks_start_epoch >= args.epochs,
           f'--dks-start-epoch {args.dks_start_epoch}: synergy would not begin in {args.epochs} epochs; give less, or '
           '--dks-direction none')


def mixup_active(args) -> bool:
    """Whether batches are mixed, and targets therefore soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
