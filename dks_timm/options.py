"""The command line of train.py: timm's flags, the --dks-* ones, YAML recipes, and what is wrong with a given set.

Nothing here imports torch or timm at module level: `--help` and a mistyped flag answer at once.
"""
import argparse
import contextlib
import difflib
import logging
import logging.handlers
import math
import os
import pickle
import re
import reprlib
import struct
import sys

import yaml
from safetensors import SafetensorError

from .timm_flags import ParseKwargs, add_timm_flags

# What reading a file can raise that is no checkpoint, or not a whole one.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, SafetensorError, pickle.PickleError, struct.error)


def printable(text) -> str:
    """Text whose control characters are escaped, as a terminal would obey them and a log begin another line."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def one_line(message, most: int = 1000) -> str:
    """A message as one line of so many characters at most; what is left out of a longer one is its middle."""
    text = printable(' '.join(str(message).split()))
    return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'


def why(error: Exception, most: int = 400) -> str:
    """What an exception has to say, as one line. Of some kinds the message alone is no sentence."""
    text = one_line(error, most)
    if 'weights_only' in text or 'mmap can only be used' in text:
        # What timm and torch suggest here is to let the file run what it likes.
        return 'holds something other than plain weights, which is not loaded, as it could run code'
    if not isinstance(error, (OSError, RuntimeError, ValueError)) or not text:
        return f'{type(error).__name__}: {text}' if text else type(error).__name__
    return text


class OptionError(ValueError):
    """A bad invocation. The message names the flag, the value given and what would do, in one line."""

    def __init__(self, message):
        super().__init__(one_line(message))


class SharedError(OptionError):
    """A refusal that every process knows of."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises OptionError in place of printing its usage and exiting."""

    def error(self, message):
        raise OptionError(message.removeprefix('argument '))


