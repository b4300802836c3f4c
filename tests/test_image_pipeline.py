"""The pipeline of images: what it draws, saving and loading, callbacks, and images filled anew."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from digits import patch_tokenizer
from models import random_dit
from PIL import Image

from xdlm_hf import XDLMImagePipeline

CLASSES = 3


def pipeline(vqvae=True, **options):
    """16 codes or 20 greys, the next id is [MASK], and one row more that no image has."""
    tokens = 16 if vqvae else 256
    sizes = {"vocab_size": tokens + 2, "mask_token_id": tokens, "model_length": 16, "num_classes": CLASSES}
    model = random_dit(**{**sizes, "mixing_ratio": 0.3, **options})
    pipe = XDLMImagePipeline(model, patch_tokenizer() if vqvae else None, None if vqvae else (1, 4, 4))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vqvae", [True, False])
def test_images_are_the_models_tokens(vqvae):
    pipe = pipeline(vqvae)
    images = pipe([2, 0], num_inference_steps=4, generator=seeded(), output_type="uint8").images
    unused = [16, 17] if vqvae else [256, 257]
    ids = pipe.transformer.generate(
        class_labels=[2, 0], steps=4, max_new_tokens=16, generator=seeded(), suppress_tokens=unused
    )
    assert images.equal(pipe.decode(ids)) and images.shape == ((2, 1, 8, 8) if vqvae else (2, 1, 4, 4))
    guided = pipe([2, 0], num_inference_steps=4, guidance_scale=3.0, generator=seeded(), output_type="uint8").images
    ids = pipe.transformer.generate(
        class_labels=[2, 0], steps=4, max_new_tokens=16, generator=seeded(), suppress_tokens=unused, cfg_scale=2.0
    )
    assert guided.equal(pipe.decode(ids)) and not guided.equal(images)


def test_no_sample_holds_a_row_that_is_no_code():
    """Also where the network prefers them: a fifth of 800 tokens would be [MASK] or the unused row."""
    pipe = pipeline(mixing_ratio=1.0)
    with torch.no_grad():
        pipe.transformer.get_output_embeddings().bias[16:] += 5
    assert pipe(0, num_images_per_class=50, num_inference_steps=3).images[49].size == (8, 8)


def test_pixels_of_few_values_are_spread_over_the_greys(tmp_path):
    sizes = {"vocab_size": 6, "mask_token_id": 5, "model_length": 16, "num_classes": CLASSES, "mixing_ratio": 0.3}
    XDLMImagePipeline(random_dit(**sizes), image_shape=(1, 4, 4), num_values=5).save_pretrained(tmp_path)
    pipe = XDLMImagePipeline.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]])
    assert pipe.num_tokens == 5 and pipe.decode(ids).flatten()[:5].tolist() == [0, 64, 128, 191, 255]
    assert pipe.encode(pipe.decode(ids)).equal(ids)
    images = pipe([0, 1], num_inference_steps=2, generator=seeded(), output_type="uint8").images
    assert set(images.flatten().tolist()) <= {0, 64, 128, 191, 255}


def test_output_types_show_the_same_images():
    pipe = pipeline()
    found = {
        kind: pipe(1, num_images_per_class=2, generator=seeded(), output_type=kind).images
        for kind in ("pil", "np", "pt", "uint8")
    }
    exact = found["uint8"]
    assert exact.dtype == torch.uint8 and exact.shape == (2, 1, 8, 8)
    assert [image.mode for image in found["pil"]] == ["L", "L"]
    assert np.array_equal(np.stack([np.array(image) for image in found["pil"]]), exact[:, 0].numpy())
    assert found["np"].shape == (2, 8, 8, 1) and found["pt"].shape == (2, 1, 8, 8)
    assert (found["pt"] * 255).round().equal(exact.float())
    assert np.array_equal(found["np"][..., 0], found["pt"][:, 0].numpy())
    (images,) = pipe(1, num_images_per_class=2, generator=seeded(), output_type="uint8", return_dict=False)
    assert images.equal(exact)


@pytest.mark.parametrize("vqvae", [True, False])
def test_saved_and_loaded_it_draws_the_same(vqvae, tmp_path):
    pipe = pipeline(vqvae)
    pipe.save_pretrained(tmp_path)
    loaded = XDLMImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.vqvae is None) == (not vqvae)
    images = [p(2, guidance_scale=2.0, generator=seeded(), output_type="uint8").images for p in (pipe, loaded)]
    assert images[0].equal(images[1])


def test_with_a_generator_for_each_label_the_batch_does_not_matter():
    pipe = pipeline()
    together = pipe([0, 2], generator=[seeded(5), seeded(6)], output_type="uint8").images
    alone = pipe(2, generator=seeded(6), output_type="uint8").images
    assert together[1:].equal(alone) and not together[:1].equal(alone)
    with pytest.raises(ValueError, match="3 generators do not fit 1 labels"):
        pipe(0, generator=[seeded()] * 3)


def test_the_callback_gets_the_image_of_each_step():
    pipe, seen = pipeline(mixing_ratio=0.0), []
    last = pipe(
        0,
        num_inference_steps=4,
        generator=seeded(),
        output_type="uint8",
        callback_on_step_end=lambda *arguments: seen.append(arguments),
    ).images
    assert [(p is pipe, step, t) for p, step, t, _ in seen] == [(True, i, 1 - (i + 1) / 4) for i in range(4)]
    masked = [int((values["ids"] == 16).sum()) for *_, values in seen]
    assert masked[0] > masked[2] > masked[3] == 0 and seen[3][3]["images"].equal(last)
    values = seen[0][3]
    cells = (values["ids"] == 16).view(1, 1, 4, 4).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert (values["images"][cells] == 128).all() and not (values["images"][~cells] == 128).all()


@pytest.mark.parametrize("vqvae", [True, False])
def test_holes_are_drawn_anew_and_the_rest_stays(vqvae):
    pipe = pipeline(vqvae)
    image = pipe(0, generator=seeded(), output_type="uint8").images
    side = image.shape[-1]
    holes = torch.zeros(side, side, dtype=torch.bool)
    holes[side // 2 :, : side // 2 - 1] = True  # with codes, the cells that it touches
    filled = pipe(
        [1, 1], image=image, holes=holes, num_inference_steps=4, generator=seeded(1), output_type="uint8"
    ).images
    touched = torch.zeros_like(holes)
    touched[side // 2 :, : side // 2 if vqvae else side // 2 - 1] = True
    assert filled.shape[0] == 2 and filled[..., ~touched].equal(image[..., ~touched].expand(2, -1, -1))
    assert not filled[..., touched].equal(image[..., touched].expand(2, -1, -1))
    as_pil = Image.fromarray(image[0, 0].numpy())
    again = pipe(
        [1, 1], image=as_pil, holes=holes.numpy(), num_inference_steps=4, generator=seeded(1), output_type="uint8"
    ).images
    assert again.equal(filled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [3, 4]}, "class_labels.*4"),
        ({"class_labels": [0], "guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1, which is no guidance"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"output_type": "jpg"}, r"output_type='jpg' is not known; choose one of \['pil'"),
        ({"image": torch.zeros(1, 1, 8, 8).byte()}, "image and holes go together"),
        (
            {"image": torch.zeros(1, 1, 6, 8).byte(), "holes": np.ones((6, 8), bool)},
            "images of 1 x 6 x 8 do not fit the pipeline, which draws 1 x 8 x 8",
        ),
        ({"image": torch.zeros(1, 1, 8, 8).byte(), "holes": np.ones((4, 4), bool)}, r"must be bool \(8, 8\)"),
        (
            {"image": torch.zeros(3, 1, 8, 8).byte(), "holes": np.ones((8, 8), bool), "class_labels": [0, 1]},
            "3 images and holes of shape .* do not fit 2 labels",
        ),
        ({"num_inference_steps": 0}, "steps=0 must be a positive integer"),
        ({"colour": 1}, "colour"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not for images"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**options)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="guidance_scale=2.0 guides by class, but DiTForDiffusionLM has no classes"):
        pipeline(num_classes=None)(guidance_scale=2.0)
    with pytest.raises(ValueError, match="64 codes of the tokenizer do not fit DiTForDiffusionLM, which has 18 rows"):
        XDLMImagePipeline(pipeline().transformer, patch_tokenizer(num_codes=64))
    with pytest.raises(ValueError, match="17 codes of the tokenizer do not fit mask_token_id=16 of DiT.*; use"):
        XDLMImagePipeline(pipeline().transformer, patch_tokenizer(num_codes=17))
    with pytest.raises(ValueError, match="256 values of a pixel do not fit DiT.*, which has 18 rows; give"):
        XDLMImagePipeline(pipeline().transformer)
    with pytest.raises(ValueError, match="num_values=16 is of pixels, but the tokens are codes of vqvae; leave it out"):
        XDLMImagePipeline(pipeline().transformer, patch_tokenizer(), num_values=16)
    with pytest.raises(ValueError, match=r"pass image_shape=\(C, H, W\) to the pipeline"):
        XDLMImagePipeline(pipeline(vqvae=False).transformer)(0)


def test_without_the_extra_the_error_names_it():
    script = "import sys; sys.modules['diffusers'] = None; import xdlm_hf; xdlm_hf.XDLMImagePipeline"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode and "install the extra: pip install 'xdlm_hf[images]'" in ran.stderr
