"""The pixel U-Net and its logistic output: distribution, inputs, the model protocol, and what is refused."""

import subprocess
import sys

import pytest
import torch
from models import tiny_unet
from torch.nn.functional import log_softmax
from training import arguments
from transformers import AutoModelForCausalLM

from xdlm_hf import PixelUNetConfig, PixelUNetForDiffusion, XDLMTrainer
from xdlm_hf.models.unet.logistic_unet import LogisticHead
from xdlm_hf.training.metrics import flops_per_token

IDS = torch.arange(48).view(2, 24) % 8  # two images of 6 x 2 x 2
LABELS = torch.tensor([0, 3])


@pytest.fixture
def model():
    """A model whose last convolution is not zero, as it is before training; in float64, to compare computations."""
    model = tiny_unet().double()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.3)
    return model


# --------------------------------------------------------------------------------------------------------------------
# The output layer


def direct(mu, b, bins):
    """log p of the bins by the difference of two sigmoids, (..., S) float64, in the half where it does not cancel."""
    edges = torch.linspace(-1, 1, bins + 1, dtype=torch.float64)
    x = torch.exp(2 - b)[..., None] * (edges - mu[..., None])
    x = torch.where(x[..., 1:] + x[..., :-1] > 0, -x[..., :-1], x[..., 1:]), x[..., 1:] - x[..., :-1]
    masses = x[0].sigmoid() - (x[0] - x[1]).sigmoid()
    return masses.log() - masses.sum(-1, keepdim=True).log()


def grid():
    mu = torch.linspace(-0.999, 0.999, 41, dtype=torch.float64)
    return torch.stack(torch.meshgrid(mu, torch.linspace(-2, 3, 11, dtype=torch.float64), indexing="ij"), -1)


def test_the_head_is_the_difference_of_two_sigmoids():
    """In float64 to its rounding; in float32 to 3e-5 nats wherever p > 1e-30, where the plain difference is 0."""
    parameters, head = grid(), LogisticHead(256, 256, 257)
    exact = direct(*parameters.unbind(-1), 256)
    double = log_softmax(head(parameters), -1)[..., :256]
    resolved = exact > -60
    assert (double - exact)[resolved].abs().max() < 1e-10
    single = log_softmax(head(parameters.float()), -1)[..., :256]
    assert single.dtype == torch.float32 and (single - double)[double > -69].abs().max() < 3e-5
    assert head(parameters.to(torch.bfloat16)).dtype == torch.float32


def test_inverted_colours_have_inverted_logits():
    head, parameters = LogisticHead(17, 17, 18), grid()
    inverted = head(parameters * torch.tensor([-1.0, 1.0]))
    assert (inverted[..., :17].flip(-1) - head(parameters)[..., :17]).abs().max() < 1e-12


@pytest.mark.parametrize("b", [-1e4, -20.0, 20.0, 1e4])
def test_extreme_scales_have_logits_and_gradients(b):
    parameters = torch.tensor([[-1.0, b], [0.01, b], [1.0, b]], requires_grad=True)
    log_p = log_softmax(LogisticHead(256, 256, 257)(parameters)[..., :256], -1)
    assert torch.isfinite(log_p).all()
    if b < 0:  # one bin has all
        assert log_p.argmax(-1).tolist() == [0, 129, 255] and log_p.amax(-1).min() > -0.7
    else:  # uniform
        assert (log_p.exp() * 256 - 1).abs().max() < 1e-3
    log_p.amax(-1).sum().backward()
    assert torch.isfinite(parameters.grad).all()


def test_rows_without_a_value_are_excluded(model):
    logits = LogisticHead(256, 259, 259)(torch.tensor([0.9, 1.0]))
    assert logits[256:].eq(-torch.inf).all() and logits[:256].isfinite().all()
    assert model(IDS).logits[..., 8].eq(-torch.inf).all()


# --------------------------------------------------------------------------------------------------------------------
# The network


def test_a_new_model_predicts_values_near_its_input():
    """The last convolution and what attention adds start at zero, so that mu = tanh(y) with the scale e^-2."""
    model = tiny_unet()
    hidden = model.backbone(IDS).last_hidden_state
    assert (
        hidden[..., 1].eq(0).all() and (hidden[..., 0] - torch.tanh((2 * IDS.float() + 1) / 8 - 1)).abs().max() < 1e-6
    )
    maps = [part for name, part in model.named_modules() if name.endswith("to_out.0")]
    assert len(maps) == 4 and all(part.weight.eq(0).all() and part.bias.eq(0).all() for part in maps)


