"""Text in, rows of token ids out: readers, document packing, the tokenizer check and the collator.

Documents are joined end to end, each followed by the tokenizer's end-of-text token, and cut every L tokens:

    d1 d1 d1 <eot> d2 | d2 d2 d2 d2 d2 | d2 <eot> d3 d3 <eot>

No token is lost at a cut. What is left after the last document becomes one shorter row, which the collator pads with
positions that are never noised and never scored. Documents share rows and see each other, as in LLaDA's pretraining.

Text is data: it is encoded with `split_special_tokens=True`, so a page that spells `<|mdm_mask|>` or
`<|endoftext|>` gives ordinary tokens. A literal mask token would be a hole in x_0 that the network cannot fill
(p_m = 0), and web pages about language models do contain such strings; refusing them would stop a run days in.

Shapes: B batch, L length.
"""

import ast
import glob
import gzip
import itertools
import json
import logging
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

if TYPE_CHECKING:  # `datasets` belongs to the `train` extra: importing this module must not need it
    import datasets

logger = logging.getLogger(__name__)

BOS, EOT, HEADER_START, HEADER_END, EOT_TURN, MASK = SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Left out of the reference text: tests, and packages that Linux distributions ship separately or not at all.
_OPTIONAL_PACKAGES = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter", "turtledemo"}
    | {"lib2to3", "distutils", "ensurepip", "__phello__", "pydoc_data"}
)
# JSON can spell half of a surrogate pair, which is no text: no tokenizer takes it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
DOCUMENTS_PER_CALL = 256  # fast tokenizers work through a batch in parallel


# --------------------------------------------------------------------------------------------------------------------
# Readers


def load_documents(
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    data_files: Sequence[str] | None = None,
    text_column: str = "text",
    skip_corrupted: bool = False,
    revision: str | None = None,
) -> "datasets.IterableDataset":
    """Stream of documents `{"text": str}` from a Hub dataset or from local files.

    Args:
        dataset: Dataset on the Hub, read by streaming. Exclusive with `data_files`.
        config: Its configuration, e.g. `sample-10BT`.
        split: Its split.
        data_files: Local paths or glob patterns: `.jsonl` (one object per line), `.parquet`, and `.txt` or `.md`
            (one document per file); `.gz` of the text formats. One file is one shard.
        text_column: Field that holds the text.
        skip_corrupted: Leave out lines of local JSONL files that are not JSON objects with text in that field; they
            are counted and their numbers logged, at the 1st, 10th, 100th ... of a file and at its end. By default such
            a line is an error.
        revision: Branch, tag or commit of the dataset; `revisions.pin_revision` finds a commit.

    Raises:
        ValueError: If not exactly one source is given, a pattern matches no file, a suffix is unknown, or there is no
            such column. While reading: a corrupted line, naming file and line, or a damaged file.
    """
    import datasets

    check_source(dataset, data_files, skip_corrupted)
    if data_files is not None:
        return stream_files(expand_files(data_files), text_column, skip_corrupted)
    documents = datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
    names = documents.column_names or list(next(iter(documents)))
    check_column(text_column, names, f"dataset {dataset!r}")
    documents = documents.select_columns([text_column])
    return documents if text_column == "text" else documents.rename_column(text_column, "text")


