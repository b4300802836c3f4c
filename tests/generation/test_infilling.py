"""Text with holes anywhere, and text to be corrected within bounds."""

import copy

import pytest
import torch
from models import CHECKPOINT
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.generation.spans import position_mask

MASK = 510


@pytest.fixture(scope="module")
def model():
    """In float64: a row alone is summed in another order than in a batch, and that may not decide."""
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer():
    words = "a token may change when it lies wholly inside of an editable span, and no other token ever does "
    return train_tokenizer([words * 20], vocab_size=320)


@pytest.fixture
def text():
    ids = torch.randint(0, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def holes():
    holes = torch.zeros(3, 12, dtype=torch.bool)
    holes[:, 5:8] = True
    holes[1, 0] = holes[2, 11] = True
    return holes


# ---------------------------------------------------------------------------------------------------------------------
# Holes


@pytest.mark.parametrize("k", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"cfg_scale": 1.0}, {"sampler": "ancestral", "steps": 6}])
def test_only_holes_are_filled(model, text, holes, k, options):
    given = text["input_ids"].clone()
    filled = model.generate(**text, holes=holes, mixing_ratio=k, **options)
    assert filled.shape == given.shape and filled[~holes].equal(given[~holes]) and (filled != MASK).all()
    assert text["input_ids"].equal(given)


def test_what_a_hole_held_does_not_matter(model, text, holes):
    other = text["input_ids"].masked_fill(holes, 7)
    filled = model.generate(**text, holes=holes)
    assert model.generate(other, attention_mask=text["attention_mask"], holes=holes).equal(filled)


def test_a_mask_token_that_is_no_hole_is_text(model, text, holes):
    text["input_ids"][:, 10] = MASK
    filled = model.generate(**text, holes=holes)
    assert (filled[:, 10] == MASK).all() and (filled[holes] != MASK).all()


def test_a_row_is_filled_as_it_is_alone(model, text, holes):
    for options in (
        {},
        {"mixing_ratio": 0.4},
        {"block_length": 4, "steps": 6, "use_cache": "dual", "cache_refresh": 1},
    ):
        batch = model.generate(**text, holes=holes, **options)
        for row in range(1, 3):
            options = {"steps": 4, **options}
            alone = model.generate(text["input_ids"][row : row + 1], holes=holes[row : row + 1], **options)
            assert alone[0].equal(batch[row])


def test_blocks_without_holes_cost_nothing(model, text):
    options = {"block_length": 3, "steps": 8, "return_dict_in_generate": True}
    out = model.generate(**text, holes=[(4, 5), (9, 11)], **options)
    assert out.num_forward_passes == 3  # one for the second block, two for the last
    assert out.tokens_per_forward.tolist() == [1.0, 1.0, 1.0]


def test_holes_are_those_of_the_text_whatever_the_number_of_answers(model, text, holes):
    once = model.generate(**text, holes=holes)
    assert model.generate(**text, holes=holes, num_return_sequences=2).equal(once.repeat_interleave(2, 0))


def test_what_a_checkpoint_stores_about_answers_says_nothing_about_a_text(model, text, holes, monkeypatch):
    filled = model.generate(**text, holes=holes)
    revised = model.revise(text["input_ids"], attention_mask=text["attention_mask"], mixing_ratio=0.5)
    stored = {"max_new_tokens": 64, "steps": 32, "block_length": 32}
    monkeypatch.setattr(model, "generation_config", XDLMGenerationConfig(**stored, confidence_threshold=0.9))
    assert model.revise(text["input_ids"], attention_mask=text["attention_mask"], mixing_ratio=0.5).equal(revised)
    monkeypatch.setattr(model, "generation_config", XDLMGenerationConfig(**stored, reference_compat=True))
    assert model.generate(**text, holes=holes).equal(filled)


def test_spans_are_columns_of_every_row(model, text):
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 4:6] = mask[:, 10:12] = True
    assert model.generate(**text, holes=[(4, 6), (10, 12)]).equal(model.generate(**text, holes=mask))


