"""The confidences that a history holds, against the network's own probabilities."""

import pytest
import torch
from models import CHECKPOINT
from transformers import AutoModelForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

MASK = 510
PROMPT = torch.tensor([[37, 204, 9], [390, 361, 424]])


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()


def generated(model, **options):
    options = {"input_ids": PROMPT, "max_new_tokens": 16, "output_history": True, "seed": 0} | options
    return model.generate(**options, return_dict_in_generate=True)


class FirstRowEnds(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([True, False])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6, "mixing_ratio": 0.3, "temperature": 0.8, "block_length": 8},
        {"steps": 6, "remasking": "random"},
        {"steps": 8, "refinement": {"policy": "remdm_cap", "rate": 0.5}},
        {"steps": 6, "block_length": 8, "stopping_criteria": StoppingCriteriaList([FirstRowEnds()]), "pad_token_id": 7},
    ],
)
def test_a_token_has_the_probability_of_the_step_that_wrote_it(model, options):
    output = generated(model, **options)
    assert len(output.confidences) == len(output.history) and output.confidences[0].isnan().all()
    expected = output.confidences[0].clone()
    for before, after, confidences in zip(output.history, output.history[1:], output.confidences[1:], strict=False):
        logits = model(before).logits.detach()
        logits[..., MASK] = -torch.inf
        probabilities = logits.softmax(-1).gather(-1, after[..., None]).squeeze(-1).float()
        expected = torch.where(before != after, probabilities, expected).masked_fill(after == MASK, torch.nan)
        torch.testing.assert_close(confidences, expected, equal_nan=True, rtol=1e-6, atol=0)
    ended = "stopping_criteria" in options  # after its first block, so that row 0 keeps 8 holes
    assert expected.isnan().sum(-1).tolist() == [3 + 8 * ended, 3]


@pytest.mark.parametrize("options", [{"sampler": "ancestral"}, {"reference_compat": True}])
def test_samplers_without_confidences(model, options):
    output = generated(model, steps=4, **options)
    assert output.confidences is None and len(output.history) == 5


def test_confidences_are_kept_with_the_history_alone_and_change_no_token(model):
    options = {"steps": 6, "mixing_ratio": 0.3}
    plain = generated(model, **options, output_history=False)
    assert plain.confidences is None and plain.history is None
    assert plain.sequences.equal(generated(model, **options).sequences)
