"""text8: 100 million characters of Wikipedia, a to z and the blank, and its tokenizer of 35 tokens.

The tokenizer is the one of the published text8 models: eight special tokens, then a to z, then the blank. It is an
ordinary fast tokenizer, so that a saved one is read by `AutoTokenizer` without remote code.
"""

import re
from pathlib import Path

import datasets
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
ALPHABET = "abcdefghijklmnopqrstuvwxyz "
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
PARTS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""Where each part begins and ends, as shares of the characters: 90, 5 and 5 million of the original."""
CHUNK = 256  # characters of a document: a row of the published models
_OTHER = re.compile(r"[^a-z]+")


def text8_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer: [CLS] [SEP] [BOS] [EOS] [MASK] [PAD] [RESERVED] [UNK] are 0 to 7, a to z 8 to 33, the
    blank 34. Upper case is read as lower case; any other character is [UNK]."""
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}, "[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = ("cls", "sep", "bos", "eos", "mask", "pad", "unk")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["[RESERVED]"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
    )


def check_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse a tokenizer that does not give text8 one token for each character.

    Args:
        tokenizer: Any.
        text: Some of the text, on which a tokenizer of longer pieces shows itself.

    Raises:
        ValueError: With the remedy.
    """
    alphabet, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (ALPHABET, text))
    if len(set(alphabet)) != len(ALPHABET) or tokenizer.unk_token_id in alphabet or len(ids) != len(text):
        raise ValueError(
            f"the tokenizer encodes {len(text)} characters of text8 as {len(ids)} tokens, and its {len(ALPHABET)} "
            f"signs as {len(set(alphabet))}: text8 is cut by characters. Use text8_tokenizer(), or give the text as "
            "data_files of another corpus."
        )


def as_text8(text: str) -> str:
    """Text in text8's alphabet: lower case, and one blank for every run of other characters. text8 stays as it is."""
    return _OTHER.sub(" ", text.lower())


def text8_documents(part: str, file: str | None = None) -> datasets.Dataset:
    """A part of text8 as documents `{"text": str}` of 256 characters; the last one may be shorter.

    Args:
        part: "train", "validation" or "test".
        file: Local text in its place, brought to its alphabet and cut in the same shares. Default: the original, which
            is downloaded once.

    Raises:
        ValueError: If there is no such part, or the text cannot be had.
    """
    if part not in PARTS:
        raise ValueError(f"text8 has no part {part!r}; choose one of {', '.join(PARTS)}.")
    try:
        path = Path(file or datasets.DownloadManager().download_and_extract(TEXT8_URL))
        text = (path / "text8" if path.is_dir() else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"text8 cannot be read from {file or TEXT8_URL} ({' '.join(str(error).split())}): fetch it on another "
            "machine, unpack it, and name the file text8.txt in data_files."
        ) from error
    text = as_text8(text)
    first, last = (round(share * len(text)) for share in PARTS[part])
    if first == last:
        raise ValueError(
            f"{file or TEXT8_URL} holds {len(text)} characters: its part {part!r} is empty; give more text."
        )
    return datasets.Dataset.from_dict({"text": [text[at : min(at + CHUNK, last)] for at in range(first, last, CHUNK)]})
