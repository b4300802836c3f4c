"""Counts what makes the host wait for the device, on a CPU, where nothing waits."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its shape, only the device knows.
_OPERATIONS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
# Copies between host and device, which are no operations on a CPU.
_COPIES = {"cpu", "tolist", "numpy", "tensor", "as_tensor"}


def waits(function, args):
    """Whether an operation, as a dispatch mode sees it, makes the host wait."""
    name = function.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in _OPERATIONS or (name == "repeat_interleave" and function._overloadname == "Tensor")


class _Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _COPIES:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted_waits():
    """Yields a counter of the waits within, by name."""
    found = Counter()
    with _Operations(found), _Copies(found):
        yield found
