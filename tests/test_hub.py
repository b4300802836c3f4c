"""Export for the Hub: loads where the package cannot be imported, states the facts on its card, never half-written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import CHECKPOINT, TINY, random_dit, tiny_model, tiny_unet, word_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.data.patch_vq import PatchVQ
from xdlm_hf.hub import export_for_hub, model_card

ROOT = Path(__file__).resolve().parent.parent

# Runs in another process, with an import hook that refuses the package, and exports once more from what it loaded.
REMOTE = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xdlm_hf":
            raise ModuleNotFoundError("No module named 'xdlm_hf'")


sys.meta_path.insert(0, Refuse())
try:
    import xdlm_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported, so this proves nothing")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, inputs, outputs, again = sys.argv[1:]
ids = load_file(inputs)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
same = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(same(ids).logits, logits)
kernel = model.noise_kernel()
sequences = model.generate(ids, steps=4, max_new_tokens=8)
assert sequences.shape == (ids.shape[0], ids.shape[1] + 8)
assert model.generate(steps=4, max_new_tokens=8).shape == (1, 8)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.mask_token_id == kernel.mask_token_id == model.config.mask_token_id
save_file({"logits": logits, "sequences": sequences, "k": torch.tensor(kernel.mixing_ratio)}, outputs)
model.save_pretrained(again)
with torch.no_grad():
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits, logits)
"""


@pytest.fixture
def model():
    return tiny_model(**TINY, init_std=0.2, mixing_ratio=0.1, eos_token_id=47, pad_token_id=47).eval()


