"""`generate()` for diffusion language models: options, output, and the loop around a sampler.

Options come, in this order of precedence, from the call's keywords, the `generation_config` passed, the model's own
generation_config.json, and the defaults; None means "not set". Costs are counted in forward passes.

Shapes: B batch, T whole length (prompt and answer), N rows of the output layer.
"""

import copy
import math
from dataclasses import dataclass
from numbers import Integral, Real
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
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .kernel import NoiseKernel, validate_ids
from .samplers import (
    REMASKING,
    AncestralSampler,
    ConfidenceSampler,
    ReferenceConfidenceSampler,
    Sampler,
    check_positive,
)
from .schedules import get_schedule

logger = logging.get_logger(__name__)

SAMPLERS = ("confidence", "ancestral")
# What a checkpoint's config.json says when no generation config does.
_FROM_MODEL_CONFIG = ("mixing_ratio", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_CONFIDENCE_ONLY = ("block_length", "remasking", "reference_compat")


class XDLMGenerationConfig(GenerationConfig):
    """
    Options of [`XDLMGenerationMixin.generate`], stored as generation_config.json. Every option defaults to `None`, "not
    set"; the defaults named below apply in the end.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `128`): Length of the answer in tokens.
        steps (`int`, *optional*, defaults to `max_new_tokens`):
            Denoising steps, one forward pass each (two with `cfg_scale`). Fewer is faster.
        block_length (`int`, *optional*, defaults to `max_new_tokens`):
            Tokens that are filled together; the blocks follow each other from left to right.
        mixing_ratio (`float`, *optional*, defaults to the model's):
            k in Eq. 7: 0 is MDLM, 1 is UDLM. For the confidence sampler it is the refinement budget, k / (1 - k) edits
            for every token filled.
        sampler (`str`, *optional*, defaults to `"confidence"`): `"confidence"` (Algorithm 1) or `"ancestral"` (Eq. 11).
        remasking (`str`, *optional*, defaults to `"low_confidence"`): Which holes are filled first, or `"random"`.
        temperature (`float`, *optional*):
            Above 0, tokens are drawn from softmax(logits / temperature); 0 takes the most likely one. By default 0 for
            the confidence sampler and 1 for the ancestral one, which always draws.
        top_k (`int`, *optional*), top_p (`float`, *optional*): Filters of the distribution that tokens are drawn from.
        cfg_scale (`float`, *optional*, defaults to `0.0`):
            Classifier-free guidance, uncond + (cfg_scale + 1) (cond - uncond), where uncond sees the prompt masked.
        suppress_tokens (`list[int]`, *optional*): Tokens that are never predicted.
        num_return_sequences (`int`, *optional*, defaults to `1`): Answers per prompt.
        seed (`int`, *optional*): Seed of the draws, the same on every device; by default PyTorch's global generator.
        reference_compat (`bool`, *optional*, defaults to `False`): Reproduce the released sampler token for token.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`): Return a [`DiffusionGenerateOutput`].
        output_history (`bool`, *optional*, defaults to `False`): Keep the sequences of every step.
        mask_token_id, pad_token_id, bos_token_id (`int`, *optional*, default to the model config's): Special tokens.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to the model config's):
            What follows the first of these in an answer becomes padding; `[]` keeps everything.

    Raises:
        ValueError: For an unknown option, or a value outside its range.
    """

    OPTIONS = (
        "max_new_tokens",
        "steps",
        "block_length",
        "mixing_ratio",
        "sampler",
        "remasking",
        "temperature",
        "top_k",
        "top_p",
        "cfg_scale",
        "suppress_tokens",
        "num_return_sequences",
        "seed",
        "reference_compat",
        "return_dict_in_generate",
        "output_history",
        "mask_token_id",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    _METADATA = ("_commit_hash", "_from_model_config", "transformers_version")

    def __init__(self, **kwargs: Any):
        # The parent's __init__ is not called: it would set options of autoregressive decoding, ignored here.
        for name in self.OPTIONS + self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise ValueError(_unknown_options(kwargs))
        self.validate()

    def validate(self, **_: Any) -> None:
        """Raise ValueError for a value outside its range; what depends on the model is checked by `generate`."""
        counts = {
            name: getattr(self, name) for name in ("max_new_tokens", "steps", "block_length", "num_return_sequences")
        }
        if self.top_k is not None:
            counts["top_k"] = self.top_k
        check_positive(**{name: value for name, value in counts.items() if value is not None})
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("remasking", self.remasking, REMASKING)
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise ValueError(f"seed={self.seed!r} must be an integer.")
        for name in ("mixing_ratio", "temperature", "top_p", "cfg_scale"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        if self.mixing_ratio is not None and not 0 <= self.mixing_ratio <= 1:
            raise ValueError(f"mixing_ratio={self.mixing_ratio} must lie in [0, 1]: 0 is MDLM, 1 is UDLM.")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 or above.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token.")
        if self.cfg_scale is not None and self.cfg_scale < 0:
            raise ValueError(f"cfg_scale={self.cfg_scale} must be 0 (no guidance) or above.")
        if self.sampler == "ancestral":
            given = [name for name in _CONFIDENCE_ONLY if getattr(self, name)]
            if given:
                raise ValueError(
                    f"sampler='ancestral' has no option {given[0]}={getattr(self, given[0])!r}; leave it out."
                )

    @property
    def end_of_text(self) -> list[int]:
        """`eos_token_id` as a list, empty when there is none."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {
            "max_new_tokens": 128,
            "sampler": "confidence",
            "cfg_scale": 0.0,
            "num_return_sequences": 1,
            "reference_compat": False,
            "return_dict_in_generate": False,
            "output_history": False,
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "XDLMGenerationConfig":
        """From a stored generation_config.json; options of autoregressive decoding are dropped with a warning."""
        foreign = sorted(name for name in config_dict if name not in cls.OPTIONS + cls._METADATA)
        if foreign:
            logger.warning(f"generation_config.json holds options that diffusion generation does not have: {foreign}.")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in foreign}, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "XDLMGenerationConfig":
        """An empty config: what the model config says is looked up when `generate` runs."""
        return cls(_from_model_config=True)


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
        history (`tuple[torch.LongTensor]`, *optional*):
            The `(B, T)` ids before the first step and after each, with `output_history=True`.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: int | None = None
    num_edits: torch.LongTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None


class XDLMGenerationMixin:
    """Gives `generate` to a model whose logits are about their own position and whose config names k and schedule."""

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
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | DiffusionGenerateOutput:
        """
        Generate text by denoising all of the answer in `steps` steps.

        The text of the prompt is never edited, and no [MASK] is left in the answer; a mask token inside the prompt is
        text, not a hole. The loop:

        1. resolve the options and check them against the model, before anything runs;
        2. lay out the canvas, prompt then answer, and the sampler;
        3. per step: where the sampler needs logits, the network there, guidance, the user's logits processors, the
           sampler;
        4. where a block ends: the stopping criteria, on the text so far; rows that are done become padding after it;
        5. what follows the first end-of-text token becomes padding.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, P)`, *optional*):
                Prompts, padded on either side. Without them, or with P = 0, text is generated unconditionally.
            generation_config ([`XDLMGenerationConfig`], *optional*): Options; keywords of the call win over it.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called with `(M, T)` current ids and `(M, N)` float32 logits, a row for each of the M positions that
                the sampler asks about, before the softmax.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Called after each block with the `(B, n)` ids up to its end and `scores=None`.
            generator (`torch.Generator`, *optional*): Source of randomness; instead of `seed`.
            streamer (`BaseStreamer`, *optional*):
                Follows the generation: `put` takes the `(B, P)` prompts before the first step; `put_draft`, if it has
                one, after every step the `(B, W)` columns of the answer that were not `put` yet, unfilled ones holding
                the mask token; `put` each column once more can no longer happen to it, padding included: at k = 0 as
                its block ends, else at the end; then `end`. Ids are on the CPU. As in Transformers, a generation that
                an exception stops does not call `end`. B is 1 for streamers that print text.
            kwargs: Any option of [`XDLMGenerationConfig`].

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, P + max_new_tokens)`, or, with
            `return_dict_in_generate=True`, a [`DiffusionGenerateOutput`].

        Raises:
            ValueError: For an unknown or unfit option, or inputs that do not fit; names the value and the remedy.
        """
        # 1.
        options = self._resolve_options(generation_config, kwargs, generator)
        generator = _make_generator(generator, options.seed)
        input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, options)
        # 2.
        prompt_length = input_ids.shape[1]
        sampler = self._make_sampler(options, prompt_length, generator)
        ids = torch.nn.functional.pad(input_ids, (0, options.max_new_tokens), value=0)
        generated = torch.zeros_like(ids, dtype=torch.bool)
        generated[:, prompt_length:] = True
        canvas = sampler.begin(ids, generated)
        network = _Network(self, attention_mask, prompt_length, options, logits_processor)
        history = [canvas.ids] if options.output_history else None
        finished = _Finished(options, stopping_criteria, prompt_length)
        stream = _Stream(streamer, options, prompt_length)
        stream.begin(input_ids)
        # 3.
        for i in range(sampler.steps):
            request = sampler.request(canvas, i)
            canvas = sampler.step(canvas, network.logits(canvas.ids, request.positions), request)
            if history is not None:
                history.append(canvas.ids)
            stream.draft(canvas.ids)
            # 4.
            if i in sampler.block_ends:
                done = finished.after_block(canvas.ids, sampler.block_ends[i])
                stream.after_block(canvas.ids, sampler.block_ends[i], finished)
                if done:
                    break
        # 5.
        sequences = finished.pad(canvas.ids)
        stream.end(sequences)
        if not options.return_dict_in_generate:
            return sequences
        return DiffusionGenerateOutput(
            sequences=sequences,
            num_forward_passes=network.num_forward_passes,
            num_edits=canvas.num_edits,
            history=None if history is None else tuple(history),
        )

    def _resolve_options(
        self,
        given: XDLMGenerationConfig | None,
        kwargs: dict[str, Any],
        generator: torch.Generator | None = None,
    ) -> XDLMGenerationConfig:
        """Call keywords over the config given, over the model's, over the defaults; then checked."""
        unknown = {name: value for name, value in kwargs.items() if name not in XDLMGenerationConfig.OPTIONS}
        if unknown:
            raise ValueError(_unknown_options(unknown))
        if given is not None and not isinstance(given, XDLMGenerationConfig):
            raise ValueError(f"generation_config must be an XDLMGenerationConfig, not {type(given).__name__}.")
        options = XDLMGenerationConfig()
        defaults = XDLMGenerationConfig._get_default_generation_params()
        defaults |= {name: getattr(self.config, name, None) for name in _FROM_MODEL_CONFIG}
        for name in XDLMGenerationConfig.OPTIONS:
            stored = (getattr(layer, name, None) for layer in (given, self.generation_config))
            values = [kwargs.get(name), *stored, defaults.get(name)]
            setattr(options, name, next((copy.copy(value) for value in values if value is not None), None))
        # What the checkpoint stores gives way where the call chose what it does not fit; None cannot unset it.
        for name in _without_effect(options, generator):
            if kwargs.get(name) is None and getattr(given, name, None) is None:
                setattr(options, name, None)
        options.validate()
        if options.steps is None:
            options.steps = options.max_new_tokens
        if options.pad_token_id is None:
            options.pad_token_id = next(iter(options.end_of_text), None)
        self._check_against_model(options)
        return options

    def _check_against_model(self, options: XDLMGenerationConfig) -> None:
        if options.sampler == "confidence" and options.mask_token_id is None:
            raise ValueError(
                "sampler='confidence' needs a mask token, and neither the model config nor the call gives "
                "mask_token_id; for a uniform-noise model (k = 1) use sampler='ancestral'."
            )
        if options.reference_compat and options.mixing_ratio == 1:
            raise ValueError("mixing_ratio=1 has no released sampler to reproduce; leave out reference_compat.")
        if options.cfg_scale and options.mask_token_id is None:
            raise ValueError(f"cfg_scale={options.cfg_scale} masks the prompt and needs a mask_token_id.")
        rows = self.config.embedding_size
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
        self, input_ids: Tensor | None, attention_mask: Tensor | None, options: XDLMGenerationConfig
    ) -> tuple[Tensor, Tensor]:
        """Prompts and their mask, each row `num_return_sequences` times, on the device of the embedding."""
        device = self.get_input_embeddings().weight.device
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
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} must have the shape of input_ids, "
                f"{tuple(input_ids.shape)}."
            )
        validate_ids("input_ids", input_ids, self.config.embedding_size)
        total, limit = input_ids.shape[1] + options.max_new_tokens, self.config.max_sequence_length
        if total > limit:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} and max_new_tokens={options.max_new_tokens} make {total} tokens, "
                f"more than the model's max_sequence_length={limit}; shorten one of them."
            )
        repeats = options.num_return_sequences
        return (x.to(device).long().repeat_interleave(repeats, 0) for x in (input_ids, attention_mask))

    def _make_sampler(self, options: XDLMGenerationConfig, start: int, generator: torch.Generator | None) -> Sampler:
        common = {
            "steps": options.steps,
            "start": start,
            "length": options.max_new_tokens,
            "warp": _make_warp(options),
            "generator": generator,
        }
        if options.sampler == "ancestral":
            kernel = NoiseKernel(self.config.embedding_size, options.mixing_ratio, options.mask_token_id)
            temperature = 1.0 if options.temperature is None else options.temperature
            return AncestralSampler(kernel, get_schedule(self.config.noise_schedule), temperature=temperature, **common)
        cls = ReferenceConfidenceSampler if options.reference_compat else ConfidenceSampler
        return cls(
            options.mask_token_id,
            options.mixing_ratio,
            block_length=options.block_length,
            temperature=options.temperature or 0.0,
            remasking=options.remasking or "low_confidence",
            **common,
        )

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


