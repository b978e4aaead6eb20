"""Stopped and killed BK-SDM runs go on bit for bit; checkpoints of other students or features are refused."""

import csv
import json
import shutil
import signal
import time

import pytest
from conftest import BKSDM, read_rows
from safetensors.torch import load_file

from brisk import checkpoint
from brisk.options import UserError

STEPS = 6
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--resume_from_checkpoint=latest", "--learning_rate=0.01",
         "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--random_flip", "--proportion_empty_prompts=0.3")  # fmt: skip
SETUPS = {
    "plain": (),
    "average, accumulation": ("--use_ema", "--gradient_accumulation_steps=2", "--noise_offset=0.1", "--input_perturbation=0.1"),
    "adafactor, average, two workers": ("--optimizer=adafactor", "--use_ema", "--dataloader_num_workers=2"),
    "8-bit Adam, bf16, checkpointing": ("--optimizer=adamw8bit", "--mixed_precision=bf16", "--gradient_checkpointing",
                                        "--snr_gamma=5"),
    "pictures": ("--train_data_dir={pictures}", "--random_conditioning", "--timestep_sampling=cubic",
                 "--pre_compute_text_embeddings"),
}  # fmt: skip
AVERAGE = "adafactor, average, two workers"
LOGGED = ("step", "images", "loss", "loss_sd", "loss_kd_output", "loss_kd_feat", "lr", "grad_norm")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def flags_of(pictures):
    """A function: setup -> its complete flags."""
    return lambda setup="plain": (*FLAGS, *(flag.format(pictures=pictures) for flag in SETUPS[setup]))


@pytest.fixture(scope="module")
def unbroken(run_bksdm, flags_of):
    """A function: setup -> the run that nobody interrupted (each made once)."""
    runs = {}

    def get(setup="plain"):
        runs[setup] = runs.get(setup) or run_bksdm(*flags_of(setup))
        return runs[setup]

    return get


def weights(output):
    """Every tensor of the final networks, as bytes."""
    files = [output / f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "unet_raw")]
    found = {f"{path.parent.name}:{name}": tensor.numpy().tobytes()
             for path in files if path.is_file() for name, tensor in load_file(path).items()}  # fmt: skip
    assert found, "no student was written"
    return found


