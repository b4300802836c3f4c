"""Work done by the main process for all, and the end of a script that several processes run."""

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

Result = TypeVar("Result")
_PACKAGE = Path(__file__).resolve().parents[1]


def run_on_main_process(function: Callable[[], Result]) -> Result:
    """Result of `function()`, which the main process calls for all of them. Every process must call this.

    Unlike accelerate's `on_main_process` it hands result and error to the other processes.

    Raises:
        ValueError: In every process, if `function` raises one: the others would wait for its result for ever.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    result, refusal = outcome
    if refusal is not None:
        raise ValueError(refusal)
    return result


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`, then `end_script`.

    A preempted training ends with one line and status 75. So do, with status 1, errors meant for the user: a
    `ValueError`, `OSError` or `ArithmeticError` raised by a `raise` statement of the package or of a module beside the
    script (a wrong path, a full disk, a loss that is NaN). Any other error is a defect and keeps its traceback.
    """
    from .preemption import Preempted  # imports Transformers' Trainer, which `end_script` alone does not need

    status = 0
    try:
        main()
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        status = preempted.code
    except (ValueError, OSError, ArithmeticError) as error:
        if not _is_for_the_user(error):
            raise
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error
    end_script(status)


def _is_for_the_user(error: Exception) -> bool:
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

    To be called at the end of a script. A thread of gloo may still hold a tensor of the last collective operation. If
    it releases the tensor while Python shuts down, the process aborts: a run whose results are all written ends with
    SIGABRT, and the launcher reports a failure (7 of 600 exits). Closing the group ends these threads, but not under
    DDP, which keeps it open. The process therefore exits without finalizing the interpreter, as those of
    `multiprocessing` do, after waiting for threads, calling `atexit` functions and flushing its output.
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