@pytest.mark.parametrize(
    "holes, options, message",
    [
        ([(8, 13)], {}, r"holes holds \(8, 13\); a span needs 0 <= first < end <= 12, in columns"),
        ([(-1, 3)], {}, r"holes holds \(-1, 3\)"),
        ([(5, 5)], {}, r"holes holds \(5, 5\)"),
        ([3], {}, r"holes holds 3; give pairs"),
        ([(2, 6)], {}, r"holes include padding at row 0 column 2"),
        (
            torch.zeros(3, 11, dtype=torch.bool),
            {},
            r"holes of shape \(3, 11\) torch.bool must be a bool mask.*\(3, 12\)",
        ),
        (torch.zeros(3, 12), {}, r"torch.float32 must be a bool mask"),
        ([(5, 6)], {"max_new_tokens": 8}, r"max_new_tokens=8 does not apply to generation with holes"),
        ([(5, 6)], {"reference_compat": True}, r"reference_compat=True does not apply to generation with holes"),
        ([(5, 6)], {"stopping_criteria": [lambda ids, scores: True]}, r"stopping_criteria apply to answers"),
        ([(5, 6)], {"steps": 13}, r"steps=13 is more than text length=12"),
        ([(5, 6)], {"block_length": 5, "steps": 2}, r"steps=2 is too few for the 3 blocks of 5 tokens"),
        ([(5, 6)], {"generation_config": XDLMGenerationConfig(reference_compat=True)}, r"reference_compat=True does"),
    ],
)
def test_bad_holes_are_refused(model, text, holes, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**text, holes=holes, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Revising


@pytest.mark.parametrize("policy", [{"mixing_ratio": 0.5}, {"refinement": "threshold", "edit_threshold": 0.001}])
def test_only_editable_tokens_change(model, text, policy):
    out = model.revise(
        text["input_ids"], [(4, 9)], [(10, 12)], attention_mask=text["attention_mask"], steps=4,
        return_dict_in_generate=True, **policy,
    )  # fmt: skip
    changed = out.sequences != text["input_ids"]
    assert changed[:, 4:9].any() and not changed[:, :4].any() and not changed[:, 9:].any()
    assert (out.num_edits >= changed.sum(-1)).all() and out.num_forward_passes <= 4


def test_the_budget_bounds_a_revision_and_is_spread_over_its_steps(model, text):
    out = model.revise(
        text["input_ids"], mixing_ratio=0.25, attention_mask=text["attention_mask"], steps=4,
        return_dict_in_generate=True, output_history=True,
    )  # fmt: skip
    assert out.num_edits.tolist() == [2, 4, 4]  # floor(8 / 3), floor(12 / 3)
    steps = [(a != b).sum(-1).tolist() for a, b in zip(out.history, out.history[1:], strict=False)]
    assert all(max(step) <= 1 for step in steps)


def test_a_text_comes_back_as_text_and_only_its_spans_change(model, tokenizer):
    text = "a token may change when it lies wholly inside of an editable span"
    first, end = text.index("wholly"), text.index(" editable")
    revised = model.revise(
        text, editable=[(first, end)], tokenizer=tokenizer, refinement="threshold", edit_threshold=1e-3, steps=2
    )
    assert isinstance(revised, str) and revised != text
    assert revised.startswith(text[:first]) and revised.endswith(text[end:])
    several = model.revise(
        [text, "no other"], editable=[[(first, end)], []], tokenizer=tokenizer, refinement="threshold",
        edit_threshold=1e-3, steps=2,
    )  # fmt: skip
    assert several[1] == "no other" and several[0].startswith(text[:first])
    twice = model.revise(
        text, editable=[(first, end)], tokenizer=tokenizer, refinement="threshold", edit_threshold=1e-3, steps=2,
        num_return_sequences=2,
    )  # fmt: skip
    assert twice == [revised, revised]


@pytest.mark.parametrize("given", [{"generation_config": XDLMGenerationConfig(steps=2)}, {"steps": 2}])
def test_steps_bound_a_revision_wherever_they_come_from(model, text, given):
    options = {"mixing_ratio": 0.9, "return_dict_in_generate": True}
    assert model.revise(text["input_ids"], **given, **options).num_forward_passes == 2
    assert model.revise(text["input_ids"], steps=None, **options).num_forward_passes == 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_revised_as_it_is_alone(model, text, side):
    ids, mask = text["input_ids"], text["attention_mask"]
    mask = mask if side == "left" else mask.flip(1)
    policy = {"refinement": "threshold", "edit_threshold": 0.01, "max_edits_per_token": 2, "steps": 6}
    batch = model.revise(ids, attention_mask=mask, **policy)
    for row in range(3):
        alone = model.revise(ids[row : row + 1, mask[row].bool()], **policy)
        assert alone[0].equal(batch[row, mask[row].bool()])
    assert not batch.equal(ids) and batch[mask == 0].equal(ids[mask == 0])


def test_an_empty_text_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the text to fill or revise is empty; pass at least one token"):
        model.revise("", tokenizer=tokenizer, mixing_ratio=0.5)
    with pytest.raises(ValueError, match="the text to fill or revise is empty"):
        model.generate(holes=[])
    with pytest.raises(ValueError, match="the list of texts to revise is empty"):
        model.revise([], tokenizer=tokenizer, mixing_ratio=0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mixing_ratio": 0.0}, r"mixing_ratio=0.0 with refinement=None edits nothing; pass mixing_ratio, or"),
        ({"editable": [(2, 8)], "locked": [(5, 9)]}, r"editable and locked overlap at row 0 column 5"),
        ({"editable": [(2, 99)]}, r"editable holds \(2, 99\)"),
        ({"max_new_tokens": 4}, r"max_new_tokens=4 does not apply to a revision"),
        ({"sampler": "ancestral"}, r"sampler='ancestral' cannot revise"),
        (
            {"generation_config": XDLMGenerationConfig(reference_compat=True)},
            r"reference_compat=True does not apply to a revision",
        ),
        ({"polish_steps": 2}, r"polish_steps=2 does not apply to a revision"),
        ({"thoughts": 2}, r"generate\(\) has no option thoughts=2"),
    ],
)
def test_bad_revisions_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.revise(torch.zeros(1, 12, dtype=torch.long), **{"mixing_ratio": 0.3, **arguments})