def assert_same_run(output, expected):
    """Same weights bit for bit; each step logged once, in both tables, with the same numbers."""
    assert weights(output) == weights(expected.output)
    rows = read_rows(output)
    assert [[row[name] for name in LOGGED] for row in rows] == [[row[name] for name in LOGGED] for row in expected.rows]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (output / "log_loss.csv").read_text() == (expected.output / "log_loss.csv").read_text()
    with open(output / "log_loss.csv", newline="") as file:
        assert [row["global_step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("setup", SETUPS)
def test_stopped_by_sigterm_it_saves_exits_143_and_goes_on_bit_for_bit(
    setup, run_bksdm, flags_of, unbroken, signal_at, monkeypatch, tmp_path
):
    output = tmp_path / "out"
    with monkeypatch.context():
        signal_at(signal.SIGTERM, 3)
        with pytest.raises(SystemExit) as stopped:
            run_bksdm(*flags_of(setup), output=output)
    assert stopped.value.code == 143 and "Stopped by signal 15 after step 3" in run_bksdm.log()
    assert checkpoint.damage(output / "checkpoint-3") is None
    assert (output / "checkpoint-3/unet_ema").is_dir() == ("--use_ema" in SETUPS[setup])
    assert not (output / "unet").exists(), "a stopped run must not look finished"
    assert len((output / "log_loss.csv").read_text().splitlines()) == 1 + 3
    monkeypatch.undo()
    run = run_bksdm(*flags_of(setup), output=output)
    assert f"Resuming from {output / 'checkpoint-3'}: step 3 of {STEPS}" in run.log
    assert_same_run(output, unbroken(setup))


def test_setups_train_differently(unbroken):
    """Guards the comparisons above: a flag that did nothing would resume exactly too."""
    found = [weights(unbroken(setup).output)["unet:conv_in.weight"] for setup in SETUPS]
    assert len(set(found)) == len(SETUPS)


def wait_until(happened, process):
    """Poll until `happened()`; False if the process ends before."""
    end = time.monotonic() + 240
    while not happened():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            process.kill()
        time.sleep(0.005)
    return True


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(unbroken, fork_script, flags_of, tmp_path):
    output, flags = tmp_path / "out", flags_of(AVERAGE)
    expected = unbroken(AVERAGE)
    moments = [
        lambda: len(read_lines(output)) >= 3,
        lambda: any(output.glob(".checkpoint-4.tmp/unet*")) or (output / "checkpoint-4").exists(),
    ]
    kills = 0
    for moment in moments:
        process = fork_script(f"--output_dir={output}", *flags, family="toy_sd1", script=BKSDM)
        if wait_until(moment, process):
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = fork_script(f"--output_dir={output}", *flags, family="toy_sd1", script=BKSDM)
    assert last.wait() == 0, last.err()
    assert_same_run(output, expected)
    assert not list(output.glob(".checkpoint-*"))


def read_lines(output):
    """Complete lines of metrics.jsonl so far."""
    path = output / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def test_damaged_checkpoint_is_skipped_and_an_older_one_used(unbroken, run_bksdm, flags_of, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken(AVERAGE).output, output)
    (output / "checkpoint-6/unet_ema/diffusion_pytorch_model.safetensors").unlink()
    run = run_bksdm(*flags_of(AVERAGE), output=output)
    assert f"Skipping {output / 'checkpoint-6'}: " in run.log
    assert f"Resuming from {output / 'checkpoint-4'}" in run.log
    assert_same_run(output, unbroken(AVERAGE))


@pytest.mark.parametrize(("flag", "words"), [
    ("--preset=bk_base", ("student", "bk_small", "bk_base")), ("--preset=bk_tiny", ("student", "bk_tiny")),
    ("--feature_set=stage", ("features", "8 pairs")), ("--prediction_type=v_prediction", ("prediction_type", "epsilon")),
])  # fmt: skip
def test_checkpoint_of_another_student_or_other_features_is_refused(flag, words, unbroken, run_bksdm, flags_of, tmp_path):
    source = unbroken().output / "checkpoint-4"
    with pytest.raises(UserError) as refused:
        run_bksdm(*flags_of(), flag, f"--resume_from_checkpoint={source}", output=tmp_path / "out")
    message = str(refused.value)
    assert refused.value.exit_code == 2 and "\n" not in message and len(message) < 300
    assert "the checkpoint was trained with" in message and all(word in message for word in words)
    assert not (tmp_path / "out/unet").exists()


def test_checkpoint_without_an_average_is_refused_by_a_run_that_keeps_one(unbroken, run_bksdm, flags_of, tmp_path):
    source = unbroken().output / "checkpoint-4"
    with pytest.raises(UserError, match="checkpoint-4 do not fit this run"):
        run_bksdm(*flags_of(), "--use_ema", f"--resume_from_checkpoint={source}", output=tmp_path / "out")


def test_changed_options_are_logged_and_old_checkpoints_are_deleted(unbroken, run_bksdm, flags_of, tmp_path):
    source = unbroken().output / "checkpoint-2"
    run = run_bksdm(*flags_of(), f"--resume_from_checkpoint={source}", "--lambda_kd_feat=0.5", "--checkpoints_total_limit=1",
                    output=tmp_path / "out")  # fmt: skip
    assert "--lambda_kd_feat is 0.5, the checkpoint had 1.0." in run.log
    assert [row["step"] for row in run.rows] == [3, 4, 5, 6]
    assert [path.name for path in run.output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    row = run.rows[0]
    assert row["loss"] == pytest.approx(row["loss_sd"] + row["loss_kd_output"] + 0.5 * row["loss_kd_feat"], rel=1e-5)


def test_loss_table_keeps_the_weights_that_its_rows_were_trained_with(unbroken, run_bksdm, flags_of, tmp_path):
    shutil.copytree(unbroken().output, tmp_path / "out")
    (tmp_path / "out/log_loss.csv").unlink()
    run_bksdm(*flags_of(), "--resume_from_checkpoint=checkpoint-2", "--lambda_kd_feat=0.5", output=tmp_path / "out")
    with open(tmp_path / "out/log_loss.csv", newline="") as file:
        assert [row["lamb_kd_feat"] for row in csv.DictReader(file)] == ["1.0"] * 2 + ["0.5"] * 4


def test_a_finished_checkpoint_is_exported_into_a_new_folder(unbroken, run_bksdm, flags_of, tmp_path):
    source = unbroken().output
    run = run_bksdm(*flags_of(), f"--resume_from_checkpoint={source}/checkpoint-{STEPS}", output=tmp_path / "out")
    assert weights(run.output) == weights(source) and run.rows == []
    reports = [json.loads((output / "bksdm_report.json").read_text()) for output in (source, run.output)]
    assert reports[0].pop("last")["step"] == STEPS and reports[1].pop("last") is None and reports[0] == reports[1]


def test_checkpoint_holds_what_its_page_says(unbroken):
    folder = unbroken(AVERAGE).output / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"unet", "unet_ema", "optimizer.bin", "random_states_0.pkl", "rank_state_0.json", "trainer_state.json"} <= names
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["step"] == 4 and state["seed"] == 7 and state["options"]["preset"] == "bk_small"
    assert "bk_small" in state["student"] and "8 pairs" in state["features"]
    from diffusers import UNet2DConditionModel

    for name in ("unet", "unet_ema"):
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder=name)
        assert sum(value.numel() for value in unet.parameters()) == 94_740
