"""Grids of images as PNG files."""

import numpy as np
import pytest
from PIL import Image

from xdlm_hf.watch.pictures import save_image_grid


def test_every_image_is_in_its_place(tmp_path):
    """Four shades: at the centre of each quarter of the picture its own."""
    shades = [[10, 90], [170, 250]]
    rows = [[np.full((4, 4), shade, np.uint8) for shade in row] for row in shades]
    save_image_grid(tmp_path / "grid.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    height, width = pixels.shape
    found = [[int(pixels[height * (1 + 2 * i) // 4, width * (1 + 2 * j) // 4]) for j in (0, 1)] for i in (0, 1)]
    assert np.abs(np.array(found) - shades).max() <= 1  # matplotlib's colour map rounds
    rows[0][0] = Image.new("RGB", (4, 4), (255, 0, 0))
    save_image_grid(tmp_path / "named.png", rows, ["a", "b"], ["c", "d"], title="t")
    assert (np.asarray(Image.open(tmp_path / "named.png").convert("RGB")) == (255, 0, 0)).all(-1).sum() > 1000


def test_what_is_no_grid_is_refused(tmp_path):
    image = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] images are no grid"):
        save_image_grid(tmp_path / "g.png", [[image], [image, image]])
    with pytest.raises(ValueError, match="1 column_titles do not fit 2"):
        save_image_grid(tmp_path / "g.png", [[image, image]], column_titles=["a"])
    assert not list(tmp_path.iterdir())
