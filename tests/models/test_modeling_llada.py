"""The LLaDA network: recorded logits, names, masks, loading that refuses doubtful files, and Transformers' features."""

import json
import shutil

import pytest
import torch
from models import CHECKPOINT, LLADA_8B, TINY, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM, LLaDAModel
from xdlm_hf.models.llada.modeling_llada import LLaDABlock, rotary_angles

LORA_TARGETS = r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"


@pytest.fixture(scope="module")
def expected():
    """Inputs and logits recorded from the original code; row 1 of the batch has four padding tokens on the left."""
    return load_file(CHECKPOINT / "expected.safetensors")


@pytest.fixture
def model():
    return tiny_model(**TINY, init_std=0.2).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the fixture, without the recordings, to damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINT / name, tmp_path / name)
    return tmp_path


def difference(a, b):
    return (a - b).abs().max().item()


# Equal to the original


@pytest.mark.parametrize(
    "attention",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # flex compiles for 30 s on a CPU
)
def test_logits_equal_the_original(expected, attention):
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        batch = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
        single = model(expected["single_input_ids"]).logits
    real = expected["attention_mask"].bool()
    assert difference(batch[real], expected["logits"][real]) < 2e-4
    assert difference(single, expected["single_logits"]) < 2e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_row_equals_the_row_alone(expected, attention):
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT, attn_implementation=attention)
    with torch.no_grad():
        padded = model(expected["input_ids"], attention_mask=expected["attention_mask"]).logits
        alone = model(expected["input_ids"][1:, 4:]).logits
    assert difference(padded[1:, 4:], alone) < 1e-4


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_auto_classes_need_no_remote_code(expected, auto_class):
    assert type(AutoConfig.from_pretrained(CHECKPOINT)) is LLaDAConfig
    model, info = auto_class.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert type(model) is LLaDAForDiffusionLM
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        assert difference(model(expected["single_input_ids"]).logits, expected["single_logits"]) < 2e-4


def test_registered_classes_win_over_remote_code():
    # The fixture's auto_map names modeling_llada.py of the original repository, which is not there.
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True, mixing_ratio=0.1)
    assert type(model) is LLaDAForDiffusionLM and model.noise_kernel().mixing_ratio == 0.1
    assert type(AutoModelForCausalLM.from_config(model.config)) is LLaDAForDiffusionLM


def test_saving_gives_back_the_original_names_and_tensors(tmp_path):
    LLaDAForDiffusionLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    original, saved = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LLaDAForDiffusionLM"] and "auto_map" not in config


def test_8b_has_the_published_size():
    with torch.device("meta"):
        model = LLaDAForDiffusionLM(LLaDAConfig(**LLADA_8B))
    assert len(model.state_dict()) == 291
    assert model.num_parameters() == 8_015_581_184
    assert list(model.buffers()) == []  # RoPE is computed, so nothing can be garbage after loading


# Attention masks, positions, inputs


def test_attention_is_bidirectional(model, ids):
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 50
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert difference(model(ids).logits[:, 0], model(changed).logits[:, 0]) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_4d_masks_equal_the_2d_mask(model, ids, attention):
    model = model.double()
    model.set_attn_implementation(attention)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    keep = mask[:, None, None].bool().expand(2, 1, 7, 7)
    reference = model(ids, attention_mask=mask).logits
    assert difference(reference[1], model(ids).logits[1]) > 1e-3
    added = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    for ready in (keep, keep.long(), added):
        assert difference(model(ids, attention_mask=ready).logits, reference) < 1e-12


def test_block_diagonal_mask_isolates_documents(model, ids):
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    keep = (documents[:, None] == documents)[None, None].expand(2, 1, 7, 7)
    model = model.double()
    together = model(ids, attention_mask=keep).logits
    assert difference(together[:, :3], model(ids[:, :3]).logits) < 1e-12
    # Their positions begin at 3, and rotary angles are float32: 6e-8 rad off at a position of one digit.
    assert difference(together[:, 3:], model(ids[:, 3:]).logits) < 1e-5


