"""FID and Inception Score: known values, reference files, the command from folder to report, and what is refused."""

import json
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import tiny_unet
from PIL import Image
from torch import nn

from xdlm_hf.evaluation.fid import _parser, draw, load_pipeline, main, measure, score
from xdlm_hf.evaluation.image_features import SeededFeatures, load_extractor, make_reference, read_reference
from xdlm_hf.evaluation.published_images import published_images

CPU = torch.device("cpu")
SHAPE = {"image_size": 4, "image_channels": 3, "num_values": 256, "num_classes": 3}


class Given(nn.Module):
    """An extractor of images that are features already, (B, D, 1, 1), and logits."""

    def __init__(self, logits=None):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        features = images[:, :, 0, 0]
        return features if self.logits is None else (features, self.logits)


def distance(reference_features, features, logits=None):
    reference = make_reference("set", [reference_features[..., None, None]], Given(), CPU, {})
    batches = iter(features[..., None, None].split(7) if logits is None else [features[..., None, None]])
    return score(batches, reference, Given(logits), CPU, PartialState(cpu=True))


def white(rows, width, seed):
    """Features with mean 0 and covariance 1 in this very sample."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (rows - 1))).T


# --------------------------------------------------------------------------------------------------------------------
# Known values


def test_a_set_has_no_distance_from_itself_in_any_order():
    features = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    assert abs(distance(features, features)["fid"]) < 1e-8
    assert abs(distance(features, features[torch.randperm(40)])["fid"]) < 1e-8
    assert distance(features, features)["inception_score"] is None


def test_the_distance_of_gaussians():
    """|m|^2 + sum (1 - s)^2 for covariances 1 and diag(s^2), that of the sample being exact."""
    scales, shift = torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    found = distance(white(50, 4, 0), white(31, 4, 1) * scales + shift)["fid"]
    assert found == pytest.approx((shift @ shift + ((1 - scales) ** 2).sum()).item(), rel=1e-9)


def test_the_inception_score_of_known_logits():
    """1 if every image has the same classes, the number of classes if each has one and all are as many."""
    features = white(60, 3, 0)
    same = distance(features, features, torch.zeros(60, 4))
    assert same["inception_score"] == pytest.approx(1, abs=1e-6) and same["inception_score_deviation"] < 1e-6
    sure = 100.0 * torch.eye(4).repeat(300, 1)
    scores = [distance(features, white(1200, 3, 1), sure)["inception_score"] for _ in range(2)]
    assert scores[0] == scores[1] and 3.8 < scores[0] <= 4  # splits of 120 images are not quite balanced


# --------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, a model, and the reference of the images."""
    folder = tmp_path_factory.mktemp("fid")
    rng = np.random.default_rng(0)
    for number in range(60):
        place = folder / "images" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)).save(place / f"{number}.png")
    model = tiny_unet(**SHAPE, vocab_size=None, mixing_ratio=0.1)
    torch.nn.init.normal_(model.unet.conv_out.weight)
    model.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        main(["--make_reference", "small", "--dataset", str(folder / "images"), "--image_size", "4", *where(folder)])
    return folder


def where(folder):
    return ["--references", str(folder / "references"), "--extractor", "seeded", "--device", "cpu"]


def options(folder, *more):
    arguments = ["--model", str(folder / "model"), "--reference", "small", *where(folder), "--steps", "1", "2"]
    return [*arguments, "--num_images", "32", "--batch_size", "8", *more]


def test_the_reference_says_what_it_is(folder):
    reference = read_reference(folder / "references" / "small.npz")
    assert (reference.name, reference.count, reference.outer.shape) == ("small", 60, (24, 24))
    assert reference.total.dtype == reference.outer.dtype == np.float64
    assert reference.about["extractor"] == "seeded" and reference.about["shape"] == [3, 4, 4]
    assert reference.about["transform"].startswith("shorter side to 4 (PIL bilinear)")
    assert reference.about["versions"].keys() == {"torch", "torchmetrics", "numpy"}


