"""A second model, which is not LLaDA: what the package asks of a network, and what it refuses to run."""

import math

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from lm_eval.api.instance import Instance
from models import tiny_model
from torch import nn
from training import MASK, VOCAB, documents_and_tokenizer, parameter_gap, state, trainer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.diffusion.gidd import GIDDProcess
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.likelihood import Pair, log_likelihoods
from xdlm_hf.generation.generate import XDLMGenerationMixin
from xdlm_hf.generation.protocol import length_limit, logits_at, runs_in_parts
from xdlm_hf.loading import load
from xdlm_hf.models.registry import MODEL_FAMILIES, register_family
from xdlm_hf.training.adapters import NOISE_FILE, save_noise
from xdlm_hf.training.batch_loss import weighted_loss
from xdlm_hf.training.metrics import flops_per_token

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
SAMPLERS = ({"sampler": "confidence", "mixing_ratio": 0.5}, {"sampler": "ancestral", "mixing_ratio": 0.5})


class SecondConfig(PreTrainedConfig):
    model_type = "second_family"


class Second(XDLMGenerationMixin, PreTrainedModel):
    """Each token with the mean of the text around it."""

    config_class = SecondConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.embedding(input_ids) * text[..., None]
        hidden = hidden + hidden.sum(1, keepdim=True) / text.sum(1)[:, None, None]
        return MaskedLMOutput(logits=self.head(hidden.tanh()))


def second(model_class=Second, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = SecondConfig(**{**sizes, "mask_token_id": MASK, "pad_token_id": 1, "eos_token_id": 1, **options})
    model = model_class(config).eval()
    nn.init.normal_(model.embedding.weight)
    nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def registered():
    register_family(SecondConfig, Second)
    yield
    del MODEL_FAMILIES[SecondConfig]


# --------------------------------------------------------------------------------------------------------------------
# What runs with the defaults of the protocol


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: options["sampler"])
def test_generation(options):
    output = second().generate(IDS, steps=4, max_new_tokens=8, seed=0, **options)
    assert output.shape == (2, 12) and output[:, :4].equal(IDS) and not output.eq(MASK).any()


def test_steps_ask_for_what_the_whole_pass_gives():
    """Four equal samples of one chain: with its logits whole, chosen by the caller, or chosen by the network."""

    class Chooses(Second):
        def forward(self, input_ids, attention_mask=None, logits_to_keep=0):
            asked.append(logits_to_keep)
            logits = super().forward(input_ids, attention_mask).logits
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if isinstance(kept, torch.Tensor) and kept.dtype == torch.bool:
                return MaskedLMOutput(logits=logits[kept])
            return MaskedLMOutput(logits=logits[:, kept])

    for options in SAMPLERS:
        asked = []
        options = {"steps": 4, "max_new_tokens": 8, "attention_mask": PADDED, "seed": 0, "cfg_scale": 0.5, **options}
        assert second(Chooses).generate(IDS, **options).equal(second().generate(IDS, **options))
        assert len(asked) == 8 and all(isinstance(positions, torch.Tensor) for positions in asked)


def test_training(tmp_path):
    run = trainer(tmp_path, model=second(), mixing_ratio=0.1, max_steps=20, eval_rows=8, learning_rate=0.02)
    assert not run._fused  # its output layer is no OutputLayer, so it makes logits
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.5
    assert run.model.config.mixing_ratio == 0.1 and run.model.noise_process().kernel.mixing_ratio == 0.1
    # Two matrices, one of them a lookup, forward and both backward products; attention over 12 tokens.
    assert flops_per_token(run.model, 12) == 6 * 16 * VOCAB + 12 * 16 * 12


class MixedOverTime:
    """A model whose noise is GIDD's: what training asks for."""

    stationary_noise = False

    def noise_process(self, mixing_ratio=None, noise_schedule=None, mask_token_id=None):
        return GIDDProcess(VOCAB, MASK, p_uniform=0.2)


class SecondWithGIDD(MixedOverTime, Second):
    pass


