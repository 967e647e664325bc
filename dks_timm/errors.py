"""Bad input: recognised where it is checked, and answered in one line. Every other error keeps its traceback.

Nothing here imports torch or timm: a mistyped flag is answered at once.
"""
import contextlib
import difflib
import logging
import logging.handlers
import os
import pickle
import re
import struct
import sys
import traceback

# Raised by torch.load for a file that is no checkpoint, or not a whole one.
UNREADABLE = (EOFError, LookupError, OSError, RuntimeError, ValueError, pickle.PickleError, struct.error)
# Arguments that an InputError begins with -> their flags.
_FLAGS = dict(
    stages='dks_stages', branches='dks_branches', branch_kwargs='dks_branch_kwargs', budget='dks_budget',
    batch_fraction='dks_batch_fraction', synergy='dks_synergy', baseline='card_baseline', repo_id='push_to_hub',
    revision='hub_revision')


class InputError(ValueError):
    """A bad argument of a function of this package; its name begins the message where a flag sets it."""


class OptionError(InputError):
    """A bad invocation. The message names the flag, the value given and what works, in one line."""

    def __init__(self, message):
        super().__init__(one_line(message))


class SharedError(OptionError):
    """A refusal that every process knows of."""


class DataError(OptionError):
    """Data that a run cannot go on with, found after it has begun."""

    def __init__(self, message):
        # A loader's worker puts its traceback, as text, in front of the message.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class ExportError(RuntimeError):
    """A written model is not what it should be, and was not kept."""


class PushError(RuntimeError):
    """The Hub could not be reached, or did not take the files. Nothing is lost: the same push may work later."""


def printable(text) -> str:
    """Escape control characters, which a terminal would obey and a log would begin another line at."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def one_line(message, most: int = 1000) -> str:
    """Return a message as one line of so many characters at most; of a longer one, the middle is left out."""
    text = printable(' '.join(str(message).split()))
    return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'


def why(error: Exception, most: int = 400) -> str:
    """Return the message of an exception as one line, with its type where the message alone is no sentence."""
    text = one_line(error, most)
    if 'weights_only' in text or 'mmap can only be used' in text:
        # timm and torch suggest to let the file run its code.
        return 'holds something other than plain weights, which is not loaded, as it could run code'
    if text and isinstance(error, (OSError, RuntimeError, ValueError)):
        return text
    return f'{type(error).__name__}: {text}'.rstrip(': ')


def closest(name: str, names) -> str:
    """Return '; closest: a, b' for the names most like this one, or ''."""
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f'; closest: {", ".join(matches)}' if matches else ''


def flag(name: str) -> str:
    """Return the flag of an argument: --dks-stages for dks_stages."""
    return '--' + (name if name == 'local_rank' else name.replace('_', '-'))


def given_flags(args, *names: str) -> str:
    """Return those of some flags that were given, with their values, for the beginning of an error."""
    return ' with '.join(f'{flag(n)} {getattr(args, n)}' for n in names if getattr(args, n) not in (None, '', {}))


@contextlib.contextmanager
def naming(subject: str, *errors):
    """Raise an OptionError that names flag and value, the subject, in place of the errors of a library for bad input.

    An InputError begins with its argument, and the flag of that is named. Running out of memory is no input's fault.
    """
    try:
        yield
    except OptionError:
        raise
    except InputError as e:
        argument, _, rest = str(e).partition(' ')
        raise OptionError(f'{flag(_FLAGS[argument])} {rest}' if argument in _FLAGS else f'{subject}: {e}') from e
    except errors as e:
        if out_of_memory(e):
            raise
        raise OptionError(f'{subject}: {why(e)}') from e


def out_of_memory(error: BaseException) -> bool:
    """True if the memory of the machine or of its device was used up; of some errors, only the text says so."""
    said = re.search("(out of|can(no|')t allocate|not enough) memory", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or isinstance(error, (OSError, RuntimeError)) and bool(said)


@contextlib.contextmanager
def exit_out_of_memory():
    """End with exit code 1, the traceback and the flags that need less memory, where that runs out."""
    try:
        yield
    except Exception as e:
        if not out_of_memory(e):
            raise
        traceback.print_exc()
        sys.exit('train.py: out of memory; give a smaller --batch-size, --img-size or --model, or --grad-checkpointing')


class LogFormatter(logging.Formatter):
    """Writes warnings and errors with their level; on a terminal, a line erases the progress bar."""

    def format(self, record):
        erase = '\r\x1b[J' if sys.stderr.isatty() else ''
        level = '' if record.levelno == logging.INFO else f'{record.levelname}: '
        return erase + level + super().format(record)


@contextlib.contextmanager
def exit_on_bad_input():
    """End with exit code 2 and one line for bad input, said by one process of every node.

    Log lines and warnings are held back until the end, so that a refusal is all there is to read.
    """
    console = logging.StreamHandler()
    console.setFormatter(LogFormatter())
    waiting = logging.handlers.MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, target=console)
    level = logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.WARNING
    logging.basicConfig(level=level, handlers=[waiting], force=True)
    logging.captureWarnings(True)
    try:
        yield
    except InputError as e:
        waiting.buffer.clear()
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:
            print(f'train.py: error: {one_line(e)}', file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        logging.captureWarnings(False)
        logging.basicConfig(level=level, handlers=[console], force=True)  # closes the other, which writes its lines
