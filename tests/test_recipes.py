"""The recipes: what each says of itself is what it does."""
import contextlib
import csv
import functools
import io
import json
import logging
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils.checkpoint_saver import load_checkpoint_metadata

import train
from dks_timm import cli
from dks_timm.publishing import export
from dks_timm.training import build, config

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / 'recipes').rglob('*.yaml') if 'accelerate' not in p.parts)
# What has the header of the table in recipes/README.md; those on digits and the rows of CIFAR-100 have shorter ones.
DIGITS = [ROOT / 'recipes/quickstart.yaml', ROOT / 'recipes/multilabel.yaml']
IMAGENET = [p for p in RECIPES if p.parent.name == 'recipes' and p not in DIGITS]
STAND_INS = dict(
    convnext='test_convnext',
    deit='test_vit',
    efficientnet='test_efficientnet',
    resnet='test_resnet',
)


def named(paths):
    return [pytest.param(p, id=str(p.relative_to(ROOT / 'recipes').with_suffix(''))) for p in paths]


def header(path):
    """The comment at the top, without the number signs."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith('#'))
    return [line.lstrip('#').strip() for line in lines[:end]]


def said(path, pattern):
    """The groups of a pattern in the header, whose line breaks do not count."""
    found = re.search(pattern, ' '.join(header(path)))
    assert found, f'no "{pattern}" in the header of {path.name}'
    return found.groups()


def commands(path):
    """The arguments of train.py in the header's commands, for a folder DIR with ten classes."""
    lines = [line for line in header(path) if ' train.py ' in line]
    assert lines, f'no command in the header of {path.name}'
    argv = [shlex.split(line, comments=True) for line in lines]
    assert all(a[:3] == ['accelerate', 'launch', 'train.py'] or a[:2] == ['python', 'train.py'] for a in argv)
    return [[{'N': '10'}.get(word, word) for word in a[a.index('train.py') + 1:]] for a in argv]


@functools.cache
def dks_args(path):
    """The arguments of the recipe's last command, with --dks where the recipe leaves it to the command line."""
    args, _, _ = config.parse_args([*commands(path)[-1], '--dks'])
    return config.Config(**{**vars(args), 'pretrained': False})


@functools.cache
def dks_model(path):
    with torch.device('meta'):
        return build.create_model(dks_args(path))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('path', named(RECIPES))
def test_its_commands_name_this_recipe_and_parse(path):
    for argv in commands(path):
        assert Path(argv[argv.index('--config') + 1]) == path.relative_to(ROOT)
        args, given, _ = config.parse_args(argv)
        assert set(yaml.safe_load(path.read_text())) <= given
        assert args.dataset.startswith(('digits', 'hfds/', 'multidigits')) or args.data_dir == 'DIR'


@pytest.mark.parametrize('path', named(RECIPES))
def test_it_is_flat_and_leaves_out_what_is_the_machines(path):
    recipe = yaml.safe_load(path.read_text())
    assert all(not isinstance(v, dict) or k in ('model_kwargs', 'opt_kwargs') for k, v in recipe.items())
    assert not {'device', 'local_rank', 'data_dir', 'resume'} & set(recipe)


@pytest.mark.parametrize('path', named(RECIPES))
def test_it_builds_model_loss_optimizer_and_schedule(path):
    args, model = dks_args(path), dks_model(path)
    assert all(p.is_meta for p in model.parameters())
    assert len(model.branches) >= 1
    loss_fn = build._create_dks_loss(args, build.create_criterion(args), 1 + len(model.branches))
    loss_fn.resolve_weights(1 + len(model.branches))
    optimizer = build.create_optimizer(args, model, build.learning_rate(args, args.batch_size, 1))
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(list(model.parameters()))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=100)
    assert scheduler is not None and epochs >= args.epochs


@pytest.mark.parametrize('path', named(RECIPES))
def test_without_dks_it_is_a_plain_timm_recipe(path, tmp_path):
    plain = tmp_path / 'plain.yaml'
    plain.write_text(''.join(line for line in path.open() if not line.startswith('dks')))
    args, given, _ = config.parse_args(['--config', str(plain)])
    assert not args.dks
    assert set(yaml.safe_load(path.read_text())) - given <= {
        'dks', 'dks_budget', 'dks_stages', 'dks_synergy_weight', 'dks_branches', 'dks_branch_kwargs'}


