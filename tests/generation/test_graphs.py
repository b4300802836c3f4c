"""Passes that are captured once and repeated: the same output, a constant number of captures.

A CPU has no graphs. `Recording` stands in for one: it records the operations of a pass, refuses those that a capture
refuses, and repeats them on the same memory. Nothing of Python is repeated, so that a pass that depends on anything
else than its buffers gives wrong tokens here as on a GPU.
"""

import gc
import inspect
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from host_waits import waits
from models import random_dit, small_model, tiny_model
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.generation import graphs
from xdlm_hf.generation.resolution import resolve


class Recording(TorchDispatchMode):
    """The operations of a pass with their memory, and their repetition."""

    every = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.tape, self.outputs = [], ()
        Recording.every.add(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not waits(function, args), f"{function} cannot be captured"
        results = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, pytree.tree_leaves(results)))
        return results

    def replay(self):
        for other in Recording.every:  # logits of other passes are not read any more
            for logits in other.outputs:
                logits.fill_(torch.nan)
        for function, args, kwargs, results in self.tape:
            for kept, again in zip(results, pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != again.data_ptr():
                    kept.copy_(again)


@pytest.fixture
def captures(monkeypatch):
    """The code for a GPU runs, with `Recording` for its graphs; a list with one entry for each capture."""
    made, capturing = [], []
    arguments, capture = inspect.signature(torch.cuda.graph), graphs.Stage._capture

    @contextmanager
    def recorded(*given, **options):
        recording = arguments.bind(*given, **options).arguments["cuda_graph"]
        capturing.append(recording)
        with recording:
            yield
        capturing.clear()

    def listed(stage, run, pool):
        capture(stage, run, pool)
        stage.graph.outputs = stage.outputs
        made.append(tuple(stage.inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": Recording,
        "graph": recorded,
        "graph_pool_handle": lambda: (0, 1),
        "device": lambda device: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_captures", lambda device: True)
    monkeypatch.setattr(graphs.Stage, "_capture", listed)
    # Transformers does not read a padding mask during a capture.
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: bool(capturing))
    return made


@pytest.fixture(scope="module")
def model():
    """In float64: padded requests are summed in another order, which may not decide."""
    return small_model(init_std=0.5, n_layers=2).double()


def prompts(seed, padded=True):
    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : 2 + seed % 2], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **options):
    defaults = {"max_new_tokens": 14, "steps": 6, "block_length": 4, "mixing_ratio": 0.3, "eos_token_id": []}
    return model.generate(**inputs, **{**defaults, **options}, return_dict_in_generate=True)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert pytree.tree_all(lambda x: x, pytree.tree_map(same, ours[name], theirs[name])), name


def same(ours, theirs):
    if not isinstance(theirs, torch.Tensor):
        return ours == theirs
    # Confidences are NaN at holes; those of padded passes may differ by the rounding of float64.
    floating = theirs.is_floating_point()
    return torch.allclose(ours, theirs, rtol=1e-9, atol=0, equal_nan=True) if floating else ours.equal(theirs)


# --- the same tokens ------------------------------------------------------------------------------------------------

SAME = {
    "k = 0": {"mixing_ratio": 0.0},
    "k = 0.3": {},
    "one block": {"block_length": None},
    "prefix, k = 0": {"mixing_ratio": 0.0, "cache": "prefix"},
    "prefix": {"cache": {"mode": "prefix", "refresh": 2}},
    "dual, k = 0": {"mixing_ratio": 0.0, "cache": "dual"},
    "dual": {"cache": "dual"},
    "dual, k = 1": {"cache": "dual", "mixing_ratio": 1.0},
    "guidance": {"cache": "dual", "cfg_scale": 0.5},
    "edits": {"cache": "prefix", "refinement": {"policy": "threshold", "threshold": 0.2, "max_edits_per_token": 2}},
    "parallel": {"parallel_decoding": {"threshold": 0.2}, "cache": "dual"},
    "suppressed": {"suppress_tokens": [3, 4, 21], "num_return_sequences": 2, "output_history": True},
    "polishing": {
        "polish_steps": 5,
        "cache": {"mode": "dual", "refresh": 3},
        "refinement": {"policy": "threshold", "threshold": 0.3, "max_edits_per_token": 2},
    },
    "end of text": {"mixing_ratio": 0.0, "eos_token_id": [12, 14], "steps": 14},
    "early stop": {"early_stop": True, "eos_token_id": [12, 14], "steps": 14, "cache": "dual"},
}


