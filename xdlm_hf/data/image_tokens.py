"""Image datasets to one dataset of token ids: pixels, or codes of a VQ tokenizer; written in shards, and resumed.

A dataset of tokens is a folder of `datasets.Dataset.save_to_disk`, with `tokens.json` (see `TokenSettings`) and, for
codes, the tokenizer in `vqvae/`. Its columns are `input_ids` (L,), uint16 (uint8 for pixels), and `class_label`, int64.
"""

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm

from .images import COLOURS, VQCodes, as_uint8, images_extra, pixel_ids, resize_and_crop

with images_extra():
    from PIL import Image

SETTINGS = "tokens.json"
MOST_CODES = 2**16  # that uint16 holds


@dataclass(frozen=True)
class TokenSettings:
    """What the ids of a dataset of tokens are.

    Args:
        dataset, split, fingerprint: Source of the images.
        images: Number of images of the source.
        tokens: Number of ids: 256 colours, or the codes of the codebook.
        channels, height, width: Of the images.
        grid: Rows and columns of codes; None for pixels, whose ids are channel by channel, row by row.
        vqvae: Hash of the codebook; None for pixels.
        classes: Names of the classes; None without labels.
        image_size: Side to which images were resized and cropped; None for their own size.
        flips: Whether the row after that of each image is its mirror image.
        skip_damaged: Whether images that cannot be read were left out.
    """

    dataset: str
    split: str
    fingerprint: str
    images: int
    tokens: int
    channels: int
    height: int
    width: int
    grid: tuple[int, int] | None
    vqvae: str | None
    classes: tuple[str, ...] | None
    image_size: int | None
    flips: bool
    skip_damaged: bool

    @property
    def length(self) -> int:
        """L, ids per image."""
        return self.channels * self.height * self.width if self.grid is None else self.grid[0] * self.grid[1]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_settings(folder: str | Path) -> TokenSettings:
    """The settings of a dataset of tokens.

    Raises:
        ValueError: If the folder is none.
    """
    try:
        values = json.loads((Path(folder) / SETTINGS).read_text())
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return TokenSettings(**values)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a dataset of image tokens ({error}); make one by recipes/image_tokens.py."
        ) from error


def read_tokens(folder: str | Path) -> datasets.Dataset:
    """The rows of a dataset of tokens, as NumPy arrays.

    Raises:
        ValueError: If the folder is none.
    """
    read_settings(folder)
    try:
        return datasets.load_from_disk(str(folder)).with_format("numpy")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} cannot be read as a dataset ({' '.join(str(error).split())}); make it again."
        ) from error


class ImageSource:
    """Images with labels, of a folder or of the Hub, in files' order.

    Args:
        name: A folder with a folder of images for each class, a folder of `Dataset.save_to_disk`, or a Hub name.
        split: Part of the dataset.
        label_column: Column with the classes; by default the first one of that type, if any.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If it cannot be read, has no images, or not this column.
    """

    def __init__(self, name: str, split: str = "train", label_column: str | None = None, revision: str | None = None):
        self.name, self.split = name, split
        rows = _load(name, split, revision)
        images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        if not images or not len(rows):
            raise ValueError(f"dataset={name!r}, split={split!r} has no images; its columns are {rows.column_names}.")
        labels = [column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        if label_column is not None and label_column not in labels:
            raise ValueError(f"label_column={label_column!r} is none of the columns of classes, {labels}.")
        self.image_column, self.label_column = images[0], label_column or (labels[0] if labels else None)
        self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self.classes = tuple(rows.features[self.label_column].names) if self.label_column else None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Any, int | None]:
        """PIL image and label.

        Raises:
            ValueError: If the image is damaged; names its file.
        """
        row = self.rows[index]
        stored = row[self.image_column]
        content = stored["bytes"] if stored["bytes"] is not None else stored["path"]
        try:
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"image {index} ({stored['path'] or 'without a file name'}) cannot be read ({error}); replace it, or "
                "leave such images out by skip_damaged."
            ) from error
        return image, None if self.label_column is None else row[self.label_column]


def _load(name: str, split: str, revision: str | None) -> datasets.Dataset:
    folder = Path(name)
    try:
        if not folder.is_dir():
            return datasets.load_dataset(name, split=split, revision=revision)
        if not ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            return datasets.load_dataset("imagefolder", data_dir=str(folder), split=split)
        loaded = datasets.load_from_disk(str(folder))
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"dataset={name!r}, split={split!r} cannot be read: {cause}") from error


