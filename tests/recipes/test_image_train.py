"""Training of image models at the size of seconds: from a folder of images to a pipeline that draws some."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from digits import image_folder, patch_tokenizer
from safetensors.torch import load_file
from training import CONFIGS, THREE_STEPS, flags

from xdlm_hf import GIDDProcess, StationaryProcess, XDLMImagePipeline
from xdlm_hf.data.image_tokens import read_settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import image_tokens  # noqa: E402
import image_train  # noqa: E402

SMALL = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "model_length": 16, "dropout": 0.0}
SMALL |= {"vocab_size": 19, "mask_token_id": 16, "num_classes": 3}
K = {"mdlm": 0.0, "xdlm_0.001": 1e-3, "xdlm": 0.1, "xdlm_0.5": 0.5, "udlm": 1.0, "gidd": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Codes of images, and small configs of the two kinds of noise."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        source, vqvae = image_folder(folder / "images"), folder / "vqvae"
        patch_tokenizer(vqvae)
        common = ["--dataset", str(source), "--vqvae", str(vqvae), "--output_dir"]
        image_tokens.main([*common, str(folder / "codes")])
        image_tokens.main([*common, str(folder / "held-out"), "--no-flips"])
        image_tokens.main(["--dataset", str(source), "--pixels", "--output_dir", str(folder / "pixels")])
    for name in ("dit_imagenet", "dit_imagenet_gidd"):
        published = json.loads((CONFIGS / "models" / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps({**published, **SMALL}))
    return folder


def options(folder, name, output_dir, **changes):
    chosen = {
        "config": CONFIGS / "images" / f"imagenet_{name}.yaml",
        "config_name": folder / ("dit_imagenet_gidd.json" if name == "gidd" else "dit_imagenet.json"),
        "data": folder / "codes",
        "output_dir": output_dir,
        **THREE_STEPS,
        **changes,
    }
    return flags(chosen)


@pytest.mark.parametrize("name", K)
def test_every_config_is_the_papers(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = CONFIGS / "images" / f"imagenet_{name}.yaml"
    command = ["--config", str(path), "--use_cpu", "true", "--per_device_train_batch_size", "512", "--data", "codes"]
    model, images, args, _ = image_train.parse(command)
    image_train.check(images, args)
    config = image_train.recipe.model_config(model)
    assert (config.vocab_size, config.mask_token_id, config.model_length, config.num_classes) == (
        16387,
        16384,
        256,
        1000,
    )
    assert (config.hidden_dim, config.n_blocks, config.n_heads, config.cond_dim) == (768, 12, 12, 128)
    assert (config.dropout, config.label_dropout, config.time_conditioning) == (0.1, 0.1, False)
    assert (args.learning_rate, args.warmup_steps, args.max_steps, args.ema_decay) == (3e-4, 2500, 500_000, 0.9999)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0, 0.9, 0.999, 1)
    if K[name] is None:
        assert not args.noise_given and args.gidd_weighting == "dynamic"
        assert (config.noise_process, config.p_uniform) == ("gidd", 0.0)
    else:
        assert (args.mixing_ratio, args.noise_schedule, args.t_eps) == (K[name], "loglinear", 1e-3)


@pytest.mark.parametrize("name", ["xdlm", "gidd"])
def test_from_a_folder_of_images_to_images(data, tmp_path, name):
    changes = {"validation_data": data / "held-out", "validation_rows": 7} if name == "xdlm" else {}
    trainer = image_train.main(options(data, name, tmp_path / "run", **changes))
    assert trainer.state.global_step == 3 and len(trainer.train_dataset) == 24
    if changes:
        assert len(trainer.eval_dataset) == 7
        assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_loss"] > 0
    pipe = XDLMImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    process = pipe.transformer.noise_process()
    assert isinstance(process, GIDDProcess if name == "gidd" else StationaryProcess)
    if name == "xdlm":
        assert process.kernel.mixing_ratio == 0.1
    average = load_file(tmp_path / "run" / "model.safetensors")
    assert all(weight.equal(average[n]) for n, weight in pipe.transformer.state_dict().items())
    assert pipe.transformer.config.ema_decay == 0.9999 and pipe.shape == (1, 8, 8)
    images = pipe([0, 1, 2], num_inference_steps=2, guidance_scale=2.0, output_type="uint8").images
    assert images.shape == (3, 1, 8, 8)
    # The model alone also draws whole images of codes.
    ids = pipe.transformer.generate(class_labels=[0] * 20, steps=2)
    assert ids.shape == (20, 16) and ids.max() < 16


def test_a_model_without_classes_is_trained_without_labels(data, tmp_path):
    config = json.loads((data / "dit_imagenet.json").read_text()) | {"num_classes": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trainer = image_train.main(
        options(data, "mdlm", tmp_path / "run", config_name=tmp_path / "config.json", max_steps=1)
    )
    assert trainer.train_dataset.column_names == ["input_ids"]


def test_the_plan_needs_no_data(data, tmp_path, capsys):
    command = options(data, "xdlm", tmp_path / "run", data=None, config_name=None, global_batch_size=None)
    image_train.main([*command, "--config_name", str(CONFIGS / "models" / "dit_imagenet.json"), "--plan"])
    assert "117" in capsys.readouterr().out  # million parameters


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"data": None}, "data is missing: the folder of tokens"),
        ({}, {"data": "elsewhere"}, "elsewhere is not a dataset of image tokens"),
        ({}, {"eval_strategy": "steps"}, "eval_strategy='steps' needs validation_data"),
        ({}, {"validation_rows": 0}, "validation_rows=0 must be at least 1"),
        ({"vocab_size": 15, "mask_token_id": 14}, {}, "the data have 16 tokens, but the model 15 rows"),
        ({"mask_token_id": 3}, {}, "mask_token_id=3 is one of the data's 16 tokens; choose one from 16 on"),
        ({"model_length": 17}, {}, "the data have rows of 16 tokens, the model of 17"),
        ({"num_classes": 4}, {}, "the data have 3 classes, but num_classes=4; set num_classes: 3"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, config, changes, message):
    published = json.loads((data / "dit_imagenet.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, **config}))
    with pytest.raises(ValueError, match=message):
        image_train.main(
            options(data, "mdlm", tmp_path / "run", **{"config_name": tmp_path / "config.json"}, **changes)
        )


def test_validation_data_of_another_tokenizer_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="validation_data has tokens=256, the data have 16"):
        image_train.main(options(data, "mdlm", tmp_path / "run", validation_data=data / "pixels"))
    assert read_settings(data / "pixels").grid is None
