"""The command line: timm's flags, ours, recipes, and what is refused."""
import argparse
import copy
import csv
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.data.readers.targets import TARGET_FORMATS
from timm.loss import LOSS_TYPES, create_classification_loss, resolve_class_weights
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from dks_timm import errors
from dks_timm.method.loss import DIRECTIONS, TEACHERS
from dks_timm.method.plan import BRANCH_KINDS
from dks_timm.training import config, flags, parser

TIMM_FLAGS = Path(__file__).with_name('timm_train_flags.tsv')
# What timm's script has gained since that list was made, by timm's release notes; docs/training.md has the sources.
NEWER = {
    'task', 'target_format', 'multilabel_threshold', 'lr_decay_fn', 'lr_stable_timescale', 'stop_epoch', 'save_epochs',
    'loss', 'asl_gamma_pos', 'asl_gamma_neg', 'asl_clip', 'asl_reduction', 'poly_epsilon', 'poly_gamma', 'poly_alpha',
    'twoway_tp', 'twoway_tn', 'db_neg_scale', 'db_init_bias', 'db_focal_gamma', 'loss_class_weight', 'loss_pos_weight',
    'loss_weight_power', 'loss_weight_beta', 'loss_weight_max', 'class_stats'}


def refusal(*argv):
    with pytest.raises(errors.OptionError) as e:
        config.parse_args(list(argv))
    return str(e.value)


def recipe(tmp_path, text):
    path = tmp_path / 'recipe.yaml'
    path.write_text(text)
    return str(path)


def test_the_choices_of_the_methods_flags_are_those_of_the_method():
    choices = {action.dest: action.choices for action in config.create_parser()._actions}
    assert (choices['dks_direction'], choices['dks_branches']) == (DIRECTIONS, BRANCH_KINDS)
    assert choices['dks_teacher'] == (*TEACHERS, 'ema')


def test_a_preset_is_the_default_of_its_settings_and_goes_with_dks_into_args_yaml(tmp_path):
    def parse(*argv):
        args, _, text = config.parse_args(['--data-dir', 'DIR', *argv])
        return (args.dks_direction, args.dks_temperature), yaml.safe_load(text)

    settings, saved = parse('--dks', '--dks-preset', 'distill')
    assert settings == ('to-backbone', 3.)
    assert [saved[f'dks_{name}'] for name in ('preset', 'direction', 'temperature')] == ['distill', 'to-backbone', 3.]
    assert parse('--dks', '--dks-preset', 'distill', '--dks-temperature', '2')[0] == ('to-backbone', 2.)
    path = recipe(tmp_path, 'dks: true\ndks_preset: distill\ndks_direction: both\n')
    assert parse('--config', path)[0] == ('both', 3.)
    assert parse('--config', path, '--dks-preset', 'paper')[0] == ('both', 1.)
    settings, saved = parse('--config', path, '--no-dks')  # the baseline of a recipe
    assert not any(name.startswith('dks') for name in saved)


def test_every_flag_of_timm_is_there_with_its_name_type_and_default():
    with open(TIMM_FLAGS, newline='') as f:
        wanted = list(csv.DictReader(f, delimiter='\t'))
    actions = {a.dest: (a, g.title) for g in config.create_parser()._action_groups for a in g._group_actions}
    assert len(wanted) == 172
    for row in wanted:
        action, group = actions[row['dest']]
        assert row == dict(
            flag=' '.join(action.option_strings) or action.dest,
            dest=action.dest,
            action=type(action).__name__.lstrip('_'),
            type=action.type.__name__ if action.type else '',
            nargs=str(action.nargs),
            default=str(action.default),
            group=group,
        )


