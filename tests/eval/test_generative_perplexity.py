"""Generative perplexity: what a judge counts, and the command from a model to its report."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import model_of, save_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.diffusion.gidd import GIDDProcess
from xdlm_hf.evaluation import generative_perplexity, published_text
from xdlm_hf.evaluation.generative_perplexity import EXACT, main
from xdlm_hf.evaluation.published_text import published_samples
from xdlm_hf.evaluation.text_judges import CausalJudge, NgramJudge, entropies, perplexity
from xdlm_hf.evaluation.text_models import row_name
from xdlm_hf.training.averages import EMA_FILE
from xdlm_hf.training.ema import ExponentialMovingAverage, named_in_config

LENGTH = 16
TEXT = "the cat sat on the mat and the dog ran after the cat "
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A diffusion model, a causal one with random weights, and a file of text."""
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "model", model_of(tokenizer, mixing_ratio=0.1, max_sequence_length=64), tokenizer)
    torch.manual_seed(1)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    judge = GPT2LMHeadModel(config).eval()
    for parameter in judge.parameters():
        parameter.data.mul_(8)  # far from uniform
    save_checkpoint(root / "judge", judge, tokenizer)
    (root / "text.txt").write_text(TEXT * 40)
    return root


def run(folders, *more, judge=None, **options):
    """The report of a small run."""
    output = folders / "report.json"
    asked = {"--model": folders / "model", "--judge": judge or folders / "judge", "--length": LENGTH, "--samples": 5}
    asked |= {"--output": output, "--batch_size": 2} | {f"--{name}": value for name, value in options.items()}
    main([*(str(part) for pair in asked.items() for part in pair), "--steps", "2", "4", *more])
    return json.loads(output.read_text())


# --------------------------------------------------------------------------------------------------------------------
# Judges


def test_a_judge_counts_what_the_paper_counts(folders, tokenizer):
    texts = [
        f"{EOT}the cat {EOT}sat on{EOT}",  # the first end stands first, without a score; others do not count
        f"the dog {EOT}ran after{EOT}",  # the first end counts
        "the mat",
        "cat",
    ]
    judge = CausalJudge(str(folders / "judge"), batch_size=3)
    nats, tokens = judge.score(texts, 1024)
    model = AutoModelForCausalLM.from_pretrained(folders / "judge")
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        counted = [at for at in range(1, len(ids)) if ids[at] != tokenizer.eos_token_id]
        first = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else 0
        counted += [first] if first else []
        assert tokens[number] == len(counted)
        expected = -sum(scores[at - 1, ids[at]].item() for at in counted)
        assert nats[number] == pytest.approx(expected, rel=1e-5)


def test_texts_are_cut_at_the_length_and_at_the_judges_limit(folders, tokenizer):
    judge = CausalJudge(str(folders / "judge"))
    text = TEXT * 20
    assert judge.score([text], 10)[1].tolist() == [9]
    assert judge.score([text], 1024)[1].tolist() == [63]
    assert judge.score([tokenizer.decode(tokenizer(text)["input_ids"][:10])], 10)[0] == judge.score([text], 10)[0]


def test_a_judge_that_knows_nothing_gives_the_vocabulary(tmp_path, tokenizer):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64, vocab_size=len(tokenizer))
    judge = GPT2LMHeadModel(config)
    judge.lm_head.weight.data.zero_()
    found = perplexity(
        *CausalJudge(str(save_checkpoint(tmp_path, judge, tokenizer))).score(["the cat sat", "the dog"], 64)
    )
    assert found["perplexity"] == pytest.approx(len(tokenizer), rel=1e-6)
    assert found["perplexity_standard_error"] == pytest.approx(0, abs=1e-3)


def test_perplexity_is_over_all_tokens():
    # exp(12 / 6); residuals of the texts from 2 nats a token are -2 and 2.
    found = perplexity(np.array([2.0, 10.0]), np.array([2.0, 4.0]))
    assert found["perplexity"] == pytest.approx(math.exp(2)) and found["judged_tokens"] == 6
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(2) * math.sqrt((4 + 4) * 2 / 1) / 6)
    assert "perplexity_standard_error" not in perplexity(np.array([2.0]), np.array([2.0]))
    with pytest.raises(ValueError, match="the 1 texts have no token to score"):
        perplexity(np.zeros(1), np.zeros(1))


def test_entropy_of_a_row():
    found = entropies(torch.tensor([[3, 3, 3, 3], [3, 3, 5, 5], [0, 1, 2, 3]]))
    assert found.tolist() == pytest.approx([0, math.log(2), math.log(4)])


def test_an_ngram_judge_prefers_the_text_that_it_knows():
    judge = NgramJudge([TEXT * 10], 3)
    nats, tokens = judge.score([TEXT, TEXT[::-1], "é" * len(TEXT), ""], 4)
    assert tokens.tolist() == [len(TEXT)] * 3 + [0]
    assert nats[0] < nats[1] < nats[2]
    assert judge.description["unit"] == "character"


