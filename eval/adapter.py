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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import xdlm_hf
from xdlm_hf.evaluation.arguments import DEFAULT_MAX_NEW_TOKENS, Arguments, at, check_checkpoint, check_room
from xdlm_hf.evaluation.likelihood import Estimate, Pair, log_likelihoods, seeded_generator
from xdlm_hf.evaluation.manifest import hardware, sandbox_layers
from xdlm_hf.evaluation.processes import ProcessesLM
from xdlm_hf.evaluation.protocols import END_OF_TEXT
from xdlm_hf.evaluation.rows import READ
from xdlm_hf.generation.layout import padded
from xdlm_hf.generation.protocol import default_mixing_ratio, length_limit
from xdlm_hf.generation.resolution import draws_with
from xdlm_hf.loading import end_ids
from xdlm_hf.training.adapters import load_adapter

logger = logging.getLogger(__name__)

AUTO_BATCH_SIZE = {"cpu": 8, "other": 64}  # what `batch_size=auto` tries first; a CPU gains nothing from more


@register_model("xdlm")
class XDLMEvalModel(ProcessesLM):
    """A diffusion model of any registered family behind lm-eval's interface.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        arguments: The other fields of `Arguments`.

    Raises:
        ValueError: On an unknown argument or an impossible value, and on a checkpoint, adapter or tokenizer that is
            not there or does not fit, all before the weights are loaded.
    """

    def __init__(self, pretrained: str | PreTrainedModel, **arguments: Any) -> None:
        super().__init__()
        asked = Arguments.of({"pretrained": pretrained, **arguments})
        self.arguments, self.revision = asked.pinned(), asked.revision
        self.settings = self.arguments.settings
        self.item_log = None if self.arguments.item_log is None else Path(self.arguments.item_log)
        self.tokenizer = check_checkpoint(self.arguments)
        self._device = self._join(self.arguments.device)
        self.automatic = self.arguments.batch_size == "auto"
        first = self.arguments.max_batch_size or AUTO_BATCH_SIZE["cpu" if self._device.type == "cpu" else "other"]
        self.batch_size = first if self.automatic else self.arguments.batch_size
        # Before loading: the folder may hold other weights at the end. The first process alone writes results.
        self.shas = self.arguments.shas() if self.rank == 0 else {}
        self.model = _load(self.arguments, self._device)
        self.max_length = self.arguments.max_length or length_limit(self.model.config)
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

    @property
    def seed(self) -> int:
        """Seed of the draws. lm-eval tells a model nothing of its --seed, but seeds torch with it."""
        return torch.initial_seed() if self.arguments.seed is None else self.arguments.seed

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
            "model_revision": self.revision,
            "peft": self.arguments.peft,
            **self.shas,
            "data": dict(READ),
            "hardware": hardware(self._device),
            "sandbox_layers": sandbox_layers(),
            "seed": self.seed,
            "xdlm_hf_version": xdlm_hf.__version__,
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
            "model_mixing_ratio": default_mixing_ratio(self.model.config),
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
        done, own, asked = 0, default_mixing_ratio(self.model.config), self.arguments.mixing_ratio
        if asked not in (None, own):
            self._warn_once(f"likelihoods are bounds under mixing_ratio={asked}; the checkpoint was trained at {own}")
        with self._progress(len(pairs), "Likelihoods", "request", disable_tqdm) as progress:
            while done < len(pairs):
                rest = pairs[done:]
                values = log_likelihoods(
                    self.model,
                    rest,
                    self.arguments.mc_samples,
                    self.batch_size,
                    self.seed,
                    self._pad_token_id,
                    self.arguments.mixing_ratio,
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
        if getattr(self.model.config, "mask_token_id", None) is None:
            return greedy
        for length in sorted({len(pair.continuation) for pair in pairs} - {0}):
            group = [n for n, pair in enumerate(pairs) if len(pair.continuation) == length]
            decode = functools.partial(self._greedy_ids, pairs, length)
            for batch, decoded in self._in_batches(group, decode):
                for n, ids in zip(batch, decoded, strict=True):
                    greedy[n] = tuple(ids) == pairs[n].continuation
        return greedy

    def _greedy_ids(self, pairs: Sequence[Pair], length: int, batch: Sequence[int]) -> list[list[int]]:
        options = {"max_new_tokens": length, "sampler": "confidence", "temperature": 0.0, "eos_token_id": []}
        options |= _given(mixing_ratio=self.arguments.mixing_ratio)
        inputs = self._pad([list(pairs[n].context) for n in batch])
        output = self.model.generate(**inputs, steps=length, block_length=length, **options)
        return output[:, -length:].tolist()

    def _answer(
        self, contexts: Sequence[str], settings: dict[str, Any], stops: list[str], generator: torch.Generator
    ) -> list[str]:
        """One batch of answers."""
        check_room(self.max_length, settings["max_new_tokens"])
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
        return draws_with(self.model.generation_config, settings) or bool(self._in_force("reference_compat", settings))

    def _encode(self, contexts: Sequence[str], room: int) -> dict[str, Tensor]:
        """Left-padded ids and attention mask, (B, L); prompts longer than `room` tokens keep their end."""
        rows = [self.tok_encode(context) for context in contexts]
        if max(map(len, rows)) > room:
            self._warn_once(f"prompts longer than {room} tokens lose their beginning (max_length={self.max_length})")
        return self._pad([row[-room:] for row in rows])

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        ids, attention_mask = padded(rows, self._pad_token_id)
        return {"input_ids": ids.to(self._device), "attention_mask": attention_mask.to(self._device)}

    @property
    def _pad_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _cut(self, ids: list[int], stops: list[str]) -> str:
        """Text of an answer up to its end-of-text token or the first stop string, whichever comes first."""
        # A stop string that is itself a special token would be gone from the decoded text: look for its id.
        special = {stop for stop in stops if stop in self.tokenizer.all_special_tokens}
        ends = end_ids(self.model, self.tokenizer) | set(self.tokenizer.convert_tokens_to_ids(sorted(special)))
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
        end = end_ids(self.model, self.tokenizer)
        groups = itertools.groupby(ids, lambda token_id: token_id in end)
        parts = [END_OF_TEXT * len(list(group)) if ends else self._decode(list(group)) for ends, group in groups]
        return self._before_stops("".join(parts), stops)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _load(arguments: Arguments, device: torch.device) -> PreTrainedModel:
    """The model with its adapter, on the device."""
    model = arguments.pretrained
    if not isinstance(model, PreTrainedModel):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=arguments.dtype, **at(arguments.revision))
    if arguments.peft is not None:
        # Its layers go into `model` itself, its noise into the config.
        load_adapter(model, arguments.peft, **at(arguments.peft_revision))
    return model.to(device).eval()


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


def _asks_length(asked: dict[str, Any]) -> bool:
    return any(name in asked for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
