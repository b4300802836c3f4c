"""Training of the paper's image models from scratch: one network for each data set, and one recipe for every noise.

ImageNet is a class-conditional DiT on the 256 codes of a VQ tokenizer, CIFAR-10 a U-Net on 3,072 pixel values. The
loss is the bound of Eq. 15, as for text; labels are dropped in a tenth of the rows, for guidance.

The paper's runs, 8 GPUs with 80 GB, after recipes/image_tokens.py has written the codes:

    accelerate launch --num_processes 8 recipes/image_train.py --config recipes/configs/images/imagenet_xdlm.yaml \\
        --data codes/imagenet

recipes/configs/images/ has a file for each row of the tables. Cost, computed: 4e19 operations for 500,000 steps on
ImageNet, some 30 hours of one H200 at 40 %. `--plan` prints what a run needs. Expected results: Tables 12 to 15 and 19
of the paper (docs/images.md); not reproduced here.

It writes to `output_dir`: the model with the average of the weights, trainer_state.json, checkpoint-* folders, and
`pipeline/`, which `XDLMImagePipeline.from_pretrained` loads: model and tokenizer of the images.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import recipe
from recipe import ModelArguments, PlanArguments
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from xdlm_hf import XDLMImagePipeline
from xdlm_hf.data.image_tokens import TokenSettings, read_settings, read_tokens
from xdlm_hf.data.images import load_vq
from xdlm_hf.generation.protocol import length_limit, output_rows
from xdlm_hf.loading import load_weights
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.processes import run_on_main_process, run_script
from xdlm_hf.training.trainer import XDLMTrainer, training_process


@dataclass
class ImageArguments:
    data: str | None = field(default=None, metadata={"help": "Folder written by recipes/image_tokens.py."})
    validation_data: str | None = field(default=None, metadata={"help": "Such a folder for evaluation."})
    validation_rows: int | None = field(default=None, metadata={"help": "At most so many rows for evaluation."})


def check(options: ImageArguments, args: XDLMTrainingArguments) -> None:
    """Refuse options that do not go together, before anything is read.

    Raises:
        ValueError: Naming them and the remedy.
    """
    if options.data is None:
        raise ValueError("data is missing: the folder of tokens that recipes/image_tokens.py has written.")
    if options.validation_rows is not None and options.validation_rows < 1:
        raise ValueError(f"validation_rows={options.validation_rows} must be at least 1; leave it out for all.")
    if args.eval_strategy != "no" and options.validation_data is None:
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs validation_data; give it, or eval_strategy no."
        )


def check_fit(settings: TokenSettings, config: PreTrainedConfig, mixing_ratio: float) -> None:
    """Refuse a model whose rows, length or classes are not those of the data.

    Raises:
        ValueError: Naming both.
    """
    rows, mask = output_rows(config), getattr(config, "mask_token_id", None)
    if rows < settings.tokens:
        raise ValueError(f"the data have {settings.tokens} tokens, but the model {rows} rows; raise vocab_size.")
    if mixing_ratio < 1 and mask is not None and mask < settings.tokens:
        raise ValueError(
            f"mask_token_id={mask} is one of the data's {settings.tokens} tokens; choose one from {settings.tokens} on."
        )
    if settings.length != length_limit(config):
        raise ValueError(f"the data have rows of {settings.length} tokens, the model of {length_limit(config)}.")
    classes, wanted = len(settings.classes or ()), getattr(config, "num_classes", None)
    if wanted is not None and classes != wanted:
        raise ValueError(
            f"the data have {classes} classes, but num_classes={wanted}; set num_classes: {classes or None}."
        )


def load_rows(options: ImageArguments, settings: TokenSettings, has_classes: bool) -> tuple[Dataset, Dataset | None]:
    """Rows for training and, if there are any, for evaluation; without labels for a model without classes.

    Raises:
        ValueError: If the two hold other tokens.
    """
    rows = [read_tokens(options.data), None]
    if options.validation_data is not None:
        other = read_settings(options.validation_data)
        for name in ("tokens", "channels", "height", "width", "grid", "vqvae", "classes"):
            if getattr(other, name) != getattr(settings, name):
                raise ValueError(
                    f"validation_data has {name}={getattr(other, name)!r}, the data have {getattr(settings, name)!r}; "
                    "encode both with the same tokenizer and size."
                )
        rows[1] = read_tokens(options.validation_data)
        if options.validation_rows is not None:
            rows[1] = rows[1].select(range(min(options.validation_rows, len(rows[1]))))
    if not has_classes:
        rows = [part and part.select_columns("input_ids") for part in rows]
    return tuple(rows)


def set_generation_defaults(model, settings: TokenSettings) -> None:
    """`model.generate()` draws whole images, and only tokens that are colours or codes."""
    rows = output_rows(model.config)
    model.generation_config.max_new_tokens = settings.length
    model.generation_config.suppress_tokens = list(range(settings.tokens, rows)) or None


def save_pipeline(trainer: XDLMTrainer, data: str, settings: TokenSettings) -> None:
    """Write the final model and the tokenizer of the images as a pipeline."""
    output_dir = Path(trainer.args.output_dir)
    model = load_weights(str(output_dir))
    shape = settings.channels, settings.height, settings.width
    if settings.grid is None:
        pipeline = XDLMImagePipeline(model, image_shape=shape, num_values=settings.tokens)
    else:
        pipeline = XDLMImagePipeline(model, load_vq(data, "vqvae").vqvae, shape)
    shutil.rmtree(output_dir / "pipeline", ignore_errors=True)
    pipeline.save_pretrained(output_dir / "pipeline")


def parse(argv: list[str]) -> tuple[ModelArguments, ImageArguments, XDLMTrainingArguments, PlanArguments]:
    """As `recipe.parse`."""
    return recipe.parse((ModelArguments, ImageArguments, XDLMTrainingArguments, PlanArguments), argv, __doc__)


def main(argv: list[str] | None = None) -> XDLMTrainer | None:
    model_options, options, args, plan = parse(sys.argv[1:] if argv is None else argv)
    if plan.plan:
        length = length_limit(recipe.model_config(model_options))
        return recipe.show_plan(plan, model_options, args, length)
    check(options, args)
    resume = recipe.resume_point(args)
    settings = read_settings(options.data)
    check_fit(settings, recipe.model_config(model_options), args.mixing_ratio)
    model = recipe.load_model(model_options, args, None, settings.length)
    training_process(model, args)  # refuses what the trainer would, before data are read
    train_rows, validation_rows = load_rows(options, settings, model.num_classes is not None)
    set_generation_defaults(model, settings)
    trainer = recipe.train(model, model_options, args, None, train_rows, validation_rows, resume)
    run_on_main_process(lambda: save_pipeline(trainer, options.data, settings))
    return trainer


if __name__ == "__main__":
    run_script(main)