def timm_parser() -> Parser:
    """The flags of timm's train.py: same names, types and defaults."""
    parser = Parser(
        prog='train.py',
        description='Train a timm model, with --dks by Deeply-supervised Knowledge Synergy.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    add_timm_flags(parser)
    return parser


def add_branch_flags(group) -> None:
    """The flags that say which branches to attach."""
    group.add_argument('--dks-stages', type=int, nargs='+', metavar='STAGE',
                       help='stages to supervise, as in timm\'s out_indices (dks-timm inspect MODEL lists them)')
    group.add_argument('--dks-branches', type=str, default='auto', choices=('auto', 'tail', 'conv'),
                       help='tail: of a template of the same architecture; conv: a light one that fits anywhere')
    group.add_argument('--dks-branch-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='[STAGE.]KEY=VALUE',
                       help='arguments of the template, for every branch or for that of one stage')
    group.add_argument('--dks-budget', type=float, metavar='X',
                       help='most a training forward may cost, in forwards of the backbone')


def add_thrift_flags(group) -> None:
    """The flags that say when the branches run."""
    group.add_argument('--dks-batch-fraction', type=float, default=1.0, metavar='F',
                       help='part of each training batch that the branches run on')
    group.add_argument('--dks-every', type=int, default=1, metavar='K',
                       help='run the branches in every K-th update; the others train the model by its labels alone')


def add_card_flags(group) -> None:
    """The flags that say what an export holds besides the backbone."""
    group.add_argument('--keep-branches', action='store_true',
                       help='write the branches beside the exported backbone, for further training and early exits')
    group.add_argument('--card-license', type=str, metavar='NAME', help='license of the weights, for the model card')
    group.add_argument('--card-baseline', type=str, metavar='RUN',
                       help='folder of a run of the same model on the same data, to show beside this one in the card')


def add_hub_flags(group) -> None:
    """The flags that say how to push to the Hugging Face Hub."""
    group.add_argument('--hub-private', action=argparse.BooleanOptionalAction, default=True,
                       help='make a new repository a private one')
    group.add_argument('--hub-revision', type=str, metavar='NAME',
                       help='branch to push to, or tag:NAME to tag what is pushed to main')
    group.add_argument('--hub-timeout', type=float, metavar='SECONDS',
                       help='most that a push may take; 300 and what 0.5 MB/s make of the size, if not given')


def create_parser() -> Parser:
    """timm's flags and ours."""
    parser = timm_parser()
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML recipe: flags by name, - as _')

    group = parser.add_argument_group('Deeply-supervised Knowledge Synergy')
    group.add_argument('--dks', action=argparse.BooleanOptionalAction, default=False,
                       help='train with supervision branches and synergy; --no-dks overrules a recipe')
    add_branch_flags(group)
    group.add_argument('--dks-ce-weight', type=float, nargs='+', default=[1.0], metavar='W',
                       help='weight of the label loss, one or one a classifier (backbone first)')
    group.add_argument('--dks-synergy-weight', type=float, nargs='+', default=[1.0], metavar='W',
                       help='weight of synergy, one or a whole matrix (rows teach columns)')
    group.add_argument('--dks-direction', type=str, default='both', choices=('both', 'top-down', 'bottom-up', 'none'),
                       help='who teaches: each other, deeper the shallower, shallower the deeper, nobody')
    group.add_argument('--dks-temperature', type=float, default=1.0, metavar='T', help='temperature of synergy')
    add_thrift_flags(group)
    group.add_argument('--dks-start-epoch', type=int, default=0, metavar='N',
                       help='first epoch with synergy; before it, classifiers learn from the labels alone')

    group = parser.add_argument_group('Small images')
    group.add_argument('--train-pad', type=int, metavar='N',
                       help='pad training images by N reflected pixels and crop at random, in place of resized crops')
    group.add_argument('--data-on-device', action='store_true',
                       help='hold the decoded dataset on the device and augment whole batches there')

    group = parser.add_argument_group('Bad data')
    # timm's number, and the variable it is set by there.
    group.add_argument('--max-bad-images', type=int, default=os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10,
                       metavar='N',
                       help='most images in a row that may be unreadable; in training and evaluation each is named in '
                            'a warning, and the next one takes its place (in a stream, it is passed over uncounted)')

    group = parser.add_argument_group('Non-finite losses and gradients')
    group.add_argument('--on-nonfinite', type=str, default='stop', choices=('stop', 'skip'),
                       help='where a loss or gradient is inf or nan: save what was before and stop, or skip the update')

    group = parser.add_argument_group('Export and tracking')
    group.add_argument('--export-dir', type=str, metavar='DIR',
                       help='write the best weights here, pruned to the plain timm model')
    group.add_argument('--overwrite', action='store_true',
                       help='replace a model that --export-dir holds; on the command line, also one in the repository')
    add_card_flags(group)
    group.add_argument('--push-to-hub', type=str, metavar='OWNER/NAME',
                       help='push the export to this repository on the Hugging Face Hub')
    add_hub_flags(group)
    group.add_argument('--push-every-best', action='store_true',
                       help='push, in the background, each checkpoint that is the best so far')
    group.add_argument('--log-with', type=str, nargs='+', default=[], metavar='TRACKER',
                       help='log to tensorboard, wandb, ... through Accelerate')
    return parser


def parse_args(argv=None):
    """Read command line and recipe: flags given win over the recipe, the recipe over the defaults.

    Returns:
        The arguments as a Namespace with timm's names, the set of names that were given (command line or recipe),
        and the text of args.yaml: timm's flags all, ours where they were set.

    Raises:
        OptionError: for whatever can be seen to be wrong without torch.
    """
    parser = create_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        raise OptionError(f'{unknown[0]}: no such flag{closest(unknown[0].partition("=")[0], flags)}')
    actions = {a.dest: a for a in parser._actions}
    recipe = read_recipe(args.config, actions) if args.config else {}

    defaults = vars(parser.parse_args([]))
    for action in actions.values():
        action.default = argparse.SUPPRESS
    on_command_line = vars(parser.parse_args(argv))
    given = {**recipe, **on_command_line}
    args = argparse.Namespace(**{**defaults, **given})
    del args.config
    check(args, given)

    timm_names = vars(timm_parser().parse_args([]))
    ours = {k: v for k, v in vars(args).items() if v != defaults[k] and (args.dks or not k.startswith('dks_'))}
    text = {**ours, **{k: v for k, v in vars(args).items() if k in timm_names}}
    args.prefetcher = not args.no_prefetcher
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    # A recipe is for many runs, and does not get to replace what one of them has published.
    args.overwrite_repository = 'overwrite' in on_command_line
    return args, set(given) - {'config'}, yaml.safe_dump(text, default_flow_style=False)


def read_recipe(path: str, actions: dict) -> dict:
    """Read a YAML file of flag names and values, with the types that the command line would give them.

    Raises:
        OptionError: for what is no such file.
    """
    try:
        with open(path) as f:
            recipe = yaml.safe_load(f) or {}
    except OSError as e:
        raise OptionError(f'--config {path}: {e.strerror}; give the path of a YAML file') from None
    except Exception as e:  # what a value out of order raises is anyone's guess
        raise OptionError(f'--config {path}: not YAML ({type(e).__name__}: {e})') from None
    if not isinstance(recipe, dict):
        raise OptionError(f'--config {path}: holds a {type(recipe).__name__}; wanted lines of "flag_name: value"')
    names = sorted(set(actions) - {'config', 'help'})
    for key, value in recipe.items():
        if key not in names:
            hint = closest(key, names) if isinstance(key, str) else ''
            raise OptionError(f'--config {path}: no flag for "{_shown(key)}: {_shown(value)}"{hint}')
        if key in RUNS_CODE and value or isinstance(value, str) and value.startswith('pipe:'):
            raise OptionError(
                f'--config {path}: "{key}: {_shown(value)}" runs code from elsewhere; if you trust it, give it on the '
                f'command line, as {flag(key)}'
            )
    return check_types(f'--config {path}', recipe)


def check_types(source: str, values: dict) -> dict:
    """Values from a file, those of flags with the types that the command line would give them.

    Args:
        source: What a message names the file by.
        values: By name.

    Raises:
        OptionError: for a value of another type.
    """
    actions = {action.dest: action for action in create_parser()._actions}
    return {k: _typed(source, k, value, actions[k]) if k in actions else value for k, value in values.items()}


def _typed(source, key, given, action):
    if given in (None, []) and given == action.default:
        return given
    value = given
    if action.nargs == 0:
        good, wanted = isinstance(given, bool), 'true or false'
    elif isinstance(action, ParseKwargs):
        good, wanted = isinstance(given, dict) and all(isinstance(k, str) for k in given), 'a mapping'
    else:
        wanted = {int: 'a whole number', float: 'a number'}.get(action.type, 'text')
        if action.choices:
            wanted = 'one of ' + ', '.join(action.choices)
        if action.nargs in (None, '?'):
            value = _typed_scalar(given, action)
            good = value is not None
        else:
            count = action.nargs if isinstance(action.nargs, int) else None
            wanted = f'a list of {count or "one or more"}, each {wanted}'
            value = [_typed_scalar(v, action) for v in given] if isinstance(given, (list, tuple)) else []
            good = value and None not in value and len(value) == (count or len(value))
    if not good:
        raise OptionError(f'{source}: "{key}: {_shown(given)}" is not {wanted}')
    return value


def _shown(value) -> str:
    """A value of a recipe for a message. A few lines of YAML can hold one that is too long to write down."""
    if isinstance(value, str):
        return value
    short = reprlib.Repr()
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # Python does not write down a whole number of thousands of digits
        return 'a number of thousands of digits'


def _typed_scalar(value, action):
    """The value where it is of the flag's type and one of its choices, else None. YAML reads 5e-4 as text."""
    if isinstance(value, str) and action.type in (int, float):
        with contextlib.suppress(ValueError):
            value = action.type(value)
    types = {int: int, float: (int, float)}.get(action.type, str)
    good = isinstance(value, types) and not isinstance(value, bool) and value in (action.choices or [value])
    return value if good else None


def closest(name: str, names) -> str:
    """'; closest: a, b' for the names most like this one, or nothing."""
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f'; closest: {", ".join(matches)}' if matches else ''


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
         'model_ema_decay', 'dks_batch_fraction'), (0, 1)),
}
ABOVE_ZERO = ('kd_temperature', 'dks_temperature', 'dks_batch_fraction', 'std', 'ratio', 'decay_epochs', 'lr_cycle_mul')
# Pillow's modes that timm's transforms take, with their channels.
IMAGE_MODES = dict(L=1, LA=2, RGB=3, YCbCr=3, HSV=3, RGBA=4, RGBX=4, CMYK=4)


