"""Read code blocks, links and anchors of a Markdown page, and run the blocks.

The blocks of a page run in order, in one folder, as a reader would run them. Python blocks share their variables. An
HTML comment directly above a block keeps it from being run, and says why::

    <!-- test: needs a GPU -->

``<!-- test: slow -->`` leaves it to ``pytest -m slow``. Blocks of other languages (text, bibtex, diff, ...) do not run;
a text block directly below commands is what they print.
"""
import re
import shlex
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import List, Set

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'recipes/README.md']
MARK = re.compile(r'<!-- test: (.+?) -->')


@dataclass
class Block:
    page: Path
    line: int
    language: str
    text: str
    mark: str
    follows: bool  # directly, another block: where it is text, it is what the commands above print

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'

    @property
    def commands(self) -> List[List[str]]:
        """The shell commands of the block as words, those joined by && one by one."""
        found = []
        for line in self.text.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while '&&' in words:
                found.append(words[:words.index('&&')])
                words = words[words.index('&&') + 1:]
            found.append(words)
        return [words for words in found if words]


def read(page: Path) -> List:
    return MarkdownIt('commonmark').enable('table').parse(page.read_text())


def blocks(page: Path) -> List[Block]:
    found, mark, previous = [], '', None
    for token in read(page):
        if token.type == 'fence':
            follows = previous is not None and previous.type == 'fence'
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, mark, follows))
        mark, previous = '', token
        if token.type == 'html_block' and (comment := MARK.fullmatch(token.content.strip())):
            mark = comment[1]
    return found


def links(page: Path) -> List[str]:
    """Targets of links and images."""
    return [
        str(child.attrs[name]) for token in read(page) for child in token.children or ()
        for name in ('href', 'src') if name in child.attrs]


def inline_code(page: Path) -> List[str]:
    return [child.content for token in read(page) for child in token.children or () if child.type == 'code_inline']


def anchors(page: Path) -> Set[str]:
    """Names that GitHub gives to the headings of a page."""
    found: Set[str] = set()
    tokens = read(page)
    for token, inner in zip(tokens, tokens[1:], strict=False):
        if token.type == 'heading_open':
            text = ''.join(c.content for c in inner.children if c.type in ('text', 'code_inline'))
            name = re.sub(r'[^\w\- ]', '', text.lower()).replace(' ', '-')
            found.add(next(a for a in chain([name], (f'{name}-{n}' for n in count(1))) if a not in found))
    return found