def test_newer_flags_have_the_choices_and_defaults_of_timms_library():
    actions = {action.dest: action for action in config.create_parser()._actions}
    assert tuple(actions['loss'].choices) == LOSS_TYPES
    assert tuple(actions['target_format'].choices) == TARGET_FORMATS
    assert flags.METRICS == {
        task: (*evaluator.metric_names[1:], 'loss') for task, evaluator in dict(
            classification=ClassificationEvaluator, multilabel=MultiLabelClassificationEvaluator).items()}
    assert config.parse_args([])[0].eval_metric == ClassificationEvaluator.default_metric
    several, *_ = config.parse_args(['--task', 'multilabel'])
    assert several.eval_metric == MultiLabelClassificationEvaluator.default_metric
    parameters = inspect.signature(create_classification_loss).parameters
    of_losses = [name for name in NEWER if name.partition('_')[0] in config.LOSSES_WITH_FLAGS]
    assert len(of_losses) == 12
    for name in of_losses:
        assert actions[name].default == parameters[name].default
    weights = inspect.signature(resolve_class_weights).parameters
    for name in ('power', 'beta', 'max_weight'):
        flag = f'loss_weight_{name.removesuffix("_weight")}'
        assert actions[flag].default == weights[name].default


@pytest.mark.parametrize('decay', flags.DECAYS)
def test_schedules_take_the_newer_flags(decay):
    args, *_ = config.parse_args([
        '--sched', 'rsqrt', '--lr-decay-fn', decay, '--lr-stable-timescale', '4', '--epochs', '20',
        '--warmup-epochs', '2'])
    kwargs = scheduler_kwargs(args)
    assert (kwargs['decay_fn'], kwargs['stable_timescale'], kwargs['decay_epochs']) == (decay, 4., 0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    scheduler, epochs = create_scheduler_v2(optimizer, **kwargs)
    assert epochs == 20 and scheduler._get_lr(6)[0] == pytest.approx(2 ** -0.5)  # 4 epochs after the warm-up


def test_defaults_that_hang_on_another_flag_give_way_to_what_is_said():
    def settings(*argv):
        args, *_ = config.parse_args(list(argv))
        return args.smoothing, args.eval_metric, args.decay_epochs

    assert settings() == (0.1, 'top1', 90)
    assert settings('--task', 'multilabel') == (0., 'map', 90)
    assert settings('--sched', 'wsd') == (0.1, 'top1', 0.2)
    said = ('--smoothing', '0.2', '--eval-metric', 'loss', '--decay-epochs', '5')
    assert settings('--task', 'multilabel', '--sched', 'wsd', *said) == (0.2, 'loss', 5)


def test_a_whole_configuration_of_timms_script_is_a_recipe(tmp_path):
    """As timm's sweep.py gives each of its jobs: every flag with its value, one of them swept."""
    job = {}
    with open(TIMM_FLAGS, newline='') as f:
        for row in csv.DictReader(f, delimiter='\t'):
            read = yaml.safe_load if row['nargs'] != 'None' else dict(int=int, float=float).get(row['type'], str)
            job[row['dest']] = None if row['default'] == 'None' else read(row['default'])
    job.update(
        data_dir='images', model='resnet18', lr=5e-4, sched='wsd', lr_decay_fn='linear', decay_epochs=4, epochs=20,
        stop_epoch=16, save_epochs=[8, 16], experiment='lr_0.0005', resume='auto')
    args, given, _ = config.parse_args(['--config', recipe(tmp_path, yaml.safe_dump(job))])
    assert given == set(job) - {'config'}
    for name, value in job.items():
        if name not in ('data', 'opt_kwargs', 'model_kwargs'):
            assert getattr(args, name) == value, name


def test_an_abbreviation_names_one_flag():
    args, given, _ = config.parse_args(['--log-i', '3'])
    assert args.log_interval == 3 and given == {'log_interval'}
    assert all(word in refusal('--warmup', '3') for word in ('--warmup', '--warmup-lr', '--warmup-epochs'))


def test_flags_have_help_and_defaults_within_their_bounds_and_choices():
    for action in config.create_parser()._actions:
        assert action.help
        if isinstance(action, parser.StoreAction):
            action.check(action.default)
        assert not action.choices or action.default is None or action.default in action.choices


def test_the_configuration_cannot_be_set():
    args = config.Config(epochs=3)
    with pytest.raises(AttributeError, match='epochs cannot be set to 4'):
        args.epochs = 4
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert copied == args and isinstance(copied, config.Config)
    assert argparse.Namespace(**vars(args)) == args and vars(args) == {'epochs': 3}


@pytest.mark.parametrize('argv', [['x'], ['--data-dir', 'x'], ['y', '--data-dir', 'x']])
def test_the_folder_of_the_data_is_in_one_setting(argv):
    args, _, _ = config.parse_args(argv)
    assert (args.data, args.data_dir) == (None, 'x')


@pytest.fixture
def launcher(monkeypatch):
    """A function that sets what the launcher says; the rest is what `accelerate launch` says where it is not asked."""
    def say(**settings):
        for name, value in {**dict(
                mixed_precision='no', dynamo_backend='NO', dynamo_mode='default',
                dynamo_use_fullgraph='False', dynamo_use_dynamic='False', dynamo_use_regional_compilation='False'),
                **settings}.items():
            monkeypatch.setenv(f'ACCELERATE_{name.upper()}', value)
    say()
    return say


def test_what_the_launcher_says_counts_where_no_flag_does(launcher, tmp_path):
    args, _, _ = config.parse_args(['--dks'])
    assert (args.grad_accum_steps, args.torchcompile) == (1, None)
    launcher(gradient_accumulation_steps='4', dynamo_backend='INDUCTOR', dynamo_mode='max-autotune')
    args, _, text = config.parse_args(['--dks'])
    assert (args.grad_accum_steps, args.torchcompile, args.torchcompile_mode) == (4, 'inductor', 'max-autotune')
    assert yaml.safe_load(text)['grad_accum_steps'] == 4  # as is what --config repeats
    path = recipe(tmp_path, 'torchcompile: eager\n')
    args, _, _ = config.parse_args(['--grad-accum-steps', '2', '--config', path])
    assert (args.grad_accum_steps, args.torchcompile, args.torchcompile_mode) == (2, 'eager', None)


@pytest.mark.parametrize('name, value', [
    ('mixed_precision', 'fp8'), ('dynamo_use_fullgraph', 'True'), ('dynamo_use_dynamic', 'true'),
    ('dynamo_use_regional_compilation', '1')])
def test_what_the_launcher_says_and_cannot_be_had_is_refused_by_name(name, value, launcher):
    launcher(dynamo_backend='INDUCTOR', **{name: value})
    assert f'accelerate launch --{name}' in refusal('--model', 'resnet18')


def test_what_the_launcher_keeps_to_itself_is_read_from_its_command(launcher, monkeypatch):
    class Parent:
        def cmdline(self):
            return [sys.executable, '/bin/accelerate', 'launch', '--gradient_accumulation_steps=4',
                    '--gradient_clipping', '0.5', 'train.py', '--gradient_accumulation_steps', '3']

    monkeypatch.setattr(config.psutil.Process, 'parent', lambda self: Parent())
    args, _, _ = config.parse_args([])
    assert (args.grad_accum_steps, args.clip_grad) == (4, 0.5)
    args, _, _ = config.parse_args(['--grad-accum-steps', '1', '--clip-grad', '2'])
    assert (args.grad_accum_steps, args.clip_grad) == (1, 2)


def test_a_flag_wins_over_a_precision_that_cannot_be_had(launcher):
    launcher(mixed_precision='fp8')
    assert config.parse_args(['--amp', '--amp-dtype', 'bfloat16'])[0].amp


@pytest.mark.parametrize('program', ['train.main(argv)', 'dks_timm.train.main(argv)', 'cli.main(["train", *argv])'])
@pytest.mark.parametrize('argv, code', [
    (['--help'], 0),
    (['--epoch', 'ten'], 2),
    (['--no-such-flag'], 2),
    (['--config', 'no-such.yaml'], 2),
])
def test_help_and_typos_are_answered_without_torch(argv, code, program):
    script = (
        'import sys, train, dks_timm.train\n'
        'from dks_timm import cli\n'
        'argv = sys.argv[1:]\n'
        'try:\n'
        f'    {program}\n'
        'finally:\n'
        '    assert not {"torch", "timm", "huggingface_hub"} & set(sys.modules)\n'
    )
    out = subprocess.run(
        [sys.executable, '-c', script, *argv],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert out.returncode == code
    if code:
        assert len(out.stderr.splitlines()) == 1 and not out.stdout


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path):
    path = recipe(tmp_path, 'epochs: 7\nopt: adamw\nlr: 5e-4\nopt_betas: [0.9, 0.95]\nmodel_kwargs: {depth: 2}\n')
    args, given, _ = config.parse_args(['-c', path, '--opt', 'lamb', '--img-size', '64'])
    assert (args.epochs, args.opt, args.lr, args.opt_betas, args.img_size) == (7, 'lamb', 5e-4, [0.9, 0.95], 64)
    assert args.model_kwargs == {'depth': 2} and args.batch_size == 128
    assert given == {'epochs', 'opt', 'lr', 'opt_betas', 'model_kwargs', 'img_size'}
    assert not hasattr(args, 'config')


@pytest.mark.parametrize('name', sorted(config.carried_recipes()))
def test_a_recipe_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = Path(__file__).parents[2] / f'recipes/{name}.yaml'
    wanted = config.parse_args(['--config', str(whole)])
    for spelled in (name, f'{name}.yaml', f'recipes/{name}.yaml', f'./recipes/{name}'):
        assert config.parse_args(['--config', spelled]) == wanted


def test_a_file_of_the_name_of_a_recipe_comes_first_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'quickstart').mkdir()
    assert config.read_recipe('quickstart')['dataset'] == 'digits'
    (tmp_path / 'quickstart.yaml').write_text('epochs: 7\n')
    assert config.read_recipe('quickstart.yaml') == {'epochs': 7}


