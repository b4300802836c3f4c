"""A denoising step does not wait for the device, except where it is said to."""

import pytest
import torch
from host_waits import counted_waits
from models import small_model

from xdlm_hf.generation import generate as generate_module

PADDED = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


@pytest.fixture
def loops(monkeypatch):
    """A counter for each denoising loop that ran."""
    denoise, counters = generate_module.denoise, []

    def counted(*arguments):
        with counted_waits() as found:
            counters.append(found)
            return denoise(*arguments)

    monkeypatch.setattr(generate_module, "denoise", counted)
    return counters


def generate(padded=False, **options):
    defaults = {"max_new_tokens": 14, "steps": 6, "block_length": 4, "mixing_ratio": 0.3, "eos_token_id": []}
    prompt = torch.arange(12).reshape(2, 6)
    model = small_model(init_std=0.5)
    mask = PADDED if padded else None
    return model.generate(prompt, attention_mask=mask, **{**defaults, **options}, return_dict_in_generate=True)


@pytest.mark.parametrize(
    "options, padded",
    [
        ({"mixing_ratio": 0.0}, False),
        ({}, False),
        ({"suppress_tokens": [3]}, False),
        ({"cfg_scale": 0.5}, False),
        ({"early_stop": False, "eos_token_id": 21}, False),
        ({"refinement": {"policy": "threshold", "threshold": 0.3, "max_edits_per_token": 2, "off_steps": 1}}, False),
        ({"mixing_ratio": 0.0, "cache": "prefix"}, True),
        ({"mixing_ratio": 0.0, "cache": {"mode": "dual", "refresh": 1}}, True),
        ({"cache": {"mode": "dual", "refresh": 1}}, True),
        ({"compile": "graphs"}, False),
        ({"compile": "graphs", "cache": "prefix"}, True),
        ({"compile": "graphs", "cache": {"mode": "dual", "refresh": 2}}, True),
    ],
    ids=str,
)
def test_a_greedy_loop_never_waits(loops, options, padded):
    output = generate(padded, **options)
    assert output.num_forward_passes >= 6 and not loops[0]


@pytest.mark.parametrize(
    "options, padded, expected",
    [
        # The number of edited columns, once for each full pass with another after it: two blocks have two steps.
        ({"cache": "prefix"}, True, {"_local_scalar_dense": 2}),
        # Transformers asks in each pass whether the mask hides anything.
        ({}, True, {"_local_scalar_dense": 6}),
        # Rows at end of text, after steps 0 and 4 and the 4 blocks, two of which end with these steps.
        ({"mixing_ratio": 0.0, "eos_token_id": 21, "suppress_tokens": [21]}, False, {"_local_scalar_dense": 5}),
    ],
    ids=str,
)
def test_what_waits(loops, options, padded, expected):
    generate(padded, **options)
    assert loops[0] == expected


def test_a_threshold_waits_in_each_step(loops):
    output = generate(parallel_decoding={"threshold": 0.9})
    assert loops[0]["_local_scalar_dense"] >= output.num_forward_passes


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.max().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.__setitem__(x > 0, torch.ones(2)), "index_put_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.repeat_interleave(x.long().abs()), "repeat_interleave"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: torch.tensor([1, 2]), "tensor"),
    ],
)
def test_the_counter_counts(call, name):
    x = torch.tensor([1.0, -1.0, 2.0])
    with counted_waits() as found:
        call(x)
    assert found[name] == 1
