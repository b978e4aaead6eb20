"""FPDM on two gloo processes: equal numbers of iterations, the step of one process with the whole batch, agreed stops."""

import pytest
from conftest import FPDM, read_rows
from inprocess import assert_equal, weights
from ranks import SHARED_DRAWS, assert_stops_and_goes_on, notes_of, noting, pairs_of, unbroken

import train_fpdm

STEPS = 4
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--learning_rate=0.01", "--ema_decay=0.9", "--adam_epsilon=1e-5",
         "--fixed_point", "--deq_no_grad_max_iters=4", "--deq_with_grad_max_iters=4", "--global_batch_size=8",
         "--class_dropout_prob=0.4")  # fmt: skip
NOTING = noting(FPDM, '''
from brisk import fpdm

forward = fpdm.FPDMTransformer2DModel.forward


def noting_forward(self, x, timesteps, labels, num_iters=None, **named):
    note(times=timesteps.tolist(), inputs=digest([x]), iterations=num_iters)
    return forward(self, x, timesteps, labels, num_iters, **named)


fpdm.FPDMTransformer2DModel.forward = noting_forward
''')


@pytest.fixture(scope="module")
def pair(warm, base_flags):
    return pairs_of(warm, base_flags, NOTING, script=FPDM)


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """(output, notes by rank) of an unbroken run."""
    return unbroken(pair, tmp_path_factory.mktemp("straight"), FLAGS)


def test_ranks_iterate_equally_often_on_different_data_and_stay_equal(straight):
    output, (first, second) = straight
    drawn = [tuple(pair) for pair in first["iterations"]]
    args = train_fpdm.parse_args(list(FLAGS))[0]
    assert first["iterations"] == second["iterations"]
    assert drawn == [train_fpdm.draw_iterations(args, 7, step) for step in range(STEPS)] and len(set(drawn)) > 2
    assert not set(first["inputs"]) & set(second["inputs"]), "both ranks trained on the same noisy latents"
    assert first["times"] != second["times"]
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == STEPS
    assert [row["images"] for row in read_rows(output)] == [8, 16, 24, 32]


def test_without_sync_iters_each_rank_draws_its_own_numbers_and_weights_stay_equal(pair, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, "--sync_iters=False"))
    assert codes == [0, 0], errors
    first, second = notes_of(tmp_path / "notes")
    assert first["iterations"] != second["iterations"]
    assert first["weights"] == second["weights"]
    mean = [sum(rank["iterations"][0][1] for rank in (first, second)) / 2, read_rows(tmp_path / "out")[0]["fp/m_with_grad"]]
    assert mean[0] == mean[1]


@pytest.mark.parametrize("flags", [(), ("--predict_v", "--use_zero_terminal_snr", "--fp_grad_checkpointing")], ids=["eps", "v"])
def test_two_processes_with_the_same_samples_noise_and_times_equal_one_with_the_whole_batch(flags, pair, run_fpdm, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, *flags), NOTING + SHARED_DRAWS)
    assert codes == [0, 0], errors
    alone = run_fpdm(*FLAGS, *flags, output=tmp_path / "alone")
    rows = read_rows(tmp_path / "out")
    names = ("loss", "mse", "vb", "grad_norm", "lr", "images", "fp/n_no_grad", "fp/m_with_grad", "fp/residual")
    assert len(rows) == STEPS
    for row, expected in zip(rows, alone.rows, strict=True):
        assert [row[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4)
    ours, theirs = weights(tmp_path / "out"), weights(alone.output)
    assert ours.keys() == theirs.keys()
    start = weights(alone.output / "checkpoint-2")
    for name in (name for name in start if name.startswith("transformer/")):
        last = name.replace("transformer/", "transformer_raw/")
        moved, apart = (theirs[last] - start[name]).norm(), (ours[last] - theirs[last]).norm()
        assert moved > 1e-5, "weights that hardly move prove nothing"
        assert apart < 0.01 * moved, name


def test_stopped_by_a_signal_to_one_rank_the_pair_goes_on_bit_for_bit(straight, pair, tmp_path):
    assert_stops_and_goes_on(pair, tmp_path, FLAGS, straight[1], ("inputs", "times", "iterations", "weights"))
    assert_equal(weights(tmp_path / "out"), weights(straight[0]))


def test_a_batch_that_two_processes_cannot_share_is_refused_by_both(pair, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, "--global_batch_size=7"))
    assert codes == [2, 2], errors
    assert all("--global_batch_size 7 cannot be divided among 2 processes" in error for error in errors)
    assert not (tmp_path / "out").exists()


def test_numbered_folders_are_agreed_on_by_all_ranks(pair, tmp_path):
    for _ in range(2):
        codes, errors = pair(tmp_path / "notes", (*FLAGS, "--name=", "--output_subdir=runs", "--max_train_steps=1"))
        assert codes == [0, 0], errors
    found = sorted((tmp_path / "out/runs").iterdir())
    assert [path.name[:4] for path in found] == ["000-", "001-"]
    assert all((path / "transformer").is_dir() for path in found)
