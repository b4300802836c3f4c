"""Tiny models, configs and tokenizers: every test has its own from here, of random weights and a fixed seed.

The sizes that a test names are those that its bounds or its counts depend on. What several training runs share is in
training.py, the dense oracle in reference.py.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from xdlm_hf import (
    DiTConfig,
    DiTForDiffusionLM,
    LLaDAConfig,
    LLaDAForDiffusionLM,
    PixelUNetConfig,
    PixelUNetForDiffusion,
)

# A checkpoint of 512 rows, with logits and generations recorded from the released code.
CHECKPOINT = Path(__file__).resolve().parent / "fixtures" / "tiny-llada"

# config.json of the public 8B checkpoints, field by field.
LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

TINY = dict(d_model=32, n_heads=4, n_layers=2, mlp_hidden_size=64, vocab_size=50, mask_token_id=49)


def tiny_model(seed=0, **options):
    """LLaDA of two layers and 48 rows, with the weights of `seed`; `options` are those of LLaDAConfig."""
    sizes = dict(d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=48, max_sequence_length=64)
    ids = dict(mask_token_id=5, pad_token_id=1, eos_token_id=1)
    torch.manual_seed(seed)
    return LLaDAForDiffusionLM(LLaDAConfig(**{**sizes, **ids, **options}))


def small_model(**options):
    """For generation: one layer, 24 rows, of which 20 is [MASK], 21 the end of text and 22 padding."""
    sizes = dict(d_model=16, n_layers=1, mlp_hidden_size=32, vocab_size=24)
    ids = dict(mask_token_id=20, eos_token_id=21, pad_token_id=22)
    return tiny_model(**{**sizes, **ids, **options}).eval()


DIT = {"hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "model_length": 24, "vocab_size": 40}


def random_dit(**options):
    """DiT of two blocks and 40 rows; every weight random, also those that begin at zero."""
    torch.manual_seed(0)
    model = DiTForDiffusionLM(DiTConfig(**{**DIT, **options}))
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def model_of(tokenizer, **options):
    """One layer with a row for each token; random weights far from uniform, so that prompts get different answers."""
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(n_layers=1, mlp_hidden_size=64, vocab_size=len(tokenizer), max_sequence_length=512, init_std=0.3)
    return tiny_model(**{**sizes, **ids, **options}).eval()


def save_checkpoint(folder, model, tokenizer):
    """Writes a checkpoint with its tokenizer, as the package's programs read it; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(size=50, mask="<mask>"):
    """A tokenizer of whole words w0, w1, ..., with 47 the end of text and padding and 49 the mask, as in TINY."""
    vocabulary = {f"w{i}": i for i in range(size)} | {"<mask>": 49, "<eot>": 47}
    del vocabulary["w49"], vocabulary["w47"]
    names = {"mask_token": mask, "eos_token": "<eot>", "pad_token": "<eot>"}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})


def tiny_unet(seed=0, **options):
    """A pixel U-Net of two levels for images of 6 x 2 x 2 with 8 values and 4 classes, in evaluation mode."""
    sizes = dict(channels=8, channel_multipliers=[1, 2], residual_blocks=1, image_size=2, image_channels=6)
    torch.manual_seed(seed)
    return PixelUNetForDiffusion(PixelUNetConfig(**{**sizes, "num_values": 8, "num_classes": 4, **options})).eval()
