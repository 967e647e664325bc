"""The CIFAR-100 experiments: rows are recipes, methods are flags, and the plan is the order in which they are run."""
import functools
import json
import re
from pathlib import Path

import yaml
from common import ROOT

RECIPES = ROOT / 'recipes' / 'cifar100'

# A row is a recipe. Top-1 errors (%) are those that the paper reports.
ROWS = dict(
    resnet20=dict(title='ResNet-20'),
    resnet8=dict(title='ResNet-8'),
    resnet32=dict(title='ResNet-32', paper=dict(baseline=29.97, ds=29.89, dks=26.81)),
    vit_tiny=dict(title='ViT-Ti, 9 blocks, patches of 4 pixels'),
    convnext_atto=dict(title='ConvNeXt-Atto, patches of 2 pixels'),
    mini=dict(title='ResNet-20, the mini protocol', classes=20, images=100),
    wrn_28_10=dict(title='WRN-28-10', paper=dict(baseline=18.72, dks=17.24)),
    resnet110=dict(title='ResNet-110', paper=dict(baseline=27.66, ds=26.95, dks=24.98)),
    wrn_28_10_dropout=dict(title='WRN-28-10, dropout 0.3', paper=dict(baseline=18.64, dks=16.71)),
    densenet_40_12=dict(title='DenseNet-40-12'),
)


def taught(who: str, *flags: str):
    """Flags for a direction: only those that it names are taught."""
    return ['--dks', '--dks-direction', who, *flags]


def averaged(*flags: str):
    """Flags for a teacher with averaged weights; the average is over about 200 updates, half an epoch."""
    return ['--dks', '--dks-teacher', 'ema', '--model-ema', '--model-ema-decay', '0.995', *flags]


T3 = ('--dks-temperature', '3')
# {third} is a third of the epochs, {half} is half of them.
METHODS = dict(
    baseline=('baseline', []),
    ds=('DS', taught('none')),
    dks=('DKS', ['--dks']),
    dks_t3=('DKS, T = 3', ['--dks', *T3]),
    dks_late=('DKS, synergy from a third of the epochs', ['--dks', '--dks-start-epoch', '{third}']),
    ds_weighted=('DS, a third of the weight for branches', taught('none', '--dks-ce-weight', '1', '.33', '.33')),
    # Branches help to learn features, then the backbone has all of its capacity for itself.
    ds_half=('DS in the first half of the epochs', taught('none', '--dks-off-epoch', '{half}')),
    dks_half=('DKS in the first half of the epochs', ['--dks', '--dks-off-epoch', '{half}']),
    # Branches teach the backbone, and learn from the labels alone.
    to_backbone=('branches teach the backbone', taught('to-backbone')),
    to_backbone_t3=('branches teach the backbone, T = 3', taught('to-backbone', *T3)),
    to_backbone_t3_half=(
        'branches teach the backbone, T = 3, half the weight',
        taught('to-backbone', *T3, '--dks-synergy-weight', '.5')),
    to_backbone_t4_x2=(
        'branches teach the backbone, T = 4, twice the weight',
        taught('to-backbone', '--dks-temperature', '4', '--dks-synergy-weight', '2')),
    strong_to_backbone_t3=(
        'the strong branch teaches the backbone, T = 3',
        ['--dks', '--dks-synergy-weight', *'0 0 0 0 0 0 1 0 0'.split(), *T3]),
    # The mean of all logits teaches.
    ensemble_all_t3=('the ensemble teaches all, T = 3', ['--dks', '--dks-teacher', 'ensemble', *T3]),
    ema_all_t3=('the averaged ensemble teaches all, T = 3', averaged(*T3)),
    ema_to_backbone_t3=(
        'the averaged ensemble teaches the backbone, T = 3, twice the weight',
        averaged('--dks-direction', 'to-backbone', '--dks-synergy-weight', '2', *T3)),
    byot=(
        'BYOT-style: the backbone teaches the branches',
        ['--dks', '--dks-synergy-weight', *'0 1 1 0 0 0 0 0 0'.split()]),
    top_down=('top-down', taught('top-down')),
    bottom_up=('bottom-up', taught('bottom-up')),
    # Less arithmetic.
    **{f'dks_budget_{x}': (f'DKS, budget {x}', ['--dks', '--dks-budget', x]) for x in ('1.5', '1.3')},
    **{'ds_budget_1.3': ('DS, budget 1.3', taught('none', '--dks-budget', '1.3'))},
    ds_conv=('DS, convolutional branches', taught('none', '--dks-branches', 'conv')),
    dks_budget_bottom_up=('budget 1.3, bottom-up', taught('bottom-up', '--dks-budget', '1.3')),
    dks_budget_late=(
        'DKS, budget 1.3, synergy from a third of the epochs',
        ['--dks', '--dks-budget', '1.3', '--dks-start-epoch', '{third}']),
    dks_fraction_half=('DKS on half of each batch', ['--dks', '--dks-batch-fraction', '0.5']),
    dks_fraction=('DKS on 10 of 64 images', ['--dks', '--dks-batch-fraction', '0.15625']),
    dks_fraction_weighted=('DKS on 10 of 64 images, weighted by their share', [
        '--dks', '--dks-batch-fraction', '0.15625',
        '--dks-ce-weight', '1', '0.15625', '0.15625', '--dks-synergy-weight', '0.15625']),
    dks_every=('DKS in every 6th update', ['--dks', '--dks-every', '6']),
    dks_conv=('DKS, convolutional branches', ['--dks', '--dks-branches', 'conv']),
)

