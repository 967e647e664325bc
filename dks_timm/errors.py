"""Bad input: recognised where it is checked, and answered with one line. Every other error keeps its traceback.

Nothing here imports torch or timm at module level: a mistyped flag is answered at once.
"""
import contextlib
import difflib
import logging
import logging.handlers
import os
import pickle
import reprlib
import struct
import sys
import traceback

from safetensors import SafetensorError

# What reading a file can raise that is no checkpoint, or not a whole one.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SafetensorError, pickle.PickleError, struct.error)


def printable(text) -> str:
    """Text whose control characters are escaped, as a terminal would obey them and a log begin another line."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def one_line(message, most: int = 1000) -> str:
    """A message as one line of so many characters at most; what is left out of a longer one is its middle."""
    text = printable(' '.join(str(message).split()))
    return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'


def why(error: Exception, most: int = 400) -> str:
    """What an exception has to say, as one line. Of some kinds the message alone is no sentence."""
    text = one_line(error, most)
    if 'weights_only' in text or 'mmap can only be used' in text:
        # What timm and torch suggest here is to let the file run what it likes.
        return 'holds something other than plain weights, which is not loaded, as it could run code'
    if not isinstance(error, (OSError, RuntimeError, ValueError)) or not text:
        return f'{type(error).__name__}: {text}' if text else type(error).__name__
    return text


class InputError(ValueError):
    """A bad argument of a function of this package. The message begins with its name."""


class OptionError(InputError):
    """A bad invocation. The message names the flag, the value given and what would do, in one line."""

    def __init__(self, message):
        super().__init__(one_line(message))


class ExportError(RuntimeError):
    """A written model is not what it should be, and was not kept."""


class PushError(RuntimeError):
    """The Hub could not be reached, or did not take the files. Nothing is lost: the same push may work later."""


class SharedError(OptionError):
    """A refusal that every process knows of."""


class DataError(OptionError):
    """Data that a run cannot go on with, found out on the way."""

    def __init__(self, message):
        # A loader's worker sends its traceback along, as text in front of the message.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


def shown(value) -> str:
    """A value of a recipe for a message. A few lines of YAML can hold one that is too long to write down."""
    if isinstance(value, str):
        return value
    short = reprlib.Repr()
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # Python does not write down a whole number of thousands of digits
        return 'a number of thousands of digits'


def closest(name: str, names) -> str:
    """'; closest: a, b' for the names most like this one, or nothing."""
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f'; closest: {", ".join(matches)}' if matches else ''


def flag(name: str) -> str:
    """The flag of an argument: --dks-stages for dks_stages."""
    return '--' + (name if name == 'local_rank' else name.replace('_', '-'))


# Flags of the arguments that complaints begin with.
_ARGUMENTS = dict(
    stages='--dks-stages',
    branches='--dks-branches',
    branch_kwargs='--dks-branch-kwargs',
    budget='--dks-budget',
    batch_fraction='--dks-batch-fraction',
    baseline='--card-baseline',
    repo_id='--push-to-hub',
    revision='--hub-revision',
)


def works(function) -> bool:
    """Whether a function raises nothing."""
    try:
        function()
    except Exception:
        return False
    return True


@contextlib.contextmanager
def naming(subject: str, *errors, without=None):
    """Let bad input leave as an OptionError that names its flag and value.

    An InputError begins with the argument that it is about: that one's flag is named in place of the subject.

    Args:
        subject: Flag and value.
        *errors: What a library raises where they are at fault. Running out of memory is never the input's fault.
        without: Does the same without the value. Where that fails as well, the error is none of the value's.
    """
    try:
        yield
    except OptionError:
        raise
    except InputError as e:
        argument, _, rest = why(e).partition(' ')
        raise OptionError(f'{_ARGUMENTS[argument]} {rest}' if argument in _ARGUMENTS else f'{subject}: {e}') from e
    except errors as e:
        if out_of_memory(e) or without and not works(without):
            raise
        raise OptionError(f'{subject}: {why(e)}') from e


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of its device; of the latter, only the text says so."""
    texts = ('out of memory', "can't allocate memory", 'cannot allocate memory', 'not enough memory')
    said = isinstance(error, (OSError, RuntimeError)) and any(text in str(error).lower() for text in texts)
    return said or isinstance(error, MemoryError)


@contextlib.contextmanager
def exit_out_of_memory():
    """Where memory runs out, end with exit code 1, the traceback, and the flags that need less of it."""
    try:
        yield
    except Exception as e:
        if not out_of_memory(e):
            raise
        traceback.print_exc()
        sys.exit('train.py: out of memory; give a smaller --batch-size (--validation-batch-size where it evaluates), '
                 'smaller images (--img-size), --grad-checkpointing, or a smaller --model')


def erase_bar() -> str:
    """What erases a bar, if there is one, for the next thing that is written to stderr; nothing beside a terminal."""
    return '\r\x1b[J' if sys.stderr.isatty() else ''


class LogFormatter(logging.Formatter):
    """Information as it is, warnings and errors with their level; on a terminal in place of a bar.

    Also workers of loaders and other processes write there, and know nothing of the bar.
    """

    def format(self, record):
        text = super().format(record)
        return erase_bar() + (text if record.levelno == logging.INFO else f'{record.levelname}: {text}')


@contextlib.contextmanager
def exit_on_bad_input():
    """End with exit code 2 and one line where bad input was recognised; on every node, one process says it.

    Log lines and warnings wait until all is known to be well, so that a refusal is all there is to read.
    """
    level = logging.INFO if int(os.environ.get('RANK', 0)) == 0 else logging.WARNING
    waiting = logging.handlers.MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
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
        console = logging.StreamHandler()
        console.setFormatter(LogFormatter())
        waiting.setTarget(console)
        waiting.flush()
        logging.basicConfig(level=level, handlers=[console], force=True)