def test_export_loads_where_the_package_is_not_importable(model, tmp_path):
    ids = torch.randint(0, 47, (2, 7), generator=torch.Generator().manual_seed(1))
    folder = export_for_hub(model, tmp_path / "my-model.v1", word_tokenizer(), base_model="a/b", license="mit")
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")
    arguments = [folder, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors", tmp_path / "again"]
    caches = {"HF_HOME": tmp_path / "home", "HF_MODULES_CACHE": tmp_path / "modules", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in caches.items()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        assert (outputs["logits"] - model(ids).logits).abs().max() < 1e-6
    assert outputs["k"].item() == pytest.approx(0.1)
    # Confidence sampling at temperature 0 draws nothing at random: the copied code gives the same text.
    assert torch.equal(outputs["sequences"], model.generate(ids, steps=4, max_new_tokens=8))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_llada.LLaDAForDiffusionLM"
    assert (tmp_path / "again" / "modeling_llada.py").read_text() == (folder / "modeling_llada.py").read_text()


def test_export_loads_with_the_package_and_leaves_no_trace(model, tmp_path):
    folder = export_for_hub(model, tmp_path / "exported")
    written = json.loads((folder / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAForDiffusionLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAForDiffusionLM",
    }
    assert {name: written[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id", "mixing_ratio")} == {
        "mask_token_id": 49,
        "eos_token_id": 47,
        "pad_token_id": 47,
        "mixing_ratio": 0.1,
    }
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LLaDAForDiffusionLM
    # Neither the exported model nor one loaded from the export writes code files afterwards.
    for name, other in {"loaded": loaded, "exported": model}.items():
        other.save_pretrained(tmp_path / name / "plain")
        assert not list((tmp_path / name / "plain").glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "plain" / "config.json").read_text())


@pytest.mark.parametrize("cls", [LLaDAConfig, LLaDAForDiffusionLM])
def test_transformers_own_registration_names_the_export(cls):
    # It copies the files of one folder alone, and the model's code is spread over several.
    with pytest.raises(ValueError, match=r"register_for_auto_class .* use xdlm_hf\.export_for_hub"):
        cls.register_for_auto_class()


def test_exported_code_is_the_package_code(model, tmp_path):
    folder = export_for_hub(model, tmp_path / "export")
    sources = {path.stem: path for path in (ROOT / "xdlm_hf").rglob("*.py")}
    exported = sorted(folder.glob("*.py"))
    assert {"configuration_llada", "modeling_llada", "noise", "schedules", "generate"} <= {p.stem for p in exported}
    for path in exported:
        ours, theirs = (p.read_text().splitlines() for p in (sources[path.stem], path))
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        assert all(
            re.match(r"\s*from \.+[\w.]+ import", a) and re.match(r"\s*from \.\w+ import", b) for a, b in changed
        )


def test_card_keeps_measured_and_published_results_apart(model):
    def card(**results):
        return model_card(model, name="me/tiny", **results)

    rows = [{"task": "GSM8K", "steps": 32, "score": "29.3 ± 1.3"}, {"task": "MBPP", "steps": 32, "score": "15.0 ± 1.6"}]
    published = [{"task": "GSM8K", "score": 24.49, "source": "arXiv 2602.01362, Table 16"}]
    text = card(measured=rows, published=published)
    own, _, others = text.partition("## Published elsewhere, not measured with these weights")
    assert "| task | steps | score |\n| --- | --- | --- |\n| GSM8K | 32 | 29.3 ± 1.3 |\n| MBPP" in own
    assert "24.49" not in own and "| GSM8K | 24.49 | arXiv 2602.01362, Table 16 |" in others
    assert "Nothing has been measured" in card() and "Published elsewhere" not in card()
    assert "pipeline_tag" not in text and "pipeline_tag: text-generation" in model_card(
        model, word_tokenizer(), name="x"
    )
    with pytest.raises(ValueError, match=r"published={'task': 'GSM8K'} names no source; add 'source'"):
        card(published=[{"task": "GSM8K"}])
    with pytest.raises(
        ValueError, match=r"measured: a row has the columns \['task'\], the first one \['score', 'steps'"
    ):
        card(measured=[rows[0], {"task": "MBPP"}])


def test_card_states_the_facts(model):
    card = model_card(
        model, word_tokenizer(), name="me/tiny-xdlm", base_model="GSAI-ML/LLaDA-8B-Base", license="mit", notes="## Data"
    )
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "GSAI-ML/LLaDA-8B-Base" and header["license"] == "mit"
    assert header["library_name"] == "transformers" and "xdlm" in header["tags"]
    for line in (
        "# me/tiny-xdlm",
        "| Base model | GSAI-ML/LLaDA-8B-Base |",
        "| Mixing ratio k (Eq. 7) | 0.1, masked and uniform noise (XDLM) |",
        "| Noise schedule | linear |",
        f"| Parameters | {model.num_parameters():,}, float32 |",
        "| Vocabulary N | 50 rows of the output layer |",
        "| Mask token | 49, `<mask>` |",
        "| Eos token | 47, `<eot>` |",
        "| Pad token | 47, `<eot>` |",
        "import xdlm_hf  # registers the model type",
        'model = AutoModelForCausalLM.from_pretrained("me/tiny-xdlm", dtype="auto", device_map="auto", '
        "trust_remote_code=True)",
        "## Data",
        "The code files: Apache-2.0. The weights: mit.",
    ):
        assert line in card.splitlines()


def test_card_of_a_model_from_scratch(model):
    model.config.mixing_ratio, model.config.pad_token_id = 0, None
    card = model_card(model, name="scratch")
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "| Base model | none: trained from scratch |" in card
    assert "| Mixing ratio k (Eq. 7) | 0, masked noise only (MDLM) |" in card
    assert "| Mask token | 49 |" in card and "| Pad token | none |" in card


def image_model(kind):
    """A model of images of 3 classes, and the tokenizer of its codes."""
    if kind == "pixels":
        return tiny_unet(image_size=4, image_channels=3, num_values=256, num_classes=3, mixing_ratio=0.1), None
    vqvae = PatchVQ(num_codes=16, patch_size=2)
    torch.nn.init.uniform_(vqvae.quantize.embedding.weight, -1, 1)
    return random_dit(vocab_size=17, mask_token_id=16, model_length=16, num_classes=3), vqvae


@pytest.mark.parametrize("kind", ["pixels", "codes"])
def test_the_card_of_an_image_model_shows_how_to_draw(kind, tmp_path, monkeypatch):
    """Its examples are run as they stand."""
    model, vqvae = image_model(kind)
    monkeypatch.chdir(tmp_path)
    card = (export_for_hub(model, "drawer", vqvae=vqvae) / "README.md").read_text()
    what = {
        "pixels": "| Images | 3 x 4 x 4 (channels, height, width), 256 values |",
        "codes": "| Images | 16 codes each, of a codebook of 16; their tokenizer is in `vqvae/` |",
    }[kind]
    assert what in card.splitlines() and "| Classes | 3, and none |" in card.splitlines()
    assert "A discrete diffusion model of images" in card and "AutoTokenizer" not in card
    with_package, without = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "XDLMImagePipeline" in with_package and "guidance_scale=2.0" in with_package
    assert "xdlm_hf" not in without and "trust_remote_code=True" in without
    found = {}
    exec(with_package, found)
    assert found["image"].size == ((4, 4) if kind == "pixels" else (8, 8)) and Path("image.png").is_file()
    exec(without, found)
    assert found["ids"].shape == (2, 48 if kind == "pixels" else 16)


def test_a_text_model_with_classes_says_so(model):
    assert "`class_labels=[0]` chooses a class" in model_card(random_dit(num_classes=4), name="by-class")
    assert "class" not in model_card(model, name="plain")


def test_a_vqvae_that_does_not_fit_is_refused(tmp_path):
    for vqvae, message in (
        (PatchVQ(num_codes=40, patch_size=2), "the vqvae has 40 codes, the model 17 rows and mask_token_id=16"),
        (torch.nn.Linear(1, 1), "vqvae=Linear has no codebook; pass the tokenizer of the model's images"),
    ):
        with pytest.raises(ValueError, match=message):
            export_for_hub(image_model("codes")[0], tmp_path / "out", vqvae=vqvae)
    assert list(tmp_path.iterdir()) == []


def test_occupied_folder_is_refused(model, tmp_path):
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not an empty folder; use a new one"):
        export_for_hub(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_empty_folder_is_used(model, tmp_path):
    assert (export_for_hub(model, tmp_path) / "README.md").is_file()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_tokenizer(mask="w3"), r"the tokenizer's mask_token_id=3 differs from the model's 49"),
        (word_tokenizer(size=60), r"the tokenizer has 60 tokens, the model 50 rows"),
    ],
)
def test_foreign_tokenizer_is_refused(model, tmp_path, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        export_for_hub(model, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_without_mask_token_is_accepted(model, tmp_path):
    export_for_hub(model, tmp_path / "out", word_tokenizer(mask=None))


def test_other_models_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="cannot export a LLaDAModel; pass a LLaDAForDiffusionLM"):
        export_for_hub(model.model, tmp_path / "out")


def test_unmerged_adapters_are_refused(model, tmp_path):
    lora = LoraConfig(r=2, target_modules=r".*blocks\.\d+\.q_proj", task_type=None)
    adapted = get_peft_model(model, lora)
    with pytest.raises(ValueError, match="cannot export a PeftModel; merge the adapter first"):
        export_for_hub(adapted, tmp_path / "out")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "base")
    get_peft_model(merged, lora).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    # Transformers injects this adapter into a LLaDAForDiffusionLM, whose save_pretrained then writes the adapter only.
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot export a LLaDAForDiffusionLM with an adapter"):
        export_for_hub(injected, tmp_path / "out")


def test_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    tokenizer = word_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_for_hub(model, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert LLaDAForDiffusionLM._auto_class is None and LLaDAConfig._auto_class is None


def test_export_to_the_working_folder_and_after_a_broken_one(tmp_path, monkeypatch):
    model = LLaDAForDiffusionLM.from_pretrained(CHECKPOINT)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert (export_for_hub(model, ".") / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
