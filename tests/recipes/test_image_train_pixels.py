"""Training of the pixel U-Net: the paper's CIFAR-10 settings, and a run at the size of seconds with every noise."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from digits import image_folder
from models import random_dit
from training import CONFIGS, THREE_STEPS, flags

from xdlm_hf import GIDDProcess, PixelUNetForDiffusion, XDLMImagePipeline
from xdlm_hf.data.image_tokens import TokenSettings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import image_tokens  # noqa: E402
import image_train  # noqa: E402

SMALL = {"channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "image_size": 8, "num_classes": 3}
K = {"mdlm": 0.0, "xdlm_0.001": 1e-3, "xdlm": 0.1, "xdlm_0.5": 0.5, "udlm": 1.0, "gidd": None}


@pytest.mark.parametrize("name", K)
def test_every_config_is_the_papers(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = CONFIGS / "images" / f"cifar10_{name}.yaml"
    command = ["--config", str(path), "--use_cpu", "true", "--per_device_train_batch_size", "512", "--data", "pixels"]
    model, images, args, _ = image_train.parse(command)
    image_train.check(images, args)
    config = image_train.recipe.model_config(model)
    assert (config.channels, config.channel_multipliers, config.residual_blocks) == (128, [1, 2, 2, 2], 2)
    assert (config.attention_levels, config.dropout, config.label_dropout) == ([1], 0.1, 0.1)
    assert (config.max_position_embeddings, config.num_values, config.num_classes) == (3072, 256, 10)
    assert config.mask_channels and not config.time_conditioning
    assert (args.learning_rate, args.warmup_steps, args.max_steps, args.ema_decay) == (2e-4, 5000, 300_000, 0.9999)
    assert (args.global_batch_size, args.bf16, args.max_grad_norm, args.weight_decay) == (512, False, 1.0, 0.0)
    assert config.noise_process == ("gidd" if name == "gidd" else "stationary")
    assert name == "gidd" or args.mixing_ratio == K[name]


@pytest.mark.parametrize("name", ["xdlm", "gidd"])
def test_from_images_to_a_pipeline(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source, gidd = image_folder(tmp_path / "images", mode="RGB"), "_gidd" if name == "gidd" else ""
    image_tokens.main(["--dataset", str(source), "--pixels", "--output_dir", str(tmp_path / "pixels")])
    published = json.loads((CONFIGS / "models" / f"unet_cifar10{gidd}.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**published, **SMALL}))
    options = {
        "config": CONFIGS / "images" / f"cifar10_{name}.yaml",
        "config_name": tmp_path / "small.json",
        "data": tmp_path / "pixels",
        "output_dir": tmp_path / "run",
        **THREE_STEPS,
    }
    image_train.main(flags(options))
    pipeline = XDLMImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    model = pipeline.transformer
    assert type(model) is PixelUNetForDiffusion and isinstance(model.noise_process(), GIDDProcess) == bool(gidd)
    images = pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="uint8").images
    assert images.shape == (2, 3, 8, 8)
    with pytest.raises(SystemExit, match="estimated for transformers, not for model_type='pixel_unet'"):
        image_train.main([*flags(options), "--plan"])


def test_a_dit_of_few_greys_becomes_a_pipeline_of_them(tmp_path):
    sizes = {"vocab_size": 18, "mask_token_id": 17, "model_length": 64, "num_classes": 3, "mixing_ratio": 0.1}
    random_dit(**sizes).save_pretrained(tmp_path)
    settings = TokenSettings(
        dataset="digits",
        split="train",
        fingerprint="",
        images=1,
        tokens=17,
        channels=1,
        height=8,
        width=8,
        grid=None,
        vqvae=None,
        classes=("0", "1", "2"),
        image_size=None,
        flips=False,
        skip_damaged=False,
    )
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    image_train.save_pipeline(trainer, "not read", settings)
    pipeline = XDLMImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert (pipeline.num_tokens, pipeline.shape) == (17, (1, 8, 8))
