"""generate() on the recorded checkpoint and on small random models."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from models import CHECKPOINT, small_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from xdlm_hf import (
    LinearSchedule,
    NoiseKernel,
    StationaryProcess,
    XDLMGenerationConfig,
    posterior,
)
from xdlm_hf.generation import network
from xdlm_hf.generation.ancestral import AncestralSampler
from xdlm_hf.generation.protocol import runs_in_parts
from xdlm_hf.generation.released import ReferenceAncestralSampler
from xdlm_hf.generation.resolution import resolve

RECORDED = json.loads((CHECKPOINT / "expected_generation.json").read_text())
MASK, EOS = 510, 500


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected():
    return load_file(CHECKPOINT / "expected.safetensors")


@pytest.fixture
def prompt(expected):
    return {"input_ids": expected["input_ids"], "attention_mask": expected["attention_mask"]}


# ---------------------------------------------------------------------------------------------------------------------
# The released sampler


# Without a prompt all positions of the first step are equal to the network: rounding alone, another on every processor,
# chooses which are filled. So what was recorded without one can be repeated only where it was recorded.
@pytest.mark.parametrize("index", [i for i, case in enumerate(RECORDED) if case["prompt"] == "batch"])
def test_reference_compat_gives_the_recorded_tokens(model, expected, prompt, index):
    case = RECORDED[index]
    sequences = model.generate(
        **prompt,
        steps=case["steps"],
        max_new_tokens=case["gen_length"],
        block_length=case["block_length"],
        mixing_ratio=case["k1"],
        cfg_scale=case.get("cfg_scale", 0.0),
        reference_compat=True,
    )
    assert sequences.equal(expected[f"gen_{index}"])
    changed = not sequences[:, : prompt["input_ids"].shape[1]].equal(prompt["input_ids"])
    assert changed == case["prompt_changed"]


@pytest.mark.parametrize("index", [i for i, case in enumerate(RECORDED) if case["k1"] == 0])
def test_at_k_0_the_default_sampler_is_llada(model, expected, prompt, index):
    case = RECORDED[index]
    options = {"steps": case["steps"], "max_new_tokens": case["gen_length"], "block_length": case["block_length"]}
    sequences = model.generate(**prompt, **options, cfg_scale=case.get("cfg_scale", 0.0))
    assert sequences.equal(expected[f"gen_{index}"])


@pytest.mark.parametrize("index", [i for i, case in enumerate(RECORDED) if case["prompt"] == "none"])
def test_without_a_prompt_the_first_step_of_what_was_recorded_is_a_tie(model, expected, index):
    """One token, and confidences 4e-6 apart, which is float32 rounding of the logits; generating needs no prompt."""
    case = RECORDED[index]
    logits = model(torch.full((1, case["gen_length"]), MASK)).logits.detach()
    confidences, tokens = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1).max(-1)
    assert len(tokens.unique()) == 1
    torch.testing.assert_close(confidences, confidences.mean().expand_as(confidences), rtol=1e-4, atol=0)
    options = {"steps": case["steps"], "max_new_tokens": case["gen_length"], "block_length": case["block_length"]}
    options |= {"mixing_ratio": case["k1"], "reference_compat": True}
    sequences = model.generate(input_ids=torch.empty(2, 0, dtype=torch.long), **options)
    assert sequences.shape == expected[f"gen_{index}"].shape and (sequences != MASK).all()


def test_the_default_sampler_leaves_the_prompt_that_the_released_one_edits(model, prompt):
    options = {"steps": 8, "max_new_tokens": 32, "mixing_ratio": 0.1}
    assert not model.generate(**prompt, **options, reference_compat=True)[:, :9].equal(prompt["input_ids"])
    assert model.generate(**prompt, **options)[:, :9].equal(prompt["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# What every generation keeps


@pytest.mark.parametrize("sampler", ["confidence", "ancestral"])
@pytest.mark.parametrize("k", [0.0, 0.1, 0.5])
def test_prompt_is_untouched_and_no_mask_is_left(model, prompt, sampler, k):
    prompt["input_ids"] = prompt["input_ids"].clone()
    prompt["input_ids"][0, 3] = MASK  # a mask token in the text is text
    for cfg_scale in (0.0, 1.5):
        sequences = model.generate(
            **prompt, steps=8, max_new_tokens=24, mixing_ratio=k, sampler=sampler, cfg_scale=cfg_scale
        )
        assert sequences.shape == (2, 33)
        assert sequences[:, :9].equal(prompt["input_ids"])
        assert (sequences[:, 9:] != MASK).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_batch_equals_single_rows(attention, side):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation=attention).eval()
    prompts = [[403, 37, 204], [390, 361, 424, 90, 493, 7, 7], [11]]
    width = max(map(len, prompts))
    padding = [[EOS] * (width - len(p)) for p in prompts]
    rows = zip(padding, prompts, strict=True)
    ids = torch.tensor([pad + text if side == "left" else text + pad for pad, text in rows])
    seen = [([0] * len(pad), [1] * len(text)) for pad, text in zip(padding, prompts, strict=True)]
    mask = torch.tensor([pad + text if side == "left" else text + pad for pad, text in seen])
    options = {"steps": 12, "max_new_tokens": 36, "block_length": 12, "mixing_ratio": 0.3}
    together = model.generate(input_ids=ids, attention_mask=mask, **options, return_dict_in_generate=True)
    for row, text in enumerate(prompts):
        alone = model.generate(input_ids=torch.tensor([text]), **options, return_dict_in_generate=True)
        assert together.sequences[row, width:].equal(alone.sequences[0, len(text) :])
        assert together.num_edits[row] == alone.num_edits[0] > 0


def test_the_unseen_padding_id_does_not_matter(model, prompt):
    other = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, 3)
    options = {"attention_mask": prompt["attention_mask"], "steps": 8, "max_new_tokens": 16, "cfg_scale": 1.0}
    first, second = (model.generate(input_ids=ids, **options)[:, 9:] for ids in (prompt["input_ids"], other))
    assert first.equal(second)


def test_unconditional_generation_three_ways(model):
    by_default = model.generate(steps=4, max_new_tokens=16)
    two_by_default = model.generate(steps=4, max_new_tokens=16, num_return_sequences=2)
    by_empty = model.generate(input_ids=torch.empty(2, 0, dtype=torch.long), steps=4, max_new_tokens=16)
    by_empty_text = model.generate(
        input_ids=torch.empty(1, 0), attention_mask=torch.empty(1, 0), steps=4, max_new_tokens=16
    )
    assert by_default.shape == (1, 16) and by_empty.shape == (2, 16)
    # Equal shapes, since rounding, which breaks the tie of the first step, may depend on the number of rows.
    assert two_by_default.equal(by_empty) and by_default.equal(by_empty_text)


def test_model_generate_with_nothing_but_steps(model):
    assert model.generate(steps=2).shape == (1, 128)


def test_output_counts_and_history(model, prompt):
    out = model.generate(
        **prompt, steps=6, max_new_tokens=24, mixing_ratio=0.2, return_dict_in_generate=True, output_history=True
    )
    assert out.num_forward_passes == 6 and len(out.history) == 7
    assert (out.history[0][:, 9:] == MASK).all() and out.history[-1].equal(out.sequences)
    edits = torch.zeros(2, dtype=torch.long)
    for before, after in zip(out.history, out.history[1:], strict=False):
        assert ((before == MASK) & (after != MASK)).sum(-1).tolist() == [4, 4]
        edits += ((before != MASK) & (after != before)).sum(-1)
    assert out.num_edits.equal(edits) and edits.tolist() == [6, 6]  # floor(0.25 * 24)
    guided = model.generate(**prompt, steps=6, max_new_tokens=24, cfg_scale=1.0, return_dict_in_generate=True)
    assert guided.num_forward_passes == 12 and guided.history is None


def test_the_head_runs_only_where_tokens_can_change(model, prompt):
    widths = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    try:
        model.generate(**prompt, steps=4, max_new_tokens=16, block_length=8)
        model.generate(**prompt, steps=4, max_new_tokens=16, block_length=8, mixing_ratio=0.1)
    finally:
        handle.remove()
    assert widths == [8, 8, 8, 8] + [8, 8, 16, 16]


def test_bf16_confidences_are_float32(prompt):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.dtype)
            return scores

    model.generate(**prompt, steps=2, max_new_tokens=8, logits_processor=LogitsProcessorList([Spy()]))
    assert seen == [torch.float32] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize("options", [{"sampler": "ancestral"}, {"temperature": 0.8}, {"remasking": "random"}])
def test_seeds(model, prompt, options):
    def generate(**kwargs):
        return model.generate(**prompt, steps=8, max_new_tokens=16, mixing_ratio=0.1, **options, **kwargs)

    assert generate(seed=1).equal(generate(seed=1))
    assert not generate(seed=1).equal(generate(seed=2))
    assert generate(seed=1).equal(generate(generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(5)
    first = generate()
    torch.manual_seed(5)
    assert first.equal(generate())


def test_top_k_one_is_greedy(model, prompt):
    options = {"steps": 8, "max_new_tokens": 16}
    greedy = model.generate(**prompt, **options)
    assert model.generate(**prompt, **options, temperature=3.0, top_k=1).equal(greedy)
    assert model.generate(**prompt, **options, temperature=3.0, top_p=1e-6).equal(greedy)
    assert not model.generate(**prompt, **options, temperature=3.0, seed=0).equal(greedy)


def test_ancestral_top_k_draws_only_from_the_top(model):
    # One step goes straight to p, so every token is one of the two most likely at its position.
    ids = torch.empty(1, 0, dtype=torch.long)
    out = model.generate(
        input_ids=ids,
        steps=1,
        max_new_tokens=32,
        sampler="ancestral",
        top_k=2,
        return_dict_in_generate=True,
        output_history=True,
        eos_token_id=[],
    )
    logits = model(out.history[0]).logits.detach()
    logits[..., MASK] = -torch.inf
    top = logits.topk(2, dim=-1).indices
    assert (top == out.sequences[..., None]).any(-1).all()


def test_ancestral_steps_run_the_output_layer_in_chunks(model, prompt, monkeypatch):
    """The same tokens however the positions are cut, with all that changes logits on the way."""
    options = {"cfg_scale": 1.5, "temperature": 0.8, "top_k": 50, "suppress_tokens": [7], "seed": 0}
    options["logits_processor"] = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    chunks = []
    watch = model.get_output_embeddings().register_forward_hook(lambda head, args, _: chunks.append(len(args[0])))
    whole = model.generate(**prompt, sampler="ancestral", steps=4, max_new_tokens=32, **options)
    assert max(chunks) > 3
    chunks.clear()
    monkeypatch.setitem(network._CHUNK_ELEMENTS, "cpu", 3 * model.config.embedding_size + 1)
    assert model.generate(**prompt, sampler="ancestral", steps=4, max_new_tokens=32, **options).equal(whole)
    assert max(chunks) == 3
    # What stands around forward is called, not passed by.
    chunks.clear()
    calls, forward = [], model.forward
    model.forward = lambda **inputs: calls.append(1) or forward(**inputs)
    assert model.generate(**prompt, sampler="ancestral", steps=4, max_new_tokens=32, **options).equal(whole)
    assert len(calls) == len(chunks) == 8 and max(chunks) > 3
    del model.forward
    watch.remove()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.register_forward_pre_hook(lambda module, args: None),
        lambda model: model.register_forward_hook(lambda module, args, output: None),
        lambda model: model.compile(backend="eager"),
        lambda model: setattr(model, "forward", model.forward),
    ],
    ids=["pre-hook", "hook", "compiled", "replaced"],
)
def test_a_model_with_something_around_its_forward_is_called_whole(wrap):
    model = small_model()
    assert runs_in_parts(model)
    wrap(model)
    assert not runs_in_parts(model)


def test_num_return_sequences(model, prompt):
    sequences = model.generate(**prompt, steps=4, max_new_tokens=8, temperature=1.0, num_return_sequences=3, seed=0)
    assert sequences.shape == (6, 17)
    assert sequences[:3, :9].equal(prompt["input_ids"][:1].expand(3, -1))
    assert not sequences[0].equal(sequences[1])


def test_uniform_model_without_mask_token_generates_ancestrally():
    model = small_model(mixing_ratio=1.0, mask_token_id=None)
    assert model.generate(steps=4, max_new_tokens=8, sampler="ancestral").shape == (1, 8)
    with pytest.raises(ValueError, match="sampler='confidence' needs a mask token.*sampler='ancestral'"):
        model.generate(steps=4, max_new_tokens=8)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks, end of text


def test_logits_processors_see_current_ids_and_change_the_result(model, prompt):
    shapes = []

    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
            return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([77]), 0.0)

    sequences = model.generate(**prompt, steps=2, max_new_tokens=8, logits_processor=LogitsProcessorList([Force()]))
    assert (sequences[:, 9:] == 77).all()
    assert shapes == [((16, 17), (16, 512))] * 2
    stock = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1e6)])
    plain, penalized = (
        model.generate(**prompt, steps=24, max_new_tokens=24, logits_processor=processor)[0].tolist()
        for processor in (None, stock)
    )
    repeated = [[token for token in row[9:] if row.count(token) > 1] for row in (plain, penalized)]
    assert len(repeated[0]) > 12 and not repeated[1]


@pytest.mark.parametrize("sampler", ["confidence", "ancestral"])
def test_suppressed_tokens_do_not_appear(model, sampler):
    sequences = model.generate(steps=8, max_new_tokens=32, sampler=sampler, suppress_tokens=list(range(400)), seed=0)
    assert (sequences >= 400).all() and (sequences != MASK).all()


def test_stopping_criteria_are_asked_after_each_block(model, prompt):
    lengths = []

    class SecondBlock(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            assert (input_ids[:, 9:] != MASK).all()
            return torch.tensor([input_ids.shape[1] >= 17, input_ids.shape[1] >= 25])

    out = model.generate(
        **prompt,
        steps=8,
        max_new_tokens=32,
        block_length=8,
        stopping_criteria=StoppingCriteriaList([SecondBlock()]),
        return_dict_in_generate=True,
        pad_token_id=3,
    )
    assert lengths == [17, 25] and out.num_forward_passes == 4
    assert (out.sequences[0, 17:] == 3).all() and (out.sequences[1, 25:] == 3).all()
    assert (out.sequences[1, 17:25] != 3).all() and (out.sequences != MASK).all()


def test_what_follows_end_of_text_is_padding():
    model = small_model()
    with torch.no_grad():  # position-free logits: token 5 or, where the prompt says so, end of text
        model.get_output_embeddings().weight.zero_()
    force = LogitsProcessorList([_Script([5, 21, 6, 21, 7])])
    prompt = torch.tensor([[1, 21]])  # end of text in the prompt ends nothing
    sequences = model.generate(input_ids=prompt, steps=1, max_new_tokens=5, logits_processor=force)
    assert sequences.tolist() == [[1, 21, 5, 21, 22, 22, 22]]
    kept = model.generate(input_ids=prompt, steps=1, max_new_tokens=5, logits_processor=force, eos_token_id=[])
    assert kept.tolist() == [[1, 21, 5, 21, 6, 21, 7]]
    several = model.generate(input_ids=prompt, steps=1, max_new_tokens=5, logits_processor=force, eos_token_id=[6, 7])
    assert several.tolist() == [[1, 21, 5, 21, 6, 22, 22]]


class _Script(LogitsProcessor):
    """Logits that make position i the i-th token of a list."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return torch.nn.functional.one_hot(torch.tensor(self.tokens), scores.shape[-1]).float() * 50


