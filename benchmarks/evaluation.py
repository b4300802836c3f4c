"""Speed of the evaluation: the adapter's share of the time, and the scoring of programs.

    python benchmarks/evaluation.py [--model outputs/demo/xdlm] [--data FOLDER]

Bounds: less than 3 % of the wall time is spent outside of `generate`, at 32 steps on the demo model; all 500 MBPP
solutions are scored in under 60 s on 2 cores. The sampler's time, inside `generate` and outside of the network, is
reported beside the first bound. Needs the demo's model (`make demo`) and local files of GSM8K and MBPP; measurements
without their files are skipped with a message.
"""

import argparse
import os
import time
from pathlib import Path

from lm_eval.api.instance import Instance
from measure import machine

from xdlm_hf.evaluation import sandbox
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.oracle import gold
from xdlm_hf.evaluation.tasks import gsm8k, mbpp

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "outputs" / "demo" / "xdlm")
    parser.add_argument("--data", type=Path, default=os.environ.get("XDLM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    print(machine())
    if not (options.model / "config.json").is_file():
        print(f"adapter: not measured, no model in {options.model} (make demo)")
    elif not (options.data / "gsm8k").is_dir():
        print(f"adapter: not measured, no gsm8k/ in {options.data}")
    else:
        for batch_size in (1, 8):
            adapter(options.model, options.data, options.rows, batch_size)
    if not (options.data / "mbpp").is_dir():
        print(f"scoring: not measured, no mbpp/ in {options.data}")
    else:
        scoring(options.data)


class Stopwatch:
    """Adds up the seconds spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def adapter(model: Path, data: Path, rows: int, batch_size: int) -> None:
    """Prints the shares of `generate_until`'s wall time outside of `generate` and outside of the forward passes."""
    lm = XDLMEvalModel(str(model), steps=32, max_new_tokens=128, batch_size=batch_size, device="cpu")
    docs = gsm8k.load(data=str(data))["test"].select(range(rows))
    requests = [
        Instance("generate_until", doc, (f"Question: {doc['question']}\nAnswer:", {"until": ["Question:"]}), n)
        for n, doc in enumerate(docs)
    ]
    lm.generate_until(requests[:batch_size], disable_tqdm=True)  # warm-up
    generate, forward = Stopwatch(), Stopwatch()
    lm.model.generate = generate.wrap(lm.model.generate)
    lm.model.forward = forward.wrap(lm.model.forward)
    start = time.perf_counter()
    lm.generate_until(requests)
    wall = time.perf_counter() - start
    outside = {name: 1 - watch.seconds / wall for name, watch in (("generate", generate), ("forward", forward))}
    print(
        f"adapter, batch_size={batch_size}: {rows} answers in {wall:.2f} s; outside generate "
        f"{outside['generate']:.2%}, outside the forward passes, sampler included, {outside['forward']:.2%}"
    )


def scoring(data: Path) -> None:
    """Prints the seconds to score the 500 MBPP solutions, from answer text to verdict."""
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the benchmark's own solutions
    docs = list(mbpp.load(data=str(data), protocol="lenient")["test"])
    sandbox.announce()
    start = time.perf_counter()
    verdicts = [row[0] for row in mbpp.execute([[gold("xdlm_mbpp", doc)] for doc in docs], docs)]
    seconds = time.perf_counter() - start
    print(
        f"scoring: {len(docs)} MBPP solutions in {seconds:.1f} s, {verdicts.count('pass')} pass; "
        f"confined by {', '.join(sandbox.layers())}"
    )


if __name__ == "__main__":
    main()