class TokenWriter:
    """Writes a dataset of tokens in shards; a writer with the same settings goes on after the last whole shard.

    Args:
        source: The images.
        codes: The VQ tokenizer; None for pixels.
        image_size: Resize images to this side and convert their mode; None refuses images that differ from the first.
        flips: Whether to add the mirror image of each image.
        skip_damaged: Whether to leave out images that cannot be read.
        batch_size, shard_size: Images per call of the tokenizer, and per shard.

    Raises:
        ValueError: If the images do not fit the tokenizer, or its codes do not fit into uint16.
    """

    def __init__(
        self,
        source: ImageSource,
        codes: VQCodes | None,
        image_size: int | None = None,
        flips: bool = True,
        skip_damaged: bool = False,
        batch_size: int = 32,
        shard_size: int = 4096,
    ):
        for name, value in (("image_size", image_size), ("batch_size", batch_size), ("shard_size", shard_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if codes is not None and codes.num_codes > MOST_CODES:
            raise ValueError(
                f"a tokenizer of {codes.num_codes} codes is too large: ids are uint16, {MOST_CODES} at most."
            )
        self.source, self.codes = source, codes
        self.batch_size, self.shard_size = batch_size, shard_size
        self._size, self._channels = image_size, None if codes is None else codes.channels
        self._first = None
        first, _ = next(self._images(0, len(source), skip_damaged), (None, None))
        if first is None:
            raise ValueError(f"dataset={source.name!r} has no image that can be read.")
        _, self._channels, height, width = as_uint8(first).shape
        self._first = first
        grid = vqvae = None
        if codes is not None:
            codes.encode(as_uint8(first))  # refuses a size that does not fit
            grid = (height // codes.factor, width // codes.factor)
            codebook = codes.vqvae.quantize.embedding.weight.detach().cpu().numpy()
            vqvae = hashlib.sha256(codebook.tobytes()).hexdigest()
        self.settings = TokenSettings(
            dataset=source.name,
            split=source.split,
            fingerprint=source.rows._fingerprint,
            images=len(source),
            tokens=COLOURS if codes is None else codes.num_codes,
            channels=self._channels,
            height=height,
            width=width,
            grid=grid,
            vqvae=vqvae,
            classes=source.classes,
            image_size=image_size,
            flips=flips,
            skip_damaged=skip_damaged,
        )

    def write(self, folder: Path, show_progress: bool = True) -> None:
        """Write the dataset.

        Raises:
            ValueError: If the folder holds something else, or was begun with other settings, or an image is refused.
        """
        begun = folder.with_name(folder.name + ".unfinished")
        settings = self.settings.to_json()
        if folder.exists():
            same = (folder / SETTINGS).is_file() and (folder / SETTINGS).read_text() == settings
            if not same:
                raise ValueError(f"{folder} exists and does not hold these tokens; name a new folder.")
            return
        if (begun / SETTINGS).is_file() and (begun / SETTINGS).read_text() != settings:
            raise ValueError(f"{begun} was begun with other images or settings; remove it, or name another folder.")
        begun.mkdir(parents=True, exist_ok=True)
        (begun / SETTINGS).write_text(settings)
        shards = self._shards(begun, show_progress)
        whole = datasets.concatenate_datasets([datasets.load_from_disk(str(shard)) for shard in shards])
        unfinished = begun / "whole"
        shutil.rmtree(unfinished, ignore_errors=True)
        whole.save_to_disk(str(unfinished))
        if self.codes is not None:
            self.codes.vqvae.save_pretrained(unfinished / "vqvae")
        (unfinished / SETTINGS).write_text(settings)
        unfinished.rename(folder)
        shutil.rmtree(begun)

    def _shards(self, begun: Path, show_progress: bool) -> list[Path]:
        """Folders of all shards, of which those that are missing are written."""
        shards = []
        bar = tqdm(total=len(self.source), unit="image", disable=not show_progress)
        for number, start in enumerate(range(0, len(self.source), self.shard_size)):
            end = min(start + self.shard_size, len(self.source))
            shard = begun / f"{number:05}-of-{self.shard_size}"
            if not shard.exists():
                rows = datasets.Dataset.from_dict(self._columns(start, end, bar), features=self._features())
                unfinished = shard.with_name(f"{shard.name}.unfinished")
                rows.save_to_disk(str(unfinished))
                unfinished.rename(shard)
            bar.update(end - bar.n)
            shards.append(shard)
        bar.close()
        return shards

    def _features(self) -> datasets.Features:
        ids = datasets.Value("uint8" if self.codes is None else "uint16")
        features = {"input_ids": datasets.Sequence(ids, length=self.settings.length)}
        if self.settings.classes is not None:
            features["class_label"] = datasets.Value("int64")
        return datasets.Features(features)

    def _columns(self, start: int, end: int, bar: tqdm) -> dict[str, Any]:
        rows, labels, batch = [], [], []
        for image, label in self._images(start, end, self.settings.skip_damaged):
            batch.append(as_uint8(image))
            labels += [label] * (1 + self.settings.flips)
            if len(batch) == self.batch_size:
                rows.append(self._ids(batch))
                bar.update(len(batch))
                batch = []
        if batch:
            rows.append(self._ids(batch))
        ids = np.concatenate(rows) if rows else np.empty((0, self.settings.length))
        columns = {"input_ids": list(ids.astype(np.uint8 if self.codes is None else np.uint16))}
        return columns if self.settings.classes is None else {**columns, "class_label": labels}

    def _ids(self, images: list[torch.Tensor]) -> np.ndarray:
        """Ids of images, each followed by those of its mirror image."""
        batch = torch.cat(images)
        if self.settings.flips:
            batch = torch.stack([batch, batch.flip(-1)], 1).flatten(0, 1)
        return (pixel_ids(batch) if self.codes is None else self.codes.encode(batch)).numpy()

    def _images(self, start: int, end: int, skip_damaged: bool) -> Iterator[tuple[Any, int | None]]:
        for index in range(start, end):
            try:
                image, label = self.source.read(index)
            except ValueError:
                if not skip_damaged:
                    raise
                continue
            if self._size is not None:
                image = resize_and_crop(image, self._size, self._channels or 3)
            elif self._first is not None and (image.size, image.mode) != (self._first.size, self._first.mode):
                raise ValueError(
                    f"image {index} is {image.mode} {image.size[0]} x {image.size[1]}, but the first is "
                    f"{self._first.mode} {self._first.size[0]} x {self._first.size[1]}; give image_size, which resizes "
                    "and converts."
                )
            yield image, label