# ---------------------------------------------------------------------------------------------------------------------
# Fewer passes: thresholds, and rows that are at their end


@pytest.mark.parametrize("rule", [{"confidence_threshold": 0.03}, {"confidence_factor": 30.0}])
@pytest.mark.parametrize("k", [0.0, 0.4])
def test_filling_what_is_sure_takes_fewer_passes_and_rows_do_not_meet(model, prompt, rule, k):
    options = {"max_new_tokens": 32, "block_length": 8, "mixing_ratio": k, "eos_token_id": [], **rule}
    batch = model.generate(**prompt, **options, return_dict_in_generate=True)
    assert 4 <= batch.num_forward_passes < 32 and (batch.sequences != MASK).all()
    for row in range(len(prompt["input_ids"])):
        text = prompt["input_ids"][row : row + 1, prompt["attention_mask"][row].bool()]
        alone = model.generate(text, **options, return_dict_in_generate=True)
        assert alone.sequences[0, -32:].equal(batch.sequences[row, -32:])
        assert alone.num_forward_passes == batch.row_forward_passes[row] == alone.row_forward_passes[0]
    assert torch.allclose(batch.tokens_per_forward, 32 / batch.row_forward_passes)


def test_a_threshold_of_1_is_the_plain_sampler(model, prompt):
    options = {"max_new_tokens": 16, "steps": 8, "mixing_ratio": 0.1}
    assert model.generate(**prompt, **options, confidence_threshold=1.0).equal(model.generate(**prompt, **options))


