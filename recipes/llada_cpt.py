"""Continual pretraining of a LLaDA checkpoint with the XDLM objective.

Clean text x_0 is corrupted to z_t: each token survives with probability alpha_t, else becomes [MASK] with weight 1 - k
or any token at all with weight k (Eqs. 5-10 of arXiv 2602.01362). The network learns to name the clean token at every
noised position; the loss (Eqs. 14, 15) is a bound on the text's negative log-likelihood. At k = 0 this is LLaDA's own
masked objective; k = 0.1 makes the model able to correct its own wrong tokens, which few-step generation needs.

The paper's run, 8 GPUs with 80 GB (`--num_processes 8` x 4 rows x 16 accumulation steps = 512):

    accelerate launch --config_file recipes/configs/zero2.yaml --num_processes 8 \
        recipes/llada_cpt.py --config recipes/configs/llada_8b.yaml --output_dir outputs/llada-xdlm

Expected time: 600 steps are 1.26 billion tokens, 8.5e19 FLOP with recomputed activations; 7 to 8 hours at 40 % of an
H100's peak (computed, not measured). Expected result: Table 16 of the paper, e.g. GSM8K in 32 steps 24.5 -> 29.3 and
MBPP 6.8 -> 15.0; at 256 steps it trails LLaDA on all but GSM8K.

The same code trains a model of any size; only the config differs. Any field of the three groups of options below can
stand in the config file, and on the command line, which wins. One process, a local model, Python's own documentation:

    python recipes/llada_cpt.py --model_name_or_path path/to/model --dataset python-reference \
        --sequence_length 128 --max_steps 100 --per_device_train_batch_size 8 --output_dir outputs/small

With `--resume_from_checkpoint auto` the same command starts a run and, after a crash, goes on from its last checkpoint,
bit for bit; `true` insists on there being one.

It writes to `output_dir`: the model (`save_pretrained`, config with k), the tokenizer, trainer_state.json with every
logged figure, and checkpoint-* folders; with LoRA, the merged model, and the adapter alone in `adapter/`.
"""

import argparse
import contextlib
import dataclasses
import difflib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from xdlm_hf.checkpoints import last_checkpoint, refuse_other_run
from xdlm_hf.data import (
    PackedDataset,
    check_tokenizer,
    fingerprint_files,
    hold_out,
    load_documents,
    python_reference_documents,
)
from xdlm_hf.stream import PackedStream
from xdlm_hf.trainer import XDLMTrainer, XDLMTrainingArguments

logger = logging.getLogger("llada_cpt")

# The block's projections; a bare `ff_out` would also match the output layer.
LORA_TARGETS = r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="GSAI-ML/LLaDA-8B-Base", metadata={"help": "Hub name or local folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights. bfloat16 is for DeepSpeed, which keeps float32 copies, and for LoRA."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})


