"""Feature extractors: what they give of uint8 images, and every mistake in one sentence."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_extractor import write_features, write_inception

from brisk import builtin_protocol, handwriting, image_folder, scorers
from brisk.feature_extractors import load, resize_clean
from brisk.options import UserError

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]


def pictures(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def nchw(images):
    return torch.tensor(images).permute(0, 3, 1, 2)


def test_inception_gives_features_and_probabilities(tmp_path):
    module = write_inception(tmp_path / "net.pt", dimensions=6, classes=5)
    extractor = load("inception", tmp_path / "net.pt")
    assert (extractor.name, extractor.dimensions) == ("inception", 6)
    assert extractor.digest == hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()[:16]
    images = pictures(7)
    features, nothing = extractor.read(images)
    assert nothing is None and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, module(nchw(images), return_features=True).detach())
    same, probabilities = extractor.read(images, with_probabilities=True)
    assert torch.equal(same, features) and probabilities.shape == (7, 5)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7))
    without_bias = (module.output(features) - module.output.bias).mul(8).softmax(1).detach()
    torch.testing.assert_close(probabilities, without_bias)


def test_a_read_only_array_is_read_without_a_warning(tmp_path, recwarn):
    write_inception(tmp_path / "net.pt")
    extractor, images = load("inception", tmp_path / "net.pt"), pictures(2)
    images.flags.writeable = False
    recwarn.clear()
    extractor.read(images)
    assert [str(warning.message) for warning in recwarn if "writ" in str(warning.message)] == []


def test_clean_resizing_comes_before_the_network(tmp_path):
    module = write_inception(tmp_path / "net.pt")
    images = pictures(3, 16)
    features, _ = load("inception", tmp_path / "net.pt", clean=True).read(images)
    torch.testing.assert_close(features, module(resize_clean(images), return_features=True).detach())
    assert not torch.allclose(features, load("inception", tmp_path / "net.pt").read(images)[0], atol=1e-5)


def cubic(distance):
    """The bicubic kernel with a = -1/2."""
    x = np.abs(distance)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def bicubic_matrix(given, wanted):
    """(wanted, given): an antialiased bicubic filter, its kernel as wide as the shrinking is strong."""
    step = given / wanted
    centres = (np.arange(wanted) + 0.5) * step - 0.5
    weights = cubic((np.arange(given) - centres[:, None]) / max(step, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("height, width", [(20, 30), (700, 450)])
def test_clean_resizing_is_an_antialiased_bicubic_filter_that_does_not_round(height, width):
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    found = resize_clean(image)
    assert found.shape == (1, 3, 299, 299) and found.dtype == torch.float32
    down, across = bicubic_matrix(height, 299), bicubic_matrix(width, 299)
    expected = (down @ image[0].astype(np.float64).transpose(2, 0, 1) @ across.T).clip(0, 255)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-3)
    assert found.min() >= 0 and found.max() <= 255 and not torch.equal(found, found.round())


def test_any_network_can_give_the_features(tmp_path):
    module = write_features(tmp_path / "net.pt", dimensions=4)
    extractor = load("torchscript", tmp_path / "net.pt")
    assert (extractor.name, extractor.dimensions) == ("torchscript", None)
    features, probabilities = extractor.read(pictures(5), with_probabilities=True)
    assert probabilities is None
    torch.testing.assert_close(features, module(nchw(pictures(5))).detach())
    with pytest.raises(UserError, match="--weights torchscript=.* cannot read images of 16x16 pixels"):
        extractor.read(pictures(2, 16))


def test_the_built_in_oracle_reads_what_it_was_trained_on():
    extractor = load("handwriting")
    assert extractor.dimensions == 48 and len(extractor.digest) == 16
    images = handwriting.draw("test", 9, seed=0)["images"]
    features, probabilities = extractor.read(image_folder.quantise(images), with_probabilities=True)
    assert probabilities is None
    expected = scorers.load_oracle(builtin_protocol.ORACLE).features(images)
    torch.testing.assert_close(features, expected, atol=0.1, rtol=0.02)  # eight bits a colour
    with pytest.raises(UserError, match="reads images of 32x32 pixels, these have 16x16; give --resize 32"):
        extractor.read(pictures(1, 16))


def test_another_oracle_can_be_given(tmp_path):
    torch.manual_seed(0)
    scorers.save_oracle(scorers.HandwritingOracle(width=4, feature_dim=7), tmp_path / "oracle")
    extractor = load("handwriting", tmp_path / "oracle")
    assert extractor.dimensions == 7 and extractor.digest != load("handwriting").digest


def mistakes(folder):
    (folder / "text.pt").write_text("no network")
    torch.save({"weight": torch.zeros(3)}, folder / "state.pt")
    write_features(folder / "other.pt")
    torch.jit.script(torch.nn.Conv2d(3, 2, 1).eval()).save(str(folder / "conv.pt"))


@pytest.mark.parametrize(
    "name, file, settings, message",
    [
        ("inception", None, {}, "no file is given; get inception-2015-12-05.pt from https://.* and give --weights inception=FILE"),
        ("inception", "nowhere.pt", {}, "nowhere.pt is no file; get inception-2015-12-05.pt"),
        ("torchscript", None, {}, "needs a TorchScript file, no file is given; save a network .* give --weights torchscript=FILE"),
        ("inception", "text.pt", {}, "text.pt is no TorchScript file"),
        ("inception", "state.pt", {}, "state.pt is no TorchScript file"),
        ("inception", "other.pt", {}, "--weights inception=.*other.pt cannot read images"),
        ("torchscript", "conv.pt", {}, "conv.pt cannot read images of 8x8"),
        ("torchscript", "other.pt", {"clean": True}, "clean resizing is for the extractor inception"),
        ("dino", None, {}, "there is no feature extractor dino; there are inception, handwriting, torchscript"),
        ("handwriting", ".", {}, "--weights handwriting=.*holds no oracle: config.json is missing"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, name, file, settings, message):
    mistakes(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(name, file and tmp_path / file, **settings).read(pictures(2))
    assert "\n" not in str(caught.value)


def test_features_of_another_shape_are_refused(tmp_path):
    module = torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.ReLU()).eval()
    torch.jit.trace(module, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(tmp_path / "flat.pt"))
    with pytest.raises(UserError, match=r"gives shape \(384,\) for 2 images; features must be of shape \(2, D\)"):
        load("torchscript", tmp_path / "flat.pt").read(pictures(2))


def test_the_network_is_not_unpickled_by_python(tmp_path):
    """A pickled program in place of the file must not run."""
    import pickle

    class Program:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "net.pt").write_bytes(pickle.dumps(Program()))
    torch.save(Program(), tmp_path / "zip.pt")
    for name in ("net.pt", "zip.pt"):
        with pytest.raises(UserError, match="is no TorchScript file"):
            load("inception", tmp_path / name)
    assert not (tmp_path / "ran").exists()
