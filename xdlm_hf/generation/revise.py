"""`model.revise()`: edits of a given text by a refinement policy.

Shapes: B batch, P given text.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from .compatibility import check_processors
from .config import XDLMGenerationConfig
from .layout import Layout, check_guidance, padded
from .options import Options
from .output import DiffusionGenerateOutput
from .ranks import shared_generator
from .refinement import make_refinement
from .resolution import resolve
from .spans import character_mask, check_disjoint, position_mask, text_encoding


class RevisionMixin:
    """Adds `revise` to a model that generates."""

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
        Correct a given text by edits of the refinement policy, without holes.

        Args:
            text (`str`, `list[str]` or `torch.LongTensor` of shape `(B, P)`): Text to correct; ids padded on any side.
            editable (*optional*, defaults to everything):
                Parts that may change. For a `str`, a list of `(first, end)` characters, for a list of texts a list of
                such lists: a token may change if it lies wholly inside. For ids, a bool mask `(B, P)` or a list of
                columns `(first, end)`.
            locked (*optional*): Parts that must not change, in the same form; overlaps are refused.
            tokenizer (*optional*): A fast tokenizer; needed for texts.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): For ids, 0 at padding.
            generation_config, logits_processor, generator, streamer, kwargs:
                As for `generate`. `steps` (by default 8) is the maximum number of steps; at temperature 0 they end when
                a step changes nothing. `refinement` decides what a step may change: with the budget, at most
                k / (1 - k) edits per editable token, spread over the steps.

        Returns:
            The type of `text`, or a list for one `str` with `num_return_sequences` above 1; with
            `return_dict_in_generate=True` a [`DiffusionGenerateOutput`].

        Raises:
            ValueError: If the policy edits nothing (k = 0 without `refinement="threshold"`), spans leave the text or
                overlap, or an option does not fit.
        """
        options = resolve(self, generation_config, kwargs, generator, "revision")
        _check_revision(options)
        check_processors(logits_processor, None)
        check_guidance(self, options.cfg_scale, None)
        generator = make_generator(self, generator, options.seed)
        if isinstance(text, Tensor):
            ids, attention_mask = self._prepare_prompt(text, attention_mask, options, False)
            may_change = None if editable is None else position_mask("editable", editable, attention_mask)
            fixed = None if locked is None else position_mask("locked", locked, attention_mask)
            if may_change is not None and fixed is not None and (may_change & fixed).any():
                row, column = (may_change & fixed).nonzero()[0].tolist()
                raise ValueError(f"editable and locked overlap at row {row} column {column}; take it out of one.")
        else:
            ids, attention_mask, may_change, fixed = self._tokenize(text, editable, locked, tokenizer, options)
        may_change = attention_mask.bool() if may_change is None else may_change
        may_change = may_change if fixed is None else may_change & ~fixed
        layout = Layout(ids, attention_mask, may_change, torch.zeros_like(may_change), 0, open_ended=False)
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

    def _tokenize(
        self, text: str | Sequence[str], editable: Any, locked: Any, tokenizer: Any, options: Options
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Ids, attention mask, and masks of the editable and the locked tokens or None, (B, P) each."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("the list of texts to revise is empty; pass at least one text.")
        if isinstance(text, str):
            editable, locked = ([spans] if spans is not None else None for spans in (editable, locked))
        if editable is not None and locked is not None:
            check_disjoint(editable, locked)
        encoding = text_encoding(texts, tokenizer)
        ids, attention_mask = padded(encoding["input_ids"], options.pad_token_id or 0, side="right")
        ids, attention_mask = self._prepare_prompt(ids, attention_mask, options, False)
        may_change, fixed = (
            None if given is None else character_mask(name, given, texts, encoding, attention_mask)
            for name, given in (("editable", editable), ("locked", locked))
        )
        return ids, attention_mask, may_change, fixed


def _check_revision(options: Options) -> None:
    if options.sampler != "confidence":
        raise ValueError(f"sampler={options.sampler!r} cannot revise a text; use sampler='confidence'.")
    if not make_refinement(options).edits:
        raise ValueError(
            f"mixing_ratio={options.mixing_ratio} with refinement={options.refinement!r} edits nothing; pass "
            "mixing_ratio, or for example refinement={'policy': 'threshold', 'threshold': 0.9}."
        )


def make_generator(
    model: torch.nn.Module, generator: torch.Generator | None, seed: int | None
) -> torch.Generator | None:
    """The caller's generator, or a new one with this seed; the same draws in all processes of one model."""
    if seed is not None:
        if generator is not None:
            raise ValueError(f"pass either seed={seed} or a generator, not both.")
        # On the CPU, so that a seed gives the same draws for every device; only (B, T) numbers are drawn.
        generator = torch.Generator().manual_seed(int(seed))
    return shared_generator(model, generator)
