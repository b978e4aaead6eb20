"""scripts/quickstart.sh from beginning to end, with few steps and few samples."""

import json


def test_quickstart_leaves_a_stock_pipeline_and_a_report(tmp_path, run_shell):
    out = tmp_path / "quickstart"
    small = {
        "BASH_ENV": "",  # each program with an interpreter of its own: what it needs it imports itself
        "QUICKSTART_OUT": str(out),
        "QUICKSTART_EVALUATE": "--samples 50 --seeds 1 --nfe 4 1 --batch_size 10 --latency_repeats 1",
    }
    done = run_shell("quickstart.sh", "--max_train_steps", "3", "--log_every", "1", **small)
    assert "SLAM: 100%" in done.stderr.replace("\r", "\n")
    report = json.loads((out / "report.json").read_text())
    assert report["teacher"].keys() == {"4", "1"} and report["student"].keys() == report["lcm"].keys() == {"4", "1"}
    assert all((out / name).is_file() for name in ("report.png", "report.html", "README.md", "model_index.json"))

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(out)
    image = pipeline("a red handwritten seven on a yellow background", num_inference_steps=2, guidance_scale=1).images[
        0
    ]
    assert image.size == (32, 32)
    # the second run's data is the first one's
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
