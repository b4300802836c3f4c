"""text8: 100 million characters of Wikipedia, a to z and the blank, and its tokenizer of 35 tokens.

The tokenizer is that of the published text8 models: eight special tokens, then a to z, then the blank. It is a standard
fast tokenizer, so `AutoTokenizer` loads it without remote code.
"""

import re
from pathlib import Path

import datasets
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .tokenizer import symbol_tokenizer

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
ALPHABET = "abcdefghijklmnopqrstuvwxyz "
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
PARTS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""Start and end of each part, as shares of the characters: 90, 5 and 5 million of the original."""
CHUNK = 256  # characters per document, the row length of the published models
_OTHER = re.compile(r"[^a-z]+")


def text8_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer: [CLS] [SEP] [BOS] [EOS] [MASK] [PAD] [RESERVED] [UNK] are 0 to 7, a to z 8 to 33, the
    blank 34. Upper case is converted to lower case; any other character is [UNK]."""
    names = ("cls", "sep", "bos", "eos", "mask", "pad", "unk")
    tokenizer = symbol_tokenizer(
        (*SPECIAL_TOKENS, *ALPHABET),
        "[UNK]",
        additional_special_tokens=["[RESERVED]"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
    )
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


def check_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Check that a tokenizer encodes each character of text8 as one token.

    Args:
        tokenizer: The tokenizer.
        text: A sample of the text.

    Raises:
        ValueError: If it does not.
    """
    alphabet, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (ALPHABET, text))
    if len(set(alphabet)) != len(ALPHABET) or tokenizer.unk_token_id in alphabet or len(ids) != len(text):
        raise ValueError(
            f"the tokenizer encodes {len(text)} characters of text8 as {len(ids)} tokens, and the {len(ALPHABET)} "
            f"characters of its alphabet as {len(set(alphabet))} different ones, but text8 needs a token for "
            "each. Use text8_tokenizer(), or give the text as data_files of another corpus."
        )


def as_text8(text: str) -> str:
    """Text in text8's alphabet: lower case, and one blank for every run of other characters; text8 is unchanged."""
    return _OTHER.sub(" ", text.lower())


def text8_documents(part: str, file: str | None = None) -> datasets.Dataset:
    """A part of text8 as documents `{"text": str}` of 256 characters; the last one may be shorter.

    Args:
        part: "train", "validation" or "test".
        file: Local text to use instead, converted to the alphabet and divided in the same shares. Default: the
            original, which is downloaded once.

    Raises:
        ValueError: If there is no such part, or the text cannot be read.
    """
    if part not in PARTS:
        raise ValueError(f"text8 has no part {part!r}; choose one of {', '.join(PARTS)}.")
    try:
        path = Path(file or datasets.DownloadManager().download_and_extract(TEXT8_URL))
        text = (path / "text8" if path.is_dir() else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"text8 cannot be read from {file or TEXT8_URL} ({' '.join(str(error).split())}); download it on another "
            "machine, unpack it, and give the file as data_files, named text8.txt."
        ) from error
    text = as_text8(text)
    first, last = (round(share * len(text)) for share in PARTS[part])
    if first == last:
        raise ValueError(
            f"{file or TEXT8_URL} has {len(text)} characters, so that its part {part!r} is empty; give more text."
        )
    return datasets.Dataset.from_dict({"text": [text[at : min(at + CHUNK, last)] for at in range(first, last, CHUNK)]})
