"""What must hold on a GPU: results there beside those of float64 on the CPU. `make gpu` runs these tests.

Without a GPU, `pytest -m gpu tests/test_gpu.py` runs them on the CPU against itself, which proves the tests and no GPU;
what only a GPU has is skipped.
"""

import importlib.util
import json

import pytest
import torch
from models import small_model, tiny_model
from training import CONFIGS, ENDS_CLEANLY, SCRIPT, launch, losses, trainer

from xdlm_hf import (
    DiTConfig,
    DiTForDiffusionLM,
    GIDDProcess,
    NoiseKernel,
    diffusion_loss,
    fused_linear_diffusion_loss,
    sample_posterior,
)
from xdlm_hf.generation import generate as generate_module
from xdlm_hf.generation import graphs
from xdlm_hf.generation.confidence import ConfidenceSampler, ConfidenceSettings

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
N = 2000
# Norm of the error beside float64 over that of the exact result.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KS = [0.0, 0.1, 0.5, 1.0]


def case(k, dtype):
    """x_0, z_t, alpha and logits of 4 rows of 33 tokens, on the CPU."""
    kernel, generator = NoiseKernel(N, k, N - 1), torch.Generator().manual_seed(0)
    x_0 = torch.randint(N - 1, (4, 33), generator=generator)
    alpha = torch.tensor([0.9, 0.5, 0.1, 1e-3])
    logits = (3 * torch.randn(4, 33, N, generator=generator)).to(dtype)
    return kernel, x_0, kernel.corrupt(x_0, alpha, generator), alpha, -torch.ones(4), logits


