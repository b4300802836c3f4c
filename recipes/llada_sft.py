"""Supervised fine-tuning of a LLaDA or LLaDA-XDLM checkpoint on conversations, with the XDLM objective.

Only answers are noised and scored; prompts stay clean. At k = 0 this is LLaDA's fine-tuning, each row's loss divided by
the length of its answer. A checkpoint that was trained at k should be fine-tuned at the same k, which is
`mixing_ratio` here too.

LLaDA-8B on 8 GPUs with 80 GB (batch, length and rate as in LLaDA's own fine-tuning; conversations from the Hub):

    accelerate launch --config_file recipes/configs/zero2.yaml --num_processes 8 \
        recipes/llada_sft.py --config recipes/configs/llada_8b_sft.yaml --output_dir outputs/llada-sft

Or from local files, one JSON object a line, with `messages`, or with `prompt` and `completion`:

    python recipes/llada_sft.py --model_name_or_path path/to/model --data_files path/to/*.jsonl --sequence_length 512 \
        --num_train_epochs 3 --lora_rank 16 --learning_rate 2e-4 --output_dir outputs/small-sft

`--plan`, `--resume_from_checkpoint auto`, LoRA, 4 bits and output files are as in llada_cpt.py. Expected time and
result: not measured.

A row is cut at `sequence_length`. A prompt that leaves no room for an answer is an error before training, with file and
line, unless `--drop_unusable true` leaves such rows out. `--eos_in_loss` sets how many end-of-text tokens belong to the
answer; see xdlm_hf/data/conversations.py.
"""

import sys
from dataclasses import dataclass, field

import recipe
from recipe import ModelArguments, PlanArguments

from xdlm_hf.data.conversations import (
    EOS_IN_LOSS,
    LOSS_WEIGHTING,
    TURNS,
    ConversationDataset,
    ConversationFormat,
    hold_out_records,
    load_conversations,
    set_chat_template,
)
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.processes import run_script
from xdlm_hf.training.trainer import XDLMTrainer


@dataclass
class DataArguments:
    dataset: str | None = field(default=None, metadata={"help": "Hub dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Local .jsonl or .parquet files or patterns, instead of a dataset."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "llada, or a file of Jinja; default: the tokenizer's own."}
    )
    sequence_length: int = field(default=4096, metadata={"help": "Longest row in tokens; longer answers are cut."})
    turns: str = field(default="each", metadata={"help": f"Answers of a conversation to learn: {', '.join(TURNS)}."})
    eos_in_loss: str = field(
        default="one", metadata={"help": f"End-of-text tokens that belong to the answer: {', '.join(EOS_IN_LOSS)}."}
    )
    loss_weighting: str = field(
        default="rows", metadata={"help": f"What has equal weights in the loss: {', '.join(LOSS_WEIGHTING)}."}
    )
    drop_unusable: bool = field(
        default=False, metadata={"help": "Leave out rows without anything to learn, counted, instead of stopping."}
    )
    validation_fraction: float = field(default=0.0, metadata={"help": "Records held out, chosen by a hash."})


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, XDLMTrainingArguments, PlanArguments]:
    """As `recipe.parse`."""
    return recipe.parse((ModelArguments, DataArguments, XDLMTrainingArguments, PlanArguments), argv, __doc__)


def load_rows(options: DataArguments, tokenizer, args: XDLMTrainingArguments, held_out: bool) -> ConversationDataset:
    """Rows for training or for validation."""
    form = ConversationFormat(
        options.sequence_length, options.turns, options.eos_in_loss, options.loss_weighting
    )  # before anything is read
    records = load_conversations(
        options.dataset, options.dataset_config, options.dataset_split, data_files=options.data_files
    )
    records = hold_out_records(records, options.validation_fraction, held_out)
    show = args.process_index == 0 and not args.disable_tqdm
    return ConversationDataset(records, tokenizer, form, options.drop_unusable, show_progress=show)


def main(argv: list[str] | None = None) -> XDLMTrainer | None:
    model_options, data_options, args, plan = parse(sys.argv[1:] if argv is None else argv)
    if plan.plan:
        return recipe.show_plan(plan, model_options, args, data_options.sequence_length)
    resume = recipe.resume_point(args)
    tokenizer = recipe.load_tokenizer(model_options)
    set_chat_template(tokenizer, data_options.chat_template)  # saved with the tokenizer
    rows = load_rows(data_options, tokenizer, args, held_out=False)
    validation = load_rows(data_options, tokenizer, args, held_out=True) if data_options.validation_fraction else None
    model = recipe.load_model(model_options, args, tokenizer, data_options.sequence_length)
    return recipe.train(model, model_options, args, tokenizer, rows, validation, resume)


if __name__ == "__main__":
    run_script(main)