def test_every_position_sees_the_class_of_its_row(model):
    labelled, other = model(IDS, class_labels=LABELS).logits, model(IDS, class_labels=LABELS.flip(0)).logits
    assert ((labelled - other)[..., :8].abs().amax(-1) > 0).all()
    alone = torch.cat([model(IDS[i : i + 1], class_labels=LABELS[i : i + 1]).logits for i in range(2)])
    assert (alone - labelled)[..., :8].abs().max() < 1e-9
    assert model(IDS).logits.equal(model(IDS, class_labels=torch.tensor([4, 4])).logits)  # the null class


def test_a_hole_differs_from_every_value(model):
    """With planes of [MASK]: also from a value of 0 on the scale, by the plane alone."""
    outputs = []
    for value in range(9):
        ids = IDS.clone()
        ids[:, 5] = value
        outputs.append(model.backbone(ids).last_hidden_state)
    assert all((outputs[8] - output).abs().max() > 1e-3 for output in outputs[:8])
    values, sample = model.backbone._scaled(torch.tensor([0, 7, 8]).view(1, 3, 1, 1))
    assert values.flatten().tolist() == [-0.875, 0.875, 0.0]
    assert sample.flatten().tolist() == [-0.875, 0.875, 0.0, 0.0, 0.0, 1.0]


def test_without_planes_the_input_is_that_of_the_released_network():
    backbone = tiny_unet(mask_channels=False, num_values=256, vocab_size=None, mask_token_id=None).backbone
    values, sample = backbone._scaled(torch.tensor([0, 255, 256]).view(1, 3, 1, 1))
    assert sample.equal(values) and values.flatten().tolist() == pytest.approx([-1, 510 / 259 - 1, 512 / 259 - 1])


def test_times_are_inputs_of_a_network_conditioned_on_them():
    model = tiny_unet(time_conditioning=True, mixing_ratio=0.1)
    torch.nn.init.normal_(model.unet.conv_out.weight)
    sigma = model.timesteps(torch.tensor([0.1, 1.0]))
    assert sigma.tolist() == pytest.approx([0.105, 6.908], abs=1e-3) and model.conditioning == ("timesteps",)
    outputs = [model(IDS, timesteps=s).logits[..., :8] for s in (sigma, sigma.flip(0))]
    assert (outputs[0] - outputs[1]).abs().amax((1, 2)).min() > 1e-3
    assert model.generate(steps=2, seed=0).max() < 8
    with pytest.raises(ValueError, match="timesteps are missing"):
        model(IDS)


def test_logits_are_kept_where_they_are_asked_for(model):
    whole, mask = model(IDS).logits, IDS < 3
    assert model(IDS, logits_to_keep=mask).logits.equal(whole[mask])
    assert model(IDS, logits_to_keep=torch.tensor([3, 0])).logits.equal(whole[:, [3, 0]])
    assert model(IDS, logits_to_keep=2).logits.equal(whole[:, -2:])


def test_half_precision_has_float32_logits(model):
    whole = model(IDS, class_labels=LABELS).logits
    logits = model.to(torch.bfloat16)(IDS, class_labels=LABELS).logits
    assert logits.dtype == torch.float32 and (logits - whole)[..., :8].abs().max() < 0.05 * whole[..., :8].abs().max()


def test_the_papers_network_has_its_size_and_operations():
    """35,755,398 parameters, and 6.2e9 multiplications of an image."""
    with torch.device("meta"):
        model = PixelUNetForDiffusion(PixelUNetConfig(num_classes=10, mask_channels=False))
    assert model.num_parameters() == 35_755_398
    assert model.config.max_position_embeddings == 3072 and model.config.vocab_size == 259
    assert flops_per_token(model, 3072) * 3072 / 6 == pytest.approx(6.2e9, rel=0.01)
    with torch.device("meta"):
        assert PixelUNetForDiffusion(PixelUNetConfig(num_classes=10)).num_parameters() == 35_755_398 + 3456


# --------------------------------------------------------------------------------------------------------------------
# The model protocol