def flag(name: str) -> str:
    """The flag of an argument: --dks-stages for dks_stages."""
    return '--' + (name if name == 'local_rank' else name.replace('_', '-'))


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
                raise OptionError(f'{flag(name)} {_shown(number)}: must be at most {LARGEST} either way')
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
    mode = args.input_img_mode
    if mode is None:
        mode = 'RGB' if in_chans == 3 else 'L'
    refuse(IMAGE_MODES.get(mode) != in_chans,
           f'--input-img-mode {mode}: does not give the {in_chans} channels of the model (--in-chans); there are '
           + ', '.join(f'{name} with {count}' for name, count in IMAGE_MODES.items()))
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
    if args.push_to_hub and int(os.environ.get('RANK', 0)) == 0:
        from .push import check_request
        with naming(f'--push-to-hub {args.push_to_hub}'):
            check_request(args.push_to_hub, args.hub_revision)

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


# Flags of the arguments that complaints begin with.
_ARGUMENTS = dict(
    stages='--dks-stages',
    branches='--dks-branches',
    branch_kwargs='--dks-branch-kwargs',
    budget='--dks-budget',
    batch_fraction='--dks-batch-fraction',
    baseline='--card-baseline',
    repo_id='--push-to-hub',
    revision='--hub-revision',
)


