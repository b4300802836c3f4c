"""What processes that run one script do together: agree on what only one of them should find out, and end."""

import atexit
import dis
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .preemption import Preempted

Found = TypeVar("Found")
_PACKAGE = Path(__file__).resolve().parents[1]


def found_by_the_first(find: Callable[[], Found]) -> Found:
    """Result of `find()`, which the first process alone calls; every process must call this.

    Raises:
        ValueError: In every process, if `find` raises one: the others would wait for a result that never comes.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = find()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    found, refused = outcome
    if refused is not None:
        raise ValueError(refused)
    return found


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`, then `end_script`.

    A preempted training ends it with one line and status 75, an error that this package raised with one line and status
    1. `ValueError`, `OSError` and `ArithmeticError` raised by a `raise` statement of the package or of a module beside
    the script are messages for the user: a wrong path, a full disk, a loss that is NaN. Any other error is a defect and
    keeps its traceback.
    """
    status = 0
    try:
        main()
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        status = preempted.code
    except (ValueError, OSError, ArithmeticError) as error:
        if not _is_a_message(error):
            raise
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error
    end_script(status)


def _is_a_message(error: Exception) -> bool:
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    is_raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # int("x") has no raise statement
    file = Path(code.co_filename).resolve()
    return is_raised and (file.is_relative_to(_PACKAGE) or file.parent == Path(sys.argv[0]).resolve().parent)


def end_script(status: int = 0) -> None:
    """End a script that several processes run. Without a process group, returns if the status is 0.

    Raises:
        SystemExit: If no process group is open and the status is not 0.

    For the last line of a script. A thread of gloo may still hold a tensor of the last collective operation. If it lets
    go of it while Python shuts down, the thread is ended in the middle of C++ code and the process with it: a run whose
    results are all written exits with SIGABRT, and the launcher reports a failure (seen in 7 of 600 exits). Closing the
    group ends these threads, but not under DDP, which keeps it open. So the process ends without taking Python apart,
    as those of `multiprocessing` do, after all that Python does for a script first: it waits for threads, calls what
    was registered with `atexit`, and writes what is in its buffers.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if status:
            raise SystemExit(status)
        return
    torch.distributed.destroy_process_group()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
