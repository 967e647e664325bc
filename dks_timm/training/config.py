"""The command line of train.py: timm's flags, the --dks-* ones, and YAML recipes.

Nothing here imports torch or timm at module level: `--help` and a mistyped flag answer at once.
"""
import argparse
import contextlib
import os
import sys

import psutil
import yaml

from ..errors import OptionError, closest, flag, shown
from .checks import RUNS_CODE, check
from .flags import NOT_YET, ParseKwargs, add_timm_flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises OptionError in place of printing its usage and exiting.

    It knows no abbreviations: :func:`spell_out` accepts those of timm's flags.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

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


def spell_out(argv, parser: Parser):
    """Write abbreviated flags in full. An abbreviation names one flag of timm's; ours and those to come have none.

    Raises:
        OptionError: for one that names several.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    timm_flags = [
        option for action in timm_parser()._actions for option in action.option_strings if option.startswith('--')]
    timm_flags.append('--config')
    words = []
    for i, word in enumerate(argv):
        if word == '--':
            return words + argv[i:]
        name, equals, value = word.partition('=')
        if value == '--':  # Python's argparse loses it, and hands on an empty list
            raise OptionError(f'{word}: is no value; give one')
        if name.startswith('--') and name not in known:
            if name in NOT_YET:
                raise OptionError(f'{name}: a flag of a later timm, which train.py does not have yet')
            meant = [option for option in timm_flags if option.startswith(name)]
            if len(meant) > 1:
                raise OptionError(f'{name}: short for {", ".join(meant)}; write out one of them')
            word = ''.join(meant or [name]) + equals + value
        words.append(word)
    return words


def parse_args(argv=None):
    """Read command line and recipe: flags given win over the recipe, the recipe over the defaults.

    Returns:
        The arguments as a Namespace with timm's names, the set of names that were given (command line or recipe),
        and the text of args.yaml: timm's flags all, ours where they were set.

    Raises:
        OptionError: for whatever can be seen to be wrong without torch.
    """
    parser = create_parser()
    argv = spell_out(list(sys.argv[1:] if argv is None else argv), parser)
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
    heed_launcher(args, given)
    check(args, given)

    timm_names = vars(timm_parser().parse_args([]))
    ours = {k: v for k, v in vars(args).items() if v != defaults[k] and (args.dks or not k.startswith('dks_'))}
    text = {**ours, **{k: v for k, v in vars(args).items() if k in timm_names}}
    args.prefetcher = not args.no_prefetcher
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    # A recipe is for many runs, and does not get to replace what one of them has published.
    args.overwrite_repository = 'overwrite' in on_command_line
    return args, set(given) - {'config'}, yaml.safe_dump(text, default_flow_style=False)


def launch_command():
    """The flags of the `accelerate launch` that started this process, None of none.

    It keeps some to itself, as --gradient_accumulation_steps without DeepSpeed.
    """
    try:
        words = psutil.Process().parent().cmdline()
    except (AttributeError, psutil.Error):
        return None
    if 'launch' not in words or not any(word.startswith('--gradient') for word in words):
        return None
    from accelerate.commands.launch import launch_command_parser
    return launch_command_parser().parse_known_args(words[words.index('launch') + 1:])[0]


def heed_launcher(args, given) -> None:
    """Take over what `accelerate launch` or its configuration say in the environment, where no flag says otherwise.

    Processes, device, affinity, mixed precision, FSDP2 and DeepSpeed are Accelerate's own to read.

    Raises:
        OptionError: for what cannot be had.
    """
    def launcher(name, default=''):
        return os.environ.get(f'ACCELERATE_{name}', default)

    asked = launch_command()
    steps = launcher('GRADIENT_ACCUMULATION_STEPS') or str(getattr(asked, 'gradient_accumulation_steps', ''))
    if steps.isdigit() and int(steps) > 1 and 'grad_accum_steps' not in given:
        args.grad_accum_steps = int(steps)
    clipping = getattr(asked, 'gradient_clipping', None)
    if clipping and 'clip_grad' not in given:
        args.clip_grad = float(clipping)
    if launcher('MIXED_PRECISION') == 'fp8' and 'amp' not in given:
        raise OptionError('accelerate launch --mixed_precision fp8: not supported; use bf16')
    backend, mode = launcher('DYNAMO_BACKEND', 'NO').lower(), launcher('DYNAMO_MODE', 'default')
    if backend != 'no' and 'torchcompile' not in given:
        for name in ('use_fullgraph', 'use_dynamic', 'use_regional_compilation'):
            if launcher(f'DYNAMO_{name.upper()}').lower() in ('1', 'true'):
                raise OptionError(f'accelerate launch --dynamo_{name}: not supported; use --torchcompile of train.py')
        args.torchcompile = backend
        if 'torchcompile_mode' not in given and mode != 'default':
            args.torchcompile_mode = mode


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
            raise OptionError(f'--config {path}: no flag for "{shown(key)}: {shown(value)}"{hint}')
        if key in RUNS_CODE and value or isinstance(value, str) and value.startswith('pipe:'):
            raise OptionError(
                f'--config {path}: "{key}: {shown(value)}" runs code from elsewhere; if you trust it, give it on the '
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
        raise OptionError(f'{source}: "{key}: {shown(given)}" is not {wanted}')
    return value


def _typed_scalar(value, action):
    """The value where it is of the flag's type and one of its choices, else None. YAML reads 5e-4 as text."""
    if isinstance(value, str) and action.type in (int, float):
        with contextlib.suppress(ValueError):
            value = action.type(value)
    types = {int: int, float: (int, float)}.get(action.type, str)
    good = isinstance(value, types) and not isinstance(value, bool) and value in (action.choices or [value])
    return value if good else None
