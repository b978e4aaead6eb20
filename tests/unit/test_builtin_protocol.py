"""The built-in measurement against its parts, and what it refuses."""

import statistics
from pathlib import Path

import pytest
import torch

from brisk import builtin_protocol, handwriting, metrics, scorers
from brisk.options import UserError

CAPTIONS = Path(__file__).resolve().parents[2] / "configs/epd/tiny_digits.txt"
pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def oracle():
    return builtin_protocol.load_oracle()


@pytest.fixture(scope="module")
def reference(oracle):
    return builtin_protocol.held_out(oracle)


def drawn(seed, count=60):
    """(images, labels) of training scans; of one in ten the label of the digit is wrong."""
    rows = handwriting.draw("train", count, seed=seed)
    digits = torch.where(torch.arange(count) % 10 == seed, (rows["digits"] + 1) % 10, rows["digits"])
    return rows["images"], (digits, rows["foregrounds"], rows["backgrounds"])


def test_an_oracle_that_is_not_there_is_one_sentence_with_its_flag(tmp_path):
    with pytest.raises(UserError, match=f"--oracle_dir: {tmp_path} holds no oracle"):
        builtin_protocol.load_oracle(tmp_path, "--oracle_dir")


def test_reference_is_of_held_out_images_on_the_paper_asked_for(oracle, reference):
    assert reference.shape == (builtin_protocol.REFERENCE_IMAGES, 48)
    held_out = handwriting.draw("test", 2000, seed=0)["images"]
    assert torch.equal(builtin_protocol.real_images()["images"], held_out)
    assert torch.equal(reference, oracle.features(held_out))
    black = list(handwriting.COLOURS).index("black")
    assert (builtin_protocol.real_images("black")["backgrounds"] == black).all()
    assert not torch.equal(builtin_protocol.held_out(oracle, "black"), reference)


def test_every_caption_is_asked_for_once_before_any_comes_again():
    labels = builtin_protocol.wanted_labels(builtin_protocol.CAPTIONS + 40, 3)
    captions = builtin_protocol.captions_of(labels)
    assert len(set(captions[:560])) == builtin_protocol.CAPTIONS == 560
    assert captions[560:] == captions[:40]
    assert [handwriting.parse_caption(text) for text in captions[:9]] == [tuple(row) for row in torch.stack(labels, 1)[:9].tolist()]
    again, others = (builtin_protocol.wanted_labels(20, seed) for seed in (3, 4))
    assert all(torch.equal(one[:20], two) for one, two in zip(labels, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(again, others, strict=True))


def test_shown_captions_are_of_different_digits_and_of_two_colours():
    assert len({digit for digit, _, _ in builtin_protocol.SHOWN}) == len(builtin_protocol.SHOWN) == 8
    assert all(ink != paper for _, ink, paper in builtin_protocol.SHOWN)


def test_figures_are_means_over_seeds_beside_the_spread_and_frechet_is_of_all_images(oracle, reference):
    images, labels = zip(*(drawn(seed) for seed in (1, 2, 3)), strict=True)
    row = builtin_protocol.measure(oracle, images, labels, reference)
    parts = [scorers.prompt_agreement(oracle, *one[:1], *one[1]) for one in zip(images, labels, strict=True)]
    assert row.keys() == {"digit", "foreground", "background", "all", "frechet", "spread"}
    assert row["digit"] == pytest.approx(0.9, abs=0.02) and row["foreground"] > 0.98  # one label in ten is wrong
    for name in ("digit", "foreground", "background", "all"):
        assert row[name] == statistics.mean(part[name] for part in parts)
        assert row["spread"][name] == statistics.stdev(part[name] for part in parts)
    each = [metrics.frechet_distance(oracle.features(one), reference) for one in images]
    assert row["spread"]["frechet"] == pytest.approx(statistics.stdev(each))
    together = metrics.frechet_distance(oracle.features(torch.cat(images)), reference)
    assert row["frechet"] == pytest.approx(together, rel=1e-5) and together < min(each)  # fewer images are further away


def test_one_seed_has_no_spread_and_digits_alone_no_colours(oracle, reference):
    images, labels = drawn(1)
    row = builtin_protocol.measure(oracle, [images], [labels[:1]], reference)
    assert row.keys() == {"digit", "all", "frechet"} and row["digit"] == row["all"]


def test_figures_of_others_are_averaged_too_and_agreement_is_left_out(oracle, reference):
    images = [drawn(seed)[0] for seed in (1, 2)]
    row = builtin_protocol.measure(oracle, images, None, reference, [{"end_error": 1.0}, {"end_error": 3.0}])
    assert row.keys() == row["spread"].keys() | {"spread"} == {"frechet", "end_error", "spread"}
    assert row["end_error"] == 2 and row["spread"]["end_error"] == pytest.approx(2**0.5)
    with pytest.raises(ValueError):
        builtin_protocol.measure(oracle, images, None, reference, [{"end_error": 1.0}])


def test_captions_that_training_read_are_left_out(tmp_path):
    left, seen = builtin_protocol.unseen_captions(CAPTIONS), set(CAPTIONS.read_text().splitlines())
    assert len(left) == 112 and len(seen) == 448 and not seen & set(left)
    assert {text.split()[3] for text in left} == {text.split()[3] for text in seen}  # every digit on both sides
    everything = tmp_path / "all.txt"
    everything.write_text("\n".join([*seen, *left]))
    with pytest.raises(UserError, match="--prompts .*all.txt holds every caption"):
        builtin_protocol.unseen_captions(everything, "--prompts")
    with pytest.raises(UserError, match="--training_prompts .*none.txt cannot be read"):
        builtin_protocol.unseen_captions(tmp_path / "none.txt")