def check_source(dataset: str | None, data_files: Sequence[str] | None, skip_corrupted: bool = False) -> None:
    """Refuse options of `load_documents` that do not go together, before the Hub or a file is asked."""
    if (dataset is None) == (data_files is None):
        raise ValueError(f"give either dataset={dataset!r} or data_files={data_files!r}, one of the two.")
    if skip_corrupted and data_files is None:
        raise ValueError("skip_corrupted=True is for the lines of local JSONL files: give data_files.")


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Files of paths and glob patterns, in order.

    Raises:
        ValueError: If there is none, a pattern matches none, one has an unknown suffix, or one is given twice, also
            under another name of the same file.
    """
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        if not matches:
            raise ValueError(f"data_files: {str(pattern)!r} matches no file.")
        files.extend(matches)
    if not files:
        raise ValueError("data_files names no file.")
    seen: dict[str, str] = {}
    for file in files:
        first = seen.setdefault(os.path.realpath(file), file)
        if first is not file:
            also = "" if first == file else f", also as {first!r}"
            raise ValueError(f"data_files: {file!r} is given twice{also}: its text would be read twice in each pass.")
        if _suffix(file) not in _READERS:
            raise ValueError(f"{file}: unknown suffix; expected one of {sorted(_READERS)}, optionally with .gz.")
    return files


def _suffix(file: str) -> str:
    return pathlib.Path(file.removesuffix(".gz")).suffix


def stream_files(
    files: Sequence[str], text_column: str, skip_corrupted: bool, places: bool = False
) -> "datasets.IterableDataset":
    """Stream of documents `{"text": str}` from files that exist, one shard each; an empty name is a shard of none.

    Args:
        files, text_column, skip_corrupted: As `load_documents`, patterns expanded.
        places: Add a column `place`: [number of the file, documents read of it, CRC-32 of their texts in a row].
    """
    import datasets

    return datasets.IterableDataset.from_generator(
        _read_files,
        # Lists, because `datasets` takes every list of a generator as sharded.
        gen_kwargs={
            "files": list(files),
            "numbers": list(range(len(files))),
            "column": text_column,
            "skip_corrupted": skip_corrupted,
            "places": places,
        },
    )


def _read_files(
    files: list[str], numbers: list[int], column: str, skip_corrupted: bool, places: bool
) -> Iterator[dict[str, Any]]:
    for file, number in zip(files, numbers, strict=True):
        crc = 0
        for count, text in enumerate(read_documents(file, column, skip_corrupted) if file else (), start=1):
            if places:
                crc = checksum(text, crc)
                yield {"text": text, "place": [number, count, crc]}
            else:
                yield {"text": text}


def read_documents(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    """Texts of one file, as `load_documents` reads it."""
    return _READERS[_suffix(file)](file, column, skip_corrupted)


def read_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, gzipped or not; ValueError if it is damaged."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  (the handler names the last line read)
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}, after line {number}: damaged gzip file ({error}); fetch it again.") from error


def _read_jsonl(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    corrupted, report_at = [], 1
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            text = _parse_line(line, column, f"{file}, line {number}")
        except ValueError:
            if not skip_corrupted:
                raise
            corrupted.append(number)
            if len(corrupted) == report_at:  # a run may end long before its file does
                _report_skipped(file, corrupted)
                report_at *= 10
        else:
            yield text
    if corrupted and 10 * len(corrupted) != report_at:
        _report_skipped(file, corrupted)


def _report_skipped(file: str, corrupted: Sequence[int]) -> None:
    shown = ", ".join(map(str, corrupted[:20])) + (", ..." if len(corrupted) > 20 else "")
    logger.warning("%s: skipped %d corrupted lines (%s)", file, len(corrupted), shown)


def _parse_line(line: bytes, column: str, where: str) -> str | None:
    record = parse_object(line, where, "; repair it, remove it or skip_corrupted lines")
    check_column(column, record, where)
    if record[column] is not None and not isinstance(record[column], str):
        raise ValueError(f"{where}: {column!r} holds {type(record[column]).__name__}, not text.")
    return record[column]


def parse_object(line: bytes, where: str, remedy: str = "; repair it or remove it") -> dict[str, Any]:
    """A line's JSON object; ValueError, naming where it stands, if there is none."""
    try:
        record = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, half a surrogate pair, a million brackets
        raise ValueError(f"{where}: not valid JSON ({error}){remedy}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}.")
    return record


def _read_parquet(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: damaged Parquet file ({error}); fetch it again.") from error
    with table:
        check_column(column, table.schema_arrow.names, file)
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def _read_text(file: str, column: str, skip_corrupted: bool) -> Iterator[str]:
    content = b"".join(line for _, line in read_lines(file))
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}).") from error


