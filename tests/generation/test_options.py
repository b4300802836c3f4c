"""The table of generation options: spelling, precedence, uneven blocks, and who reads it."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import small_model
from transformers import AutoModelForCausalLM

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.evaluation.arguments import GENERATION, Arguments
from xdlm_hf.generation.blocks import Blocks
from xdlm_hf.generation.options import GROUPS, OPTIONS, TABLE, markdown_table
from xdlm_hf.generation.resolution import resolve
from xdlm_hf.generation.spelling import compose, flatten
from xdlm_hf.serving.fields import ENGINE

ROOT = Path(__file__).resolve().parents[2]


def strong_model(**stored):
    """Logits far apart, k = 0.5, and what the checkpoint stores as its generation config."""
    model = small_model(mlp_hidden_size=24, pad_token_id=1, eos_token_id=1, mixing_ratio=0.5)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.generation_config = XDLMGenerationConfig(**stored)
    return model


CASES = {
    "parallel_decoding": [{"threshold": 0.9}, {"factor": 1.5}],
    "cache": ["prefix", {"mode": "dual", "refresh": 4}],
    "refinement": [
        "none",
        "budget",
        {"policy": "threshold", "threshold": 0.5, "max_edits_per_token": 2, "off_steps": 4},
        {"policy": "remdm_cap", "rate": 0.2, "off_steps": 2},
        {"max_edits_per_token": 2},
    ],
}
VALUES = [(option, value) for option, values in CASES.items() for value in values]


@pytest.mark.parametrize("option, value", VALUES, ids=str)
def test_both_spellings_are_one_value_and_are_stored_as_json(tmp_path, option, value):
    rows = {name: it for name, it in flatten({option: value})[0].items() if it is not None}
    grouped, single = XDLMGenerationConfig(**{option: value}), XDLMGenerationConfig(**rows)
    assert getattr(grouped, option) == getattr(single, option) == value
    single.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())[option] == value
    assert XDLMGenerationConfig.from_pretrained(tmp_path).given() == grouped.given()
    (tmp_path / "generation_config.json").write_text(json.dumps(rows))  # as it was stored before
    assert XDLMGenerationConfig.from_pretrained(tmp_path).given() == grouped.given()
    model = strong_model()
    assert resolve(model, None, {option: value}) == resolve(model, None, rows)
    assert resolve(model, grouped, {}) == resolve(model, single, {}) == resolve(model, None, rows)


def test_the_former_names_of_policies_are_read():
    assert XDLMGenerationConfig(refinement="remask_cap", remask_rate=0.2).refinement == {
        "policy": "remdm_cap",
        "rate": 0.2,
    }
    assert XDLMGenerationConfig(refinement={"policy": "remask_rescale", "rate": 0.2}).refinement["policy"] == (
        "remdm_rescale"
    )


STORED = {
    "parallel_decoding": {"threshold": 0.1},
    "cache": {"mode": "dual", "refresh": 3},
    "refinement": {"policy": "threshold", "threshold": 0.1, "max_edits_per_token": 1},
    "polish_steps": 3,
    "early_stop": True,
    "seed": 3,
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.5,
    "cfg_scale": 1.0,
    "suppress_tokens": [5],
    "block_length": 4,
    "steps": 4,
    "max_new_tokens": 8,
    "num_return_sequences": 2,
    "mixing_ratio": 0.2,
}


@pytest.mark.parametrize("option", STORED)
def test_none_in_the_call_switches_off_what_a_checkpoint_stores(option):
    without = {name: value for name, value in STORED.items() if name != option}
    assert resolve(strong_model(**STORED), None, {option: None}) == resolve(strong_model(**without), None, {})
    # Also a config passed, over which the call wins.
    fixed = {"top_k": None, "top_p": None} if option == "temperature" else {}  # these draw nothing at temperature 0
    given, without = XDLMGenerationConfig(**{**STORED, **fixed}), {**without, **fixed}
    model = strong_model()
    assert resolve(model, given, {option: None}) == resolve(model, XDLMGenerationConfig(**without), {})


OFF = [(name, off) for name, row in TABLE.items() for off in row.off]


@pytest.mark.parametrize("name, off", OFF, ids=str)
def test_the_off_value_in_the_call_is_none(name, off):
    stored = {**STORED, "refinement": {"policy": "threshold", "threshold": 0.1, "off_steps": 2}}
    assert resolve(strong_model(**stored), None, {name: off}) == resolve(strong_model(**stored), None, {name: None})
    # Also in a config passed, where a setting in a dict speaks for the whole option.
    given = XDLMGenerationConfig(**{name: off})
    call = {option: None if row_of(name) else off for option in given.given()}
    assert resolve(strong_model(**stored), given, {}) == resolve(strong_model(**stored), None, call)


def row_of(name):
    return TABLE[name].of


def test_what_is_off_changes_the_answer_back():
    call = {"steps": 4, "max_new_tokens": 8, "return_dict_in_generate": True}
    plain = strong_model().generate(**call)
    for stored, off in (
        ({"polish_steps": 3}, {"polish_steps": 0}),
        ({"confidence_threshold": 0.01}, {"confidence_threshold": 0}),
        ({"parallel_decoding": {"threshold": 0.01}}, {"parallel_decoding": None}),
    ):
        model = strong_model(**stored)
        assert model.generate(**call).num_forward_passes != plain.num_forward_passes
        switched_off = model.generate(**call, **off)
        assert switched_off.num_forward_passes == plain.num_forward_passes
        assert switched_off.sequences.equal(plain.sequences)


def test_a_dict_replaces_a_stored_value_and_a_name_one_setting_of_it():
    stored = {"refinement": {"policy": "threshold", "threshold": 0.1, "off_steps": 2}}
    named = resolve(strong_model(**stored), None, {"refinement": "budget"})
    assert (named.refinement, named.edit_threshold, named.refinement_off_steps) == ("budget", None, 2)
    replaced = resolve(strong_model(**stored), None, {"refinement": {"policy": "budget"}})
    assert (replaced.refinement, replaced.edit_threshold, replaced.refinement_off_steps) == ("budget", None, None)


def test_one_setting_in_two_spellings_is_refused():
    with pytest.raises(ValueError, match=r"confidence_threshold=0.5 is a setting of parallel_decoding=.*leave out"):
        strong_model().generate(parallel_decoding={"threshold": 0.9}, confidence_threshold=0.5)
    with pytest.raises(ValueError, match=r"cache_refresh=2 is a setting of cache={'mode': 'dual'}"):
        XDLMGenerationConfig(cache={"mode": "dual"}, cache_refresh=2)


def test_the_table_is_complete_and_read_by_all():
    assert len(OPTIONS) == len(set(OPTIONS)) and set(GROUPS) <= set(OPTIONS)
    assert set(compose({})) == set(OPTIONS) == set(XDLMGenerationConfig.OPTIONS)
    for name, row in TABLE.items():
        assert row.value is None or row.is_off(row.value) or row.check(name, row.value) is None
    assert {"refinement", "edit_threshold", "cache", "use_cache", "steps"} <= set(GENERATION)
    assert set(GENERATION) <= {field for field in Arguments.__dataclass_fields__}
    assert {"refinement", "parallel_decoding", "confidence_factor"} <= set(ENGINE) and "steps" not in ENGINE
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- options: [^\n]*-->\n\n(.*?)\n\n<!-- end of options -->", page, re.DOTALL)
    assert shown.group(1) == markdown_table()
    assert "parallel_decoding" in XDLMGenerationConfig.__doc__


def test_blocks_that_divide_are_as_long_as_each_other_and_others_cover_all():
    even = Blocks(3, 16, 4, 8)
    assert even.columns == [(3, 7), (7, 11), (11, 15), (15, 19)] and even.steps == [2, 2, 2, 2]
    for length in range(1, 14):
        for block_length in range(1, length + 2):
            count = -(-length // block_length)
            for steps in range(count, length + 1):
                blocks = Blocks(0, length, block_length, steps)
                sizes = [end - first for first, end in blocks.columns]
                assert sum(sizes) == length and set(sizes[:-1]) <= {block_length} and sizes[-1] <= block_length
                assert sum(blocks.steps) == steps and sorted(blocks.steps, reverse=True) == blocks.steps
                assert all(1 <= n <= size for n, size in zip(blocks.steps, sizes, strict=True))
                places = [(blocks.block_of(i), *blocks.step_in_block(i)) for i in range(steps)]
                assert places == [(b, i, n) for b, n in enumerate(blocks.steps) for i in range(n)]


@pytest.mark.parametrize("block_length, steps", [(5, 7), (7, 3), (16, 4), (20, 3), (3, 16), (4, 6)])
@pytest.mark.parametrize("options", [{}, {"mixing_ratio": 0.0}, {"parallel_decoding": {"threshold": 0.05}}], ids=str)
def test_blocks_and_steps_need_not_divide(block_length, steps, options):
    output = strong_model().generate(
        torch.tensor([[2, 3]]), max_new_tokens=16, block_length=block_length, steps=steps, eos_token_id=[],
        return_dict_in_generate=True, output_history=True, **options,
    )  # fmt: skip
    assert output.sequences.shape == (1, 18) and not (output.sequences == 20).any()
    assert output.num_forward_passes <= steps and (output.num_forward_passes == steps or "parallel_decoding" in options)
    # No block is begun before the one to its left is full.
    for ids in output.history:
        holes = (ids[0, 2:] == 20).tolist()
        begun = [not all(holes[first : first + block_length]) for first in range(0, 16, block_length)]
        full = [not any(holes[first : first + block_length]) for first in range(0, 16, block_length)]
        assert all(before for before, after in zip(full, begun[1:], strict=False) if after)


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"steps=2 is too few for the 3 blocks of 6 tokens.*use steps=3 or more"):
        strong_model().generate(max_new_tokens=16, block_length=6, steps=2)


def test_options_of_a_saved_checkpoint_hold_after_loading(tmp_path):
    model = strong_model(steps=4, max_new_tokens=8, refinement={"policy": "threshold", "threshold": 0.1})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.refinement == {"policy": "threshold", "threshold": 0.1}
    assert loaded.generate().equal(model.generate())
