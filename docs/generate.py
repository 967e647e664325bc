#!/usr/bin/env python3
"""Write docs/api.md from the docstrings of the public names, and docs/flags.md from the parsers.

    python docs/generate.py
"""
import argparse
import ast
import importlib
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path

import docstring_parser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop('TIMM_DATASET_MAX_RETRIES', None)  # it sets a default

from dks_timm import cli  # noqa: E402
from dks_timm.training import config  # noqa: E402

# Section -> its objects, each with its name for users and the methods to show.
PUBLIC = {
    'Models': {
        'dks_timm.create_dks_model': (),
        'dks_timm.DKSModel': (
            'from_timm', 'forward', 'exits', 'early_exit', 'describe', 'get_classifier', 'get_classifiers',
            'set_grad_checkpointing', 'no_weight_decay', 'group_matcher'),
        'dks_timm.prune': (),
    },
    'Loss': {
        'dks_timm.synergy_loss': (),
        'dks_timm.DKSLoss': ('forward', 'forward_backbone', 'resolve_weights'),
    },
    'Training': {
        'dks_timm.DKSTask': ('forward', 'begin_update', 'get_eval_model', 'get_clip_parameters', 'get_task_state',
                             'load_checkpoint_state'),
    },
    'Publishing': {
        'dks_timm.export': (),
        'dks_timm.push_to_hub': (),
    },
    'For extensions': {
        'dks_timm.method.branches.Branch': ('forward', 'get_classifier', 'set_grad_checkpointing', 'no_weight_decay'),
        'dks_timm.method.stages.list_stages': (),
        'dks_timm.method.stages.resolve_stages': (),
        'dks_timm.method.stages.Stage': (),
    },
}
NOTE = '<!-- Written by docs/generate.py; change the docstrings or the parser, not this page. -->'


def resolve(path: str):
    module, _, name = path.rpartition('.')
    return getattr(importlib.import_module(module), name)


def plain(text: str) -> str:
    """A docstring's text as Markdown: one line a paragraph, roles and double backticks as code."""
    text = re.sub(r':(?:meth|func|class|mod):`~?([^`]+)`', r'`\1`', text or '').replace('``', '`')
    paragraphs = re.split(r'\n\s*\n', text)
    return '\n\n'.join(p if p.startswith(('- ', '    ')) else ' '.join(p.split()) for p in paragraphs)


def signature(name: str, documented) -> str:
    """The call as its file has it, annotations included: those that Python prints differ from version to version."""
    node = ast.parse(textwrap.dedent(inspect.getsource(documented))).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [f'{ast.unparse(n)}' for n in node.body if isinstance(n, ast.AnnAssign)]
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        if node is None:  # a dataclass
            return f'{name}({", ".join(fields)})'
    node.args.args = [a for a in node.args.args if a.arg not in ('self', 'cls')]
    arrow = f' -> {ast.unparse(node.returns)}'.replace("'", '') if node.returns and node.name != '__init__' else ''
    arguments = re.sub(r'(?<=[\w\]])=(?=\S)', ' = ', ast.unparse(node.args))
    line = f'{name}({arguments}){arrow}'
    if len(line) <= 100:
        return line
    cut = re.split(r', (?=[*\w]+(?:: |, |$))', arguments)
    return f'{name}(\n' + ''.join(f'    {argument},\n' for argument in cut) + f'){arrow}'


def described(documented, heading: str) -> list:
    """Lines of one function, method or class."""
    doc = docstring_parser.parse(inspect.getdoc(documented) or '', style=docstring_parser.DocstringStyle.GOOGLE)
    lines = [plain(text) + '\n' for text in (doc.short_description, doc.long_description) if text]
    items = [(f'`{p.arg_name}`', p.description) for p in doc.params if p.args[0] == 'param']
    attributes = [(f'`{p.arg_name}`', p.description) for p in doc.params if p.args[0] == 'attribute']
    raises = [(f'`{r.type_name}`', r.description) for r in doc.raises]
    for title, entries in (('Arguments', items), ('Attributes', attributes)):
        if entries:
            lines += [f'{title}:\n', *(f'* {name}: {plain(text)}' for name, text in entries), '']
    if doc.returns:
        lines += [f'Returns: {plain(doc.returns.description)}\n']
    if raises:
        lines += ['Raises:\n', *(f'* {name}: {plain(text)}' for name, text in raises), '']
    for example in doc.examples:
        lines += ['```pycon', example.description, '```', '']
    return [heading + '\n', *lines]


