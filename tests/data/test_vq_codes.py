"""VQ tokenizers: codes and images of LlamaGen's, and of image patches."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from rule_weights import weights_by_rule
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from xdlm_hf.convert import llamagen_vq, main
from xdlm_hf.data.images import VQCodes, load_vq
from xdlm_hf.data.patch_vq import PatchVQ

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-vq"
RECORDED = json.loads((FIXTURE / "expected.json").read_text())
EXPECTED = load_file(FIXTURE / "expected.safetensors")
WEIGHTS = weights_by_rule(RECORDED["parameters"], RECORDED["seed"])


@pytest.fixture(scope="module")
def converted():
    return llamagen_vq(WEIGHTS)


def patches(num_codes=16, patch_size=2, channels=1):
    torch.manual_seed(0)
    vqvae = PatchVQ(num_codes, patch_size, channels)
    torch.nn.init.uniform_(vqvae.quantize.embedding.weight, -1, 1)
    return vqvae


@torch.no_grad()
def test_llamagens_codes_and_images_are_the_recorded_ones(converted):
    latents = converted.encode(EXPECTED["image"]).latents
    assert converted.quantize(latents)[2][2].view(2, -1).equal(EXPECTED["codes"])
    shape = (2, 4, 4, 8)
    decoded = converted.decode(EXPECTED["codes"].view(2, 4, 4), force_not_quantize=True, shape=shape).sample
    assert (decoded - EXPECTED["decoded"]).abs().max() < 1e-4


@torch.no_grad()
def test_the_codebook_is_normalised(converted):
    """Codes do not depend on the lengths of the rows, as in LlamaGen, which normalises them at each use."""
    rows = converted.quantize.embedding.weight
    assert (rows.norm(dim=-1) - 1).abs().max() < 1e-6
    name = "quantize.embedding.weight"
    assert (WEIGHTS[name].norm(dim=-1) - 1).abs().max() > 0.1  # they differ in the file
    lengths = torch.linspace(0.1, 10, len(rows))[:, None]
    scaled = llamagen_vq({**WEIGHTS, name: WEIGHTS[name] * lengths, "quantize.codebook_used": torch.zeros(4)})
    image = EXPECTED["image"]
    codes = [model.quantize(model.encode(image).latents)[2][2] for model in (converted, scaled)]
    assert codes[0].equal(codes[1]) and codes[0].unique().numel() > 4
    assert (scaled.quantize.embedding.weight - normalize(WEIGHTS[name], dim=-1)).abs().max() < 1e-6


def test_uint8_images_go_to_codes_and_are_rounded_back(converted):
    codes = VQCodes(converted)
    assert (codes.num_codes, codes.channels, codes.factor) == (64, 3, 16)
    images = ((EXPECTED["image"] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        ids = codes.encode(images)
        decoded = codes.decode(EXPECTED["codes"])
    assert ids.shape == (2, 16) and ids.dtype == torch.int64
    with torch.no_grad():  # in float32, of the image that uint8 holds
        latents = converted.encode(images.float() / 127.5 - 1).latents
    assert ids.flatten().equal(converted.quantize(latents)[2][2])
    # 1e-4 of [-1, 1] is 0.013 of a grey level: a value that close to a half may be rounded to either side.
    assert (decoded.float() - ((EXPECTED["decoded"] + 1) * 127.5).clamp(0, 255)).abs().max() < 0.514


def test_patches_of_the_codebook_are_exact():
    """Every grey level comes back: a value is neither floored nor shifted."""
    vqvae = PatchVQ(64, 2)
    greys = torch.arange(256, dtype=torch.uint8).view(64, 4)
    vqvae.quantize.embedding.weight.data = greys.float() / 127.5 - 1
    codes = VQCodes(vqvae)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(4, 16)
    images = codes.decode(order)
    assert images.shape == (4, 1, 8, 8) and codes.encode(images).equal(order)
    assert set(images.flatten().tolist()) == set(range(256))
    assert images[0, 0, :2, :2].flatten().equal(greys[order[0, 0]])
    assert images[0, 0, :2, 2:4].flatten().equal(greys[order[0, 1]])  # row by row
    wide = codes.decode(order[:, :8], grid=(2, 4))
    assert wide.shape == (4, 1, 4, 8) and codes.encode(wide).equal(order[:, :8])


@pytest.mark.parametrize("kind", ["network", "patches"])
def test_tokenizers_are_loaded_by_their_kind(converted, tmp_path, kind):
    vqvae = converted if kind == "network" else patches()
    vqvae.save_pretrained(tmp_path / "vqvae")
    loaded = load_vq(str(tmp_path), "vqvae")
    assert type(loaded.vqvae) is type(vqvae)
    assert loaded.vqvae.quantize.embedding.weight.equal(vqvae.quantize.embedding.weight)


FILES = {  # LlamaGen's files have the key "model"; training files also an optimizer and a moving average
    "vq_ds16_c2i.pt": {"model": WEIGHTS},
    "training.pt": {"model": WEIGHTS, "ema": {"decay": 0.9999}, "optimizer": {"state": {}}, "steps": 3},
    "flat.safetensors": WEIGHTS,
}


@pytest.mark.parametrize("name", FILES)
def test_the_command_writes_a_tokenizer(converted, tmp_path, name, capsys):
    (save_file if name.endswith("safetensors") else torch.save)(FILES[name], tmp_path / name)
    main(["llamagen-vq", "--from", str(tmp_path / name), "--to", str(tmp_path / "vq")])
    assert sorted(path.name for path in (tmp_path / "vq").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    read, wanted = load_vq(str(tmp_path / "vq")).vqvae.state_dict(), converted.state_dict()
    assert read.keys() == wanted.keys() and all(read[key].equal(wanted[key]) for key in wanted)
    count = sum(weight.numel() for weight in WEIGHTS.values())
    assert f"{count:,} parameters, 64 codes of width 8, of 16 x 16 pixels each\nwritten to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: .*file.pt is not a file; pass the checkpoint file."),
        ({"model": {"backbone.vocab_embed.embedding": torch.ones(3, 2)}}, "error: .*they lack encoder.conv_in.weight,"),
        ({"ema": {"shadow_params": [torch.ones(2)]}}, "error: .*file.pt has neither named tensors nor"),
        ({"model": {**WEIGHTS, "quant_conv.weight": torch.ones(2)}}, r"quant_conv.weight \(2,\) instead of \(8,"),
        ({"model": WEIGHTS, "code": argparse.Namespace(x=1)}, "is refused, because it contains objects of argparse"),
    ],
)
def test_the_command_refuses_other_files_in_one_line(tmp_path, content, message):
    source, folder = tmp_path / "file.pt", tmp_path / "vq"
    if content is not None:
        torch.save(content, source)
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["llamagen-vq", "--from", str(source), "--to", str(folder)])
    assert "\n" not in str(stopped.value) and not folder.exists()
    with pytest.raises(SystemExit, match="2"):  # a moving average, noise and times are not of a tokenizer
        main(["llamagen-vq", "--from", str(source), "--to", str(folder), "--ema"])


def test_what_does_not_fit_is_refused(converted, tmp_path):
    codes = VQCodes(converted)
    with pytest.raises(ValueError, match="id 64 at row 0 column 3 is not a code: these are 0..63"):
        codes.decode(torch.tensor([[0, 1, 2, 64]]))
    with pytest.raises(ValueError, match=r"codes of shape \(1, 5\) are not \(B, L\) with L = 2 x 2; give grid"):
        codes.decode(torch.zeros(1, 5).long())
    with pytest.raises(ValueError, match="images of 1 x 64 x 64 do not fit the tokenizer, which takes 3 channels"):
        codes.encode(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 16"):
        codes.encode(torch.zeros(1, 3, 64, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match="torch.bfloat16, in which codes are not exact"):
        VQCodes(patches().to(torch.bfloat16))
    with pytest.raises(ValueError, match="vqvae=Linear has no codebook"):
        VQCodes(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cannot be read as a folder or Hub name of a VQ tokenizer"):
        load_vq(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="it is a AutoencoderKL, not one of VQModel, PatchVQ"):
        load_vq(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.conv_in.weight"), "not a supported VQ tokenizer: they lack encoder.conv_in.weight"),
        (lambda w: w.pop("quant_conv.bias"), "they lack quant_conv.bias"),
        (lambda w: w.pop("encoder.conv_blocks.1.res.0.conv1.weight"), "they lack encoder.conv_blocks.1.res.0.conv1"),
        (
            lambda w: w.update({"quantize.embedding.weight": torch.ones(64)}),
            r"quantize.embedding.weight of shape \(64,\) has not 2 dimensions",
        ),
        (lambda w: w.update({"loss.weight": torch.ones(2)}), "they hold unknown loss.weight"),
        (lambda w: w.update({"quant_conv.bias": torch.ones(9)}), r"quant_conv.bias \(9,\) instead of \(8,\)"),
    ],
)
def test_other_weights_are_refused(change, message):
    weights = dict(WEIGHTS)
    change(weights)
    with pytest.raises(ValueError, match=message):
        llamagen_vq(weights)
