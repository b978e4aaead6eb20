"""scripts/demo_bksdm.sh from beginning to end, with few steps and few samples."""

import json


def test_demo_leaves_a_smaller_stock_pipeline_and_a_report_of_all_four_models(tmp_path, run_shell):
    out = tmp_path / "demo"
    small = {"DEMO_OUT": str(out), "DEMO_EVALUATE": "--samples 50 --seeds 1 --nfe 3 --batch_size 10 --latency_repeats 1"}
    done = run_shell("demo_bksdm.sh", "--max_train_steps", "3", "--log_every", "1", **small)
    assert "BK-SDM: 100%" in done.stderr.replace("\r", "\n")
    report = json.loads((out / "report.json").read_text())
    teacher, before, student, random = (report[name]["3"] for name in ("teacher", "before", "student", "random"))
    assert before["parameters"] == student["parameters"] == random["parameters"] < 0.6 * teacher["parameters"]
    assert "psnr_to_teacher" not in teacher and student["psnr_to_teacher"] > random["psnr_to_teacher"]
    assert all((out / name).is_file() for name in ("report.png", "report.html", "README.md", "bksdm_report.json"))
    assert "psnr to teacher" in (out / "report.html").read_text()

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.unet.num_parameters() == student["parameters"] and pipeline.unet.mid_block is None
    assert pipeline("a red handwritten seven on a yellow background", num_inference_steps=2).images[0].size == (32, 32)