@pytest.mark.parametrize('name, words', [
    ('quikstart', ['--config quikstart: No such file', 'no recipe has that name; closest: quickstart']),
    ('resnet20', ['closest: cifar100/resnet20']),
    ('a/b.yaml', ['--config a/b.yaml: No such file', 'give the path of a YAML file']),
    ('accelerate/fsdp2', ['no recipe has that name']),  # of the launcher, not of train.py
])
def test_an_unknown_recipe_is_refused_with_the_closest_names(name, words):
    message = refusal('--config', name)
    assert all(word in message for word in words), message


def test_args_text_holds_what_timm_writes_and_our_flags_only_where_set():
    timm_names = {row.split('\t')[1] for row in TIMM_FLAGS.read_text().splitlines()[1:]}
    timm_names |= NEWER
    assert set(yaml.safe_load(config.parse_args([])[2])) == timm_names
    _, _, text = config.parse_args(['--dks', '--dks-stages', '2', '--export-dir', 'x'])
    assert set(yaml.safe_load(text)) - timm_names == {'dks', 'dks_stages', 'export_dir'}


def test_no_dks_overrules_a_recipe_and_leaves_timms_settings(tmp_path):
    path = recipe(tmp_path, 'dks: true\ndks_budget: 1.5\nepochs: 7\n')
    assert config.parse_args(['-c', path])[0].dks
    args, _, text = config.parse_args(['-c', path, '--no-dks'])
    assert not args.dks and args.epochs == 7
    assert 'dks' not in text and not config.parse_args(['-c', recipe(tmp_path, text)])[0].dks


