"""The committed oracle and the agreement figures."""

from pathlib import Path

import pytest
import torch

from brisk import handwriting
from brisk.scorers import HandwritingOracle, load_oracle, prompt_agreement, save_oracle

ORACLE = Path(__file__).resolve().parents[2] / "assets" / "handwriting-oracle"
LABELS = ("digits", "foregrounds", "backgrounds")


@pytest.fixture(scope="module")
def oracle():
    return load_oracle(ORACLE)


@pytest.fixture(scope="module")
def held_out():
    return handwriting.draw("test", 600, seed=42)


def test_oracle_reads_held_out_images(oracle, held_out):
    figures = prompt_agreement(oracle, held_out["images"], *(held_out[name] for name in LABELS))
    assert figures["digit"] > 0.98
    assert figures["foreground"] > 0.995 and figures["background"] > 0.995


def test_agreement_counts_each_item_on_its_own(oracle):
    batch = handwriting.draw("train", 200, seed=1)
    right = [head.argmax(dim=1) for head in oracle(batch["images"])]
    wrong = [labels.clone() for labels in right]
    wrong[0][:20] = (wrong[0][:20] + 1) % 10
    wrong[1][10:50] = (wrong[1][10:50] + 1) % 8
    wrong[2][:100] = (wrong[2][:100] + 3) % 8
    assert prompt_agreement(oracle, batch["images"], *right) == {"digit": 1, "foreground": 1, "background": 1, "all": 1}
    expected = {"digit": 0.9, "foreground": 0.8, "background": 0.5, "all": 0.5}
    assert prompt_agreement(oracle, batch["images"], *wrong) == pytest.approx(expected)


def test_oracle_is_not_fooled_by_other_images(oracle, held_out):
    """Swapping the prompts of the images must cost most of the agreement."""
    images = held_out["images"].roll(1, dims=0)
    assert prompt_agreement(oracle, images, *(held_out[name] for name in LABELS))["all"] < 0.05


def test_features_are_few_and_frozen(oracle, held_out):
    features = oracle.features(held_out["images"][:8])
    assert features.shape == (8, oracle.config["feature_dim"]) and features.shape[1] <= 64
    assert not features.requires_grad and not oracle.training


def test_saved_oracle_loads_with_equal_outputs(tmp_path):
    torch.manual_seed(0)
    oracle = HandwritingOracle(width=8, feature_dim=16)
    images = handwriting.draw("train", 64, seed=0)["images"]
    oracle.train()(images)
    oracle.eval()
    save_oracle(oracle, tmp_path / "oracle")
    loaded = load_oracle(tmp_path / "oracle")
    for before, after in zip(oracle(images), loaded(images), strict=True):
        torch.testing.assert_close(before, after, rtol=0.0, atol=5e-3)


def test_missing_oracle_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_oracle(tmp_path)


def test_wrong_shapes_are_refused(oracle):
    with pytest.raises(ValueError, match="32, 32"):
        oracle(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="foreground"):
        prompt_agreement(oracle, torch.zeros(2, 3, 32, 32), [1, 1], [1], [1, 1])
    with pytest.raises(ValueError, match="at least one"):
        prompt_agreement(oracle, torch.zeros(0, 3, 32, 32), [], [], [])