@pytest.mark.parametrize('path', named(IMAGENET))
def test_its_header_names_a_source_and_what_is_not_measured(path):
    said(path, r'follows .*(arXiv:\d{4}\.\d{5}|timm\'s documentation)')
    said(path, r'departs ')
    said(path, r'accuracy +Not measured')


@functools.cache
def inspect(command):
    """Return what a dks-timm command prints as JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main([*shlex.split(command)[1:], '--json']) == 0
    return json.loads(out.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize('path', named(IMAGENET))
def test_its_cost_is_what_inspect_computes_with_its_flags(path):
    cost, command = said(path, r'cost +([\d.]+)x [^()]*\((dks-timm inspect [^)]*)\)')
    assert f'{inspect(command)["cost"]["flops"]:.2f}' == cost
    args, inspected = dks_args(path), cli._create_parser().parse_args(shlex.split(command)[1:])
    for name in ('model', 'model_kwargs', 'dks_stages', 'dks_branches', 'dks_branch_kwargs', 'dks_budget', 'in_chans'):
        assert getattr(inspected, name) == getattr(args, name), name
    assert (inspected.img_size or 224) == args.img_size


@pytest.mark.parametrize('path', named(IMAGENET))
def test_its_batch_learning_rate_and_epochs_are_those_of_its_header(path):
    batch, gpus, per_gpu, accumulated, lr = said(
        path, r'batch +(\d+) = (\d+) GPUs? x (\d+)(?: x (\d+) accumulated)?, learning rate ([\de.-]+);')
    args, _, _ = config.parse_args(commands(path)[-1])
    assert (args.batch_size, args.grad_accum_steps) == (int(per_gpu), int(accumulated or 1))
    assert int(batch) == int(gpus) * args.batch_size * args.grad_accum_steps
    scaled = build.learning_rate(args, args.batch_size, int(gpus))
    assert scaled == pytest.approx(float(lr))

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=scaled)
    _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=100)
    assert epochs == int(said(path, r'\), (\d+) epochs')[0])


@pytest.mark.parametrize('path', named(p for p in IMAGENET if p.name.startswith('paper')))
def test_a_paper_row_is_baseline_deep_supervision_and_dks_by_its_commands(path):
    variants = [config.parse_args(argv)[0] for argv in commands(path)]
    assert [(v.dks, v.dks_direction) for v in variants] == [(False, 'both'), (True, 'none'), (True, 'both')]
    for v in variants:
        del v.dks, v.dks_direction
    assert variants[0] == variants[1] == variants[2]
    assert all('the paper\'s layout' in b.reason for b in dks_model(path).branches)


@pytest.mark.parametrize('path', named(p for p in IMAGENET if 'bce_loss: true' in p.read_text()))
def test_binary_cross_entropy_and_synergy_count_alike(path):
    """Labels and synergy are both a mean over the classes, or both a sum, without a weight that scales."""
    logits = [torch.randn(4, 1000) for _ in range(3)]
    target = torch.rand(4, 1000)
    given = ['--config', str(path)]
    mean, _, _ = config.parse_args(given)
    summed, _, _ = config.parse_args([*given, '--bce-sum'])
    assert mean.dks_synergy_weight == [1.0]
    losses = [
        build._create_dks_loss(args, build.create_criterion(args), 3)(logits, target)['loss']
        for args in (mean, summed)]
    torch.testing.assert_close(losses[0] * 1000, losses[1])


@pytest.mark.parametrize('path', named(IMAGENET))
def test_the_table_of_recipes_tells_the_same(path):
    table = (ROOT / 'recipes/README.md').read_text().splitlines()
    (row,) = [line for line in table if line.startswith(f'| [{path.stem}]({path.name}) |')]
    _, _, model, _, epochs, batch, cost, _ = (cell.strip() for cell in row.split('|'))
    assert model == f'`{dks_args(path).model}`'
    assert epochs == said(path, r'\), (\d+) epochs')[0]
    assert batch == said(path, r'batch +(\d+) =')[0]
    assert cost == said(path, r'cost +([\d.]+x)')[0]


def test_the_table_of_recipes_lists_no_other():
    linked = re.findall(r'\]\(([\w/]+\.yaml)\)', (ROOT / 'recipes/README.md').read_text())
    assert sorted(set(linked)) == sorted(p.name for p in [*IMAGENET, *DIGITS])


def run(*argv):
    """train.py in this process, leaving no trace of it there."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        train.main([str(a) for a in argv])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    """Flags of an epoch of two batches on a CPU, with 64-pixel images of two classes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for label in 'ab':
        for i in range(4):
            image = Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8))
            for split in ('train', 'validation'):
                (root / split / label).mkdir(parents=True, exist_ok=True)
                image.save(root / split / label / f'{i}.png')
    return [
        '--dataset', '', '--data-dir', root, '--val-split', 'validation', '--num-classes', 2, '--img-size', 64,
        '--device', 'cpu', '--workers', 0, '-b', 4, '--epochs', 1, '--warmup-epochs', 0, '--aug-repeats', 0,
        '--grad-accum-steps', 1, '--dks-budget', 9,
    ]


