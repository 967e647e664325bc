"""Counts what code asks of torch: operations on tensors, and values that are read on the host."""
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations on tensors by name, without views and allocations, and those that read a tensor on the host.

    Attributes:
        counts: Number of calls by operation.
        reads: Number of reads. On a GPU, the host waits for each.
    """
    READING = ('_local_scalar_dense', 'equal', 'nonzero', 'masked_select', '_unique2')

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.reads = 0
        self._conversions = _Conversions(self)

    def __enter__(self):
        self._conversions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._conversions.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition('::')[2].partition('.')[0]
        masked = name == 'index' and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.reads += masked or name in self.READING
        if not (func.is_view or name.startswith(('empty', 'new_empty', 'detach', 'lift'))):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


class _Conversions(TorchFunctionMode):
    """Counts conversions of whole tensors to numbers, which do not reach a dispatch mode."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.operations.reads += func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        return func(*args, **kwargs or {})