@dataclass
class DataArguments:
    dataset: str | None = field(
        default="HuggingFaceFW/fineweb-edu", metadata={"help": "Hub dataset, or python-reference."}
    )
    dataset_config: str | None = field(default="sample-10BT", metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Local .jsonl, .parquet, .txt files or patterns, instead of a dataset."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    sequence_length: int = field(default=4096, metadata={"help": "Tokens per row."})
    streaming: bool | None = field(
        default=None, metadata={"help": "Read while training; default: for Hub datasets. Needs max_steps."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Documents shuffled together when streaming."})
    skip_corrupted: bool = field(
        default=False, metadata={"help": "Leave out corrupted lines of JSONL files, counted, instead of stopping."}
    )
    validation_fraction: float = field(default=0.0, metadata={"help": "Documents held out, chosen by a text hash."})
    validation_rows: int | None = field(default=None, metadata={"help": "At most so many rows for evaluation."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, XDLMTrainingArguments]:
    """Options from `--config FILE.yaml`, overridden by the command line.

    Raises:
        ValueError: If an option is unknown in either place.
    """
    groups = (ModelArguments, DataArguments, XDLMTrainingArguments)
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config, argv = config_parser.parse_known_args(argv)
    parser = HfArgumentParser(
        groups, description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    if config.config is not None:
        options = yaml.safe_load(Path(config.config).read_text()) or {}
        known = {option.name for group in groups for option in dataclasses.fields(group) if option.init}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{config.config}: unknown option {name!r}{hint}")
        parser.set_defaults(**options)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown options on the command line: {' '.join(unknown)}; see --help.")
    return tuple(parsed)


def load_model(options: ModelArguments, args: XDLMTrainingArguments):
    """The base model, with adapters when asked for."""
    model = AutoModelForCausalLM.from_pretrained(
        options.model_name_or_path, dtype=options.dtype, attn_implementation=options.attn_implementation
    )
    if options.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=LORA_TARGETS,
            task_type=None,  # peft's task types wrap generate() in ways that only causal models have
        )
        return get_peft_model(model, lora)
    if options.dtype not in ("float32", "auto") and args.deepspeed_plugin is None:
        logger.warning(
            "weights in %s without DeepSpeed: updates smaller than their rounding are lost; use dtype float32 with "
            "--bf16 true",
            options.dtype,
        )
    return model


def load_rows(options: DataArguments, tokenizer, args: XDLMTrainingArguments):
    """Training rows and, if documents are held out, validation rows."""
    if options.data_files is not None:
        documents = load_documents(
            data_files=options.data_files, text_column=options.text_column, skip_corrupted=options.skip_corrupted
        )
    elif options.dataset == "python-reference":
        documents = python_reference_documents()
    else:
        documents = load_documents(
            options.dataset,
            options.dataset_config,
            options.dataset_split,
            text_column=options.text_column,
            skip_corrupted=options.skip_corrupted,
        )
    from_hub = options.data_files is None and options.dataset != "python-reference"
    streaming = from_hub if options.streaming is None else options.streaming
    show = args.process_index == 0 and not args.disable_tqdm
    validation = None
    if options.validation_fraction:
        documents, held_out = hold_out(documents, options.validation_fraction)
        validation = PackedDataset(
            held_out, tokenizer, options.sequence_length, max_rows=options.validation_rows, show_progress=show
        )
    if not streaming:
        return PackedDataset(documents, tokenizer, options.sequence_length, show_progress=show), validation
    if args.max_steps <= 0:
        raise ValueError(f"max_steps={args.max_steps}: a stream has no end, so the number of steps must be given.")
    stream = PackedStream(
        documents,
        tokenizer,
        options.sequence_length,
        rank=args.process_index,
        world_size=args.world_size,
        shuffle_seed=args.seed,
        shuffle_buffer=options.shuffle_buffer,
        source=source(options),
    )
    return stream, validation


def source(options: DataArguments) -> dict:
    """What a checkpoint remembers of a stream's data, to notice when it changed."""
    if options.data_files is not None:
        data = {"files": fingerprint_files(options.data_files)}
    else:
        data = {"dataset": [options.dataset, options.dataset_config, options.dataset_split]}
    return {**data, "text_column": options.text_column, "validation_fraction": options.validation_fraction}


def save(trainer: XDLMTrainer, merge: bool) -> None:
    """Final model, tokenizer and log. Every process must call this: the weights may be spread over them."""
    output_dir = trainer.args.output_dir
    trainer.save_model(f"{output_dir}/adapter" if merge else output_dir)
    trainer.save_state()
    if not merge:
        return
    # Adapters alone would forget k, which lives in the model's config.
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = contextlib.nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole:
        if trainer.is_world_process_zero():
            model.merge_and_unload().save_pretrained(output_dir)
            trainer.processing_class.save_pretrained(output_dir)


def main(argv: list[str] | None = None) -> XDLMTrainer:
    model_options, data_options, args = parse(sys.argv[1:] if argv is None else argv)
    resume = {"true": True, "false": None, None: None}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    if resume == "auto":
        resume = last_checkpoint(args.output_dir) is not None
    if not resume:
        refuse_other_run(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_options.tokenizer_name or model_options.model_name_or_path)
    set_seed(args.seed)  # adapters start at random
    model = load_model(model_options, args)
    check_tokenizer(tokenizer, model.config)
    if data_options.sequence_length > model.config.max_sequence_length:
        raise ValueError(
            f"sequence_length={data_options.sequence_length} exceeds the model's max_sequence_length="
            f"{model.config.max_sequence_length}."
        )
    train_rows, validation_rows = load_rows(data_options, tokenizer, args)
    trainer = XDLMTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    if validation_rows is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    save(trainer, merge=bool(model_options.lora_rank))
    return trainer


if __name__ == "__main__":
    main()
