"""Interface of models: what generation, training, planning and evaluation require of a network.

Its config has, under Transformers' names:

    vocab_size                          tokens; also N, the rows of the output layer, unless there is `output_rows`
    num_hidden_layers, hidden_size      for the cache and for operation counts
    max_position_embeddings             longest sequence, in tokens
    mask_token_id                       [MASK], needed for k < 1; pad_token_id, bos_token_id and eos_token_id if any
    mixing_ratio, noise_schedule        the noise it was trained with; without them k = 0 and "linear"
    num_classes, label_dropout          classes, and the share of training rows without their label; see `num_classes`

The network has `get_input_embeddings()`, `get_output_embeddings()`, and `forward(input_ids, ...)`, whose output has
`.logits` (B, L, N). If `forward` has these parameters, it gets `attention_mask` (B, L) for padded rows, with
`position_ids` (B, L) that do not count padding, and `logits_to_keep`, the positions whose logits are needed. The rest
are the members of `DiffusionModel`, which have defaults.

Shapes: B batch, R rows, L length, C columns, M requested positions, N rows of the output layer.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.noise import NoiseKernel
from ..diffusion.process import NoiseProcess, StationaryProcess
from ..diffusion.schedules import get_schedule
from .ranks import is_tensor_parallel

ATTENTION = ("full", "block_causal")


class DiffusionModel:
    """Base of every model class of the package; a model family overrides the members that differ.

    Attributes:
        conditioning: Required inputs of `forward` besides ids: "timesteps" (B,), see `timesteps`, or "class_labels"
            (B,) of a network without a null class.
        predicts_next: Whether the logits at a position predict the next one, as in converted autoregressive models; by
            default they predict the position itself.
        attention: "full", or "block_causal": a position attends to its own block and those before it.
        supports_canvas_cache: Whether `forward` takes a `CanvasCache` as `past_key_values`.
        lora_targets: Modules that get LoRA adapters, as peft's `target_modules`.
        stationary_noise: Whether `noise_process` is a `StationaryProcess`, so that training chooses k and schedule.
    """

    conditioning: tuple[str, ...] = ()
    predicts_next: bool = False
    attention: str = "full"
    supports_canvas_cache: bool = False
    lora_targets: str | tuple[str, ...] = "all-linear"
    stationary_noise: bool = True

    def noise_process(
        self, mixing_ratio: float | None = None, noise_schedule: str | None = None, mask_token_id: int | None = None
    ) -> NoiseProcess:
        """The noise that the model was trained with; the config gives the defaults.

        Args:
            mixing_ratio (`float`, *optional*): Another k, in [0, 1].
            noise_schedule (`str`, *optional*): Name of another schedule.
            mask_token_id (`int`, *optional*): Another [MASK].

        Raises:
            ValueError: If k lies outside [0, 1], k < 1 comes without a mask token, or there is no such schedule.
        """
        config = self.config
        k = default_mixing_ratio(config) if mixing_ratio is None else mixing_ratio
        name = getattr(config, "noise_schedule", "linear") if noise_schedule is None else noise_schedule
        mask = getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        return StationaryProcess(NoiseKernel(output_rows(config), k, mask), get_schedule(name))

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the optional input `class_labels` (B,) of `forward`; None if it has no such input.

        The label `num_classes` is the null class: that of rows without a label, and the unconditional side of guidance.
        """
        return getattr(self.config, "num_classes", None)

    def noise_kernel(self, mixing_ratio: float | None = None) -> NoiseKernel:
        """The kernel of `noise_process(mixing_ratio)`, Eq. 7, over the N rows of the output layer.

        Raises:
            ValueError: If the kernel changes with time.
        """
        process = self.noise_process(mixing_ratio)
        if not isinstance(process, StationaryProcess):
            raise ValueError(f"the kernel of {process!r} changes with time; use noise_process().")
        return process.kernel

    def timesteps(self, t: Tensor) -> Tensor:
        """The input `timesteps` of `forward` at the times t (B,): sigma_t = -log alpha_t, (B,) float32."""
        return -self.noise_process().alpha(t.double()).log().float()


# --------------------------------------------------------------------------------------------------------------------
# Config


def output_rows(config: Any) -> int:
    """N, the rows of the output layer, padding rows counted."""
    return getattr(config, "output_rows", None) or config.vocab_size


