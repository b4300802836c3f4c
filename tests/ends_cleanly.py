"""Run a script or a module as `python` would, and fail if it ends with its process group open.

torchrun --standalone --nproc_per_node 2 tests/ends_cleanly.py recipes/llada_cpt.py --config ...
"""

import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0].endswith(".py"):
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    if torch.distributed.is_initialized():
        raise SystemExit(f"{sys.argv[0]} ended with its process group open: call end_script() last")