def test_from_a_model_to_the_report(folder, capsys):
    output = folder / "report.json"
    main(options(folder, "--guidance_scale", "1", "3", "--published", "cifar10", "--output", str(output)))
    report = json.loads(output.read_text())
    assert report["reference"]["name"] == "small" and report["reference"]["num_images"] == 60
    assert (report["row"], report["mixing_ratio"], report["extractor"]) == ("XDLM k=0.1", 0.1, "seeded")
    cells = [(cell["steps"], cell["guidance_scale"], cell["gamma"], cell["num_images"]) for cell in report["cells"]]
    assert cells == [(1, 1, 0, 32), (2, 1, 0, 32), (1, 3, 2, 32), (2, 3, 2, 32)]
    assert all(cell["fid"] > 0 and cell["inception_score"] >= 1 for cell in report["cells"])
    assert len({cell["fid"] for cell in report["cells"]}) == 4
    printed = capsys.readouterr().out
    assert "Reference: small, 60 images. Extractor: seeded." in printed and "| 2 | 3 | 32 | " in printed


def test_images_are_balanced_and_do_not_depend_on_the_number_of_processes(folder):
    chosen = _parser().parse_args(options(folder))
    pipeline, _, _ = load_pipeline(chosen)
    labels = []
    generate = pipeline.transformer.generate

    def spy(class_labels, **settings):
        labels.extend(class_labels.tolist())
        return generate(class_labels=class_labels, **settings)

    pipeline.transformer.generate = spy

    def images(index, count):
        state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=False)
        return list(draw(chosen, pipeline, 2, 1.0, state))

    whole = images(0, 1)
    assert [labels.count(c) for c in range(3)] == [11, 11, 10] and [len(part) for part in whole] == [8] * 4
    shared = [images(index, 2) for index in range(2)]
    assert all(part.equal(shared[i % 2][i // 2]) for i, part in enumerate(whole))
    assert not whole[0].equal(whole[1]) and whole[0].dtype == torch.uint8


def test_a_saved_pipeline_draws_what_its_model_draws(folder, tmp_path):
    chosen, state = _parser().parse_args(options(folder)), PartialState(cpu=True)
    pipeline, _, _ = load_pipeline(chosen)
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    pipeline.transformer.save_pretrained(tmp_path / "run")
    images = next(draw(chosen, pipeline, 2, 1.0, state))
    for place, model in (("run", "run"), ("run/pipeline", "run/pipeline/transformer")):
        chosen.model = str(tmp_path / place)
        again, name, average = load_pipeline(chosen)
        assert name == str(tmp_path / model) and not average
        assert next(draw(chosen, again, 2, 1.0, state)).equal(images)


@pytest.mark.slow
def test_two_processes_report_what_one_does(folder):
    reports = []
    for processes in (1, 2):
        output = folder / f"{processes}.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launch, "-m", "xdlm_hf.evaluation.fid", *options(folder, "--output", str(output))]
        subprocess.run(command, check=True)
        reports.append(json.loads(output.read_text())["cells"])
    for one, two in zip(*reports, strict=True):
        for name in ("fid", "inception_score", "inception_score_deviation"):
            assert two[name] == pytest.approx(one[name], rel=1e-6)


def test_an_extractor_may_be_any_module():
    extractor = load_extractor("xdlm_hf.evaluation.image_features:SeededFeatures")
    assert isinstance(extractor, SeededFeatures) and not extractor.training
    grey = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    assert extractor(grey)[0].equal(SeededFeatures()(grey.repeat(1, 3, 1, 1))[0])


# --------------------------------------------------------------------------------------------------------------------
# Published values


def test_both_readings_of_the_published_guidance():
    gamma, scale = (published_images("imagenet", "XDLM k=0.1", 8, guidance) for guidance in (3.0, 2.0))
    assert gamma["fid"] == scale["fid"] == 8.956 and gamma["source"] == "Table 13, XDLM k=0.1"
    assert "gamma = 2 (guidance_scale 3)" in gamma["reading"] and "1 + gamma = 2" in scale["reading"]
    plain = published_images("cifar10", "UDLM", 512, 1.0)
    assert (plain["fid"], plain["inception_score"], plain["source"]) == (25.144, 7.372, "Table 14, UDLM")
    assert plain["reference"] == "training images" and plain["samples"] == 50_000 and "reading" not in plain
    assert published_images("cifar10", "UDLM", 512, 3.0)["fid"] == 18.592
    early = published_images("imagenet", "GIDD", 16, 1.0, 200_000)
    assert (early["fid"], early["inception_score"], early["source"]) == (36.878, 33.042, "Table 19, GIDD")
    none_published = [("cifar10", "UDLM", 16, 1.0), (None, "UDLM", 512, 1.0), ("imagenet", "MDLM", 8, 1.5)]
    none_published += [("imagenet", "GIDD", 8, 1.0, 200_000), ("imagenet", "GIDD", 16, 1.0, 200_500)]
    for none in none_published:
        assert published_images(*none) is None


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num_images", "24"], "--num_images: 24 images are too few for the covariance of 24 features"),
        (["--num_images", "1", "--allow_few"], "1 images are too few"),
        (["--reference", "other"], "other.npz is not a file; make one with --make_reference"),
        (["--extractor", "inception"], "was made with the extractor 'seeded', not 'inception'"),
        (["--guidance_scale", "0.5"], "--guidance_scale 0.5 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--generate", "3"], "--generate 3 must be a JSON object"),
        (["--output", "missing/report.json"], "there is no folder 'missing'"),
        (["--model", "nowhere"], "model='nowhere' cannot be read"),
    ],
)
def test_bad_options_are_refused(folder, more, message):
    with pytest.raises(SystemExit) as refused:
        main(options(folder, *more))
    assert message in str(refused.value)


