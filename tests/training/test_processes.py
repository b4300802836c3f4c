"""How scripts that several processes run end. (What they agree on: test_revisions.py.)"""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading
import torch
from xdlm_hf.training.processes import end_script

if "{group}":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    # DDP keeps the group alive in C++, so that its threads outlive its end.
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
atexit.register(print, "registered", end=" ")
# Prints when the script is over; it is never printed if nothing waits for this thread then.
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread", end=" "))).start()
class Shutdown:
    def __del__(self):
        print("taken apart", end=" ")
kept = Shutdown()
print("done", end=" ")
end_script()
print("returned", end=" ")
"""


@pytest.mark.parametrize(
    ("group", "said"), [("gloo", "done thread registered"), ("", "done returned thread registered taken apart")]
)
def test_a_script_with_a_process_group_ends_as_python_does_but_is_not_taken_apart(group, said):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{group}", group)], capture_output=True, text=True, timeout=600
    )
    assert (run.returncode, run.stdout.split()) == (0, said.split()), run.stderr[-3000:]
