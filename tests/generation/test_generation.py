"""generate() on the recorded checkpoint and on small random models: what is filled, drawn, hooked and left out."""

import json
from dataclasses import replace

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
    posterior,
)
from xdlm_hf.generation import network
from xdlm_hf.generation.ancestral import AncestralSampler
from xdlm_hf.generation.protocol import runs_in_parts
from xdlm_hf.generation.released import ReferenceAncestralSampler

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


def test_a_tiny_temperature_is_greedy_also_with_filters(model, prompt):
    options = {"max_new_tokens": 8, "steps": 4}
    cold = model.generate(**prompt, **options, temperature=1e-39, top_p=0.9, top_k=5)
    assert cold.equal(model.generate(**prompt, **options))


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


def test_stopping_needs_a_padding_token():
    model = small_model(eos_token_id=None, pad_token_id=None)
    with pytest.raises(ValueError, match="stopping_criteria need pad_token_id"):
        model.generate(steps=2, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([_Script([1])]))


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