def test_args_text_is_a_recipe(tmp_path):
    argv = ['--dks', '--dks-branch-kwargs', '2.layers=(1,1,1,1)', '--opt-kwargs', 'foreach=True', '--torchcompile']
    args, _, text = config.parse_args(argv)
    # safe_dump cannot say tuple, safe_load gives the list
    again, _, _ = config.parse_args(['-c', recipe(tmp_path, text)])
    assert again.dks and again.opt_kwargs == args.opt_kwargs and again.torchcompile == 'inductor'


@pytest.mark.parametrize('argv, words', [
    (['--train-size-schedule', 'fast'], ['--train-size-schedule', "'fast'", 'progressive']),
    (['--model-kwargs', 'depth'], ['--model-kwargs', "'depth'", 'key=value']),
    (['--resume', 'nowhere.pth.tar'], ['--resume nowhere.pth.tar', 'no such file']),
    (['--amp', '--model-dtype', 'bfloat16'], ['--model-dtype bfloat16', '--amp']),
    (['--aug-splits', '1'], ['--aug-splits 1', 'at least 2']),
    (['--jsd-loss'], ['--jsd-loss', '--aug-splits']),
    (['--split-bn'], ['--split-bn', '--aug-splits']),
    (['--aug-splits', '2', '--mixup', '0.2'], ['--aug-splits 2', '--mixup']),
    (['--aug-splits', '2', '--no-prefetcher'], ['--aug-splits 2', '--no-prefetcher']),
    (['--mixup', '0.2', '-b', '7'], ['--batch-size 7', 'even']),
    (['--scale', '0.5'], ['--scale [0.5]', '2 numbers']),
    (['--mean', '0.5', '0.5'], ['--mean [0.5, 0.5]', '1 or 3 numbers']),
    (['--naflex-loader', '--train-img-sizes', '32'], ['--naflex-loader', '--train-img-sizes']),
    (['--torchscript'], ['--torchscript', '--torchcompile']),
    (['--reprob', '2'], ['--reprob 2.0', 'at most 1']),
    (['--std', '0.2', '0', '0.2'], ['--std 0.0', 'above 0']),
    (['--lr-noise', '0.1', '0.2', '0.3'], ['--lr-noise [0.1, 0.2, 0.3]', '1 or 2']),
    (['--pretrained-path', __file__], ['--pretrained-path', '--pretrained']),
    (['--tta', '3', '-vb', '32'], ['--tta 3', '-vb', 'multiple']),
    (['--dks-stages', '2'], ['--dks-stages', '--dks']),
    (['--dks', '--dks-direction', 'up'], ['--dks-direction', "'up'", 'bottom-up']),
    (['--train-pad', '4', '--scale', '0.5', '1'], ['--train-pad 4', '--scale [0.5, 1.0]']),
    (['--no-aug', '--data-on-device', '--naflex-loader'], ['--data-on-device', '--naflex-loader']),
    (['--dks', '--naflex-loader'], ['--naflex-loader', '--dks']),
])
def test_what_cannot_work_is_refused_by_name(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words), message
    assert '\n' not in message


