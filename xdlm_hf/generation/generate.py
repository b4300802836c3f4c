"""`generate()` for diffusion language models: from options to canvas, sampler and network, and the output.

Options come, in this order of precedence, from the call's keywords, the `generation_config` passed, the model's own
generation_config.json, and the defaults; None means "not set". Costs are counted in forward passes.

Shapes: B batch, P prompt or given text, T total length (prompt and answer), N rows of the output layer.
"""

from collections.abc import Sequence
from dataclasses import replace
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
from transformers.utils import logging

from ..diffusion.categorical import refuse_undefined
from ..diffusion.checks import validate_ids
from .ancestral import AncestralSampler
from .blocks import check_blocks
from .compatibility import StopStrings, check_processors, stop_strings, with_answer_length
from .confidence import ConfidenceSampler, ConfidenceSettings
from .config import XDLMGenerationConfig
from .constrained import ConstrainedSampler, answer_automaton
from .graphs import GraphedNetwork
from .layout import Layout, check_guidance, continuation, default_steps, label_tensor
from .loop import StoppingRules, denoise
from .network import Network
from .options import Options
from .output import DiffusionGenerateOutput, StepObserver
from .protocol import DiffusionModel, input_device, length_limit, output_rows
from .refinement import make_refinement
from .released import ReferenceNetwork, make_released_sampler
from .resolution import resolve
from .revise import RevisionMixin, make_generator
from .sampler import Sampler
from .spans import Spans, position_mask
from .token_automaton import TokenAutomaton

logger = logging.get_logger(__name__)