def close(ours, exact, dtype, times=1):
    assert (ours.detach().cpu().double() - exact).norm() <= times * BOUNDS[dtype] * exact.norm()


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", KS)
def test_the_loss_and_its_gradient(k, dtype):
    kernel, x_0, z_t, alpha, slope, logits = case(k, dtype)
    results = []
    for device, of in ((DEVICE, dtype), ("cpu", torch.float64)):
        leaf = logits.to(device, of).requires_grad_()
        loss = diffusion_loss(leaf, *(x.to(device) for x in (x_0, z_t, alpha, slope)), kernel)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    close(results[0][0], results[1][0].detach(), torch.float32)  # the loss itself is float32
    close(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", KS)
def test_the_fused_loss_and_its_gradients(k, dtype):
    kernel, x_0, z_t, alpha, slope, _ = case(k, dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = {(4, 33, 64): 1.0, (N, 64): 0.1, (N,): 1.0}  # with their scales: logits of about 1
    leaves = [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape, scale in shapes.items()]
    results = []
    for device, of in ((DEVICE, dtype), ("cpu", torch.float64)):
        hidden, weight, bias = (x.to(device, of).requires_grad_() for x in leaves)
        ids = [x.to(device) for x in (x_0, z_t, alpha, slope)]
        total, _ = fused_linear_diffusion_loss(hidden, weight, *ids, kernel, bias=bias, chunk_size=50)
        results.append((total, *torch.autograd.grad(total, (hidden, weight, bias))))
    close(results[0][0], results[1][0].detach(), dtype)
    for ours, exact in zip(results[0][1:], results[1][1:], strict=True):
        close(ours, exact, dtype, times=4)  # the logits are rounded, too


def test_gidds_loss():
    process, generator = GIDDProcess(N, N - 1, 0.1), torch.Generator().manual_seed(0)
    x_0, t = torch.randint(N - 1, (4, 33), generator=generator), torch.tensor([0.1, 0.4, 0.7, 0.95])
    z_t, logits = process.corrupt(x_0, t, generator), torch.randn(4, 33, N, generator=generator)
    exact = process.loss(logits.double(), x_0, z_t, t)
    close(process.loss(*(x.to(DEVICE) for x in (logits, x_0, z_t, t))), exact, torch.float32)


# --- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
def test_noise_and_draws_from_a_cpu_seed_are_those_of_the_cpu(k):
    """One seed, one result on every device: prior, corruption and posterior."""
    kernel, x_0, _, alpha, _, logits = case(k, torch.float64)
    results = []
    for device in (DEVICE, "cpu"):
        generator = torch.Generator().manual_seed(5)
        z_t = kernel.corrupt(x_0.to(device), alpha.to(device), generator)
        prior = kernel.sample_prior((4, 33), generator, device)
        alpha_s = (alpha + 0.05).clamp(max=1).to(device)
        z_s = sample_posterior(logits.to(device), z_t, alpha_s, alpha.to(device), kernel, generator)
        results.append([x.cpu() for x in (z_t, prior, z_s)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confidences(dtype):
    *_, logits = case(0.1, dtype)
    ids = torch.randint(N - 1, (4, 33), generator=torch.Generator().manual_seed(2))
    sampler = ConfidenceSampler(ConfidenceSettings(N - 1, 0.1, 1), 0, 33)
    found, exact = sampler.predict(logits.to(DEVICE), ids.to(DEVICE)), sampler.predict(logits.double(), ids)
    assert found[0].cpu().equal(exact[0])
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        close(ours, theirs, torch.float32)


# --- generation, in float64: rounding cannot choose another token ----------------------------------------------------

GENERATIONS = {
    "algorithm 1": {"steps": 8, "mixing_ratio": 0.3},
    "no refinement": {"steps": 8, "mixing_ratio": 0.0},
    "blocks": {"steps": 8, "block_length": 8, "mixing_ratio": 0.3},
    "prefix cache": {"steps": 8, "block_length": 8, "mixing_ratio": 0.3, "cache": "prefix"},
    "dual cache": {"steps": 8, "block_length": 8, "mixing_ratio": 0.3, "cache": {"mode": "dual", "refresh": 2}},
    "threshold": {"steps": 16, "parallel_decoding": {"threshold": 0.3}},
    "edits": {"steps": 4, "refinement": {"policy": "threshold", "threshold": 0.3}},
    "re-masking": {"steps": 8, "refinement": {"policy": "remdm_cap", "rate": 0.2}, "seed": 3},
    "guidance": {"steps": 8, "cfg_scale": 0.5},
    "polishing": {"steps": 4, "polish_steps": 3, "mixing_ratio": 0.3},
    "temperature": {"steps": 8, "temperature": 0.8, "seed": 4},
    "ancestral": {"steps": 8, "sampler": "ancestral", "mixing_ratio": 0.3, "seed": 5},
    "ancestral, k = 1": {"steps": 8, "sampler": "ancestral", "mixing_ratio": 1.0, "seed": 6},
    "as released": {"steps": 8, "block_length": 8, "mixing_ratio": 0.1, "reference_compat": True},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generations_are_those_of_the_cpu(name):
    model = small_model(init_std=0.5).double()
    prompt = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 16, "eos_token_id": [], **GENERATIONS[name]}
    theirs = model.generate(prompt, attention_mask=mask, **options)
    ours = model.to(DEVICE).generate(prompt.to(DEVICE), attention_mask=mask.to(DEVICE), **options)
    assert ours.cpu().equal(theirs)


GREEDY = [name for name, options in GENERATIONS.items() if not {"seed", "reference_compat"} & set(options)]


@pytest.mark.parametrize("name", GREEDY)
def test_captured_passes_give_the_tokens_of_the_cpu(name):
    """Also in a second call of the same shapes, with another prompt and padding, which captures nothing."""
    model = small_model(init_std=0.5).double()
    options = {"max_new_tokens": 16, "eos_token_id": [], **GENERATIONS[name]}
    calls = [
        {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])},
        {"input_ids": torch.arange(12).reshape(2, 6).flip(1), "attention_mask": torch.tensor([[0] + [1] * 5, [1] * 6])},
    ]
    theirs = [model.generate(**inputs, **options) for inputs in calls]
    model, counts = model.to(DEVICE), []
    for inputs, expected in zip(calls, theirs, strict=True):
        inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
        assert model.generate(**inputs, **options, compile="graphs").cpu().equal(expected)
        (kept,) = graphs._KEPT[model].values()
        counts.append([stage.graph is not None for stage in kept.stages.values()])
    assert counts[0] == counts[1] and set(counts[0]) == {DEVICE.type == "cuda"}


LOOPS = {
    "k = 0": {"mixing_ratio": 0.0},
    "k = 0.3": {},
    "guidance": {"cfg_scale": 0.5, "suppress_tokens": [3]},
    "dual cache, k = 0": {"mixing_ratio": 0.0, "cache": "dual"},
    "prefix cache": {"cache": "prefix", "compile": "graphs"},
    "dual cache": {"cache": {"mode": "dual", "refresh": 2}, "compile": "graphs"},
    "graphs": {"compile": "graphs"},
}


@ON_GPU
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_a_greedy_loop_does_not_wait_for_the_device(name, padded, monkeypatch):
    if padded and not {"cache", "compile"} & set(LOOPS[name]):
        pytest.skip("Transformers reads the padding mask in each pass")
    model, mask = small_model(init_std=0.5).to(DEVICE), torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[1, :2] = 0
    options = {"steps": 8, "block_length": 4, "mixing_ratio": 0.3, "max_new_tokens": 16, "eos_token_id": []}
    call = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": mask, **options, **LOOPS[name]}
    first = model.generate(**call)  # compiles kernels and captures
    denoise = generate_module.denoise

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return denoise(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(generate_module, "denoise", strict)
    assert model.generate(**call).equal(first)


@ON_GPU
def test_a_capture_on_a_model_that_moved_away_is_not_used():
    """Weights in other memory, and the shapes of another batch, are captured again; the memory of old ones is free."""
    model = small_model(init_std=0.5).double()
    prompt = torch.arange(12).reshape(2, 6)
    options = {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.3, "eos_token_id": []}
    theirs = model.generate(prompt, **options)
    model.to(DEVICE).generate(prompt, **options, compile="graphs")
    model.cpu().to(DEVICE)
    for rows in (2, 1):
        assert model.generate(prompt[:rows], **options, compile="graphs").cpu().equal(theirs[:rows])


@pytest.mark.parametrize("noise", [{"mixing_ratio": 0.2}, {"noise_process": "gidd", "p_uniform": 0.1}])
def test_samples_of_a_dit_are_those_of_the_cpu(noise):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "model_length": 32, "vocab_size": 40}
    model = DiTForDiffusionLM(DiTConfig(**sizes, **noise)).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    options = {"steps": 6, "max_new_tokens": 24, "num_return_sequences": 3, "seed": 0}
    theirs = model.generate(**options)
    assert model.to(DEVICE).generate(**options).cpu().equal(theirs)


# --- the network ----------------------------------------------------------------------------------------------------


@ON_GPU
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_errs_no_more_than_twice_eager(attention, dtype):
    if attention.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model = tiny_model(d_model=128, n_heads=2, init_std=0.1).eval()
    ids = torch.randint(6, 48, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.double()(ids).logits
        errors = {}
        for name in ("eager", attention):
            model = model.to(DEVICE, dtype)
            model.set_attn_implementation(name)
            errors[name] = (model(ids.to(DEVICE)).logits.cpu().double() - exact).abs().max().item()
    assert errors[attention] <= 2 * errors["eager"]


@ON_GPU
def test_the_compiled_forward():
    model = tiny_model().eval().to(DEVICE)
    ids = torch.randint(6, 48, (2, 32), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_five_steps_give_the_losses_of_the_cpu(options, tmp_path):
    exact = trainer(tmp_path / "cpu", max_steps=5)
    exact.train()
    run = trainer(tmp_path / "gpu", max_steps=5, **{"use_cpu": DEVICE.type == "cpu", **options})
    run.train()
    bound = 0.05 if options.get("bf16") else 1e-4
    assert max(abs(a - b) for a, b in zip(losses(run), losses(exact), strict=True)) < bound


def test_an_evaluation_and_an_average(tmp_path):
    """The NELBO of the average of the weights, as on the CPU."""
    found = []
    for device in ("cpu", DEVICE.type):
        run = trainer(tmp_path / device, max_steps=4, eval_rows=8, ema_decay=0.9, use_cpu=device == "cpu")
        run.train()
        found.append(run.evaluate()["eval_loss"])
    assert abs(found[0] - found[1]) < 1e-4


@ON_GPU
@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
def test_one_process_under(config, tmp_path):
    """The losses of a launched run are those of plain training."""
    plain = trainer(tmp_path / "plain", max_steps=4, use_cpu=False)
    plain.train()
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--mixed_precision", "no", ENDS_CLEANLY, SCRIPT]
    arguments = {"output_dir": str(tmp_path / config), "max_steps": 4, "use_cpu": False}
    (tmp_path / config).mkdir()
    status, output = launch(*command, json.dumps(arguments))
    assert status == 0, output[-3000:]
    found = json.loads((tmp_path / config / "result.json").read_text())["losses"]
    assert max(abs(a - b) for a, b in zip(found, losses(plain), strict=True)) < 1e-3


@ON_GPU
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_optimizers_of_a_gpu(optim, tmp_path):
    if optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    run = trainer(tmp_path, max_steps=20, use_cpu=False, optim=optim)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
