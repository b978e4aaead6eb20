"""Stopped and killed FPDM runs go on bit for bit; the newest run of the same settings is found; others are refused."""

import functools
import json
import shutil
import signal

import pytest
from conftest import FPDM, read_rows
from inprocess import assert_equal, weights
from test_bksdm_resume import read_lines, wait_until

from brisk import checkpoint, fpdm
from brisk.options import UserError

STEPS = 6
FLAGS = (f"--max_train_steps={STEPS}", "--ckpt_every=2", "--learning_rate=0.01", "--ema_decay=0.9", "--lr_scheduler=cosine")
FP = ("--fixed_point", "--deq_no_grad_max_iters=2", "--deq_with_grad_max_iters=3")
SETUPS = {
    "fpdm": FP,
    "dit, two workers": ("--num_workers=2",),
    "fpdm, accumulation, bf16, v": (*FP, "--gradient_accumulation_steps=2", "--mixed_precision=bf16", "--predict_v",
                                    "--use_zero_terminal_snr", "--fp_grad_checkpointing"),
    "unsupervised, per rank": (*FP, "--unsupervised", "--sync_iters=False"),
}  # fmt: skip
LOGGED = ("step", "images", "loss", "mse", "vb", "lr", "grad_norm")
OF_LAYER = ("fp/n_no_grad", "fp/m_with_grad", "fp/residual")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def unbroken(run_fpdm):
    """A function: setup -> the run that nobody interrupted (each made once)."""
    return functools.cache(lambda setup="fpdm": run_fpdm(*FLAGS, *SETUPS[setup]))


