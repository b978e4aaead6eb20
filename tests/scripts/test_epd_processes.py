"""EPD on two gloo processes: they share one batch and equal one process; agreed stops, refusals and folders."""

import json

import pytest
from conftest import EPD, read_rows
from inprocess import assert_equal
from ranks import assert_stops_and_goes_on, notes_of, noting, pairs_of, unbroken
from safetensors.torch import load_file

STEPS = 4
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--eval_every=2", "--eval_samples=5", "--update_mode=joint")
NOTING = noting(EPD, '''
from brisk import denoisers, epd_distill

teacher_states, updates = epd_distill.teacher_states, epd_distill.updates


def noting_teacher(name, direction, x, *rest):
    note(inputs=x.flatten(1).tolist())
    return teacher_states(name, direction, x, *rest)


def noting_updates(chains, raw, mode):
    yield from updates(chains, raw, mode)
    note(weights=digest(list(raw)))


epd_distill.teacher_states, epd_distill.updates = noting_teacher, noting_updates
''')


@pytest.fixture(scope="module")
def pair(warm, base_flags):
    return pairs_of(warm, base_flags, NOTING, script=EPD)


def tables(output, step=STEPS):
    return load_file(output / f"checkpoint-{step}/tables.safetensors")


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """(output, notes by rank) of an unbroken run."""
    return unbroken(pair, tmp_path_factory.mktemp("straight"), FLAGS)


def test_ranks_train_on_different_halves_of_the_batch_and_stay_equal(straight):
    output, (first, second) = straight
    assert all(len(batch) == 4 for rank in (first, second) for batch in rank["inputs"])
    seen = [{tuple(row) for batch in rank["inputs"] for row in batch} for rank in (first, second)]
    assert len(seen[0] | seen[1]) == 8 * STEPS
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == STEPS
    assert [row["images"] for row in read_rows(output)] == [8, 16, 24, 32]


@pytest.mark.parametrize("flags", [
    (), ("--update_mode=per_step", "--sampler_stu=ipndm", "--num_steps=4", "--batch_gpu=2"),
    ("--guidance_type=cfg", "--guidance_rate=2", "--init=normal", "--update_mode=detach", "--ema_decay=0.5"),
], ids=["joint", "plug-in", "guided"])  # fmt: skip
def test_two_processes_equal_one(flags, pair, run_epd, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, *flags))
    assert codes == [0, 0], errors
    alone = run_epd(*FLAGS, *flags, output=tmp_path / "alone")
    names = [name for name in alone.rows[0] if name.startswith(("loss", "interval", "grad_norm", "table", "lr"))]
    assert len(names) > 20
    for row, expected in zip(read_rows(tmp_path / "out"), alone.rows, strict=True):
        assert [row[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-3, abs=1e-5)
    ours, theirs, start = tables(tmp_path / "out"), tables(alone.output), tables(alone.output, 2)
    for name in (name for name in theirs if name.startswith(("raw", "average", "best"))):
        moved, apart = (theirs[name] - start[name]).norm(), (ours[name] - theirs[name]).norm()
        assert apart <= 0.01 * moved, name
        assert moved > 0.01, "tables that hardly move prove nothing"
    reports = [json.loads((output / "report.json").read_text()) for output in (tmp_path / "out", alone.output)]
    assert [error for _, error in reports[0]["history"]] == pytest.approx([error for _, error in reports[1]["history"]], rel=1e-4)
    assert reports[0]["start"] == pytest.approx(reports[1]["start"], rel=1e-5)


def test_stopped_by_a_signal_to_one_rank_the_pair_goes_on_bit_for_bit(straight, pair, tmp_path):
    assert_stops_and_goes_on(pair, tmp_path, FLAGS, straight[1], ("inputs", "weights"))
    assert_equal(tables(tmp_path / "out"), tables(straight[0]))
    assert (tmp_path / "out/report.json").read_text() == (straight[0] / "report.json").read_text()


@pytest.mark.parametrize(("flag", "sentence"), [
    ("--batch=7", "--batch 7 cannot be divided among 2 processes."),
    ("--batch_gpu=3", "--batch 8 cannot be divided among 2 processes x --batch_gpu 3."),
])  # fmt: skip
def test_a_batch_that_two_processes_cannot_share_is_refused_by_both(flag, sentence, pair, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, flag))
    assert codes == [2, 2], errors
    assert all(sentence in error for error in errors)
    assert not (tmp_path / "out").exists()


def test_numbers_and_seeds_are_agreed_on_by_all_ranks(pair, tmp_path):
    for _ in range(2):
        codes, errors = pair(tmp_path / "notes", (*FLAGS, "--nosubdir=False", "--seed=random", "--max_train_steps=1"))
        assert codes == [0, 0], errors
        first, second = notes_of(tmp_path / "notes")
        assert first["weights"] == second["weights"]
    found = sorted((tmp_path / "out").iterdir())
    assert [path.name[:6] for path in found] == ["00001-", "00002-"]
    assert all((path / "export/predictor.json").is_file() for path in found)
    assert read_rows(found[0])[0]["loss"] != read_rows(found[1])[0]["loss"]
