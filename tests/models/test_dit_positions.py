"""DiT with a learned table of position embeddings, which the public formats do not have."""

from pathlib import Path

import pytest
import torch
from models import random_dit
from transformers import AutoModelForCausalLM

from xdlm_hf import DiTForDiffusionLM

RECORDED = Path(__file__).parents[1] / "fixtures" / "tiny-dit"
IDS = torch.randint(0, 39, (2, 9), generator=torch.Generator().manual_seed(3))


def difference(a, b):
    return (a - b).abs().max().item()


def with_positions(**options):
    return random_dit(use_absolute_position_embeddings=True, **options)


@torch.no_grad()
def test_masks_alone_have_positions_only_with_a_table():
    masks = torch.full((1, 9), 39)
    same, different = (model.double()(masks).logits[0] for model in (random_dit(), with_positions()))
    assert difference(same, same[:1]) < 1e-4  # rotary angles are float32
    apart = (different[:, None] - different[None]).abs().amax(-1)
    assert apart[~torch.eye(9, dtype=torch.bool)].min() > 1e-2


@torch.no_grad()
def test_a_position_is_a_vector_added_to_the_token():
    model = with_positions().double()
    table, tokens = model.backbone.position_embed.weight, model.get_input_embeddings()
    assert table.shape == (24, 32) and table.std() > 0.1
    plain = random_dit().double()
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if "position_embed" not in n})
    wanted = plain(inputs_embeds=tokens(IDS) + table[:9]).logits
    assert difference(model(IDS).logits, wanted) < 1e-12
    assert difference(model(inputs_embeds=tokens(IDS)).logits, wanted) < 1e-12
    moved = torch.arange(9)[None] + torch.tensor([[3], [15]])
    wanted = plain(inputs_embeds=tokens(IDS) + table[moved], position_ids=moved).logits
    assert difference(model(IDS, position_ids=moved).logits, wanted) < 1e-12


@torch.no_grad()
def test_a_left_padded_row_has_the_positions_of_the_shorter_row():
    model = with_positions().double()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = model(IDS[1:, 4:]).logits[0]
    assert difference(model(IDS, attention_mask=mask, position_ids=positions).logits[1, 4:], alone) < 1e-6
    assert difference(model(IDS, attention_mask=mask).logits[1, 4:], alone) > 1e-2
    # `generate` passes these positions: a greedy answer is that of the prompt alone.
    greedy = {"steps": 6, "max_new_tokens": 6, "temperature": 0.0, "sampler": "confidence"}
    both = model.generate(IDS, attention_mask=mask, **greedy)
    assert both[1, 4:].equal(model.generate(IDS[1:, 4:], **greedy)[0])


def test_positions_outside_the_table_are_refused():
    model = with_positions()
    with pytest.raises(ValueError, match=r"rows of 25 tokens are longer than the table .* \(model_length=24\)"):
        model(torch.zeros(1, 25).long())
    assert model(torch.zeros(1, 24).long()).logits.shape == (1, 24, 40)
    for wrong in (24, -1):
        positions = torch.arange(9)[None].repeat(2, 1)
        positions[1, 3] = wrong
        with pytest.raises(ValueError, match=rf"position_ids hold {wrong}, outside the table .* \[0, 24\)"):
            model(IDS, position_ids=positions)
    assert random_dit()(torch.zeros(1, 25).long()).logits.shape == (1, 25, 40)  # rotary angles have no last position


def test_the_table_is_saved_loaded_and_kept_when_tokens_are_added(tmp_path):
    model = with_positions(mask_token_id=5)
    table, before = model.backbone.position_embed.weight.clone(), model(IDS).logits
    model.resize_token_embeddings(44)
    assert model.backbone.position_embed.weight.equal(table) and difference(model(IDS).logits[..., :40], before) < 1e-6
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.use_absolute_position_embeddings and again(IDS).logits.equal(model(IDS).logits)
    with pytest.raises(ValueError, match=r"position_embed.embedding \(24, 32\) instead of \(30, 32\)"):
        DiTForDiffusionLM.from_pretrained(tmp_path, model_length=30)
    with pytest.raises(ValueError, match="The model does not have backbone.position_embed.embedding"):
        DiTForDiffusionLM.from_pretrained(tmp_path, use_absolute_position_embeddings=False)
    with pytest.raises(ValueError, match="lacks backbone.position_embed.embedding"):
        DiTForDiffusionLM.from_pretrained(RECORDED, use_absolute_position_embeddings=True)
