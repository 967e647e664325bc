"""The documentation: every command and code block is run, every link leads somewhere, generated pages are up to date."""
import os
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import accelerate.commands.launch
import numpy as np
import pytest
import sklearn.datasets
import torch.distributed.run
import yaml
from documents import MARK, PAGES, ROOT, anchors, blocks, inline_code, links
from hub_server import HubServer
from test_push import use
from test_train import image_folder
from test_train import main as train

import dks_timm
from dks_timm import cli, hub, options

# What stands for the reader's own things.
PLACEHOLDERS = {
    'path/to/images': 'images',
    'CIFAR100': 'images',
    'DIR': 'images',
    'MODEL': 'resnet50',
    'N': '10',
    'owner/name': 'alice/net',
}
# Models are replaced by small ones of their kind; what comes from a folder or the Hub is small here.
SMALL_MODELS = {
    r'resnet\d+|resnet\d+_cifar': 'test_resnet',
    r'convnext_\w+(\.\w+)?': 'test_convnext',
    r'(deit|vit)_\w+': 'test_vit',
    r'efficientnet_b\d': 'test_efficientnet',
}
# What a training command gets on top: as little work as leaves every step of a run in it.
SMALLER = '--epochs 1 --warmup-epochs 0 --batch-size 8 --img-size 32 --workers 0 --device cpu --log-interval 100'.split()
# Flags with their number of values that are read and checked, and then left out: they are for other machines or models.
LEFT_OUT = dict.fromkeys(['--torchcompile', '--pretrained'], 0) | dict.fromkeys(['--dks-budget', '--dks-stages'], 1)
# What a page takes for granted when it begins: the folder of an exported model.
GIVEN = {'docs/report.md': ['out/resnet50']}
# What a mark may say.
MARKS = r'slow|needs (a GPU|the Hub|the network|ImageNet|several machines|a shell)|takes (minutes|hours)'

SHELL, PYTHON, NOT_RUN = ('', 'bash'), 'python', ('text', 'bibtex', 'yaml', 'diff')
BLOCKS = [block for page in PAGES for block in blocks(page)]


def filled_in(word):
    if word in PLACEHOLDERS:
        return PLACEHOLDERS[word]
    for name in ('owner/name', 'path/to/images'):
        word = word.replace(name, PLACEHOLDERS[name])
    return word


def small_model(name):
    return next((small for pattern, small in SMALL_MODELS.items() if re.fullmatch(pattern, name)), name)


def train_flags(words):
    """The flags of train.py in a command, after those of the launcher were checked; None for another command."""
    if words[:2] == ['accelerate', 'launch']:
        launched = accelerate.commands.launch.launch_command_parser().parse_args(words[2:])
        assert not launched.config_file or Path(launched.config_file).is_file()
        script, flags = launched.training_script, launched.training_script_args
    elif words[0] == 'torchrun':
        launched = torch.distributed.run.get_args_parser().parse_args(words[1:])
        script, flags = launched.training_script, launched.training_script_args
    elif words[0] == 'python':
        script, flags = words[1], words[2:]
    else:
        return None
    assert script == '-m' or (ROOT / script).is_file(), f'no {script}'
    return flags if script == 'train.py' else None


def run_training(flags):
    """Check the flags as they are written, then run a small training with them."""
    args, _, _ = options.parse_args(flags)
    flags = list(flags)
    for name, count in LEFT_OUT.items():
        while name in flags:
            at = flags.index(name)
            end = at + 1
            while count and end < len(flags) and not flags[end].startswith('-'):
                end += 1
            del flags[at:end]
    recipe = yaml.safe_load(Path(args.config).read_text()) if getattr(args, 'config', None) else {}
    del recipe
    train(*flags, '--model', small_model(args.model), *SMALLER)


def run_command(words):
    words = [filled_in(word) for word in words]
    flags = train_flags(words)
    if flags is not None:
        run_training(flags)
    elif words[0] == 'dks-timm':
        assert cli.main(words[1:]) == 0
    elif words[:2] == ['pip', 'install']:
        check_extras(words[2:])
    elif words[0] == 'pytest':
        assert all(Path(ROOT, word).exists() for word in words[1:] if '/' in word)
    elif words[0] == 'python':
        pytest.fail(f'no rule for {shlex.join(words)}: mark the block')
    else:
        pytest.fail(f'no rule for {shlex.join(words)}: mark the block, or call it text')


def check_extras(words):
    """An installation is what the suite runs in; here, that the extras exist."""
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    for word in words:
        for names in re.findall(r'\[(.+)\]', word):
            assert set(names.split(',')) <= set(extras)