class XDLMGenerationMixin(RevisionMixin, DiffusionModel):
    """Adds `generate` and `revise` to a diffusion language model; `protocol` states what the model must provide."""

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
        class_labels: Tensor | Sequence[int] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor | DiffusionGenerateOutput:
        """
        Generate text by denoising the answer in `steps` steps.

        The prompt is never edited, and no [MASK] is left in the answer; a mask token inside the prompt is text, not a
        hole. With `holes`, these positions of the given text are filled, and nothing is appended.

        1. Resolve the options and check them against the model, before anything runs.
        2. Lay out the canvas, prompt then answer, and the sampler.
        3. Denoise (`loop.denoise`): in each step the sampler's request, the network, guidance, the user's logits
           processors, the sampler; at the end of each block the stopping criteria.
        4. Replace what follows the end of a row by padding.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, P)`, *optional*):
                Prompts, padded on either side. Without them, or with P = 0, text is generated unconditionally.
            generation_config ([`XDLMGenerationConfig`], *optional*):
                Options; keywords of the call win over it. Transformers' [`GenerationConfig`] is read too.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called before the softmax with `(M, T)` current ids and `(M, N)` float32 logits, a row for each of the
                M positions that the step needs; in an ancestral step for a chunk of them at a time. Processors of
                Transformers that read from left to right are refused.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Called after each block with the `(B, n)` ids up to its end and `scores=None`.
            generator (`torch.Generator`, *optional*): Source of randomness; instead of `seed`.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Gets ids on the CPU: `put` is called with the prompts `(B, P)` before the first step; `put_draft`, if
                defined, after every step with the columns `(B, n)` not put yet, holes as the mask token, and before it
                `put_confidences`, if defined and the sampler has any, with their confidences `(B, n)`; `put` with
                each column, padding included, when it can no longer change (without refinement at the end of its
                block, else at the end); then `end`, unless there was an exception, as in Transformers. Transformers'
                own [`TextStreamer`] gets no padding after the answer.
            holes (`torch.BoolTensor` of shape `(B, P)` or list of `(first, end)` columns, *optional*):
                Positions of `input_ids` to fill, whatever their ids; `steps` is then by default the largest number of
                holes in a row, and a block without holes takes no forward pass.
            class_labels (`torch.LongTensor` of shape `(B,)` or list of `int`, *optional*):
                For a model with classes; `num_classes` is the null class, which is also the default. Without
                `input_ids` they determine B. `cfg_scale` then guides against the null class with the same text.
            tokenizer ([`PreTrainedTokenizerBase`], *optional*):
                The model's; needed for `stop_strings` and `json_schema`.
            kwargs: Any option of [`XDLMGenerationConfig`].

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, P + max_new_tokens)`, with `holes` without the new
            tokens, or, with `return_dict_in_generate=True`, a [`DiffusionGenerateOutput`].

        Raises:
            ValueError: For an unknown or unsuitable option, or inputs that do not fit; names the value and the remedy.
                After the last step, if the logits of a written token were NaN.
        """
        # 1.
        if holes is not None and stopping_criteria:
            raise ValueError("stopping_criteria apply to answers, not to holes; leave them out.")
        options = resolve(self, generation_config, kwargs, generator, "answer" if holes is None else "holes")
        check_processors(logits_processor, stopping_criteria)
        stops = stop_strings(options, tokenizer)
        options = with_answer_length(options, input_ids)
        generator = make_generator(self, generator, options.seed)
        if class_labels is not None:
            class_labels = label_tensor(self, class_labels, None if input_ids is None else len(input_ids))
            if input_ids is None and attention_mask is None:
                input_ids = torch.empty(len(class_labels), 0, dtype=torch.long)
        check_guidance(self, options.cfg_scale, class_labels)
        input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, options, holes is None)
        # 2.
        if holes is None:
            layout = continuation(input_ids, attention_mask, options.max_new_tokens)
        else:
            positions = position_mask("holes", holes, attention_mask)
            layout = Layout(input_ids, attention_mask, positions, positions, 0, open_ended=False)
        if class_labels is not None:
            layout = replace(layout, class_labels=class_labels.to(input_ids.device))
        if options.steps is None:
            options = replace(options, steps=default_steps(layout, options.block_length))
        if holes is not None and options.sampler == "confidence":
            check_blocks(options.steps, layout.length, options.block_length or layout.length, "text length")
        automaton = answer_automaton(options, tokenizer, output_rows(self.config), input_ids.device)
        sampler = self._make_sampler(options, layout, generator, automaton)
        # 3. and 4.
        return self._run(layout, sampler, options, logits_processor, stopping_criteria, streamer, stops)

    def _run(
        self,
        layout: Layout,
        sampler: Sampler,
        options: Options,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        streamer: Any,
        stops: StopStrings | None = None,
    ) -> Tensor | DiffusionGenerateOutput:
        """Denoise a layout and return the output."""
        layout = layout.repeated(options.num_return_sequences)
        answer = layout.generated if layout.open_ended else None
        stopping = StoppingRules(options, criteria, answer, sampler.may_edit or sampler.may_remask, stops)
        canvas = sampler.begin(layout.ids, layout.generated, layout.holes)
        network_class = GraphedNetwork if options.compile else ReferenceNetwork if options.reference_compat else Network
        network = network_class(self, layout.attention_mask, canvas, options, processors, layout.class_labels)
        observer = StepObserver(options, streamer, sampler, stopping, layout.start)
        if observer.wants_confidences:
            canvas = replace(canvas, confidence=torch.full(canvas.ids.shape, torch.nan, device=canvas.ids.device))
        observer.begin(canvas)
        try:
            progress = denoise(network, sampler, canvas, stopping, observer)
        finally:
            network.release()
        sequences = stopping.pad(progress.canvas.ids)
        refuse_undefined(progress.canvas.undefined)
        observer.end(sequences)
        if not options.return_dict_in_generate:
            return sequences
        return DiffusionGenerateOutput(
            sequences=sequences,
            num_forward_passes=network.num_forward_passes,
            num_edits=progress.canvas.num_edits,
            num_remasked=progress.canvas.num_remasked,
            row_forward_passes=progress.passes,
            tokens_per_forward=stopping.num_tokens(layout.holes, progress.canvas.ids) / progress.passes.clamp_min(1),
            history=observer.history,
            confidences=observer.confidences,
        )

    def _prepare_prompt(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        options: Options,
        adds_answer: bool,
    ) -> tuple[Tensor, Tensor]:
        """Prompts and their mask, on the device of the embedding."""
        device = input_device(self)
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask was given without input_ids.")
            input_ids = torch.empty(1, 0, dtype=torch.long)
        if not isinstance(input_ids, Tensor) or not isinstance(attention_mask, Tensor | None):
            raise ValueError(
                "input_ids and attention_mask must be tensors: tokenize with return_tensors='pt', and pass what the "
                "tokenizer returns as generate(**inputs)."
            )
        if input_ids.numel() == 0:
            input_ids = input_ids.long()  # tokenizers return an empty float tensor for an empty text
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.shape[0] == 0:
            raise ValueError(
                f"input_ids must be integers of shape (B, P) with B >= 1, got {tuple(input_ids.shape)} "
                f"{input_ids.dtype}."
            )
        if not adds_answer and input_ids.shape[1] == 0:
            raise ValueError("the text to fill or revise is empty; pass at least one token.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must have the shape of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        invalid = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if invalid.numel():  # its cumulative sum gives the positions
            raise ValueError(f"attention_mask holds {invalid[0].item()}; it must be 1 at text and 0 at padding.")
        validate_ids("input_ids", input_ids, output_rows(self.config))
        limit = length_limit(self.config)
        if not adds_answer and input_ids.shape[1] > limit:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens is longer than the model's limit of {limit}; shorten it."
            )
        total = input_ids.shape[1] + options.max_new_tokens
        if adds_answer and total > limit:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens and max_new_tokens={options.max_new_tokens} make {total} "
                f"tokens, more than the model's limit of {limit}; shorten one of them."
            )
        return input_ids.to(device).long(), attention_mask.to(device).long()

    def _make_sampler(
        self,
        options: Options,
        layout: Layout,
        generator: torch.Generator | None,
        automaton: TokenAutomaton | None = None,
    ) -> Sampler:
        common = {"start": layout.start, "length": layout.length, "generator": generator}
        process = None
        if options.sampler == "ancestral":
            process = self.noise_process(options.mixing_ratio, mask_token_id=options.mask_token_id)
        if options.reference_compat:
            return make_released_sampler(options, process, steps=options.steps, **common)
        warp = _make_warp(options)
        if options.sampler == "ancestral":
            return AncestralSampler(process, options.steps, temperature=options.temperature, warp=warp, **common)
        settings = ConfidenceSettings(
            options.mask_token_id,
            options.mixing_ratio,
            options.steps,
            block_length=options.block_length,
            temperature=options.temperature,
            warp=warp,
            remasking=options.remasking or "low_confidence",
            refinement=make_refinement(options),
            polish_steps=options.polish_steps or 0,
            confidence_threshold=options.confidence_threshold,
            confidence_factor=options.confidence_factor,
            ends_early=not layout.open_ended,
        )
        if automaton is not None:
            return ConstrainedSampler(automaton, settings, **common)
        return ConfidenceSampler(settings, **common)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Returns its arguments. Not used here; peft needs it to load adapters saved with task type CAUSAL_LM."""
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
        """Called by `from_pretrained`: set `generation_config` to the one passed, else to the checkpoint's, if any."""
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


def _make_warp(options: Options):
    warpers = []
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if not warpers:
        return None
    chain = LogitsProcessorList(warpers)
    return lambda logits: chain(None, logits)