@pytest.mark.parametrize("name, padded", [*((name, True) for name in SAME), ("k = 0", False), ("prefix", False)])
def test_repeated_passes_give_the_same_output(model, captures, name, padded):
    """Of two calls; the second captures nothing."""
    graphs._KEPT.clear()
    for seed in range(2):
        inputs = prompts(seed, padded)
        assert_equal(generate(model, inputs, **SAME[name], compile="graphs"), generate(model, inputs, **SAME[name]))
        if seed == 0:
            first = len(captures)
    assert len(captures) == first <= 1 + (8 if "cache" in SAME[name] else 0)


def test_the_rows_that_end_early_are_some(model):
    """What the cases above prove depends on it."""
    for name in ("end of text", "early stop", "polishing"):
        output = generate(model, prompts(0), **SAME[name])
        assert output.row_forward_passes.min() < output.row_forward_passes.max(), name
    assert generate(model, prompts(0), **SAME["dual"]).num_edits.min() > 0


@pytest.mark.parametrize(
    "options, stages",
    [
        ({"mixing_ratio": 0.0}, 1),
        ({}, 1),
        ({"mixing_ratio": 0.0, "cache": "dual"}, 3),  # full, blocks of 4, the last one of 2
        ({"mixing_ratio": 0.0, "cache": "prefix"}, 5),  # full, and as many columns as each of 4 blocks has after it
        ({"cache": "prefix"}, 5),
    ],
)
def test_captures_depend_on_neither_steps_nor_calls(model, captures, options, stages):
    graphs._KEPT.clear()
    for seed, steps in enumerate((8, 14, 11)):
        refresh = {"cache_refresh": 2 + seed} if "cache" in options else {}
        generate(model, prompts(seed, False), **options, **refresh, steps=steps, compile="graphs")
        assert len(captures) == stages


def test_stopping_criteria_and_processors(model, captures):
    class SecondRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, True, False])

    def processor(ids, scores):  # Python that is not captured
        return scores.roll(int(ids[0, -1]), -1)

    given = {
        "stopping_criteria": StoppingCriteriaList([SecondRow()]),
        "logits_processor": LogitsProcessorList([processor]),
        "cache": {"mode": "dual", "refresh": 2},
    }
    ours, theirs = (generate(model, prompts(0), **given, compile=compile) for compile in ("graphs", None))
    assert_equal(ours, theirs)
    assert ours.row_forward_passes.tolist() == [6, 2, 6] and captures


