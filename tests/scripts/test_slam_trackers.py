"""What a run reports: metrics.jsonl, TensorBoard and wandb files, the manifest; secrets in none of them."""

import contextlib
import importlib.util
import json

import pytest
import yaml
from PIL import Image

from brisk import options

TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVb"
VALIDATION = ("--validation_steps=2", "--validation_prompts=a red seven|a blue one", "--num_validation_images=3",
              "--validation_num_inference_steps=1,2")  # fmt: skip


def leaks(output, secret):
    """Files below `output` that contain `secret`, in contents or name."""
    return [path for path in output.rglob("*") if secret in path.name
            or path.is_file() and secret.encode() in path.read_bytes()]  # fmt: skip


@pytest.fixture(scope="module")
def tensorboard(run_main):
    """A run of four steps reported to TensorBoard, with validation, and its events read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_main("--report_to=tensorboard", "--max_train_steps=4", "--log_every=2", "--tracker_project_name=mine",
                   "--lr_scheduler=linear", "--lr_warmup_steps=0", f"--hub_token={TOKEN}", *VALIDATION)  # fmt: skip
    events = EventAccumulator(str(run.output / "logs/mine"), size_guidance={"images": 0})
    events.Reload()
    return run, events


def test_tensorboard_holds_the_rows_of_metrics_jsonl_at_their_steps(tensorboard):
    run, events = tensorboard
    assert [row["step"] for row in run.rows] == [2, 4]
    for name in ("loss", "lr", "grad_norm", "images", "skipped_steps", "images_per_second"):
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in run.rows}, name
    assert run.rows[0]["lr"] > run.rows[1]["lr"] == 0


def test_tensorboard_holds_the_validation_images(tensorboard):
    _, events = tensorboard
    for network in ("target", "online"):
        for count in (1, 2):
            images = events.Images(f"validation/{network}-{count}-steps")
            assert [image.step for image in images] == [2, 4]
            # two prompts with three images each, side by side
            assert {(image.width, image.height) for image in images} == {(6 * 32, 32)}


def test_validation_grids_have_a_row_per_prompt(tensorboard):
    run, _ = tensorboard
    for step in (2, 4):
        folder = run.output / f"validation/step-{step:06d}"
        names = {f"{network}-{count}-steps.png" for network in ("target", "online") for count in (1, 2)}
        assert {path.name for path in folder.iterdir()} == names
        for name in names:
            with Image.open(folder / name) as grid:
                assert grid.size == (3 * 32, 2 * 32)


def test_hyperparameters_are_logged_without_the_token(tensorboard):
    run, _ = tensorboard
    (path,) = run.output.glob("logs/**/hparams.yml")
    logged = yaml.safe_load(path.read_text())
    assert logged["learning_rate"] == 1e-4 and logged["max_train_steps"] == 4 and "hub_token" not in logged
    assert not leaks(run.output, TOKEN) and TOKEN not in run.log
    assert "--hub_token has no effect without --push_to_hub" in run.log


def test_metrics_rows_have_the_documented_fields(run_main):
    run = run_main("--max_train_steps=5", "--log_every=2", "--gradient_accumulation_steps=2")
    assert [row["step"] for row in run.rows] == [2, 4, 5], "the last step is always logged"
    for row in run.rows:
        assert {"step", "images", "loss", "grad_norm", "lr", "images_per_second", "data_wait_share", "peak_memory_gib",
                "skipped_steps", "steps_per_sec"} == set(row)  # fmt: skip
        assert row["images"] == row["step"] * 4 and 0 <= row["data_wait_share"] <= 1
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["images_per_second"] > 0 and row["peak_memory_gib"] > 0


def test_logged_loss_is_the_mean_over_the_interval_and_the_accumulation(run_main):
    each = run_main("--max_train_steps=4", "--learning_rate=0")
    together = run_main("--max_train_steps=4", "--learning_rate=0", "--log_every=4")
    accumulated = run_main("--max_train_steps=2", "--learning_rate=0", "--gradient_accumulation_steps=2")
    losses = [row["loss"] for row in each.rows]
    assert together.rows[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert [row["loss"] for row in accumulated.rows] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5
    )


def test_manifest_and_config_describe_the_run_and_the_config_repeats_it(run_main):
    run = run_main("--loss_type=huber", "--gradient_accumulation_steps=2", "--mixed_precision=no")
    manifest = json.loads((run.output / "run_manifest.json").read_text())
    assert (manifest["global_batch"], manifest["processes"], manifest["max_train_steps"], manifest["seed"]) == (
        4,
        1,
        2,
        7,
    )
    assert manifest["packages"]["diffusers"] and manifest["parameters"] == manifest["trainable_parameters"] > 50_000
    again = run_main(f"--config={run.output / 'train_config.yaml'}")
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in run.rows]


@pytest.mark.parametrize("how", ("flag", "variable", "url"))
def test_secrets_are_in_no_file_and_not_on_the_screen(how, run_main, shards, monkeypatch):
    flags = ["--report_to=tensorboard"]
    if how == "flag":
        flags += [f"--hub_token={TOKEN}"]
    elif how == "variable":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        missing = (
            f"pipe:curl -s -f -H 'Authorization: Bearer {TOKEN}' http://user:{TOKEN}x@127.0.0.1:9/a.tar?token={TOKEN}y"
        )
        flags += [f"--train_shards_path_or_url={missing}::{shards}", "--max_train_steps=20"]
    run = run_main(*flags)
    assert run.rows[-1]["step"] >= 2
    if how == "url":
        assert "is broken after 0 samples" in run.log
    assert TOKEN not in run.log
    assert not leaks(run.output, TOKEN)


@pytest.fixture
def wandb_offline(monkeypatch):
    """wandb without network, service windows and leftovers."""
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        monkeypatch.setenv(name, value)
    yield
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def test_wandb_writes_its_run_below_the_output_folder(run_main, wandb_offline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = run_main("--report_to=wandb", f"--hub_token={TOKEN}", *VALIDATION)
    folders = list(run.output.rglob("offline-run-*"))
    assert len(folders) == 1 and folders[0].is_relative_to(run.output / "logs")
    (log,) = folders[0].glob("*.wandb")
    content = log.read_bytes()
    for word in (b"grad_norm", b"validation/target-1-steps", b"learning_rate"):
        assert word in content, word
    assert not list(tmp_path.iterdir()), "something was written to the working folder"
    assert not leaks(run.output, TOKEN)


def test_report_to_none_writes_no_tracker_files_but_all_metrics(run_main):
    run = run_main("--report_to=none", *VALIDATION)
    assert len(run.rows) == 2
    assert not [path for path in run.output.rglob("*") if "events.out" in path.name or path.name == "wandb"]
    assert (run.output / "validation/step-000002/target-1-steps.png").is_file()


@pytest.mark.parametrize("name", ("wandb", "comet_ml", "tensorboard"))
def test_missing_tracker_package_is_a_clear_error_before_the_models_load(name, run_main, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest)
    )
    with pytest.raises(options.UserError) as caught:
        run_main(f"--report_to={name}", "--pretrained_teacher_model=/no/such/model", output=tmp_path / "out")
    assert caught.value.exit_code == 2 and f"pip install {name}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_report_to_all_uses_what_is_installed(run_main, wandb_offline, monkeypatch):
    find = importlib.util.find_spec
    absent = ("comet_ml", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    run = run_main("--report_to=all")
    assert list(run.output.rglob("events.out.tfevents*")) and not list(run.output.rglob("wandb"))
