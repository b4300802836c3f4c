"""Images to ids and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from xdlm_hf.data.images import as_uint8, ids_to_images, pixel_ids


def test_every_colour_survives_the_way_there_and_back():
    images = torch.arange(3 * 256, dtype=torch.int64).view(1, 3, 16, 16).remainder(256).to(torch.uint8)
    ids = pixel_ids(images)
    assert ids.dtype == torch.int64 and ids.shape == (1, 768) and set(ids.flatten().tolist()) == set(range(256))
    assert torch.equal(ids_to_images(ids, (3, 16, 16)), images)


def test_ids_are_channel_major_and_row_by_row():
    red_green_blue = np.array([[[1, 10, 100], [2, 20, 200]], [[3, 30, 130], [4, 40, 140]]], dtype=np.uint8)
    ids = pixel_ids([Image.fromarray(red_green_blue)])
    assert ids.tolist() == [[1, 2, 3, 4, 10, 20, 30, 40, 100, 200, 130, 140]]


def test_pil_images_grey_and_single_equal_tensors():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.equal(as_uint8(Image.fromarray(grey)), torch.from_numpy(grey)[None, None])


@pytest.mark.parametrize("bad", [256, -1])
def test_an_id_that_is_no_colour_is_refused(bad):
    ids = torch.zeros(2, 12, dtype=torch.int64)
    ids[1, 5] = bad
    with pytest.raises(ValueError, match=rf"id {bad} at row 1 column 5 is not a colour: these are 0\.\.255"):
        ids_to_images(ids, (3, 2, 2))


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"float32 must be uint8 \(B, C, H, W\)"):
        pixel_ids(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="image 0 is 'RGBA'"):
        pixel_ids([Image.new("RGBA", (2, 2))])
    with pytest.raises(ValueError, match="image 1 is RGB 3 x 2, but image 0 is RGB 2 x 2"):
        pixel_ids([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
    with pytest.raises(ValueError, match=r"must be \(B, 12\)"):
        ids_to_images(torch.zeros(1, 11, dtype=torch.int64), (3, 2, 2))
    with pytest.raises(ValueError, match="the list of images is empty"):
        pixel_ids([])
