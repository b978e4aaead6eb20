"""evaluate.py: reports of models, of finished images and of a run as it trains; one process or two; every mistake in a sentence."""

import contextlib
import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_extractor
import tiny_rewards
from accelerate.state import PartialState
from conftest import ROOT
from PIL import Image
from ranks import run_ranks

import evaluate
from brisk import builtin_protocol, eval_run, image_metrics, protocols
from brisk.options import UserError

TEACHER = ROOT / "assets/tiny-teacher"
AGREEMENT = {"digit", "foreground", "background", "all"}
COST = {"nfe", "total_nfe", "seconds_alone", "seconds_per_image", "parameters", "gmacs_per_image"}
QUALITY = ("fid", "kid", "inception_score", "precision", "recall")


@pytest.fixture(autouse=True, scope="module")
def alone():
    """The processes of other tests' runs, and of these, are forgotten."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, figures) of a run of the built-in protocol."""
    folder = tmp_path_factory.mktemp("report")
    evaluate.main(["--model", f"student={TEACHER},nfe=2,scheduler=ddim_trailing", "--output_dir", str(folder), "--samples", "50",
                   "--seeds", "2", "--nfe", "20", "2", "--batch_size", "10", "--latency_repeats", "1"])  # fmt: skip
    return folder, json.loads((folder / "report.json").read_text())


def test_report_has_a_measurement_per_model_and_budget(report):
    _, figures = report
    assert list(figures["teacher"]) == ["20", "2"] and list(figures["student"]) == ["2"]
    for row in (*figures["teacher"].values(), *figures["student"].values()):
        assert row.keys() >= {*AGREEMENT, "frechet", *COST} and row["spread"].keys() == {*AGREEMENT, "frechet"}
        assert all(0 <= row[name] <= 1 for name in AGREEMENT)
        assert row["all"] <= min(row["digit"], row["foreground"], row["background"])
    assert figures["environment"]["packages"]["torch"] and figures["protocol"] == "builtin"
    assert figures["record"]["samples"] == 50 and set(figures["record"]["changed_by_flags"]) == {"samples", "seeds", "nfe"}


def test_guidance_costs_two_rows_a_call(report):
    _, figures = report
    teacher = figures["teacher"]
    assert (teacher["20"]["nfe"], teacher["20"]["total_nfe"]) == (20, 40) and teacher["2"]["total_nfe"] == 4
    assert teacher["20"]["gmacs_per_image"] == pytest.approx(10 * teacher["2"]["gmacs_per_image"])


def test_teacher_at_20_calls_draws_what_is_asked_and_few_calls_get_the_best_scheduler(report):
    _, figures = report
    assert figures["teacher"]["20"]["all"] > 0.9 and figures["teacher"]["20"]["scheduler"] == "DDIM"
    plain = figures["models"]["teacher"]["plans"]["2"]["scheduler"]
    assert plain != "DDIM" and figures["teacher"]["2"]["all"] >= figures["student"]["2"]["all"] - 0.05


def test_images_from_the_same_noise_are_compared(report):
    _, figures = report
    assert "psnr_to_teacher" not in figures["teacher"]["20"] and 10 < figures["student"]["2"]["psnr_to_teacher"] < 40


def test_page_needs_no_network_and_csv_has_every_row(report):
    folder, figures = report
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)=\"(https?:)?//", page)
    assert (folder / "report.png").stat().st_size > 10_000
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert [(row["model"], row["nfe"]) for row in rows] == [("teacher", "20"), ("teacher", "2"), ("student", "2")]
    assert float(rows[2]["frechet"]) == figures["student"]["2"]["frechet"]