class LLaDAWithGIDD(MixedOverTime, LLaDAForDiffusionLM):
    pass


def noisy_batches(run):
    """The batches of a first optimizer step."""
    run.accelerator.gradient_state._set_sync_gradients(True)
    return run.get_batch_samples(iter(run.get_train_dataloader()), 1, "cpu")[0]


@pytest.mark.parametrize("weighting", ["elbo", "clip", "dynamic"])
@pytest.mark.parametrize("model_class", [SecondWithGIDD, LLaDAWithGIDD])
def test_training_with_noise_that_is_not_stationary(tmp_path, model_class, weighting):
    """The loss is that of the process on the same rows, weighted, from logits and fused; the NELBO is finite."""
    model = second(model_class) if model_class is SecondWithGIDD else model_class(tiny_model().config)
    run = trainer(tmp_path, model=model, max_steps=2, eval_rows=8, t_eps=1e-2, gidd_weighting=weighting)
    nelbo = run.evaluate()["eval_loss"]
    assert nelbo == trainer(tmp_path, model=model, eval_rows=8).evaluate()["eval_loss"]
    assert run._fused == (model_class is LLaDAWithGIDD)
    (batch,) = noisy_batches(run)
    wrong = batch["noise_mask"] & (batch["z_t"] != batch["input_ids"]) & (batch["z_t"] != MASK)
    assert wrong.any() and (batch["z_t"] == MASK).any()
    logits = model(batch["z_t"], attention_mask=batch.get("attention_mask")).logits
    noisy = batch["input_ids"], batch["z_t"], batch["t"]
    expected = model.noise_process().loss(logits, *noisy)
    factor = model.noise_process().weighting_factor(*noisy, weighting)
    assert (factor is None) == (weighting == "elbo")
    gradients = []
    for fused in (False, run._fused):
        total, losses = weighted_loss(model, run.process, batch, fused)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
        gradients += torch.autograd.grad(total, model.get_output_embeddings().weight)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    weights = batch["token_weights"]
    weighted = weights * expected * (1 if factor is None else factor)
    assert run.compute_loss(model, batch).item() == pytest.approx((weighted.sum() / weights.sum()).item())
    before = state(model)
    run.train()
    assert parameter_gap(model, before) > 1e-4
    assert math.isfinite(run.evaluate()["eval_loss"])
    if model_class is SecondWithGIDD:  # no k is stored that the noise does not have, neither here nor beside an adapter
        assert not hasattr(model.config, "mixing_ratio") and not hasattr(model.config, "noise_schedule")
        save_noise(model.config, tmp_path)
        assert not (tmp_path / NOISE_FILE).exists()