_READERS: dict[str, Callable[[str, str, bool], Iterator[str | None]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        raise ValueError(f"{where}: no column {column!r}; it has {sorted(names)}. Set text_column to one of them.")


def hold_out(
    documents: "datasets.IterableDataset", fraction: float
) -> tuple["datasets.IterableDataset", "datasets.IterableDataset"]:
    """Split documents into training and validation by a hash of their text.

    The rule depends on the text alone, so it is the same on every rank and worker, in every order and on every run,
    and copies of one document never fall on both sides. (`take` and `skip` would not do: a stream that is sharded
    after `skip` skips other documents than `take` took.)

    Raises:
        ValueError: If `fraction` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction {fraction} must lie strictly between 0 and 1.")
    threshold = int(fraction * 2**32)
    train = documents.filter(_HashFilter(threshold, held_out=False), input_columns=["text"])
    return train, documents.filter(_HashFilter(threshold, held_out=True), input_columns=["text"])


def checksum(text: str | None, before: int = 0) -> int:
    """CRC-32 of a text, or of texts in a row, given that of those before."""
    return zlib.crc32((text or "").encode("utf-8", "surrogatepass"), before)


@dataclass(frozen=True)
class _HashFilter:
    threshold: int
    held_out: bool

    def __call__(self, text: str | None) -> bool:
        return (checksum(text) < self.threshold) == self.held_out


def python_reference_documents() -> "datasets.IterableDataset":
    """Python's own documentation as documents `{"text": str}`: real text on every machine, nothing downloaded.

    First the language reference that `help()` shows (`pydoc_data.topics`, 79 documents in Python 3.11), then one
    document per standard-library module with all its docstrings, 2.2 MB in all. The modules are parsed, never
    imported. The order is alphabetical; the text depends on the Python version alone.
    """
    from pydoc_data.topics import topics

    import datasets

    texts = [topics[name] for name in sorted(topics)]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_python_files(root)):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = _docstrings(ast.parse(path.read_bytes()), name)
        if text:
            texts.append(text)
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()


def _python_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _OPTIONAL_PACKAGES  # in place: site-packages is not even entered
        yield from (pathlib.Path(folder, file) for file in files if file.endswith(".py"))


def _docstrings(tree: ast.Module, module: str) -> str:
    """The docstrings of a module, each under its dotted name, in source order."""
    sections = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                sections.append(f"{name}\n\n{docstring}\n")
        for child in ast.iter_child_nodes(node):
            visit(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    visit(tree, module)
    return "\n".join(sections)


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with LLaDA's special tokens, trained on `texts`.

    Ids 0 to 5 are <|startoftext|>, <|endoftext|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>, <|mdm_mask|>;
    then the 256 bytes, so that no text is unknown; then merges. End-of-text is also the padding token, as in LLaDA.

    Args:
        texts: Training text.
        vocab_size: Number of tokens, special ones included; fewer when the text offers no further merge.

    Raises:
        ValueError: If `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}: special tokens and 256 bytes.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=EOT,
        mask_token=MASK,
        additional_special_tokens=[HEADER_START, HEADER_END, EOT_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer that does not belong to the model.

    Args:
        tokenizer: The tokenizer.
        config: Model config with `mask_token_id`, and `embedding_size` or `vocab_size` rows in the output layer.

    Raises:
        ValueError: If the tokenizer has ids beyond the output layer, another mask id than the config, or no
            end-of-text token.
    """
    rows = getattr(config, "embedding_size", None) or config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's output layer {rows} rows: "
            "use the tokenizer that was saved with this model."
        )
    theirs, ours = tokenizer.mask_token_id, getattr(config, "mask_token_id", None)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"the tokenizer's mask token {tokenizer.mask_token!r} has id {theirs}, "
            f"the model's mask_token_id is {ours}: use the tokenizer that was saved with this model, "
            "or correct mask_token_id in its config.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; it is needed to separate documents.")


# --------------------------------------------------------------------------------------------------------------------
# Packing


