"""Reading a checkpoint and its tokenizer, for the console commands and the recipes; errors are one line."""

import contextlib
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


def load(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer; what can be refused without the weights is refused before they are read.

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
        ValueError: In one line, if it cannot be read, a value in it is wrong, or it is of another kind of model.
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
def _one_line_error(what: str) -> Iterator[None]:
    """Turn what libraries raise for a wrong path, a missing or a damaged file into a `ValueError` of one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        why = " ".join(str(error).split())  # Transformers' messages have paragraphs
        raise ValueError(f"{what}: {why}") from error


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text ids: the tokenizer's and, where there are more, the model's."""
    theirs = model.generation_config.eos_token_id
    theirs = model.config.eos_token_id if theirs is None else theirs
    return {tokenizer.eos_token_id, *([theirs] if isinstance(theirs, int) else theirs or [])} - {None}


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that the chat template puts behind a message, if it does; LLaDA's is <|eot_id|>."""
    if not tokenizer.chat_template:
        return set()
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return set(ids[:1]) & set(tokenizer.all_special_ids)