class _Network:
    """Logits of chosen positions: forward pass, guidance, processors; counts forward passes."""

    def __init__(
        self,
        model: Any,
        attention_mask: Tensor,
        prompt_length: int,
        options: XDLMGenerationConfig,
        processors: LogitsProcessorList | None,
    ):
        self.model, self.options = model, options
        self.processors = LogitsProcessorList(processors) if processors else None
        self.num_forward_passes = 0
        self.prompt = torch.nn.functional.pad(attention_mask.bool(), (0, options.max_new_tokens), value=False)
        self.inputs: dict[str, Tensor] = {}
        # Without padding there is nothing to tell the model, and attention runs its fastest kernel.
        if not attention_mask.all():
            whole = torch.nn.functional.pad(attention_mask, (0, options.max_new_tokens), value=1)
            self.inputs = {"attention_mask": whole}
            if not options.reference_compat:
                # Positions count text alone, so that a row computes what it computes by itself, wherever its
                # padding stands.
                self.inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp_min(0)

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of columns (C,), as (B, C, N), or of a (B, T) mask, as (M, N).

        float32 unless `reference_compat` audits lower precision. A mask without a position costs no forward pass.
        """
        if positions.dtype == torch.bool and not positions.any():
            return torch.empty(0, self.model.config.embedding_size, device=ids.device)
        logits = self._forward(ids, positions)
        if self.options.cfg_scale:
            unconditional = self._forward(torch.where(self.prompt, self.options.mask_token_id, ids), positions)
            logits = unconditional + (self.options.cfg_scale + 1) * (logits - unconditional)
        if self.processors is not None:
            if positions.dtype == torch.bool:
                rows = ids[positions.nonzero()[:, 0]]
            else:
                rows = ids.repeat_interleave(len(positions), 0)
            logits = self.processors(rows, logits.view(-1, logits.shape[-1])).view(logits.shape)
        if self.options.suppress_tokens:
            logits = logits.index_fill(-1, torch.tensor(self.options.suppress_tokens, device=ids.device), -torch.inf)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.num_forward_passes += 1
        logits = self.model(input_ids=ids, logits_to_keep=positions, **self.inputs).logits
        return logits if self.options.reference_compat or logits.dtype == torch.float64 else logits.float()


class _Finished:
    """Which rows have met a stopping criterion, and what becomes of the text after their end."""

    def __init__(self, options: XDLMGenerationConfig, criteria: StoppingCriteriaList | None, prompt_length: int):
        self.options, self.prompt_length = options, prompt_length
        self.criteria = StoppingCriteriaList(criteria) if criteria else None
        self.ends: Tensor | None = None  # (B,) column after which a row is padding
        if criteria and options.pad_token_id is None:
            raise ValueError("stopping_criteria need a pad_token_id for what follows the end of a row; pass one.")

    def after_block(self, ids: Tensor, block_end: int) -> bool:
        """Ask the criteria about the text up to `block_end`; True when every row is done."""
        if not self.criteria:
            return False
        if self.ends is None:
            self.ends = torch.full_like(ids[:, 0], ids.shape[1])
        done = self.criteria(ids[:, :block_end], None).to(ids.device)
        self.ends = torch.where(done, self.ends.clamp_max(block_end), self.ends)
        return bool((self.ends <= block_end).all())

    def pad(self, ids: Tensor) -> Tensor:
        """Padding after the block in which a criterion was met, and after the first end-of-text of the answer."""
        pad, eos = self.options.pad_token_id, self.options.end_of_text
        columns = torch.arange(ids.shape[1], device=ids.device)
        if self.ends is not None:
            ids = torch.where(columns >= self.ends[:, None], pad, ids)
        if not eos or pad is None or self.options.reference_compat:
            return ids
        is_eos = torch.isin(ids, torch.tensor(eos, device=ids.device)) & (columns >= self.prompt_length)
        after = is_eos.cumsum(-1) - is_eos.long() > 0
        return torch.where(after, pad, ids)


class _Stream:
    """Drives a streamer, if there is one: every draft, and every column once nothing can change it any more."""

    def __init__(self, streamer: BaseStreamer | None, options: XDLMGenerationConfig, prompt_length: int):
        self.streamer, self.final = streamer, prompt_length  # columns before `final` were put
        self.blocks_are_final = options.mixing_ratio == 0  # above 0, later steps refine earlier blocks
        if streamer is None:
            return
        missing = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
        if missing:
            raise ValueError(f"streamer={streamer!r} has no method {missing[0]}(); pass a BaseStreamer.")
        if getattr(streamer, "_takes_logits", False):
            raise ValueError(f"streamer={streamer!r} wants the drafts as logits; here drafts are token ids.")
        if options.reference_compat:
            raise ValueError(
                "reference_compat=True may edit the prompt, which a streamer has been given by then; leave out one of "
                "the two."
            )

    def begin(self, prompt: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(prompt.cpu())

    def draft(self, ids: Tensor) -> None:
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=ids[:, self.final :].cpu())

    def after_block(self, ids: Tensor, block_end: int, finished: _Finished) -> None:
        if self.streamer is not None and self.blocks_are_final:
            # Padding follows what stands before it, so that of the columns so far is known.
            self._put(finished.pad(ids)[:, :block_end])

    def end(self, sequences: Tensor) -> None:
        if self.streamer is not None:
            self._put(sequences)
            self.streamer.end()

    def _put(self, ids: Tensor) -> None:
        if self.final < ids.shape[1]:
            self.streamer.put(ids[:, self.final :].cpu())
            self.final = ids.shape[1]


def _make_generator(generator: torch.Generator | None, seed: int | None) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError(f"pass either seed={seed} or a generator, not both.")
    # On the CPU whatever the model's device: only (B, T) numbers are drawn, and one seed gives one text everywhere.
    return torch.Generator().manual_seed(int(seed))


def _without_effect(options: XDLMGenerationConfig, generator: torch.Generator | None) -> tuple[str, ...]:
    """Options that contradict the sampler, the temperature or the generator chosen."""
    contradicting: tuple[str, ...] = ()
    if options.sampler == "ancestral":
        contradicting += _CONFIDENCE_ONLY
    elif not options.temperature:
        contradicting += ("top_k", "top_p")
    return contradicting + (("seed",) if generator is not None else ())


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


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {list(choices)}.")


def _unknown_options(unknown: dict[str, Any]) -> str:
    hints = {
        "max_length": "use max_new_tokens",
        "do_sample": "temperature=0 is greedy, temperature > 0 samples",
        "gen_length": "use max_new_tokens",
        "k1": "use mixing_ratio",
        "num_inference_steps": "use steps",
        "token_type_ids": "call the tokenizer with return_token_type_ids=False",
    }
    named = ", ".join(
        f"{name}={value!r}" + (f" ({hints[name]})" if name in hints else "") for name, value in unknown.items()
    )
    return f"generate() has no option {named}. Options: {', '.join(XDLMGenerationConfig.OPTIONS)}."
