"""Chains of several steps by class, with and without guidance, against the sum over all their paths.

An image of three tokens with four rows has 64 states. Its exact distribution after some steps is the prior times a
64 x 64 matrix for each step: the predictions at every state give the dense posterior (Eq. 2) of each position.
"""

import functools
import itertools

import pytest
import torch
from models import random_dit

from reference import Noise, bayes_posterior, chi_square_p_value, clean_distribution

ROWS, LENGTH, MASK, STEPS = 4, 3, 3, 3
SAMPLES = 5_000  # of each class
STATES = torch.tensor(list(itertools.product(range(ROWS), repeat=LENGTH)))  # (64, 3), counting in base 4
PLACES = ROWS ** torch.arange(LENGTH - 1, -1, -1)


@functools.cache
def network(k):
    """Weights with which tokens depend on each other, on position and on class, and no image is certain."""
    sizes = {"hidden_dim": 16, "n_blocks": 1, "vocab_size": ROWS, "mask_token_id": MASK, "model_length": LENGTH}
    model = random_dit(**sizes, num_classes=2, mixing_ratio=k, use_absolute_position_embeddings=True)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            wide = "adaLN" not in name and ("blocks" in name or "embed." in name)
            torch.nn.init.normal_(weight, std=1.0 if wide else 0.1)
    torch.nn.init.zeros_(model.get_output_embeddings().bias)
    torch.nn.init.normal_(model.backbone.y_embedder.embedding_table.weight, std=2.0)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    return model


def alpha(t):
    """The log-linear schedule."""
    return 1 - (1 - 1e-3) * t


@functools.cache
@torch.no_grad()
def exact(k, label, gamma, steps=STEPS):
    """Probabilities of the 64 images, in the order of STATES; label 2 is the null class."""
    noise, columns = Noise.mixing(ROWS, k, MASK), torch.arange(LENGTH)
    K = noise.kernel()
    by_class, null = (network(k)(STATES, class_labels=torch.full((64,), x)).logits.double() for x in (label, 2))
    guided = (1 + gamma) * by_class.log_softmax(-1) - gamma * null.log_softmax(-1)
    p_x0 = clean_distribution(guided, noise)
    probs = K[0][STATES].prod(-1)  # each row of K is the prior of a position
    for i in range(steps):
        rates = alpha(1 - (i + 1) / steps), alpha(1 - i / steps)
        positions = zip(p_x0.flatten(0, 1), STATES.flatten().tolist(), strict=True)
        posteriors = torch.stack([bayes_posterior(p, z_t, *rates, K) for p, z_t in positions])
        # From each state to each other, (64, 64): the positions are independent given the state.
        probs = probs @ posteriors.view(64, LENGTH, ROWS)[:, columns, STATES].prod(-1)
    return probs


def drawn(k, gamma):
    """How often each image was drawn, (2 classes, 64)."""
    labels = torch.tensor([0, 1]).repeat_interleave(SAMPLES)
    options = {"max_new_tokens": LENGTH, "steps": STEPS, "cfg_scale": gamma, "seed": 0}
    images = network(k).generate(class_labels=labels, **options)
    return [torch.bincount(part @ PLACES, minlength=64) for part in images.split(SAMPLES)]


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_images_have_the_probabilities_of_all_paths(k, gamma):
    """Pearson's test of two classes in six cases: a false alarm once in 8e7 runs. Other laws are far outside."""
    for label, counts in enumerate(drawn(k, gamma)):
        law = exact(k, label, gamma)
        assert law.sum() == pytest.approx(1, abs=1e-9)
        assert chi_square_p_value(counts, law) > 1e-9
        others = {
            "the other class": exact(k, 1 - label, gamma),
            "the other gamma": exact(k, label, 1.5 - gamma),
            "one step": exact(k, label, gamma, steps=1),
            "the positions reversed": law.view(ROWS, ROWS, ROWS).permute(2, 1, 0).flatten(),
        }
        for name, other in others.items():
            assert chi_square_p_value(counts, other) < 1e-20, name
