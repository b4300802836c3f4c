"""Grids of images with titles, and the path of an image over its steps, as PNG; needs matplotlib (extra `watch`).

Images are PIL images or NumPy arrays (H, W) or (H, W, 3), uint8.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def save_image_grid(
    path: str | os.PathLike,
    rows: Sequence[Sequence[Any]],
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str = "",
    cell: float = 0.7,
) -> None:
    """Write images in rows and columns; small images keep their pixels visible.

    Args:
        path: A PNG file.
        rows: Images of each row, the same number in each.
        row_titles, column_titles: One for each row, for each column.
        title: Heading.
        cell: Width of an image in inches.

    Raises:
        ValueError: If there are no images, or rows or titles differ in number.
    """
    from matplotlib.figure import Figure

    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows):
        raise ValueError(
            f"rows of {[len(row) for row in rows]} images are no grid; give equal rows of at least one image."
        )
    for name, titles, count in (("row_titles", row_titles, len(rows)), ("column_titles", column_titles, columns)):
        if titles is not None and len(titles) != count:
            raise ValueError(f"{len(titles)} {name} do not fit {count}; give one for each.")
    height, width = np.asarray(rows[0][0]).shape[:2]
    size = cell * columns + (0.9 if row_titles else 0.1), cell * height / width * len(rows) + (0.7 if title else 0.35)
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            pixels = np.asarray(image)
            axes[i, j].imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
            if column_titles is not None and i == 0:
                axes[i, j].set_title(column_titles[j], fontsize=9)
            if row_titles is not None and j == 0:
                axes[i, j].set_ylabel(row_titles[i], rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