def length_limit(config: Any) -> int:
    """Longest sequence in tokens.

    Raises:
        ValueError: If the config names none.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise ValueError(
            f"{type(config).__name__} has no max_position_embeddings, the longest sequence in tokens; set it, or map "
            "it to the config's own field by attribute_map."
        )
    return limit


def default_mixing_ratio(config: Any) -> float:
    """k of the noise that the model was trained with."""
    return getattr(config, "mixing_ratio", 0.0)


# --------------------------------------------------------------------------------------------------------------------
# Network


def check_conditioning(model: Any, given: Collection[str], who: str) -> None:
    """Refuse a model with required inputs that the caller does not provide.

    Args:
        model: A `DiffusionModel`, or a wrapper that passes its attributes on.
        given: Names of the inputs that are provided.
        who: Name of the caller, for the message.

    Raises:
        ValueError: If an input is missing; names it.
    """
    for name in model.conditioning:
        if name not in given:
            raise ValueError(f"{type(model).__name__} takes {name}, and {who} gives none; use another model.")


def check_trainable(model: Any) -> None:
    """Raise ValueError for a model that cannot be trained.

    It needs more than noisy ids and times, predicts the next position, or is sharded by tensor parallelism.
    """
    check_conditioning(model, ("timesteps",), "XDLMTrainer")
    if model.predicts_next:
        raise ValueError(
            f"{type(model).__name__} has predicts_next=True, but XDLMTrainer needs logits that predict the position "
            "itself; shift them in the model's forward."
        )
    if is_tensor_parallel(model):
        raise ValueError(
            "the model was loaded with a tp_plan, but XDLMTrainer gives every process rows of its own; load it "
            "without, and train on several GPUs with FSDP or ZeRO."
        )


def check_cache(model: Any, use_cache: str) -> None:
    """Raise ValueError for a model that cannot take a `CanvasCache`, naming why and the remedy."""
    name = type(model).__name__
    if not model.supports_canvas_cache:
        raise ValueError(f"use_cache={use_cache!r}: {name} does not support CanvasCache; leave out use_cache.")
    for member, value, wanted in (
        ("attention", model.attention, "full"),
        ("predicts_next", model.predicts_next, False),
    ):
        if value != wanted:
            raise ValueError(
                f"use_cache={use_cache!r} needs {member}={wanted!r}, and {name} has {member}={value!r}; leave out "
                "use_cache."
            )


@functools.cache
def forward_arguments(model_class: type[nn.Module]) -> frozenset[str]:
    """Names of the parameters of `forward`; one with **kwargs is assumed to pass them to its base class."""
    names: set[str] = set()
    for cls in model_class.__mro__:
        if "forward" in vars(cls):
            parameters = inspect.signature(vars(cls)["forward"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return frozenset(names)


def padding_inputs(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Arguments of `forward` for padded rows, (R, T) each; none without padding, where attention runs faster.

    The position ids do not count padding, so that a padded row computes the same as the row alone.

    Raises:
        ValueError: If rows are padded and `forward` has no attention mask.
    """
    if attention_mask.all():
        return {}
    arguments = forward_arguments(type(model))
    if "attention_mask" not in arguments:
        raise ValueError(
            f"{type(model).__name__} takes no attention_mask, but the rows are padded; pass rows of one length."
        )
    inputs = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0)}
    return {name: value for name, value in inputs.items() if name in arguments}


def logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor | int) -> Tensor:
    """One forward pass; logits that predict some positions, (R, C, N), or (M, N) in row-major order for a mask.

    Args:
        model: The network.
        inputs: Arguments of its `forward`.
        positions: Columns (C,), a mask (R, L) bool, or the number of last columns.
    """
    if not model.predicts_next and "logits_to_keep" in forward_arguments(type(model)):
        return model(**inputs, logits_to_keep=positions).logits
    logits = model(**inputs).logits
    if model.predicts_next:  # no position predicts the first, which keeps its own logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if isinstance(positions, int):
        return logits[:, logits.shape[1] - positions :]
    return logits[positions] if positions.dtype == torch.bool else logits[:, positions]


def plain_output_layer(forward: Callable) -> Callable:
    """Mark a `forward` whose logits are `get_output_embeddings()` applied to `base_model`'s last hidden state.

    Then `base_model` can run once and the output layer on some positions at a time. A subclass that overrides `forward`
    does not inherit the mark.
    """
    forward.plain_output_layer = True
    return forward


def runs_in_parts(model: nn.Module) -> bool:
    """Whether the backbone and the output layer may be called one by one instead of the model.

    They must not if FSDP, accelerate (autocast, several devices) or torch.compile wraps the model, if its `forward` is
    not marked by `plain_output_layer`, or if the logits predict the next position.
    """
    around = model._forward_pre_hooks or model._forward_hooks or model._compiled_call_impl
    plain = getattr(type(model).forward, "plain_output_layer", False) and "forward" not in vars(model)
    return plain and not around and not model.predicts_next


def input_device(model: nn.Module) -> torch.device:
    """Device of the input ids: the embedding's, or the one where accelerate runs an offloaded embedding."""
    embedding = model.get_input_embeddings()
    for module in (embedding, model):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return embedding.weight.device
