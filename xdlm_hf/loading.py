"""A checkpoint and its tokenizer, ready to generate, for the console commands."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .data import check_tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer; what can be refused without the weights is refused before they are read.

    Args:
        name: Folder or Hub name of a checkpoint.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto" (the GPU if there is one), or a device of PyTorch such as "cuda:1".

    Raises:
        ValueError: If there is no such checkpoint, it is no LLaDA, its tokenizer does not fit, or dtype or device is
            not known.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known to PyTorch; use auto, cpu or cuda:0, for example.") from error
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model={name!r} cannot be read as a folder or Hub name of a checkpoint: {error}") from error
    if config.model_type != "llada":
        raise ValueError(f"model={name!r} has model_type={config.model_type!r}; here 'llada' checkpoints are run.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    check_tokenizer(tokenizer, config)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval(), tokenizer


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
