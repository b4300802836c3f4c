"""The plan's arithmetic against models really built, steps really taken, and DeepSpeed's own estimators."""

import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import LLADA_8B, tiny_model
from rich.console import Console
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from training import arguments, trainer
from transformers import Trainer

from xdlm_hf.diffusion.losses import diffusion_loss
from xdlm_hf.diffusion.ops.fused import fused_linear_diffusion_loss
from xdlm_hf.training.adapters import add_adapters
from xdlm_hf.training.optimizers import ADAMW, OPTIMIZERS, optimizer_of
from xdlm_hf.training.planning import (
    GIB,
    LAYOUTS,
    NF4_BYTES,
    Run,
    activation_bytes,
    check_fit,
    count_parameters,
    layouts,
    loss_bytes,
    memory,
    run_flops,
    state_bytes,
    step_bytes,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from plan import choices_table, memory_table  # noqa: E402

DDP = LAYOUTS["ddp"]
CAN_OFFLOAD = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")


def model_like(sizes="small", lora=0, dtype=torch.float32, attention="sdpa", **options):
    small = {"d_model": 64, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 160, "vocab_size": 512}
    with torch.device("meta") if sizes == "llada_8b" else contextlib.nullcontext():
        model = tiny_model(**{**(LLADA_8B if sizes == "llada_8b" else small), **options}).to(dtype)
        model.set_attn_implementation(attention)
        return add_adapters(model, lora, 32) if lora else model


def run_of(model, rows=2, length=64, gpus=1, bf16=False, **options):
    dtype = model.get_input_embeddings().weight.dtype
    options = {"device": "cpu", "dtype": dtype, "bf16": bf16, "rows": rows, "length": length, "gpus": gpus, **options}
    return Run(config=model.config, counts=count_parameters(model), **options)


def llada_8b(rows=4, length=4096, gpus=8, checkpointing=True, **options):
    model = model_like("llada_8b", dtype=torch.bfloat16)
    return run_of(model, rows, length, gpus, bf16=True, checkpointing=checkpointing, device="other", **options)


# --------------------------------------------------------------------------------------------------------------------
# Parameters and operations


@pytest.mark.parametrize("options", [{}, {"lora": 4}, {"weight_tying": True}, {"n_kv_heads": 2}], ids=str)
def test_counts_without_weights_are_those_of_the_built_model(options):
    built = model_like(**options)
    with torch.device("meta"):
        planned = count_parameters(model_like(**options))
    assert planned == count_parameters(built)
    storages = {p.data_ptr(): p.numel() for p in built.parameters()}
    assert planned.total == sum(storages.values())
    assert planned.trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert planned.head_trained == ("lora" not in options)
    assert planned.quantized == 0


def test_counts_of_llada_8b():
    counts = count_parameters(model_like("llada_8b"))
    assert counts.total == counts.trainable == 8_015_581_184  # the public checkpoint's
    adapted = count_parameters(model_like("llada_8b", lora=16), load_in_4bit=True)
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert adapted.quantized == blocks and adapted.total - adapted.trainable == counts.total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_counted_in_a_step(checkpointing):
    """Eager attention, whose products the counter sees. The last block's recomputation may stop early: within 3 %."""
    model = model_like(attention="eager").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(6, 512, (2, 64))).logits.sum().backward()
    planned = run_flops(model, count_parameters(model), 64, 128, checkpointing)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.06 if checkpointing else 1e-6)


