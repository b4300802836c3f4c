"""Arguments of the lm-eval model `xdlm`, and all that can be refused before its weights are loaded."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.data.tokenizer import check_tokenizer
from xdlm_hf.evaluation.manifest import content_sha, hub_commit
from xdlm_hf.generation.blocks import check_blocks, check_even_blocks
from xdlm_hf.generation.config import XDLMGenerationConfig
from xdlm_hf.generation.options import ACCEPTED, section_names
from xdlm_hf.generation.protocol import length_limit
from xdlm_hf.loading import DTYPES
from xdlm_hf.models.registry import model_class

DEFAULT_MAX_NEW_TOKENS = 256


# Arguments that are passed on to `generate`.
GENERATION = section_names("length", "sampling", "speed", "refinement", "audit")


# What may come from the Hub: the argument of its revision, and a file that every such repository has.
_REVISIONS = {"pretrained": "revision", "tokenizer": "tokenizer_revision", "peft": "peft_revision"}
_FILES = {"pretrained": "config.json", "tokenizer": "tokenizer_config.json", "peft": "adapter_config.json"}


_GenerationArguments = make_dataclass(
    "_GenerationArguments", [(name, Any, field(default=None, kw_only=True)) for name in GENERATION]
)


@dataclass
class Arguments(_GenerationArguments):
    """Arguments of `XDLMEvalModel`, checked without loading anything.

    What the run asks for wins over what the task asks for, and that over the checkpoint's generation_config.json: a
    sampler argument left at None is not set here. Where run and task disagree, a warning says so once.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        tokenizer: Folder, Hub name or tokenizer; by default the one saved with `pretrained`.
        peft: Folder or Hub name of a LoRA adapter to put on the model; brings the k it was trained with.
        revision, tokenizer_revision, peft_revision: Branch, tag or commit of each of the three on the Hub; by default
            its default branch. A tokenizer that is not named is the one of `revision`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; a loaded model keeps its own.
        device: Device of the model; lm-eval's default is "cuda:0", and without a GPU that means the CPU.
        batch_size: Rows per forward pass, or "auto": as many as fit, found by halving. No result depends on it but by
            the rounding of the device's arithmetic, unless `batch_all` is set.
        max_batch_size: What "auto" tries first; 8 on a CPU, 64 elsewhere.
        max_length: Longest prompt and answer together, in tokens; by default the model's limit.
            Longer prompts lose their beginning, with one warning.
        steps: Denoising steps, that is forward passes per batch.
        max_new_tokens: Length of an answer; 256 if neither the run nor the task says.
        mixing_ratio: The run's k, by default the checkpoint's: of the sampler, and of the noise that likelihoods are
            bounded under.
        block_length, sampler, temperature and the rest of `GENERATION`: As in `XDLMGenerationConfig`.
        mc_samples: Draws per likelihood, each one row of a forward pass.
        check_greedy: Whether likelihoods also say if greedy decoding gives the continuation, which takes one forward
            pass per token of it (LAMBADA's accuracy needs that).
        batch_all: Whether also those answers share batches that then depend on them, which is faster: answers that
            are drawn, and all of `reference_compat`, whose sampler edits padding too. By default each of these has
            forward passes of its own, and noise seeded with `seed`, its prompt and how often the request came before.
        item_log: JSONL file to which every answer's seconds and forward passes are added, for the kit.
        seed: Seed of everything that is drawn; by default the one of torch's global generator, which lm-eval sets to
            its --seed.

    Raises:
        ValueError: On an impossible value.
    """

    pretrained: str | PreTrainedModel
    tokenizer: str | PreTrainedTokenizerBase | None = None
    peft: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    peft_revision: str | None = None
    dtype: str = "auto"
    device: str | torch.device | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    max_length: int | None = None
    mc_samples: int = 128
    check_greedy: bool = True
    batch_all: bool = False
    item_log: str | None = None
    seed: int | None = None

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
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        for name, revision in _REVISIONS.items():
            if getattr(self, revision) is not None:
                setattr(self, revision, str(getattr(self, revision)))  # lm-eval reads a commit of digits as a number
                if not isinstance(getattr(self, name), str):
                    raise ValueError(f"{revision}={getattr(self, revision)!r} is for a {name} that is named")
        self.device = _choose_device(self.device)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From names and values, refusing unknown names.

        Raises:
            ValueError: As the class, and if a name is unknown or `pretrained` is missing.
        """
        known = [field.name for field in sorted(fields(cls), key=lambda field: field.kw_only)]  # generate's last
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

    @property
    def sources(self) -> dict[str, str]:
        """Folders and Hub names among the arguments, by argument."""
        return {name: getattr(self, name) for name in _REVISIONS if isinstance(getattr(self, name), str)}

    def pinned(self) -> Self:
        """The same with the commits that its Hub names stand for now as their revisions; folders have none.

        Raises:
            ValueError: If a repository or its revision cannot be read, or a folder is to have a revision.
        """
        return dataclasses.replace(self, **{_REVISIONS[name]: self._commit(name) for name in self.sources})

    def shas(self) -> dict[str, str]:
        """`model_sha`, `tokenizer_sha` and `peft_sha` of what is named, pinned: see `manifest.content_sha`."""
        return {
            f"{'model' if name == 'pretrained' else name}_sha": content_sha(source, getattr(self, _REVISIONS[name]))
            for name, source in self.sources.items()
        }

    def _commit(self, name: str) -> str | None:
        source, revision = getattr(self, name), getattr(self, _REVISIONS[name])
        try:
            return hub_commit(source, revision, _FILES[name])
        except OSError as error:
            raise _unreadable(name, source, revision, error) from error
        except ValueError as error:
            raise ValueError(f"{_REVISIONS[name]}: {error}") from error


def check_checkpoint(arguments: Arguments, lengths: Mapping[str, int] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, once all that can be refused without the model's weights is refused.

    Args:
        arguments: `pinned`.
        lengths: Length of the answers of each task, in tokens, where that is known.

    Raises:
        ValueError: If checkpoint, tokenizer or adapter cannot be read, or they do not fit each other or the lengths.
    """
    pretrained, loaded = arguments.pretrained, isinstance(arguments.pretrained, PreTrainedModel)
    config = pretrained.config if loaded else _read(AutoConfig, "pretrained", pretrained, arguments.revision)
    try:
        model_class(config)
    except ValueError as error:
        raise ValueError(f"pretrained={pretrained}: {error}") from error
    limit = length_limit(config)
    if arguments.max_length is not None and arguments.max_length > limit:
        raise ValueError(f"max_length={arguments.max_length} is more than the model's limit of {limit}")
    check_room(arguments.max_length or limit, arguments.max_new_tokens or 0)
    for task, length in (lengths or {}).items():
        check_room(arguments.max_length or limit, length, f"{task}: ")
    tokenizer = arguments.tokenizer
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (config.name_or_path if loaded else pretrained)
        revision = arguments.tokenizer_revision if tokenizer else arguments.revision
        if not source:
            raise ValueError("the model passed was not loaded from a checkpoint: pass its tokenizer as well")
        tokenizer = _read(AutoTokenizer, "tokenizer", source, revision)
    check_tokenizer(tokenizer, config)
    if arguments.peft is not None:
        from peft import PeftConfig

        _read(PeftConfig, "peft", arguments.peft, arguments.peft_revision)
    return tokenizer


def _read(kind: Any, name: str, source: str, revision: str | None) -> Any:
    """`kind.from_pretrained(source)`, its error named after the argument."""
    try:
        return kind.from_pretrained(source, **at(revision))
    except (OSError, ValueError, TypeError) as error:  # the last two: files that are not what they should be
        raise _unreadable(name, source, revision, error) from error


def at(revision: str | None) -> dict[str, str]:
    """Keyword arguments for `from_pretrained`."""
    return {} if revision is None else {"revision": revision}


def _unreadable(name: str, source: str, revision: str | None, error: Exception) -> ValueError:
    named = f"{name}={source!r}" + ("" if revision is None else f" at revision {revision!r}")
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"{named} cannot be read, name a folder or a Hub name: {reason}")


def check_room(max_length: int, max_new_tokens: int, where: str = "") -> None:
    """Raises ValueError, its message opened with `where`, when an answer fills the whole length."""
    if max_new_tokens >= max_length:
        raise ValueError(
            f"{where}max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={max_length}: shorten it"
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of `generate` that are wrong by themselves; without `max_new_tokens`, steps are not checked.

    Other model arguments may be among them, and are left alone.

    Raises:
        ValueError: As `XDLMGenerationConfig`, or if steps, blocks and length do not fit each other.
    """
    settings = {name: value for name, value in settings.items() if name in ACCEPTED}
    XDLMGenerationConfig(**settings)
    length = settings.get("max_new_tokens")
    if length is not None and settings.get("sampler") != "ancestral":
        check = check_even_blocks if settings.get("reference_compat") else check_blocks
        check(settings.get("steps", length), length, settings.get("block_length", length))


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
