"""Run the recipe under FSDP2 on a CPU, for tests: accelerate wraps models in FSDP only where it sees several GPUs."""

import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import llada_cpt  # noqa: E402

from xdlm_hf.training.arguments import XDLMTrainingArguments  # noqa: E402
from xdlm_hf.training.processes import end_script  # noqa: E402


def main():
    initialise = XDLMTrainingArguments.__post_init__

    def initialise_and_pretend(args):
        initialise(args)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # the backend stays gloo

    XDLMTrainingArguments.__post_init__ = initialise_and_pretend
    trainer = llada_cpt.main()
    assert trainer.is_fsdp_enabled and type(trainer.model).__name__ == "FSDPLLaDAForDiffusionLM"


if __name__ == "__main__":
    main()
    end_script()
