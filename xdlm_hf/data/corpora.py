"""The text corpora of the paper: their sources, the part that is scored, and rows for training and evaluation.

    openwebtext   training, and its last 100,000 documents for validation
    lm1b          training and validation at 128 BERT tokens; a zero-shot set at 1024 GPT-2 tokens
    text8         characters
    ag_news, lambada, lm1b, ptb, arxiv, pubmed, wikitext       the seven zero-shot sets

Local JSONL, Parquet or text files can replace a corpus; its detokenizer is applied to them. `python -m
xdlm_hf.data.corpora NAME --tokenizer T --length L` prints counts and checksum of the rows.

Some repositories on the Hub contain a loading script, which `datasets` no longer runs. Without a given revision, the
Hub's Parquet copy (branch refs/convert/parquet) is read instead. The copy of openwebtext is incomplete, so its last
documents would differ; therefore the number of documents is checked.
"""

import argparse
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .detokenizers import DETOKENIZERS
from .readers import stream_files
from .source_files import SourceFiles, find_files
from .text8 import check_characters, text8_documents, text8_tokenizer
from .wrapping import WrappedDataset, WrappedStream, set_boundary_tokens

logger = logging.getLogger(__name__)
PARQUET_COPY = "refs/convert/parquet"
SHARDS = 64  # of a corpus from the Hub, to be divided among the readers of a stream


@dataclass(frozen=True)
class Corpus:
    """A corpus of the paper.

    Args:
        dataset: Name on the Hub; None for text8, which is downloaded from its web page.
        splits: Split on the Hub, by part.
        scored: The part on which the paper's perplexities are measured.
        config: Configuration on the Hub.
        column: Column of the text.
        detokenizer: Name in `DETOKENIZERS`; None for no detokenizer.
        by_line: Whether each line of a local text file is a document; otherwise the whole file is one.
        line_ends: Whether such a document includes its line end, like those of WikiText on the Hub.
        documents: Expected number of documents of the split, if a part is counted from its end.
    """

    dataset: str | None
    splits: Mapping[str, str]
    scored: str
    config: str | None = None
    column: str = "text"
    detokenizer: str | None = None
    by_line: bool = False
    line_ends: bool = False
    documents: int | None = None


_VALIDATION = {"train": "train", "validation": "validation"}
_TEST = {"train": "train", "test": "test"}
CORPORA: dict[str, Corpus] = {
    "openwebtext": Corpus(
        "Skylion007/openwebtext",
        {"train": "train[:-100000]", "validation": "train[-100000:]"},
        "validation",
        config="plain_text",
        documents=8_013_769,
    ),
    "lm1b": Corpus("billion-word-benchmark/lm1b", _TEST, "test", config="plain_text", detokenizer="lm1b", by_line=True),
    "text8": Corpus(None, {"train": "", "validation": "", "test": ""}, "test"),
    "ag_news": Corpus("fancyzhx/ag_news", _TEST, "test", by_line=True),
    "lambada": Corpus(
        "EleutherAI/lambada_openai", {"test": "test"}, "test", config="default", detokenizer="lambada", by_line=True
    ),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        {**_VALIDATION, "test": "test"},
        "validation",
        config="penn_treebank",
        column="sentence",
        detokenizer="ptb",
        by_line=True,
    ),
    "wikitext": Corpus(
        "Salesforce/wikitext",
        {**_VALIDATION, "test": "test"},
        "validation",
        config="wikitext-103-raw-v1",
        detokenizer="wikitext",
        by_line=True,
        line_ends=True,
    ),
    **{
        name: Corpus(
            "armanc/scientific_papers",
            {**_VALIDATION, "test": "test"},
            "validation",
            config=name,
            column="article",
            detokenizer="scientific_papers",
        )
        for name in ("arxiv", "pubmed")
    },
}
ZERO_SHOT = ("ag_news", "lambada", "lm1b", "ptb", "arxiv", "pubmed", "wikitext")


