"""Pretraining of the paper's text models from scratch: one DiT, four kinds of noise.

The network and the data are the same for every run; only the noise differs. At k = 0 tokens become [MASK] (MDLM), at
k = 1 any token of the vocabulary (UDLM), in between one or the other (XDLM). GIDD's mixture changes with time. The
loss is the bound of Eq. 15; for GIDD it is its own bound, in these configs with the weights of the released code.

The paper's runs, 8 GPUs with 80 GB, in recipes/configs/text/{owt,lm1b}_{mdlm,udlm,gidd,xdlm}.yaml (text8 is ours):

    accelerate launch --num_processes 8 recipes/text_pretrain.py --config recipes/configs/text/owt_xdlm.yaml

`--mixing_ratio 0.5 --output_dir ...` makes another row of the tables. Expected time on 8 H800, computed from the
paper's Table 17: 5.5 days for OpenWebText (5.2e11 tokens), 17 hours for LM1B (6.6e10). Expected result: Tables 7 to 11,
e.g. a validation perplexity of 24.1 at k = 0.1 on OpenWebText. `--plan` prints what a run needs.

owt_from_mdlm.yaml trains a published model further at another k.

Local files take a corpus' place, with the same detokenizer and cutting. A small run on one process:

    python recipes/text_pretrain.py --config recipes/configs/text/small.yaml --data_files my_text.txt \
        --mixing_ratio 0.1 --output_dir outputs/small

It writes to `output_dir`: the model with the average of the weights (`ema_decay`), as `save_pretrained` does, the
tokenizer, trainer_state.json with every logged figure, and checkpoint-* folders, which `xdlm-perplexity` and
`xdlm-gen-ppl` score too.
"""

import sys
from dataclasses import dataclass, field

import recipe
from recipe import ModelArguments, PlanArguments
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from xdlm_hf.data.corpora import CORPORA, corpus_rows, corpus_stream, find_corpus
from xdlm_hf.data.text8 import text8_tokenizer
from xdlm_hf.data.wrapping import set_boundary_tokens
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.processes import run_script
from xdlm_hf.training.trainer import XDLMTrainer, training_process

MASK = "[MASK]"  # added to a tokenizer without a mask token, such as GPT-2's


@dataclass
class CorpusArguments:
    corpus: str = field(default="openwebtext", metadata={"help": f"One of {', '.join(CORPORA)}."})
    corpus_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Local .jsonl, .parquet, .txt files or patterns in the corpus' place."}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Local files for evaluation; text8 takes its part of data_files."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text in local files."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens per row, boundary tokens included."})
    released_rows: bool = field(
        default=False, metadata={"help": "Cut rows as the released code does, in memory; see xdlm_hf.data.wrapping."}
    )
    streaming: bool | None = field(
        default=None, metadata={"help": "Tokenize while training; default: corpora of the Hub except text8."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Documents shuffled together when streaming."})
    validation_rows: int | None = field(default=None, metadata={"help": "At most so many rows for evaluation."})

    @property
    def streamed(self) -> bool:
        if self.streaming is not None:
            return self.streaming
        return self.data_files is None and self.corpus != "text8" and not self.released_rows


def check(options: CorpusArguments, args: XDLMTrainingArguments) -> None:
    """Refuse options that do not go together, before anything is read.

    Raises:
        ValueError: Naming them and the remedy.
    """
    find_corpus(options.corpus, "train")
    if options.streamed and options.released_rows:
        raise ValueError("released_rows=True cuts rows in memory; leave streaming out.")
    if options.streamed and options.corpus == "text8":
        raise ValueError("corpus='text8' is cut in memory; leave streaming out.")
    if options.streamed and args.max_steps <= 0:
        raise ValueError(f"max_steps={args.max_steps}: a stream has no end, so the number of steps must be given.")
    if options.validation_rows is not None and options.validation_rows < 1:
        raise ValueError(f"validation_rows={options.validation_rows} must be at least 1; leave it out for all.")
    if options.data_files is None and options.text_column is not None:
        raise ValueError(f"text_column={options.text_column!r} is for data_files; leave it out.")
    if options.data_files is not None and options.corpus_revision is not None:
        raise ValueError(f"corpus_revision={options.corpus_revision!r} is for the Hub; leave it out with data_files.")
    if options.validation_files is not None and (options.data_files is None or options.corpus == "text8"):
        raise ValueError(
            f"validation_files={options.validation_files} goes with data_files, and not with text8, whose validation "
            "part is cut from the same text; leave it out."
        )
    if args.eval_strategy != "no" and not evaluates(options):
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} with data_files={options.data_files} needs validation_files; "
            "give them, or eval_strategy no."
        )


def evaluates(options: CorpusArguments) -> bool:
    return options.data_files is None or options.corpus == "text8" or options.validation_files is not None


def load_tokenizer(options: CorpusArguments, model: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named (`text8` is the character tokenizer), with boundary, mask and padding tokens."""
    if model.tokenizer_name == "text8":
        tokenizer = text8_tokenizer()
    else:
        tokenizer = recipe.load_tokenizer(model)
    set_boundary_tokens(tokenizer, options.released_rows)
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_rows(
    options: CorpusArguments, tokenizer: PreTrainedTokenizerBase, args: XDLMTrainingArguments
) -> tuple[Dataset, Dataset | None]:
    """Training rows, and validation rows if there are any, both with EOS after each document as in the paper's runs."""
    where = {"text_column": options.text_column, "revision": options.corpus_revision}
    rows = {
        "tokenizer": tokenizer,
        "length": options.sequence_length,
        "released": options.released_rows,
        "insert_eos": options.released_rows or options.corpus != "text8",
        "show_progress": args.process_index == 0 and not args.disable_tqdm,
    }
    validation = None
    if evaluates(options):
        files = options.data_files if options.corpus == "text8" else options.validation_files
        validation = corpus_rows(
            options.corpus,
            part=held_out_part(options),
            data_files=files,
            max_rows=options.validation_rows,
            **where,
            **rows,
        )
    if not options.streamed:
        return corpus_rows(options.corpus, part="train", data_files=options.data_files, **where, **rows), validation
    stream = corpus_stream(
        options.corpus,
        tokenizer,
        options.sequence_length,
        options.data_files,
        **where,
        rank=args.process_index,
        world_size=args.world_size,
        shuffle_seed=args.seed,
        shuffle_buffer=options.shuffle_buffer,
    )
    return stream, validation


def held_out_part(options: CorpusArguments) -> str:
    return "validation" if "validation" in CORPORA[options.corpus].splits else "test"


def parse(argv: list[str]) -> tuple[ModelArguments, CorpusArguments, XDLMTrainingArguments, PlanArguments]:
    """As `recipe.parse`."""
    return recipe.parse((ModelArguments, CorpusArguments, XDLMTrainingArguments, PlanArguments), argv, __doc__)


def main(argv: list[str] | None = None) -> XDLMTrainer | None:
    model_options, options, args, plan = parse(sys.argv[1:] if argv is None else argv)
    check(options, args)
    if plan.plan:
        return recipe.show_plan(plan, model_options, args, options.sequence_length)
    resume = recipe.resume_point(args)
    tokenizer = load_tokenizer(options, model_options)
    model = recipe.load_model(model_options, args, tokenizer, options.sequence_length)
    training_process(model, args)  # refuses what the trainer would, before data are read
    train_rows, validation_rows = load_rows(options, tokenizer, args)
    return recipe.train(model, model_options, args, tokenizer, train_rows, validation_rows, resume)


if __name__ == "__main__":
    run_script(main)