def api_page() -> str:
    lines = [
        NOTE, '', '# API', '',
        'The names of `dks_timm` that users call, from their docstrings. B is the number of images in a batch, C of '
        'channels (of an image) or of classes (of logits), H and W height and width in pixels, M the number of '
        'classifiers, the backbone\'s included. The command line is in [flags.md](flags.md).', '']
    for section, objects in PUBLIC.items():
        lines += [f'## {section}', '']
        for path, methods in objects.items():
            documented = resolve(path)
            lines += described(documented, f'### {path}')[:1]
            lines += ['```text', signature(path.rpartition('.')[2], documented), '```', '']
            lines += described(documented, '')[1:]
            for name in methods:
                method = getattr(documented, name)
                lines += [f'#### {path.rpartition(".")[2]}.{name}', '', '```text', signature(name, method), '```', '']
                lines += described(method, '')[1:]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).rstrip() + '\n'


def default_of(action: argparse.Action) -> str:
    value = action.default
    if action.nargs == 0:
        return 'on' if value is True else 'off'
    if value in (None, '', [], {}) or value is argparse.SUPPRESS:
        return ''
    return f'`{" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)}`' if isinstance(
        value, (list, tuple)) else f'`{value}`'


def flags_table(actions) -> list:
    lines = ['| flag | default | |', '|---|---|---|']
    for action in actions:
        if isinstance(action, argparse._HelpAction):
            continue
        takes = '' if action.nargs == 0 else action.metavar or (
            'VALUE' if action.choices or not action.option_strings else action.dest.upper())
        takes = {'+': f'{takes} ...', '*': f'{takes} ...', 3: ' '.join([takes] * 3)}.get(action.nargs, takes)
        names = ', '.join(f'`{o}{" " + takes if takes and o.startswith("--") else ""}`' for o in action.option_strings)
        text = action.help or ''
        if action.choices:
            text += ': ' + ', '.join(choice or '""' for choice in action.choices)
        if getattr(action, 'bounds', None):
            bounds = [f'{name} {bound:g}'.replace('_', ' ') for name, bound in action.bounds.items()]
            text += f' ({", ".join(bounds)})'
        lines.append(f'| {names or f"`{takes}`"} | {default_of(action)} | {text} |'.replace('<', '&lt;'))
    return [*lines, '']


def flags_page() -> str:
    parser = config.create_parser()
    lines = [
        NOTE, '', '# Flags', '',
        'Every flag of `train.py`, from its parser: timm\'s with their names and defaults, and those of this package. '
        'In a recipe (`--config`) a flag goes by its name with `_` for `-`. A value on the command line wins over the '
        'recipe, the recipe over the default. [training.md](training.md) says where a flag of timm\'s means something '
        'else here. At the end, the flags of `dks-timm`.', '']
    ungrouped = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if group.title in ('positional arguments', 'options', 'optional arguments'):
            ungrouped += actions
        elif actions:
            lines += [f'## {group.title}', '', *([group.description, ''] if group.description else [])]
            lines += flags_table(actions)
    lines += ['## Other parameters', '', *flags_table(ungrouped)]
    commands = next(a for a in cli._create_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        rows = flags_table(command._actions) if command._actions else []  # train's are above
        lines += [f'## dks-timm {name}', '', command.description, '', *rows]
    return '\n'.join(lines).rstrip() + '\n'


PAGES = {'api.md': api_page, 'flags.md': flags_page}

if __name__ == '__main__':
    for name, page in PAGES.items():
        (ROOT / 'docs' / name).write_text(page())