def test_bad_character_spans_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"editable span \(0, 4\) of text 0 overlaps the locked span \(3, 5\)"):
        model.revise("a token", editable=[(0, 4)], locked=[(3, 5)], tokenizer=tokenizer, mixing_ratio=0.5)
    with pytest.raises(ValueError, match=r"editable holds \(0, 8\); a span needs .* <= 7, in characters of text"):
        model.revise("a token", editable=[(0, 8)], tokenizer=tokenizer, mixing_ratio=0.5)
    with pytest.raises(ValueError, match="revise.. of a str needs a fast tokenizer"):
        model.revise("a token", editable=[(0, 4)], mixing_ratio=0.5)
    with pytest.raises(ValueError, match="editable has 1 lists of spans for 2 texts"):
        model.revise(["a", "b"], editable=[[(0, 1)]], tokenizer=tokenizer, mixing_ratio=0.5)


def test_a_tokenizer_that_changes_text_is_refused(model, tokenizer):
    lossy = copy.deepcopy(tokenizer)
    lossy.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(ValueError, match="the tokenizer does not decode text 0 to the same text"):
        model.revise("A token", editable=[(2, 7)], tokenizer=lossy, mixing_ratio=0.5)


def test_position_mask_keeps_a_mask_as_it_is():
    given = torch.rand(2, 5) < 0.5
    assert position_mask("holes", given, torch.ones(2, 5)).equal(given)
