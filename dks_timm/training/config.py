"""From command line, YAML recipe and launcher to the configuration of a run, which does not change after it.

Nothing here imports torch or timm when it is loaded: ``--help`` and a mistyped flag are answered at once.
"""
import argparse
import contextlib
import os
import re
import sys

import psutil
import yaml

from ..errors import OptionError, closest, flag, shown
from .flags import ParseKwargs, Parser, StoreAction, add_timm_flags, create_parser

# Pillow's modes that timm's transforms take, with their channels.
IMAGE_MODES = dict(L=1, LA=2, RGB=3, YCbCr=3, HSV=3, RGBA=4, RGBX=4, CMYK=4)
POLICIES = ('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a')


class Config(argparse.Namespace):
    """The settings of a run, by timm's names; they cannot be set after parsing."""

    def __init__(self, **settings):
        vars(self).update(settings)

    def __setattr__(self, name, value):
        raise AttributeError(f'{name} cannot be set to {value!r}: the configuration does not change after parsing')


def parse_args(argv=None):
    """Read command line, recipe and launcher; a flag wins over the recipe, the recipe over the launcher.

    Returns:
        The settings by timm's names, the set of names that were given (command line or recipe), and the text of
        args.yaml: timm's flags all, ours where they were set.

    Raises:
        OptionError: for bad input that can be seen without torch.
    """
    on_command_line = _read_command_line(list(sys.argv[1:] if argv is None else argv))
    path = on_command_line.pop('config', '')
    given = {**(read_recipe(path) if path else {}), **on_command_line}
    defaults = vars(create_parser().parse_args([]))
    del defaults['config']
    settings = {**defaults, **launcher_settings(given), **given}
    settings['data_dir'], settings['data'] = settings['data_dir'] or settings['data'], None
    check(Config(**settings), given)

    timm_parser = Parser()
    add_timm_flags(timm_parser)
    names_of_timm = {action.dest for action in timm_parser._actions}
    text = {k: v for k, v in settings.items() if k in names_of_timm or (
        v != defaults[k] and (settings['dks'] or not k.startswith('dks_')))}
    settings['prefetcher'] = not settings['no_prefetcher']
    settings['grad_accum_steps'] = max(1, settings['grad_accum_steps'])
    # A recipe is for many runs: it does not get to replace what one of them has published.
    settings['overwrite_repository'] = 'overwrite' in on_command_line
    return Config(**settings), set(given), yaml.safe_dump(text, default_flow_style=False)


def _read_command_line(argv):
    """Return the values that were given, by name."""
    for word in argv:
        if word.endswith('=--'):  # argparse drops the dashes and stores an empty list
            raise OptionError(f'{word}: is no value; give one')
    parser = create_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        raise OptionError(f'{unknown[0]}: no such flag{closest(unknown[0].partition("=")[0], flags)}')
    return vars(found)


def launcher_settings(given) -> dict:
    """Return the settings that `accelerate launch` or its configuration ask for, where no flag does.

    Processes, device, affinity, mixed precision and FSDP2 are Accelerate's own to read.

    Raises:
        OptionError: for what a run does not support.
    """
    def launcher(name, default=''):
        return os.environ.get(f'ACCELERATE_{name}', default)

    settings = {}
    asked = _launch_command()
    steps = launcher('GRADIENT_ACCUMULATION_STEPS') or str(getattr(asked, 'gradient_accumulation_steps', ''))
    if steps.isdigit() and int(steps) > 1:
        settings['grad_accum_steps'] = int(steps)
    if getattr(asked, 'gradient_clipping', None):
        settings['clip_grad'] = float(asked.gradient_clipping)
    if launcher('MIXED_PRECISION') == 'fp8' and 'amp' not in given:
        raise OptionError('accelerate launch --mixed_precision fp8: not supported; use bf16')
    backend, mode = launcher('DYNAMO_BACKEND', 'NO').lower(), launcher('DYNAMO_MODE', 'default')
    if backend != 'no' and 'torchcompile' not in given:
        for name in ('use_fullgraph', 'use_dynamic', 'use_regional_compilation'):
            if launcher(f'DYNAMO_{name.upper()}').lower() in ('1', 'true'):
                raise OptionError(f'accelerate launch --dynamo_{name}: not supported; use --torchcompile of train.py')
        settings['torchcompile'] = backend
        if mode != 'default':
            settings['torchcompile_mode'] = mode
    return settings


def _launch_command():
    """Return the flags of the `accelerate launch` that started this process, or None.

    It puts some of them nowhere else, such as --gradient_accumulation_steps.
    """
    try:
        words = psutil.Process().parent().cmdline()
    except (AttributeError, psutil.Error):  # without a parent
        return None
    if 'launch' not in words or not any(word.startswith('--gradient') for word in words):
        return None
    from accelerate.commands.launch import launch_command_parser
    return launch_command_parser().parse_known_args(words[words.index('launch') + 1:])[0]


