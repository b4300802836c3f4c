"""Perplexity of the paper's sets: the bound against the trainer's and a closed form, and the released protocol."""

import json
import math

import datasets
import pytest
import torch
from models import model_of, save_checkpoint
from training import arguments

from xdlm_hf import DiTConfig, DiTForDiffusionLM, LLaDAForDiffusionLM
from xdlm_hf.data.corpora import ZERO_SHOT
from xdlm_hf.data.detokenizers import lm1b
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.data.wrapping import WrappedDataset
from xdlm_hf.evaluation import perplexity, published_text
from xdlm_hf.evaluation.perplexity import EPS, Scorer, _parser, averages, main, published_value
from xdlm_hf.training.trainer import XDLMTrainer

LENGTH = 16
TEXT = "the cat sat on the mat and the dog ran after the cat "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("model")
    save_checkpoint(root, model_of(tokenizer, mixing_ratio=0.1, max_sequence_length=64), tokenizer)
    (root / "text.txt").write_text("".join(f"{TEXT}{number}\n" for number in range(13)))
    return root


def rows_of(tokenizer, number):
    texts = [f"{TEXT} {place}" for place in range(number)]
    return WrappedDataset(datasets.Dataset.from_dict({"text": texts}), tokenizer, LENGTH)


def scorer(model, tokenizer, **options):
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return Scorer(model, tokenizer, _parser().parse_args(["--model", "m", "--dataset", "lm1b", *flags]))


# --------------------------------------------------------------------------------------------------------------------
# The two values


