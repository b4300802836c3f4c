"""Keys and values kept between steps: exact where they must be, refused where they cannot be had."""

import json

import pytest
import torch
from models import CHECKPOINT, tiny_model
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from xdlm_hf.generation.cache import CanvasCache, CanvasLayer, RefreshPlan


@pytest.fixture(scope="module")
def model():
    """In float64: what is computed with a cache, or in a row alone, is summed in another order, and that
    may not decide. Only rotary angles are float32, 6e-8 off where cosines of fewer columns are rounded otherwise."""
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()


def one_layer():
    """Keys and values that depend on nothing but the token at their own position; float64."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    return tiny_model(seed=1, **config | {"n_layers": 1}).double().eval()


def prompts(padding):
    ids = torch.randint(0, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, missing in enumerate((5, 0, 2)):
        mask[row, :missing] = 0
    return {"input_ids": ids, "attention_mask": mask if padding == "left" else mask.flip(1)}


def generate(model, inputs, **options):
    defaults = {"max_new_tokens": 32, "steps": 16, "block_length": 8, "eos_token_id": [], "mixing_ratio": 0.0}
    return model.generate(**inputs, **{**defaults, **options}, return_dict_in_generate=True)


@pytest.mark.parametrize("padding, use_cache", [("left", "prefix"), ("right", "dual")])
@pytest.mark.parametrize(
    "options",
    [
        {"mixing_ratio": 0.0},
        {"mixing_ratio": 0.1},
        {"mixing_ratio": 0.5, "cfg_scale": 1.0},
        {"mixing_ratio": 0.1, "confidence_threshold": 0.05, "steps": 32},
        {"refinement": "remask_cap", "remask_rate": 0.3, "seed": 1},
    ],
)
def test_refreshed_every_step_it_is_no_cache(model, padding, use_cache, options):
    plain = generate(model, prompts(padding), **options)
    cached = generate(model, prompts(padding), **options, use_cache=use_cache, cache_refresh=1)
    assert cached.sequences.equal(plain.sequences) and cached.num_forward_passes == plain.num_forward_passes


@pytest.mark.parametrize("use_cache", ["prefix", "dual"])
def test_one_layer_needs_no_refresh(use_cache):
    # At k = 0 nothing outside the window changes, so its keys of the first layer are right for ever.
    model = one_layer()
    plain, cached = (generate(model, prompts("left"), use_cache=cache) for cache in (False, use_cache))
    assert cached.sequences.equal(plain.sequences)


@pytest.mark.parametrize("use_cache", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_a_row_gets_what_it_gets_alone(model, use_cache, refresh):
    options = {"use_cache": use_cache, "cache_refresh": refresh, "mixing_ratio": 0.3}
    inputs = prompts("left")
    batch = generate(model, inputs, **options)
    for row in range(3):
        text = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        alone = generate(model, {"input_ids": text}, **options)
        assert alone.sequences[0, -32:].equal(batch.sequences[row, -32:])
    assert batch.num_edits.min() > 0


def test_without_changes_a_step_repeats_the_whole_pass(model):
    inputs = prompts("left")
    cache, columns = CanvasCache(model.config.n_layers), torch.tensor([[2, 11, 6], [0, 1, 2], [11, 3, 8]])
    whole = model(**inputs, past_key_values=cache.at(None)).logits
    some = model(
        input_ids=inputs["input_ids"].gather(1, columns),
        position_ids=columns,
        attention_mask=inputs["attention_mask"],
        past_key_values=cache.at(columns),
    ).logits
    expected = whole.gather(1, columns[..., None].expand(-1, -1, whole.shape[-1]))
    assert torch.allclose(some, expected, rtol=0, atol=1e-5) and cache.get_seq_length() == 12


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_an_edited_position_is_computed_again(mode):
    """One layer, where that makes the step exact; row 0 has one edit before the window, row 1 two, row 2 none."""
    model, ids = one_layer(), prompts("left")["input_ids"]
    plan, cache = RefreshPlan(mode, None), CanvasCache(1)
    assert plan.columns(ids, (6, 9), None) is None
    model(ids, past_key_values=cache.at(None))
    edited = ids.clone()
    edited[0, 2], edited[1, 1], edited[1, 5], edited[2, 7] = 401, 402, 403, 404
    columns, valid = plan.columns(edited, (6, 9), None)
    assert columns[:, 2:5].tolist() == [[6, 7, 8]] * 3 and valid.shape[1] == 5
    assert columns[:, :2].tolist() == [[2, 8], [1, 5], [8, 8]]
    assert valid[:, :2].tolist() == [[True, False], [True, True], [False, False]] and valid[:, 2:].all()
    assert columns.shape[1] == (8 if mode == "prefix" else 5)
    step = model(edited.gather(1, columns), position_ids=columns, past_key_values=cache.at(columns)).logits
    exact = model(edited).logits.gather(1, columns[..., None].expand(-1, -1, step.shape[-1]))
    assert torch.allclose(step, exact, rtol=0, atol=1e-5)
    stale = CanvasCache(1)
    model(ids, past_key_values=stale.at(None))
    window = columns[:, 2:5]
    wrong = model(edited.gather(1, window), position_ids=window, past_key_values=stale.at(window)).logits
    assert not torch.allclose(wrong[:2], exact[:2, 2:5], atol=1e-3)  # what it would be without


def test_whole_passes_come_when_a_block_begins_and_when_due():
    ids, plan = torch.zeros(1, 20, dtype=torch.long), RefreshPlan("dual", 3)
    whole = [plan.columns(ids, block, 0) is None for block in [(0, 8)] * 7 + [(8, 16)] * 2]
    assert whole == [True, False, False, True, False, False, True, True, False]
    assert plan.columns(ids, (8, 16), 0, polishing=True) is None


def test_a_polished_row_gets_what_it_gets_alone(model):
    """Rows of one block that are full at different steps, and settle at different ones."""
    options = {
        "use_cache": "prefix", "cache_refresh": 2, "mixing_ratio": 0.7, "polish_steps": 9, "block_length": 32,
        "confidence_threshold": 0.08, "steps": 32,
    }  # fmt: skip
    inputs = prompts("left")
    batch = generate(model, inputs, **options)
    passes = []
    for row in range(3):
        text = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
        alone = generate(model, {"input_ids": text}, **options)
        assert alone.sequences[0, -32:].equal(batch.sequences[row, -32:])
        passes.append(alone.num_forward_passes)
    assert batch.row_forward_passes.tolist() == passes and len(set(passes)) > 1


@pytest.mark.gpu
def test_layers_on_several_devices_take_columns_and_rows_of_another():
    layer = CanvasLayer()
    layer.update(torch.zeros(2, 1, 6, 4, device="cuda"), torch.zeros(2, 1, 6, 4, device="cuda"))
    layer.columns = torch.tensor([[1, 4], [0, 5]])
    keys, _ = layer.update(torch.ones(2, 1, 2, 4, device="cuda"), torch.ones(2, 1, 2, 4, device="cuda"))
    layer.batch_select_indices(torch.tensor([1]))
    assert keys.sum() == 16 and layer.keys[0, 0, :, 0].tolist() == [1, 0, 0, 0, 0, 1]


def test_equal_confidences_take_the_lower_position_also_with_a_cache():
    plan, ids = RefreshPlan("dual", None), torch.zeros(1, 12, dtype=torch.long)
    plan.columns(ids, (4, 8), None)
    columns, _ = plan.columns(ids.index_fill(1, torch.tensor([1, 3]), 5), (4, 8), None)
    assert columns.tolist() == [[1, 3, 4, 5, 6, 7]]


def test_gradient_checkpointing_in_training_mode_keeps_no_cache():
    model = one_layer()
    model.gradient_checkpointing_enable()
    generate(model, prompts("left"), use_cache="dual")
    with pytest.raises(ValueError, match=r"use_cache='dual' does not work with gradient checkpointing.*model.eval\(\)"):
        generate(model.train(), prompts("left"), use_cache="dual")


def test_rows_leave_the_cache_too(model):
    """Row 1 is at its end after the first block; the others must not notice."""
    from transformers.generation import StoppingCriteria, StoppingCriteriaList

    class SecondRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, True, False])

    options = {"use_cache": "dual", "cache_refresh": 2, "mixing_ratio": 0.3, "pad_token_id": 3}
    free = generate(model, prompts("left"), **options)
    stopped = generate(model, prompts("left"), **options, stopping_criteria=StoppingCriteriaList([SecondRow()]))
    assert stopped.sequences[[0, 2]].equal(free.sequences[[0, 2]])
    assert (stopped.sequences[1, 20:] == 3).all() and stopped.row_forward_passes.tolist() == [16, 4, 16]


def test_a_layer_keeps_what_was_not_computed():
    layer, generator = CanvasLayer(), torch.Generator().manual_seed(0)
    keys = torch.randn(2, 1, 6, 4, generator=generator)
    layer.update(keys.clone(), -keys)
    layer.columns = torch.tensor([[1, 4], [0, 5]])
    new = torch.randn(2, 1, 2, 4, generator=generator)
    got_keys, got_values = layer.update(new, -new)
    expected = keys.clone()
    for row, columns in enumerate(layer.columns):
        expected[row][:, columns] = new[row]
    assert got_keys.equal(expected) and got_values.equal(-expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_cache": True}, r"use_cache=True is not known; choose one of \['prefix', 'dual', False\]"),
        ({"cache_refresh": 4}, r"cache_refresh=4 needs a cache; add use_cache="),
        ({"use_cache": "dual", "cache_refresh": 0}, r"cache_refresh=0 must be a positive integer"),
        ({"use_cache": "dual", "sampler": "ancestral", "block_length": None}, r"'ancestral' has no option use_cache"),
        ({"use_cache": "dual", "reference_compat": True}, r"reference_compat=True reproduces, has no option use_cache"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts("left"), **options)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_that_cannot_take_a_cache_is_refused(implementation):
    model = one_layer()
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=f"attn_implementation='{implementation}' does not support the cache.*'sdpa'"):
        generate(model, prompts("left"), use_cache="prefix")


def test_a_growing_cache_is_refused(model):
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, which only grows"):
        model(torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache())


def test_an_empty_cache_has_no_columns_to_keep():
    with pytest.raises(ValueError, match="the cache is empty: run a full pass"):
        CanvasCache(1).at(torch.zeros(1, 2, dtype=torch.long))
