"""The lm-eval model `xdlm`: checkpoints of this package, scored by generating answers or by their likelihood bound.

    xdlm-eval --model_args pretrained=PATH,steps=32,max_new_tokens=256 --tasks xdlm_gsm8k --batch_size 8

It builds on lm-eval's `TemplateLM` and not on its Hugging Face class, which passes unknown arguments on to
`from_pretrained`, resizes the embedding to the tokenizer when it loads a LoRA adapter (LLaDA's has rows without a
token), and truncates prompts after padding them. This module is lm-eval's interface alone: generation_requests.py
generates answers, likelihood_requests.py bounds likelihoods.

Under `accelerate launch` or `torchrun`, every process holds the model and lm-eval gives each its share of the rows.
"""

from typing import Any, Self

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import xdlm_hf
from xdlm_hf.evaluation.arguments import Arguments, check_checkpoint
from xdlm_hf.evaluation.batches import Batches
from xdlm_hf.evaluation.checkpoint import Checkpoint
from xdlm_hf.evaluation.distributed import DistributedLM
from xdlm_hf.evaluation.generation_requests import GenerationRequests
from xdlm_hf.evaluation.likelihood import Estimate
from xdlm_hf.evaluation.likelihood_requests import LikelihoodRequests
from xdlm_hf.evaluation.manifest import hardware, sandbox_layers
from xdlm_hf.evaluation.rows import READ
from xdlm_hf.evaluation.stability import install
from xdlm_hf.generation.protocol import default_mixing_ratio


@register_model("xdlm")
class XDLMEvalModel(DistributedLM):
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
        self.tokenizer = check_checkpoint(self.arguments)
        self._device = self._join_processes(self.arguments.device)
        # Before loading: the folder may hold other weights at the end. The first process alone writes results.
        self.shas = self.arguments.shas() if self.rank == 0 else {}
        self.checkpoint = Checkpoint.load(self.arguments, self.tokenizer, self._device)
        self.batches = Batches(self.arguments, self._device)
        self.generation = GenerationRequests(self.checkpoint, self.arguments, self.batches)
        self.likelihoods = LikelihoodRequests(self.checkpoint, self.arguments, self.batches)
        if self.arguments.stability is not None:
            install()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From `--model_args`, which win over lm-eval's own flags for the same arguments (batch_size, device)."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{"pretrained": None, **flags, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def model(self) -> PreTrainedModel:
        return self.checkpoint.model

    @property
    def max_length(self) -> int:
        return self.checkpoint.max_length

    @property
    def batch_size(self) -> int:
        return self.batches.size

    @property
    def num_forward_passes(self) -> int:
        """Forward passes that generated answers in this process."""
        return self.generation.num_forward_passes

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
            "seed": self.arguments.seed_of_draws,
            "xdlm_hf_version": xdlm_hf.__version__,
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
            "model_mixing_ratio": default_mixing_ratio(self.model.config),
            "max_length": self.max_length,
            "batch_size_per_process": self.batch_size,
            "generation_settings": self.arguments.settings,
            "num_forward_passes": self.num_forward_passes,
            "num_processes": self.world_size,
            "mc_samples": self.arguments.mc_samples,
            "batch_all": self.arguments.batch_all,
            "stability": self.arguments.stability,
            "stability_noise": self.arguments.stability_noise,
            "likelihoods": self.likelihoods.summary(),
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
        """Token ids, see `Checkpoint.encode`."""
        return self.checkpoint.encode(string, add_special_tokens, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests, each cut at its first stop string or end-of-text token.

        A request with `eos_token_id: []` gets its whole answer, end-of-text tokens written as `protocols.END_OF_TEXT`.
        """
        answers: dict[int, str] = {}
        with self._progress(len(requests), "Generating", "answer", disable_tqdm) as progress:
            for batch, texts in self.generation.answers(requests):
                for n, answer in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[n].args, answer)
                    answers[n] = answer
                progress.set_postfix(forward_passes=self.num_forward_passes, refresh=False)
                progress.update(len(batch))
        return [answers[n] for n in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[Estimate, bool]]:
        """(bound on log p(continuation | context) in nats, whether greedy decoding gives it) for every request.

        The bound is a float that carries its `standard_error`. With an empty context it is unconditional.
        """
        pairs = [self.likelihoods.pair(*self._encode_request(*request.args)) for request in requests]
        results: list[tuple[Estimate, bool] | None] = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n].context) - len(pairs[n].continuation))
        values = self._bounds([pairs[n] for n in order], disable_tqdm)
        greedy = self.likelihoods.are_greedy(pairs) if self.arguments.check_greedy else [False] * len(pairs)
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
            parts = list(self._bounds(self.likelihoods.windows(ids), disable_tqdm)) if ids else []
            total = Estimate(sum(parts), sum(part.standard_error**2 for part in parts) ** 0.5)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list:
        pairs = [self.likelihoods.pair(context, continuation) for _, context, continuation in requests]
        return [(value, False) for value in self._bounds(pairs, disable_tqdm)]

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        return [], self.tok_encode(continuation, add_special_tokens=False)

    def _bounds(self, pairs: list, disable_tqdm: bool) -> Any:
        with self._progress(len(pairs), "Likelihoods", "request", disable_tqdm) as progress:
            for value in self.likelihoods.bounds(pairs):
                progress.update()
                yield value

    def _progress(self, total: int, text: str, unit: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=text, unit=unit, disable=disable or self.rank != 0)
