"""From command line, YAML recipe and launcher to the configuration of a run, which does not change after it.

The first of these that has a value for a setting decides::

    command line    --epochs 90
    recipe          epochs: 90, in the YAML file of --config
    launcher        ACCELERATE_... variables, see launcher_settings
    default         of the flag, see flags.py; of some it hangs on another flag, see other_defaults

Nothing here imports torch or timm when it is loaded: ``--help`` and a mistyped flag are answered at once.
"""
import argparse
import os
import sys
from pathlib import Path, PurePath

import psutil
import yaml

from ..errors import OptionError, closest, flag
from ..method.presets import PRESETS
from .flags import IMAGE_MODES, METRICS, add_timm_flags, create_parser
from .parser import ParseKwargs, Parser, StoreAction

POLICIES = ('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a')
# Flag -> the flag without which it has no effect.
NEEDS = dict(pretrained_path='pretrained', push_every_best='push_to_hub', keep_branches='dks', jsd_loss='aug_splits')
# Flags that are for images with several labels.
MULTI_LABEL = ('target_format', 'multilabel_threshold')
LOSSES_WITH_FLAGS = ('asl', 'poly', 'twoway', 'db')  # which begin with the name of the loss
# Flag -> flags that cannot be given beside it.
EXCLUSIVE = dict(
    split_bn=('sync_bn',),
    aug_splits=('mixup', 'cutmix', 'cutmix_minmax', 'no_prefetcher', 'no_aug'),
    naflex_loader=(
        'train_img_sizes', 'use_multi_epochs_loader', 'aug_splits', 'dks', 'no_prefetcher', 'channels_last',
        'save_images'),
    train_img_sizes=('use_multi_epochs_loader', 'aug_splits'),
    train_pad=('no_aug', 'train_crop_mode', 'scale', 'ratio', 'train_img_sizes', 'naflex_loader'),
    data_on_device=('aug_repeats', 'aug_splits', 'train_img_sizes', 'naflex_loader', 'no_prefetcher'),
    dks_batch_fraction=('aug_splits', 'split_bn'),
    loss=('bce_loss', 'jsd_loss'),
)


class Config(argparse.Namespace):
    """The settings of a run, by timm's names; they cannot be set after parsing."""

    def __init__(self, **settings):
        vars(self).update(settings)

    def __setattr__(self, name, value):
        raise AttributeError(f'{name} cannot be set to {value!r}: the configuration does not change after parsing')


def parse_args(argv=None):
    """Read command line, recipe and launcher.

    Returns:
        The settings by timm's names, the set of names that were given (command line or recipe), and the text of
        args.yaml: timm's flags all, ours where they were set.

    Raises:
        OptionError: for bad input that can be seen without torch.
    """
    on_command_line = _read_command_line(sys.argv[1:] if argv is None else argv)
    path = on_command_line.pop('config', '')
    given = {**(read_recipe(path) if path else {}), **on_command_line}
    defaults = vars(create_parser().parse_args([]))
    del defaults['config']
    given_or_launched = {**launcher_settings(given), **given}
    settings = {**defaults, **other_defaults({**defaults, **given_or_launched}), **given_or_launched}
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


def other_defaults(settings) -> dict:
    """Return the defaults that are other ones with other flags, as in timm, and those of a preset."""
    several_labels = dict(smoothing=0., eval_metric='map') if settings['task'] == 'multilabel' else {}
    decay = dict(decay_epochs=0.2) if settings['sched'] in ('wsd', 'rsqrt') else {}
    # Not of a run without --dks, whose args.yaml has no setting of it.
    preset = PRESETS[settings['dks_preset'] or 'paper'] if settings['dks'] else {}
    return {**several_labels, **decay, **{f'dks_{name}': value for name, value in preset.items()}}


def _read_command_line(argv):
    """Return the values that were given, by name."""
    parser = create_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        raise OptionError(f'{unknown[0]}: no such flag{closest(unknown[0].partition("=")[0], flags)}')
    return vars(found)


