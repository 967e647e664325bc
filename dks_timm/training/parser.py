"""A parser of flags with bounds, whose refusals are an OptionError; it imports neither torch nor timm."""
import argparse
import math
import operator

from ..errors import OptionError, flag

# Bounds that a flag may declare, with the comparison that a number within them passes.
BOUNDS = dict(at_least=operator.ge, at_most=operator.le, above=operator.gt, below=operator.lt)


class StoreAction(argparse.Action):
    """Store a value that is within the bounds of its flag.

    Args:
        runs_code: The flag makes a run load code from elsewhere, so that a recipe must not set it.
        at_least, at_most, above, below: Bounds of a number, or of each number of a list.
    """

    def __init__(self, *args, runs_code=False, **kwargs):
        self.runs_code = runs_code
        self.bounds = {name: kwargs.pop(name) for name in BOUNDS if name in kwargs}
        kwargs.setdefault('metavar', {int: 'N', float: 'X'}.get(kwargs.get('type')))
        super().__init__(*args, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        self.check(values)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)

    def check(self, values) -> None:
        """Refuse numbers that are out of bounds, or not finite, by an OptionError."""
        for number in values if isinstance(values, (list, tuple)) else [values]:
            if not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise OptionError(f'{flag(self.dest)} {number}: must be a finite number')
            for name, bound in self.bounds.items():
                if not BOUNDS[name](number, bound):
                    raise OptionError(f'{flag(self.dest)} {number}: must be {name.replace("_", " ")} {bound}')


class StoreTrueAction(StoreAction):
    """Store True."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, nargs=0, default=False, **kwargs)


class ParseKwargs(argparse.Action):
    """Store key=value pairs as a dict, by timm's action of the same name."""

    def __call__(self, parser, namespace, values, option_string=None):
        from timm import utils
        for value in values:
            if value and '=' not in value:
                raise argparse.ArgumentError(self, f'{value!r} is not of the form key=value')
        utils.ParseKwargs.__call__(self, parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the actions above, which raises OptionError in place of printing its usage and exiting."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register('action', None, StoreAction)
        self.register('action', 'store_true', StoreTrueAction)

    def error(self, message):
        raise OptionError(message.removeprefix('argument '))