def assert_same_run(output, expected):
    """Same networks and averages bit for bit, each step logged once with the same numbers, the same (n, m) included."""
    final = {name: value for name, value in weights(expected.output).items() if "checkpoint" not in name}
    assert_equal({name: value for name, value in weights(output).items() if "checkpoint" not in name}, final)
    assert any(name.startswith("transformer/") for name in final) and any(name.startswith("transformer_raw/") for name in final)
    names = LOGGED + (OF_LAYER if "fp/residual" in expected.rows[0] else ())
    assert [[row[name] for name in names] for row in read_rows(output)] == [[row[name] for name in names] for row in expected.rows]
    assert [row["step"] for row in read_rows(output)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("setup", SETUPS)
def test_stopped_by_sigterm_it_saves_exits_143_and_goes_on_bit_for_bit(setup, run_fpdm, unbroken, signal_at, monkeypatch, tmp_path):
    output, flags = tmp_path / "out", (*FLAGS, *SETUPS[setup], "--resume=latest")
    signal_at(signal.SIGTERM, 3)
    with pytest.raises(SystemExit) as stopped:
        run_fpdm(*flags, output=output)
    assert stopped.value.code == 143 and "Stopped by signal 15 after step 3" in run_fpdm.log()
    assert checkpoint.damage(output / "checkpoint-3") is None
    assert not (output / "transformer").exists(), "a stopped run must not look finished"
    monkeypatch.undo()
    run = run_fpdm(*flags, output=output)
    assert f"Resuming from {output / 'checkpoint-3'}: step 3 of {STEPS}" in run.log
    assert_same_run(output, unbroken(setup))


def test_setups_train_differently(unbroken):
    """Guards the comparisons above: a flag that did nothing would resume exactly too."""
    found = [tuple(row["loss"] for row in unbroken(setup).rows) for setup in SETUPS]
    assert len(set(found)) == len(SETUPS)
    drawn = [(row["fp/n_no_grad"], row["fp/m_with_grad"]) for row in unbroken().rows]
    assert len(set(drawn)) > 2 and len({row["lr"] for row in unbroken().rows}) > 3


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(unbroken, fork_script, tmp_path):
    output, flags = tmp_path / "out", (*FLAGS, *FP, "--resume=latest")
    expected, kills = unbroken(), 0
    for moment in (lambda: len(read_lines(output)) >= 3,
                   lambda: any(output.glob(".checkpoint-4.tmp/*")) or (output / "checkpoint-4").exists()):  # fmt: skip
        process = fork_script(f"--output_dir={output}", *flags, script=FPDM)
        if wait_until(moment, process):
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = fork_script(f"--output_dir={output}", *flags, script=FPDM)
    assert last.wait() == 0, last.err()
    assert_same_run(output, expected)
    assert not list(output.glob(".checkpoint-*"))


def test_damaged_checkpoint_is_skipped_and_an_older_one_used(unbroken, run_fpdm, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    (output / "checkpoint-6/transformer_ema/diffusion_pytorch_model.safetensors").unlink()
    run = run_fpdm(*FLAGS, *FP, "--resume=latest", output=output)
    assert f"Skipping {output / 'checkpoint-6'}: " in run.log and f"Resuming from {output / 'checkpoint-4'}" in run.log
    assert_same_run(output, unbroken())


def test_the_newest_run_of_the_same_settings_goes_on_and_others_get_a_number_of_their_own(run_fpdm, tmp_path):
    auto = (*FP, "--name=", "--output_subdir=runs", "--checkpointing_steps=1")

    def train(*flags):
        run_fpdm(*auto, *flags, output=tmp_path)
        return sorted(path.name[:3] for path in (tmp_path / "runs").iterdir())

    assert train() == ["000"]
    assert train() == ["000", "001"], "without --resume it is a new run"
    assert train("--lr=0.5") == ["000", "001", "002"]
    assert train("--resume=latest", "--max_train_steps=3") == ["000", "001", "002"]
    (second,) = (tmp_path / "runs").glob("001-*")
    assert [row["step"] for row in read_rows(second)] == [1, 2, 3] and f"Resuming from {second}/checkpoint-2" in run_fpdm.log()
    assert train("--resume=latest", "--lr=0.25") == ["000", "001", "002", "003"]
    assert "No usable checkpoint" in run_fpdm.log()


@pytest.mark.parametrize(("flags", "sentence"), [
    ((), "--fixed_point is False, the network in {} was trained with True."),
    ((*FP, "--deq_pre_depth=2"), "--fixed_point_pre_depth is 2, the network in {} was trained with 1."),
    ((*FP, "--hidden_size=64"), "--hidden_size is 64, the network in {} was trained with 32."),
    ((*FP, "--predict_v"), "--predict_v is True, the network in {} was trained with False."),
    ((*FP, "--num_classes=5"), "--num_classes is 5, the network in {} was trained with 4."),
    ((*FP, "--unsupervised"), "--unsupervised is True, the network in {} was trained with False."),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "pt"])
def test_checkpoint_of_another_network_is_refused_with_both_values(kind, flags, sentence, unbroken, run_fpdm, tmp_path):
    source = unbroken().output / "checkpoint-4"
    if kind == "pt":
        import copy

        import torch

        from brisk import optim

        network = fpdm.load_transformer(source)
        stored = json.loads((source / "trainer_state.json").read_text())
        source = tmp_path / "x/latest.pt"
        source.parent.mkdir()
        optimizer = torch.optim.AdamW(network.parameters())
        fpdm.write_pt(source, network, optim.EMA(copy.deepcopy(network)), optimizer, stored["options"], 4)
    with pytest.raises(UserError) as refused:
        run_fpdm(*FLAGS, *flags, f"--resume={source}", output=tmp_path / "out")
    assert str(refused.value) == sentence.format(source) and refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_changed_options_are_logged_and_old_checkpoints_are_deleted(unbroken, run_fpdm, tmp_path):
    source = unbroken().output / "checkpoint-2"
    run = run_fpdm(*FLAGS, *FP, f"--resume={source}", "--loss_weighting=p2", "--deq_with_grad_max_iters=5",
                   "--checkpoints_total_limit=1", output=tmp_path / "out")  # fmt: skip
    assert "--loss_weighting is p2, the checkpoint had uniform." in run.log
    assert "--fixed_point_with_grad_max_iters is 5, the checkpoint had 3." in run.log
    assert [row["step"] for row in run.rows] == [3, 4, 5, 6]
    assert [path.name for path in run.output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_checkpoint_holds_the_network_its_average_and_where_the_data_stand(unbroken):
    folder = unbroken().output / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"transformer", "transformer_ema", "optimizer.bin", "random_states_0.pkl", "rank_state_0.json",
            "trainer_state.json"} <= names  # fmt: skip
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["step"] == 4 and state["seed"] == 7 and state["config"]["fixed_point"]
    for name in ("transformer", "transformer_ema"):
        network = fpdm.FPDMTransformer2DModel.from_pretrained(folder, subfolder=name)
        assert sum(value.numel() for value in network.parameters()) == 77_184
    assert (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() != (
        folder / "transformer_ema/diffusion_pytorch_model.safetensors").read_bytes()  # fmt: skip
