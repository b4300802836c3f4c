"""Rows for supervised fine-tuning from conversations.

A row is a prompt, which is never noised and never scored, and the answer to it:

    <bos> user: 1 + 1? <end> assistant:   |   2 <end> <eot> <eot> <eot>
    prompt                                    answer, with the end-of-text tokens of `eos_in_loss`

Prompt and answer are encoded separately, so that the prompt has the same ids as at inference. A diffusion model sees
the whole row, so nothing after the answer may be in it: with `turns` "each", a conversation gives one row for each
answer, cut after it (the single-turn pairs of LLaDA's fine-tuning); with "last", one row for the last answer.

LLaDA pads the rows of a batch with end-of-text tokens up to the longest and trains on them as part of the answer, which
teaches the model to end early. Here `eos_in_loss` is an option, and does not depend on the other rows of the batch:

    "none"   the answer ends as the chat template ends it
    "one"    and one end-of-text token
    "all"    and as many as fill the row up to `length` (LLaDA's convention; every row then costs as much as a long one)

A row that was cut gets none. Padding beyond that is neither attended to, nor noised, nor scored.

A message that spells a special token of the tokenizer is refused: the token would end a turn, or be a hole.
"""

import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import check_length
from .readers import check_source, checksum, expand_files, parse_object, read_lines
from .tokenizer import CHAT_TEMPLATE

logger = logging.getLogger(__name__)
TURNS = ("each", "last")
EOS_IN_LOSS = ("none", "one", "all")
LOSS_WEIGHTING = ("rows", "tokens")
_ROWS_PER_CALL = 256  # fast tokenizers work through a batch in parallel