@pytest.mark.parametrize('text, words', [
    ('dks-stages: [2]', ['"dks-stages: [2]"', 'dks_stages']),
    ('3: 4', ['"3: 4"']),
    ('epochs: 2.5', ['"epochs: 2.5"', 'a whole number']),
    ('epochs: true', ['"epochs: True"', 'a whole number']),
    ('amp: 1', ['"amp: 1"', 'true or false']),
    ('model: 18', ['"model: 18"', 'text']),
    ('scale: [x]', ['"scale: [\'x\']"', 'list']),
    ('dks_stages: []', ['"dks_stages: []"', 'one or more']),
    ('input_size: [3, 32]', ['"input_size: [3, 32]"', 'list of 3']),
    ('model_kwargs: [a]', ['mapping']),
])
def test_a_wrong_recipe_is_refused_with_its_key_and_value(tmp_path, text, words):
    message = refusal('-c', recipe(tmp_path, text))
    assert all(word in message for word in ['--config', 'recipe.yaml', *words]), message
    assert '\n' not in message


def test_a_refusal_is_one_line_and_exit_code_2(capfd):
    import logging
    with pytest.raises(SystemExit) as e, errors.exit_on_bad_input():
        logging.getLogger('timm').info('Data processing configuration')
        raise errors.OptionError('--model x:\n no such model')
    assert e.value.code == 2
    assert capfd.readouterr().err == 'train.py: error: --model x: no such model\n'


def test_only_one_process_of_a_node_tells_of_a_refusal(capfd, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit), errors.exit_on_bad_input():
        raise errors.OptionError('no')
    assert capfd.readouterr().err == ''