def read_recipe(path: str) -> dict:
    """Read a YAML file of flag names and values, with the types that the command line would give them.

    Raises:
        OptionError: if it is no such file, or sets a flag that runs code from elsewhere.
    """
    try:
        with open(path) as f:
            recipe = yaml.safe_load(f) or {}
    except OSError as e:
        raise OptionError(f'--config {path}: {e.strerror}; give the path of a YAML file') from None
    except Exception as e:  # PyYAML documents none: "!!bool x" is a KeyError, "!!timestamp x" an AttributeError
        raise OptionError(f'--config {path}: not YAML ({type(e).__name__}: {e})') from None
    if not isinstance(recipe, dict):
        raise OptionError(f'--config {path}: holds a {type(recipe).__name__}; wanted lines of "flag_name: value"')
    actions = {a.dest: a for a in create_parser()._actions if a.dest not in ('config', 'help')}
    for key, value in recipe.items():
        if key not in actions:
            hint = closest(key, actions) if isinstance(key, str) else ''
            raise OptionError(f'--config {path}: no flag for "{shown(key)}: {shown(value)}"{hint}')
        runs_code = getattr(actions[key], 'runs_code', False) and value
        if runs_code or isinstance(value, str) and value.startswith('pipe:'):
            raise OptionError(
                f'--config {path}: "{key}: {shown(value)}" runs code from elsewhere; if you trust it, give it on the '
                f'command line, as {flag(key)}'
            )
    return check_types(f'--config {path}', recipe)


def check_types(source: str, values: dict) -> dict:
    """Return values from a file, those of flags with the types that the command line would give them.

    Args:
        source: Names the file in a message.
        values: By name of the flag; other names are left as they are.

    Raises:
        OptionError: for a value of another type, or a number out of bounds.
    """
    actions = {action.dest: action for action in create_parser()._actions}
    return {k: _typed(source, k, value, actions[k]) if k in actions else value for k, value in values.items()}


def _typed(source, key, given, action):
    if given in (None, []) and given == action.default:
        return given
    wanted = {int: 'a whole number', float: 'a number'}.get(action.type, 'text')
    if action.choices:
        wanted = 'one of ' + ', '.join(action.choices)
    typed = None
    if action.nargs == 0:
        wanted, typed = 'true or false', given if isinstance(given, bool) else None
    elif isinstance(action, ParseKwargs):
        good = isinstance(given, dict) and all(isinstance(name, str) for name in given)
        wanted, typed = 'a mapping', given if good else None
    elif action.nargs in (None, '?'):
        typed = _typed_scalar(given, action)
    else:
        wanted = f'a list of {"one or more" if action.nargs == "+" else action.nargs}, each {wanted}'
        if isinstance(given, (list, tuple)) and (given if action.nargs == '+' else len(given) == action.nargs):
            typed = [_typed_scalar(value, action) for value in given]
    if typed is None or isinstance(typed, list) and None in typed:
        raise OptionError(f'{source}: "{key}: {shown(given)}" is not {wanted}')
    if isinstance(action, StoreAction):
        action.check(typed)
    return typed


def _typed_scalar(value, action):
    """Return the value if it is of the flag's type and one of its choices, else None. YAML reads 5e-4 as text."""
    if isinstance(value, str) and action.type in (int, float):
        with contextlib.suppress(ValueError):
            value = action.type(value)
    types = {int: int, float: (int, float)}.get(action.type, str)
    good = isinstance(value, types) and not isinstance(value, bool) and value in (action.choices or [value])
    return value if good else None


