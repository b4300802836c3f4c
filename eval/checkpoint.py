"""A loaded checkpoint on its device: model, adapter and tokenizer, and the tensors made of their token ids."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from lm_eval.models.utils import has_bos_prefix
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.evaluation.arguments import Arguments, at
from xdlm_hf.evaluation.protocols import END_OF_TEXT
from xdlm_hf.generation.layout import padded
from xdlm_hf.generation.protocol import length_limit
from xdlm_hf.loading import end_ids
from xdlm_hf.training.adapters import load_adapter


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model in evaluation mode with its tokenizer.

    Args:
        model: With its adapter, on `device`.
        tokenizer: The one that `check_checkpoint` returned.
        device: Device of the model and of its inputs.
        max_length: Longest prompt and answer together, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    max_length: int

    @classmethod
    def load(cls, arguments: Arguments, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Self:
        """Loads the weights that the arguments name, unless they hold a loaded model, and its adapter."""
        model = arguments.pretrained
        if not isinstance(model, PreTrainedModel):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=arguments.dtype, **at(arguments.revision))
        if arguments.peft is not None:
            # Puts its layers into `model` and its noise into the model's config.
            load_adapter(model, arguments.peft, **at(arguments.peft_revision))
        return cls(model.to(device).eval(), tokenizer, device, arguments.max_length or length_limit(model.config))

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default, special tokens are added unless the text already begins with the BOS token."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(text, self.tokenizer.bos_token)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, **kwargs)

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of rows padded on the left, (B, L) int64 on the device."""
        ids, attention_mask = padded(rows, self.pad_token_id)
        return {"input_ids": ids.to(self.device), "attention_mask": attention_mask.to(self.device)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_until(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        """Text up to the first end-of-text token or stop string, whichever comes first."""
        # Decoding drops special tokens, so a stop string that is one is looked for among the ids.
        special = {stop for stop in stops if stop in self.tokenizer.all_special_tokens}
        ends = end_ids(self.model, self.tokenizer) | set(self.tokenizer.convert_tokens_to_ids(sorted(special)))
        return _before_stops(self.decode(list(itertools.takewhile(lambda token_id: token_id not in ends, ids))), stops)

    def decode_raw(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        """Text up to the first stop string, with `END_OF_TEXT` for each end-of-text token."""
        ends = end_ids(self.model, self.tokenizer)
        runs = itertools.groupby(ids, lambda token_id: token_id in ends)
        parts = [END_OF_TEXT * len(list(run)) if is_end else self.decode(list(run)) for is_end, run in runs]
        return _before_stops("".join(parts), stops)


def _before_stops(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
