"""BK-SDM on two gloo processes: the step of one process with the doubled batch, draws of their own, taps, agreed stops."""

import pytest
from conftest import BKSDM, read_rows
from diffusers import DiffusionPipeline, UNet2DConditionModel
from ranks import SHARED_DRAWS, assert_stops_and_goes_on, noting, pairs_of, unbroken
from safetensors.torch import load_file
from test_slam_processes import FSDP, ON_CPU

STEPS = 4
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--learning_rate=0.01", "--use_ema", "--preset=bk_tiny",
         "--adam_epsilon=1e-3")  # fmt: skip
NOTING = noting(BKSDM, '''
from brisk import feature_taps, sd_models

predict, read = sd_models.predict, feature_taps.FeatureTaps.read


def noting_predict(unet, dtype, x, timesteps, *rest):
    if unet.training:
        note(times=timesteps.tolist(), inputs=digest([x]))
    return predict(unet, dtype, x, timesteps, *rest)


def noting_read(self):
    features = read(self)
    if not features[0].is_meta:  # not when the pairs are checked, before any work
        note(features=[feature.requires_grad for feature in features])
    return features


sd_models.predict, feature_taps.FeatureTaps.read = noting_predict, noting_read
''')


@pytest.fixture(scope="module")
def pair(warm, base_flags):
    return pairs_of(warm, base_flags, NOTING, family="toy_sd1", script=BKSDM)


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """(output, notes by rank) of an unbroken run."""
    return unbroken(pair, tmp_path_factory.mktemp("straight"), FLAGS)


def weights(folder, name="unet"):
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def test_ranks_draw_different_data_noise_and_timesteps_and_stay_equal(straight):
    output, (first, second) = straight
    assert len(first["inputs"]) == len(second["inputs"]) == STEPS
    assert not set(first["inputs"]) & set(second["inputs"]), "both ranks trained on the same noisy latents"
    assert first["times"] != second["times"]
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == STEPS
    assert [row["images"] for row in read_rows(output)] == [4, 8, 12, 16]


def test_taps_read_the_network_inside_the_wrapper(straight):
    for notes in straight[1]:
        assert notes["features"] == [[True] * 6, [False] * 6] * STEPS, "of student and teacher, once a step"


@pytest.mark.parametrize("flags", [(), ("--snr_gamma=5", "--snr_on_features", "--gradient_checkpointing")], ids=" ".join)
def test_two_processes_with_the_same_samples_noise_and_times_equal_one_with_twice_the_batch(
    flags, pair, run_bksdm, pictures, tmp_path
):
    flags = (*FLAGS, f"--train_data_dir={pictures}", *flags)
    codes, errors = pair(tmp_path / "notes", flags, NOTING + SHARED_DRAWS)
    assert codes == [0, 0], errors
    alone = run_bksdm(*flags, "--train_batch_size=4", output=tmp_path / "alone")
    rows = read_rows(tmp_path / "out")
    assert len(rows) == STEPS
    for row, expected in zip(rows, alone.rows, strict=True):
        names = [name for name in expected if name.startswith(("loss", "feat/", "grad_norm", "images", "lr"))
                 and name != "images_per_second"]  # fmt: skip
        assert len(names) == 6 + 7
        assert [row[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    for name in ("unet", "unet_raw"):
        ours, theirs = weights(tmp_path / "out", name), weights(alone.output, name)
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-5
    moved = [(weights(alone.output, "unet_raw")[key] - value).abs().max()
             for key, value in weights(alone.output / "checkpoint-2").items()]  # fmt: skip
    assert min(moved) > 1e-4, "weights that hardly move prove nothing"


def test_stopped_by_a_signal_to_one_rank_the_pair_goes_on_bit_for_bit(straight, pair, tmp_path):
    assert_stops_and_goes_on(pair, tmp_path, FLAGS, straight[1], ("inputs", "times", "weights"))
    for name in ("unet", "unet_raw"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "out" / file).read_bytes() == (straight[0] / file).read_bytes()
    assert (tmp_path / "out/log_loss.csv").read_text() == (straight[0] / "log_loss.csv").read_text()


def test_sharded_weights_train_and_export_a_pipeline_like_replicated_ones(straight, pair, tmp_path):
    flags = (*FLAGS, "--save_pipeline", "--validation_prompts=a", "--validation_steps=1")
    codes, errors = pair(tmp_path / "notes", flags, ON_CPU + NOTING, **FSDP)
    assert codes == [0, 0], errors
    assert errors[0].count("FSDP shards the student, no samples are made") == 1
    rows, expected = ([[row[key] for key in ("loss", "grad_norm")] for row in read_rows(folder)]
                      for folder in (tmp_path / "out", straight[0]))  # fmt: skip
    assert rows == [pytest.approx(values, rel=1e-2) for values in expected]
    for name in ("unet", "unet_raw"):
        ours, theirs = weights(tmp_path / "out", name), weights(straight[0], name)
        assert ours.keys() == theirs.keys()
        error = sum((ours[key] - theirs[key]).square().sum() for key in ours)
        assert error < 1e-3 * sum(value.square().sum() for value in theirs.values()), name
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.unet) is UNet2DConditionModel and pipeline.unet.config.mid_block_type is None
