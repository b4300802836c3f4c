"""Perturbed logits: their distribution, and that they depend on text, seed and repetition alone."""

import pytest
import torch
from models import tiny_model

from xdlm_hf.evaluation.perturbation import Perturbation
from xdlm_hf.generation.cache import CanvasCache

TEXTS = [[7, 3, 9, 11, 4, 5, 5, 5], [8, 5, 5, 5], [8, 9, 5, 5, 5, 5]]  # 5 is the mask


def noise(model, device, **inputs):
    """Noise on the logits of one forward pass, in float32."""
    with torch.no_grad():
        plain = model(**inputs).logits.float()
        with device.of(model):
            return model(**inputs).logits - plain


def ids(*rows):
    return torch.tensor([list(row) for row in rows])


def test_noise_is_normal_with_the_given_deviation():
    model = tiny_model()
    found = noise(model, Perturbation(repetition=1, noise=0.5, seed=0), input_ids=ids(range(40)))
    number = found.numel()  # bounds of 6 standard errors: false alarms of 2e-9
    assert number == 40 * 48
    assert abs(found.mean()) < 6 * 0.5 / number**0.5
    assert abs(found.std() - 0.5) < 6 * 0.5 / (2 * number) ** 0.5
    assert abs((found / 0.5).pow(4).mean() - 3) < 6 * 96**0.5 / number**0.5


def test_low_precision_logits_are_perturbed_in_float32_and_only_within_the_context():
    model = tiny_model().bfloat16()
    inputs = {"input_ids": ids(TEXTS[0])}
    device = Perturbation(repetition=1, noise=1e-3, seed=0)  # less than the spacing of bfloat16 around 1
    with torch.no_grad():
        plain = model(**inputs).logits
        with pytest.raises(KeyError), device.of(model):
            assert model(**inputs).logits.dtype == torch.float32
            raise KeyError
        assert torch.equal(model(**inputs).logits, plain)
    assert 0.5e-3 < noise(model, device, **inputs).std() < 2e-3
    assert model.double()(**inputs).logits.dtype == torch.float64
    assert noise(model, device, **inputs).dtype == torch.float64


def test_noise_is_a_function_of_text_seed_and_repetition():
    model, device = tiny_model(), Perturbation(repetition=1, noise=1.0, seed=0)
    first = noise(model, device, input_ids=ids(TEXTS[0]))
    torch.testing.assert_close(noise(model, device, input_ids=ids(TEXTS[0])), first)
    for other in (Perturbation(2, 1.0, 0), Perturbation(1, 1.0, 1)):
        assert abs((noise(model, other, input_ids=ids(TEXTS[0])) * first).mean()) < 0.3
    edited = ids(TEXTS[0])
    edited[0, 0] += 1
    assert abs((noise(model, device, input_ids=edited) * first).mean()) < 0.3  # 384 products: 6 standard errors


@pytest.mark.parametrize("columns", [None, [-3, -2, -1]], ids=["all columns", "last columns"])
def test_noise_of_a_row_does_not_depend_on_its_batch(columns):
    model, device = tiny_model(), Perturbation(repetition=3, noise=1.0, seed=5)
    longest = max(map(len, TEXTS))
    padding = [longest - len(text) for text in TEXTS]
    mask = ids(*([0] * n + [1] * (longest - n) for n in padding))
    inputs = {
        "input_ids": ids(*([2] * n + text for n, text in zip(padding, TEXTS, strict=True))),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
    kept = {} if columns is None else {"logits_to_keep": torch.tensor(columns) + longest}
    together = noise(model, device, **inputs, **kept)
    for row, text in enumerate(TEXTS):
        kept = {} if columns is None else {"logits_to_keep": torch.tensor(columns) + len(text)}
        alone = noise(model, device, input_ids=ids(text), **kept)[0]
        found = together[row][padding[row] if columns is None else 0 :]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)  # float32 logits of order 1, rounded twice


def test_noise_of_cached_passes_counts_a_padding_column_once():
    # The second row has no edited column before its block, and repeats the block's last column in its place.
    model, device = tiny_model(), Perturbation(repetition=3, noise=1.0, seed=5)
    text, columns = TEXTS[0], ids([5, 6, 7])

    def cached(columns):
        cache = CanvasCache(model.config.num_hidden_layers)
        with torch.no_grad():
            model(input_ids=ids(text), past_key_values=cache.at(None))
        inputs = {"input_ids": ids(text).gather(1, columns), "position_ids": columns}
        return noise(model, device, **inputs, past_key_values=cache.at(columns))

    alone, padded = cached(columns), cached(ids([7, 5, 6, 7]))
    torch.testing.assert_close(padded[:, 1:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[:, 0], alone[:, -1], rtol=0, atol=1e-5)
