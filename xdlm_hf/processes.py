"""What processes that run one script do together: agree on what only one of them should find out, and end."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .preemption import Preempted

Found = TypeVar("Found")


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
    """Call `main()` and end the script: with status 0, or 75 and one line on stderr if training was preempted."""
    status = 0
    try:
        main()
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        status = preempted.code
    end_script(status)


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