def test_holes_and_revisions(model, captures):
    inputs = {"input_ids": torch.randint(20, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    inputs["attention_mask"][0, :3] = 0
    for call, options in [
        (model.generate, {"holes": [(3, 8), (10, 16)], "block_length": 5, "steps": 9, "cache": "dual"}),
        (model.revise, {"steps": 4, "cache": {"mode": "prefix", "refresh": 2}}),
    ]:
        text = [inputs["input_ids"]] if call == model.revise else []
        given = {k: v for k, v in inputs.items() if not text or k != "input_ids"}
        ours, theirs = (
            call(*text, **given, **options, mixing_ratio=0.3, compile=compile, return_dict_in_generate=True)
            for compile in ("graphs", False)
        )
        assert_equal(ours, theirs)
    assert captures


def test_an_answer_and_holes_of_one_length(captures):
    """Full passes with other columns write other keys, which passes captured before must not miss."""
    model = small_model(init_std=0.5, n_layers=2, max_sequence_length=160).double()
    text = torch.randint(20, (1, 134))
    options = {"block_length": 64, "steps": 6, "cache": "dual", "mixing_ratio": 0.1, "eos_token_id": []}
    for call in ({"input_ids": text[:, :6]}, {"input_ids": text, "holes": [(0, 100)]}, {"input_ids": text[:, 2:8]}):
        assert model.generate(**call, **options, compile="graphs").equal(model.generate(**call, **options))
    assert len(graphs._KEPT[model]) == 1


def test_class_labels(captures):
    model = random_dit(num_classes=3).double()
    for labels in ([0, 2], [1, 1]):
        options = {"class_labels": labels, "cfg_scale": 0.5, "sampler": "confidence", "steps": 4, "max_new_tokens": 8}
        assert model.generate(**options, compile="graphs").equal(model.generate(**options))
    assert len(captures) == 1


def test_a_network_that_caches_constants_of_its_weights_is_captured_without(captures):
    model, options = random_dit().double(), {"sampler": "confidence", "steps": 4, "max_new_tokens": 8}
    model.generate(**options, compile="graphs")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert model.generate(**options, compile="graphs").equal(model.generate(**options))
    assert len(captures) == 1


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_other_weights_give_other_tokens(captures):
    """In the same memory they are read by the same graph; in other memory there is another capture."""
    model, other = (small_model(init_std=0.5, seed=seed).double() for seed in (0, 1))
    found = []
    for change in (lambda: None, lambda: model.load_state_dict(other.state_dict()), lambda: model.float().double()):
        change()
        ours, theirs = (generate(model, prompts(0), compile=compile).sequences for compile in ("graphs", None))
        assert ours.equal(theirs)
        found.append((ours, len(captures)))
    assert not found[0][0].equal(found[1][0]) and found[1][0].equal(found[2][0])
    assert [count for _, count in found] == [1, 1, 2]


def test_hooks_are_captured_and_removed(model, captures):
    for hooked in (False, True, False):
        if hooked:
            handle = model.get_output_embeddings().register_forward_hook(
                lambda module, given, logits: logits.roll(1, -1)
            )
        ours, theirs = (generate(model, prompts(0), compile=compile).sequences for compile in ("graphs", None))
        assert ours.equal(theirs)
        if hooked:
            handle.remove()


def test_few_shapes_are_kept_and_nothing_outlives_the_model(captures):
    model = small_model()
    for length in (4, 5, 6, 7, 8, 4):
        generate(model, prompts(0), max_new_tokens=length, block_length=None, steps=1, compile="graphs")
    assert len(captures) == 6 and len(graphs._KEPT[model]) == graphs._MOST_KEPT
    generate(model, prompts(0), max_new_tokens=8, block_length=None, steps=2, compile="graphs")
    assert len(captures) == 6
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_call_within_a_call_has_its_own_buffers(model, captures):
    class Nested:
        inner = None

        def put(self, value):
            pass

        def put_draft(self, value):
            if self.inner is None:
                self.inner = generate(model, prompts(1), compile="graphs").sequences

        def end(self):
            pass

    streamer = Nested()
    outer = generate(model, prompts(0), compile="graphs", streamer=streamer).sequences
    assert outer.equal(generate(model, prompts(0)).sequences)
    assert streamer.inner.equal(generate(model, prompts(1)).sequences)


def test_after_an_error_the_next_call_is_right(model, captures):
    """As when a server ends a batch, by an exception in its streamer."""

    class Broken:
        def put(self, value):
            pass

        def put_draft(self, value):
            raise RuntimeError("broken")

        def end(self):
            pass

    graphs._KEPT.clear()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, prompts(0), compile="graphs", streamer=Broken())
    assert generate(model, prompts(1), compile="graphs").sequences.equal(generate(model, prompts(1)).sequences)
    assert len(captures) == 1


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compile": True}, r"compile=True is not known; choose one of \['graphs', False\]"),
        ({"compile": "inductor"}, r"compile='inductor' is not known"),
        ({"compile_config": 1}, r"no option compile_config=1 \(compile='graphs' captures the passes"),
        ({"disable_compile": True}, r"no option disable_compile=True \(nothing is compiled without compile='graphs'"),
        ({"temperature": 0.7}, r"compile='graphs' pads .* temperature=0.7 draws; leave out one of them"),
        ({"remasking": "random"}, r"compile='graphs' pads .* remasking='random' draws; leave out"),
        ({"refinement": {"policy": "remdm_cap", "rate": 0.2}}, r"refinement='remdm_cap' draws; leave out one of them"),
        ({"sampler": "ancestral", "block_length": None}, r"sampler='ancestral' has no option compile='graphs'"),
        ({"reference_compat": True}, r"reference_compat=True reproduces, has no option compile='graphs'"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(0), **{"compile": "graphs", **options})


def test_a_stored_value_gives_way_to_a_call_that_draws():
    model = small_model()
    model.generation_config = XDLMGenerationConfig(compile="graphs")
    assert resolve(model, None, {}).compile == "graphs"
    for call in ({"temperature": 0.5}, {"sampler": "ancestral"}, {"compile": False}, {"reference_compat": True}):
        assert resolve(model, None, call).compile is None


def test_models_that_cannot_be_captured_are_refused():
    model = tiny_model()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"under autocast.*torch.bfloat16"),
    ):
        generate(model, prompts(0), compile="graphs")
    model.get_output_embeddings().to("meta")
    with pytest.raises(ValueError, match=r"weights are on cpu, meta; load it with device_map={'': 0}"):
        generate(model, prompts(0), compile="graphs")
    flash = tiny_model()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2' reads them.*'sdpa' or 'eager'"):
        generate(flash, prompts(0), compile="graphs")
    adapted = tiny_model()
    adapted.model.transformer.blocks[0].q_proj.base_layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"adapters that are switched; merge them into the weights"):
        generate(adapted, prompts(0), compile="graphs")