def test_judges_that_cannot_judge_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="judge=.*none' cannot be read .*give the folder or Hub name of a causal"):
        CausalJudge(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is a diffusion model"):
        CausalJudge(str(folders / "model"))
    with pytest.raises(ValueError, match="text to fit an n-gram model to is empty"):
        NgramJudge([None, ""])


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_a_report_has_everything(folders, capsys):
    report = run(folders, "--save_texts", str(folders / "texts.jsonl"))
    assert report["row"] == "XDLM k=0.1" and report["sampling"] == EXACT and report["held_out"] is None
    assert [(cell["steps"], cell["num_forward_passes"]) for cell in report["cells"]] == [(2, 2), (4, 4)]
    for cell in report["cells"]:
        assert cell["perplexity"] > 1 and cell["perplexity_standard_error"] > 0 and cell["published"] is None
        assert 0 < cell["entropy"] <= math.log(LENGTH) and cell["entropy_standard_error"] > 0
    assert report["judge"]["unit"] == "token" and len(report["model_sha"]) == 64
    texts = [json.loads(line) for line in (folders / "texts.jsonl").read_text().splitlines()]
    assert [text["steps"] for text in texts] == [2] * 5 + [4] * 5
    # The stored samples are those that were judged.
    again = perplexity(*CausalJudge(str(folders / "judge")).score([text["text"] for text in texts[5:]], LENGTH))
    assert again["perplexity"] == pytest.approx(report["cells"][1]["perplexity"], rel=1e-6)
    printed = capsys.readouterr().out
    assert f"| 4 | 4 | {report['cells'][1]['perplexity']:.2f} ±" in printed and "Sampling: exact" in printed


def test_samples_depend_on_the_seed_alone(folders):
    first, again, other = (run(folders, seed=seed)["cells"] for seed in (0, 0, 1))
    assert first == again and first[0]["perplexity"] != other[0]["perplexity"]


def test_the_released_sampler_is_labelled_and_takes_a_pass_more(folders):
    report = run(folders, "--reference_compat")
    assert report["sampling"].startswith("reference_compat")
    assert [cell["num_forward_passes"] for cell in report["cells"]] == [3, 5]


def test_options_of_generation_are_passed_on(folders):
    report = run(folders, "--generate", '{"temperature": 0.5}', mixing_ratio=0.0)
    assert report["generate"] == {"sampler": "ancestral", "temperature": 0.5} and report["row"] == "MDLM"
    with pytest.raises(SystemExit, match="xdlm-gen-ppl: .*colour"):
        run(folders, "--generate", '{"colour": "red"}')


@pytest.mark.parametrize(("flags", "start"), [([], ""), (["--reference_compat"], "reference_compat: ")])
def test_another_sampler_is_not_called_exact(folders, capsys, flags, start):
    report = run(folders, "--generate", '{"sampler": "confidence"}', *flags)
    assert report["sampling"] == f"{start}the confidence sampler (not exact)"
    assert f"Sampling: {report['sampling']}." in capsys.readouterr().out


def test_held_out_text_stands_beside(folders, capsys):
    judge = f"ngram:{folders / 'text.txt'}"
    options = {"corpus": "lm1b", "corpus_files": folders / "text.txt", "judge": judge, "ngram_order": 3}
    report = run(folders, "--steps", "4", **options)
    assert report["held_out"]["corpus"] == "lm1b" and report["held_out"]["rows"] == 5
    # The judge has read this very text; the model's weights are random.
    assert report["held_out"]["perplexity"] < report["cells"][0]["perplexity"] / 3
    printed = capsys.readouterr().out
    assert "perplexity per character" in printed and "held-out text" in printed


def test_published_values_stand_beside_values_of_their_judge_and_length(folders, tokenizer, capsys):
    save_checkpoint(folders / "long", model_of(tokenizer, mixing_ratio=0.1, max_sequence_length=128), tokenizer)
    (folders / "gpt2-large").symlink_to(folders / "judge")
    (folders / "long.txt").write_text("\n".join([TEXT * 20] * 4))
    options = {"model": folders / "long", "samples": 2, "corpus": "lm1b", "corpus_files": folders / "long.txt"}
    (_, cell) = run(folders, judge=folders / "gpt2-large", length=128, **options)["cells"]
    expected = {"perplexity": 246.134, "entropy": 4.326, "source": "Table 11, XDLM k=0.1", "length": 128}
    assert cell["published"] == expected and "| 246.134 | 4.326 |" in capsys.readouterr().out
    for judge, length in (("judge", 128), ("gpt2-large", 64)):
        (_, cell) = run(folders, judge=folders / judge, length=length, **options)["cells"]
        assert cell["published"] is None and "| - | - |" in capsys.readouterr().out


def test_a_checkpoints_average_is_what_is_measured(folders):
    checkpoint = folders / "model"
    plain = run(folders)["cells"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ema = ExponentialMovingAverage(0.9)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    ema.start(model)
    ema.save(checkpoint)
    try:
        averaged, trained = run(folders), run(folders, "--trained_weights")
    finally:
        (checkpoint / EMA_FILE).unlink()
    assert averaged["weights"] == "the average in ema.safetensors" and averaged["cells"] != plain
    assert trained["weights"] == "as saved" and trained["cells"] == plain


def test_the_average_of_a_final_model_is_named_and_its_trained_weights_are_refused(folders, tokenizer):
    final = model_of(tokenizer, mixing_ratio=0.1, max_sequence_length=64)
    with named_in_config(final.config, 0.9):
        save_checkpoint(folders / "final", final, tokenizer)
    assert run(folders, model=folders / "final")["weights"] == "as saved, an average (ema_decay=0.9)"
    message = (
        r"--trained_weights: the weights of '.*final' are an average \(ema_decay=0.9\).* pass a checkpoint-N folder"
    )
    with pytest.raises(SystemExit, match=message):
        run(folders, "--trained_weights", model=folders / "final")


BAD = [
    (["--samples", "0"], "--samples 0 must be at least 1"),
    (["--steps", "0"], "--steps 0 must be at least 1"),
    (["--judge", "{root}/none"], "judge='{root}/none' cannot be read"),
    (["--judge", "ngram:{root}/none.txt"], "matches no file"),
    (["--length", "65"], "--length 65 exceeds the model's limit of 64"),
    (["--corpus_files", "a.txt"], "--corpus_files is for held-out text; pass --corpus, too"),
    (["--output", "{root}/none/report.json"], "there is no folder"),
    (["--tokenizer", "text8"], "the tokenizer's mask token|output layer"),
    (["--corpus", "lm1b", "--corpus_files", "{root}/none.txt"], "matches no file"),
    (["--generate", "[1]"], "must be a JSON object"),
    (["--generate", '{"steps": 4}'], "--generate cannot set 'steps', which the command sets itself; pass --steps"),
    (["--generate", '{"max_new_tokens": 4}'], "cannot set 'max_new_tokens', .*; pass --length"),
    (["--generate", '{"num_return_sequences": 4}'], "cannot set 'num_return_sequences', .*; pass --samples and"),
    (["--generate", '{"generator": 4}'], "cannot set 'generator', .*; pass --seed"),
    (["--generate", '{"seed": 4}'], "cannot set 'seed', .*; pass --seed"),
    (["--generate", '{"return_dict_in_generate": true}'], "cannot set 'return_dict_in_generate', .*; leave it out"),
    (["--generate", '{"reference_compat": true}'], "cannot set 'reference_compat', .*; pass --reference_compat"),
    (["--generate", '{"mixing_ratio": 0.5}'], "cannot set 'mixing_ratio', .*; pass --mixing_ratio"),
    (["--device", "abacus"], "--device abacus is not known"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_cannot_be_is_refused_before_anything_is_drawn(folders, monkeypatch, arguments, message):
    monkeypatch.setattr(generative_perplexity, "draw", lambda *args: pytest.fail("samples were drawn"))
    arguments = [part.replace("{root}", str(folders)) for part in arguments]
    with pytest.raises(SystemExit, match=message.replace("{root}", str(folders))):
        main(["--model", str(folders / "model"), "--judge", str(folders / "judge"), *arguments])


def test_models_have_the_papers_names():
    model = tiny_model()
    assert [row_name(model, k) for k in (0, 1e-3, 0.1, 1)] == ["MDLM", "XDLM k=0.001", "XDLM k=0.1", "UDLM"]
    for share, name in ((0.0, "GIDD"), (0.1, "GIDD p_u=0.1")):
        gidd = SimpleNamespace(noise_process=lambda share=share: GIDDProcess(48, 5, share))
        assert row_name(gidd, 0.0) == name


# --------------------------------------------------------------------------------------------------------------------
# Published values


def test_published_values():
    assert published_samples("openwebtext", "UDLM", 1024)["entropy"] == 5.769
    assert published_samples("openwebtext", "XDLM k=0.2", 32) is None
    assert published_samples("text8", "MDLM", 32) is None and published_samples("lm1b", "MDLM", 1024) is None
    # The paper's own averages, of the seven sets as printed.
    for row, values in published_text.ZERO_SHOT.items():
        sets = [value for name, value in values.items() if name != "average"]
        assert len(sets) == 7 and sum(sets) / 7 == pytest.approx(values["average"], abs=6e-3), row
        assert published_text.ZERO_SHOT_BY_STEP[row]["1M"] == values["average"]
    for row, values in published_text.LM1B_BY_STEP_PERPLEXITY.items():
        assert values["1M"] == published_text.LM1B_PERPLEXITY[row]["128"]
