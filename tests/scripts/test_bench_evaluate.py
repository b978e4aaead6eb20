"""scripts/bench_evaluate.py: both ways read the same images, and the figures are written."""

import json
import sys

import pytest
from conftest import ROOT

from brisk import image_sets, options

sys.path.append(str(ROOT / "scripts"))  # the benchmarks import each other as scripts do
import bench_evaluate  # noqa: E402

SMALL = ["--images", "7", "--side", "24", "--resize", "16", "--batch_size", "3", "--repeats", "2"]


def test_figures_are_the_ratio_of_medians(tmp_path, capsys):
    bench_evaluate.main([*SMALL, "--output", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    rows = report["rows"]
    assert rows["plain"]["ratio_to_plain"] == 1 and rows["evaluate.py"]["seconds"] > 0
    assert rows["evaluate.py"]["ratio_to_plain"] == rows["plain"]["seconds"] / rows["evaluate.py"]["seconds"]
    assert "7 images of 24 px" in capsys.readouterr().out and report["environment"]["cpu_cores"]


def test_ways_that_read_different_images_are_not_compared(monkeypatch):
    batches = image_sets.ImageSet.batches
    monkeypatch.setattr(image_sets.ImageSet, "batches", lambda self, size: ((n, v // 2) for n, v in batches(self, size)))
    with pytest.raises(options.UserError, match="the two ways give different features"):
        bench_evaluate.main(SMALL)
