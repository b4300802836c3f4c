"""Plain restatement of the released confidence sampler, row by row, and the audit of `reference_compat` against it.

    python tests/released.py            every setting of the audit; prints how many generations agree, by dtype

It follows the public description of LLaDA's low-confidence remasking and the paper's Algorithm 1, and agrees with the
60 generations recorded from the released code (`fixtures/released-sampler`). The networks are functions of integers
whose logits are the same in float32 and bfloat16 and on every machine, so that only the samplers are compared.
"""

import argparse
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from models import tiny_model
from torch import Tensor

from xdlm_hf import LLaDAForDiffusionLM


@dataclass(frozen=True)
class IntegerNetwork:
    """Ids (B, T) to float32 logits (B, T, N), multiples of 1/4 in [-4, 12), from a position's token and its neighbours.

    A hidden neighbour does not count, but a hidden position still sees its own token, as in a transformer.
    """

    vocab_size: int
    mask_token_id: int
    seed: int = 0
    levels: int = 64  # distinct values of a logit; with few of them whole rows tie
    mask_bonus: float = 0.0  # added to the mask's own logit

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        visible = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        seen = torch.where(visible > 0, ids, 997)
        known = ((ids != self.mask_token_id) & (visible > 0)).sum(1, keepdim=True) // 4
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        mixed = ids * 6151 + seen.roll(1, 1) * 93319 + seen.roll(-1, 1) * 1193771 + known * 7919 + position * 611939
        mixed = (mixed + self.seed * 104723) % 999983
        tokens = torch.arange(self.vocab_size, device=ids.device)
        noise = (mixed[..., None] * (tokens * tokens + 17) + tokens * 40507) % 65521
        logits = (noise % self.levels).float() / 4 - 4
        peak = (mixed % self.vocab_size)[..., None]
        logits = torch.where(tokens == peak, 12 - (mixed % 5)[..., None].float() * 2, logits.clamp(max=6.0))
        logits[..., self.mask_token_id] += self.mask_bonus
        return logits


def recorded_network(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The network of the recorded generations, N = 48 and [MASK] = 47: ids (B, T) to float32 logits (B, T, N)."""
    visible = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    seen = torch.where(visible > 0, ids, 101)
    known = ((ids != 47) & (visible > 0)).sum(1, keepdim=True) // 5
    position = torch.arange(ids.shape[1])[None]
    mixed = seen * 7919 + seen.roll(1, 1) * 104729 + seen.roll(-1, 1) * 1299709 + known * 15485863 + position * 32452843
    mixed = mixed % 1000003
    tokens = torch.arange(48)
    logits = ((mixed[..., None] * (tokens * tokens + 31) + tokens * 611953) % 65537 % 64).float() / 4 - 4
    peak = (mixed % 46)[..., None]
    return torch.where(tokens == peak, 12 - (mixed % 5)[..., None].float() * 2, logits.clamp(max=6.0))


def released_generation(
    network,
    ids: Tensor,
    attention_mask: Tensor | None,
    mask_token_id: int,
    steps: int,
    max_new_tokens: int,
    block_length: int,
    mixing_ratio: float,
    cfg_scale: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Sequences (B, T) of the released confidence sampler at temperature 0, and the edits of each row (B,)."""
    batch, start = ids.shape
    text = torch.cat([ids, torch.full((batch, max_new_tokens), mask_token_id)], dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(batch, max_new_tokens, dtype=torch.long)], dim=1)
    given = text != mask_token_id
    steps_per_block = steps // (max_new_tokens // block_length)
    total_edits = [0] * batch
    for end in range(start + block_length, start + max_new_tokens + 1, block_length):
        edits = [0] * batch  # in this block
        filled = 0
        for step in range(steps_per_block):
            logits = network(text, attention_mask).to(dtype)
            if cfg_scale > 0:
                hidden = text.clone()
                hidden[given] = mask_token_id
                unconditional = network(hidden, attention_mask).to(dtype)
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            probabilities = torch.softmax(logits, dim=-1)
            fills = block_length // steps_per_block + (step < block_length % steps_per_block)
            filled += fills
            after = text.clone()
            for row in range(batch):
                new = logits[row].argmax(-1)
                confidence = probabilities[row].gather(-1, new[:, None])[:, 0]
                current = probabilities[row].gather(-1, text[row][:, None])[:, 0]
                for column in range(end, text.shape[1]):
                    confidence[column] = -torch.inf
                holes = text[row] == mask_token_id
                for column in torch.topk(torch.where(holes, confidence, -torch.inf), fills).indices.tolist():
                    after[row, column] = new[column]
                if mixing_ratio == 0 or step == 0:
                    continue
                better = ~holes & (new != text[row]) & (confidence >= current)
                edit = min(_budget(filled, mixing_ratio) - edits[row], int(better.sum()))
                for column in torch.topk(torch.where(better, confidence, -torch.inf), edit).indices.tolist():
                    after[row, column] = new[column]
                edits[row] += edit
                total_edits[row] += edit
            text = after
    return text, torch.tensor(total_edits)


