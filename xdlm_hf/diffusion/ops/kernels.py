"""Choice between a row pass in PyTorch and its Triton twin.

Triton comes with the CUDA builds of PyTorch. `XDLM_TRITON=0` in the environment switches its kernels off.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


def triton_rows(logits: Tensor, absorbing_ids: Sequence[int]) -> ModuleType | None:
    """`ops.triton_rows` if it can run on these logits (..., N), else None.

    It is for float32 and narrower on a GPU, contiguous rows, and at most one absorbing token.
    """
    fits = logits.dtype != torch.float64 and logits.stride(-1) == 1 and len(absorbing_ids) <= 1
    return _module() if fits and _runs_on(logits.device) else None


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.cache
def _module() -> ModuleType | None:
    if os.environ.get("XDLM_TRITON", "1") == "0":
        return None
    try:
        return importlib.import_module(f"{__package__}.triton_rows")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