def find_corpus(name: str, part: str | None = None) -> tuple[Corpus, str]:
    """A corpus and its part, by default the scored one.

    Raises:
        ValueError: If there is no such corpus or part.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus {name!r} is not known; choose one of {', '.join(CORPORA)}.")
    corpus = CORPORA[name]
    part = part or corpus.scored
    if part not in corpus.splits:
        raise ValueError(f"corpus {name!r} has no part {part!r}; choose one of {', '.join(corpus.splits)}.")
    return corpus, part


# --------------------------------------------------------------------------------------------------------------------
# Documents


def load_corpus(
    name: str,
    part: str | None = None,
    data_files: Sequence[str] | None = None,
    text_column: str | None = None,
    revision: str | None = None,
) -> datasets.IterableDataset:
    """Documents `{"text": str}` of a corpus, detokenized.

    Args:
        name: In `CORPORA`.
        part: "train", "validation" or "test"; by default the one that the paper scores.
        data_files: Local files or patterns to read instead, as in `readers.load_documents`. All of them are read as
            this part; for text8 it is one file, which is divided into the parts.
        text_column: Column of the text in JSONL and Parquet files; default: that of the corpus.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the name, part or a file is unknown, options contradict each other, or the corpus cannot be
            read.
    """
    corpus, part = find_corpus(name, part)
    if data_files is not None and revision is not None:
        raise ValueError(f"revision={revision!r} is for a corpus on the Hub; leave it out with data_files.")
    if corpus.dataset is None:
        documents = _text8(part, data_files, text_column, revision)
    elif data_files is not None:
        documents = _local(corpus, find_files(data_files), text_column)
    else:
        if text_column is not None:
            raise ValueError(
                f"text_column={text_column!r} is for data_files; leave it out ({name} has {corpus.column!r})."
            )
        documents = _from_hub(name, corpus, corpus.splits[part], revision)
    if corpus.detokenizer is None:
        return documents
    return documents.map(_Detokenize(corpus.detokenizer))


@dataclass(frozen=True)
class _Detokenize:
    name: str

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": row["text"] if row["text"] is None else DETOKENIZERS[self.name](row["text"])}


def _text8(
    part: str, data_files: Sequence[str] | None, text_column: str | None, revision: str | None
) -> datasets.IterableDataset:
    if text_column is not None or revision is not None:
        raise ValueError("text8 is one text file; leave text_column and revision out.")
    paths = [None] if data_files is None else find_files(data_files).paths
    if len(paths) != 1:
        raise ValueError(f"text8 is one text, which is divided into its parts; give one file, not {len(paths)}.")
    return text8_documents(part, paths[0]).to_iterable_dataset()


def _local(corpus: Corpus, files: SourceFiles, text_column: str | None) -> datasets.IterableDataset:
    documents = stream_files(files.paths, text_column or corpus.column, skip_corrupted=False)
    text = [path.removesuffix(".gz").endswith((".txt", ".md")) for path in files.paths]
    if not corpus.by_line or not any(text):
        return documents
    if not all(text):
        raise ValueError(
            "data_files must be either text files, with a document per line, or JSONL and Parquet files, not both."
        )
    return documents.map(_Lines(corpus.line_ends), batched=True, batch_size=1)


@dataclass(frozen=True)
class _Lines:
    line_ends: bool

    def __call__(self, batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        # Not `splitlines`, which also splits at characters that occur inside lines, such as U+0085.
        lines = (line for text in batch["text"] for line in io.StringIO(text, newline="\n"))
        return {"text": [line if self.line_ends else line.removesuffix("\n") for line in lines]}


def _from_hub(name: str, corpus: Corpus, split: str, revision: str | None) -> datasets.IterableDataset:
    try:
        try:
            found = datasets.load_dataset(corpus.dataset, corpus.config, split=split, revision=revision)
        except RuntimeError:  # a loading script
            if revision is not None:
                raise
            whole = split.partition("[")[0]
            copy = {whole: f"{corpus.config}/{whole}/*.parquet"}
            found = datasets.load_dataset(corpus.dataset, data_files=copy, split=split, revision=PARQUET_COPY)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"corpus {name!r} cannot be read from {corpus.dataset} on the Hub ({why}); pass another revision, or "
            f"download it elsewhere and give its files as data_files (JSONL or Parquet with the column "
            f"{corpus.column!r}, or text)."
        ) from error
    _check_size(name, corpus, found)
    found = found.select_columns([corpus.column])
    found = found if corpus.column == "text" else found.rename_column(corpus.column, "text")
    return found.to_iterable_dataset(min(SHARDS, max(1, len(found))))


def _check_size(name: str, corpus: Corpus, found: datasets.Dataset) -> None:
    if corpus.documents is None:
        return
    split = found.info.splits["train"].num_examples if found.info.splits else len(found)
    if split != corpus.documents:
        raise ValueError(
            f"corpus {name!r}: this revision of {corpus.dataset} has {split} documents, not {corpus.documents}, so its "
            "last 100,000 would not be the paper's. Pass a complete revision, or data_files."
        )


# --------------------------------------------------------------------------------------------------------------------
# Rows


def corpus_rows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    part: str | None = None,
    data_files: Sequence[str] | None = None,
    text_column: str | None = None,
    revision: str | None = None,
    insert_eos: bool | None = None,
    released: bool = False,
    max_rows: int | None = None,
    show_progress: bool = False,
) -> WrappedDataset:
    """A part of a corpus as rows in memory; logs counts and checksum.

    text8 is cut every L characters, without boundary tokens; with `released`, its chunks of 256 characters are
    documents, which are joined and cut like those of other corpora.

    Args:
        name, part, data_files, text_column, revision: As in `load_corpus`.
        tokenizer: With BOS and EOS, or [CLS] and [SEP] instead; changed by `set_boundary_tokens`.
        length: L, boundary tokens included.
        insert_eos: Whether EOS follows each document. Default: yes, except for text8; with `released` only for the
            training part, since the released evaluation commands omit EOS.
        released: Cut rows as the released code does (`wrapping`).
        max_rows, show_progress: As in `WrappedDataset`.

    Raises:
        ValueError: As `load_corpus` and `WrappedDataset`; if the tokenizer is not one of characters, for text8.
    """
    _, part = find_corpus(name, part)
    documents = load_corpus(name, part, data_files, text_column, revision)
    characters = name == "text8"
    if characters:
        check_characters(tokenizer, next(iter(documents))["text"])
    set_boundary_tokens(tokenizer, released)
    if insert_eos is None:
        insert_eos = part == "train" if released else not characters
    rows = WrappedDataset(
        documents,
        tokenizer,
        length,
        max_rows=max_rows,
        show_progress=show_progress,
        insert_eos=insert_eos,
        boundaries=released or not characters,
        released=released,
    )
    logger.info("%s %s: %s", name, part, json.dumps(report(rows)))
    return rows


def corpus_stream(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data_files: Sequence[str] | None = None,
    text_column: str | None = None,
    revision: str | None = None,
    released: bool = False,
    **options: Any,
) -> WrappedStream:
    """The training part of a corpus as a stream of rows, resumable at every row.

    Args:
        name, data_files, text_column, revision: As in `load_corpus`; checkpoints record the files.
        tokenizer, length: As in `corpus_rows`.
        released: Use the released code's EOS (`set_boundary_tokens`); nothing else changes, and no tokens are dropped.
        options: Of `WrappedStream`: rank, world_size, shuffle_seed, ...

    Raises:
        ValueError: As `load_corpus` and `WrappedStream`, and for text8 (use `corpus_rows`).
    """
    corpus, part = find_corpus(name, "train")
    if corpus.dataset is None:
        raise ValueError(f"corpus {name!r} cannot be streamed; use corpus_rows.")
    documents = load_corpus(name, part, data_files, text_column, revision)
    if data_files is None:
        source = {"dataset": [corpus.dataset, corpus.config, corpus.splits[part]], "revision": revision}
    else:
        source = {"files": find_files(data_files).fingerprint["files"], "text_column": text_column or corpus.column}
    set_boundary_tokens(tokenizer, released)
    return WrappedStream(documents, tokenizer, length, source={"corpus": name, **source}, **options)


def report(rows: WrappedDataset) -> dict[str, int]:
    """Documents, tokens, rows and CRC-32 of rows."""
    return {**rows.counts, **rows.fingerprint}


def main(argv: Sequence[str] | None = None) -> None:
    """Print counts and checksum of a corpus' rows as JSON."""
    parser = argparse.ArgumentParser(prog="python -m xdlm_hf.data.corpora", description=main.__doc__)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name; text8 for the character tokenizer")
    parser.add_argument("--length", type=int, required=True, help="tokens per row")
    parser.add_argument("--part", choices=("train", "validation", "test"), help="default: the one that is scored")
    parser.add_argument("--data_files", nargs="+", help="local files to read instead")
    parser.add_argument("--text_column", help="column of the text in local files")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--released", action="store_true", help="cut rows as the released code does")
    options = vars(parser.parse_args(argv))
    name, source = options.pop("corpus"), options.pop("tokenizer")
    try:
        tokenizer = text8_tokenizer() if source == "text8" else AutoTokenizer.from_pretrained(source)
        rows = corpus_rows(name, tokenizer, options.pop("length"), show_progress=True, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"corpora: {' '.join(str(error).split())}") from error
    print(json.dumps(report(rows)))


if __name__ == "__main__":
    main()
