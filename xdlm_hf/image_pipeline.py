"""Images of a trained model as a diffusers pipeline: class labels to images, and parts of an image filled anew.

Shapes: B images, C channels, H height, W width, L tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.images import VQCodes, as_uint8, ids_to_images, images_extra, pil_images, pixel_ids
from .generation.protocol import input_device, length_limit, output_rows

with images_extra():
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

OUTPUT_TYPES = ("pil", "np", "pt", "uint8")
GREY = 128  # of tokens that are not drawn yet


class XDLMImagePipeline(DiffusionPipeline):
    r"""
    Draws images with a diffusion model of image tokens.

    ```python
    pipe = XDLMImagePipeline.from_pretrained("outputs/imagenet-xdlm/pipeline").to("cuda")
    images = pipe(class_labels=[207, 360], num_inference_steps=8, guidance_scale=3.0).images
    ```

    Load it by this class; the generic `DiffusionPipeline` knows only the classes of diffusers.

    Args:
        transformer (`PreTrainedModel`): A `DiffusionModel` of image tokens, such as [`DiTForDiffusionLM`].
        vqvae (`VQModel` or `PatchVQ`, *optional*): Tokenizer of the images; without it, tokens are pixels.
        image_shape (`tuple[int, int, int]`, *optional*):
            (C, H, W). By default that of the model's config (`image_channels`, `image_size`), and for codes a square.
        num_values (`int`, *optional*):
            Values of a pixel, of a model of pixels. By default that of its config, and 256 if it has none.

    Raises:
        ValueError: If the model has no rows for all codes or values, or if `num_values` is given with a tokenizer.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _optional_components = ["vqvae"]

    def __init__(
        self,
        transformer: Any,
        vqvae: Any = None,
        image_shape: Sequence[int] | None = None,
        num_values: int | None = None,
    ):
        super().__init__()
        if vqvae is not None and num_values is not None:
            raise ValueError(f"num_values={num_values} is of pixels, but the tokens are codes of vqvae; leave it out.")
        self.register_modules(transformer=transformer, vqvae=vqvae)
        # diffusers would take a class of a folder `dit` for one of its own pipeline of that name when it loads.
        for name, part in (("transformer", transformer), ("vqvae", vqvae)):
            if part is not None:
                self.register_to_config(**{name: (type(part).__module__, type(part).__name__)})
        self.register_to_config(image_shape=None if image_shape is None else list(image_shape), num_values=num_values)
        config = transformer.config
        tokens, remedy = f"{self.num_tokens} codes of the tokenizer", "use the tokenizer of its training data."
        if vqvae is None:
            tokens, remedy = f"{self.num_tokens} values of a pixel", "give the num_values of its training data."
        if self.num_tokens > output_rows(config):
            raise ValueError(
                f"{tokens} do not fit {type(transformer).__name__}, which has {output_rows(config)} rows; {remedy}"
            )
        mask = getattr(config, "mask_token_id", None)
        if mask is not None and mask < self.num_tokens:
            raise ValueError(f"{tokens} do not fit mask_token_id={mask} of {type(transformer).__name__}; {remedy}")

    @property
    def num_tokens(self) -> int:
        """Number of ids that are colours or codes."""
        if self.vqvae is not None:
            return self._codes.num_codes
        return self.config.num_values or getattr(self.transformer.config, "num_values", 256)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        if self.config.image_shape is not None:
            return tuple(self.config.image_shape)
        config = self.transformer.config
        if self.vqvae is not None:
            side = int(length_limit(config) ** 0.5) * self._codes.factor
            return self._codes.channels, side, side
        if not hasattr(config, "image_size"):
            raise ValueError("the shape of the images is not known; pass image_shape=(C, H, W) to the pipeline.")
        return config.image_channels, config.image_size, config.image_size

    @property
    def _codes(self) -> VQCodes:
        return VQCodes(self.vqvae)

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of cells: codes, or pixels."""
        factor = 1 if self.vqvae is None else self._codes.factor
        return self.shape[1] // factor, self.shape[2] // factor

    @property
    def _length(self) -> int:
        rows, columns = self._grid
        return rows * columns * (self.shape[0] if self.vqvae is None else 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int = 16,
        guidance_scale: float = 1.0,
        num_images_per_class: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Any = None,
        holes: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["XDLMImagePipeline", int, float, dict], Any] | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw images.

        Args:
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): B classes; without them, no class.
            num_inference_steps (`int`, *optional*, defaults to 16): Denoising steps.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                1 + gamma, where guidance is (1 + gamma) log p(x | z, class) - gamma log p(x | z, no class); 1 is off.
            num_images_per_class (`int`, *optional*, defaults to 1): Images for each label, one after the other.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness. With one for each label, images are drawn one label at a time, and depend on
                their own generator alone.
            image (PIL image, list of them, or uint8 `torch.Tensor` `(B, C, H, W)`, *optional*):
                Images whose `holes` are filled anew.
            holes (bool array `(H, W)` or `(B, H, W)`, *optional*):
                Pixels to fill; a code is drawn anew if one of its pixels is. The others keep their tokens.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, C) and `"pt"` (B, C, H, W) in [0, 1], or `"uint8"`, a tensor (B, C, H, W).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an [`ImagePipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step, t, {"ids": (B, L), "images": ...})` after each step; t is the time
                that is left. Tokens that are not drawn yet are grey.
            options: Further options of the model's `generate`.

        Raises:
            ValueError: If a value does not fit; names it and the remedy.
        """
        if options.get("return_dict_in_generate"):
            raise ValueError("return_dict_in_generate=True is not for images; use callback_on_step_end for the steps.")
        labels = self._labels(class_labels, guidance_scale, output_type)
        ids, mask = self._given(image, holes, None if labels is None else len(labels))
        rows = len(labels) if labels is not None else len(ids) if ids is not None else 1
        generators = generator if isinstance(generator, list | tuple) else None
        if generators is not None and len(generators) != rows:
            raise ValueError(f"{len(generators)} generators do not fit {rows} labels; pass one for each, or one.")
        unused = range(self.num_tokens, output_rows(self.transformer.config))
        options = {
            "steps": num_inference_steps,
            "cfg_scale": guidance_scale - 1,
            "num_return_sequences": num_images_per_class,
            "suppress_tokens": sorted({*unused, *options.pop("suppress_tokens", ())}),
            **({"max_new_tokens": self._length} if ids is None else {}),
            **options,
        }
        drawn = []
        for part in [slice(i, i + 1) for i in range(rows)] if generators is not None else [slice(rows)]:
            chosen = {
                "generator": generators[part][0] if generators is not None else generator,
                "class_labels": None if labels is None else labels[part],
                **({} if ids is None else {"input_ids": ids[part], "holes": mask[part]}),
            }
            with self.progress_bar(total=num_inference_steps) as bar:
                streamer = _StepCallback(self, num_inference_steps, callback_on_step_end, output_type, bar)
                drawn.append(self.transformer.generate(**chosen, **options, streamer=streamer))
        images = self._as_output(self.decode(torch.cat(drawn)), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode(self, images: Any) -> Tensor:
        """Token ids (B, L) of images: PIL images, or uint8 (B, C, H, W).

        Raises:
            ValueError: If they are not of the pipeline's `shape`.
        """
        images = as_uint8(images)
        if tuple(images.shape[1:]) != self.shape:
            given, wanted = (" x ".join(map(str, sizes)) for sizes in (images.shape[1:], self.shape))
            raise ValueError(
                f"images of {given} do not fit the pipeline, which draws {wanted}; resize and convert them."
            )
        if self.vqvae is not None:
            return self._codes.encode(images)
        levels = self.num_tokens - 1
        return pixel_ids(images if levels == 255 else (images.float() * (levels / 255)).round().to(torch.uint8))

    def decode(self, ids: Tensor) -> Tensor:
        """Images of token ids (B, L): uint8 (B, C, H, W).

        Raises:
            ValueError: If an id is no colour or code.
        """
        if self.vqvae is not None:
            return self._codes.decode(ids, self._grid)
        images = ids_to_images(ids, self.shape)
        levels = self.num_tokens - 1
        return images if levels == 255 else (images.float() * (255 / levels)).round().clamp(0, 255).to(torch.uint8)

    def preview(self, ids: Tensor) -> Tensor:
        """As `decode`, for the ids of any step: [MASK] and other ids that are no colours or codes are grey."""
        known = ids < self.num_tokens
        images = self.decode(torch.where(known, ids, 0))
        cells = known.view(len(ids), -1, *self._grid)
        factor = images.shape[-1] // cells.shape[-1]
        shown = cells.repeat_interleave(factor, -1).repeat_interleave(factor, -2).expand_as(images)
        return torch.where(shown, images, GREY)

    def _labels(self, class_labels: Any, guidance_scale: float, output_type: str) -> Tensor | None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not known; choose one of {list(OUTPUT_TYPES)}.")
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale={guidance_scale} must be at least 1, which is no guidance.")
        if guidance_scale > 1 and self.transformer.num_classes is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} guides by class, but {type(self.transformer).__name__} has no "
                "classes; leave it out."
            )
        if guidance_scale > 1 and class_labels is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels.")
        if class_labels is None:
            return None
        return torch.as_tensor([class_labels] if isinstance(class_labels, int) else class_labels)

    def _given(self, image: Any, holes: Any, rows: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Ids (B, L) of given images and the mask of those to fill, or None."""
        if (image is None) != (holes is None):
            raise ValueError("image and holes go together: pass both, or none.")
        if image is None:
            return None, None
        ids, (channels, height, width) = self.encode(image), self.shape
        holes = torch.as_tensor(np.asarray(holes)) if not isinstance(holes, Tensor) else holes
        if holes.dtype != torch.bool or holes.shape[-2:] != (height, width) or holes.ndim not in (2, 3):
            raise ValueError(
                f"holes of shape {tuple(holes.shape)} {holes.dtype} must be bool ({height}, {width}), or (B, {height}, "
                f"{width}), true where a pixel is to be filled."
            )
        count = rows or len(ids)
        if len(ids) not in (1, count) or (holes.ndim == 3 and len(holes) not in (1, count)):
            raise ValueError(f"{len(ids)} images and holes of shape {tuple(holes.shape)} do not fit {count} labels.")
        rows_of_cells, columns = self._grid
        pixels = holes.view(-1, rows_of_cells, height // rows_of_cells, columns, width // columns)
        cells = pixels.any(4).any(2).flatten(1)
        cells = cells.repeat(1, channels) if self.vqvae is None else cells
        device = input_device(self.transformer)
        return ids.expand(count, -1).to(device), cells.expand(count, -1).to(device)

    def _as_output(self, images: Tensor, output_type: str) -> Any:
        if output_type == "pil":
            return pil_images(images)
        if output_type == "uint8":
            return images
        images = images.float() / 255
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


class _StepCallback:
    """A streamer that counts steps and passes the ids of each to a callback."""

    def __init__(self, pipeline: XDLMImagePipeline, steps: int, callback: Any, output_type: str, bar: Any):
        self.pipeline, self.steps, self.callback = pipeline, steps, callback
        self.output_type, self.bar, self.step = output_type, bar, 0

    def put(self, value: Tensor) -> None:
        """The prompt and the finished ids; the steps have shown them."""

    def put_draft(self, value: Tensor) -> None:
        self.step += 1
        self.bar.update()
        if self.callback is not None:
            images = self.pipeline._as_output(self.pipeline.preview(value), self.output_type)
            arguments = {"ids": value, "images": images}
            self.callback(self.pipeline, self.step - 1, 1 - self.step / self.steps, arguments)

    def end(self) -> None:
        """All steps are done."""
