"""Training arguments: Transformers' with the options of the objective."""

import dataclasses
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..diffusion.gidd import GIDDProcess
from ..diffusion.schedules import get_schedule

_NOISE_DEFAULTS = {"mixing_ratio": 0.1, "noise_schedule": "linear"}
TIME_SAMPLING = ("independent", "stratified", "antithetic")


@dataclass
class XDLMTrainingArguments(TrainingArguments):
    r"""`TrainingArguments` with the options of the objective.

    Args:
        mixing_ratio (`float`, *optional*, defaults to `0.1`): k in Eq. 7; 0 trains an MDLM, 1 a UDLM. Stored in the
            model's config. To be left out for a model with noise of another kind, such as GIDD.
        noise_schedule (`str`, *optional*, defaults to `"linear"`): Name in `diffusion.schedules.SCHEDULES`. Stored in
            the model's config. To be left out for a model with noise of another kind.
        gidd_weighting (`str`, *optional*, defaults to `"elbo"`): The bound itself, or for GIDD the released code's
            bounded weights, `"clip"` or `"dynamic"` (`GIDDProcess.weighting_factor`). Evaluation is of the bound.
        t_eps (`float`, *optional*, defaults to `1e-3`): Training times are (1 - t_eps) t + t_eps, t in [0, 1].
        time_sampling (`str`, *optional*, defaults to `"independent"`): One t per row, drawn `"independent"`ly, as in
            the paper's LLaDA run, or `"stratified"` over the global batch: one row in each of its G equal intervals
            of time, in random order. `"antithetic"`, its name in MDLM's code, is accepted too.
        noise_seed (`int`, *optional*, defaults to `seed`): Seed of times and noise.
        random_length_probability (`float`, *optional*, defaults to `0.0`): Probability that all rows of a step are cut
            to one random length, uniform in 1..L (0.01 in LLaDA's pretraining). A function of noise seed and step, so
            that all processes agree. For packed rows only.
        global_batch_size (`int`, *optional*): Rows per optimizer step over all processes. Sets
            `gradient_accumulation_steps`; refused when it does not divide.
        nelbo_samples (`int`, *optional*, defaults to `4`): Times per row in evaluation.
        fused_loss (`bool`, *optional*): Compute head and loss together, without the logits of whole rows. By default
            wherever the head is a plain `OutputLayer`. In a compiled model it breaks the graph.
        loss_chunk_size (`int`, *optional*): Tokens per chunk of the fused loss; its own default otherwise.
        peak_tflops (`float`, *optional*): Peak TFLOP/s of one device, for the logged utilisation; by default from
            a table of GPUs, and none for others.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights with this decay, in [0, 1)
            (0.9999 in the paper's from-scratch runs); evaluation and the final model use it. See `ema`.
        save_seconds (`float`, *optional*): Write a checkpoint at the end of a step when so many seconds have passed
            since the last one, in addition to `save_strategy`.
        accept_repaired_data (`bool`, *optional*, defaults to `False`): Resume a stream although local files of it were
            repaired or removed. What was read of a repaired file must be unchanged.

    Defaults that differ from `TrainingArguments`: `remove_unused_columns=False` (the collator reads the columns),
    `ddp_find_unused_parameters=False` (every parameter is used), `logging_nan_inf_filter=False` (a NaN is logged, not
    replaced by an average), `include_num_input_tokens_seen=True` (logs tokens per second), `logging_first_step=True`,
    `logging_steps=10`.

    Raises:
        ValueError: If an option is out of range, or the global batch does not divide.
    """

    mixing_ratio: float | None = field(
        default=None, metadata={"help": "k in Eq. 7: 0 trains an MDLM, 1 a UDLM; default: 0.1."}
    )
    noise_schedule: str | None = field(
        default=None, metadata={"help": "Noise schedule, e.g. linear or cosine; default: linear."}
    )
    gidd_weighting: str = field(
        default="elbo", metadata={"help": "elbo, or for GIDD the bounded weights clip or dynamic."}
    )
    t_eps: float = field(default=1e-3, metadata={"help": "Training times are (1 - t_eps) t + t_eps."})
    time_sampling: str = field(
        default="independent", metadata={"help": "independent, or stratified over the global batch."}
    )
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of times and noise; default: seed."})
    random_length_probability: float = field(
        default=0.0, metadata={"help": "Share of steps whose rows are cut to one random length; LLaDA: 0.01."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per optimizer step; sets gradient_accumulation_steps."}
    )
    nelbo_samples: int = field(default=4, metadata={"help": "Times per row in evaluation."})
    fused_loss: bool | None = field(
        default=None, metadata={"help": "Compute head and loss together; default: wherever possible."}
    )
    loss_chunk_size: int | None = field(default=None, metadata={"help": "Tokens per chunk of the fused loss."})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s of one device at best, for the logged utilisation; default: a table."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the weights, for evaluation and the final model."}
    )
    save_seconds: float | None = field(
        default=None, metadata={"help": "A checkpoint at least every so many seconds, in addition to save_strategy."}
    )
    accept_repaired_data: bool = field(
        default=False, metadata={"help": "Resume a stream although files of it were repaired or removed."}
    )
    # The name in newer versions of Transformers; in older ones it is `gradient_checkpointing`.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass, block by block.", "nargs": "?", "const": True},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false: the collator reads them."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient; there are none."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses; off here."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step; on here."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1: a share of all."})
    include_num_input_tokens_seen: str | bool = field(
        default=True, metadata={"help": "Count tokens, which also logs tokens per second."}
    )

    def __post_init__(self):
        self.noise_given = [name for name in _NOISE_DEFAULTS if getattr(self, name) is not None]
        for name, value in _NOISE_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_objective()
        self._check_optimization()
        self._check_finite_numbers()
        if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
            self.gradient_checkpointing = self.gradient_checkpointing or bool(self.activation_checkpointing)
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        if self.time_sampling == "antithetic":
            self.time_sampling = "stratified"
        if self.noise_seed is None:
            self.noise_seed = self.seed
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation_steps()

    def _check_finite_numbers(self) -> None:
        """Refuse NaN and infinity in every option: learning rate, weight decay, betas, clipping, all of them."""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name}={value} must be a finite number.")

    def _check_objective(self) -> None:
        if not 0 <= self.mixing_ratio <= 1:
            raise ValueError(f"mixing_ratio={self.mixing_ratio} must lie in [0, 1]: 0 is MDLM, 1 is UDLM.")
        if not 0 <= self.t_eps < 1:
            raise ValueError(f"t_eps={self.t_eps} must lie in [0, 1); the paper uses 1e-3.")
        get_schedule(self.noise_schedule)
        if self.gidd_weighting not in GIDDProcess.weightings:
            raise ValueError(
                f"gidd_weighting={self.gidd_weighting!r} is not known; choose one of {GIDDProcess.weightings}."
            )
        if self.time_sampling not in TIME_SAMPLING:
            raise ValueError(f"time_sampling={self.time_sampling!r} is not known; choose one of {TIME_SAMPLING}.")
        for name in ("per_device_train_batch_size", "nelbo_samples", "loss_chunk_size", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.random_length_probability <= 1:
            raise ValueError(f"random_length_probability={self.random_length_probability} must lie in [0, 1].")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops={self.peak_tflops} must be positive.")
        if self.noise_seed is not None and self.noise_seed < 0:
            raise ValueError(f"noise_seed={self.noise_seed} must not be negative.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop what the collator needs; leave it False.")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False would weight tokens by their process; leave it True.")

    def _check_optimization(self) -> None:
        """Refuse values with which a run would silently take no step, or damage its weights."""
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps={self.max_steps} must be positive, or -1 for num_train_epochs.")
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be positive and finite.")
        if not self.max_grad_norm >= 0:  # NaN included
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must not be negative; 0 does not clip.")
        if self.save_seconds is not None and not 0 < self.save_seconds < math.inf:
            raise ValueError(f"save_seconds={self.save_seconds} must be positive and finite; leave it out for none.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1); the paper's runs use 0.9999.")
        if self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError(
                f"load_best_model_at_end=True loads weights, and ema_decay={self.ema_decay} evaluates their average; "
                "leave out one of the two."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True writes into checkpoints that are already complete; leave it out: SIGTERM "
                "saves after the current step without it."
            )

    def _accumulation_steps(self) -> int:
        rows = self.train_batch_size * self.world_size
        steps, rest = divmod(self.global_batch_size, rows)
        layout = f"per_device_train_batch_size={self.per_device_train_batch_size} on {self.world_size} processes"
        if rest or steps == 0:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of {rows} ({layout}): "
                "change one of the three so that it divides."
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} disagrees with "
                f"global_batch_size={self.global_batch_size} ({layout} make {steps}): leave one of them out."
            )
        return steps