def _budget(filled: int, k: float) -> int:
    """floor(filled * k / (1 - k)), every operation rounded to float32."""
    return int(np.floor(np.float32(filled) * np.float32(k) / np.float32(1 - k)))


def integer_model(network, vocab_size: int, mask_token_id: int, dtype: torch.dtype) -> LLaDAForDiffusionLM:
    """A model whose logits are the network's, in `dtype`."""
    sizes = {"d_model": 8, "n_heads": 1, "n_layers": 1, "mlp_hidden_size": 8, "max_sequence_length": 1024}
    ids = {"eos_token_id": 1 if mask_token_id != 1 else 2, "pad_token_id": 3 if mask_token_id != 3 else 4}
    model = tiny_model(vocab_size=vocab_size, mask_token_id=mask_token_id, **sizes, **ids).eval()

    def forward(input_ids, attention_mask=None, position_ids=None, logits_to_keep=None):
        if position_ids is not None:
            raise ValueError("the released code passes no position ids")
        logits = network(input_ids, attention_mask).to(dtype)
        if logits_to_keep is None:
            return SimpleNamespace(logits=logits)
        return SimpleNamespace(
            logits=logits[logits_to_keep if logits_to_keep.ndim == 2 else (slice(None), logits_to_keep)]
        )

    model.forward = forward
    return model


def audit_setting(index: int) -> dict:
    """Setting `index` of the audit: a network, prompts, and options; even ones in float32, odd ones in bfloat16."""
    draw = random.Random(index)
    vocab_size = draw.choice([16, 48, 97])
    mask = draw.choice([0, vocab_size // 2, vocab_size - 1])
    block = draw.choice([4, 8, 16, 32])
    blocks = draw.choice([1, 1, 2, 3])
    batch, prompt = draw.choice([1, 2, 3]), draw.choice([0, 1, 3, 7, 12, 20])
    ids = torch.tensor([[draw.randrange(vocab_size) for _ in range(prompt)] for _ in range(batch)])
    ids = ids.view(batch, prompt).long()
    if draw.random() < 0.7:  # else the prompt may hold masks
        ids[ids == mask] = (mask + 1) % vocab_size
    attention_mask = torch.ones_like(ids)
    if prompt >= 3 and draw.random() < 0.4:
        for row in range(batch):
            attention_mask[row, : draw.randrange(3)] = 0
        ids[attention_mask == 0] = (mask + 2) % vocab_size
    return {
        "network": IntegerNetwork(
            vocab_size,
            mask,
            seed=index,
            levels=draw.choice([2, 16, 64]),
            mask_bonus=draw.choice([-20.0, 0.0, 0.0, 2.0]),
        ),
        "ids": ids,
        "attention_mask": attention_mask,
        "mask_token_id": mask,
        "steps": blocks * draw.randint(1, block),
        "max_new_tokens": blocks * block,
        "block_length": block,
        "mixing_ratio": draw.choice([0.0, 0.05, 0.1, 0.1, 0.2, 0.3, 0.45, 0.5, 0.8, 0.95]),
        "cfg_scale": draw.choice([0.0, 0.0, 0.7, 1.5]),
        "dtype": torch.bfloat16 if index % 2 else torch.float32,
    }


def agrees(setting: dict) -> bool:
    """Whether `generate(reference_compat=True)` gives the restatement's tokens and counts its edits."""
    sequences, edits = released_generation(**setting)
    options = dict(setting)
    network, dtype, ids = (options.pop(name) for name in ("network", "dtype", "ids"))
    model = integer_model(network, network.vocab_size, network.mask_token_id, dtype)
    output = model.generate(ids, **options, reference_compat=True, return_dict_in_generate=True)
    return output.sequences.equal(sequences) and output.num_edits.equal(edits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=600)
    count = parser.parse_args().settings
    found = [agrees(audit_setting(index)) for index in range(count)]
    for dtype, results in (("float32", found[::2]), ("bfloat16", found[1::2])):
        print(f"{dtype}: {sum(results)} of {len(results)} generations agree")


if __name__ == "__main__":
    main()
