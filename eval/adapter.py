"""The lm-eval model `xdlm`: checkpoints of this package, scored by generating answers or by their likelihood bound.

    xdlm-eval --model_args pretrained=PATH,steps=32,max_new_tokens=256 --tasks xdlm_gsm8k --batch_size 8

It builds on lm-eval's `TemplateLM` and not on its Hugging Face class, whose habits are wrong here: that class passes
unknown arguments on to `from_pretrained`, resizes the embedding to the tokenizer when it loads a LoRA adapter (LLaDA
has rows without a token on purpose), and truncates prompts after padding them. There is no mathematics in this file:
it turns text into a left-padded batch, calls `model.generate`, and cuts the answers; likelihood.py bounds likelihoods.

Under `accelerate launch` or `torchrun`, every process holds the model and lm-eval gives each its share of the rows.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import xdlm_hf
from xdlm_hf.adapters import load_adapter
from xdlm_hf.data import check_tokenizer
from xdlm_hf.evaluation.likelihood import Estimate, Pair, log_likelihoods, seeded_generator
from xdlm_hf.evaluation.protocols import END_OF_TEXT
from xdlm_hf.generation_config import BEYOND_REFERENCE, XDLMGenerationConfig
from xdlm_hf.loading import DTYPES
from xdlm_hf.samplers import check_blocks

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256
AUTO_BATCH_SIZE = {"cpu": 8, "other": 64}  # what `batch_size=auto` tries first; a CPU gains nothing from more
# Arguments that are passed on to `generate`.
GENERATION = (
    "steps",
    "max_new_tokens",
    "block_length",
    "mixing_ratio",
    "sampler",
    "temperature",
    "cfg_scale",
    "remasking",
    "reference_compat",
    *BEYOND_REFERENCE,
)


@dataclass
class Arguments:
    """Arguments of `XDLMEvalModel`, checked without loading anything.

    What the run asks for wins over what the task asks for, and that over the checkpoint's generation_config.json: a
    sampler argument left at None is not set here. Where run and task disagree, a warning says so once.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        tokenizer: Folder, Hub name or tokenizer; by default the one saved with `pretrained`.
        peft: Folder or Hub name of a LoRA adapter to put on the model; brings the k it was trained with.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; a loaded model keeps its own.
        device: Device of the model; lm-eval's default is "cuda:0", and without a GPU that means the CPU.
        batch_size: Rows per forward pass, or "auto": as many as fit, found by halving. No result depends on it but by
            the rounding of the device's arithmetic, unless `batch_all` is set.
        max_batch_size: What "auto" tries first; 8 on a CPU, 64 elsewhere.
        max_length: Longest prompt and answer together, in tokens; by default the checkpoint's max_sequence_length.
            Longer prompts lose their beginning, with one warning.
        steps: Denoising steps, that is forward passes per batch.
        max_new_tokens: Length of an answer; 256 if neither the run nor the task says.
        block_length, mixing_ratio, sampler, remasking, temperature, cfg_scale, reference_compat: As in
            `XDLMGenerationConfig`.
        confidence_threshold, confidence_factor, early_stop, use_cache, cache_refresh, refinement, edit_threshold,
            remask_rate, max_edits_per_token, refinement_off_steps, polish_steps: Likewise.
        mc_samples: Draws per likelihood, each one row of a forward pass.
        check_greedy: Whether likelihoods also say if greedy decoding gives the continuation, which takes one forward
            pass per token of it (LAMBADA's accuracy needs that).
        batch_all: Whether also those answers share batches that then depend on them, which is faster: answers that
            are drawn, and all of `reference_compat`, whose sampler edits padding too. By default each of these has
            forward passes of its own, and noise seeded with `seed`, its prompt and how often the request came before.
        item_log: JSONL file to which every answer's seconds and forward passes are added, for the kit.
        seed: Seed of everything that is drawn.

    Raises:
        ValueError: On an impossible value.
    """

    pretrained: str | PreTrainedModel
    tokenizer: str | PreTrainedTokenizerBase | None = None
    peft: str | None = None
    dtype: str = "auto"
    device: str | torch.device | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    max_length: int | None = None
    steps: int | None = None
    max_new_tokens: int | None = None
    block_length: int | None = None
    mixing_ratio: float | None = None
    sampler: str | None = None
    temperature: float | None = None
    cfg_scale: float | None = None
    remasking: str | None = None
    reference_compat: bool | None = None
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    early_stop: bool | None = None
    use_cache: str | None = None
    cache_refresh: int | None = None
    refinement: str | None = None
    edit_threshold: float | None = None
    remask_rate: float | None = None
    max_edits_per_token: int | None = None
    refinement_off_steps: int | None = None
    polish_steps: int | None = None
    mc_samples: int = 128
    check_greedy: bool = True
    batch_all: bool = False
    item_log: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.settings)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known: choose one of {', '.join(DTYPES)}")
        for name in ("mc_samples", "max_length", "max_batch_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (name == "batch_size" and value == "auto"):
                setattr(self, name, _positive(name, value))
        for name in ("check_greedy", "batch_all"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        self.device = _choose_device(self.device)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From names and values, refusing unknown names.

        Raises:
            ValueError: As the class, and if a name is unknown or `pretrained` is missing.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if "trust_remote_code" in unknown:
            raise ValueError("trust_remote_code is neither needed nor accepted: xdlm_hf brings the model's code itself")
        if unknown:
            raise ValueError(f"unknown model arguments {unknown}: xdlm knows {', '.join(known)}")
        if not arguments.get("pretrained"):
            raise ValueError("no checkpoint is named: pass --model_args pretrained=FOLDER_OR_HUB_NAME")
        return cls(**arguments)

    @property
    def settings(self) -> dict[str, Any]:
        """Those for `generate` that the run asks for."""
        return {name: getattr(self, name) for name in GENERATION if getattr(self, name) is not None}


@register_model("xdlm")
class XDLMEvalModel(TemplateLM):
    """A LLaDA or LLaDA-XDLM checkpoint behind lm-eval's interface.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        arguments: The other fields of `Arguments`.

    Raises:
        ValueError: On an unknown argument or an impossible value, and on a checkpoint, adapter or tokenizer that is
            not there or does not fit, all before the weights are loaded.
    """

    def __init__(self, pretrained: str | PreTrainedModel, **arguments: Any) -> None:
        super().__init__()
        self.arguments = Arguments.of({"pretrained": pretrained, **arguments})
        self.settings, self.seed = self.arguments.settings, self.arguments.seed
        self.item_log = None if self.arguments.item_log is None else Path(self.arguments.item_log)
        self.tokenizer = check_checkpoint(self.arguments)
        self._device = self._join(self.arguments.device)
        self.automatic = self.arguments.batch_size == "auto"
        first = self.arguments.max_batch_size or AUTO_BATCH_SIZE["cpu" if self._device.type == "cpu" else "other"]
        self.batch_size = first if self.automatic else self.arguments.batch_size
        self.model = _load(self.arguments, self._device)
        self.max_length = self.arguments.max_length or self.model.config.max_sequence_length
        self.num_forward_passes = 0
        self.estimates: list[Estimate] = []
        self._warned: set[str] = set()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From `--model_args`, which here may also hold what lm-eval has flags for (batch_size, device): they win."""
        return cls(**{"pretrained": None, **_given(**(additional_config or {})), **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _join(self, device: torch.device) -> torch.device:
        """Joins the other processes, if there are any; the device of this one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        state = PartialState(cpu=device.type == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        return state.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(world size,) values of a scalar, in the order of the processes."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object on `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        parts = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts and _in_order(parts)

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results, so that a score says how it was made."""
        return {
            "model_source": str(getattr(self.model, "name_or_path", self.arguments.pretrained)),
            "peft": self.arguments.peft,
            "seed": self.seed,
            "xdlm_hf_version": xdlm_hf.__version__,
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
            "model_mixing_ratio": self.model.config.mixing_ratio,
            "max_length": self.max_length,
            "batch_size_per_process": self.batch_size,
            "generation_settings": self.settings,
            "num_forward_passes": self.num_forward_passes,
            "num_processes": self.world_size,
            "mc_samples": self.arguments.mc_samples,
            "batch_all": self.arguments.batch_all,
            "likelihoods": self._likelihood_summary(),
        }

    def _likelihood_summary(self) -> dict[str, float]:
        """How many likelihoods this process estimated, and their standard errors in nats."""
        errors = [estimate.standard_error for estimate in self.estimates]
        if not errors:
            return {"count": 0}
        return {
            "count": len(errors),
            "mean_standard_error": sum(errors) / len(errors),
            "max_standard_error": max(errors),
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

        A request with `eos_token_id: []` gets its whole answer, end-of-text tokens written as `protocols.END_OF_TEXT`.

        Requests with equal settings share batches, longest prompts first, so that padding is short and memory is known
        from the first batch on. Answers that would depend on their batch are made one by one (`Arguments.batch_all`).
        """
        answers: dict[int, str] = {}
        with self._progress(len(requests), "Generating", "answer", disable_tqdm) as progress:
            for batch, texts in self._answered(requests):
                for n, answer in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[n].args, answer)
                    answers[n] = answer
                progress.set_postfix(forward_passes=self.num_forward_passes, refresh=False)
                progress.update(len(batch))
        return [answers[n] for n in range(len(requests))]

    def _answered(self, requests: Sequence[Instance]) -> Iterator[tuple[Sequence[int], list[str]]]:
        """Numbers of the requests of each batch, and their answers."""
        repeats = _repeats(requests)
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(n)
        for group in groups.values():
            group.sort(key=lambda n: (-len(self.tok_encode(requests[n].args[0])), requests[n].args[0]))
            settings, stops = self._merge(requests[group[0]].args[1])
            alone = self._depends_on_batch(settings) and not self.arguments.batch_all
            answer = functools.partial(self._timed_answers, requests, repeats, settings, stops)
            yield from self._in_batches(group, answer, at_most=1 if alone else None)

    def _in_batches(
        self, items: Sequence[Any], work: Callable[[Sequence[Any]], Any], at_most: int | None = None
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        """(batch, `work(batch)`) in turn, in smaller batches from where "auto" finds that memory does not suffice."""
        start = 0
        while start < len(items):
            batch = items[start : start + min(self.batch_size, at_most or self.batch_size)]
            try:
                result = work(batch)
            except RuntimeError as error:
                self._shrink(len(batch), error)
                continue
            start += len(batch)
            yield batch, result

    def _shrink(self, rows: int, error: RuntimeError) -> None:
        """Halves the batches of "auto" when `rows` rows were too many for the memory; raises any other error again."""
        if not self.automatic or rows == 1 or not should_reduce_batch_size(error):
            raise error
        self.batch_size = (rows + 1) // 2
        logger.warning("out of memory with %d rows: batch_size=%d from here on", rows, self.batch_size)

    def _timed_answers(
        self,
        requests: Sequence[Instance],
        repeats: Sequence[int],
        settings: dict[str, Any],
        stops: list[str],
        batch: Sequence[int],
    ) -> list[str]:
        """Answers to one batch of requests, noted in `item_log`."""
        start, passes = time.perf_counter(), self.num_forward_passes
        contexts = [requests[n].args[0] for n in batch]
        # The draws depend on the seed and the batch alone; a batch of one makes them independent of everything else.
        generator = seeded_generator(self.seed, contexts, [repeats[n] for n in batch])
        answers = self._answer(contexts, settings, stops, generator)
        if self.item_log is not None:
            seconds, passes = time.perf_counter() - start, self.num_forward_passes - passes
            self._note_items(contexts, seconds / len(contexts), passes, len(contexts))
        return answers

    def _note_items(self, contexts: Sequence[str], seconds: float, passes: int, rows: int) -> None:
        with self.item_log.open("a", encoding="utf-8") as log:
            for context in contexts:
                digest = hashlib.sha256(context.encode()).hexdigest()
                entry = {"prompt_hash": digest, "seconds": seconds, "forward_passes": passes, "batch_rows": rows}
                log.write(json.dumps(entry) + "\n")

    def _progress(self, total: int, text: str, unit: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=text, unit=unit, disable=disable or self.rank != 0)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[Estimate, bool]]:
        """(bound on log p(continuation | context) in nats, whether greedy decoding gives it) for every request.

        The bound is a float that carries its `standard_error`. With an empty context it is unconditional.
        """
        pairs = [self._pair(*request.args) for request in requests]
        results: list[tuple[Estimate, bool] | None] = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n].context) - len(pairs[n].continuation))
        values = self._estimates([pairs[n] for n in order], disable_tqdm)
        greedy = self._are_greedy(pairs) if self.arguments.check_greedy else [False] * len(pairs)
        for n, value in zip(order, values, strict=True):
            results[n] = (value, greedy[n])
            self.cache_hook.add_partial("loglikelihood", requests[n].args, results[n])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Estimate]:
        """Bound on the log-likelihood of each whole text in nats: the sum over windows of `max_length` tokens.

        Every token is scored once, given the end-of-text token and the rest of its window as far as it is clean.
        """
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length - 1, context_len=1)
            pairs = [Pair(*map(tuple, make_disjoint_window(window))) for window in windows]
            parts = list(self._estimates(pairs, disable_tqdm)) if ids else []
            total = Estimate(sum(parts), sum(part.standard_error**2 for part in parts) ** 0.5)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list:
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return [(value, False) for value in self._estimates(pairs, disable_tqdm)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids of a request; a context that is too long loses its beginning, with one warning.

        Raises:
            ValueError: If the continuation alone is longer than the model.
        """
        if context:
            first, second = self._encode_pair(context, continuation)
        else:
            first, second = [], self.tok_encode(continuation, add_special_tokens=False)
        room = self.max_length - len(second)
        if room < 0:
            raise ValueError(f"a continuation of {len(second)} tokens is longer than max_length={self.max_length}")
        if len(first) > room:
            self._warn_once(f"contexts lose their beginning (max_length={self.max_length})")
            first = first[len(first) - room :]
        return Pair(tuple(first), tuple(second))

    def _estimates(self, pairs: Sequence[Pair], disable_tqdm: bool) -> Iterator[Estimate]:
        done = 0
        with self._progress(len(pairs), "Likelihoods", "request", disable_tqdm) as progress:
            while done < len(pairs):
                rest = pairs[done:]
                values = log_likelihoods(
                    self.model, rest, self.arguments.mc_samples, self.batch_size, self.seed, self._pad_token_id
                )
                try:
                    for value in values:
                        done += 1
                        self.estimates.append(value)
                        progress.update()
                        yield value
                except RuntimeError as error:
                    self._shrink(self.batch_size, error)

    def _are_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether greedy decoding, one token per step and the surest first, gives the continuation."""
        greedy = [False] * len(pairs)
        if self.model.config.mask_token_id is None:
            return greedy
        for length in sorted({len(pair.continuation) for pair in pairs} - {0}):
            group = [n for n, pair in enumerate(pairs) if len(pair.continuation) == length]
            decode = functools.partial(self._greedy_ids, pairs, length)
            for batch, rows in self._in_batches(group, decode):
                for n, ids in zip(batch, rows, strict=True):
                    greedy[n] = tuple(ids) == pairs[n].continuation
        return greedy

    def _greedy_ids(self, pairs: Sequence[Pair], length: int, batch: Sequence[int]) -> list[list[int]]:
        options = {"max_new_tokens": length, "sampler": "confidence", "temperature": 0.0, "eos_token_id": []}
        inputs = self._pad([list(pairs[n].context) for n in batch])
        output = self.model.generate(**inputs, steps=length, block_length=length, **options)
        return output[:, -length:].tolist()

    def _answer(
        self, contexts: Sequence[str], settings: dict[str, Any], stops: list[str], generator: torch.Generator
    ) -> list[str]:
        """One batch of answers."""
        _check_room(self.max_length, settings["max_new_tokens"])
        inputs = self._encode(contexts, self.max_length - settings["max_new_tokens"])
        output = self.model.generate(**inputs, generator=generator, return_dict_in_generate=True, **settings)
        self.num_forward_passes += output.num_forward_passes
        # A task that asks for `eos_token_id: []` wants the whole answer, and cuts it by its own rules.
        cut = self._raw if settings.get("eos_token_id") == [] else self._cut
        return [cut(ids, stops) for ids in output.sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    def _merge(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Settings for `generate`, and the stop strings: the run's over the task's, in the library's names."""
        task = dict(normalize_gen_kwargs(asked, DEFAULT_MAX_NEW_TOKENS))
        stops, task["max_new_tokens"] = task.pop("until"), task.pop("max_gen_toks")
        task.pop("do_sample")  # lm-eval has turned it into a temperature
        if self._in_force("sampler", self.settings) == "ancestral" and not task.get("temperature"):
            task.pop("temperature", None)  # greedy, as tasks ask for, means nothing to a sampler that draws
        for name, value in self.settings.items():
            # A length nobody asked for is no disagreement.
            if name in task and task[name] != value and (name != "max_new_tokens" or _asks_length(asked)):
                self._warn_once(f"the task asks for {name}={task[name]}, the run for {name}={value}: the run's is used")
        return {**task, **self.settings}, stops

    def _in_force(self, name: str, settings: Mapping[str, Any]) -> Any:
        """A setting of `generate`, by the checkpoint's generation_config.json where it is not given."""
        return settings[name] if name in settings else getattr(self.model.generation_config, name, None)

    def _depends_on_batch(self, settings: Mapping[str, Any]) -> bool:
        """Whether an answer under these settings is another one in another batch: drawn, or edited with its padding."""
        sampler, remasking = (self._in_force(name, settings) for name in ("sampler", "remasking"))
        refinement = self._in_force("refinement", settings) or ""
        if sampler == "ancestral" or remasking == "random" or refinement.startswith("remask"):
            return True
        return any(self._in_force(name, settings) for name in ("temperature", "reference_compat"))

    def _encode(self, contexts: Sequence[str], room: int) -> dict[str, Tensor]:
        """Left-padded ids and attention mask, (B, L); prompts longer than `room` tokens keep their end."""
        rows = [self.tok_encode(context) for context in contexts]
        if max(map(len, rows)) > room:
            self._warn_once(f"prompts longer than {room} tokens lose their beginning (max_length={self.max_length})")
        return self._pad([row[-room:] for row in rows])

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = [[self._pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        inputs = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.tensor(value, dtype=torch.long).to(self._device) for name, value in inputs.items()}

    @property
    def _pad_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _cut(self, ids: list[int], stops: list[str]) -> str:
        """Text of an answer up to its end-of-text token or the first stop string, whichever comes first."""
        # A stop string that is itself a special token would be gone from the decoded text: look for its id.
        special = {stop for stop in stops if stop in self.tokenizer.all_special_tokens}
        ends = self._end_ids | set(self.tokenizer.convert_tokens_to_ids(sorted(special)))
        ids = list(itertools.takewhile(lambda token_id: token_id not in ends, ids))
        return self._before_stops(self._decode(ids), stops)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _before_stops(self, text: str, stops: list[str]) -> str:
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text

    def _raw(self, ids: list[int], stops: list[str]) -> str:
        """Text of a whole answer, each end-of-text token written as `END_OF_TEXT`, other special tokens dropped."""
        groups = itertools.groupby(ids, lambda token_id: token_id in self._end_ids)
        parts = [END_OF_TEXT * len(list(group)) if ends else self._decode(list(group)) for ends, group in groups]
        return self._before_stops("".join(parts), stops)

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


def check_checkpoint(arguments: Arguments) -> PreTrainedTokenizerBase:
    """The tokenizer, once all that can be refused without the model's weights is refused.

    Raises:
        ValueError: If checkpoint, tokenizer or adapter cannot be read, or they do not fit each other or the lengths.
    """
    pretrained, loaded = arguments.pretrained, isinstance(arguments.pretrained, PreTrainedModel)
    config = pretrained.config if loaded else _read(AutoConfig, "pretrained", pretrained)
    if not isinstance(config, xdlm_hf.LLaDAConfig):
        raise ValueError(f"pretrained={pretrained} has model_type={config.model_type!r}; xdlm scores 'llada' models")
    limit = config.max_sequence_length
    if arguments.max_length is not None and arguments.max_length > limit:
        raise ValueError(f"max_length={arguments.max_length} is more than the model's max_sequence_length={limit}")
    _check_room(arguments.max_length or limit, arguments.max_new_tokens or 0)
    tokenizer = arguments.tokenizer
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (config.name_or_path if loaded else pretrained)
        if not source:
            raise ValueError("the model passed was not loaded from a checkpoint: pass its tokenizer as well")
        tokenizer = _read(AutoTokenizer, "tokenizer", source)
    check_tokenizer(tokenizer, config)
    if arguments.peft is not None:
        from peft import PeftConfig

        _read(PeftConfig, "peft", arguments.peft)
    return tokenizer


def _read(kind: Any, name: str, source: str) -> Any:
    """`kind.from_pretrained(source)`, its error named after the argument."""
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:  # the last two: files that are not what they should be
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}={source!r} cannot be read, name a folder or a Hub name: {reason}") from error


def _check_room(max_length: int, max_new_tokens: int) -> None:
    if max_new_tokens >= max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={max_length}: shorten it"
        )


def _load(arguments: Arguments, device: torch.device) -> PreTrainedModel:
    """The model with its adapter, on the device."""
    model = arguments.pretrained
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=arguments.dtype)
    if arguments.peft is not None:
        load_adapter(model, arguments.peft)  # puts the adapter's layers into `model` itself, its noise into the config
    return model.to(device).eval()


def _in_order(parts: list[Any]) -> list[Any]:
    """Logged samples, which lm-eval strings together process by process, in the order of their rows; others as is."""
    groups = [group for part in parts if isinstance(part, dict) for group in part.values()]
    rows = [row for group in groups if isinstance(group, list) for row in group]
    if not rows or not all(isinstance(row, dict) and "doc_id" in row for row in rows):
        return parts
    merged = {
        task: sorted((row for part in parts for row in part[task]), key=lambda row: row["doc_id"]) for task in parts[0]
    }
    return [merged, *({task: [] for task in parts[0]} for _ in parts[1:])]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of `generate` that are wrong by themselves; without `max_new_tokens`, steps are not checked.

    Other model arguments may be among them, and are left alone.

    Raises:
        ValueError: As `XDLMGenerationConfig`, or if steps, blocks and length do not fit each other.
    """
    settings = {name: value for name, value in settings.items() if name in XDLMGenerationConfig.OPTIONS}
    XDLMGenerationConfig(**settings)
    length = settings.get("max_new_tokens")
    if length is not None and settings.get("sampler") != "ancestral":
        check_blocks(settings.get("steps", length), length, settings.get("block_length", length))


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _repeats(requests: Sequence[Instance]) -> list[int]:
    """How often each request came before in the list; lm-eval repeats a request by listing the same object again."""
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        numbers.append(seen[id(request)])
        seen[id(request)] += 1
    return numbers


def _choose_device(device: str | torch.device | None) -> torch.device:
    try:
        wanted = torch.device(device or "cuda")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known: use cpu, cuda or cuda:0, say") from error
    return torch.device("cpu") if wanted.type == "cuda" and not torch.cuda.is_available() else wanted


def _positive(name: str, value: int | str) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        also = ' or "auto"' if name == "batch_size" else ""
        raise ValueError(f"{name}={value!r} must be a positive integer{also}")
    return int(value)


def _asks_length(asked: dict[str, Any]) -> bool:
    return any(name in asked for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