@pytest.mark.parametrize("k", [0.0, 0.1])
def test_bound_is_the_trainers_evaluation(tmp_path, tokenizer, k):
    model, rows = model_of(tokenizer, mixing_ratio=k), rows_of(tokenizer, 9)
    assert len(rows[len(rows) - 1]["input_ids"]) < LENGTH  # the last row is padded
    found = scorer(model, tokenizer, seed=7, nelbo_samples=3, batch_size=4).bound(rows)
    args = arguments(tmp_path, mixing_ratio=k, nelbo_samples=3, per_device_eval_batch_size=4)
    expected = XDLMTrainer(model=model, args=args, eval_dataset=rows, processing_class=tokenizer).evaluate()
    assert found["nelbo"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["nelbo_standard_error"] == pytest.approx(expected["eval_loss_standard_error"], rel=1e-5)


def test_a_gidd_model_is_scored_with_its_own_schedule(tmp_path, tokenizer):
    sizes = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "model_length": 64}
    noise = {"mask_token_id": tokenizer.mask_token_id, "noise_process": "gidd", "p_uniform": 0.1}
    model, rows = (
        DiTForDiffusionLM(DiTConfig(**sizes, **noise, vocab_size=len(tokenizer))).eval(),
        rows_of(tokenizer, 5),
    )
    one = scorer(model, tokenizer, seed=7, nelbo_samples=3, batch_size=4)
    args = arguments(tmp_path, nelbo_samples=3, per_device_eval_batch_size=4)
    expected = XDLMTrainer(model=model, args=args, eval_dataset=rows, processing_class=tokenizer).evaluate()
    assert one.bound(rows)["nelbo"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert math.isfinite(one.released(rows)["nelbo"])


def test_values_of_a_model_that_knows_nothing(tokenizer):
    """All tokens alike: at k = 0 the NELBO is log(N - 1), [MASK] being excluded; the released times miss eps of it."""
    model, rows = model_of(tokenizer, mixing_ratio=0.0), rows_of(tokenizer, 300)
    model.get_output_embeddings().weight.data.zero_()
    nats = math.log(len(tokenizer) - 1)
    one = scorer(model, tokenizer)
    bound, released = one.bound(rows), one.released(rows)
    # Five standard errors: a false alarm in 1.7 million seeds; the seed is fixed.
    assert abs(bound["nelbo"] - nats) < 5 * bound["nelbo_standard_error"] < 0.2 * nats
    assert abs(released["nelbo"] - (1 - EPS) * nats) < 5 * released["nelbo_standard_error"] < 0.4 * nats
    assert released["nelbo_standard_error"] > bound["nelbo_standard_error"]
    assert bound["perplexity"] == pytest.approx(math.exp(bound["nelbo"]))


def test_the_released_times_are_those_of_a_batch(tokenizer, monkeypatch):
    model, rows, seen = model_of(tokenizer, mixing_ratio=0.1), rows_of(tokenizer, 9), []
    one = scorer(model, tokenizer, batch_size=5)
    nats = one._nats

    def watched(process, batch):
        seen.append((process.schedule.name, batch["t"], batch["input_ids"]))
        return nats(process, batch)

    monkeypatch.setattr(one, "_nats", watched)
    one.released(rows)
    assert len(seen) == -(-len(rows) // 5) and {name for name, _, _ in seen} == {"loglinear"}
    for _, t, _ in seen:
        strata = ((t - EPS) / (1 - EPS) * len(t)).floor()
        assert strata.tolist() == list(range(len(t))) and EPS <= t.min() and t.max() <= 1
    # Every row once, in random order; the last, shorter row is padded where it stands.
    read = [row.tolist() for _, _, ids in seen for row in ids]
    given = [row["input_ids"].tolist() for row in rows]
    given[-1] += [tokenizer.pad_token_id] * (LENGTH - len(given[-1]))
    assert sorted(read) == sorted(given) and read != given


def test_bound_does_not_depend_on_the_batch(tokenizer):
    model, rows = model_of(tokenizer, mixing_ratio=0.5), rows_of(tokenizer, 7)
    values = [scorer(model, tokenizer, batch_size=size).bound(rows)["nelbo"] for size in (1, 4)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


class Timed(LLaDAForDiffusionLM):
    """Takes sigma, and writes it down."""

    conditioning = ("timesteps",)

    def forward(self, *args, timesteps=None, **kwargs):
        self.sigma.append(timesteps)
        return super().forward(*args, **kwargs)


def test_a_network_with_times_is_told_the_noise_of_each_row(tokenizer, monkeypatch):
    """Whatever schedule it was trained with: sigma = -log alpha of the noise that its rows have."""
    model = model_of(tokenizer, mixing_ratio=0.1, noise_schedule="cosine")
    model.__class__, model.sigma, expected = Timed, [], []
    one = scorer(model, tokenizer, batch_size=4)
    nats = one._nats
    monkeypatch.setattr(
        one,
        "_nats",
        lambda process, batch: (expected.append(-process.alpha(batch["t"]).log()), nats(process, batch))[1],
    )
    one.bound(rows_of(tokenizer, 7))
    one.released(rows_of(tokenizer, 7))
    assert len(model.sigma) == len(expected) > 4
    # The released schedule's alpha is 1e-3 at least; near alpha = 0 the cosine's time rounds sigma away, in float32.
    assert torch.allclose(torch.cat(model.sigma).double(), torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_another_mixing_ratio_is_another_noise(tokenizer):
    model, rows = model_of(tokenizer, mixing_ratio=0.0), rows_of(tokenizer, 7)
    plain, mixed = scorer(model, tokenizer).bound(rows), scorer(model, tokenizer, mixing_ratio=0.5).bound(rows)
    assert plain["nelbo"] != mixed["nelbo"]


# --------------------------------------------------------------------------------------------------------------------
# The command


def run(folder, *more):
    output = folder / "report.json"
    fixed = ["--model", folder, "--length", LENGTH, "--output", output, "--nelbo_samples", 2]
    main([str(part) for part in (*fixed, *more)])
    return json.loads(output.read_text())


def test_a_report_has_everything(folder, capsys):
    text = folder / "text.txt"
    sets = [f"{name}={text}" for name in ZERO_SHOT]
    report = run(folder, "--dataset", "zero-shot", "--local", *sets, "--max_rows", 6, "--released")
    assert list(report["sets"]) == list(ZERO_SHOT) and report["row"] == "XDLM k=0.1"
    for name, values in report["sets"].items():
        assert values["published"] == published_text.ZERO_SHOT["XDLM k=0.1"][name]
        assert values["rows"]["rows"] == 6 and values["bound"]["tokens"] == 6 * LENGTH
        for kind in ("bound", "released"):
            assert values[kind]["perplexity"] > 1 and values[kind]["perplexity_standard_error"] > 0
    average = report["zero_shot_average"]
    assert average["published"] == 54.11
    assert average["bound"]["perplexity"] == pytest.approx(
        sum(values["bound"]["perplexity"] for values in report["sets"].values()) / 7
    )
    printed = capsys.readouterr().out
    assert f"| lambada | 6 | {report['sets']['lambada']['bound']['perplexity']:.3f} ±" in printed
    assert "| zero-shot average |" in printed and "| 54.110 |" in printed


def test_rows_are_cut_as_released_on_request(folder):
    common = ["--dataset", "lm1b", "--local", f"lm1b={folder / 'text.txt'}"]
    plain, released = run(folder, *common), run(folder, *common, "--released")
    assert plain["rows_cut"] == "without loss" and released["rows_cut"] == "as released"
    assert plain["sets"]["lm1b"]["rows"]["dropped_tokens"] == 0 < released["sets"]["lm1b"]["rows"]["dropped_tokens"]
    assert released["sets"]["lm1b"]["rows"]["text_tokens"] == plain["sets"]["lm1b"]["rows"]["text_tokens"] - 13


def test_values_of_other_rows_stand_alone(folder, capsys):
    """Cut without loss, or of another part, they are not those of the published values."""
    common = ["--local", *(f"{name}={folder / 'text.txt'}" for name in ZERO_SHOT), "--max_rows", 2]
    report = run(folder, "--dataset", "zero-shot", *common)
    found = [values["published"] for values in (*report["sets"].values(), report["zero_shot_average"])]
    assert found == [None] * 8 and capsys.readouterr().out.count(" | - |") == 8
    for part, expected in (("test", None), ("validation", published_text.ZERO_SHOT["XDLM k=0.1"]["ptb"])):
        flags = ["--dataset", "ptb", "--local", f"ptb={folder / 'text.txt'}", "--released", "--part", part]
        assert run(folder, *flags)["sets"]["ptb"]["published"] == expected
    options = _parser().parse_args(["--model", "m", "--dataset", "openwebtext", "--released"])
    assert published_value(options, "openwebtext", "MDLM") == 23.321
    assert published_value(options, "text8", "MDLM") is published_value(options, "ptb", "GIDD p_u=0.1") is None


def test_the_average_has_the_errors_of_its_parts():
    values = {"perplexity": 10.0, "perplexity_standard_error": 0.7}
    found = averages(
        {name: {"bound": values, "released": {"perplexity": 3.0}, "published": 1.0} for name in ZERO_SHOT}, "MDLM"
    )
    assert found["bound"] == {"perplexity": 10.0, "perplexity_standard_error": pytest.approx(0.7 / math.sqrt(7))}
    assert found["released"] == {"perplexity": 3.0} and found["published"] == 53.65


BAD = [
    (["--dataset", "lm1b", "--nelbo_samples", "0"], "--nelbo_samples 0 must be at least 1"),
    (["--dataset", "lm1b", "--local", "lm1b"], "--local 'lm1b' must be SET=FILE"),
    (["--dataset", "lm1b", "--local", "ptb=a.txt"], "ptb is not among the sets to score"),
    (["--dataset", "lm1b", "--local", "c4=a.txt"], "corpus 'c4' is not known"),
    (["--dataset", "lm1b", "--part", "validation"], "'lm1b' has no part 'validation'"),
    (["--dataset", "lm1b", "--text_column", "text"], "is for local files; pass them by --local"),
    (["--dataset", "lm1b", "--local", "lm1b=/none.txt"], "matches no file"),
    (["--dataset", "lm1b", "--output", "/none/report.json"], "there is no folder"),
    (["--dataset", "lm1b", "--length", "65"], "exceeds the model's limit of 64"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags[2:]) for flags, _ in BAD])
def test_what_cannot_be_is_refused_before_anything_is_scored(folder, monkeypatch, flags, message):
    monkeypatch.setattr(perplexity, "score", lambda *args: pytest.fail("rows were scored"))
    with pytest.raises(SystemExit, match=f"xdlm-perplexity: .*{message}"):
        main(["--model", str(folder), *flags])


def test_a_saved_model_is_scored_like_the_one_in_memory(folder, tokenizer):
    report = run(folder, "--dataset", "lm1b", "--local", f"lm1b={folder / 'text.txt'}", "--seed", 3)
    model = LLaDAForDiffusionLM.from_pretrained(folder).eval()
    texts = (folder / "text.txt").read_text().splitlines()
    rows = WrappedDataset(datasets.Dataset.from_dict({"text": [lm1b(text) for text in texts]}), tokenizer, LENGTH)
    expected = scorer(model, tokenizer, seed=3, nelbo_samples=2).bound(rows)
    assert report["sets"]["lm1b"]["bound"]["nelbo"] == pytest.approx(expected["nelbo"], rel=1e-6)
    assert torch.equal(rows[0]["input_ids"][:1], torch.tensor([tokenizer.bos_token_id]))