@contextlib.contextmanager
def naming(subject: str, *more_errors):
    """Let a library's complaint about bad input leave as an OptionError that names the flag and value at fault.

    A complaint of this package begins with the argument it is about: that one's flag is named instead.
    """
    try:
        yield
    except OptionError:
        raise
    except (ValueError, *more_errors) as e:
        text = why(e)
        argument, _, rest = text.partition(' ')
        if argument in _ARGUMENTS:
            raise OptionError(f'{_ARGUMENTS[argument]} {rest}') from e
        raise OptionError(f'{subject}: {text}') from e


def erase_bar() -> str:
    """What erases a bar, if there is one, for the next thing that is written to stderr; nothing beside a terminal."""
    return '\r\x1b[J' if sys.stderr.isatty() else ''


class LogFormatter(logging.Formatter):
    """Information as it is, warnings and errors with their level; on a terminal in place of a bar.

    Also workers of loaders and other processes write there, and know nothing of the bar.
    """

    def format(self, record):
        text = super().format(record)
        return erase_bar() + (text if record.levelno == logging.INFO else f'{record.levelname}: {text}')


def _share(refusal: str) -> None:
    """Tell the other processes, once this one has joined them."""
    if 'dks_timm.processes' in sys.modules:
        from .processes import share
        share(refusal)


@contextlib.contextmanager
def exit_on_bad_input():
    """End with exit code 2 and one line where the input is at fault; on every node, one process says it.

    Log lines and warnings wait until all is known to be well, so that a refusal is all there is to read.
    """
    level = logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.WARNING
    waiting = logging.handlers.MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    logging.basicConfig(level=level, handlers=[waiting], force=True)
    logging.captureWarnings(True)
    try:
        try:
            yield
        except SharedError:
            raise
        except ValueError as e:
            _share(str(e))
            raise
        else:
            _share('')
    except ValueError as e:
        waiting.buffer.clear()
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:
            print(f'train.py: error: {one_line(e)}', file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        logging.captureWarnings(False)
        console = logging.StreamHandler()
        console.setFormatter(LogFormatter())
        waiting.setTarget(console)
        waiting.flush()
        logging.basicConfig(level=level, handlers=[console], force=True)
