"""train_epd_rl.py on two gloo processes: they share the images of an update and equal one process."""

import json

import pytest
from conftest import read_rows
from epd_rl_runs import SCRIPT, flags, run, start_file
from inprocess import assert_equal
from ranks import notes_of, noting, run_driver
from safetensors.torch import load_file

STEPS = 4
FLAGS = (f"--max_steps={STEPS}", "logging.save_interval=2", "--eval_every=2", "--eval_samples=5")
NOTING = noting(SCRIPT, '''
from brisk import epd_rl

sample, agree = epd_rl.sample, epd_rl.agree


def noting_sample(sampler, direction, x, tables):
    note(inputs=x.flatten(1).tolist()) if tables.r.ndim == 3 else None
    return sample(sampler, direction, x, tables)


def noting_agree(policy, device):
    own = digest(policy.network.parameters())
    agree(policy, device)
    note(own=own, weights=digest(policy.network.parameters()))


epd_rl.sample, epd_rl.agree = noting_sample, noting_agree
''')
NAMES = ("loss", "policy_loss", "kl", "ratio", "grad_norm", "clip_fraction", "entropy", "mixed_reward_mean", "mixed_reward_std",
         "analytic_mean", "images")  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_file(tmp_path_factory.mktemp("start"), scale=0.2)


@pytest.fixture(scope="module")
def pair(warm, start):
    """A function: (folder, flags, STOP_AT) -> exit codes and stderrs of both ranks."""

    def go(folder, more, **variables):
        given = [*flags(start, *more), f"--output_dir={folder.parent / 'out'}"]
        return run_driver(warm, folder, given, NOTING, **variables)

    return go


def policy(output, step=STEPS):
    return load_file(output / f"checkpoint-{step}/policy.safetensors")


@pytest.mark.parametrize("more", [(), ("--rloo_group=mixed", "--share_latents=False", "ppo.rloo_k=2", "ppo.ppo_epochs=2")],
                         ids=["prompt", "mixed"])  # fmt: skip
def test_two_processes_equal_one(more, pair, start, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, *more))
    assert codes == [0, 0], errors
    first, second = notes_of(tmp_path / "notes")
    assert [len(batch) for batch in first["inputs"] + second["inputs"]] == [4] * 2 * STEPS
    groups = [{tuple(row) for batch in rank["inputs"] for row in batch} for rank in (first, second)]
    assert not groups[0] & groups[1], "each process has other latents"
    assert first["weights"] == second["weights"] == first["own"] == second["own"] and len(set(first["weights"])) == STEPS
    alone = run(tmp_path / "alone", start, *FLAGS, *more)
    for row, expected in zip(read_rows(tmp_path / "out"), alone.rows, strict=True):
        assert [row[name] for name in NAMES] == pytest.approx([expected[name] for name in NAMES], rel=1e-4, abs=1e-6)
    ours, theirs, before = policy(tmp_path / "out"), policy(alone.output), policy(alone.output, 2)
    for name in (name for name in theirs if name.startswith(("network", "best"))):
        moved, apart = (theirs[name] - before[name]).norm(), (ours[name] - theirs[name]).norm()
        assert apart <= 0.01 * moved + 1e-9, name
    reports = [json.loads((output / "report.json").read_text()) for output in (tmp_path / "out", alone.output)]
    assert reports[0]["start_rewards"] == pytest.approx(reports[1]["start_rewards"], rel=1e-5)
    assert [found["reward"] for found in reports[0]["history"]] == pytest.approx([one["reward"] for one in reports[1]["history"]],
                                                                                 rel=1e-4)  # fmt: skip


def test_stopped_by_a_signal_to_one_rank_the_pair_goes_on_bit_for_bit(pair, tmp_path):
    (tmp_path / "a").mkdir()
    codes, errors = pair(tmp_path / "a" / "notes", FLAGS)
    assert codes == [0, 0], errors
    more = (*FLAGS, "--resume=latest")
    codes, errors = pair(tmp_path / "first", more, STOP_AT="3")
    assert codes == [143, 143], errors
    codes, errors = pair(tmp_path / "second", more)
    assert codes == [0, 0], errors
    assert_equal(policy(tmp_path / "out"), policy(tmp_path / "a/out"))
    assert (tmp_path / "out/report.json").read_text() == (tmp_path / "a/out/report.json").read_text()


@pytest.mark.parametrize(("more", "sentence"), [
    (("ppo.rollout_batch_size=9", "ppo.rloo_k=3"), "ppo.rollout_batch_size 9 cannot be divided among 2 processes."),
    (("--eval_samples=1",), "--eval_samples 1 cannot be shared among 2 processes."),
])  # fmt: skip
def test_images_that_two_processes_cannot_share_are_refused_by_both(more, sentence, pair, tmp_path):
    codes, errors = pair(tmp_path / "notes", (*FLAGS, *more))
    assert codes == [2, 2], errors
    assert all(sentence in error for error in errors)
    assert not (tmp_path / "out").exists()