def test_only_position_differences_matter(model, ids):
    shifted = model(ids, position_ids=torch.arange(7)[None] + 100).logits
    stretched = model(ids, position_ids=torch.arange(7)[None] * 3).logits
    assert difference(shifted, model(ids).logits) < 1e-4
    assert difference(stretched, model(ids).logits) > 1e-3


def test_inputs_embeds_replace_ids(model, ids):
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_a_row_of_padding_only_stays_finite(model, ids):
    mask = torch.tensor([[1] * 7, [0] * 7])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_rotary_angles_are_float32_exact_at_long_range():
    position_ids = torch.tensor([[0, 1, 4095]])
    cos, sin = rotary_angles(position_ids, 128, 500000.0)
    frequencies = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angles = position_ids[0, :, None].double() * frequencies
    # 4095 rad carry a float32 rounding of 2.4e-4; frequencies rounded to bfloat16 would be off by up to 16 rad.
    assert difference(cos[0, 0, :, :64].double(), angles.cos()) < 1e-3
    assert difference(sin[0, 0, :, 64:].double(), angles.sin()) < 1e-3
    assert cos.dtype == torch.float32


# What comes out


def test_logits_to_keep(model, ids):
    """In float64: the output layer of fewer rows may be summed in another order."""
    model = model.double()
    full = model(ids).logits
    assert difference(model(ids, logits_to_keep=3).logits, full[:, -3:]) < 1e-12
    columns = torch.tensor([5, 0])
    assert difference(model(ids, logits_to_keep=columns).logits, full[:, columns]) < 1e-12
    chosen = torch.zeros(2, 7, dtype=torch.bool)
    chosen[0, 2] = chosen[1, 0] = chosen[1, 6] = True
    kept = model(ids, logits_to_keep=chosen).logits
    assert kept.shape == (3, 50) and difference(kept, full[chosen]) < 1e-12
    assert model(ids, logits_to_keep=torch.zeros_like(chosen)).logits.shape == (0, 50)


def test_hidden_states_and_attentions(model, ids):
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(outputs.hidden_states[-1], model.model(ids).last_hidden_state)
    weights = outputs.attentions[0]
    assert weights.shape == (2, 4, 7, 7) and difference(weights.sum(-1), torch.ones(2, 4, 7)) < 1e-6
    assert (weights > 0).all()
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)


def test_backbone_and_output_layer_compose(model, ids):
    model = model.double()
    head = model.get_output_embeddings()
    assert difference(model.model(ids).last_hidden_state @ head.weight.T, model(ids).logits) < 1e-12


def test_noise_kernel_comes_from_the_config(model):
    kernel = model.noise_kernel()
    assert (kernel.vocab_size, kernel.mixing_ratio, kernel.mask_token_id) == (50, 0.0, 49)
    assert model.noise_kernel(0.25).mixing_ratio == 0.25
    wide = tiny_model(**TINY, embedding_size=64, mixing_ratio=0.1)
    assert (wide.noise_kernel().vocab_size, wide.noise_kernel().mixing_ratio) == (64, 0.1)
    assert wide(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)
    unmasked = tiny_model(**TINY | {"mask_token_id": None}, mixing_ratio=1)
    assert unmasked.noise_kernel().mask_token_id is None
    with pytest.raises(ValueError, match="pass mask_token_id, or mixing_ratio=1"):
        unmasked.noise_kernel(0.5)


# Variants


def test_grouped_queries_equal_repeated_keys_and_values(ids):
    torch.manual_seed(0)
    grouped = tiny_model(**TINY, n_kv_heads=2, init_std=0.2).eval()
    full = tiny_model(**TINY).eval()
    state = grouped.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    for attention in ("eager", "sdpa"):
        grouped.set_attn_implementation(attention)
        for attention_mask in (None, mask):
            a, b = (m(ids, attention_mask=attention_mask).logits for m in (grouped, full))
            assert difference(a, b) < 1e-5


