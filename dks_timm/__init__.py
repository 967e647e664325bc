"""Deeply-supervised Knowledge Synergy for timm models."""
from importlib import import_module

__version__ = '0.1.0'

# Public name -> the module that defines it. Loaded on first use, so that `import dks_timm` costs nothing.
_PUBLIC = {
    'DKSModel': 'method.model',
    'create_dks_model': 'method.create',
    'prune': 'method.model',
    'DKSLoss': 'method.loss',
    'synergy_loss': 'method.loss',
    'DKSTask': 'method.task',
    'export': 'publishing.export',
    'push_to_hub': 'publishing.publish',
}

__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'.{_PUBLIC[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
