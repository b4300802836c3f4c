"""Settings for every test: threads, fixed seeds, Hypothesis profiles.

The folders mirror the package. Helpers stand beside this file and are imported by their bare name: no folder of tests
is a package, so that `import models` finds models.py and not the folder of that name.

Markers (declared in setup.cfg, left out of a plain `pytest`): `slow` takes more than a minute on one core, `gpu` needs
a CUDA device, `hub` needs to reach a model or data hub. Run one kind with, for example, `pytest -m slow`.

Hypothesis profiles, chosen with HYPOTHESIS_PROFILE: `ci` (the default) draws the same examples on every run, so that a
failure is the change's and not the dice's; `explore` draws new ones, and twenty times as many.
"""

import os
import shutil

# Before huggingface_hub is imported: a name that is no folder is refused at once, not after 23 seconds of retries.
# Tests marked `hub` run with HF_HUB_OFFLINE=0.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Before Triton is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread, unless asked otherwise: two workers with more would fight for the cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def fixed_seed():
    """The global generator starts from the same state in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tests that count memory: on a CPU the scratch of losses and draws grows with the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """A real browser, without a window. Not for the session: while it is open, `asyncio.run` is refused."""
    playwright = pytest.importorskip("playwright.sync_api", reason="opening the page needs playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("opening the page needs chromium or google-chrome on the path")
    with playwright.sync_playwright() as session:
        running = session.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()