def test_tied_output_layer(tmp_path, ids):
    model = tiny_model(**TINY, weight_tying=True).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = LLaDAForDiffusionLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.num_parameters() == model.num_parameters() < tiny_model(**TINY).num_parameters()


def test_embeddings_can_be_read_and_set(model):
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    embedding, head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.model.transformer.wte is embedding and model.get_output_embeddings() is head


def test_resized_model_saves_and_loads(model, tmp_path, ids):
    model.resize_token_embeddings(64, mean_resizing=False)
    assert (model.config.vocab_size, model.config.embedding_size) == (64, 64)
    assert model.noise_kernel().vocab_size == 64
    model.save_pretrained(tmp_path)
    assert torch.equal(LLaDAForDiffusionLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_backbone_alone_loads_from_a_whole_checkpoint(expected):
    backbone = LLaDAModel.from_pretrained(CHECKPOINT)
    whole = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    ids = expected["single_input_ids"]
    assert torch.equal(backbone(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_new_model_is_normal_with_init_std():
    torch.manual_seed(0)
    model = tiny_model(**TINY | {"d_model": 64, "vocab_size": 400}, init_std=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:  # 64 * 64 draws or more: standard error 1.1 %, so one of 16 tensors strays by 6 % once in 1e6
            assert parameter.std().item() == pytest.approx(0.05, rel=0.06), name


def test_dropout_acts_in_training_only(ids):
    for field in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        model = tiny_model(**TINY, init_std=0.2, **{field: 0.5})
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
        assert not torch.equal(model.train()(ids).logits, model(ids).logits), field


# Transformers' machinery


def test_bfloat16_stays_close(expected):
    wide = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    narrow = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    ids = expected["single_input_ids"]
    reference, logits = wide(ids).logits, narrow(ids).logits
    assert logits.dtype == torch.bfloat16
    # Rounding the weights to bfloat16 alone costs 2.7 % of the logits' spread, the activations bring it to 4.5 %.
    assert (logits.float() - reference).std() < 0.1 * reference.std()


def test_float64_is_not_narrowed(model, ids):
    logits = model.double()(ids).logits
    assert logits.dtype == torch.float64
    assert 0 < difference(logits, model.float()(ids).logits.double()) < 1e-4


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(model, ids):
    def gradients():
        model.zero_grad()
        calls = []
        hook = model.model.transformer.blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
        model(ids).logits.square().mean().backward()
        hook.remove()
        return len(calls), [p.grad.clone() for p in model.parameters()]

    model.train()
    calls, plain = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        recomputed, checkpointed = gradients()
        assert (calls, recomputed) == (1, 2)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(model, ids, backend):
    torch._dynamo.reset()
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    model = model.double()
    bound = 1e-12 if backend == "eager" else 1e-5  # rotary angles stay float32, and inductor rounds them otherwise
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for attention_mask in (None, mask):
            logits = model(ids, attention_mask=attention_mask).logits
            assert difference(compiled(ids, attention_mask=attention_mask).logits, logits) < bound


def test_blocks_can_live_on_disk(expected, tmp_path):
    names = ("wte", "blocks.0", "blocks.1", "blocks.2", "ln_f", "ff_out")
    device_map = {f"model.transformer.{name}": "disk" if name == "blocks.1" else "cpu" for name in names}
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT, device_map=device_map, offload_folder=tmp_path)
    assert model.model.transformer.blocks[1].q_proj.weight.device.type == "meta"
    with torch.no_grad():
        assert difference(model(expected["single_input_ids"]).logits, expected["single_logits"]) < 2e-4
    assert set(model._no_split_modules) == {LLaDABlock.__name__}  # what device_map="auto" keeps whole


def test_lora_adapts_the_blocks_only_and_reloads(model, ids, tmp_path):
    torch.manual_seed(0)
    before = model(ids).logits
    lora = LoraConfig(r=2, target_modules=LORA_TARGETS, task_type=None, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    layers = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(layers) == 7 * 2 and all(".blocks." in name for name in layers)
    after = adapted(input_ids=ids).logits
    assert difference(after, before) > 1e-3
    adapted(input_ids=ids).logits.mean().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = tiny_model(**TINY, init_std=0.2).eval()
    assert difference(PeftModel.from_pretrained(fresh, tmp_path)(input_ids=ids).logits, after) < 1e-6


def test_adapter_folder_loads_by_its_own_name(tmp_path, ids):
    base = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    lora = LoraConfig(r=2, target_modules=LORA_TARGETS, task_type=None, init_lora_weights=False)
    adapted = get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(loaded(ids).logits, adapted(input_ids=ids).logits) < 1e-5


def test_state_dict_and_config_make_a_model(model, ids):
    rebuilt = LLaDAForDiffusionLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(rebuilt(ids).logits, model(ids).logits)


# Refused inputs


def test_unknown_arguments_are_refused(model, ids):
    with pytest.raises(ValueError, match="has no argument 'attention_masks'"):
        model(ids, attention_masks=torch.ones(2, 7))
    with pytest.raises(ValueError, match="labels are not supported.*XDLMTrainer"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="has no argument 'use_cache'"):
        model(ids, use_cache=True)
    assert torch.equal(model(ids, use_cache=False, labels=None).logits, model(ids).logits)


def test_inputs_that_do_not_fit_are_refused(model, ids):
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(ids, inputs_embeds=torch.zeros(2, 7, 32))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\) does not fit an input of shape \(2, 7\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="logits_to_keep=-1 must not be negative"):
        model(ids, logits_to_keep=-1)


def test_flash_attention_takes_no_4d_mask(model, ids, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="'flash_attention_2' takes no 4-D attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 7, 7))


def test_only_a_config_makes_a_model():
    with pytest.raises(TypeError, match="should be an instance of class `PreTrainedConfig`"):
        LLaDAForDiffusionLM(str(CHECKPOINT))


def test_config_changed_to_nonsense_is_refused():
    config = LLaDAConfig(**TINY)
    config.mixing_ratio = 3.0
    with pytest.raises(ValueError, match=r"mixing_ratio=3\.0 must lie in"):
        LLaDAForDiffusionLM(config)


def test_unsupported_checkpoint_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {"include_qkv_bias": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="include_qkv_bias=True is an option of the LLaDA format"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("kept", [4, 2000, -100])
def test_truncated_file_is_refused(checkpoint, kept):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file .*download it again"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_truncated_shard_is_named(tmp_path):
    LLaDAForDiffusionLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is not a complete safetensors file"):
        LLaDAForDiffusionLM.from_pretrained(tmp_path)


def damage(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_refused(checkpoint):
    damage(checkpoint, lambda tensors: tensors.pop("model.transformer.blocks.1.v_proj.weight"))
    with pytest.raises(ValueError, match=r"The checkpoint lacks model\.transformer\.blocks\.1\.v_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_unknown_tensor_is_refused(checkpoint):
    name = "model.transformer.blocks.0.q_proj.bias"
    damage(checkpoint, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"The model does not have model\.transformer\.blocks\.0\.q_proj\.bias"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_wrong_shape_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {"mlp_hidden_size": 128}
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = r"blocks\.0\.ff_out\.weight \(64, 192\) instead of \(64, 128\).* and 5 more tensors"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = LLaDAForDiffusionLM.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
    assert loaded.model.transformer.blocks[0].ff_out.weight.shape == (64, 128)


def test_pickles_are_refused(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="use_safetensors=False reads pickles"):
        LLaDAForDiffusionLM.from_pretrained(checkpoint, use_safetensors=False)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only pickle weights \(pytorch_model\.bin\).* convert them"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_folder_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_resizing_keeps_the_mask_row():
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    with pytest.raises(ValueError, match="500 rows would remove mask_token_id=510; keep at least 511"):
        model.resize_token_embeddings(500)


def test_a_tied_config_with_two_different_matrices_is_refused(tmp_path):
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"weight_tying": True}))
    with pytest.raises(ValueError, match="weight_tying is true.*set weight_tying to false"):
        LLaDAForDiffusionLM.from_pretrained(tmp_path)