def test_a_run_goes_on_with_the_images_that_are_there(report, tmp_path, capsys):
    folder, figures = report
    shutil.copy(folder / "report.json", tmp_path)
    shutil.copytree(folder / "images/student-nfe2", tmp_path / "images/student-nfe2")
    files = sorted((tmp_path / "images").rglob("*.png"))
    for path in files[60:]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files[:50]}
    evaluate.main(["--teacher", "none", "--model", f"student={TEACHER},nfe=2,scheduler=ddim_trailing", "--samples", "50", "--seeds",
                   "2", "--batch_size", "10", "--latency_repeats", "0", "--output_dir", str(tmp_path)])  # fmt: skip
    said = f"{tmp_path}/report.json holds the figures of teacher: the new report replaces it."
    assert [line for line in capsys.readouterr().out.splitlines() if "replaces" in line] == [said]
    again = json.loads((tmp_path / "report.json").read_text())["student"]["2"]
    assert {name: again[name] for name in AGREEMENT} == {name: figures["student"]["2"][name] for name in AGREEMENT}
    assert again["frechet"] == figures["student"]["2"]["frechet"] and "seconds_alone" not in again
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("content", ["5", '{"protocol": 1}', '{"a": {"4": {}}, "protocol": "builtin"}'])
def test_a_report_of_another_script_is_no_matter(content, tmp_path, capsys):
    (tmp_path / "report.json").write_text(content)
    session = SimpleNamespace(output=tmp_path, say=print)
    evaluate.say_replaced(SimpleNamespace(watch=None), session, [], [])
    assert capsys.readouterr().out == ""


