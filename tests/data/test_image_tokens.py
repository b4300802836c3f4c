"""Image datasets to datasets of tokens: their content, resuming, and images that are refused."""

import contextlib

import datasets
import numpy as np
import pytest
import torch
from digits import image_folder, patch_tokenizer
from PIL import Image

from xdlm_hf.data.image_tokens import ImageSource, TokenWriter, read_settings, read_tokens
from xdlm_hf.data.images import VQCodes, as_uint8, pil_images, pixel_ids, resize_and_crop
from xdlm_hf.data.patch_vq import PatchVQ


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    return ImageSource(str(image_folder(tmp_path / "images")))


def write(source, folder, codes=True, **options):
    writer = TokenWriter(source, VQCodes(patch_tokenizer()) if codes else None, **options)
    writer.write(folder, show_progress=False)
    return read_tokens(folder)


def images_of(source):
    return torch.cat([as_uint8(source.read(i)[0]) for i in range(len(source))])


def test_rows_are_images_each_followed_by_its_mirror_image(source, tmp_path):
    rows = write(source, tmp_path / "out", batch_size=5, shard_size=7)
    assert len(rows) == 24 and rows.features["input_ids"].feature.dtype == "uint16"
    images, codes = images_of(source), VQCodes(patch_tokenizer())
    ids = torch.tensor(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    assert ids[::2].equal(codes.encode(images)) and ids[1::2].equal(codes.encode(images.flip(-1)))
    assert not ids[::2].equal(ids[1::2])
    assert [int(row["class_label"]) for row in rows] == [label for label in (0, 1, 2) for _ in range(8)]
    settings = read_settings(tmp_path / "out")
    assert settings.classes == ("class0", "class1", "class2") and settings.length == 16
    assert (settings.tokens, settings.grid, settings.channels, settings.height) == (16, (4, 4), 1, 8)
    assert not (tmp_path / "out.unfinished").exists()


def test_pixels_without_flips(source, tmp_path):
    rows = write(source, tmp_path / "out", codes=False, flips=False)
    assert rows.features["input_ids"].feature.dtype == "uint8" and len(rows) == 12
    assert np.stack([row["input_ids"] for row in rows]).tolist() == pixel_ids(images_of(source)).tolist()
    assert read_settings(tmp_path / "out").length == 64


def test_uint16_holds_every_code(tmp_path):
    """Also those beyond 16,384 and 32,768; a larger codebook is refused."""
    vqvae = PatchVQ(2**16, 2)
    places = torch.arange(2**16)
    greys = torch.stack([places // 256, places % 256, 0 * places, 0 * places], -1)
    vqvae.quantize.embedding.weight.data = greys.float() / 127.5 - 1
    codes, ids = VQCodes(vqvae), torch.tensor([[16_383, 16_384, 32_768, 65_535]])
    features = datasets.Features({"image": datasets.Image()})
    saved = datasets.Dataset.from_dict({"image": pil_images(codes.decode(ids))}, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    source = ImageSource(str(tmp_path / "saved"))
    TokenWriter(source, codes, flips=False).write(tmp_path / "out", show_progress=False)
    assert read_tokens(tmp_path / "out")[0]["input_ids"].tolist() == ids[0].tolist()
    with pytest.raises(ValueError, match="a tokenizer of 65537 codes is too large: ids are uint16, 65536 at most"):
        TokenWriter(source, VQCodes(PatchVQ(2**16 + 1, 2)))


def test_an_interrupted_run_goes_on_after_its_last_shard(source, tmp_path, monkeypatch):
    whole = write(source, tmp_path / "whole", shard_size=4)
    encoded, encode = [], VQCodes.encode

    def stops(self, images):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(VQCodes, "encode", stops)
    for ends in (False, False, True):
        encoded.clear()
        with contextlib.nullcontext() if ends else pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "cut", shard_size=4)
        assert encoded == [1, 8]  # the first image alone shows the size; then a shard of four with their flips
    monkeypatch.setattr(VQCodes, "encode", encode)
    resumed = read_tokens(tmp_path / "cut")
    assert resumed.data.table.equals(whole.data.table)
    assert resumed[:]["input_ids"].tolist() == whole[:]["input_ids"].tolist()
    # What is complete is left as it is; other settings are refused.
    before = (tmp_path / "cut" / "state.json").stat().st_mtime_ns
    write(source, tmp_path / "cut", shard_size=4)
    assert (tmp_path / "cut" / "state.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="exists and does not hold these tokens; name a new folder"):
        write(source, tmp_path / "cut", flips=False)
    (tmp_path / "begun.unfinished").mkdir()
    (tmp_path / "begun.unfinished" / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="was begun with other images or settings"):
        write(source, tmp_path / "begun")


@pytest.mark.parametrize("content", [b"no image", None], ids=["text", "cut off"])
def test_a_damaged_file_is_named_and_left_out_only_when_asked(tmp_path, content):
    folder = image_folder(tmp_path / "images")
    bad = folder / "class1" / "2.png"
    bad.write_bytes(bad.read_bytes()[:-60] if content is None else content)
    source = ImageSource(str(folder))
    with pytest.raises(ValueError, match=r"image 6 \(.*class1/2.png\) cannot be read .*skip_damaged"):
        write(source, tmp_path / "out")
    rows = write(source, tmp_path / "other", skip_damaged=True)
    assert len(rows) == 22 and read_settings(tmp_path / "other").skip_damaged
    assert [int(row["class_label"]) for row in rows] == [0] * 8 + [1] * 6 + [2] * 8


def test_other_sizes_and_modes_are_refused_or_converted(tmp_path):
    folder = image_folder(tmp_path / "images", mode="L")
    Image.new("RGB", (12, 8), (255, 0, 0)).save(folder / "class2" / "9.png")
    source = ImageSource(str(folder))
    with pytest.raises(ValueError, match="image 12 is RGB 12 x 8, but the first is L 8 x 8; give image_size"):
        write(source, tmp_path / "out")
    assert len(write(source, tmp_path / "sized", image_size=8)) == 26
    with pytest.raises(ValueError, match="images of 1 x 7 x 7 do not fit the tokenizer"):
        TokenWriter(source, VQCodes(patch_tokenizer()), image_size=7)
    with pytest.raises(ValueError, match="shard_size=0 must be at least 1"):
        TokenWriter(source, None, shard_size=0)


def test_the_centre_is_cropped_after_resizing():
    """Thirds of red, green and blue, 24 x 8: at height 4 the middle 4 of 12 columns are green."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    for i in range(3):
        pixels[:, 8 * i : 8 * i + 8, i] = 255
    image = resize_and_crop(Image.fromarray(pixels), 4)
    assert image.size == (4, 4) and image.mode == "RGB"
    assert image.getpixel((1, 1)) == (0, 255, 0) == image.getpixel((2, 2))
    assert resize_and_crop(Image.new("L", (4, 6), 7), 4).getpixel((0, 0)) == (7, 7, 7)


def test_sources_that_cannot_be_used_are_refused(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ["a"]})
    saved.save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="has no images; its columns are"):
        ImageSource(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="label_column='colour' is none of the columns of classes, .'label'."):
        ImageSource(str(image_folder(tmp_path / "images")), label_column="colour")
    with pytest.raises(ValueError, match="split='test' cannot be read"):
        ImageSource(str(tmp_path / "images"), split="test")
    with pytest.raises(ValueError, match="is not a dataset of image tokens"):
        read_tokens(tmp_path)
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no image that can be read"):
        TokenWriter(ImageSource(str(tmp_path / "images")), None, skip_damaged=True)


def test_a_saved_dataset_without_labels(tmp_path):
    images = [Image.new("L", (4, 4), value) for value in (0, 9)]
    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict({"picture": images}, features=features).save_to_disk(str(tmp_path / "saved"))
    rows = write(ImageSource(str(tmp_path / "saved")), tmp_path / "out", codes=False)
    assert rows.column_names == ["input_ids"] and rows[2]["input_ids"].tolist() == [9] * 16
