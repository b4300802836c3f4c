"""Generation from class labels, and guidance against the null class."""

import pytest
import torch
from models import random_dit, small_model
from torch.nn.functional import log_softmax
from transformers import LogitsProcessor

CLASSES, MASK, LENGTH = 5, 39, 8
LABELS = torch.tensor([3, 0, 5])  # 5 is the null class


class Recorder(LogitsProcessor):
    """Keeps the logits of every call, after guidance."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


def generate(model, **options):
    return model.generate(**{"steps": 4, "max_new_tokens": LENGTH, "seed": 0, **options})


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_logits_are_those_of_the_formula(sampler, gamma):
    """(1 + gamma) log p(x | z, class) - gamma log p(x | z, null), normalised; the null class guides nothing."""
    model, recorder = random_dit(num_classes=CLASSES).double(), Recorder()
    generate(model, class_labels=LABELS, cfg_scale=gamma, sampler=sampler, logits_processor=[recorder], steps=1)
    z, logits = recorder.calls[0]
    assert len(z) == 3 * LENGTH
    with torch.no_grad():
        conditional, null = (log_softmax(model(z[::LENGTH], class_labels=x).logits, -1) for x in (LABELS, None))
    guided = log_softmax(conditional + gamma * (conditional - null), -1)
    torch.testing.assert_close(log_softmax(logits, -1).view(3, LENGTH, -1), guided, rtol=0, atol=1e-9)
    assert (guided[:2] - null[:2]).abs().max() > 0.01 and (guided[2] - null[2]).abs().max() < 1e-12


def test_guidance_is_one_batch_and_nothing_without_it():
    model, batches = random_dit(num_classes=CLASSES), []
    model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: batches.append(inputs["class_labels"].tolist()), with_kwargs=True
    )
    for gamma, labels in ((0.0, [3, 0, 5]), (2.0, [3, 0, 5, 5, 5, 5])):
        batches.clear()
        output = generate(model, class_labels=LABELS, cfg_scale=gamma, return_dict_in_generate=True)
        assert batches == [labels] * 4 and output.num_forward_passes == 4 * (2 if gamma else 1)


def test_guidance_by_class_needs_no_mask_token():
    model = random_dit(num_classes=CLASSES, mixing_ratio=1.0)
    model.config.mask_token_id = None
    assert generate(model, class_labels=LABELS, cfg_scale=1.0).shape == (3, LENGTH)


def test_the_null_class_is_no_label():
    model = random_dit(num_classes=CLASSES).double()
    texts = [generate(model, num_return_sequences=3), generate(model, class_labels=[5, 5, 5])]
    assert texts[0].equal(texts[1]) and not texts[0].equal(generate(model, class_labels=[3, 3, 3]))


def test_labels_follow_their_rows():
    """Repeated for each sequence of a prompt, and kept with it when rows before it are done."""
    model = random_dit(num_classes=CLASSES, pad_token_id=38).double()
    prompt = torch.randint(0, 38, (2, 3), generator=torch.Generator().manual_seed(1))
    padded = {"input_ids": prompt, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["class_labels"].tolist()), with_kwargs=True
    )

    class Stops:
        """Ends the first row after the first block."""

        def __call__(self, ids, scores, **kwargs):
            return torch.tensor([row == 0 for row in range(len(ids))])

    options = {"sampler": "confidence", "block_length": 4, "mixing_ratio": 0.0, "cfg_scale": 1.0}
    generate(model, **padded, class_labels=[4, 1], num_return_sequences=2, stopping_criteria=[Stops()], **options)
    assert seen[0] == [4, 4, 1, 1, 5, 5, 5, 5] and seen[-1] == [4, 1, 1, 5, 5, 5]
    together = generate(model, **padded, class_labels=[4, 1], **options)
    alone = generate(model, input_ids=prompt[:1, 1:], class_labels=[4], **options)
    assert together[0, 1:].equal(alone[0])


def test_holes_are_filled_by_class():
    model, text = random_dit(num_classes=CLASSES).double(), torch.arange(8)[None].repeat(2, 1)
    filled = model.generate(text, holes=[(2, 6)], class_labels=[0, 3], seed=0, steps=2)
    assert filled[:, [0, 1, 6, 7]].equal(text[:, [0, 1, 6, 7]])
    assert not filled.equal(model.generate(text, holes=[(2, 6)], class_labels=[3, 0], seed=0, steps=2))


def test_samples_have_the_probabilities_of_their_class():
    """One step from all masks draws each token from p(x | masks, class), exactly; 6 standard deviations of 2 x 4,000
    rows, 2 x 2 x 3 frequencies: a false alarm once in 4e7 runs."""
    model = random_dit(num_classes=2, vocab_size=4, mask_token_id=3)
    labels = torch.tensor([0, 1]).repeat_interleave(4000)
    samples = generate(model, class_labels=labels, max_new_tokens=2, steps=1)
    with torch.no_grad():
        p = model(torch.full((2, 2), 3), class_labels=torch.tensor([0, 1])).logits[..., :3].softmax(-1)
    found = torch.stack([(samples == token).view(2, 4000, 2).double().mean(1) for token in range(3)], -1)
    assert ((found - p) / (p * (1 - p) / 4000).sqrt()).abs().max() < 6
    assert (p[0] - p[1]).abs().max() > 0.1


def test_rows_that_the_network_excludes_stay_excluded():
    """Guidance of -inf against -inf is not NaN."""
    model, recorder = random_dit(num_classes=CLASSES), Recorder()
    with torch.no_grad():
        model.get_output_embeddings().bias[MASK] = -torch.inf
    generate(model, class_labels=LABELS, cfg_scale=1.0, logits_processor=[recorder])
    assert all((logits[:, MASK] == -torch.inf).all() and not logits.isnan().any() for _, logits in recorder.calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [0, 6]}, r"class_labels.*6"),
        ({"class_labels": [-1]}, r"class_labels.*-1"),
        ({"class_labels": [0.5]}, r"class_labels=\[0.5\] must be integers of shape \(B,\)"),
        ({"class_labels": []}, r"must be integers of shape \(B,\) with B >= 1"),
        ({"class_labels": [0, 1], "input_ids": torch.zeros(3, 2).long()}, "2 class_labels do not fit .* 3 rows"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0 guides DiTForDiffusionLM against its null class and needs class_labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(random_dit(num_classes=CLASSES), **options)


def test_a_model_without_classes_takes_no_labels():
    with pytest.raises(ValueError, match="class_labels were given, but LLaDAForDiffusionLM has no classes"):
        generate(small_model(), class_labels=[0])
    with pytest.raises(ValueError, match="against its null class and needs class_labels"):
        random_dit(num_classes=CLASSES, mixing_ratio=0.5).revise(torch.ones(1, 4).long(), cfg_scale=1.0)