def test_finished_images_have_the_figures_of_the_model_that_drew_them(report, tmp_path, capsys):
    """Of one set, from a folder and from an .npz file; an unreadable image is counted and the others keep their captions."""
    folder, _ = report
    files = sorted((folder / "images/teacher-nfe20").rglob("*.png"))[:50]
    captions = builtin_protocol.captions_of(builtin_protocol.wanted_labels(50, 0))
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    np.savez(tmp_path / "images.npz", np.stack([np.asarray(Image.open(file)) for file in files]))
    (tmp_path / "broken").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "broken")
    (tmp_path / "broken" / files[3].name).write_bytes(files[3].read_bytes()[:200])
    shutil.copytree(tmp_path / "broken", tmp_path / "whole")
    shutil.copy(files[3], tmp_path / "whole")
    evaluate.main(["--images", f"folder={tmp_path / 'whole'}", "--images", f"array={tmp_path / 'images.npz'}", "--images",
                   f"broken={tmp_path / 'broken'}", "--prompt_file", str(tmp_path / "captions.txt"), "--metrics", "agreement",
                   "--output_dir", str(tmp_path / "out")])  # fmt: skip
    figures = json.loads((tmp_path / "out/report.json").read_text())
    one, other, broken = (figures[name]["images"] for name in ("folder", "array", "broken"))
    assert one == other and one["all"] > 0.9 and one["images"] == 50
    assert (broken["images"], broken["unreadable"]) == (49, 1) and broken["digit"] == pytest.approx(one["digit"], abs=0.03)
    assert f"warning: broken: 1 of 50 images are unreadable: {files[3].name}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """(folder, flags) of a small stand-in of a COCO protocol: captions, real images, a random Inception network."""
    folder = tmp_path_factory.mktemp("coco")
    tiny_extractor.write_inception(folder / "inception.pt", 6, 5)
    captions = builtin_protocol.captions_of(builtin_protocol.wanted_labels(30, 5))
    (folder / "captions.csv").write_text("file_name,text\n" + "\n".join(f"{n}.jpg,{text}" for n, text in enumerate(captions)))
    (folder / "real").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(folder / f"real/{number:02d}.png")
    flags = ["--protocol", "coco2014_30k_bksdm", "--samples", "30", "--resolution", "32", "--resize", "16", "--nfe", "3",
             "--prompt_file", folder / "captions.csv", "--metrics", "fid,kid,is,pr", "--latency_repeats", "0",
             "--weights", f"inception={folder / 'inception.pt'}", "--model", f"sd={TEACHER}"]  # fmt: skip
    return folder, [str(flag) for flag in flags]


def run(flags, output, *more):
    """evaluate.main in this process -> (row of the model sd, report)."""
    evaluate.main([*flags, "--output_dir", str(output), *map(str, more)])
    report = json.loads((output / "report.json").read_text())
    return report["sd"]["3"], report


def quality(row):
    return {name: row[name] for name in QUALITY}


@pytest.fixture(scope="module")
def measured(coco, tmp_path_factory):
    folder, flags = coco
    output = tmp_path_factory.mktemp("one")
    row, report = run(flags, output, "--reference", folder / "real", "--batch_size", 8, "--save_reference", folder / "real.npz")
    return output, row, report


def test_a_protocol_decides_everything_and_is_written_down(measured):
    output, row, report = measured
    files = sorted(output.rglob("*.jpg"))
    assert len(files) == 30 and Image.open(files[0]).size == (32, 32)
    assert row["scheduler"] == "pndm" and row["guidance_scale"] == 7.5 and row["images"] == 30
    assert report["models"]["sd"]["plans"]["3"]["steps"] == 2  # PNDM makes one call more
    record = report["record"]
    assert record["jpeg"] == 75 and record["measured_at"] == 16 and record["resize_filter"] == "bicubic"
    assert record["reference_images"] == 40 and record["reference_digest"] and record["extractor_weights"]
    assert quality(row).keys() == set(QUALITY) and all(np.isfinite(list(quality(row).values())))


@pytest.fixture(scope="module")
def training(run_main, tmp_path_factory):
    """A SLAM run with two checkpoints, and an unfinished third."""
    folder = run_main("--checkpointing_steps=1", output=tmp_path_factory.mktemp("training") / "run").output
    (folder / "checkpoint-3").mkdir()
    return folder


def test_the_result_does_not_depend_on_the_number_of_processes(coco, measured, training, warm, tmp_path):
    folder, flags = coco
    flags = [*flags, "--output_dir", tmp_path, "--reference", folder / "real", "--batch_size", "8", "--watch", training,
             "--watch_timeout", "0.1", "--save_reference", tmp_path / "real.npz"]  # fmt: skip
    codes, errors = run_ranks(warm, tmp_path / "ranks", ROOT / "evaluate.py", flags)
    assert codes == [0, 0], errors
    assert "checkpoint-2" in (tmp_path / "ranks/stdout-0").read_text() and (tmp_path / "ranks/stdout-1").read_text() == ""
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["record"]["processes"] == 2 and {"checkpoint-1", "checkpoint-2"} < report.keys()
    assert report["sd"]["3"] == measured[1]  # to the last digit
    one, other = (sorted((path / "images/sd-nfe3").rglob("*.jpg")) for path in (measured[0], tmp_path))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert [path.name for path in tmp_path.glob("*.npz")] == ["real.npz"]
    assert (tmp_path / "real.npz").read_bytes() == (folder / "real.npz").read_bytes()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched .* ACCELERATE_USE_CPU=true"):
        evaluate.main(["--output_dir", str(tmp_path)])


def test_nor_on_the_batch_size_but_for_rounding(coco, measured, tmp_path):
    folder, flags = coco
    row, _ = run(flags, tmp_path, "--reference", folder / "real", "--batch_size", 30)
    assert quality(row) == pytest.approx(quality(measured[1]), rel=1e-3, abs=1e-6)


def test_kept_statistics_of_the_reference_give_the_same_figures(coco, measured, tmp_path):
    folder, flags = coco
    row, report = run(flags, tmp_path, "--reference", folder / "real.npz", "--batch_size", 8)
    assert quality(row) == pytest.approx(quality(measured[1]), rel=1e-6)
    assert report["record"]["reference_images"] == 40


def test_statistics_alone_serve_fid(coco, measured, tmp_path):
    folder, flags = coco
    known = image_metrics.read_statistics(folder / "real.npz")
    np.savez(tmp_path / "edm.npz", mu=known.mean, sigma=known.covariance)
    row, _ = run(flags, tmp_path / "out", "--reference", tmp_path / "edm.npz", "--batch_size", 8, "--metrics", "fid")
    assert row["fid"] == pytest.approx(measured[1]["fid"], rel=1e-6) and "kid" not in row
    with pytest.raises(UserError, match="--save_reference"):
        run(flags, tmp_path / "out", "--reference", tmp_path / "edm.npz", "--metrics", "kid")


def test_rewards_have_all_their_statistics(coco, measured, tmp_path, monkeypatch):
    tiny_rewards.write_clip(tmp_path / "clip")
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    row, report = run(coco[1], tmp_path / "out", "--metrics", "clip,mine:red", "--weights", f"clip={tmp_path / 'clip'}")
    scores = report["scores"]["sd"]["3"]
    assert scores.keys() == {"clip", "mine:red"} and scores["clip"].keys() == {"count", "mean", "std", "min", "max"}
    assert scores["clip"]["count"] == 30 and -1 <= scores["clip"]["min"] <= row["clip"] <= scores["clip"]["max"] <= 1
    assert row["spread"]["clip"] == pytest.approx(scores["clip"]["std"] / 30**0.5)
    with pytest.raises(UserError, match="there are no captions, which --metrics clip needs"):
        evaluate.main(["--protocol", "custom", "--images", str(tmp_path / "out/images"), "--metrics", "clip", "--weights",
                       f"clip={tmp_path / 'clip'}", "--output_dir", str(tmp_path / "none")])  # fmt: skip
    assert 0 < row["mine:red"] < 1 and report["record"]["weights"] == [coco[1][-3], f"clip={tmp_path / 'clip'}"]


def test_budgets_that_a_scheduler_cannot_meet_are_left_out(tmp_path, capsys):
    evaluate.main(["--teacher", f"mine={TEACHER},scheduler=pndm,nfe=4/3/2", "--samples", "50", "--seeds", "1",
                   "--latency_repeats", "0", "--output_dir", str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "left out: PNDMScheduler cannot make exactly 2 network calls" in printed
    assert "Warning: 50 images where the protocol has 600" in printed
    rows = json.loads((tmp_path / "report.json").read_text())["mine"]
    assert list(rows) == ["4", "3"] and "psnr_to_teacher" in rows["3"]
    assert "images of 4 calls" in (tmp_path / "report.html").read_text()


def test_watch_takes_every_finished_checkpoint_once(training, coco, tmp_path, monkeypatch, capsys):
    first = tmp_path / "first"
    shutil.copytree(training, first)
    flags = [*coco[1][:-2], "--metrics", "fid", "--reference", str(coco[0] / "real"), "--watch_timeout", "0", "--output_dir",
             str(tmp_path / "out"), "--watch"]  # fmt: skip
    evaluate.main([*flags, str(first)])
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = [report[f"checkpoint-{step}"]["3"] for step in (1, 2)]
    assert "checkpoint-3" not in report and rows[0]["fid"] != rows[1]["fid"] and rows[0]["scheduler"] == "LCM"
    (first / "checkpoint-2").rename(first / "checkpoint-4")

    measured = []
    measure = eval_run.measure_model
    monkeypatch.setattr(eval_run, "measure_model", lambda entry, *rest: measured.append(entry.name) or measure(entry, *rest))
    evaluate.main([*flags, str(first)])
    after = json.loads((tmp_path / "out/report.json").read_text())
    assert measured == ["checkpoint-4"] and after["checkpoint-4"]["3"]["fid"] == rows[1]["fid"]
    assert "replaces" not in capsys.readouterr().out
    assert after["checkpoint-1"] == report["checkpoint-1"]

    measured.clear()
    evaluate.main([*flags, str(training)])  # another run in the same folder is not taken for this one
    assert measured == ["checkpoint-1", "checkpoint-2"]
    assert "holds the figures of checkpoint-1, checkpoint-2, checkpoint-4: the new report replaces it." in capsys.readouterr().out
    assert "checkpoint-4" not in json.loads((tmp_path / "out/report.json").read_text())


@pytest.mark.parametrize(("flags", "pauses"), [
    (["--watch_interval", "7", "--watch_timeout", "20"], [7] * 4), (["--watch_interval", "7", "--watch_timeout", "5"], [5] * 2),
    ([], [30] * 4),
], ids=["interval", "short timeout", "defaults"])  # fmt: skip
def test_watch_waits_between_two_looks(flags, pauses, training, coco, tmp_path, monkeypatch):
    """By a clock that sleep alone moves: a checkpoint comes in the first pause, Ctrl-C after 100 seconds."""
    (tmp_path / "run").mkdir()
    found = []

    def sleep(seconds):
        if not found:
            shutil.copytree(training / "checkpoint-1", tmp_path / "run/checkpoint-1")
        found.append(seconds)
        if sum(found) > 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: sum(found)))
    with contextlib.nullcontext() if flags else pytest.raises(KeyboardInterrupt):
        evaluate.main([*coco[1][:-2], "--metrics", "none", "--watch", str(tmp_path / "run"), *flags, "--output_dir",
                       str(tmp_path / "out")])  # fmt: skip
    assert found == pauses
    assert json.loads((tmp_path / "out/report.json").read_text())["checkpoint-1"]["3"]["images"] == 30


def test_a_checkpoint_that_cannot_be_measured_is_said_and_what_was_measured_is_kept(training, coco, tmp_path, capsys):
    shutil.copytree(training / "checkpoint-1", tmp_path / "run/checkpoint-1")
    state = tmp_path / "run/checkpoint-1/trainer_state.json"
    options = json.loads(state.read_text())
    options["options"]["pretrained_teacher_model"] = "no/such/teacher"
    state.write_text(json.dumps(options))
    flags = [*coco[1], "--metrics", "none", "--watch", str(tmp_path / "run"), "--watch_timeout", "0", "--output_dir"]
    evaluate.main([*flags, str(tmp_path / "out")])
    assert "Left out: checkpoint-1: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["sd"]["3"]["images"] == 30
    alone = [flag for flag in flags if not flag.startswith("sd=") and flag != "--model"]
    with pytest.raises(UserError, match="nothing was measured: checkpoint-1: "):
        evaluate.main([*alone, str(tmp_path / "none")])


def test_report_is_strict_json(tmp_path):
    """DPM-Solver++ has an infinite setting."""
    evaluate.main(["--teacher", f"{TEACHER},scheduler=dpmpp,nfe=2", "--samples", "50", "--seeds", "1", "--latency_repeats", "2",
                   "--output_dir", str(tmp_path)])  # fmt: skip

    def refuse(word):
        raise AssertionError(word)

    row = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["teacher"]["2"]
    for path in (tmp_path / "images").rglob("images.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert row["spread"].keys() == {"seconds_alone", "seconds_per_image"}


def test_protocols_are_listed(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--list_protocols"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in protocols.PROTOCOLS)


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "x=nowhere"], "x: 'nowhere' is neither a file nor a folder"),
    (["--model", "x="], "names no source"),
    (["--model", f"x={TEACHER},steps=3"], "'steps=3' is not KEY=VALUE with KEY one of nfe"),
    (["--model", f"x={TEACHER},nfe=0"], "nfe cannot have the value 0, only numbers from 1 like 4 or 4/2/1"),
    (["--model", f"x={TEACHER},resolution=big"], "resolution cannot have the value big"),
    (["--model", f"x={TEACHER}", "--images", "x=images"], "two models are called x"),
    (["--model", f"record={TEACHER}"], "the report uses this name"),
    (["--model", f"x={ROOT / 'docs'}"], "x: "),
    (["--teacher", "none"], "nothing to measure"),
    (["--nfe", "4", "zero"], "--nfe is '4,zero'"),
    (["--protocol", "coco"], "--protocol coco is none of"),
    (["--metrics", "fed"], "'fed' is none of"),
    (["--metrics", "fid"], "is called frechet"),
    (["--protocol", "coco2017_5k"], "nothing to measure"),
    (["--protocol", "coco2017_5k", "--model", f"x={TEACHER}"], "needs the Inception network (--weights inception=FILE, https:"),
    (["--protocol", "coco2017_5k", "--model", f"x={TEACHER}"], "), and the reference (--reference, the folder of the 5,000"),
    (["--protocol", "coco2017_5k", "--model", f"x={TEACHER}"], "), and captions (--prompt_file, one caption of each of the 5,000"),
    (["--teacher", "none", "--model", f"x={TEACHER},scheduler=foo"], "x: scheduler foo is none of ddim"),
    (["--protocol", "coco2017_5k", "--model", f"x={TEACHER}", "--metrics", "none"], "needs captions (--prompt_file"),
    (["--protocol", "custom", "--model", f"x={TEACHER}", "--samples", "9"], "x: takes captions: give --prompt_file"),
    (["--protocol", "custom", "--model", f"x={TEACHER}"], "needs --samples"),
    (["--protocol", "coco2017_5k", "--model", f"x={TEACHER}", "--metrics", "none", "--prompt_file", "PROMPTS"],
     "needs 5,000 captions, --prompt_file has 1; give --samples 1"),
    (["--weights", "clip"], "is not of the form HEAD=FILE"),
    (["--weights", "clip.size=3"], "clip has no size, only model"),
    (["--metrics", "aesthetic"], "--weights aesthetic.predictor_path is not given"),
    (["--metrics", "hps", "--weights", "hps=nowhere.pt"], "--weights hps"),
    (["--metrics", "agreement", "--protocol", "custom", "--model", f"x={TEACHER}", "--samples", "9"],
     "needs the built-in handwriting set"),
    (["--images", "EMPTY"], "holds no images"),
    (["--images", "MIXED"], "give --resize N"),
    (["--images", "MIXED", "--resize", "32"], "needs at least 49"),
    (["--images", "MIXED", "--resize", "32", "--prompt_file", "PROMPTS"], "2 images and 1 captions"),
    (["--watch", "nowhere"], "--watch nowhere is no folder"),
    (["--watch", "EMPTY", "--watch_timeout", "0"], "nothing was measured: no finished checkpoint came"),
    (["--samples", "30"], "needs at least 49"),
    (["--teacher", "none", "--model", f"a b={TEACHER}", "--model", f"a-b={TEACHER}"], "two models are called a b"),
])  # fmt: skip
def test_bad_input_is_one_sentence(flags, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for side in (8, 16):
        Image.new("RGB", (side, side)).save(tmp_path / f"mixed/{side}.png")
    (tmp_path / "prompts.txt").write_text("a red handwritten seven on a yellow background\n")
    places = {"EMPTY": "empty", "MIXED": "mixed", "PROMPTS": "prompts.txt"}
    flags = [str(tmp_path / places[flag]) if flag in places else flag for flag in flags]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        evaluate.main(["--output_dir", str(tmp_path / "out"), "--latency_repeats", "0", *flags])
    assert "\n" not in str(caught.value) and "reward." not in str(caught.value)


def test_the_other_flags_reach_what_they_name(coco, tmp_path):
    """Features of another network, its own resize filter, half precision, seeds, samples shown, some files of a folder."""
    tiny_extractor.write_features(tmp_path / "features.pt", 5)
    flags = ["--protocol", "custom", "--extractor", "torchscript", "--weights", f"torchscript={tmp_path / 'features.pt'}",
             "--metrics", "frechet", "--resize", "8", "--resize_filter", "box", "--reference", str(coco[0] / "real"),
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    evaluate.main([*flags, "--model", f"sd={TEACHER},nfe=1", "--prompt_file", str(coco[0] / "captions.csv"), "--samples", "8",
                   "--first_seed", "7", "--dtype", "bf16", "--negative_prompt", "a blue handwritten one on a red background",
                   "--shown", "2", "--latency_repeats", "0"])  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text())
    record, plan = report["record"], report["models"]["sd"]["plans"]["1"]
    assert record["resize_filter"] == "box" and record["dtype"] == "bf16" and len(report["captions"]) == 2
    assert plan["negative_prompt"].startswith("a blue") and np.isfinite(report["sd"]["1"]["frechet"])
    assert [path.name for path in sorted((tmp_path / "out/images").rglob("*.png"))][0] == "000007.png"
    evaluate.main([*flags, "--images", str(coco[0] / "real"), "--pattern", "0*.png"])
    assert json.loads((tmp_path / "out/report.json").read_text())["real"]["images"]["images"] == 10