class _EndOfText(LogitsProcessor):
    """End of text, surely, at the first position asked about of the row that begins with token 1."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[(input_ids[:, 0] == 1).nonzero()[:1], 21] = 60.0
        return scores


def test_a_row_leaves_at_its_end_and_the_answers_are_the_same():
    model = small_model()
    prompts = torch.tensor([[1, 2], [3, 4]])
    processor = LogitsProcessorList([_EndOfText()])
    options = {"max_new_tokens": 16, "steps": 16, "logits_processor": processor, "return_dict_in_generate": True}
    early = model.generate(prompts, **options)
    late = model.generate(prompts, **options, early_stop=False)
    assert early.sequences.equal(late.sequences) and early.sequences[0, 2] == 21
    assert late.row_forward_passes.tolist() == [16, 16] and early.row_forward_passes.tolist() == [1, 16]
    assert early.tokens_per_forward.tolist() == [1.0, 1.0]


def test_with_remasking_no_row_leaves_by_default():
    """A token before the end may still become a hole: leaving would change the answer."""
    model = small_model()
    options = {
        "max_new_tokens": 16,
        "steps": 8,
        "refinement": "remask_rescale",
        "remask_rate": 0.9,
        "eos_token_id": list(range(0, 20, 2)),
        "return_dict_in_generate": True,
    }
    changed = []
    for seed in range(20):
        by_default, late, early = (model.generate(**options, seed=seed, early_stop=x) for x in (None, False, True))
        assert by_default.sequences.equal(late.sequences) and by_default.num_forward_passes == 8
        changed.append(not early.sequences.equal(late.sequences))
    assert any(changed)


def test_with_refinement_a_row_leaves_early_only_when_told_to():
    model = small_model()
    options = {
        "max_new_tokens": 16,
        "steps": 16,
        "mixing_ratio": 0.1,
        "logits_processor": LogitsProcessorList([_EndOfText()]),
        "return_dict_in_generate": True,
    }
    by_default = model.generate(torch.tensor([[1, 2]]), **options)
    told = model.generate(torch.tensor([[1, 2]]), **options, early_stop=True)
    assert by_default.num_forward_passes == 16 and told.num_forward_passes < 16
    assert told.sequences[0, 2] == 21 and (told.sequences[0, 3:] == 22).all()


@pytest.mark.slow
def test_the_released_ancestral_draw_starves_rare_tokens_and_ours_does_not():
    """8192 [MASK]s at t = 1/2 of 150 steps, k = 0.1, token 7 certain: each other token has probability 2e-8.

    The smallest float32 exponential is 6e-8, so a rare token wins only against a large one. Ours: within 4.4 standard
    errors of the exact share, a false alarm once in 1e5 runs.
    """
    n, rows, steps, mask = 2**16, 2**13, 150, 0
    kernel = NoiseKernel(n, 0.1, mask)
    z_t = torch.full((1, rows), mask)
    logits = torch.full((1, n), -60.0)
    logits[:, 7] = 60.0
    rates = torch.tensor([0.5 + 1 / steps]), torch.tensor([0.5])
    exact = posterior(logits[None].double().softmax(-1), z_t[:, :1], *rates, kernel)[0, 0]
    expected = rows * (1 - exact[7] - exact[mask]).item()
    counts = {}
    for cls in (AncestralSampler, ReferenceAncestralSampler):
        generator = torch.Generator().manual_seed(0)
        sampler = cls(StationaryProcess(kernel, LinearSchedule()), steps, 0, 1024, generator=generator)
        counts[cls] = 0
        for part in z_t.split(1024, 1):
            canvas = replace(sampler.begin(part, torch.ones_like(part, dtype=torch.bool)), ids=part)
            request = sampler.request(canvas, steps // 2)
            z_s = sampler.step(canvas, [logits.expand(int(request.mask.sum()), -1)], request).ids
            counts[cls] += int(((z_s != 7) & (z_s != mask)).sum())
    assert abs(counts[AncestralSampler] - expected) < 4.4 * expected**0.5
    assert counts[ReferenceAncestralSampler] < expected / 2


@pytest.mark.parametrize("use_cache", [False, "dual"])
def test_a_compiled_model_generates_the_same(use_cache):
    """Captured without breaks, one graph for each shape: with a cache one for whole passes and one for the window."""
    options = {"max_new_tokens": 8, "steps": 4, "mixing_ratio": 0.1, "use_cache": use_cache}
    prompt = torch.tensor([[1, 2, 3]])
    plain = small_model().generate(prompt, **options)
    compiled, graphs = small_model(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled.forward = torch.compile(compiled.forward, dynamic=False, fullgraph=True, backend=backend)
    assert compiled.generate(prompt, **options).equal(plain)
    assert len(graphs) == (2 if use_cache else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_config_is_saved_and_loaded_with_the_model(tmp_path):
    model = small_model(mixing_ratio=0.1)
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, block_length=4, temperature=0.5, seed=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, XDLMGenerationConfig)
    stored, given = loaded.generation_config.to_dict(), model.generation_config.to_dict()
    assert {k: stored[k] for k in XDLMGenerationConfig.OPTIONS} == {k: given[k] for k in XDLMGenerationConfig.OPTIONS}
    assert loaded.generate().equal(model.generate()) and loaded.generate().shape == (1, 8)


def test_precedence_call_then_config_then_model_then_defaults():
    model = small_model(mixing_ratio=0.5)
    model.generation_config = XDLMGenerationConfig(max_new_tokens=4, steps=2)
    assert model.generate().shape == (1, 4)
    assert model.generate(generation_config=XDLMGenerationConfig(max_new_tokens=6)).shape == (1, 6)
    assert model.generate(generation_config=XDLMGenerationConfig(max_new_tokens=6), max_new_tokens=8).shape == (1, 8)
    options = resolve(model, None, {"max_new_tokens": 8})
    assert (options.mixing_ratio, options.mask_token_id, options.steps, options.sampler) == (0.5, 20, 2, "confidence")
    assert model.generation_config.max_new_tokens == 4


def test_a_checkpoints_autoregressive_options_are_dropped_and_said(tmp_path, caplog):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "do_sample": true, "use_cache": false}')
    with caplog.at_level("WARNING", logger="transformers"):
        logger = __import__("logging").getLogger("transformers")
        logger.propagate, before = True, logger.propagate
        config = XDLMGenerationConfig.from_pretrained(tmp_path)
        logger.propagate = before
    assert config.eos_token_id == 5 and not hasattr(config, "do_sample")
    assert "['do_sample', 'use_cache']" in caplog.text


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"gen_length": 5}, r"no option gen_length=5 \(use max_new_tokens\)"),
        ({"do_sample": True}, r"no option do_sample=True \(temperature=0 is greedy"),
        ({"foo": 1}, r"no option foo=1\. Options: max_new_tokens, steps"),
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1.5 must lie in \[0, 1\]"),
        ({"steps": 0}, r"steps=0 must be a positive integer"),
        ({"steps": 2.5}, r"steps=2.5 must be a positive integer"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1 must be a positive integer"),
        ({"block_length": 3}, r"steps=4 is too few for the 6 blocks of 3 tokens.*steps=6 or more"),
        ({"steps": 17}, r"steps=17 is more than max_new_tokens=16"),
        ({"block_length": 0}, r"block_length=0 must be a positive integer"),
        ({"sampler": "ddim"}, r"sampler='ddim' is not known; choose one of \['confidence', 'ancestral'\]"),
        ({"remasking": "lucky"}, r"remasking='lucky' is not known"),
        ({"temperature": -1}, r"temperature=-1 must be 0 or above"),
        ({"temperature": "hot"}, r"temperature='hot' must be a finite number"),
        ({"mixing_ratio": "0.1"}, r"mixing_ratio='0.1' must be a finite number"),
        ({"cfg_scale": float("nan")}, r"cfg_scale=nan must be a finite number"),
        ({"mask_token_id": -1}, r"mask_token_id holds token id -1, outside \[0, 24\)"),
        ({"pad_token_id": 24}, r"pad_token_id holds token id 24"),
        ({"pad_token_id": 20}, r"pad_token_id=20 is the mask token"),
        ({"seed": 1.5}, r"seed=1.5 must be an integer"),
        ({"suppress_tokens": [i for i in range(24) if i != 20]}, r"leaves none of the 24 tokens"),
        ({"input_ids": [[1, 2]]}, r"must be tensors: tokenize with return_tensors='pt'"),
        ({"input_ids": torch.empty(0, 2, dtype=torch.long)}, r"of shape \(B, P\) with B >= 1, got \(0, 2\)"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": -1, "temperature": 1.0}, r"top_k=-1 must be a positive integer"),
        ({"top_k": 5}, r"top_k=5.*temperature=0 draws nothing"),
        ({"cfg_scale": -1.0}, r"cfg_scale=-1.0 must be 0"),
        ({"sampler": "ancestral", "block_length": 4}, r"sampler='ancestral' has no option block_length=4"),
        ({"sampler": "ancestral", "polish_steps": 4}, r"sampler='ancestral' has no option polish_steps=4"),
        ({"confidence_threshold": -0.1}, r"confidence_threshold=-0.1 must lie in \(0, 1\]"),
        ({"confidence_threshold": 1.5}, r"confidence_threshold=1.5 must lie in \(0, 1\]"),
        ({"confidence_threshold": 0.9, "remasking": "random"}, r"remasking='random' chooses holes by chance"),
        ({"confidence_factor": -1}, r"confidence_factor=-1 must be above 0"),
        ({"early_stop": "yes"}, r"early_stop='yes' must be True or False"),
        ({"refinement": "magic"}, r"refinement='magic' is not known; choose one of \['budget', 'threshold'"),
        ({"refinement": "threshold"}, r"refinement='threshold' needs edit_threshold, a number in \(0, 1\]"),
        ({"refinement": "remask_cap"}, r"refinement='remdm_cap' needs remask_rate"),
        ({"refinement": {"policy": "threshold"}}, r"needs .*\{'policy': 'threshold', 'threshold': ...\}"),
        ({"refinement": {"policy": "threshold", "threshold": 2}}, r"refinement\['threshold'\]=2 must lie in \(0, 1\]"),
        ({"refinement": {"speed": 2}}, r"refinement={'speed': 2} has no setting 'speed'; settings: policy, threshold"),
        ({"refinement": {"policy": "none"}, "edit_threshold": 0.5}, r"edit_threshold=0.5 is a setting of refinement="),
        ({"cache": "dual", "use_cache": "dual"}, r"use_cache='dual' is a setting of cache='dual'.*leave out use_cache"),
        ({"cache": "paged"}, r"cache='paged' is not known; choose one of \['prefix', 'dual', False\]"),
        ({"parallel_decoding": 0.9}, r"parallel_decoding=0.9 must be a dict with one of 'threshold', 'factor'"),
        ({"edit_threshold": 0.5}, r"edit_threshold=0.5 belongs to refinement='threshold'"),
        ({"refinement": "budget", "remask_rate": 0.5, "mixing_ratio": 0.1}, r"remask_rate=0.5 belongs to .*remdm_cap"),
        ({"refinement": "budget"}, r"refinement='budget' allows .* none at mixing_ratio=0"),
        ({"polish_steps": 2}, r"polish_steps=2 only edit, and mixing_ratio=0 edits nothing"),
        ({"polish_steps": 2, "refinement": "none"}, r"polish_steps=2 only edit, and refinement='none' edits nothing"),
        ({"max_edits_per_token": 2}, r"max_edits_per_token=2 bounds a refinement, .* with mixing_ratio=0.0"),
        ({"refinement_off_steps": 2}, r"refinement_off_steps=2 bounds a refinement"),
        ({"max_edits_per_token": 0}, r"max_edits_per_token=0 must be a positive integer"),
        ({"eos_token_id": "</s>"}, r"eos_token_id='</s>' must be an integer or a list of integers"),
        ({"eos_token_id": [1.5]}, r"eos_token_id=\[1.5\] must be an integer or a list"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 2]])},
            r"attention_mask holds 2; it must be 1 at text and 0 at padding",
        ),
        ({"reference_compat": True, "confidence_threshold": 0.9}, r"has no option confidence_threshold=0.9"),
        ({"sampler": "ancestral", "temperature": 0.0}, r"temperature=0.0 must be positive"),
        ({"reference_compat": True, "mixing_ratio": 1.0}, r"mixing_ratio=1 has no released sampler"),
        ({"suppress_tokens": [24]}, r"suppress_tokens holds token id 24, outside \[0, 24\)"),
        ({"max_new_tokens": 65}, r"a prompt of 2 and max_new_tokens=65 make 67 tokens, more than.* 64"),
        ({"seed": 1, "generator": torch.Generator()}, r"either seed=1 or a generator"),
        ({"generation_config": {"steps": 3}}, r"must be an XDLMGenerationConfig, not dict"),
        (
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask of shape \(1, 3\) must have the shape of input_ids, \(1, 2\)",
        ),
        ({"input_ids": torch.tensor([[1, 24]])}, r"input_ids holds token id 24, outside \[0, 24\)"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be integers of shape .*, got \(2,\)"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, r"input_ids must be integers.*torch.float32"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(kwargs, message):
    model = small_model()
    model.forward = None  # would raise TypeError, were it called
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[1, 2]]), "steps": 4, "max_new_tokens": 16, **kwargs})


def test_attention_mask_alone_is_refused():
    with pytest.raises(ValueError, match="attention_mask was given without input_ids"):
        small_model().generate(attention_mask=torch.ones(1, 2), steps=2)


def test_stopping_needs_a_padding_token():
    model = small_model(eos_token_id=None, pad_token_id=None)
    with pytest.raises(ValueError, match="stopping_criteria need a pad_token_id"):
        model.generate(steps=2, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([_Script([1])]))


def test_numpy_integers_are_integers():
    assert small_model().generate(steps=np.int64(2), max_new_tokens=np.int64(4)).shape == (1, 4)


SAMPLINGS = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"confidence_threshold": 0.9}]
SAMPLINGS += [{"sampler": "ancestral"}, {"reference_compat": True}, {"sampler": "ancestral", "reference_compat": True}]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_processor_that_leaves_no_distribution_is_named(options, value):
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, value)

    with pytest.raises(ValueError, match="cannot draw a token.*NaN or inf, or every token of a position is excluded"):
        small_model().generate(steps=2, max_new_tokens=4, logits_processor=LogitsProcessorList([Nothing()]), **options)


@pytest.mark.parametrize("options", [{}, {"refinement": "remask_cap", "remask_rate": 0.5}], ids=str)
def test_a_filled_position_that_cannot_be_edited_may_have_no_distribution(options):
    class HolesOnly(LogitsProcessor):
        def __call__(self, input_ids, scores):
            holes = input_ids.diagonal() == 20  # a row of scores for each column
            return scores.masked_fill(~holes[:, None], -torch.inf)

    model, processors = small_model(), LogitsProcessorList([HolesOnly()])
    options = {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.0, "seed": 0, **options}
    assert model.generate(logits_processor=processors, **options).equal(model.generate(**options))


def test_overflown_weights_of_one_row_are_named():
    model = small_model()
    model.get_input_embeddings().weight.data[3] = torch.nan
    ids = torch.tensor([[1, 2], [3, 2]])
    assert model.generate(ids[:1], steps=2, max_new_tokens=4).shape == (1, 6)
    with pytest.raises(ValueError, match="some logits are NaN or inf.*bfloat16 does not"):
        model.generate(ids, steps=2, max_new_tokens=4)


def test_unknown_option_in_the_config_class():
    with pytest.raises(ValueError, match=r"no option num_beams=4\."):
        XDLMGenerationConfig(num_beams=4)


def test_adapters_saved_as_causal_ones_load_and_generate(tmp_path):
    # Other LLaDA tools save LoRA adapters with peft's task type CAUSAL_LM.
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=r".*blocks\.\d+\.(q_proj|ff_out)")
    peft.get_peft_model(small_model(), lora).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert loaded.generate(input_ids=torch.tensor([[1, 2]]), steps=2, max_new_tokens=4).shape == (1, 6)
    assert loaded(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2)).logits.shape == (1, 2, 24)


def test_stored_options_give_way_to_the_sampler_the_call_chooses():
    model = small_model()
    stored = {"block_length": 4, "remasking": "random", "top_k": 3, "temperature": 0.5, "seed": 1}
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, **stored)
    assert model.generate(sampler="ancestral").shape == (1, 8)
    assert model.generate(temperature=0.0).shape == (1, 8)
    assert model.generate(generator=torch.Generator()).shape == (1, 8)
    with pytest.raises(ValueError, match="sampler='ancestral' has no option block_length=2"):
        model.generate(sampler="ancestral", block_length=2)
    with pytest.raises(ValueError, match="top_k=2.*temperature=0 draws nothing"):
        model.generate(temperature=0.0, top_k=2)


@pytest.mark.parametrize(
    "stored, call",
    [
        ({"use_cache": "dual", "cache_refresh": 4}, {"use_cache": False}),
        ({"refinement": "threshold", "edit_threshold": 0.9, "polish_steps": 2}, {"refinement": "none"}),
        ({"refinement": "remask_cap", "remask_rate": 0.1}, {"refinement": "budget", "mixing_ratio": 0.1}),
        ({"refinement": "budget", "mixing_ratio": 0.1, "polish_steps": 2}, {"mixing_ratio": 0.0}),
        ({"confidence_threshold": 0.9, "use_cache": "dual"}, {"reference_compat": True}),
        ({"confidence_threshold": 0.9}, {"remasking": "random", "seed": 1}),
        ({"remasking": "random"}, {"confidence_threshold": 0.9}),
        ({"temperature": 0.0}, {"sampler": "ancestral", "seed": 1}),
    ],
)
def test_stored_options_give_way_to_what_the_call_chooses(stored, call):
    model = small_model()
    without = model.generate(steps=4, max_new_tokens=8, **call)
    model.generation_config = XDLMGenerationConfig(steps=4, max_new_tokens=8, **stored)
    assert model.generate(**call).equal(without)


def test_a_stored_remasking_stays_where_nothing_contradicts_it():
    model = small_model()
    model.generation_config = XDLMGenerationConfig(remasking="random")
    assert resolve(model, None, {}).remasking == "random"


def test_a_tiny_temperature_is_greedy_also_with_filters(model, prompt):
    options = {"max_new_tokens": 8, "steps": 4}
    cold = model.generate(**prompt, **options, temperature=1e-39, top_p=0.9, top_k=5)
    assert cold.equal(model.generate(**prompt, **options))