def summary(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize('path', named(IMAGENET))
def test_it_trains_with_the_command_line_overriding_what_is_too_large_here(path, tiny_run, tmp_path):
    config = tmp_path / 'recipe.yaml'  # weights cannot be downloaded here
    config.write_text(path.read_text().replace('pretrained: true\n', ''))
    stand_in = STAND_INS[re.match('[a-z]+', dks_args(path).model)[0]]
    run('--config', config, '--dks', '--model', stand_in, *tiny_run, '--output', tmp_path, '--experiment', 'run')
    rows = summary(tmp_path / 'run')
    assert len(rows) == 1 and math.isfinite(float(rows[0]['train_loss']))
    assert sum(name.startswith('train_top1_stage') for name in rows[0]) == 2
    args = yaml.safe_load((tmp_path / 'run/args.yaml').read_text())
    assert (args['opt'], args['mixup'], args['bce_loss'], args['model_ema']) == tuple(
        getattr(dks_args(path), name) for name in ('opt', 'mixup', 'bce_loss', 'model_ema'))


@pytest.mark.slow
def test_an_imagenet_recipe_trains_its_own_model(tiny_run, tmp_path):
    run('--config', ROOT / 'recipes/efficientnet_b0.yaml', *tiny_run, '--output', tmp_path, '--experiment', 'run')
    assert math.isfinite(float(summary(tmp_path / 'run')[0]['eval_loss']))
    checkpoint = load_checkpoint_metadata(tmp_path / 'run/last.pth.tar')
    assert checkpoint['arch'] == 'efficientnet_b0' and checkpoint['args'].dks_budget == 9


@pytest.fixture
def pets(tmp_path):
    """A data set with the fields and splits of timm/oxford-iiit-pet, in its form: files of Parquet."""
    datasets = pytest.importorskip('datasets', reason='hfds/ needs the package datasets')
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f'breed {i}' for i in range(37)]),
        image_id=datasets.Value('string'), label_cat_dog=datasets.ClassLabel(names=['cat', 'dog']))
    rng = np.random.default_rng(0)
    for split, count in dict(train=37, test=5).items():
        rows = [
            dict(image=Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)), label=i,
                 image_id=f'pet_{i}', label_cat_dog=i % 2) for i in range(count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(
            tmp_path / f'pets/data/{split}-00000-of-00001.parquet')
    return tmp_path / 'pets'


def test_pets_train_from_pretrained_weights_and_leave_a_model_with_their_names(pets, tmp_path, monkeypatch):
    """Without a network: a small data set of the same form stands for the Hub's, and a file for the weights."""
    monkeypatch.setattr('datasets.config.HF_DATASETS_OFFLINE', True)
    monkeypatch.setattr(export, 'verify', lambda *args: None)  # has its own tests
    weights = timm.create_model('test_convnext').state_dict()
    torch.save(weights, tmp_path / 'weights.pth')
    run('--config', ROOT / 'recipes/finetune_pets.yaml', '--dataset', f'hfds/{pets}', '--data-dir', tmp_path / 'cache',
        '--model', 'test_convnext', '--pretrained-path', tmp_path / 'weights.pth', '--img-size', 32, '--epochs', 1,
        '--lr', 1e-9, '--min-lr', 0, '--device', 'cpu', '--workers', 0, '-b', 8, '--dks-budget', 9,
        '--output', tmp_path, '--experiment', 'run', '--export-dir', tmp_path / 'net')
    row, = summary(tmp_path / 'run')
    assert math.isfinite(float(row['eval_loss'])) and sum(name.startswith('train_top1_stage') for name in row) == 2
    exported = json.loads((tmp_path / 'net/config.json').read_text())
    assert exported['num_classes'] == 37 and exported['label_names'] == [f'breed {i}' for i in range(37)]
    trained = timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True).state_dict()
    for name, tensor in trained.items():  # the classifier is for other classes
        assert name.startswith('head.fc.') or torch.allclose(tensor, weights[name], atol=1e-6), name