THREE = ('baseline', 'ds', 'dks')
# Who should teach whom: searched with one seed.
SEARCH = (
    'to_backbone_t3', 'to_backbone', 'to_backbone_t4_x2', 'ema_all_t3', 'ensemble_all_t3', 'ema_to_backbone_t3',
    'strong_to_backbone_t3', 'ds_weighted', 'ds_conv', 'ds_half', 'dks_half', 'dks_late', 'dks_t3',
    'to_backbone_t3_half', 'dks_budget_1.3', 'ds_budget_1.3')
# The one of them that the longer and the other experiments compare with, until the search says which is best.
BEST = ('to_backbone_t3',)
TEACHERS = ('to_backbone_t3', 'ensemble_all_t3', 'ema_all_t3', 'dks_t3')

# What is run where nothing is chosen, and in which order: row, methods, seeds, epochs (None: the recipe's).
PLAN = (
    ('resnet20', (*THREE, *SEARCH), (0,), None),
    # If the backbone is too small to learn from its branches, a smaller one gains less.
    ('resnet8', (*THREE, *BEST), (0, 1), None),
    ('resnet20', (*THREE, *BEST), (0,), 12),
    ('resnet20', (*THREE, *BEST), (0,), 60),
    ('resnet20', (*THREE, *BEST), (1, 2), None),
    ('resnet20', (*THREE, *BEST), (0,), 120),
    ('resnet32', ('dks', 'baseline', 'ds', *BEST), (0,), None),
    ('vit_tiny', (*THREE, *BEST), (0,), None),
    ('convnext_atto', (*THREE, *BEST), (0,), None),
    ('mini', THREE, range(5), None),
    ('mini', TEACHERS, range(5), None),
    # 165 epochs of the baseline are the arithmetic of 60 with branches, 454 that of 165.
    ('mini', (*THREE, 'dks_late', *BEST), range(3), 165),
    ('mini', ('baseline',), range(3), 454),
    ('mini', ('top_down', 'bottom_up'), range(3), None),
    ('mini', [method for method in METHODS if method.startswith('dks_') and method not in TEACHERS], range(3), None),
    ('mini', ('dks_budget_1.3',), range(3, 8), None),
    ('mini', ('baseline', 'dks'), range(5, 8), None),
    # For a GPU.
    ('resnet32', THREE, range(1, 3), None),
    ('resnet32', ('top_down', 'bottom_up', 'byot', 'ensemble_all_t3'), range(3), None),
    ('wrn_28_10', ('baseline', 'dks'), range(3), None),
    ('resnet110', THREE, range(3), None),
    ('wrn_28_10_dropout', ('baseline', 'dks'), range(3), None),
    ('densenet_40_12', THREE, range(3), None),
)


def flags_of(method: str, epochs: int):
    """The flags of a method in a run of so many epochs."""
    return [flag.format(third=epochs // 3, half=epochs // 2) for flag in METHODS[method][1]]


@functools.cache
def recipe(row: str):
    """The row's settings, as its YAML file gives them."""
    return yaml.safe_load((RECIPES / f'{row}.yaml').read_text())


class Run:
    """One network, method, seed and number of epochs."""

    def __init__(self, results: str, row: str, method: str, seed: int, epochs=None):
        self.row, self.method, self.seed = row, method, seed
        self.epochs = epochs or recipe(row)['epochs']
        self.as_recipe = self.epochs == recipe(row)['epochs']
        # A length other than the recipe's is a row of its own.
        self.section = row if self.as_recipe else f'{row}_{self.epochs}_epochs'
        self.name = f'{self.section}-{method}-{seed}'
        self.results = Path(results, self.section, f'{method}-{seed}.jsonl')

    @property
    def flags(self):
        """Return the flags of the method and, where it is not the recipe's, of the length, with its schedule scaled."""
        flags = flags_of(self.method, self.epochs)
        if self.as_recipe:
            return flags
        settings = recipe(self.row)
        drops = [round(epoch * self.epochs / settings['epochs']) for epoch in settings.get('decay_milestones', ())]
        return [*flags, '--epochs', str(self.epochs), *(['--decay-milestones', *map(str, drops)] if drops else [])]

    def lines(self):
        """Return the records of its epochs."""
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    @property
    def finished(self) -> bool:
        return len(self.lines()) >= self.epochs


def planned(results: str, rows=None, methods=None, seeds=None, epochs=None):
    """The runs that the arguments choose, by row, length and seed; without methods, seeds and epochs the plan."""
    if methods or seeds or epochs:
        plan = [(row, methods or THREE, seeds or range(3), n) for row in rows or ROWS for n in epochs or [None]]
    else:
        plan = [entry for entry in PLAN if entry[0] in (rows or ROWS)]
    return [
        Run(results, row, method, seed, n) for row, methods, seeds, n in plan for seed in seeds for method in methods]


def found(results: str):
    """The runs that have results, by section: a row at one length."""
    sections = {}
    for row in ROWS:
        folders = {}
        for folder in Path(results).glob(f'{row}*'):
            match = re.fullmatch(f'{row}(?:_(\\d+)_epochs)?', folder.name)
            if match and folder.is_dir():
                folders[int(match[1] or recipe(row)['epochs'])] = folder
        for epochs, folder in sorted(folders.items()):
            names = sorted(file.stem.rpartition('-') for file in folder.glob('*.jsonl'))
            sections[row, epochs] = [
                Run(results, row, method, int(seed), epochs) for method, _, seed in names if method in METHODS]
    return sections
