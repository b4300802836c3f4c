"""Loading of a checkpoint and its tokenizer for the console commands and the recipes, with one-line errors."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.tokenizer import check_tokenizer
from .models.registry import model_class

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_version_option(parser: argparse.ArgumentParser) -> None:
    """Add `--version`, which prints the package's version and ends the command."""
    version = sys.modules[__package__].__version__
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")


def load(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer; config, tokenizer and device are checked before the weights are read.

    Args:
        name: Folder or Hub name of a checkpoint.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto" (the GPU if there is one), or a device of PyTorch such as "cuda:1".

    Raises:
        ValueError: If there is no such checkpoint, its tokenizer does not fit, or its model type, the dtype or the
            device is not known.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known to PyTorch; use auto, cpu or cuda:0, for example.") from error
    config = read_config(name)
    tokenizer = read_tokenizer(name)
    check_tokenizer(tokenizer, config)
    return load_weights(name, dtype=dtype).to(device).eval(), tokenizer


def read_config(name: str) -> PreTrainedConfig:
    """Config of a checkpoint.

    Args:
        name: Folder, Hub name, or path of a config.json.

    Raises:
        ValueError: In one line, if it cannot be read, a value in it is wrong, or its model type is not registered.
    """
    with _one_line_error(f"model={name!r} cannot be read as a folder or Hub name of a checkpoint"):
        config = AutoConfig.from_pretrained(name)
    try:
        model_class(config)
    except ValueError as error:
        raise ValueError(f"model={name!r}: {error}") from error
    return config


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or Hub name.

    Raises:
        ValueError: In one line, if it cannot be read.
    """
    with _one_line_error(f"the tokenizer of {name!r} cannot be read"):
        return AutoTokenizer.from_pretrained(name)


def load_weights(name: str, **options: Any) -> PreTrainedModel:
    """Model of a folder or Hub name, by `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: In one line, if there are no weights, or they are damaged.
    """
    with _one_line_error(f"the weights of {name!r} cannot be read"):
        return AutoModelForCausalLM.from_pretrained(name, **options)


@contextlib.contextmanager
def _one_line_error(message: str) -> Iterator[None]:
    """Convert libraries' errors for a wrong path or a missing or damaged file into a one-line `ValueError`."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        cause = " ".join(str(error).split())  # Transformers' messages have several lines
        raise ValueError(f"{message}: {cause}") from error


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text ids of the tokenizer and of the model."""
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    return {tokenizer.eos_token_id, *([ids] if isinstance(ids, int) else ids or [])} - {None}


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that the chat template puts after a message, if any; LLaDA's is <|eot_id|>."""
    if not tokenizer.chat_template:
        return set()
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return set(ids[:1]) & set(tokenizer.all_special_ids)
