"""Released weights of the pixel U-Net: equal outputs, the name map, and files that are refused."""

import json
from pathlib import Path

import pytest
import torch
from rule_weights import weights_by_rule
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from xdlm_hf import PixelUNetConfig, PixelUNetForDiffusion
from xdlm_hf.convert import main, released_unet

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-unet"
RECORDED = json.loads((FIXTURE / "expected.json").read_text())
EXPECTED = load_file(FIXTURE / "expected.safetensors")
WEIGHTS = weights_by_rule(RECORDED["parameters"], RECORDED["seed"])
IDS, SIGMA, LABELS = EXPECTED["ids"].long(), EXPECTED["sigma"], EXPECTED["class"]
TIMED = {"time_conditioning": True}


@pytest.fixture(scope="module")
def converted():
    return released_unet(WEIGHTS, TIMED)


@torch.no_grad()
def test_the_network_gives_what_was_recorded(converted):
    scaled = (2 * IDS.float() / 259 - 1).view(2, 3, 32, 32)
    outputs = converted.unet(scaled, 1000 * SIGMA, class_labels=LABELS).sample
    assert (outputs - EXPECTED["net_out"]).abs().max() < 1e-4
    hidden = converted.backbone(IDS, timesteps=SIGMA, class_labels=LABELS).last_hidden_state
    mean, log_scale = EXPECTED["net_out"].flatten(2).chunk(2, 1)
    assert (scaled.flatten(1)[:, :64] - EXPECTED["centred"]).abs().max() < 1e-6
    assert (hidden[..., 0] - torch.tanh(scaled.flatten(1) + mean.flatten(1))).abs().max() < 1e-4
    assert (hidden[..., 1] - log_scale.flatten(1)).abs().max() < 1e-4


@torch.no_grad()
def test_the_output_layer_gives_what_was_recorded(converted):
    """Of every 192nd value; the released form adds 1e-6 inside a logarithm, which shows where p is small."""
    mean, log_scale = EXPECTED["net_out"].flatten(2).chunk(2, 1)
    parameters = torch.stack((mean.flatten(1), log_scale.flatten(1)), -1)[:, ::192]
    log_p = log_softmax(converted.get_output_embeddings()(parameters)[..., :256], -1)
    theirs = log_softmax(EXPECTED["logits_released_first_pixels"][..., :256], -1)
    assert (log_p.exp() - theirs.exp()).abs().max() < 1e-5
    assert (log_p - theirs)[log_p > -7].abs().max() < 2e-3


@pytest.mark.parametrize(
    "weights, config",
    [
        ({f"backbone.{name}": weight for name, weight in WEIGHTS.items()}, None),
        (list(WEIGHTS.values()), None),
        (WEIGHTS, PixelUNetConfig(channels=32, num_classes=10, mask_channels=False)),
        (WEIGHTS, {"channels": 32, "num_classes": 10, "mixing_ratio": 0.1}),
    ],
    ids=["prefix", "list", "config", "fields"],
)
def test_other_forms_give_the_same_network(converted, weights, config):
    model = released_unet(weights, config)
    other = model.state_dict()
    assert all(weight.equal(other[name]) for name, weight in converted.state_dict().items())
    assert (model.config.vocab_size, model.config.mask_token_id, model.config.num_bins) == (259, 256, 259)
    assert model.config.mixing_ratio == (0.1 if isinstance(config, dict) else 0.0)
    assert not model.training


def test_sizes_are_read_from_the_weights(converted):
    config = converted.config
    assert (config.channels, config.channel_multipliers, config.image_channels) == (32, [1, 2, 2, 2], 3)
    assert (config.residual_blocks, config.attention_levels, config.num_classes) == (2, [1], 10)
    table = WEIGHTS["cond_map.embedding_table.weight"]
    assert converted.unet.class_embedding.weight.equal(table[[*range(10), 11]])  # row 10 was never trained
    without = {name: weight for name, weight in WEIGHTS.items() if "cond_map" not in name}
    assert released_unet(without).config.num_classes is None


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"input_conv.bias": None}, {}, "they lack input_conv.bias"),
        ({"output_modules.2.weight": torch.zeros(1)}, {}, "they hold unknown output_modules.2.weight"),
        ({"middle_modules.1.NIN_0.W": torch.zeros(3, 64)}, {}, r"NIN_0.W \(3, 64\) instead of \(64, 64\)"),
        ({"input_conv.weight": torch.zeros(32, 1, 3, 3)}, {}, r"they hold output_modules.1.* \(6\S* instead of \(2"),
        ({"input_conv.weight": None}, {}, "not those of a released U-Net"),
        ({"cond_map.embedding_table.weight": torch.zeros(2, 128)}, {}, "class table of shape .2, 128."),
        ({"input_conv.bias": torch.zeros(32, dtype=torch.int64)}, {}, "must be floating-point"),
        ({}, {"channels": 64}, "channels=64 contradicts the shapes, which give 32"),
        ({}, {"mask_channels": True}, "mask_channels=True contradicts"),
        ({}, {"image_size": 12}, "image_size=12 cannot be halved 3 times"),
    ],
)
def test_other_weights_are_refused(change, config, message):
    weights = {name: weight for name, weight in {**WEIGHTS, **change}.items() if weight is not None}
    with pytest.raises(ValueError, match=message):
        released_unet(weights, config)


def test_a_list_of_another_network_is_refused():
    with pytest.raises(ValueError, match="a list of 329 tensors is not that"):
        released_unet(list(WEIGHTS.values())[::-1])
    with pytest.raises(ValueError, match="a list of 327 tensors does not fit"):
        released_unet([*list(WEIGHTS.values())[:-3], WEIGHTS["cond_map.embedding_table.weight"]])


def test_the_command(tmp_path, capsys):
    save_file(WEIGHTS, tmp_path / "released.safetensors")
    main(
        ["unet", "--from", str(tmp_path / "released.safetensors"), "--to", str(tmp_path / "out"), "--mixing_ratio=0.1"]
    )
    assert "N = 259" in capsys.readouterr().out
    model = PixelUNetForDiffusion.from_pretrained(tmp_path / "out")
    assert model.config.mixing_ratio == 0.1 and not model.config.mask_channels
    assert model.unet.conv_in.weight.equal(WEIGHTS["input_conv.weight"])