def load_conversations(
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    data_files: Sequence[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a Hub dataset or of local `.jsonl` and `.parquet` files, each with its place, for messages.

    Args:
        dataset, config, split: On the Hub. Exclusive with `data_files`.
        data_files: Local paths or glob patterns; `.jsonl` may be gzipped.

    Raises:
        ValueError: If not exactly one source is given, a pattern matches no file, or a suffix is another. While
            reading: a damaged file or line, naming it.
    """
    check_source(dataset, data_files)
    if data_files is None:
        rows = datasets.load_dataset(dataset, config, split=split)
        return ((f"{dataset}, row {number}", row) for number, row in enumerate(rows))
    files = expand_files(data_files)
    for file in files:
        if not file.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet")):
            raise ValueError(f"{file}: conversations are read from .jsonl and .parquet files.")
    return _records(files)


def _records(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        if file.endswith(".parquet"):
            try:
                batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{file}: damaged Parquet file ({error}); fetch it again.") from error
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))
        else:
            for number, line in read_lines(file):
                if line.strip():
                    yield f"{file}, line {number}", parse_object(line, f"{file}, line {number}")


def hold_out_records(
    records: Iterable[tuple[str, dict[str, Any]]], fraction: float, held_out: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records for training or, if `held_out`, for validation; split by a hash of their content.

    Raises:
        ValueError: If `fraction` does not lie in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction {fraction} must lie in [0, 1).")
    threshold = int(fraction * 2**32)
    return (
        (where, record)
        for where, record in records
        if (checksum(json.dumps(record, sort_keys=True, default=str)) < threshold) == held_out
    )


def messages_of(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The messages of a record: its `messages`, or else its `prompt` (a text or messages) and `completion`.

    Raises:
        ValueError: If it has neither, or they are not messages with the texts `role` and `content`.
    """
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [
            *_as_messages(record["prompt"], "user"),
            *_as_messages(record["completion"], "assistant"),
        ]
    else:
        raise ValueError(f"{where}: neither messages nor prompt and completion; it has {sorted(record)}.")
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError(f"{where}: messages must be a list of objects with the texts role and content.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _as_messages(part: Any, role: str) -> list[Any]:
    return part if isinstance(part, list) else [{"role": role, "content": part}]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the tokenizer's chat template: None keeps its own, "llada" is LLaDA's, anything else a Jinja file.

    Raises:
        ValueError: If there is no such file, or no template at all.
    """
    if template == "llada":
        tokenizer.chat_template = CHAT_TEMPLATE
    elif template is not None:
        path = pathlib.Path(template)
        if not path.is_file():
            raise ValueError(f"chat_template={template!r} is neither 'llada' nor a file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give chat_template, 'llada' or a file of Jinja.")


@dataclass(frozen=True)
class ConversationFormat:
    """Options of rows of conversations; see the module's docstring.

    Args:
        length: L, the longest row in tokens. Longer answers are cut, and counted.
        turns: One of `TURNS`.
        eos_in_loss: One of `EOS_IN_LOSS`.
        loss_weighting: "rows" gives every row the same weight, as LLaDA's fine-tuning does (each token 1 over the
            tokens of its answer), "tokens" every token.

    Raises:
        ValueError: If a value is unknown, or `length` is not positive.
    """

    length: int
    turns: str = "each"
    eos_in_loss: str = "one"
    loss_weighting: str = "rows"

    def __post_init__(self):
        check_length(self.length)
        for name, known in (("turns", TURNS), ("eos_in_loss", EOS_IN_LOSS), ("loss_weighting", LOSS_WEIGHTING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}.")


class ConversationDataset(torch.utils.data.Dataset):
    """Rows of conversations, held in memory: 4 bytes per token.

    Item i is `{"input_ids": (n,) int64, "prompt_mask": (n,) bool}`, n <= L, with `token_weights` (n,) float32 if rows
    have the same weight; `DiffusionCollator` makes batches of them.

    Args:
        records: Pairs of place and record, as from `load_conversations`.
        tokenizer: With a chat template.
        form: Options of the rows.
        drop_unusable: Leave out records that are refused below, counted and logged, instead of stopping.
        show_progress: Show a progress bar.

    Raises:
        ValueError: Naming the record, if it holds no messages or no answer of an assistant, spells a special token, has
            no prompt or one that leaves no room for an answer, or the template refuses it or does not begin with its
            own generation prompt. If there is no row at all, or the tokenizer has no template.
    """

    def __init__(
        self,
        records: Iterable[tuple[str, Mapping[str, Any]]],
        tokenizer: PreTrainedTokenizerBase,
        form: ConversationFormat,
        drop_unusable: bool = False,
        show_progress: bool = False,
    ):
        set_chat_template(tokenizer, None)
        self.form = form
        self.tokenizer = tokenizer
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.dropped: list[str] = []
        self.truncated = 0
        rows = list(self._rows(tqdm(records, "Reading", unit=" records", disable=not show_progress), drop_unusable))
        self._report(len(rows))
        self.tokens = np.concatenate([ids for ids, _ in rows])
        self.prompts = np.array([prompt for _, prompt in rows])
        self.ends = np.cumsum([len(ids) for ids, _ in rows])

    def _report(self, rows: int) -> None:
        if self.dropped:
            shown = "; ".join(self.dropped[:5]) + ("; ..." if len(self.dropped) > 5 else "")
            logger.warning("left out %d unusable rows: %s", len(self.dropped), shown)
        if self.truncated:
            logger.warning("cut the answers of %d rows of %d to length %d", self.truncated, rows, self.form.length)
        if not rows:
            raise ValueError(f"there is no row to train on; {len(self.dropped)} were unusable.")

    def _rows(self, records: Iterable[tuple[str, Mapping]], drop: bool) -> Iterator[tuple[np.ndarray, int]]:
        pending: list[tuple[str, str, str]] = []
        for where, record in records:
            try:
                pending += [(where, *texts) for texts in self._texts(record, where)]
            except ValueError as error:
                self._drop(error, drop)
            if len(pending) >= _ROWS_PER_CALL:
                yield from self._encoded(pending, drop)
                pending = []
        yield from self._encoded(pending, drop)

    def _drop(self, error: ValueError, drop: bool) -> None:
        if not drop:
            raise error
        self.dropped.append(str(error))

    def _texts(self, record: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
        """Prompt and answer of each row of a record."""
        messages = messages_of(record, where)
        for message in messages:
            spelt = [token for token in self._special if token in message["content"] or token in message["role"]]
            if spelt:
                raise ValueError(
                    f"{where}: a message spells the special token {spelt[0]!r}, which would not be read as text: "
                    "rewrite it, or set drop_unusable."
                )
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{where}: no message has the role 'assistant', so there is no answer to learn.")
        return [self._split(messages[: i + 1], where) for i in (answers if self.form.turns == "each" else answers[-1:])]

    def _split(self, messages: list[dict[str, str]], where: str) -> tuple[str, str]:
        if len(messages) == 1:
            raise ValueError(
                f"{where}: the first message is an answer, with no prompt. Remove it, or set drop_unusable."
            )
        render = self.tokenizer.apply_chat_template
        try:
            prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = render(messages, tokenize=False)
        except TemplateError as error:  # e.g. roles that do not alternate
            raise ValueError(f"{where}: the chat template refuses the messages ({error}).") from error
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template does not continue its own generation prompt ({prompt[-40:]!r}): "
                "give another chat_template."
            )
        return prompt, whole[len(prompt) :]

    def _encoded(self, pending: Sequence[tuple[str, str, str]], drop: bool) -> Iterator[tuple[np.ndarray, int]]:
        if not pending:
            return
        texts = [text for _, *both in pending for text in both]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for (where, _, _), prompt, answer in zip(pending, ids[::2], ids[1::2], strict=True):
            room = self.form.length - len(prompt)
            if room < 1 or not answer:
                error = ValueError(
                    f"{where}: a prompt of {len(prompt)} tokens and an answer of {len(answer)} leave nothing to learn "
                    f"in a row of {self.form.length}: raise sequence_length, or set drop_unusable."
                )
                self._drop(error, drop)
                continue
            self.truncated += len(answer) > room
            row = np.asarray(prompt + self._ended(answer, room)[:room], dtype=np.int32)
            yield row, len(prompt)

    def _ended(self, answer: list[int], room: int) -> list[int]:
        count = {"none": 0, "one": 1, "all": max(room - len(answer), 0)}[self.form.eos_in_loss]
        return answer + [self.tokenizer.eos_token_id] * count

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the data, as JSON."""
        crc = zlib.crc32(self.prompts.tobytes(), zlib.crc32(self.tokens.tobytes()))
        weighting = self.form.loss_weighting
        return {"rows": len(self), "tokens": len(self.tokens), "crc32": crc, "loss_weighting": weighting}

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        ids = torch.from_numpy(self.tokens[start : self.ends[index]].astype(np.int64))
        prompt_mask = torch.arange(len(ids)) < int(self.prompts[index])
        row = {"input_ids": ids, "prompt_mask": prompt_mask}
        if self.form.loss_weighting == "rows":
            row["token_weights"] = ~prompt_mask / (~prompt_mask).sum()
        return row
