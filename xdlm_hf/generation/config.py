"""Options of diffusion generation, stored as generation_config.json. None means "not set" everywhere."""

import math
from numbers import Integral, Real
from typing import Any

from transformers.generation import GenerationConfig
from transformers.utils import logging

from ..diffusion.checks import check_positive
from . import released
from .cache import CACHES
from .confidence import REMASKING
from .refinement import REMASK_SCHEDULES
from .released import BEYOND_REFERENCE

logger = logging.get_logger(__name__)
SAMPLERS = ("confidence", "ancestral")
REMASKING_POLICIES = tuple(f"remask_{schedule}" for schedule in REMASK_SCHEDULES)
REFINEMENTS = ("budget", "threshold", *REMASKING_POLICIES, "none")
_CHOICES: dict[str, tuple] = {
    "sampler": SAMPLERS,
    "remasking": REMASKING,
    "refinement": REFINEMENTS,
    "use_cache": (*CACHES, False),
}
_COUNTS = (
    "max_new_tokens",
    "steps",
    "block_length",
    "num_return_sequences",
    "top_k",
    "cache_refresh",
    "max_edits_per_token",
    "refinement_off_steps",
    "polish_steps",
)
_FRACTION = (lambda x: 0 < x <= 1, "lie in (0, 1]")
_RANGES = {
    "mixing_ratio": (lambda x: 0 <= x <= 1, "lie in [0, 1]: 0 is MDLM, 1 is UDLM"),
    "temperature": (lambda x: x >= 0, "be 0 or above"),
    "top_p": (lambda x: 0 < x <= 1, "lie in (0, 1]; 1 keeps every token"),
    "cfg_scale": (lambda x: x >= 0, "be 0 (no guidance) or above"),
    "confidence_threshold": _FRACTION,
    "confidence_factor": (lambda x: x > 0, "be above 0"),
    "edit_threshold": _FRACTION,
    "remask_rate": _FRACTION,
}
CONFIDENCE_ONLY = ("block_length", "remasking", *BEYOND_REFERENCE)


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
        confidence_threshold (`float`, *optional*):
            Every hole predicted with at least this confidence is filled at once, beyond the step's share. A block ends
            when it is full, so `steps` becomes the most that may be taken.
        confidence_factor (`float`, *optional*):
            The same for the n surest holes, n the largest with (n + 1) (1 - confidence of the n-th) < factor.
        early_stop (`bool`, *optional*):
            Whether a row leaves the batch at its first end-of-text token, when no hole is left before it and the step
            changed nothing there. By default only without refinement and re-masking, where this cannot change the
            answer.
        use_cache (`str`, *optional*):
            `"prefix"` computes the current block and what follows it, `"dual"` the block alone; keys and values of the
            rest are those of the last whole pass. Faster, and an approximation.
        cache_refresh (`int`, *optional*):
            Steps from one whole pass to the next; by default only where a block or the polishing begins. 1 is exact.
        refinement (`str`, *optional*):
            What a step may take back: `"budget"` (Algorithm 1, the default for k > 0), `"threshold"` (every
            disagreement of confidence `edit_threshold`), `"remask_cap"`, `"remask_rescale"`, `"remask_confidence"`
            (ReMDM's re-masking with `remask_rate`), or `"none"`.
        edit_threshold (`float`, *optional*): For `refinement="threshold"`.
        remask_rate (`float`, *optional*): For the re-masking policies, the rate of their schedule.
        max_edits_per_token (`int`, *optional*):
            A position is edited at most so often, and never back to the token just replaced.
        refinement_off_steps (`int`, *optional*): The last steps that fill, in which nothing is taken back.
        polish_steps (`int`, *optional*): Steps after the last hole is filled, which only edit.
        reference_compat (`bool`, *optional*, defaults to `False`):
            Run the authors' released sampler, to audit published numbers; for the confidence sampler token for token at
            temperature 0.
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
        *BEYOND_REFERENCE,
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
            raise ValueError(unknown_options(kwargs))
        self.validate()

    def validate(self, **_: Any) -> None:
        """Raise ValueError for a value outside its range; what depends on the model is checked by `generate`."""
        check_positive(**{name: getattr(self, name) for name in _COUNTS if getattr(self, name) is not None})
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} is not known; choose one of {list(choices)}.")
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise ValueError(f"seed={self.seed!r} must be an integer.")
        if not isinstance(self.early_stop, bool | None):
            raise ValueError(f"early_stop={self.early_stop!r} must be True or False.")
        if not all(isinstance(token_id, Integral) for token_id in self.end_of_text):
            raise ValueError(f"eos_token_id={self.eos_token_id!r} must be an integer or a list of integers.")
        for name, (check, range_) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a finite number.")
            if not check(value):
                raise ValueError(f"{name}={value} must {range_}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Options that make no sense without another, or beside it."""
        if self.sampler == "ancestral":
            given = [name for name in CONFIDENCE_ONLY if getattr(self, name)]
            if given:
                raise ValueError(
                    f"sampler='ancestral' has no option {given[0]}={getattr(self, given[0])!r}; leave it out."
                )
        if self.reference_compat:
            released.check_options(self)
        if self.cache_refresh is not None and not self.use_cache:
            raise ValueError(
                f"cache_refresh={self.cache_refresh} refreshes no cache; add use_cache='prefix' or 'dual'."
            )
        policy = self.refinement or ""
        for name, needed_by in (("edit_threshold", ("threshold",)), ("remask_rate", REMASKING_POLICIES)):
            value = getattr(self, name)
            if value is None and policy in needed_by:
                raise ValueError(f"refinement={policy!r} needs {name}, a number in (0, 1].")
            if value is not None and policy not in needed_by:
                raise ValueError(f"{name}={value} belongs to refinement={' or '.join(map(repr, needed_by))}.")
        if self.remasking == "random" and (self.confidence_threshold or self.confidence_factor):
            raise ValueError("remasking='random' chooses holes by chance, a confidence threshold or factor does not.")
        if self.polish_steps and policy in ("none", *REMASKING_POLICIES):
            raise ValueError(f"polish_steps={self.polish_steps} only edit, and refinement={policy!r} edits nothing.")

    @property
    def policy(self) -> str:
        """The refinement in force: the one named, else XDLM's budget for k > 0."""
        return self.refinement or ("budget" if self.mixing_ratio else "none")

    @property
    def end_of_text(self) -> list[int]:
        """`eos_token_id` as a list, empty when there is none."""
        eos = self.eos_token_id
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]

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
        if isinstance(config_dict.get("use_cache"), bool):  # said of the autoregressive cache
            foreign.append("use_cache")
        if foreign:
            logger.warning(f"generation_config.json holds options that diffusion generation does not have: {foreign}.")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in foreign}, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "XDLMGenerationConfig":
        """An empty config: what the model config says is looked up when `generate` runs."""
        return cls(_from_model_config=True)


def unknown_options(unknown: dict[str, Any]) -> str:
    """The message for options that do not exist, with what to use instead where that is known."""
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
