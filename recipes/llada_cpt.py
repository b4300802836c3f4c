"""Continual pretraining of a LLaDA checkpoint with the XDLM objective.

Clean text x_0 is corrupted to z_t: each token survives with probability alpha_t, else becomes [MASK] with weight 1 - k
or a uniformly drawn token with weight k (Eqs. 5-10 of arXiv 2602.01362). The network predicts the clean token at every
position; the loss (Eqs. 14, 15) is a bound on the text's negative log-likelihood. At k = 0 this is LLaDA's own masked
objective; at k = 0.1 the model learns to correct wrong tokens, which few-step generation needs.

The paper's run, 8 GPUs with 80 GB (`--num_processes 8` x 4 rows x 16 accumulation steps = 512):

    accelerate launch --config_file recipes/configs/zero2.yaml --num_processes 8 \
        recipes/llada_cpt.py --config recipes/configs/llada_8b_xdlm.yaml --output_dir outputs/llada-xdlm

`recipes/configs/llada_8b_mdlm.yaml` (k = 0) and `llada_8b_udlm.yaml` (k = 1) are its controls. With `--plan` the same
command, by plain `python`, prints parameters, tokens, operations and GiB per GPU without reading weights, and refuses a
run that cannot fit; `--plan_gpus 4 --plan_gpu_memory 40` plans for other machines (GiB per GPU).

Expected time: 600 steps are 1.26 billion tokens, 8.5e19 FLOP with recomputed activations; 7 to 8 hours at 40 % of an
H100's peak (computed, not measured). Expected result: Table 16 of the paper, e.g. GSM8K in 32 steps 24.5 -> 29.3 and
MBPP 6.8 -> 15.0; at 256 steps it trails LLaDA on all but GSM8K.

The same code trains a model of any size; only the config differs. Options may be given in the config file and on the
command line, which overrides it. One process, a local model, Python's own documentation:

    python recipes/llada_cpt.py --model_name_or_path path/to/model --dataset python-reference \
        --sequence_length 128 --max_steps 100 --per_device_train_batch_size 8 --output_dir outputs/small

With `--config_name config.json` it starts from random weights, with the tokenizer of `--tokenizer_name`, or with one of
`--tokenizer_vocab_size` tokens that it trains on the data.

With `--resume_from_checkpoint auto` the same command starts a run and, after a crash, resumes its last checkpoint, bit
for bit; with `true` a missing checkpoint is an error.

It writes to `output_dir`: the model (`save_pretrained`, config with k), the tokenizer, trainer_state.json with every
logged figure, and checkpoint-* folders. With `--lora_rank 16` it trains adapters, with `--load_in_4bit true` on a base
in 4 bits, and writes the merged model, and in `adapter/` the adapter alone, with the k it was trained at.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import recipe
from recipe import ModelArguments, PlanArguments

from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import check_source, hold_out, load_documents, python_reference_documents
from xdlm_hf.data.source_files import SourceFiles, find_files
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.loading import read_tokenizer
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.checkpoints import recorded_data
from xdlm_hf.training.processes import run_on_main_process, run_script
from xdlm_hf.training.revisions import pin_revision, revision_to_read
from xdlm_hf.training.trainer import XDLMTrainer

TOKENIZER_DOCUMENTS = 100_000  # a tokenizer is trained on the first ones


@dataclass
class DataArguments:
    dataset: str | None = field(
        default="HuggingFaceFW/fineweb-edu", metadata={"help": "Hub dataset, or python-reference."}
    )
    dataset_config: str | None = field(default="sample-10BT", metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset."})
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the Hub dataset; default: its default branch, as at the start."},
    )
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
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Train a tokenizer of this size on the data, for random weights (config_name)."}
    )

    @property
    def from_hub(self) -> bool:
        return self.data_files is None and self.dataset != "python-reference"


def pinned_revision(options: DataArguments, checkpoint: Path | None) -> dict[str, str | None] | None:
    """Revision of the Hub dataset that every process is to read; None for other data. Every process must call this.

    Raises:
        ValueError: As `pin_revision`, or if the data is not from the Hub and a revision is asked for.
    """
    if not options.from_hub:
        if options.dataset_revision is not None:
            raise ValueError(
                f"dataset_revision={options.dataset_revision!r} is for a dataset of the Hub: leave it out with "
                "data_files and with python-reference."
            )
        return None
    check_source(options.dataset, None, options.skip_corrupted)
    return run_on_main_process(lambda: pin_revision(options.dataset, options.dataset_revision, checkpoint))


def source_files(options: DataArguments, checkpoint: Path | None) -> SourceFiles | None:
    """Local files of a run, in the places that they have in the checkpoint that is resumed; None for other data."""
    if options.data_files is None:
        return None
    return find_files(options.data_files, recorded_data(checkpoint).get("source") if checkpoint else None)


def load_text(options: DataArguments, revision: dict[str, str | None] | None, files: SourceFiles | None = None):
    """Documents for training and held-out ones, or None; nothing is read yet."""
    if files is not None:
        documents = files.documents(options.text_column, options.skip_corrupted)
    elif options.dataset == "python-reference":
        documents = python_reference_documents()
    else:
        documents = load_documents(
            options.dataset,
            options.dataset_config,
            options.dataset_split,
            text_column=options.text_column,
            skip_corrupted=options.skip_corrupted,
            revision=revision_to_read(revision),
        )
    return hold_out(documents, options.validation_fraction) if options.validation_fraction else (documents, None)


def load_tokenizer(options: DataArguments, model: ModelArguments, documents, checkpoint: Path | None):
    """The tokenizer named; with `tokenizer_vocab_size` one trained on the first documents, or a resumed run's own.

    Raises:
        ValueError: If one cannot be read, or the options do not go together.
    """
    if options.tokenizer_vocab_size is None:
        return recipe.load_tokenizer(model)
    if model.config_name is None or model.tokenizer_name is not None:
        raise ValueError(
            f"tokenizer_vocab_size={options.tokenizer_vocab_size} trains a tokenizer for random weights: give "
            "config_name, and leave tokenizer_name out."
        )
    if checkpoint is not None:
        return read_tokenizer(str(checkpoint))
    texts = (row["text"] for row in itertools.islice(documents, TOKENIZER_DOCUMENTS))
    return run_on_main_process(lambda: train_tokenizer(texts, options.tokenizer_vocab_size))


def load_rows(
    options: DataArguments,
    tokenizer,
    args: XDLMTrainingArguments,
    revision: dict[str, str | None] | None,
    files: SourceFiles | None = None,
):
    """Training rows and, if documents are held out, validation rows."""
    documents, held_out = load_text(options, revision, files)
    streaming = options.from_hub if options.streaming is None else options.streaming
    show = args.process_index == 0 and not args.disable_tqdm
    validation = None
    if held_out is not None:
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
        source=source(options, revision, files),
    )
    return stream, validation


def source(options: DataArguments, revision: dict[str, str | None] | None, files: SourceFiles | None) -> dict:
    """Identity of a stream's data, stored in checkpoints."""
    if files is not None:
        data = files.fingerprint
    else:
        data = {"dataset": [options.dataset, options.dataset_config, options.dataset_split]}
        if revision is not None:
            data["revision"] = revision
    return {**data, "text_column": options.text_column, "validation_fraction": options.validation_fraction}


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, XDLMTrainingArguments, PlanArguments]:
    """As `recipe.parse`."""
    return recipe.parse((ModelArguments, DataArguments, XDLMTrainingArguments, PlanArguments), argv, __doc__)


def main(argv: list[str] | None = None) -> XDLMTrainer | None:
    model_options, data_options, args, plan = parse(sys.argv[1:] if argv is None else argv)
    if plan.plan:
        return recipe.show_plan(plan, model_options, args, data_options.sequence_length)
    resume = recipe.resume_point(args)
    checkpoint = Path(resume) if isinstance(resume, str) else None
    revision = pinned_revision(data_options, checkpoint)
    files = source_files(data_options, checkpoint)
    documents, _ = load_text(data_options, revision, files)
    tokenizer = load_tokenizer(data_options, model_options, documents, checkpoint)
    model = recipe.load_model(model_options, args, tokenizer, data_options.sequence_length)
    train_rows, validation_rows = load_rows(data_options, tokenizer, args, revision, files)
    return recipe.train(model, model_options, args, tokenizer, train_rows, validation_rows, resume)


if __name__ == "__main__":
    run_script(main)
