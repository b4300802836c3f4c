"""Judges of generated text: language models that give its negative log-likelihood in nats.

    gpt2-large, or any causal language model    tokens of its own tokenizer, as in the paper's generative perplexities
    ngram:FILE                                  characters, by a Witten-Bell model of the text in FILE (`ngram`)

Perplexities of different judges cannot be compared. Repetitive text has a low perplexity, so compare its entropy with
that of real text, too.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from xdlm_hf.evaluation.ngram import WittenBell
from xdlm_hf.generation.protocol import DiffusionModel
from xdlm_hf.training.nelbo import nelbo_of_sums

NGRAM = "ngram:"


class Judge(Protocol):
    """A model that scores texts; `description` is its description in reports, as JSON."""

    description: dict[str, Any]

    def score(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats and number of scored tokens of each text, both (number of texts,) float64.

        Args:
            texts: The texts.
            max_length: Maximum number of the judge's tokens, to which texts are truncated; not for characters.
        """


class CausalJudge:
    """A causal language model in float32, with the paper's protocol.

    A text is tokenized by the judge, which parses special tokens in it, truncated to `max_length` or the judge's limit,
    and scored in one pass from its second token. Only the first end-of-text token counts.

    Args:
        name: Folder or Hub name.
        device: Device of the model.
        batch_size: Texts per forward pass.

    Raises:
        ValueError: If the model cannot be read, is a diffusion model, or has no end-of-text token.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 8):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"judge={name!r} cannot be read ({' '.join(str(error).split())}); give the folder or Hub name of a "
                "causal language model, or ngram:FILE with the text to fit an n-gram judge to."
            ) from error
        if isinstance(self.model, DiffusionModel):
            raise ValueError(
                f"judge={name!r} is a diffusion model, which does not predict the next token; give another."
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"judge={name!r}: its tokenizer has no end-of-text token; give another.")
        self.model.to(device).eval()
        self.batch_size = batch_size
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self.description = {
            "name": name,
            "unit": "token",
            "commit": getattr(self.model.config, "_commit_hash", None),
            "dtype": "float32",
        }

    @torch.no_grad()
    def score(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Judge.score`."""
        length = min(max_length, self.limit or max_length)
        ids = self.tokenizer(list(texts), truncation=True, max_length=length)["input_ids"] if texts else []
        nats, tokens = np.zeros(len(texts)), np.zeros(len(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # for little padding
        with tqdm(total=len(ids), desc="Judging", unit=" texts", leave=False) as bar:
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                nats[batch], tokens[batch] = self._score([ids[i] for i in batch])
                bar.update(len(batch))
        return nats, tokens

    def _score(self, rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        eos, width = self.tokenizer.eos_token_id, max(map(len, rows))
        if width < 2:
            return np.zeros(len(rows)), np.zeros(len(rows))
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        counted = mask & ((ids != eos) | ((ids == eos).cumsum(1) == 1))
        ids, mask, counted = (x.to(self.model.device) for x in (ids, mask, counted[:, 1:]))
        logits = self.model(input_ids=ids, attention_mask=mask.long()).logits
        # Row by row, because a float32 copy of all logits would be the largest tensor.
        losses = torch.stack(
            [F.cross_entropy(row[:-1].float(), x[1:], reduction="none") for row, x in zip(logits, ids, strict=True)]
        )
        nats = (losses.double() * counted).sum(1)
        return nats.cpu().numpy(), counted.sum(1).double().cpu().numpy()


class NgramJudge:
    """A Witten-Bell model of characters; all characters that do not occur in its text are one unknown character.

    Args:
        documents: The text to fit the model to.
        order: The longest n-gram.
        source: Name of that text, for the report.

    Raises:
        ValueError: As `WittenBell`.
    """

    def __init__(self, documents: Iterable[str | None], order: int = 6, source: str = ""):
        texts = [text for text in documents if text]
        characters = sorted(set().union(*map(set, texts))) if texts else []
        self._ids = {character: number for number, character in enumerate(characters)}
        self.model = WittenBell((self._encoded(text) for text in texts), order, len(characters) + 1)
        size = sum(map(len, texts))
        self.description = {"name": f"{NGRAM}{source}", "unit": "character", "order": order, "characters": size}

    def _encoded(self, text: str) -> list[int]:
        return [self._ids.get(character, len(self._ids)) for character in text]

    def score(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Judge.score`; texts are not truncated."""
        scores = self.model.log_probabilities([self._encoded(text) for text in texts]) if texts else []
        return np.array([-row.sum() for row in scores]), np.array([float(len(row)) for row in scores])


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """exp(all nats / all tokens) with its standard error over texts, and the number of tokens.

    Raises:
        ValueError: If no token was scored.
    """
    if not tokens.sum() > 0:
        raise ValueError(f"the {len(tokens)} texts have no token to score; give longer texts.")
    sums = ((x * y).sum() for x, y in ((nats, nats), (nats, tokens), (tokens, tokens)))
    found = nelbo_of_sums(len(nats), float(nats.sum()), float(tokens.sum()), *map(float, sums))
    names = ("perplexity", "perplexity_standard_error")
    return {**{name: found[name] for name in names if name in found}, "judged_tokens": int(tokens.sum())}


def entropies(ids: torch.Tensor) -> torch.Tensor:
    """Entropy of the frequencies of token ids within each row (R, L), special tokens included: (R,) nats, float64."""
    counts = [row.unique(return_counts=True)[1].double() for row in ids]
    return torch.stack([-(c / c.sum() * (c / c.sum()).log()).sum() for c in counts])