# --------------------------------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize(("dtype", "lora"), [(torch.float32, 0), (torch.float32, 4), (torch.bfloat16, 4)])
def test_states_are_those_of_a_step(dtype, lora):
    model = model_like(dtype=dtype, lora=lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    model(torch.randint(6, 512, (2, 8))).logits.float().square().mean().backward()
    optimizer.step()
    parameters, gradients, moments, _, host = state_bytes(run_of(model), DDP)
    assert parameters == sum(p.nbytes for p in model.parameters())
    assert gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert moments == sum(x.nbytes for x in states)
    assert host == 0
    assert state_bytes(run_of(model, gpus=2), DDP)[1] == 2 * gradients  # DDP's buckets


def needs_library(optim, monkeypatch):
    if "8bit" not in optim and "32bit" not in optim:
        return
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # It remembers by their addresses which parameters stay in float32: those of earlier tests may come again.
    monkeypatch.setattr(library.optim.GlobalOptimManager, "_instance", None)


def bytes_after_a_step(optimizer):
    """Of its states, each storage once; a few numbers for each tensor and bitsandbytes' tables of codes left out."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    left_out = ("step", "RMS", "qmap1", "qmap2")
    states = [x for state in optimizer.state.values() for name, x in state.items() if name not in left_out]
    return sum(x.nbytes for x in states)


@pytest.mark.parametrize("lora", [0, 4, 80], ids=["whole", "small adapters", "adapters"])
@pytest.mark.parametrize("optim", [*OPTIMIZERS, "sgd momentum=0.9"])
def test_states_are_those_of_the_named_optimizer(tmp_path, monkeypatch, optim, lora):
    """As the Trainer builds it. Matrices of 4096 elements, the least in 8 bits, and of 10304, no multiple of 256."""
    needs_library(optim, monkeypatch)
    optim, _, options = optim.partition(" ")
    model = model_like(lora=lora, mlp_hidden_size=161)
    optimizer = trainer(tmp_path, model=model, optim=optim, optim_args=options or None).create_optimizer()
    run = run_of(model, optimizer=optimizer_of(optim, options))
    assert state_bytes(run, DDP)[2] == bytes_after_a_step(optimizer)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_states_of_a_flat_partition(tmp_path, monkeypatch, optim):
    """What DeepSpeed gives its optimizer: float32 vectors, here of 8192 elements, without rows, columns or names."""
    needs_library(optim, monkeypatch)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=optim))
    kept = bytes_after_a_step(kind([torch.nn.Parameter(torch.ones(8192))], **options))
    assert kept == 8192 * optimizer_of(optim).flat_bytes
    model = model_like()
    run = run_of(model, gpus=2, optimizer=optimizer_of(optim))
    assert state_bytes(run, LAYOUTS["zero2"])[2] == run.counts.trainable / 2 * (4 + kept / 8192)


def peak_of_a_step(optimizer):
    """Bytes that a step allocates beside parameters, gradients and states, which the step before made."""
    bytes_after_a_step(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    tracker = MemTracker()
    tracker.track_external(*parameters, *(p.grad for p in parameters), *states)
    with tracker:
        before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
        optimizer.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_step_allocates_what_is_planned(tmp_path, monkeypatch, optim):
    """Within 10 % of the trained weights' bytes; foreach as on a GPU. One tensor after the other: the largest, and what
    is left of the one before."""
    needs_library(optim, monkeypatch)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=optim))
    if optimizer_of(optim).foreach:
        options |= {"foreach": True, "weight_decay": 0.1}
    model = model_like(vocab_size=4096)
    run, weights = run_of(model, optimizer=optimizer_of(optim)), 4 * sum(p.numel() for p in model.parameters())
    measured = peak_of_a_step(kind(model.parameters(), **options))
    assert measured == pytest.approx(step_bytes(run, DDP), abs=0.1 * weights)
    if not optimizer_of(optim).factored:  # in DeepSpeed's one vector
        vector = torch.nn.Parameter(torch.ones(run.counts.trainable // 2))
        assert peak_of_a_step(kind([vector], **options)) == pytest.approx(
            step_bytes(replace(run, gpus=2), LAYOUTS["zero2"]), abs=0.1 * weights
        )
    assert step_bytes(run, LAYOUTS["zero2_offload"]) == 0


def test_optimizers_of_llada_8b():
    """GiB of one GPU without DeepSpeed, by hand: 8,015,581,184 parameters, of which 126464 x 4096 in the embedding."""
    run = llada_8b()
    elements, embedding, norms = 8_015_581_184, 126464 * 4096, 65 * 4096
    with_adamw = {"adamw_torch": 8 * elements, "lion_32bit": 4 * elements, "sgd": 0}
    # A norm has 4096 elements: the least that is kept in 8 bits.
    with_adamw["adamw_8bit"] = 2 * (elements - embedding) * (1 + 4 / 256) + 8 * embedding
    square, wide, head = 32 * 4 * (4096 + 4096), 32 * 3 * (4096 + 12288), 2 * (126464 + 4096)
    with_adamw["adafactor"] = 4 * (square + wide + head + norms)
    for name, expected in with_adamw.items():
        assert state_bytes(replace(run, optimizer=optimizer_of(name)), DDP)[2] == expected, name
    assert optimizer_of("grokadamw") is None


@pytest.mark.parametrize("options", ["momentum", "momentum=much", "betas=(0.9,0.95)", "momentum=0.9=1"])
def test_optim_args_that_cannot_be_read_are_named(options):
    message = f"optim_args={options!r} cannot be read: give names and numbers as 'momentum=0.9,nesterov=True'"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_of("sgd", options)


def test_optimizers_that_cannot_be_offloaded_leave_these_layouts_out():
    """accelerate makes CPU Adam of them, and the trainer refuses that."""
    for name, kind in OPTIMIZERS.items():
        run = replace(llada_8b(), optimizer=kind)
        left_out = set() if name in CAN_OFFLOAD else {"zero2_offload", "zero3_offload"}
        assert set(LAYOUTS) - set(layouts(run)) == left_out | {"ddp"}, name  # its weights are bfloat16
        if left_out:
            with pytest.raises(ValueError, match="plan_layout='zero2_offload' is not known for this run; choose one"):
                check_fit(run, "zero2_offload", 80)
        else:
            assert memory(run, LAYOUTS["zero2_offload"]) == memory(llada_8b(), LAYOUTS["zero2_offload"])


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_states_are_those_that_deepspeed_estimates(gpus):
    stage_2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="deepspeed is not installed")
    stage_3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    run = llada_8b(gpus=gpus)
    total, largest = run.counts.total, run.counts.largest
    for name, layout in LAYOUTS.items():
        parameters, gradients, optimizer, buffers, host = state_bytes(run, layout)
        on_gpu = parameters + gradients + optimizer
        if layout.stage == 2:
            their_host, theirs = stage_2.estimate_zero2_model_states_mem_needs(
                total, gpus, cpu_offload=layout.optimizer_on_host
            )
        elif layout.stage == 3:
            offload = layout.optimizer_on_host
            their_host, theirs, _ = stage_3.estimate_zero3_model_states_mem_needs(
                total, largest, gpus, cpu_offload=offload, cpu_offload_params=offload
            )
            # Under ZeRO-3 theirs leaves out the share of 16-bit parameters, and has twice the largest module where ours
            # has the live parameters and the bucket.
            on_gpu += 2 * 2 * largest - parameters
            assert buffers == 2 * (1_000_000_000 + largest + 500_000_000)
        else:
            continue
        assert on_gpu == pytest.approx(theirs, rel=1e-6), name
        if layout.optimizer_on_host:
            assert host == pytest.approx(their_host, rel=1e-6), name


def test_nf4_takes_what_bitsandbytes_stores():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(1024, 512)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored == weight.numel() * NF4_BYTES


# --------------------------------------------------------------------------------------------------------------------
# Activations: bytes that autograd really keeps


def kept_bytes(model, ids, autocast):
    """Storages that the forward pass saves for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters and x.is_floating_point():
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", enabled=autocast):
        logits = model(ids).logits
    assert logits.requires_grad
    copies = {2 * p.numel() for p in model.parameters()} if autocast else set()  # of weights, counted as buffers
    return sum(storage.nbytes() for storage in kept.values() if storage.nbytes() not in copies)


CASES = {
    "float32": ({}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),  # under DeepSpeed, which casts the weights
    "autocast": ({}, {"bf16": True}),
    "eager": ({"attention": "eager"}, {}),
    "grouped": ({"n_kv_heads": 2}, {}),
    "adapters": ({"lora": 4}, {}),
    "adapters, autocast": ({"lora": 4, "dtype": torch.bfloat16}, {"bf16": True}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_autograd_keeps(case, checkpointing):
    """Within 3 %: masks of a few bytes, cosines, and the adapters' narrow products are left out of the formula."""
    build, settings = CASES[case]
    model = model_like(**build).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(6, 512, (3, 64))
    measured = kept_bytes(model, ids, settings.get("bf16", False))
    layout = LAYOUTS["zero2" if case == "bfloat16" else "ddp"]
    run = run_of(model, 3, 64, checkpointing=checkpointing, **settings)
    planned = activation_bytes(run, layout)
    if checkpointing:  # the block that is recomputed was not kept
        whole = run_of(model, 3, 64, **settings)
        one = run_of(model_like(**build, n_layers=1), 3, 64, **settings)
        two = run_of(model_like(**build, n_layers=2), 3, 64, **settings)
        planned -= activation_bytes(two, layout) - activation_bytes(one, layout)
        assert planned < activation_bytes(whole, layout)
        if "lora" in build:  # the first block's input needs no gradient: checkpointing holds it, autograd does not
            measured += ids.numel() * 64 * model.get_input_embeddings().weight.itemsize
    assert 0.97 < planned / measured < 1.03


# --------------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_loss_needs_what_is_planned(fused, dtype, trained, one_thread):
    """Peak above what is there before, within 10 %: small scratch and temporaries are not in the formula."""
    model = model_like(d_model=32, vocab_size=4096, dtype=dtype)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(trained)
    hidden = torch.randn(2, 512, 32, dtype=dtype, requires_grad=True)
    x_0, z_t = torch.randint(6, 4096, (2, 2, 512))
    alpha_t, d_alpha_t, kernel = torch.full((2,), 0.5), torch.full((2,), -1.0), model.noise_kernel(0.1)
    tracker = MemTracker()
    tracker.track_external(head, hidden, x_0, z_t)
    with tracker:
        if fused:
            total, _ = fused_linear_diffusion_loss(
                hidden, head.weight, x_0, z_t, alpha_t, d_alpha_t, kernel, chunk_size=128
            )
        else:
            total = diffusion_loss(hidden @ head.weight.T, x_0, z_t, alpha_t, d_alpha_t, kernel).sum()
        total.backward()
    before = head.weight.nbytes + hidden.nbytes + x_0.nbytes + z_t.nbytes
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before
    run = run_of(model, 2, 512, fused_loss=fused, chunk_size=128)
    planned = loss_bytes(run, LAYOUTS["zero2"])
    assert 0.9 < planned / measured < 1.1


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_pass_needs_no_more_than_planned(checkpointing, foreach):
    """The plan adds up peaks of different moments: it may be above what a step needs, by at most a half."""
    optimizer_kind = ADAMW if foreach else ADAMW._replace(foreach=0, looped=8)
    for rows in (4, 1):  # with one row the optimizer's step is the peak
        model = model_like(n_layers=4).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
        ids, kernel = torch.randint(6, 512, (rows, 64)), model.noise_kernel(0.1)
        rates = torch.full((rows,), 0.5), torch.full((rows,), -1.0)

        tracker = MemTracker()
        tracker.track_external(model, optimizer, ids)
        with tracker:
            for _ in range(2):  # the second step has the optimizer's moments beside it
                diffusion_loss(model(ids).logits, ids, ids, *rates, kernel).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        options = {"checkpointing": checkpointing, "fused_loss": False, "optimizer": optimizer_kind}
        planned = memory(run_of(model, rows, 64, **options), DDP).gpu
        assert 0.95 < planned / measured < 1.5


# --------------------------------------------------------------------------------------------------------------------
# Whether it fits


def test_the_papers_run_fits_where_it_was_run():
    check_fit(llada_8b(), "zero2", 80)
    for name in LAYOUTS:
        assert memory(llada_8b(gpus=16), LAYOUTS[name]).gpu <= memory(llada_8b(), LAYOUTS[name]).gpu


def test_a_plan_that_cannot_fit_is_refused_with_remedies_that_help():
    with pytest.raises(ValueError, match=r"zero2 on 8 GPUs needs \d+\.\d GiB of each, and 40 GiB leave 36\.8") as error:
        check_fit(llada_8b(rows=8), "zero2", 40)
    assert "per_device_train_batch_size 1" in str(error.value) and "zero3_offload.yaml" in str(error.value)
    check_fit(llada_8b(rows=1), "zero2", 40)
    check_fit(llada_8b(rows=8), "zero3_offload", 40)
    with pytest.raises(ValueError, match="Any of these fits: activation_checkpointing true"):
        check_fit(llada_8b(checkpointing=False), "zero2", 80)
    with pytest.raises(ValueError, match=r"No layout and no smaller batch fits\. Adapters \(lora_rank"):
        check_fit(llada_8b(gpus=1), None, 4)


@pytest.mark.parametrize(
    ("layout", "gib", "message"),
    [
        ("zero4", 80, "plan_layout='zero4' is not known for this run; choose one of zero1, zero2"),
        (None, 0, "plan_gpu_memory=0 must be positive, in GiB"),
    ],
)
def test_impossible_plans_are_refused(layout, gib, message):
    with pytest.raises(ValueError, match=message):
        check_fit(llada_8b(), layout, gib)
    with pytest.raises(ValueError, match="gpus=0 must be at least 1"):
        llada_8b(gpus=0)


def test_tables_show_every_part():
    run = llada_8b()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    run = replace(run, dtype=torch.float32)
    console.print(memory_table(run, 80))
    console.print(choices_table(run, "zero2"))
    text = console.export_text()
    assert all(name in text for name in LAYOUTS)
    row = next(line for line in text.splitlines() if "zero2 " in line)
    needs = memory(run, LAYOUTS["zero2"])
    assert f"{needs.gpu / GIB:.1f}" in row and f"{needs.optimizer / GIB:.1f}" in row and "yes" in row
    assert "…" not in text


def test_16_bit_weights_leave_out_what_has_no_float32_copies():
    """What the trainer would refuse (test_precision.py); adapters are float32 whatever the frozen weights are."""
    assert set(LAYOUTS) - set(layouts(llada_8b())) == {"ddp"}
    with pytest.raises(ValueError, match="plan_layout='ddp': the trained weights are bfloat16 and nothing keeps"):
        check_fit(llada_8b(), "ddp", 10_000)
    adapted = run_of(model_like("llada_8b", lora=16, dtype=torch.bfloat16))
    assert "ddp" in layouts(adapted) and "ddp" in layouts(run_of(model_like()))


def test_four_bits_leave_out_zero_3():
    model = model_like("llada_8b", lora=16, dtype=torch.bfloat16)
    run = Run(config=model.config, counts=count_parameters(model, True), rows=1, length=4096)
    assert set(LAYOUTS) - set(layouts(run)) == {"zero3", "zero3_offload"}
    assert state_bytes(run, DDP)[0] < 6 * GIB < 15 * GIB < state_bytes(llada_8b(), LAYOUTS["zero2"])[0] + GIB