def test_models_and_references_that_do_not_fit_are_refused(folder, tmp_path):
    chosen = _parser().parse_args(options(folder))
    chosen.reference = None
    with pytest.raises(ValueError, match="--reference is missing: FID compares with named statistics"):
        measure(chosen)
    reference = read_reference(folder / "references" / "small.npz")
    for name, about, message in (
        (" ", reference.about, "has no name"),
        ("small", {**reference.about, "shape": [3, 8, 8]}, r"\[3, 8, 8\], but the model draws \[3, 4, 4\]"),
    ):
        type(reference)(name, 60, reference.total, reference.outer, about).save(tmp_path / "changed.npz")
        chosen.reference = str(tmp_path / "changed.npz")
        with pytest.raises(ValueError, match=message):
            measure(chosen)
    np.savez(tmp_path / "other.npz", sum=reference.total)
    chosen.reference = str(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="it lacks about, count, name, outer"):
        measure(chosen)
    tiny_unet(**{**SHAPE, "num_classes": None}, vocab_size=None).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="guides by class, but '.*' has no classes"):
        main(options(folder, "--model", str(tmp_path / "model"), "--guidance_scale", "2"))


def test_a_mask_among_the_samples_is_refused(folder, monkeypatch):
    chosen = _parser().parse_args(options(folder))
    pipeline, _, _ = load_pipeline(chosen)
    monkeypatch.setattr(pipeline.transformer, "generate", lambda **_: torch.full((8, 48), 256))
    with pytest.raises(ValueError, match="id 256 at row 0 column 0 is not a colour"):
        next(draw(chosen, pipeline, 1, 1.0, PartialState(cpu=True)))


def test_references_that_cannot_be_made_are_refused(folder, tmp_path):
    def refused(name, *more):
        with pytest.raises(SystemExit) as error:
            main(["--make_reference", name, *where(folder), *more])
        return str(error.value)

    assert "small.npz exists; remove it" in refused("small", "--dataset", str(folder / "images"))
    assert "needs --dataset" in refused("new")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="a reference needs a name"):
        make_reference(" ", [images], SeededFeatures(), CPU, {})
    with pytest.raises(ValueError, match=r"shape \(3, 5, 5\) differs from the first, \(3, 4, 4\)"):
        make_reference("x", [images, images.new_zeros(1, 3, 5, 5)], SeededFeatures(), CPU, {})


def test_unknown_extractors_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'vgg' is not known; choose inception, seeded or MODULE:ATTRIBUTE"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_extractor("torch:no_such_network")
    with pytest.raises(ValueError, match="is a dict, not a torch.nn.Module"):
        load_extractor("builtins:dict")
    with pytest.raises(ValueError, match="--inception_weights weights.pth is for the extractor 'inception'"):
        load_extractor("seeded", "weights.pth")
    torch.save({"fc.weight": torch.ones(2), "code": SimpleNamespace()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth is refused, because it contains objects of types"):
        load_extractor("inception", str(tmp_path / "weights.pth"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match="needs torchmetrics, torch-fidelity and the torchvision of this torch"):
        load_extractor("inception")