def test_noise_that_does_not_belong_to_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mixing_ratio and noise_schedule were given, .* GIDDProcess\(.*: leave them"):
        trainer(tmp_path, model=second(SecondWithGIDD), mixing_ratio=0.1, noise_schedule="linear")
    with pytest.raises(ValueError, match=r"gidd_weighting='dynamic' is not one of \('elbo',\), those of Stationary"):
        trainer(tmp_path, model=second(), gidd_weighting="dynamic")


def test_evaluation(tmp_path, registered):
    """Loaded by name, as any checkpoint: answers, likelihoods, and what is refused by its length."""
    _, tokenizer = documents_and_tokenizer()
    ids = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    second(vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(load(str(tmp_path))[0]) is Second
    lm = XDLMEvalModel(str(tmp_path), device="cpu", batch_size=2, mc_samples=4, max_new_tokens=8, steps=4)
    assert lm.max_length == 64
    answers = [Instance("generate_until", {}, (text, {"until": []}), 0) for text in ("text number", "many")]
    assert len(lm.generate_until(answers)) == 2 and lm.num_forward_passes == 4
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in (("text", " number"), ("many many", " words"))]
    assert all(-1e3 < float(value) < 0 for value, _ in lm.loglikelihood(pairs))
    with pytest.raises(ValueError, match="max_length=65 is more than the model's limit of 64"):
        XDLMEvalModel(str(tmp_path), device="cpu", max_length=65)


def test_a_family_that_is_not_registered_is_refused(tmp_path):
    _, tokenizer = documents_and_tokenizer()
    with pytest.raises(ValueError, match="model_type='second_family' is not a registered .*; registered are 'llada'"):
        XDLMEvalModel(second(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")


# --------------------------------------------------------------------------------------------------------------------
# What a family says of itself


def test_logits_about_the_next_position_are_moved():
    class Next(Second):
        predicts_next = True

        def forward(self, input_ids, attention_mask=None):
            return MaskedLMOutput(logits=super().forward(input_ids, attention_mask).logits.roll(-1, 1))

    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    for positions in (torch.tensor([1, 3]), mask, 3):
        wanted = logits_at(second(), {"input_ids": IDS}, positions)
        assert logits_at(second(Next), {"input_ids": IDS}, positions).equal(wanted)
    pairs = [Pair((7, 8), (9, 10, 11))]
    values = [next(log_likelihoods(model, pairs, 4, 2)) for model in (second(), second(Next))]
    assert values[0] == values[1]
    for options in SAMPLERS:
        texts = [m.generate(IDS, steps=4, max_new_tokens=8, seed=0, **options) for m in (second(), second(Next))]
        assert texts[0].equal(texts[1])


class Timed(Second):
    """Adds its noise level to the first unit; remembers it."""

    conditioning = ("timesteps",)

    def forward(self, input_ids, attention_mask=None, timesteps=None):
        self.seen = [*getattr(self, "seen", []), timesteps]
        bias = nn.functional.one_hot(torch.tensor(7), VOCAB) * timesteps.clamp_max(5)[:, None, None]
        return MaskedLMOutput(logits=super().forward(input_ids, attention_mask).logits + bias)


def test_a_network_that_takes_times_is_given_them():
    model = second(Timed)
    model.generate(IDS, sampler="ancestral", mixing_ratio=0.5, steps=4, max_new_tokens=32, seed=0)
    # sigma_t = -log(1 - t) at t = 1, 3/4, 1/2, 1/4
    expected = [torch.inf, 1.3862944, 0.6931472, 0.2876821]
    assert [sigma.tolist() for sigma in model.seen] == [pytest.approx([value] * 2) for value in expected]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_of_a_network_that_takes_times(tmp_path, schedule):
    """It is given sigma_t = -log alpha_t of each row's own t, on the run's schedule, in training and in evaluation."""
    run = trainer(tmp_path, model=second(Timed), noise_schedule=schedule, max_steps=2, eval_rows=4, nelbo_samples=2)
    (batch,) = noisy_batches(run)
    expected = run.process.alpha(batch["t"]).log().neg().float()
    run.compute_loss(run.model, batch)
    assert run.model.seen[-1].equal(expected) and expected.unique().numel() == len(batch["t"])
    run.train()
    run.model.seen = []
    assert math.isfinite(run.evaluate()["eval_loss"])
    sigma = torch.stack(run.model.seen)  # two draws of each row, one in each half of time
    half = -run.process.alpha(torch.tensor(0.5, dtype=torch.float64)).log().item()
    assert sigma.shape == (2, 4) and ((sigma > half).sum(0) == 1).all()


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_likelihoods_of_a_network_that_takes_times(k):
    """Each draw with its own time, whatever the batches."""
    pairs = [Pair((7, 8), (9, 10, 11)), Pair((), (12, 13))]
    few, many = (list(log_likelihoods(second(Timed, mixing_ratio=k).double(), pairs, 6, rows)) for rows in (1, 4))
    assert few == pytest.approx(many, rel=1e-12)
    untimed = list(log_likelihoods(second(mixing_ratio=k).double(), pairs, 6, 4))
    assert all(abs(a - b) > 1e-3 for a, b in zip(many, untimed, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# What is refused, by name


class Labelled(Second):
    conditioning = ("class_labels",)


class ByBlocks(Second):
    attention = "block_causal"


class WithoutMask(Second):
    def forward(self, input_ids):
        return super().forward(input_ids)


@pytest.mark.parametrize(
    "model_class, options, message",
    [
        (Timed, {}, "Timed takes timesteps, and generation with sampler='confidence' gives none"),
        (Labelled, {}, "Labelled takes class_labels, and generation with sampler='confidence' gives none"),
        (Labelled, {"sampler": "ancestral"}, "Labelled takes class_labels, and generation with sampler='ancestral'"),
        (Second, {"use_cache": "dual"}, "use_cache='dual': Second does not support CanvasCache; leave out"),
        (ByBlocks, {"sampler": "ancestral"}, "ByBlocks has attention='block_causal'; use sampler='confidence'"),
        (WithoutMask, {"attention_mask": PADDED}, "WithoutMask takes no attention_mask, but the rows are padded"),
    ],
    ids=["times", "labels", "labels, ancestral", "cache", "blocks", "padding"],
)
def test_what_a_model_does_not_support_is_refused(model_class, options, message):
    with pytest.raises(ValueError, match=message):
        second(model_class).generate(IDS, steps=4, max_new_tokens=8, **options)


@pytest.mark.parametrize("member, value", [("attention", "block_causal"), ("predicts_next", True)])
def test_a_cache_needs_full_attention_and_logits_in_place(member, value):
    model = tiny_model()
    setattr(model, member, value)
    with pytest.raises(ValueError, match=f"needs {member}=.*LLaDAForDiffusionLM has {member}={value!r}"):
        model.generate(IDS, steps=4, max_new_tokens=8, use_cache="dual")


def test_likelihood_and_training_refuse_labels(tmp_path):
    with pytest.raises(ValueError, match="Labelled takes class_labels, and a likelihood gives none"):
        next(log_likelihoods(second(Labelled), [Pair((7,), (8,))], 4, 2))
    with pytest.raises(ValueError, match="Labelled takes class_labels, and XDLMTrainer gives none"):
        trainer(tmp_path, model=second(Labelled))
    model = second()
    model.predicts_next = True
    with pytest.raises(ValueError, match="Second has predicts_next=True, but XDLMTrainer needs"):
        trainer(tmp_path, model=model)


def test_a_config_without_a_length_is_refused():
    config = SecondConfig(vocab_size=VOCAB, mask_token_id=MASK)
    with pytest.raises(ValueError, match="SecondConfig has no max_position_embeddings"):
        length_limit(config)


# --------------------------------------------------------------------------------------------------------------------
# The backbone may be called without forward only where forward does nothing more


def test_a_forward_of_a_subclass_is_not_passed_by():
    """Ancestral steps run LLaDA's backbone and output layer apart, but not where a subclass changes the logits."""
    plain = tiny_model()

    class OnlySeven(type(plain)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.full_like(output.logits, -1e4).index_fill(-1, torch.tensor(7), 0.0)
            return output

    model = OnlySeven(plain.config).eval()
    assert runs_in_parts(plain) and not runs_in_parts(model)
    assert model.generate(IDS, sampler="ancestral", steps=4, max_new_tokens=8, seed=0)[:, 4:].eq(7).all()


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload], ids=lambda offload: offload.__name__)
@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: options["sampler"])
def test_an_offloaded_model_generates_the_same(tmp_path, offload, options):
    """Between passes its weights are on the meta device, which no text must be sent to."""
    model = tiny_model().eval()
    options = {"attention_mask": PADDED, "steps": 4, "max_new_tokens": 8, "seed": 0, **options}
    expected = model.generate(IDS, **options)
    bound = next(log_likelihoods(model, [Pair((7, 8), (9, 10))], 4, 2))
    folder = (str(tmp_path),) if offload is disk_offload else ()
    model = offload(model, *folder, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert model.generate(IDS, **options).equal(expected)
    assert next(log_likelihoods(model, [Pair((7, 8), (9, 10))], 4, 2)) == bound
