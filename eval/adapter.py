"""The lm-eval model `xdlm`: checkpoints of this package, scored by generating answers.

    xdlm-eval --model_args pretrained=PATH,steps=32,max_new_tokens=256 --tasks xdlm_gsm8k --batch_size 8

It builds on lm-eval's `TemplateLM` and not on its Hugging Face class, whose habits are wrong here: that class passes
unknown arguments on to `from_pretrained`, resizes the embedding to the tokenizer when it loads a LoRA adapter (LLaDA
has rows without a token on purpose), and truncates prompts after padding them. There is no mathematics in this file:
it turns text into a left-padded batch, calls `model.generate`, and cuts the answers.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, has_bos_prefix, normalize_gen_kwargs
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import xdlm_hf
from xdlm_hf.data import check_tokenizer
from xdlm_hf.generation import XDLMGenerationConfig
from xdlm_hf.samplers import check_blocks

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256
DTYPES = ("auto", "float32", "bfloat16", "float16")


@register_model("xdlm")
class XDLMEvalModel(TemplateLM):
    """A LLaDA or LLaDA-XDLM checkpoint behind lm-eval's interface.

    What the run asks for wins over what the task asks for, and that over the checkpoint's generation_config.json: a
    sampler argument left at None is not set here. Where run and task disagree, a warning says so once.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        tokenizer: Folder, Hub name or tokenizer; by default the one saved with `pretrained`.
        peft: Folder or Hub name of a LoRA adapter to put on the model.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; a loaded model keeps its own.
        device: Device of the model; lm-eval's default is "cuda:0", and without a GPU that means the CPU.
        batch_size: Rows per call of `generate`. Greedy answers do not depend on it.
        max_length: Longest prompt and answer together, in tokens; by default the checkpoint's max_sequence_length.
            Longer prompts lose their beginning, with one warning.
        steps: Denoising steps, that is forward passes per batch.
        max_new_tokens: Length of an answer; 256 if neither the run nor the task says.
        block_length, mixing_ratio, sampler, temperature, cfg_scale: As in `XDLMGenerationConfig`.
        seed: Seed of the noise, for settings that draw any. Such answers depend on the batch size too.

    Raises:
        ValueError: On an unknown argument or an impossible value, and on a checkpoint or tokenizer that does not fit,
            all before the weights are loaded; on a task that asks for likelihoods.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft: str | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        steps: int | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        mixing_ratio: float | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(unknown)
        self.settings = _given(
            steps=steps,
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            mixing_ratio=mixing_ratio,
            sampler=sampler,
            temperature=temperature,
            cfg_scale=cfg_scale,
        )
        _check_settings(self.settings)
        self.batch_size = _positive("batch_size", batch_size)
        max_length = None if max_length is None else _positive("max_length", max_length)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
        self._device = _choose_device(device)
        self.model, self.tokenizer = _load(pretrained, tokenizer, peft, dtype, self._device)
        self.max_length = max_length or self.model.config.max_sequence_length
        # On the CPU, as `generate` does with a seed, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(seed)
        self.num_forward_passes = 0
        self._warned: set[str] = set()
        self._info = {"model_source": str(getattr(self.model, "name_or_path", pretrained)), "peft": peft, "seed": seed}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From `--model_args`, which here may also hold what lm-eval has flags for (batch_size, device): they win."""
        return cls(**_given(**(additional_config or {})) | arg_dict)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results, so that a score says how it was made."""
        return {
            **self._info,
            "xdlm_hf_version": xdlm_hf.__version__,
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
            "model_mixing_ratio": self.model.config.mixing_ratio,
            "max_length": self.max_length,
            "batch_size_per_process": self.batch_size,
            "generation_settings": self.settings,
            "num_forward_passes": self.num_forward_passes,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one prompt; without `add_generation_prompt` its last message is left open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; what the tokenizer adds by itself is left out when the text already begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests, each cut at its first stop string or end-of-text token.

        Requests with equal settings share batches, longest prompts first, so that padding is short and memory is known
        from the first batch on.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        answers = []
        with tqdm(total=len(requests), desc="Generating", unit="answer", disable=disable_tqdm) as progress:
            for batch in order.get_batched(n=self.batch_size):
                contexts, (asked, *_) = zip(*batch, strict=True)
                for context, answer in zip(contexts, self._answer(contexts, asked), strict=True):
                    self.cache_hook.add_partial("generate_until", (context, asked), answer)
                    answers.append(answer)
                progress.set_postfix(forward_passes=self.num_forward_passes, refresh=False)
                progress.update(len(contexts))
        return order.get_original(answers)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise ValueError(_likelihood_message(requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise ValueError(_likelihood_message(requests))

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        raise ValueError(_likelihood_message(requests))

    def _answer(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        """One batch of answers; `asked` are the task's settings."""
        settings, stops = self._merge(asked)
        input_ids, attention_mask = self._encode(contexts, self.max_length - settings["max_new_tokens"])
        output = self.model.generate(
            input_ids,
            attention_mask=attention_mask,
            generator=self.generator,
            return_dict_in_generate=True,
            **settings,
        )
        self.num_forward_passes += output.num_forward_passes
        return [self._cut(ids, stops) for ids in output.sequences[:, input_ids.shape[1] :].tolist()]

    def _merge(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Settings for `generate`, and the stop strings: the run's over the task's, in the library's names."""
        task = dict(normalize_gen_kwargs(asked, DEFAULT_MAX_NEW_TOKENS))
        stops, task["max_new_tokens"] = task.pop("until"), task.pop("max_gen_toks")
        task.pop("do_sample")  # lm-eval has turned it into a temperature
        if self.settings.get("sampler") == "ancestral":
            task.pop("temperature", None)  # greedy, as tasks ask for, means nothing to a sampler that draws
        for name, value in self.settings.items():
            # A length nobody asked for is no disagreement.
            if name in task and task[name] != value and (name != "max_new_tokens" or _asks_length(asked)):
                self._warn_once(f"the task asks for {name}={task[name]}, the run for {name}={value}: the run's is used")
        return {**task, **self.settings}, stops

    def _encode(self, contexts: Sequence[str], room: int) -> tuple[Tensor, Tensor]:
        """Left-padded ids and attention mask, (B, L); prompts longer than `room` tokens keep their end."""
        if room < 1:
            raise ValueError(f"max_new_tokens leaves no room for a prompt in max_length={self.max_length}: shorten it")
        rows = [self.tok_encode(context) for context in contexts]
        if max(map(len, rows)) > room:
            self._warn_once(f"prompts longer than {room} tokens lose their beginning (max_length={self.max_length})")
        rows = [row[-room:] for row in rows]
        width = max(map(len, rows))
        pad = self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long)
        attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
        return input_ids.to(self._device), attention_mask.to(self._device)

    def _cut(self, ids: list[int], stops: list[str]) -> str:
        """Text of an answer up to its end-of-text token or the first stop string, whichever comes first."""
        # A stop string that is itself a special token would be gone from the decoded text: look for its id.
        special = {stop for stop in stops if stop in self.tokenizer.all_special_tokens}
        ends = self._end_ids | set(self.tokenizer.convert_tokens_to_ids(sorted(special)))
        ids = list(itertools.takewhile(lambda token_id: token_id not in ends, ids))
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text

    @property
    def _end_ids(self) -> set[int]:
        """End-of-text ids: the tokenizer's and, where there are more, the model's."""
        theirs = self.model.generation_config.eos_token_id
        theirs = self.model.config.eos_token_id if theirs is None else theirs
        return {self.eot_token_id, *([theirs] if isinstance(theirs, int) else theirs or [])}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _load(
    pretrained: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None,
    peft: str | None,
    dtype: str,
    device: torch.device,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, adapter on it, and tokenizer; what can be refused without the weights is refused before they are read."""
    loaded = isinstance(pretrained, PreTrainedModel)
    config = pretrained.config if loaded else AutoConfig.from_pretrained(pretrained)
    if not isinstance(config, xdlm_hf.LLaDAConfig):
        raise ValueError(f"pretrained={pretrained} has model_type={config.model_type!r}; xdlm scores 'llada' models")
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (config.name_or_path if loaded else pretrained)
        if not source:
            raise ValueError("the model passed was not loaded from a checkpoint: pass its tokenizer as well")
        tokenizer = AutoTokenizer.from_pretrained(source)
    check_tokenizer(tokenizer, config)
    model = pretrained if loaded else AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
    if peft is not None:
        from peft import PeftModel

        PeftModel.from_pretrained(model, peft)  # puts the adapter's layers into `model` itself
    return model.to(device).eval(), tokenizer


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuses the run's settings where they are wrong by themselves; what depends on the task is left to `generate`."""
    XDLMGenerationConfig(**settings)
    length = settings.get("max_new_tokens")
    if length is not None and settings.get("sampler") != "ancestral":
        check_blocks(settings.get("steps", length), length, settings.get("block_length", length))


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _choose_device(device: str | torch.device | None) -> torch.device:
    wanted = torch.device(device or "cuda")
    return torch.device("cpu") if wanted.type == "cuda" and not torch.cuda.is_available() else wanted


def _positive(name: str, value: int | str) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    return int(value)


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    if "trust_remote_code" in unknown:
        raise ValueError("trust_remote_code is neither needed nor accepted: xdlm_hf brings the model's code itself")
    if unknown:
        known = [name for name in XDLMEvalModel.__init__.__annotations__ if name not in ("unknown", "return")]
        raise ValueError(f"unknown model arguments {sorted(unknown)}: xdlm knows {', '.join(known)}")


def _asks_length(asked: dict[str, Any]) -> bool:
    return any(name in asked for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))


def _likelihood_message(requests: list) -> str:
    return (
        f"a task asks for {len(requests)} likelihoods, and the model xdlm scores generated answers only: "
        "choose tasks with output_type generate_until"
    )