def mixup_active(args) -> bool:
    """True if batches are mixed, and targets therefore soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args, given) -> None:
    """Refuse values and combinations that cannot work.

    Args:
        args: The settings.
        given: Those that command line and recipe give, by name.

    Raises:
        OptionError: naming flag, value and what works.
    """
    for refusals in (_values, _pairs, _lists, _data_on_device, _dks):
        for refused, message in refusals(args, given):
            if refused:
                raise OptionError(message)


# Each function below yields pairs: the condition under which a run is refused, and the message.


def _values(args, given):
    for name, value in vars(args).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            yield isinstance(text, str) and re.search('[\0\ud800-\udfff]', text), (
                f'{flag(name)} {text}: holds a NUL, or bytes that are not UTF-8; rename it')
    for name in ('resume', 'initial_checkpoint', 'pretrained_path'):
        path = getattr(args, name)
        yield path and path != 'auto' and not os.path.isfile(path), f'{flag(name)} {path}: no such file'
    root = os.path.realpath(args.output or './output/train')
    folder = os.path.realpath(os.path.join(root, args.experiment))  # links followed
    yield os.path.commonpath([root, folder]) != root, (
        f'--experiment {args.experiment}: must stay inside --output, and leads to {folder}; give a plain name')
    yield args.fuser, f'--fuser {args.fuser}: TorchScript fusers are not supported; use --torchcompile'
    yield args.torchscript, '--torchscript: not supported; use --torchcompile'
    yield args.aa and args.aa.split('-')[0] not in POLICIES, (
        f'--aa {args.aa}: must be, or start with, one of {", ".join(POLICIES)}')
    yield args.aug_splits == 1, f'--aug-splits {args.aug_splits}: must be 0 or at least 2'
    yield mixup_active(args) and args.batch_size % 2, f'--batch-size {args.batch_size}: must be even for mixup'
    eval_batch = args.validation_batch_size or args.batch_size
    yield args.tta > 1 and eval_batch % args.tta, (
        f'--tta {args.tta}: evaluation batches of {eval_batch} (-vb) must be a multiple of it')


# Flag -> the flag without which it has no effect.
NEEDS = dict(
    pretrained_path='pretrained', wandb_resume_id='resume', hub_revision='push_to_hub', hub_timeout='push_to_hub',
    push_every_best='push_to_hub', keep_branches='dks', jsd_loss='aug_splits')
# Flag -> flags that cannot be given beside it.
EXCLUSIVE = dict(
    split_bn=('sync_bn',),
    aug_splits=('mixup', 'cutmix', 'cutmix_minmax', 'no_prefetcher'),
    naflex_loader=('train_img_sizes', 'use_multi_epochs_loader', 'aug_splits', 'dks'),
    train_pad=('no_aug', 'train_crop_mode', 'scale', 'ratio', 'train_img_sizes', 'naflex_loader'),
    data_on_device=('aug_repeats', 'aug_splits', 'train_img_sizes', 'naflex_loader', 'no_prefetcher'),
)


def _spelled(args, name):
    value = getattr(args, name)
    return flag(name) if value is True else f'{flag(name)} {value}'


def _pairs(args, given):
    for name, other in NEEDS.items():
        yield getattr(args, name) and not getattr(args, other), f'{_spelled(args, name)}: needs {flag(other)}'
    for name, others in EXCLUSIVE.items():
        for other in others:
            yield given.get(name) and given.get(other), (
                f'{_spelled(args, name)}: cannot be combined with {_spelled(args, other)}; use one of the two')
    yield args.split_bn and not (args.aug_splits or args.resplit), '--split-bn: needs --aug-splits or --resplit'
    yield args.amp and args.model_dtype not in (None, 'float32'), (
        f'--model-dtype {args.model_dtype}: cannot be combined with --amp; use one of the two')


def _lists(args, given):
    in_chans = args.in_chans or (args.input_size or [3])[0]
    yield args.input_size and args.input_size[0] != in_chans, (
        f'--in-chans {in_chans}: --input-size {args.input_size} has another number; give the same')
    mode = args.input_img_mode or ('RGB' if in_chans == 3 else 'L')
    yield IMAGE_MODES.get(mode) != in_chans, (
        f'--in-chans {in_chans}: not the channels of --input-img-mode {mode}; there are '
        + ', '.join(f'{name} with {count}' for name, count in IMAGE_MODES.items()))
    for name, counts in dict(
            mean={1, in_chans}, std={1, in_chans}, scale={2}, ratio={2}, cutmix_minmax={2}, lr_noise={1, 2}).items():
        values = getattr(args, name)
        yield values is not None and len(values) not in counts, (
            f'{flag(name)} {values}: must be {" or ".join(map(str, sorted(counts)))} numbers')
    for name, of in (
            ('train_batch_sizes', 'train_img_sizes'),
            ('train_size_probs', 'train_img_sizes'),
            ('naflex_patch_size_probs', 'naflex_patch_sizes'),
    ):
        values, choices = getattr(args, name), getattr(args, of)
        yield values is not None and choices is not None and len(values) != len(choices), (
            f'{flag(name)} {values}: needs one value for each of {flag(of)} {choices}')
        yield values is not None and not sum(values), f'{flag(name)} {values}: must add up to more than 0'


def _data_on_device(args, given):
    if not args.data_on_device:
        return
    yield args.mixup_mode == 'half', '--mixup-mode half: not with --data-on-device; use batch, pair or elem'
    if args.no_aug:
        return
    yield args.train_pad is None, '--data-on-device: does not do resized crops; give --train-pad, or --no-aug'
    yield args.color_jitter, f'--color-jitter {args.color_jitter}: not with --data-on-device; use --color-jitter 0'
    for name in ('grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob', 'resplit'):
        yield getattr(args, name), f'{_spelled(args, name)}: not with --data-on-device; leave out one of the two'


def _dks(args, given):
    if not args.dks:
        of_dks = [name for name in given if name.startswith('dks_')]
        yield of_dks and 'dks' not in given, f'{flag(min(of_dks, default=""))}: needs --dks'
    elif args.dks_batch_fraction < 1:
        fraction = f'--dks-batch-fraction {args.dks_batch_fraction}'
        for name in ('aug_splits', 'split_bn'):
            yield getattr(args, name), f'{fraction}: cannot be combined with {flag(name)}; use --dks-every'
        yield args.dks_batch_fraction * args.batch_size <= 1, (
            f'{fraction}: leaves one image of {args.batch_size} for the branches; give more than '
            f'{1 / args.batch_size:g}')
    yield args.dks and args.dks_start_epoch >= args.epochs, (
        f'--dks-start-epoch {args.dks_start_epoch}: synergy would not begin in {args.epochs} epochs; give less, or '
        '--dks-direction none')
