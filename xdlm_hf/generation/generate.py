"""`generate()` and `revise()` for diffusion language models: from options to a canvas and a sampler, and the output.

Options come, in this order of precedence, from the call's keywords, the `generation_config` passed, the model's own
generation_config.json, and the defaults; None means "not set". Costs are counted in forward passes.

Shapes: B batch, P prompt or given text, T whole length (prompt and answer), N rows of the output layer.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput, logging

from ..diffusion.categorical import refuse_undefined
from ..diffusion.checks import validate_ids
from . import released
from .ancestral import AncestralSampler
from .cache import check_cache_attention
from .confidence import ConfidenceSampler, ConfidenceSettings, check_blocks
from .config import CONFIDENCE_ONLY, REMASKING_POLICIES, XDLMGenerationConfig, unknown_options
from .loop import Finished, denoise
from .network import Network
from .protocol import (
    DiffusionModel,
    check_cache,
    check_conditioning,
    default_mixing_ratio,
    input_device,
    length_limit,
    output_rows,
)
from .refinement import (
    BudgetRefinement,
    LoopGuard,
    NoRefinement,
    Refinement,
    RemaskingRefinement,
    SwitchedOff,
    ThresholdRefinement,
)
from .sampler import Sampler
from .spans import Spans, character_mask, check_disjoint, position_mask

logger = logging.get_logger(__name__)
# What a checkpoint's config.json says when no generation config does.
_FROM_MODEL_CONFIG = ("mixing_ratio", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
# What a checkpoint stores about answers, and about filling, says nothing about a text that is given.
_ABOUT_ANSWERS = ("max_new_tokens", "steps", "block_length", "reference_compat")
_ABOUT_FILLING = (
    "block_length",
    "polish_steps",
    "confidence_threshold",
    "confidence_factor",
    "refinement_off_steps",
)


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """
    Output of [`XDLMGenerationMixin.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(B, T)`): Prompt and answer.
        num_forward_passes (`int`):
            Network evaluations per row: one for each step, two with guidance, none for an ancestral step that no
            position needs logits for.
        num_edits (`torch.LongTensor` of shape `(B,)`): Filled tokens that were replaced by another token.
        num_remasked (`torch.LongTensor` of shape `(B,)`): Filled tokens that became holes again.
        row_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Evaluations in which the row still had something to do; fewer than `num_forward_passes` for one that was
            full, or at its end, before others.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`):
            Tokens of the answer, up to its end-of-text token, for each of these.
        history (`tuple[torch.LongTensor]`, *optional*):
            The `(B, T)` ids before the first step and after each, with `output_history=True`.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: int | None = None
    num_edits: torch.LongTensor | None = None
    num_remasked: torch.LongTensor | None = None
    row_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None


@dataclass
class _Task:
    """A text and what is to become of it."""

    ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 at padding
    generated: Tensor  # (B, T) bool, what may change
    holes: Tensor  # (B, T) bool, what is to be filled
    start: int  # first column that may change
    open_ended: bool  # the answer follows the text: it ends at its end-of-text token

    @property
    def length(self) -> int:
        return self.ids.shape[1] - self.start

    def repeated(self, times: int) -> "_Task":
        """Each row `times` times, one behind the other."""
        names = ("ids", "attention_mask", "generated", "holes")
        return replace(self, **{name: getattr(self, name).repeat_interleave(times, 0) for name in names})


class XDLMGenerationMixin(DiffusionModel):
    """Gives `generate` to a diffusion model of tokens; `protocol` says what it asks of the model."""

    generation_config_class = XDLMGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: XDLMGenerationConfig | None = None,
        attention_mask: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        holes: Tensor | Spans | None = None,
        **kwargs: Any,
    ) -> Tensor | DiffusionGenerateOutput:
        """
        Generate text by denoising all of the answer in `steps` steps.

        The text of the prompt is never edited, and no [MASK] is left in the answer; a mask token inside the prompt is
        text, not a hole. With `holes`, the text given is filled there and nothing is added to it.

        1. Resolve the options and check them against the model, before anything runs.
        2. Lay out the canvas, prompt then answer, and the sampler.
        3. Denoise (`denoising.denoise`): per step the sampler's request, the network there, guidance, the user's logits
           processors, the sampler; where a block ends the stopping criteria, on the text so far.
        4. What follows the end of a row becomes padding.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, P)`, *optional*):
                Prompts, padded on either side. Without them, or with P = 0, text is generated unconditionally.
            generation_config ([`XDLMGenerationConfig`], *optional*): Options; keywords of the call win over it.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called with `(M, T)` current ids and `(M, N)` float32 logits, a row for each of the M positions that
                the sampler asks about, before the softmax; in an ancestral step for some of them at a time.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Called after each block with the `(B, n)` ids up to its end and `scores=None`.
            generator (`torch.Generator`, *optional*): Source of randomness; instead of `seed`.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Follows the generation, ids on the CPU: `put` takes the prompts `(B, P)` before the first step;
                `put_draft`, if it has one, after every step the columns `(B, n)` not put yet, holes holding the mask
                token; `put` each column once more when it can no longer change, padding included (without refinement
                as its block ends, else at the end); then `end`, which an exception leaves out, as in Transformers.
            holes (`torch.BoolTensor` of shape `(B, P)` or list of `(first, end)` columns, *optional*):
                Positions of `input_ids` to fill, whatever they hold; `steps` is then by default their largest number
                in a row, and a block without holes costs nothing.
            kwargs: Any option of [`XDLMGenerationConfig`].

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, P + max_new_tokens)`, with `holes` without the new
            tokens, or, with `return_dict_in_generate=True`, a [`DiffusionGenerateOutput`].

        Raises:
            ValueError: For an unknown or unfit option, or inputs that do not fit; names the value and the remedy. After
                the last step, if the network gave NaN where a token was drawn.
        """
        # 1.
        if holes is not None:
            _refuse_for_given_text("holes are", kwargs, generation_config)
            if stopping_criteria:
                raise ValueError("stopping_criteria end an answer, and holes are filled in a text; leave them out.")
        unfit = () if holes is None else _ABOUT_ANSWERS
        options = self._resolve_options(generation_config, kwargs, generator, unfit)
        generator = _make_generator(generator, options.seed)
        input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, options, holes is None)
        # 2.
        if holes is None:
            task = _continuation(input_ids, attention_mask, options.max_new_tokens)
        else:
            positions = position_mask("holes", holes, attention_mask)
            task = _Task(input_ids, attention_mask, positions, positions, 0, open_ended=False)
        if options.steps is None:
            options.steps = _default_steps(task, options.block_length)
        if holes is not None and options.sampler == "confidence":
            check_blocks(options.steps, task.length, options.block_length or task.length, "text length")
        sampler = self._make_sampler(options, task, generator)
        # 3. and 4.
        return self._run(task, sampler, options, logits_processor, stopping_criteria, streamer)

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
        _refuse_for_given_text("a revision is", kwargs, generation_config)
        options = self._resolve_options(
            generation_config, kwargs, generator, ("sampler", *_ABOUT_ANSWERS, *_ABOUT_FILLING)
        )
        _check_revision(options)
        generator = _make_generator(generator, options.seed)
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
        task = _Task(ids, attention_mask, open_, torch.zeros_like(open_), 0, open_ended=False)
        polishing = copy.copy(options)
        polishing.steps, polishing.polish_steps = 0, options.steps or 8
        sampler = self._make_sampler(polishing, task, generator)
        output = self._run(task, sampler, options, logits_processor, None, streamer)
        if isinstance(text, Tensor) or options.return_dict_in_generate:
            return output
        masks = attention_mask.bool().repeat_interleave(options.num_return_sequences, 0)
        texts = [
            tokenizer.decode(row[mask], clean_up_tokenization_spaces=False)
            for row, mask in zip(output, masks, strict=True)
        ]
        return texts[0] if isinstance(text, str) and len(texts) == 1 else texts

    def _tokenized(
        self, text: str | Sequence[str], editable: Any, locked: Any, tokenizer: Any, options: XDLMGenerationConfig
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

    def _run(
        self,
        task: _Task,
        sampler: Sampler,
        options: XDLMGenerationConfig,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        streamer: Any,
    ) -> Tensor | DiffusionGenerateOutput:
        """Denoise a task, watched by history and streamer, and put the output together."""
        task = task.repeated(options.num_return_sequences)
        answer = task.generated if task.open_ended else None
        finished = Finished(options, criteria, answer, sampler.may_edit or sampler.may_remask)
        canvas = sampler.begin(task.ids, task.generated, task.holes)
        network_class = released.ReferenceNetwork if options.reference_compat else Network
        network = network_class(self, task.attention_mask, canvas, options, processors)
        watcher = _Watcher(options, streamer, sampler, finished, task.start)
        watcher.begin(canvas.ids)
        progress = denoise(network, sampler, canvas, finished, watcher)
        sequences = finished.pad(progress.canvas.ids)
        refuse_undefined(progress.canvas.undefined)
        watcher.end(sequences)
        if not options.return_dict_in_generate:
            return sequences
        return DiffusionGenerateOutput(
            sequences=sequences,
            num_forward_passes=network.num_forward_passes,
            num_edits=progress.canvas.num_edits,
            num_remasked=progress.canvas.num_remasked,
            row_forward_passes=progress.passes,
            tokens_per_forward=finished.num_tokens(task.holes, progress.canvas.ids) / progress.passes.clamp_min(1),
            history=watcher.history,
        )

    def _resolve_options(
        self,
        given: XDLMGenerationConfig | None,
        kwargs: dict[str, Any],
        generator: torch.Generator | None = None,
        unfit: tuple[str, ...] = (),
    ) -> XDLMGenerationConfig:
        """Call keywords over the config given, over the model's but for `unfit`, over the defaults; then checked."""
        unknown = {name: value for name, value in kwargs.items() if name not in XDLMGenerationConfig.OPTIONS}
        if unknown:
            raise ValueError(unknown_options(unknown))
        if given is not None and not isinstance(given, XDLMGenerationConfig):
            raise ValueError(f"generation_config must be an XDLMGenerationConfig, not {type(given).__name__}.")
        options = XDLMGenerationConfig()
        defaults = XDLMGenerationConfig._get_default_generation_params()
        defaults |= {name: getattr(self.config, name, None) for name in _FROM_MODEL_CONFIG}
        defaults["mixing_ratio"] = default_mixing_ratio(self.config)
        for name in XDLMGenerationConfig.OPTIONS:
            stored = None if name in unfit else getattr(self.generation_config, name, None)
            values = [kwargs.get(name), getattr(given, name, None), stored, defaults.get(name)]
            setattr(options, name, next((copy.copy(value) for value in values if value is not None), None))
        chosen = {n for n in XDLMGenerationConfig.OPTIONS if (kwargs.get(n), getattr(given, n, None)) != (None, None)}
        _drop_stored(options, chosen, generator)
        options.validate()
        if options.pad_token_id is None:
            options.pad_token_id = next(iter(options.end_of_text), None)
        self._check_against_model(options)
        if options.reference_compat:
            options.eos_token_id = []  # the released samplers do not pad what follows end-of-text
        return options

    def _check_against_model(self, options: XDLMGenerationConfig) -> None:
        if options.sampler == "confidence" and options.mask_token_id is None:
            raise ValueError(
                "sampler='confidence' needs a mask token, and neither the model config nor the call gives "
                "mask_token_id; for a uniform-noise model (k = 1) use sampler='ancestral'."
            )
        if options.cfg_scale and options.mask_token_id is None:
            raise ValueError(f"cfg_scale={options.cfg_scale} masks the prompt and needs a mask_token_id.")
        check_conditioning(
            self,
            ("timesteps",) if options.sampler == "ancestral" and not options.reference_compat else (),
            f"generation with sampler={options.sampler!r}",
        )
        if options.sampler == "ancestral" and self.attention != "full":
            raise ValueError(
                f"sampler='ancestral' denoises all positions at once, and {type(self).__name__} has "
                f"attention={self.attention!r}; use sampler='confidence' with the block_length of its training."
            )
        if options.use_cache:
            check_cache(self, options.use_cache)
            check_cache_attention(self.config._attn_implementation)
            if self.training and self.is_gradient_checkpointing:
                raise ValueError(
                    f"use_cache={options.use_cache!r}: gradient checkpointing keeps no cache in training mode; call "
                    "model.eval() first."
                )
        if options.refinement == "budget" and options.mixing_ratio == 0:
            raise ValueError("refinement='budget' allows k / (1 - k) edits, none at mixing_ratio=0; pass a larger one.")
        if options.polish_steps and options.refinement is None and options.mixing_ratio == 0:
            raise ValueError(
                f"polish_steps={options.polish_steps} only edit, and mixing_ratio=0 edits nothing; pass mixing_ratio, "
                "or refinement='threshold' with edit_threshold."
            )
        bounds = {"max_edits_per_token": ("none", *REMASKING_POLICIES), "refinement_off_steps": ("none",)}
        for name, without in bounds.items():
            if getattr(options, name) is not None and options.policy in without:
                raise ValueError(
                    f"{name}={getattr(options, name)} bounds a refinement, and there is none to bound with "
                    f"mixing_ratio={options.mixing_ratio} and refinement={options.refinement!r}; leave it out."
                )
        rows = output_rows(self.config)
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(options, name) is not None:
                validate_ids(name, torch.tensor([getattr(options, name)]), rows)
        if options.pad_token_id is not None and options.pad_token_id == options.mask_token_id:
            raise ValueError(f"pad_token_id={options.pad_token_id} is the mask token, which no answer may hold.")
        if options.suppress_tokens:
            validate_ids("suppress_tokens", torch.tensor(options.suppress_tokens), rows)
            if len({options.mask_token_id, *options.suppress_tokens} - {None}) == rows:
                raise ValueError(f"suppress_tokens leaves none of the {rows} tokens to predict; suppress fewer.")

    def _prepare_prompt(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        options: XDLMGenerationConfig,
        adds_answer: bool,
    ) -> tuple[Tensor, Tensor]:
        """Prompts and their mask, on the device of the embedding."""
        device = input_device(self)
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask was given without input_ids.")
            input_ids = torch.empty(1, 0, dtype=torch.long)
        if not isinstance(input_ids, Tensor) or not isinstance(attention_mask, Tensor | None):
            raise ValueError("input_ids and attention_mask must be tensors: tokenize with return_tensors='pt'.")
        if input_ids.numel() == 0:
            input_ids = input_ids.long()  # tokenizers answer an empty text with an empty float tensor
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.shape[0] == 0:
            raise ValueError(
                f"input_ids must be integers of shape (B, P) with B >= 1, got {tuple(input_ids.shape)} "
                f"{input_ids.dtype}."
            )
        if not adds_answer and input_ids.shape[1] == 0:
            raise ValueError("the text is empty, there is nothing to fill or to revise; pass at least one token.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must have the shape of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        strange = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if strange.numel():  # positions are counted by it
            raise ValueError(f"attention_mask holds {strange[0].item()}; it must be 1 at text and 0 at padding.")
        validate_ids("input_ids", input_ids, output_rows(self.config))
        limit = length_limit(self.config)
        if not adds_answer and input_ids.shape[1] > limit:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens is longer than the model's limit of {limit}; shorten it."
            )
        total = input_ids.shape[1] + options.max_new_tokens
        if adds_answer and total > limit:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} and max_new_tokens={options.max_new_tokens} make {total} tokens, "
                f"more than the model's limit of {limit}; shorten one of them."
            )
        return input_ids.to(device).long(), attention_mask.to(device).long()

    def _make_sampler(self, options: XDLMGenerationConfig, task: _Task, generator: torch.Generator | None) -> Sampler:
        common = {"start": task.start, "length": task.length, "generator": generator}
        process = None
        if options.sampler == "ancestral":
            schedule = "loglinear" if options.reference_compat else None
            process = self.noise_process(options.mixing_ratio, schedule, options.mask_token_id)
        if options.reference_compat:
            return released.make_sampler(options, process, steps=options.steps, **common)
        warp = _make_warp(options)
        if options.sampler == "ancestral":
            temperature = 1.0 if options.temperature is None else options.temperature
            return AncestralSampler(process, options.steps, temperature=temperature, warp=warp, **common)
        settings = ConfidenceSettings(
            options.mask_token_id,
            options.mixing_ratio,
            options.steps,
            block_length=options.block_length,
            temperature=options.temperature or 0.0,
            warp=warp,
            remasking=options.remasking or "low_confidence",
            refinement=make_refinement(options),
            polish_steps=options.polish_steps or 0,
            confidence_threshold=options.confidence_threshold,
            confidence_factor=options.confidence_factor,
            ends_early=not task.open_ended,
        )
        return ConfidenceSampler(settings, **common)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are. Not used here; peft looks it up to load adapters saved as causal ones."""
        return {"input_ids": input_ids, **kwargs}

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        cache_dir: str | None,
        force_download: bool,
        proxies: dict | None,
        local_files_only: bool,
        token: str | bool | None,
        revision: str,
        subfolder: str,
        trust_remote_code: bool | None,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: take the config passed, else the checkpoint's generation_config.json if any."""
        if generation_config is not None:
            self.generation_config = XDLMGenerationConfig.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = XDLMGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                )
            except OSError:
                logger.info("The checkpoint has no generation_config.json; the defaults apply.")


class _Watcher:
    """Shows the whole batch to history and streamer after each step."""

    def __init__(self, options: XDLMGenerationConfig, streamer: Any, sampler: Sampler, finished: Finished, start: int):
        if streamer is not None:
            _check_streamer(streamer, options)
        self.streamer, self.finished, self.shown = streamer, finished, start
        # A block is final when it ends, unless a later step may still edit it.
        self.in_blocks = not sampler.may_edit
        self._history: list[Tensor] | None = [] if options.output_history else None

    @property
    def history(self) -> tuple[Tensor, ...] | None:
        return None if self._history is None else tuple(self._history)

    def begin(self, ids: Tensor) -> None:
        if self._history is not None:
            self._history.append(ids)
        if self.streamer is not None:
            self.streamer.put(ids[:, : self.shown].cpu())

    def __call__(self, ids: Tensor, block_end: int | None) -> None:
        if self._history is not None:
            self._history.append(ids)
        if self.streamer is None:
            return
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=ids[:, self.shown :].cpu())
        if self.in_blocks and block_end is not None and self.shown < block_end < ids.shape[1]:
            self._put(self.finished.pad(ids)[:, :block_end])

    def end(self, ids: Tensor) -> None:
        if self.streamer is None:
            return
        if self.shown < ids.shape[1]:
            self._put(ids)
        self.streamer.end()

    def _put(self, ids: Tensor) -> None:
        self.streamer.put(ids[:, self.shown :].cpu())
        self.shown = ids.shape[1]


def _check_streamer(streamer: Any, options: XDLMGenerationConfig) -> None:
    missing = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
    if missing:
        raise ValueError(f"streamer={streamer!r} has no method {missing[0]}(); pass a BaseStreamer.")
    if getattr(streamer, "_takes_logits", False):
        raise ValueError(f"streamer={streamer!r} wants the drafts as logits; here drafts are token ids.")
    if options.reference_compat:
        raise ValueError(
            "reference_compat=True may edit the prompt, which a streamer has been given by then; leave out one of the "
            "two."
        )


def make_refinement(options: XDLMGenerationConfig) -> Refinement:
    """The policy that the options describe, Algorithm 1's budget by default."""
    name = options.policy
    if name == "none":
        return NoRefinement()
    if name == "budget":
        policy: Refinement = BudgetRefinement(options.mixing_ratio)
    elif name == "threshold":
        policy = ThresholdRefinement(options.edit_threshold)
    else:
        policy = RemaskingRefinement(name.removeprefix("remask_"), options.remask_rate)
    if options.max_edits_per_token is not None:
        policy = LoopGuard(policy, options.max_edits_per_token)
    if options.refinement_off_steps is not None:
        policy = SwitchedOff(policy, options.refinement_off_steps)
    return policy


def _continuation(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> _Task:
    """Prompt, then `max_new_tokens` holes."""
    start = input_ids.shape[1]
    ids = torch.nn.functional.pad(input_ids, (0, max_new_tokens), value=0)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, max_new_tokens), value=1)
    holes = torch.zeros_like(ids, dtype=torch.bool)
    holes[:, start:] = True
    return _Task(ids, attention_mask, holes, holes, start, open_ended=True)


def _default_steps(task: _Task, block_length: int | None) -> int:
    """One token a step: as many as the row with most holes has, rounded up to spread over the blocks."""
    most = max(int(task.holes.sum(-1).max()), 1)
    blocks = 1 if block_length is None else max(task.length // block_length, 1)
    return -(-most // blocks) * blocks


def _refuse_for_given_text(what: str, kwargs: dict[str, Any], config: XDLMGenerationConfig | None) -> None:
    """Options about an answer that is added, where nothing is."""
    given = kwargs.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    if given is not None:
        raise ValueError(f"max_new_tokens={given}: {what} about the text given, nothing is added; leave it out.")
    if kwargs.get("reference_compat") or getattr(config, "reference_compat", None):
        raise ValueError(f"reference_compat=True: the released sampler knows only answers, and {what} about a text.")


def _check_revision(options: XDLMGenerationConfig) -> None:
    if options.sampler != "confidence":
        raise ValueError(f"sampler={options.sampler!r} cannot revise a text; leave it out.")
    for name in _ABOUT_FILLING:
        if getattr(options, name) is not None:
            raise ValueError(f"{name}={getattr(options, name)} is about filling holes, and a revision fills none.")
    if not make_refinement(options).edits:
        raise ValueError(
            f"mixing_ratio={options.mixing_ratio} with refinement={options.refinement!r} edits nothing; pass "
            "mixing_ratio, or refinement='threshold' with edit_threshold."
        )


def _make_generator(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError(f"pass either seed={seed} or a generator, not both.")
    # On the CPU whatever the model's device: only (B, T) numbers are drawn, and one seed gives one text everywhere.
    return torch.Generator().manual_seed(int(seed))


def _drop_stored(options: XDLMGenerationConfig, chosen: set[str], generator: torch.Generator | None) -> None:
    """Unset what the checkpoint stores and what the call chose contradicts; the call could not: None unsets nothing."""

    def drop(*names: str) -> None:
        for name in names:
            if name not in chosen:
                setattr(options, name, None)

    if options.reference_compat:
        drop(*released.not_released(options.sampler))
        if options.remasking == "random" and options.mixing_ratio:
            drop("remasking")
    if options.sampler == "ancestral":
        drop(*CONFIDENCE_ONLY)
        if options.temperature == 0:
            drop("temperature")
    elif not options.temperature:
        drop("top_k", "top_p")
    if generator is not None:
        drop("seed")
    if not options.use_cache:
        drop("cache_refresh")
    if options.remasking == "random" and (options.confidence_threshold or options.confidence_factor):
        drop(*(("confidence_threshold", "confidence_factor") if "remasking" in chosen else ("remasking",)))
    if options.refinement == "budget" and options.mixing_ratio == 0:
        drop("refinement")
    if options.policy != "threshold":
        drop("edit_threshold")
    if options.policy not in REMASKING_POLICIES:
        drop("remask_rate")
    if options.policy not in ("budget", "threshold"):
        drop("polish_steps", "max_edits_per_token")
    if options.policy == "none":
        drop("refinement_off_steps")


def _make_warp(options: XDLMGenerationConfig):
    warpers = []
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if not warpers:
        return None
    if options.sampler == "confidence" and not options.temperature:
        raise ValueError(
            f"top_k={options.top_k}, top_p={options.top_p} filter a draw, and temperature=0 draws nothing; "
            "set a temperature above 0 or leave them out."
        )
    chain = LogitsProcessorList(warpers)
    return lambda logits: chain(None, logits)