class Encoder:
    """Turns batches of documents into token ids with the separator after each; counts what it skips."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_column: str):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token; it is needed to separate documents.")
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.documents = 0
        self.empty = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> Iterator[list[int]]:
        check_column(self.text_column, batch, "the dataset")
        return (ids for _, _, ids in self.encode(batch[self.text_column]))

    def encode(self, documents: Sequence[Any]) -> Iterator[tuple[int, str, list[int]]]:
        """Number, text and ids of each document that is not empty."""
        texts, numbers = [], []
        for number, text in enumerate(documents):
            self.documents += 1
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"document {self.documents}: column {self.text_column!r} holds {type(text).__name__} "
                    f"{text!r:.60}, not text."
                )
            if text is None or not text.strip():
                self.empty += 1
            else:
                texts.append(text)
                numbers.append(number)
        if not texts:
            return
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # silences the length warning: rows are cut below
        )["input_ids"]
        for number, text, ids in zip(numbers, texts, encoded, strict=True):
            if self.tokenizer.mask_token_id in ids:
                raise ValueError(
                    f"a document encodes to the mask token {self.tokenizer.mask_token!r} although special tokens are "
                    "split: use a fast tokenizer, or remove that string from the text."
                )
            yield number, text, ids + [self.tokenizer.eos_token_id]

    def end_of_pass(self) -> None:
        """Log how many empty documents were skipped, and start counting anew.

        Raises:
            ValueError: If there was no document, or nothing but empty ones.
        """
        if self.documents == 0:
            raise ValueError("there is no document to read: the source is empty, or has fewer documents than readers.")
        if self.documents == self.empty:
            raise ValueError(f"column {self.text_column!r} holds no text: all {self.empty} documents are empty.")
        if self.empty:
            logger.warning("skipped %d empty documents of %d", self.empty, self.documents)
        self.documents = self.empty = 0


def check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"row length {length} must be positive.")


class PackedDataset(torch.utils.data.Dataset):
    """Documents packed into rows, held in memory: 4 bytes per token.

    Item i is `{"input_ids": int64 ids}` of `length` tokens; the last row may be shorter.

    Args:
        documents: `datasets.Dataset` or `IterableDataset` with a text column, read once from start to end.
        tokenizer: Its end-of-text token separates documents.
        length: L, tokens per row.
        text_column: Column that holds the text.
        max_rows: Stop reading after so many full rows; default: no limit.
        show_progress: Show a progress bar.

    Raises:
        ValueError: If there is no such column, all documents are empty, a value is not text, the tokenizer has no
            end-of-text token, or `length` is not positive.
    """

    def __init__(
        self,
        documents: "datasets.Dataset | datasets.IterableDataset",
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        text_column: str = "text",
        max_rows: int | None = None,
        show_progress: bool = False,
    ):
        check_length(length)
        encoder = Encoder(tokenizer, text_column)
        chunks, total = [], 0
        limit = None if max_rows is None else max_rows * length
        with tqdm(desc="Packing", unit=" tokens", unit_scale=True, disable=not show_progress) as bar:
            for ids in itertools.chain.from_iterable(map(encoder, documents.iter(DOCUMENTS_PER_CALL))):
                chunks.append(np.asarray(ids, dtype=np.int32))
                total += len(ids)
                bar.update(len(ids))
                if limit is not None and total >= limit:
                    break
        encoder.end_of_pass()
        self.tokens = np.concatenate(chunks)[:limit]
        self.length = length

    @property
    def fingerprint(self) -> dict[str, int]:
        """What tells this data from other data: `{"tokens": ..., "length": L, "crc32": ...}`, over every token."""
        return {"tokens": len(self.tokens), "length": self.length, "crc32": zlib.crc32(self.tokens.tobytes())}

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = (index % len(self)) * self.length
        return {"input_ids": torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))}


# --------------------------------------------------------------------------------------------------------------------
# Collator


@dataclass
class DiffusionCollator:
    """Rows of ids to one batch of clean text x_0, with what may be noised and what is scored.

    A row is a mapping with `input_ids` and, for supervised fine-tuning, one of `labels` (-100 marks the prompt) or
    `prompt_mask` (true marks the prompt); optionally `token_weights`. Prompt and padding are neither noised nor scored.

    The batch holds `input_ids` (B, L) int64; `noise_mask` (B, L) bool, true where noise may fall; `token_weights`
    (B, L) float32, 0 where noise may not fall; and `attention_mask` (B, L) int64, only when a row is padded.

    Args:
        pad_token_id: Fills rows up to the longest.
        mask_token_id: When given, refused wherever noise may fall: the network can never predict it.

    Raises:
        ValueError: If lengths disagree, a weight is negative or falls on a protected position, both prompt markers are
            given, a label is neither -100 nor the token itself, or the mask token occurs.
    """

    pad_token_id: int
    mask_token_id: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = [self._row(row) for row in rows]
        ids, noise_mask, weights = zip(*columns, strict=True)
        lengths = [len(row) for row in ids]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "noise_mask": _pad(noise_mask, False),
            "token_weights": _pad(weights, 0.0),
        }
        if min(lengths) < max(lengths):
            batch["attention_mask"] = _pad([torch.ones(n, dtype=torch.int64) for n in lengths], 0)
        return batch

    def _row(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        noise_mask = torch.ones(len(ids), dtype=torch.bool)
        if "labels" in row and "prompt_mask" in row:
            raise ValueError("a row has both labels and prompt_mask; give one of them.")
        if "labels" in row:
            labels = _column("labels", row["labels"], torch.int64, ids)
            noise_mask = labels != -100
            if (labels != ids)[noise_mask].any():
                raise ValueError("labels must repeat input_ids or be -100 (prompt): a diffusion model does not shift.")
        if "prompt_mask" in row:
            noise_mask = ~_column("prompt_mask", row["prompt_mask"], torch.bool, ids)
        weights = noise_mask.float()
        if "token_weights" in row:
            weights = _column("token_weights", row["token_weights"], torch.float32, ids)
            if (weights < 0).any() or (weights[~noise_mask] != 0).any():
                raise ValueError("token_weights must not be negative, and must be 0 on the prompt: it is not noised.")
        if self.mask_token_id is not None and (ids[noise_mask] == self.mask_token_id).any():
            raise ValueError(
                f"a row holds the mask token (id {self.mask_token_id}) as text, which the network can never predict: "
                "encode text with split_special_tokens=True, or mark the position as prompt."
            )
        return ids, noise_mask, weights


def _column(name: str, values: Any, dtype: torch.dtype, ids: Tensor) -> Tensor:
    column = torch.as_tensor(values, dtype=dtype)
    if column.shape != ids.shape:
        raise ValueError(f"{name} has {len(column)} entries, input_ids {len(ids)}.")
    return column


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