def launcher_settings(given) -> dict:
    """Return the settings that `accelerate launch` or its configuration ask for and Accelerate does not read itself."""
    def launcher(name, default=''):
        return os.environ.get(f'ACCELERATE_{name.upper()}', default)

    settings = {}
    asked = _launch_command()
    steps = launcher('gradient_accumulation_steps') or str(getattr(asked, 'gradient_accumulation_steps', ''))
    if steps.isdigit():
        settings['grad_accum_steps'] = int(steps)
    if getattr(asked, 'gradient_clipping', None):
        settings['clip_grad'] = float(asked.gradient_clipping)
    if launcher('mixed_precision') == 'fp8' and 'amp' not in given:
        raise OptionError('accelerate launch --mixed_precision fp8: not supported; use bf16')
    backend = launcher('dynamo_backend', 'no').lower()
    if backend != 'no' and 'torchcompile' not in given:
        for name in ('dynamo_use_fullgraph', 'dynamo_use_dynamic', 'dynamo_use_regional_compilation'):
            if launcher(name).lower() in ('1', 'true'):
                raise OptionError(f'accelerate launch --{name}: not supported; use --torchcompile of train.py')
        mode = launcher('dynamo_mode', 'default')
        settings.update(torchcompile=backend, torchcompile_mode=None if mode == 'default' else mode)
    return settings


def _launch_command():
    """Return the flags of the `accelerate launch` that started this process, some of which it puts nowhere else."""
    try:
        words = psutil.Process().parent().cmdline()
    except (AttributeError, psutil.Error):  # without a parent
        return None
    if 'launch' not in words or not any(word.startswith('--gradient') for word in words):
        return None
    from accelerate.commands.launch import launch_command_parser
    return launch_command_parser().parse_known_args(words[words.index('launch') + 1:])[0]


def carried_recipes() -> dict:
    """Return the recipes that come with this package: name, such as cifar100/resnet20 -> path."""
    # They lie at the top of the project; a wheel carries them inside the package.
    for folder in (Path(__file__).parents[i] / 'recipes' for i in (1, 2)):
        recipes = {path.relative_to(folder).with_suffix('').as_posix(): path for path in folder.rglob('*.yaml')}
        if 'quickstart' in recipes:  # not the folder of another package
            return {name: path for name, path in recipes.items() if not name.startswith('accelerate/')}
    return {}


def read_recipe(path: str) -> dict:
    """Read a YAML file of flag names and values, with the types that the command line would give them.

    Where there is no such file, it is the name of a carried recipe, with or without ``recipes/`` and ``.yaml``.

    Raises:
        OptionError: if it is no such file, or sets a flag that runs code from elsewhere.
    """
    name, recipes = PurePath(path).as_posix().removeprefix('recipes/').removesuffix('.yaml'), carried_recipes()
    # A folder of that name does not hide a recipe: output/quickstart is one.
    is_file = os.path.exists(path) and not os.path.isdir(path)
    try:
        with open(path if is_file else recipes.get(name, path)) as f:
            recipe = yaml.safe_load(f) or {}
    except OSError as e:
        why = f'{e.strerror}, and ' + ('no recipe has that name' if recipes else 'this dks_timm has no recipes')
        whole = next((recipe for recipe in recipes if recipe.endswith(f'/{name}')), name)
        hint = closest(whole, recipes) or '; give the path of a YAML file'
        raise OptionError(f'--config {path}: {why}{hint}') from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: of invalid bytes, numbers or dates
        raise OptionError(f'--config {path}: not YAML ({type(e).__name__}: {e})') from None
    if not isinstance(recipe, dict):
        raise OptionError(f'--config {path}: holds a {type(recipe).__name__}; wanted lines of "flag_name: value"')
    actions = {a.dest: a for a in create_parser()._actions if a.dest not in ('config', 'help')}
    for key, value in recipe.items():
        if key not in actions:
            raise OptionError(f'--config {path}: no flag for "{key}: {value}"{closest(str(key), actions)}')
    check_harmless(f'--config {path}', recipe)
    return check_types(f'--config {path}', recipe)