def test_a_saved_model_is_the_same(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PixelUNetForDiffusion
    assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in PixelUNetConfig.__annotations__)
    assert loaded(IDS, class_labels=LABELS).logits.equal(model(IDS, class_labels=LABELS).logits)
    assert (loaded.generation_config.sampler, loaded.generation_config.max_new_tokens) == ("ancestral", 24)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone"}


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_generation_gives_images(model, k):
    """Also where uniform noise draws [MASK]: its row is excluded from the network's distribution at every k."""
    samples = model.generate(steps=3, mixing_ratio=k, num_return_sequences=4, seed=0)
    assert samples.shape == (4, 24) and samples.max() < 8 and samples.unique().numel() > 4


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_the_loss_is_finite_and_falls(tmp_path, k):
    rows = [{"input_ids": row.tolist()} for row in IDS.repeat(8, 1)]
    model = tiny_unet(dropout=0.0)
    options = arguments(tmp_path, mixing_ratio=k, max_steps=12, learning_rate=3e-3)
    run = XDLMTrainer(model=model, args=options, train_dataset=rows, eval_dataset=rows[:4])
    assert not run._fused
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradients_do_not_depend_on_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_unet(dropout=0.0).double()
        model.train()
        torch.nn.init.ones_(model.unet.conv_out.weight)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        log_softmax(model(IDS, class_labels=LABELS).logits[..., :8], -1)[..., 0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (
        gradients[0].isfinite().all() and (gradients[0] - gradients[1]).abs().max() < 1e-12 * gradients[0].abs().max()
    )


def test_noise_of_gidd():
    model = tiny_unet(noise_process="gidd", p_uniform=0.1)
    assert not model.stationary_noise and "p_uniform=0.1" in repr(model.noise_process())
    assert model.generate(steps=3, seed=0).max() < 8


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 3}, "image_size=3 cannot be halved 1 times"),
        ({"attention_levels": [2]}, r"attention_levels=\[2\] must lie in 0..1"),
        ({"channel_multipliers": []}, "channel_multipliers=.. must be positive"),
        ({"vocab_size": 12}, r"vocab_size=12 must be num_values \+ 1 = 9 with mask_channels=True"),
        ({"vocab_size": 8, "mask_channels": False}, "vocab_size=8 must be num_values . 1 = 9 or more"),
        ({"mask_token_id": 3}, "mask_token_id=3 must be the id after the values, num_values=8"),
        ({"num_classes": 0}, "num_classes=0 must be positive"),
        ({"label_dropout": 1.0}, "label_dropout=1.0 must lie in"),
        ({"mixing_ratio": 2.0}, "mixing_ratio=2.0 must lie in"),
        ({"channels": 0}, "channels=0 must be positive"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)


def test_inputs_that_do_not_fit_are_refused(model):
    for inputs, message in (
        ({"input_ids": IDS[:, :5]}, r"must be \(B, 24\), the values of an image of 6 x 2 x 2"),
        ({"input_ids": IDS, "class_labels": torch.tensor([0, 5])}, "class_labels holds token id 5"),
        ({"input_ids": IDS, "class_labels": torch.tensor([0])}, r"class_labels of shape \(1,\)"),
        ({"input_ids": IDS, "timesteps": torch.zeros(2)}, "time_conditioning=False"),
        ({"input_ids": IDS, "labels": IDS}, "labels are not supported"),
        ({"input_ids": IDS, "attention_msk": IDS}, "no argument 'attention_msk'"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states=True is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match="num_classes=None"):
        tiny_unet(num_classes=None)(IDS, class_labels=LABELS)
    with pytest.raises(ValueError, match="more than the model's limit of 24"):
        model.generate(max_new_tokens=30)
    with pytest.raises(ValueError, match="max_new_tokens=24"):
        model.generate(max_new_tokens=12)
    with pytest.raises(ValueError, match="rows of a pixel U-Net"):
        model.resize_token_embeddings(12)


def test_diffusers_is_imported_with_the_first_model():
    script = (
        "import sys, transformers, xdlm_hf; config = xdlm_hf.PixelUNetConfig(); xdlm_hf.PixelUNetForDiffusion\n"
        "assert 'diffusers' not in sys.modules; sys.modules['diffusers'] = None\n"
        "xdlm_hf.PixelUNetForDiffusion(config)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: PixelUNetForDiffusion needs diffusers: pip install 'xdlm_hf[images]'." in ran.stderr
