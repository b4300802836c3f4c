"""LLaDAConfig: the public files round-trip, standard names work, and what is not computed is refused by name."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import CHECKPOINT, LLADA_8B, TINY
from transformers import AutoConfig

import xdlm_hf  # noqa: F401  (registers the model type)
from xdlm_hf.models.llada.configuration_llada import LLaDAConfig

RECORDED = json.loads((CHECKPOINT / "config.json").read_text())


@pytest.mark.parametrize("original", [LLADA_8B, RECORDED], ids=["8B", "tiny"])
def test_public_config_round_trips(original, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(original))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LLaDAConfig
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    # torch_dtype is the old name of dtype, auto_map names files that are not ours, the version is the writer's.
    renamed = {"torch_dtype", "auto_map", "transformers_version"}
    assert {name: saved[name] for name in original.keys() - renamed} == {
        name: original[name] for name in original.keys() - renamed
    }
    assert saved.keys() - original.keys() <= {"mixing_ratio", "noise_schedule", "dtype"}
    assert saved["mixing_ratio"] == 0.0 and saved["noise_schedule"] == "linear"
    assert "auto_map" not in saved


def test_noise_is_stored(tmp_path):
    LLaDAConfig(**TINY, mixing_ratio=0.1, noise_schedule="cosine").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.mixing_ratio, config.noise_schedule) == (0.1, "cosine")
    assert AutoConfig.from_pretrained(tmp_path, mixing_ratio=1).mixing_ratio == 1


def test_standard_names_read_and_write_the_llada_fields():
    config = LLaDAConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        vocab_size=50,
    )
    assert (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads) == (64, 3, 8, 2)
    assert (config.mlp_hidden_size, config.max_sequence_length, config.weight_tying) == (96, 128, True)
    config.d_model, config.weight_tying = 128, False
    assert (config.hidden_size, config.tie_word_embeddings) == (128, False)
    assert "hidden_size" not in config.to_dict()


def test_derived_values_follow_standard_names():
    config = LLaDAConfig(hidden_size=48, num_attention_heads=6, intermediate_size=None, vocab_size=50)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (6, 192, 50)


def test_legal_edges():
    assert LLaDAConfig(**TINY | {"mask_token_id": 0}).mask_token_id == 0
    assert LLaDAConfig(**TINY | {"mask_token_id": None}, mixing_ratio=1).mask_token_id is None
    assert LLaDAConfig(**TINY | {"mask_token_id": 60}, embedding_size=64).embedding_size == 64
    assert LLaDAConfig(**TINY, eos_token_id=[3, 4]).eos_token_id == [3, 4]
    assert LLaDAConfig(**TINY, bias_for_layer_norm=None, multi_query_attention=False, rope_scaling=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("attention_layer_norm", True),
        ("multi_query_attention", True),
        ("clip_qkv", 8.0),
        ("rope", False),
        ("rope_full_precision", False),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("activation_type", "gelu"),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("num_experts", 64),
        ("expert_intermediate_size", 1024),
    ],
)
def test_options_not_computed_are_refused(field, value):
    with pytest.raises(ValueError) as error:
        LLaDAConfig(**TINY | {field: value})
    assert str(error.value).startswith(f"{field}={value!r} is an option of the LLaDA format that this package does not")
    assert f"{field} must be " in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1\.5 must lie in \[0, 1\]"),
        ({"mixing_ratio": -0.1}, r"mixing_ratio=-0\.1 must lie in \[0, 1\]"),
        ({"mixing_ratio": float("nan")}, r"mixing_ratio=nan must lie in"),
        ({"noise_schedule": "sigmoid"}, r"noise_schedule='sigmoid' is not known; choose one of"),
        ({"n_heads": 5}, r"d_model=32 is not a multiple of n_heads=5"),
        ({"n_heads": 32}, r"heads of odd width 1; .* need an even width"),
        ({"n_kv_heads": 3}, r"n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"embedding_size": 49}, r"embedding_size=49 is smaller than vocab_size=50"),
        ({"mask_token_id": 50}, r"mask_token_id=50 is not a row of the embedding, which has 50"),
        ({"mask_token_id": -1}, r"mask_token_id=-1 is not a row"),
        ({"eos_token_id": [3, 99]}, r"eos_token_id=99 is not a row"),
        ({"pad_token_id": 50}, r"pad_token_id=50 is not a row"),
        ({"n_layers": 0}, r"n_layers=0 must be positive"),
        ({"rope_theta": 0.0}, r"rope_theta=0\.0 must be positive"),
        ({"residual_dropout": 1.0}, r"residual_dropout=1\.0 must lie in \[0, 1\)"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**TINY | changes)


def test_wrong_types_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="'d_model' expected int, got str"):
        LLaDAConfig(**TINY | {"d_model": "32"})
    with pytest.raises(StrictDataclassFieldValidationError, match="mixing_ratio"):
        LLaDAConfig(**TINY, mixing_ratio=True)


def test_overrides_at_loading_are_checked(tmp_path):
    LLaDAConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mixing_ratio=2\.0 must lie in"):
        AutoConfig.from_pretrained(tmp_path, mixing_ratio=2.0)
