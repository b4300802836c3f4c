"""`model.revise()`: the refinement policies over a text that is given.

Shapes: B batch, P given text.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from .config import XDLMGenerationConfig
from .layout import Layout
from .options import Options
from .output import DiffusionGenerateOutput
from .refinement import make_refinement
from .resolution import resolve
from .spans import character_mask, check_disjoint, position_mask


class RevisionMixin:
    """Gives `revise` to a model that generates."""

    @torch.no_grad()
    def revise(
        self,
        text: str | Sequence[str] | Tensor,
        editable: Any = None,
        locked: Any = None,
        tokenizer: Any = None,
        attention_mask: Tensor | None = None,
        generation_config: XDLMGenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> str | list[str] | Tensor | DiffusionGenerateOutput:
        """
        Let the model correct a given text: no hole is made, only edits by the refinement policy.

        Args:
            text (`str`, `list[str]` or `torch.LongTensor` of shape `(B, P)`): What to correct; ids padded on any side.
            editable (*optional*, defaults to everything):
                Where it may change. For a `str`, a list of `(first, end)` characters, for a list of texts a list of
                such lists: a token may change when it lies wholly inside. For ids, a bool mask `(B, P)` or a list of
                columns `(first, end)`.
            locked (*optional*): Where it must not, in the same form; overlaps are refused.
            tokenizer (*optional*): A fast tokenizer; needed for texts.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): For ids, 0 at padding.
            generation_config, logits_processor, generator, streamer, kwargs:
                As for `generate`. `steps` (by default 8) bounds the passes; at temperature 0 they end when a
                step changes nothing. What a step may change is up to `refinement`: with the budget, at most
                k / (1 - k) edits for each editable token, spread over the steps.

        Returns:
            In the form of `text`, a list where one `str` has several answers; with `return_dict_in_generate=True` a
            [`DiffusionGenerateOutput`].

        Raises:
            ValueError: If the policy edits nothing (k = 0 without `refinement="threshold"`), spans leave the text or
                overlap, or an option does not fit.
        """
        options = resolve(self, generation_config, kwargs, generator, "revision")
        _check_revision(options)
        generator = make_generator(generator, options.seed)
        if isinstance(text, Tensor):
            ids, attention_mask = self._prepare_prompt(text, attention_mask, options, False)
            open_ = None if editable is None else position_mask("editable", editable, attention_mask)
            closed = None if locked is None else position_mask("locked", locked, attention_mask)
            if open_ is not None and closed is not None and (open_ & closed).any():
                row, column = (open_ & closed).nonzero()[0].tolist()
                raise ValueError(f"editable and locked overlap at row {row} column {column}; take it out of one.")
        else:
            ids, attention_mask, open_, closed = self._tokenized(text, editable, locked, tokenizer, options)
        open_ = attention_mask.bool() if open_ is None else open_
        open_ = open_ if closed is None else open_ & ~closed
        layout = Layout(ids, attention_mask, open_, torch.zeros_like(open_), 0, open_ended=False)
        polishing = replace(options, steps=0, polish_steps=options.steps or 8)
        sampler = self._make_sampler(polishing, layout, generator)
        output = self._run(layout, sampler, options, logits_processor, None, streamer)
        if isinstance(text, Tensor) or options.return_dict_in_generate:
            return output
        masks = attention_mask.bool().repeat_interleave(options.num_return_sequences, 0)
        texts = [
            tokenizer.decode(row[mask], clean_up_tokenization_spaces=False)
            for row, mask in zip(output, masks, strict=True)
        ]
        return texts[0] if isinstance(text, str) and len(texts) == 1 else texts

    def _tokenized(
        self, text: str | Sequence[str], editable: Any, locked: Any, tokenizer: Any, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Ids, attention mask, and which tokens the character spans, if any, open and close, (B, P) each."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("revise() of a text needs tokenizer=..., a fast one: it finds tokens by their characters.")
        texts = [text] if isinstance(text, str) else list(text)
        if isinstance(text, str):
            editable, locked = ([spans] if spans is not None else None for spans in (editable, locked))
        if editable is not None and locked is not None:
            check_disjoint(editable, locked)
        encoding = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)
        longest = max(map(len, encoding["input_ids"]), default=0)
        ids = torch.full((len(texts), longest), options.pad_token_id or 0)
        attention_mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoding["input_ids"]):
            if tokenizer.decode(tokens, clean_up_tokenization_spaces=False) != texts[row]:
                raise ValueError(
                    f"the tokenizer does not give text {row} back as it was, so locked characters could change; revise "
                    "ids instead."
                )
            ids[row, : len(tokens)], attention_mask[row, : len(tokens)] = torch.tensor(tokens), 1
        ids, attention_mask = self._prepare_prompt(ids, attention_mask, options, False)
        open_, closed = (
            None if given is None else character_mask(name, given, texts, encoding, attention_mask)
            for name, given in (("editable", editable), ("locked", locked))
        )
        return ids, attention_mask, open_, closed


def _check_revision(options: Options) -> None:
    if options.sampler != "confidence":
        raise ValueError(f"sampler={options.sampler!r} cannot revise a text; leave it out.")
    if not make_refinement(options).edits:
        raise ValueError(
            f"mixing_ratio={options.mixing_ratio} with refinement={options.refinement!r} edits nothing; pass "
            "mixing_ratio, or refinement={'policy': 'threshold', 'threshold': 0.9}, say."
        )


def make_generator(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    """The caller's generator, or a new one with this seed."""
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError(f"pass either seed={seed} or a generator, not both.")
    # On the CPU whatever the model's device: only (B, T) numbers are drawn, and one seed gives one text everywhere.
    return torch.Generator().manual_seed(int(seed))
