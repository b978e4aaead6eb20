"""Settings of the SLAM script that must not change its result: memory, layout, accumulation, resume, compilation."""

import pytest
import torch
from inprocess import assert_equal, make_inputs, train, weights

from brisk import macs, optim, schedules, sd_inputs, sd_models, seeding, splam, tiny

pytestmark = [
    pytest.mark.equivalence,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return lambda family="sd1": make_inputs(folder, family)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """(weights, rows) of three plain steps, to which the others are compared."""
    done = {}

    def run(family="sd1", *flags):
        key = (family, *flags)
        if key not in done:
            output = tmp_path_factory.mktemp("plain") / "out"
            done[key] = weights(output), train(output, *inputs(family), "--max_train_steps=3", *flags), output
            done[key] = weights(output), done[key][1]
        return done[key]

    return run


def assert_close(one, two, tolerance=2e-5):
    assert one.keys() == two.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_moved(state):
    """Guards the comparisons below: two networks that do not train would be equal too."""
    moved = [n for n in state if n.startswith("unet/") and not torch.equal(state[n], state[f"unet_target/{n[5:]}"])]
    assert len(moved) > 20


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradient_checkpointing_does_not_change_the_weights(inputs, plain, tmp_path, monkeypatch, family):
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    rows = train(tmp_path, *inputs(family), "--max_train_steps=3", "--gradient_checkpointing")
    expected, expected_rows = plain(family)
    assert_moved(expected)
    assert_close(weights(tmp_path), expected, 1e-6)
    assert losses(rows) == pytest.approx(losses(expected_rows), rel=1e-5)
    assert len(calls) >= 3, "it was used, and"
    assert len(calls) % 3 == 0, "by the student alone, once per step and block"


@pytest.mark.parametrize("flags", [(), ("--use_lora", "--lora_rank=4", "--lora_ema")], ids=["full", "lora"])
def test_channels_last_does_not_change_the_weights(inputs, plain, tmp_path, flags):
    expected, expected_rows = plain("sd1", *flags)
    rows = train(tmp_path, *inputs(), "--max_train_steps=3", "--channels_last", "--checkpointing_steps=3", *flags)
    assert_close(weights(tmp_path), expected)
    assert losses(rows) == pytest.approx(losses(expected_rows), rel=1e-3)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_channels_last_resumes_bit_for_bit(inputs, tmp_path):
    flags = [*inputs(), "--channels_last", "--checkpointing_steps=2"]
    train(tmp_path / "straight", *flags, "--max_train_steps=4")
    train(tmp_path / "broken", *flags, "--max_train_steps=2")
    train(tmp_path / "broken", *flags, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    assert_equal(weights(tmp_path / "broken"), weights(tmp_path / "straight"))


def test_foreach_average_equals_a_loop(inputs, plain, tmp_path, monkeypatch):
    calls = []

    def loop(targets, sources, decay):
        calls.append(decay)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(decay * target + (1 - decay) * source)

    monkeypatch.setattr(optim, "lerp_", loop)
    train(tmp_path, *inputs(), "--max_train_steps=3")
    assert calls == [0.95] * 3
    assert_close(weights(tmp_path), plain()[0], 1e-6)


def test_average_moves_once_per_optimizer_step(inputs, tmp_path, monkeypatch):
    calls, real = [], optim.lerp_
    monkeypatch.setattr(optim, "lerp_", lambda *a: calls.append(1) or real(*a))
    train(tmp_path, *inputs(), "--max_train_steps=2", "--gradient_accumulation_steps=3")
    assert len(calls) == 2


def test_logged_loss_of_an_accumulated_step_is_the_mean_of_its_micro_steps(inputs, tmp_path, monkeypatch):
    seen, real = [], splam.distillation_loss

    def noting(*args):
        loss = real(*args)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(splam, "distillation_loss", noting)
    rows = train(tmp_path, *inputs(), "--max_train_steps=2", "--gradient_accumulation_steps=3")
    assert len(seen) == 6 and len(set(seen)) == 6
    assert losses(rows) == pytest.approx([sum(seen[:3]) / 3, sum(seen[3:]) / 3], rel=1e-5)
    assert [row["images"] for row in rows] == [6, 12]


def test_gradients_of_equal_micro_steps_are_averaged_and_not_summed(inputs, tmp_path, monkeypatch):
    """Equal images and equal draws in every micro-step: accumulation must change nothing, the norm included."""
    (tmp_path / "images").mkdir()
    tiny.random_image(__import__("numpy").random.default_rng(0), 32, 32).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("one")
    real = seeding.generator
    monkeypatch.setattr(seeding, "generator", lambda seed, *rest, device: real(seed, "fixed", device=device))
    flags = [flag for flag in inputs() if "shards" not in flag]
    flags += [f"--train_data_dir={tmp_path}/images", "--max_train_steps=2"]
    one = train(tmp_path / "one", *flags)
    three = train(tmp_path / "three", *flags, "--gradient_accumulation_steps=3")
    assert [row["grad_norm"] for row in three] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    assert losses(three) == pytest.approx(losses(one), rel=1e-4)
    assert_close(weights(tmp_path / "three"), weights(tmp_path / "one"), 1e-5)


RESUMED = {
    "full": (), "full, two workers": ("--dataloader_num_workers=2",),
    "full, accumulation": (
        "--gradient_accumulation_steps=2", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=3",
    ),
    "full, snr": ("--subpath_param=snr", "--gamma_one_prob=0.25", "--loss_type=huber", "--random_flip"),
    "lora": ("--use_lora", "--lora_rank=4", "--lora_ema", "--lora_dropout=0.3", "--gradient_accumulation_steps=2"),
    "lora, two workers": ("--use_lora", "--lora_rank=4", "--lora_ema", "--dataloader_num_workers=2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESUMED)
def test_two_and_two_resumed_steps_equal_four_straight_ones_bit_for_bit(inputs, tmp_path, kind):
    flags = [*inputs(), "--checkpointing_steps=2", *RESUMED[kind]]
    straight = train(tmp_path / "straight", *flags, "--max_train_steps=4")
    train(tmp_path / "broken", *flags, "--max_train_steps=2")
    resumed = train(tmp_path / "broken", *flags, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    assert_equal(weights(tmp_path / "broken"), weights(tmp_path / "straight"))
    ends = [tmp_path / f"{run}/checkpoint-4" for run in ("broken", "straight")]
    assert_equal(weights(ends[0]), weights(ends[1]))
    states = [torch.load(end / "optimizer.bin", weights_only=True)["state"] for end in ends]
    for one, two in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("step", "loss", "grad_norm", "lr", "images"):
        assert [row[name] for row in resumed] == [row[name] for row in straight]
    assert (ends[0] / "rank_state_0.json").read_text() == (ends[1] / "rank_state_0.json").read_text()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_compiled_networks_train_the_same_and_keep_their_names(inputs, tmp_path, monkeypatch, lora):
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or real(self, backend="eager"))
    flags = [*inputs(), "--max_train_steps=2", "--checkpointing_steps=2"]
    flags += ["--use_lora", "--lora_rank=4", "--lora_target_modules=to_q,conv1"] if lora else []
    train(tmp_path / "plain", *flags)
    train(tmp_path / "compiled", *flags, "--compile")
    torch._dynamo.reset()
    assert len(compiled) == (1 if lora else 3), "teacher, student and target; with adapters they are one"
    for place in (".", "checkpoint-2"):
        found = weights(tmp_path / "compiled" / place)
        assert_close(found, weights(tmp_path / "plain" / place))
        assert not [name for name in found if "_orig_mod" in name]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_guidance_in_one_batch_equals_two_calls(family):
    parts = tiny.make_pipeline(family)
    unet = parts.unet.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    calls = [macs.unet_inputs(unet.config, 3, 8, tokens=16, generator=draw) for _ in range(2)]
    conds = [{name: call[name] for name in call if name not in ("sample", "timestep")} for call in calls]
    x, t = calls[0]["sample"], torch.tensor([19, 499, 999])
    both = sd_models.predict(unet, torch.float32, x.repeat(2, 1, 1, 1), t.repeat(2), sd_inputs.stack_conditions(*conds))
    single = [sd_models.predict(unet, torch.float32, x, t, cond) for cond in conds]
    for one, two in zip(both.chunk(2), single, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*single, atol=1e-3)
    levels = [value for abar in (0.3, 0.5) for value in schedules.signal_and_noise(torch.full((3,), abar), x)]
    ends = [splam.guided_ddim_step(*pair, x, *levels, 8.0, "epsilon")[0] for pair in (both.chunk(2), single)]
    torch.testing.assert_close(*ends, atol=1e-3, rtol=1e-4)


def test_teacher_precision_without_mixed_precision_trains(inputs, plain, tmp_path):
    """A teacher in bfloat16 beside a float32 student: close to the plain run, and no clash of types."""
    rows = train(tmp_path, *inputs(), "--max_train_steps=2", "--teacher_dtype=bf16")
    assert losses(rows) == pytest.approx(losses(plain()[1])[:2], rel=0.2)
    assert rows[0]["loss"] != plain()[1][0]["loss"]
