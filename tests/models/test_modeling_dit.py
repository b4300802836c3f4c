"""DiT: the public formats both ways, and the numbers that the authors' code recorded for them."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from models import DIT, random_dit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xdlm_hf import DiTConfig, DiTForDiffusionLM, GIDDProcess, XDLMGenerationConfig
from xdlm_hf.models.dit.configuration_dit import DUOConfig, UDLMConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-dit"
EXPECTED = load_file(FIXTURE / "expected.safetensors")
ORDER = json.loads((FIXTURE / "expected.json").read_text())["parameter_order_of_ema_shadow_params"]
IDS = torch.randint(0, 39, (2, 9), generator=torch.Generator().manual_seed(3))


def recorded(**options):
    return DiTForDiffusionLM.from_pretrained(FIXTURE, **options).eval()


def difference(a, b):
    return (a - b).abs().max().item()


# --- the recorded network -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_every_block_are_the_recorded_ones():
    model, blocks = recorded(), []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _, __, output: blocks.append(output))
    output = model(EXPECTED["zt"], output_hidden_states=True)
    assert difference(output.logits, EXPECTED["logits_sigma_zero"]) < 1e-5
    for i, block in enumerate(blocks):
        assert difference(block, EXPECTED[f"sigma_zero.block{i}"]) < 1e-5
    assert len(blocks) == 2
    assert difference(output.hidden_states[-1], EXPECTED["sigma_zero.final_linear_input"]) < 1e-5


@torch.no_grad()
def test_logits_at_three_noise_levels_are_the_recorded_ones():
    model = recorded(time_conditioning=True)
    sigma = EXPECTED["sigma"]
    assert sigma.tolist() == pytest.approx([0, 0.3, 2.5])
    assert difference(model(EXPECTED["zt"], timesteps=sigma).logits, EXPECTED["logits_sigma"]) < 1e-5
    condition, constant = model.backbone._condition(sigma, None, sigma.device)
    assert difference(condition, EXPECTED["cond_sigma"]) < 1e-6 and not constant
    condition, constant = recorded().backbone._condition(None, None, sigma.device)
    assert difference(condition, EXPECTED["cond_sigma_zero"]) < 1e-6 and constant


@torch.no_grad()
def test_eager_attention_gives_what_sdpa_gives():
    eager = recorded(attn_implementation="eager")
    output = eager(EXPECTED["zt"], output_attentions=True)
    assert difference(output.logits, EXPECTED["logits_sigma_zero"]) < 1e-5
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 3, 24, 24)] * 2
    assert difference(output.attentions[0].sum(-1), torch.ones(3, 3, 24)) < 1e-5


@torch.no_grad()
def test_bfloat16_errs_no_more_than_rounding_weights_and_branches():
    """Norms, rotation and softmax are wider: the error is that of 8 bits in weights and branches, 2^-8 of the size."""
    exact = recorded().double()(EXPECTED["zt"]).logits
    low = recorded(dtype="bfloat16")(EXPECTED["zt"])
    assert low.logits.dtype == torch.bfloat16
    error = (low.logits.double() - exact).norm() / exact.norm()
    assert error < 4 * 2**-8
    assert difference(recorded()(EXPECTED["zt"]).logits.double(), exact) < 1e-5


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    recorded().save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (FIXTURE, tmp_path))
    assert list(before) == list(after) and all(before[name].equal(after[name]) for name in before)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURE))
    for name in set(theirs) - {"architectures", "torch_dtype"}:
        assert ours[name] == theirs[name]
    # And what the format does not say, so that the next reader need not guess.
    assert ours["mask_token_id"] == 60 and ours["mixing_ratio"] == 0 and ours["noise_schedule"] == "loglinear"
    assert json.loads((tmp_path / "generation_config.json").read_text())["sampler"] == "ancestral"
    read = DiTForDiffusionLM.from_pretrained(tmp_path).state_dict()
    assert all(read[name].equal(before[name]) for name in before)


def test_parameters_stand_in_the_order_of_ema_files():
    assert [name for name, _ in recorded().named_parameters()] == ORDER


def changed(tmp_path, change):
    shutil.copytree(FIXTURE, tmp_path / "changed")
    weights = load_file(FIXTURE / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    return tmp_path / "changed"


def test_the_rotary_buffer_of_the_original_code_is_dropped(tmp_path):
    folder = changed(tmp_path, lambda weights: weights.update({"backbone.rotary_emb.inv_freq": torch.ones(8)}))
    read, wanted = DiTForDiffusionLM.from_pretrained(folder).state_dict(), recorded().state_dict()
    assert list(read) == list(wanted) and all(read[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("backbone.blocks.1.mlp.0.bias"), r"lacks backbone\.blocks\.1\.mlp\.0\.bias"),
        (
            lambda w: w.update({"backbone.cond_map.weight": torch.ones(3)}),
            r"The model does not have backbone\.cond_map\.weight",
        ),
        (
            lambda w: w.update({"backbone.output_layer.linear.bias": torch.ones(60)}),
            r"The checkpoint has backbone\.output_layer\.linear\.bias \(60,\) instead of \(61,\)",
        ),
    ],
)
def test_foreign_tensors_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        DiTForDiffusionLM.from_pretrained(changed(tmp_path, change))


@pytest.mark.parametrize(
    "model_type, extra, k, timed, mask",
    [
        ("mdlm", {}, 0.0, False, 60),
        ("udlm", {"cfg": False, "cfg_num_classes": -1, "time_conditioning": True}, 1.0, True, None),
        ("DUO", {"causal": False, "var_min": True}, 1.0, True, None),
    ],
)
def test_the_three_formats(tmp_path, model_type, extra, k, timed, mask):
    shutil.copytree(FIXTURE, tmp_path / "model")
    config = json.loads((FIXTURE / "config.json").read_text())
    del config["time_conditioning"]
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "configuration_x.XConfig"}, **extra}
    config |= {"return_dict": False, "tie_word_embeddings": True, "use_cache": False}  # Transformers' own
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for source in (AutoModelForCausalLM, AutoModel, DiTForDiffusionLM):
        model = source.from_pretrained(tmp_path / "model")
        assert isinstance(model, DiTForDiffusionLM) and model.config.model_type == model_type
        assert (model.config.mixing_ratio, model.config.time_conditioning) == (k, timed)
        assert model.config.mask_token_id == mask and model.noise_kernel().mixing_ratio == k
        assert model.conditioning == (("timesteps",) if timed else ())
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["model_type"] == model_type and all(saved[name] == value for name, value in extra.items())
    assert "auto_map" not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    times = {"timesteps": EXPECTED["sigma"]} if timed else {}
    wanted = EXPECTED["logits_sigma" if timed else "logits_sigma_zero"]
    assert difference(again(EXPECTED["zt"], **times).logits, wanted) < 1e-5
    logits, *_ = again(EXPECTED["zt"], **times, return_dict=False)
    assert difference(logits, wanted) < 1e-5
    assert again.generate(steps=2, max_new_tokens=8, seed=0).shape == (1, 8)


# --- the config -----------------------------------------------------------------------------------------------------


def test_standard_names_read_and_write_the_fields():
    config = DiTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=7)
    assert (config.hidden_dim, config.n_blocks, config.n_heads, config.model_length) == (24, 3, 2, 7)
    assert (config.intermediate_size, config.num_key_value_heads, config.hidden_size) == (96, 2, 24)
    assert (config.mask_token_id, config.mixing_ratio) == (50257, 0.0)
    assert "hidden_size" not in config.to_dict()


@pytest.mark.parametrize(
    "family, options, message",
    [
        (DiTConfig, {"hidden_dim": 30}, "hidden_dim=30 is not a multiple of n_heads=12"),
        (DiTConfig, {"hidden_dim": 36}, "heads of odd width 3"),
        (DiTConfig, {"n_blocks": 0}, "n_blocks=0 must be positive"),
        (DiTConfig, {"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        (DiTConfig, {"num_classes": 0}, "num_classes=0 must be positive"),
        (DiTConfig, {"mask_token_id": 50258}, "mask_token_id=50258 is not a row"),
        (DiTConfig, {"mixing_ratio": 1.5}, r"mixing_ratio=1.5 must lie in \[0, 1\]"),
        (DiTConfig, {"noise_schedule": "square"}, "noise_schedule='square' is not known"),
        (DiTConfig, {"noise_process": "gaussian"}, "noise_process='gaussian' is not known"),
        (DiTConfig, {"p_uniform": 0.1}, "p_uniform=0.1 is GIDD's share .* use noise_process='gidd'"),
        (DiTConfig, {"noise_process": "gidd", "p_uniform": 1.0}, r"p_uniform=1.0 must lie in \[0, 1\)"),
        (
            DiTConfig,
            {"noise_process": "gidd", "mixing_ratio": 0.1},
            "mixing_ratio=0.1 does not apply to noise_process='gidd'",
        ),
        (DiTConfig, {"noise_process": "gidd", "noise_schedule": "linear"}, "'gidd' has its own schedule"),
        (UDLMConfig, {"noise_process": "gidd", "mixing_ratio": 0.0}, "'gidd' needs a mask_token_id"),
        (UDLMConfig, {"cfg": True}, "cfg=True: the class labels of UDLM's own code"),
        (DUOConfig, {"causal": True}, "causal=True is the format's autoregressive baseline"),
    ],
)
def test_impossible_configs_are_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        family(**options)


def test_keyword_overrides_are_checked_too():
    with pytest.raises(ValueError, match="mixing_ratio=2.0"):
        AutoConfig.from_pretrained(FIXTURE, mixing_ratio=2.0)
    config = AutoConfig.from_pretrained(FIXTURE, noise_process="gidd", vocab_size=64, hidden_size=60)
    assert (config.noise_schedule, config.mask_token_id, config.hidden_dim) == (None, 63, 60)


# --- noise and times ------------------------------------------------------------------------------------------------


def test_the_noise_of_a_gidd_config():
    model = random_dit(noise_process="gidd", p_uniform=0.2)
    process = model.noise_process()
    assert isinstance(process, GIDDProcess) and (process.p_uniform, process.mask_token_id) == (0.2, 39)
    assert model.config.noise_schedule is None
    with pytest.raises(ValueError, match="the kernel of GIDDProcess.* changes with time; use noise_process"):
        model.noise_kernel()
    assert model.generate(steps=4, max_new_tokens=8, seed=0).shape == (1, 8)
    with pytest.raises(ValueError, match="mixing_ratio=0.1 does not apply to noise_process='gidd'"):
        model.generate(steps=4, max_new_tokens=8, mixing_ratio=0.1)
    with pytest.raises(ValueError, match="noise_schedule='linear' does not apply to noise_process='gidd'"):
        model.noise_process(noise_schedule="linear")
    # There it is the budget of edits.
    assert model.generate(steps=4, max_new_tokens=8, mixing_ratio=0.1, sampler="confidence").shape == (1, 8)


def test_noise_levels_of_times():
    t = torch.tensor([0.0, 0.5, 1.0])
    levels = random_dit(time_conditioning=True).timesteps(t)
    torch.testing.assert_close(levels, -torch.log(1 - 0.999 * t))
    # alpha_1 = 0 would be an infinite level.
    levels = random_dit(time_conditioning=True, noise_schedule="linear").timesteps(t)
    assert levels[2].item() == pytest.approx(-math.log(1e-3))


@pytest.mark.parametrize(
    "config, inputs, message",
    [
        ({"time_conditioning": True}, {}, "timesteps are missing: this network has time_conditioning=True"),
        ({}, {"timesteps": torch.zeros(2)}, "timesteps were given, but this network has time_conditioning=False"),
        (
            {"time_conditioning": True},
            {"timesteps": torch.zeros(1)},
            r"timesteps of shape \(1,\) must be \(B,\) = \(2,\)",
        ),
        ({}, {"class_labels": torch.zeros(2).long()}, "class_labels were given, but this network has num_classes=None"),
        ({"num_classes": 5}, {"class_labels": torch.tensor([0, 6])}, "6"),
        ({}, {"labels": IDS}, "labels are not supported"),
        ({}, {"use_cache": True}, "DiT's forward has no argument 'use_cache'"),
        ({}, {"logits_to_keep": -1}, "logits_to_keep=-1 must not be negative"),
        ({}, {"inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one of input_ids"),
        ({}, {"attention_mask": torch.ones(2, 8)}, r"attention_mask of shape \(2, 8\) does not fit"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(config, inputs, message):
    with pytest.raises(ValueError, match=message):
        random_dit(**config)(IDS, **inputs)


def test_a_network_with_times_generates_by_the_ancestral_sampler_alone():
    model = random_dit(time_conditioning=True, noise_schedule="linear")  # also from alpha = 0
    assert model.generate(steps=4, max_new_tokens=8, seed=0).shape == (1, 8)
    with pytest.raises(ValueError, match="takes timesteps, and generation with sampler='confidence' gives none"):
        model.generate(steps=4, max_new_tokens=8, sampler="confidence")


# --- class labels ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_label_is_the_null_class():
    model = random_dit(num_classes=5).double()
    null = model(IDS, class_labels=torch.tensor([5, 5])).logits
    assert difference(model(IDS).logits, null) < 1e-12
    assert difference(model(IDS, class_labels=torch.tensor([5, 2])).logits[0], null[0]) < 1e-12
    assert difference(model(IDS, class_labels=torch.tensor([5, 2])).logits[1], null[1]) > 1e-3
    both = random_dit(num_classes=5, time_conditioning=True)
    assert both(IDS, timesteps=torch.ones(2), class_labels=torch.tensor([1, 2])).logits.shape == (2, 9, 40)


@torch.no_grad()
def test_forward_drops_no_labels():
    """The trainer does, from the generators of the rows."""
    model, labels = random_dit(num_classes=5, label_dropout=0.99, dropout=0.0), torch.tensor([1, 2])
    assert model(IDS, class_labels=labels).logits.equal(model.train()(IDS, class_labels=labels).logits)


# --- padding, positions, parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_padded_row_is_the_shorter_row(attn_implementation):
    model = random_dit(attn_implementation=attn_implementation).double()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    padded = model(IDS, attention_mask=mask).logits
    assert difference(padded[1, 4:], model(IDS[1:, 4:]).logits[0]) < 1e-6  # rotary angles are float32
    assert difference(padded[0], model(IDS).logits[0]) < 1e-12
    four = mask.bool()[:, None, None, :].expand(2, 1, 9, 9)
    assert difference(model(IDS, attention_mask=four).logits[1, 4:], padded[1, 4:]) < 1e-12


@torch.no_grad()
def test_logits_of_some_positions():
    model, mask = random_dit(), torch.rand(2, 9) < 0.5
    whole = model(IDS).logits
    assert difference(model(IDS, logits_to_keep=3).logits, whole[:, -3:]) < 1e-6
    assert difference(model(IDS, logits_to_keep=torch.tensor([1, 7])).logits, whole[:, [1, 7]]) < 1e-6
    assert difference(model(IDS, logits_to_keep=mask).logits, whole[mask]) < 1e-6
    embeds = model.get_input_embeddings()(IDS)
    assert model(inputs_embeds=embeds).logits.equal(whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = random_dit(dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(IDS).logits.square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(difference(a, b) <= 1e-5 * a.abs().max() for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])  # no parameter is unused


# --- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_model_predicts_all_tokens_alike():
    torch.manual_seed(0)
    model = DiTForDiffusionLM(DiTConfig(**DIT, num_classes=3, use_absolute_position_embeddings=True))
    assert model(IDS).logits.eq(0).all()
    for name, weight in model.named_parameters():
        if "adaLN" in name or "output_layer.linear" in name:
            assert weight.eq(0).all(), name
        elif "norm" in name:
            assert weight.eq(1).all(), name
        elif "embedding_table" not in name:
            fan_in = dict(model.named_parameters())[name.replace("bias", "weight")].shape[1]
            assert 0.8 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5, name


def test_tensors_that_a_file_lacks_are_not_made_up(tmp_path):
    random_dit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_blocks": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks backbone.blocks.2"):
        DiTForDiffusionLM.from_pretrained(tmp_path)


def test_resizing_keeps_the_logits_of_the_old_rows():
    model = random_dit(mask_token_id=5)
    before = model(IDS).logits
    model.resize_token_embeddings(44)
    assert model.config.vocab_size == 44 and difference(model(IDS).logits[..., :40], before) < 1e-6
    assert type(model.get_output_embeddings()).__name__ == "OutputLayer"
    assert model.get_output_embeddings().bias.shape == (44,) and "backbone.vocab_embed.embedding" in model.state_dict()
    with pytest.raises(ValueError, match="5 rows would remove mask_token_id=5"):
        model.resize_token_embeddings(5)


# --- constants ------------------------------------------------------------------------------------------------------


def maps_run(model, **inputs):
    """How many maps of the condition a forward pass computes, and its logits."""
    count = []
    maps = [m for name, m in model.named_modules() if name.endswith(("adaLN_modulation", "sigma_map"))]
    handles = [m.register_forward_hook(lambda *_: count.append(1)) for m in maps]
    logits = model(IDS, **inputs).logits
    for handle in handles:
        handle.remove()
    assert len(maps) == 4
    return len(count), logits


def test_a_constant_condition_is_computed_once():
    model = random_dit().double()
    with torch.enable_grad():
        count, unfolded = maps_run(model)
    assert count == 4
    with torch.no_grad():
        assert maps_run(model)[0] == 4  # the first pass without gradients
        count, folded = maps_run(model)
        assert count == 0 and difference(folded, unfolded) < 1e-12
        assert maps_run(copy.deepcopy(model))[0] == 4


def test_constants_follow_the_weights():
    """Whatever changes a weight, the next pass computes with what it is now."""

    def step(model):
        model.train()(IDS).logits.square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model.eval()

    def load(model):
        model.load_state_dict({name: 1.1 * weight for name, weight in model.state_dict().items()})

    def in_place(model):
        with torch.no_grad():
            model.backbone.sigma_map.mlp[2].bias.add_(1)

    def replaced(model):
        model.backbone.blocks[0].adaLN_modulation.weight = torch.nn.Parameter(torch.ones(192, 16).double())

    def data(model):  # as sharded optimizers do, between two changes of mode
        model.train()
        model.backbone.blocks[1].adaLN_modulation.bias.data.add_(1)
        model.eval()

    def rounded(model):
        model.to(torch.bfloat16).to(torch.float64)

    def applied(model):  # in place, and unknown to the weights
        model._apply(lambda weight: weight.data.mul_(1.1))

    for change in (step, load, in_place, replaced, data, rounded, applied):
        model = random_dit(num_classes=2).double()
        with torch.no_grad():
            before = maps_run(model)[1]
        change(model)
        with torch.no_grad():
            after = maps_run(model)[1]
            fresh = copy.deepcopy(model)(IDS).logits
        assert difference(after, fresh) < 1e-10 and difference(after, before) > 1e-4, change.__name__


@torch.no_grad()
def test_constants_are_not_saved_and_follow_autocast(tmp_path):
    model = random_dit()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(IDS).logits
        assert difference(low, copy.deepcopy(model)(IDS).logits) < 0.1
    assert model(IDS).logits.dtype == torch.float32 != low.dtype
    assert difference(model(IDS).logits, copy.deepcopy(model)(IDS).logits) < 1e-5
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


# --- generation's defaults ------------------------------------------------------------------------------------------


def test_the_ancestral_sampler_is_the_default(tmp_path):
    model = random_dit()
    options = {"steps": 4, "max_new_tokens": 12, "num_return_sequences": 2, "seed": 0}
    text = model.generate(**options)
    assert text.equal(model.generate(**options, sampler="ancestral")) and text.shape == (2, 12)
    assert not text.equal(model.generate(**options, sampler="confidence"))
    for stored in (None, XDLMGenerationConfig(temperature=0.5)):
        folder = tmp_path / ("none" if stored is None else "other")
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        if stored is not None:
            stored.save_pretrained(folder)
        loaded = DiTForDiffusionLM.from_pretrained(folder)
        assert loaded.generation_config.sampler == "ancestral"
        assert loaded.generate(**options).equal(text) == (stored is None)


def test_a_revision_is_still_by_the_confidence_sampler():
    model = random_dit(mixing_ratio=0.5)
    assert model.revise(IDS, steps=2).shape == IDS.shape


@pytest.mark.parametrize(
    "width, blocks, heads, gpt2, bert",
    [(256, 8, 8, 33.8, 23.7), (768, 12, 12, 169.6, 139.3), (1024, 24, 16, 424.5, 384.0)],
)
def test_the_papers_sizes_have_the_papers_parameters(width, blocks, heads, gpt2, bert):
    for rows, millions in ((50258, gpt2), (30522, bert)):
        with torch.device("meta"):
            sizes = {"hidden_dim": width, "n_blocks": blocks, "n_heads": heads, "vocab_size": rows}
            model = DiTForDiffusionLM(DiTConfig(**sizes))
        assert round(model.num_parameters() / 1e6, 1) == millions