def check_harmless(source: str, values: dict) -> None:
    """Refuse values from a file that would run code from elsewhere; who trusts them gives them as flags."""
    dangerous = {action.dest for action in create_parser()._actions if getattr(action, 'runs_code', False)}
    for key, value in values.items():
        if key in dangerous and value or isinstance(value, str) and value.startswith('pipe:'):
            raise OptionError(
                f'{source}: "{key}: {value}" runs code from elsewhere; if you trust it, give it on the '
                f'command line, as {flag(key)}')


def check_types(source: str, values: dict) -> dict:
    """Return values from a file, those of flags with the types that the command line would give them.

    Raises:
        OptionError: naming the source, for a value of another type; or naming the flag, for a number out of bounds.
    """
    actions = {action.dest: action for action in create_parser()._actions}
    return {k: _typed(source, k, value, actions[k]) if k in actions else value for k, value in values.items()}


def _typed(source, key, given, action):
    """Return a value of YAML, which reads 5e-4 as text, as the command line would store it."""
    if given in (None, []) and given == action.default:
        return given
    kind = bool if action.nargs == 0 else dict if isinstance(action, ParseKwargs) else action.type or str
    is_list = kind is not dict and action.nargs not in (None, 0, '?')
    values = given if is_list and isinstance(given, (list, tuple)) else [given]
    count = action.nargs if is_list and action.nargs != '+' else max(1, len(values))
    try:
        values = [kind(str(value)) if kind in (int, float) else value for value in values]
    except ValueError:
        values = [None]
    if len(values) != count or not all(isinstance(v, kind) and v in (action.choices or [v]) for v in values):
        wanted = {bool: 'true or false', dict: 'a mapping', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        if action.choices:
            wanted = 'one of ' + ', '.join(action.choices)
        if is_list:
            wanted = f'a list of {"one or more" if action.nargs == "+" else count}, each {wanted}'
        raise OptionError(f'{source}: "{key}: {given}" is not {wanted}')
    typed = values if is_list else values[0]
    if isinstance(action, StoreAction):
        action.check(typed)
    return typed


def mixup_active(args) -> bool:
    """True if batches are mixed, and targets therefore soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args, given) -> None:
    """Refuse values and combinations that cannot work, among all settings and those that were given."""
    for refusals in (_values, _combinations, _task, _data_on_device):
        for refused, message in refusals(args, given):
            if refused:
                raise OptionError(message)


# Each function below yields pairs: the condition under which a run is refused, and the message.


def _values(args, given):
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
    channels = args.in_chans or (args.input_size or [3])[0]
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    told = '--input-size' if args.input_size and not args.in_chans else '--in-chans'
    yield IMAGE_MODES[mode] != channels, f'{told} {channels}: not the channels of --input-img-mode {mode}; give both'
    for name, counts in dict(
            mean={1, channels}, std={1, channels}, scale={2}, ratio={2}, cutmix_minmax={2}, lr_noise={1, 2}).items():
        values = getattr(args, name)
        yield values is not None and len(values) not in counts, (
            f'{flag(name)} {values}: must be {" or ".join(map(str, sorted(counts)))} numbers')


def _spelled(args, name):
    value = getattr(args, name)
    return flag(name) if value is True else f'{flag(name)} {value}'


def _combinations(args, given):
    for name, other in NEEDS.items():
        yield getattr(args, name) and not getattr(args, other), f'{_spelled(args, name)}: needs {flag(other)}'
    for name in given:
        yield name.startswith('dks_') and not args.dks and 'dks' not in given, f'{flag(name)}: needs --dks'
    for name, others in EXCLUSIVE.items():
        for other in others:
            yield given.get(name) and given.get(other), (
                f'{_spelled(args, name)}: cannot be combined with {_spelled(args, other)}; use one of the two')
    yield args.amp and args.model_dtype not in (None, 'float32'), (
        f'--model-dtype {args.model_dtype}: cannot be combined with --amp; use one of the two')
    yield args.split_bn and not (args.aug_splits or args.resplit), '--split-bn: needs --aug-splits or --resplit'
    yield mixup_active(args) and args.batch_size % 2, f'--batch-size {args.batch_size}: must be even for mixup'
    yield mixup_active(args) and any(n % 2 for n in args.train_batch_sizes or ()), (
        f'{_spelled(args, "train_batch_sizes")}: must be even for mixup')
    yield args.tta > 1 and (args.validation_batch_size or args.batch_size) % args.tta, (
        f'--tta {args.tta}: the evaluation batch (-vb) must be a multiple of it')
    epochs = min(args.epochs, args.stop_epoch or args.epochs, args.dks_off_epoch or args.epochs)
    yield args.dks and args.dks_start_epoch >= epochs, (
        f'--dks-start-epoch {args.dks_start_epoch}: not within the {epochs} epochs; or use --dks-direction none')
    yield args.dks_teacher != 'pairs' and args.dks_direction in ('top-down', 'bottom-up'), (
        f'--dks-direction {args.dks_direction}: is between two classifiers; with --dks-teacher {args.dks_teacher} use '
        f'both, to-backbone or none')
    yield args.dks_teacher == 'ema' and not args.model_ema, '--dks-teacher ema: needs --model-ema'
    yield args.dks_teacher == 'ema' and args.model_ema_force_cpu, (
        '--dks-teacher ema: cannot be combined with --model-ema-force-cpu; use one of the two')


def _task(args, given):
    multi_label = args.task == 'multilabel'
    parser = create_parser()
    changed = [name for name in given if given[name] != parser.get_default(name)]  # args.yaml gives all flags
    yield args.eval_metric not in METRICS[args.task], (
        f'--eval-metric {args.eval_metric}: not of --task {args.task}; use one of {", ".join(METRICS[args.task])}')
    for name in MULTI_LABEL:
        yield name in changed and not multi_label, f'{_spelled(args, name)}: needs --task multilabel'
    yield args.target_key and ',' in args.target_key and not multi_label, (
        f'--target-key {args.target_key}: several fields need --task multilabel')
    for name in ('kd_model_name', 'jsd_loss'):
        yield multi_label and getattr(args, name), f'{_spelled(args, name)}: not with --task multilabel; leave it out'
    for name in changed:
        loss = name.partition('_')[0]
        yield loss in LOSSES_WITH_FLAGS and args.loss != loss, f'{flag(name)}: needs --loss {loss}'
    yield args.loss == 'jsd' and not args.aug_splits, '--loss jsd: needs --aug-splits'
    weighted = args.loss_class_weight or args.loss_pos_weight
    for name in ('loss_weight_power', 'loss_weight_beta', 'loss_weight_max'):
        yield name in changed and not weighted, f'{flag(name)}: needs --loss-class-weight or --loss-pos-weight'
    yield args.class_stats and not weighted and args.loss != 'db', (
        f'{_spelled(args, "class_stats")}: needs --loss-class-weight, --loss-pos-weight or --loss db')
    for name, scheds in dict(lr_decay_fn=('wsd', 'rsqrt'), lr_stable_timescale=('rsqrt',)).items():
        yield getattr(args, name) and args.sched not in scheds, (
            f'{_spelled(args, name)}: needs --sched {" or ".join(scheds)}')
    yield args.bce_pos_weight is not None and args.loss_pos_weight, (
        '--loss-pos-weight: cannot be combined with --bce-pos-weight; use one of the two')


def _data_on_device(args, given):
    yield args.data_on_device and args.mixup_mode == 'half', (
        '--mixup-mode half: not with --data-on-device; use batch, pair or elem')
    if not args.data_on_device or args.no_aug:
        return
    yield args.train_pad is None, '--data-on-device: does not do resized crops; give --train-pad, or --no-aug'
    for name in ('color_jitter', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob', 'resplit'):
        yield getattr(args, name), f'{_spelled(args, name)}: not with --data-on-device; switch one of them off'
