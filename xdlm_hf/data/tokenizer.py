"""LLaDA's special tokens and chat template, tokenizers, and checks that one fits a model."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOT, HEADER_START, HEADER_END, EOT_TURN, MASK = SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with LLaDA's special tokens, trained on `texts`.

    Ids 0 to 5 are <|startoftext|>, <|endoftext|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>, <|mdm_mask|>;
    then the 256 bytes, so that no text is unknown; then merges. End-of-text is also the padding token, as in LLaDA.

    Args:
        texts: Training text.
        vocab_size: Number of tokens, special ones included; fewer when the text offers no further merge.

    Raises:
        ValueError: If `vocab_size` has no room for the special tokens and the 256 bytes.
    """

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}: special tokens and 256 bytes.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=EOT,
        mask_token=MASK,
        additional_special_tokens=[HEADER_START, HEADER_END, EOT_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def symbol_tokenizer(symbols: Sequence[str], unknown: str, **options: Any) -> PreTrainedTokenizerFast:
    """A token for each character.

    Args:
        symbols: All tokens in the order of their ids: characters, and names of special tokens.
        unknown: The one of them that stands for any other character.
        options: Of the tokenizer, for example `mask_token`.
    """
    backend = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer that does not belong to the model.

    Args:
        tokenizer: The tokenizer.
        config: Model config with `mask_token_id`, and `output_rows` or `vocab_size` rows in the output layer.

    Raises:
        ValueError: If the tokenizer has ids beyond the output layer, another mask id than the config, or no
            end-of-text token.
    """
    rows = getattr(config, "output_rows", None) or config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's output layer {rows} rows: "
            "use the tokenizer that was saved with this model."
        )
    theirs, ours = tokenizer.mask_token_id, getattr(config, "mask_token_id", None)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"the tokenizer's mask token {tokenizer.mask_token!r} has id {theirs}, "
            f"the model's mask_token_id is {ours}: use the tokenizer that was saved with this model, "
            "or correct mask_token_id in its config.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; it is needed to separate documents.")
