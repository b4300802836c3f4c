"""The Inception network of published values, beside torch-fidelity, whose program and weights gave them.

    HF_HUB_OFFLINE=0 pytest -m hub tests/eval/test_inception.py       after: pip install torch-fidelity torchvision

downloads 91 MB of weights, and on a GPU CIFAR-10.
"""

import pytest
import torch
from accelerate import PartialState
from torch.nn.functional import interpolate

from xdlm_hf.data.image_tokens import ImageSource
from xdlm_hf.data.images import as_uint8
from xdlm_hf.evaluation.fid import score
from xdlm_hf.evaluation.image_features import extract, load_extractor, make_reference

pytestmark = pytest.mark.hub
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception():
    for package in ("torch_fidelity", "torchvision"):
        pytest.importorskip(package, reason=f"the Inception network needs {package}")
    return load_extractor("inception")


def pictures(count, seed, brightness):
    """uint8 (count, 3, 32, 32): random smooth colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    smooth = interpolate(torch.rand(count, 3, 4, 4, generator=generator), 32, mode="bicubic")
    noise = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
    return ((smooth + noise) * brightness).clamp(0, 255).to(torch.uint8)


def fid(extractor, real, drawn, device=CPU):
    reference = make_reference("real", iter(real.split(8)), extractor, device, {})
    return score(iter(drawn.split(8)), reference, extractor, device, PartialState(cpu=device == CPU))["fid"]


def test_a_set_has_no_distance_from_itself(inception):
    """Of 24 images the covariances are singular: errors of 1e-16 count by their root."""
    images = pictures(24, 0, 255)
    assert abs(fid(inception, images, images.flip(0))) < 1e-2
    assert fid(inception, images, pictures(24, 1, 160)) > 1


def test_features_and_logits_are_torch_fidelitys(inception):
    """Also the resizing to 299 x 299, for which torchmetrics has another default."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    for images in (pictures(4, 0, 255), interpolate(pictures(2, 1, 255).float(), 320).to(torch.uint8)):
        with torch.no_grad():
            wanted = theirs(images)
        for ours, recorded in zip(extract(inception, images, CPU), wanted, strict=True):
            assert ours.shape == recorded.shape and (ours - recorded).abs().max() < 1e-3 * recorded.abs().max()
    grey = pictures(2, 2, 255)[:, :1]
    assert extract(inception, grey, CPU)[0].equal(extract(inception, grey.expand(-1, 3, -1, -1), CPU)[0])


def test_fid_is_torch_fidelitys(inception):
    from torch_fidelity import calculate_metrics

    class Rows(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    real, drawn = pictures(24, 0, 255), pictures(20, 1, 200)
    options = {"fid": True, "cuda": False, "cache": False, "verbose": False, "batch_size": 8}
    theirs = calculate_metrics(input1=Rows(drawn), input2=Rows(real), **options)["frechet_inception_distance"]
    assert fid(inception, real, drawn) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.gpu
def test_the_inception_score_of_cifar10_is_the_published_one(inception):
    """torch-fidelity's documentation gives 11.23678 for the training images, deviation of 10 splits 0.095.

    Its splits are of another order, which moves the mean by about 0.095 / 10; the tolerance is several times that.
    """
    if not torch.cuda.is_available():
        pytest.skip("50,000 images through Inception need a CUDA device")
    device, source = torch.device("cuda"), ImageSource("uoft-cs/cifar10", "train")
    images = torch.cat([as_uint8(source.read(i)[0]) for i in range(len(source))])
    assert images.shape == (50_000, 3, 32, 32)
    extractor = inception.to(device)
    reference = make_reference("cifar10-train", iter(images.split(250)), extractor, device, {})
    found = score(iter(images.split(250)), reference, extractor, device, PartialState())
    inception.to(CPU)
    assert found["inception_score"] == pytest.approx(11.23678, abs=0.06)
    assert found["inception_score_deviation"] < 0.2
    assert abs(found["fid"]) < 1e-2
