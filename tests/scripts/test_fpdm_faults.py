"""Bad input of the FPDM script: one sentence and exit code 2 (1 while running), before any step, and nothing left behind."""

import functools

import numpy as np
import pytest
import refusals
import torch
from conftest import FPDM, ROOT

from brisk import fpdm, options, sd_inputs, tiny


@pytest.fixture
def refused(run_fpdm, tmp_path):
    return functools.partial(refusals.sentence_of, run_fpdm, tmp_path / "out", longest=700)


def write_features(folder, latents, labels, names=None):
    """{folder}/imagenet256_features and _labels; `labels` None: no folder of them; a list shorter than latents: files missing."""
    names = names or [str(number) for number in range(len(latents))]
    for kind, arrays in (("features", latents), ("labels", labels)):
        if arrays is None:
            continue
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
        for name, array in zip(names, arrays, strict=False):
            np.save(folder / f"imagenet256_{kind}/{name}.npy", array)
    return folder


def latents(count=4, channels=4, side=8):
    return np.random.default_rng(0).standard_normal((count, 1, channels, side, side)).astype(np.float32)


def classes(count=4, first=0):
    return np.arange(first, first + count)[:, None]


BAD_FLAGS = {
    "minimum above maximum": (["--synthetic_data=8", "--fixed_point", "--deq_no_grad_min_iters=4", "--deq_no_grad_max_iters=3"],
                              ["--fixed_point_no_grad_min_iters 4", "3"]),
    "minimum above maximum with gradient": (["--synthetic_data=8", "--deq_with_grad_min_iters=13"],
                                            ["--fixed_point_with_grad_min_iters 13", "12"]),
    "no iteration with gradient": (["--synthetic_data=8", "--deq_with_grad_min_iters=0"], ["--deq_with_grad_min_iters", "1"]),
    "zero snr with epsilon": (["--synthetic_data=8", "--use_zero_terminal_snr"], ["--use_zero_terminal_snr", "--predict_v"]),
    "model": (["--synthetic_data=8", "--model=DiT-XL/3"], ["--model", "DiT-XL/3", "DiT-XL/2"]),
    "batch and accumulation": (["--synthetic_data=8", "--global_batch_size=6", "--gradient_accumulation_steps=4"],
                               ["--global_batch_size 6", "1 processes x 4"]),
    "two sources": (["--synthetic_data=8", "--feature_path=x"], ["--feature_path", "--synthetic_data"]),
    "pictures without a vae": (["--train_data_dir=x"], ["--train_data_dir", "--vae"]),
    "weighted flow": (["--synthetic_data=8", "--flow", "--loss_weighting=p2"], ["--loss_weighting", "--flow"]),
    "flow and v": (["--synthetic_data=8", "--flow", "--predict_v"], ["--flow", "--predict_v"]),
    "two kinds of labels": (["--synthetic_data=8", "--unsupervised", "--dino_supervised"],
                            ["--unsupervised", "--dino_supervised"]),
    "patch": (["--synthetic_data=8", "--patch_size=3"], ["side 8", "patches of 3"]),
    "heads": (["--synthetic_data=8", "--num_heads=5"], ["32", "5 heads"]),
    "share above one": (["--synthetic_data=8", "--class_dropout_prob=1.5"], ["--class_dropout_prob", "1.5"]),
    "unknown flag": (["--synthetic_data=8", "--deq_pre_dept=1"], ["--deq_pre_dept", "--deq_pre_depth"]),
    "abbreviated flag": (["--synthetic_data=8", "--fixed=1"], ["unknown flag --fixed"]),
    "no such folder": (["--feature_path=nowhere"], ["--feature_path nowhere", "not a folder"]),
    "no such shards": (["--train_shards_path_or_url=nowhere.tar"], ["nowhere.tar"]),
    "no such vae": (["--synthetic_data=8", "--vae=nowhere/vae"], ["nowhere/vae"]),
    "no such checkpoint": (["--synthetic_data=8", "--resume=nowhere"], ["nowhere"]),
    "no such file": (["--synthetic_data=8", "--resume=nowhere.pt"], ["nowhere.pt"]),
    "tracker": (["--synthetic_data=8", "--log_with=paper"], ["--report_to paper"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_contradicting_flags_are_refused_in_one_sentence(case, refused):
    flags, words = BAD_FLAGS[case]
    message = refused(*flags)
    assert all(word in message for word in words), message


def test_without_data_the_sources_are_explained_on_one_line_with_exit_code_2(run_script, tmp_path):
    code, err = run_script(f"--output_dir={tmp_path / 'out'}", bare=True, script=FPDM)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: give one source of data")
    assert all(word in lines[0] for word in ("--feature_path", "_features", "latents.npy", "--train_shards_path_or_url",
                                             "--train_data_dir", "--vae", "--synthetic_data"))  # fmt: skip
    assert not (tmp_path / "out").exists()


BAD_FEATURES = {
    "label missing": (latents(), classes(3), ["1 files", "no label", "3"]),
    "feature missing": (latents(3), np.vstack([classes(3), [[0]]]), ["no feature"]),
    "no labels at all": (latents(), None, ["_labels", "--unsupervised"]),
    "channels": (latents(channels=3), classes(), ["(1, 3, 8, 8)", "(4, 8, 8)", "--in_channels"]),
    "side": (latents(side=16), classes(), ["(1, 4, 16, 16)", "(4, 8, 8)", "--image_size"]),
    "class out of range": (latents(), classes(first=7), ["class 7", "--num_classes 4"]),
    "negative class": (latents(), classes(first=-1), ["class -1", "--num_classes 4"]),
    "whole numbers": (latents().astype(np.int64), classes(), ["int64", "floating-point"]),
    "no file": (latents(0), classes(0), ["holds no .npy file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_features_that_do_not_fit_are_refused_in_one_sentence(case, refused, tmp_path):
    features, labels, words = BAD_FEATURES[case]
    names = [str(number) for number in range(4)]
    message = refused(f"--feature_path={write_features(tmp_path / 'data', features, labels, names)}")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("labels", "words"), [
    (np.arange(3), ["labels.npy", "(3,)", "4 latents"]), (np.array([0, 1, 2, 9]), ["class 9", "--num_classes 4"]),
    (np.zeros(4, np.float32), ["labels.npy", "whole numbers"]), (None, ["no labels.npy", "--unsupervised"]),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused_in_one_sentence(labels, words, refused, tmp_path):
    np.save(tmp_path / "latents.npy", latents()[:, 0])
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    message = refused(f"--feature_path={tmp_path}")
    assert all(word in message for word in words), message


def test_a_vae_of_other_channels_or_another_scale_than_the_data_is_refused(refused, tmp_path):
    from diffusers import AutoencoderKL

    vae = tiny.make_vae("tiny")
    AutoencoderKL(**{**vae.config, "latent_channels": 8}).save_pretrained(tmp_path / "eight")
    message = refused("--synthetic_data=8", f"--vae={tmp_path / 'eight'}")
    assert "8 channels" in message and "--vae" in message and "the network 4" in message
    vae.save_pretrained(tmp_path / "vae")
    np.save(tmp_path / "latents.npy", latents()[:, 0])
    np.save(tmp_path / "labels.npy", np.arange(4))
    (tmp_path / "manifest.json").write_text('{"count": 4, "scaling_factor": 0.18215}')
    message = refused(f"--feature_path={tmp_path}", f"--vae={tmp_path / 'vae'}")
    assert "0.18215" in message and "0.5" in message and "--vae" in message


@pytest.mark.parametrize("data", ["--synthetic_data=8", "--train_data_dir="])
def test_a_vae_of_another_factor_is_refused(data, refused, tmp_path):
    for number in range(4):
        (tmp_path / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        tiny.random_image(np.random.default_rng(number), 40, 48).save(tmp_path / f"images/{number % 2}/{number}.png")
    data += str(tmp_path / "images") * data.endswith("=")
    message = refused(data, f"--vae={ROOT / 'assets/tiny-teacher'}", "--image_size=32", "--num_classes=2")
    assert all(word in message for word in ("side 4", "16 pixels", "--image_size is 32", "--sample_size")), message


def test_shards_without_an_end_need_a_number_of_steps(refused, tmp_path):
    import io

    from test_slam_data_faults import write_tar

    members = []
    for number in range(4):
        stream = io.BytesIO()
        np.save(stream, latents(1)[0, 0])
        members += [(f"{number}.latent.npy", stream.getvalue()), (f"{number}.cls", b"1")]
    path = write_tar(tmp_path / "x.tar", members)
    import train_fpdm

    args = [f"--train_shards_path_or_url={path}", "--hidden_size=32", "--num_heads=4", "--depth=4", "--image_size=64",
            "--num_classes=4", f"--output_dir={tmp_path / 'out'}", "--report_to=none", "--num_workers=0"]  # fmt: skip
    with pytest.raises(options.UserError, match="--max_train_steps"):
        train_fpdm.main(args)
    assert not (tmp_path / "out").exists()


def test_a_pt_file_that_would_run_code_is_refused(refused, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"model": {}, "args": Harm()}, tmp_path / "bad.pt")
    assert "cannot be read as a checkpoint" in refused("--synthetic_data=8", f"--resume={tmp_path / 'bad.pt'}")
    assert not (tmp_path / "ran").exists()


def test_a_batch_that_is_not_finite_is_skipped_and_counted(run_fpdm, monkeypatch):
    sample, calls = sd_inputs.sample_latents, []

    def broken_once(*args):
        calls.append(sample(*args))
        return calls[-1] * float("nan") if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(sd_inputs, "sample_latents", broken_once)
    done = run_fpdm("--max_train_steps=3", "--learning_rate=1e-2", "--fixed_point")
    assert [row["skipped_steps"] for row in done.rows] == [0, 1, 1]
    assert done.rows[1]["loss"] is None and done.rows[2]["loss"] is not None
    network = fpdm.load_transformer(done.output)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_with_exit_code_1(run_fpdm, monkeypatch, tmp_path):
    sample, calls = sd_inputs.sample_latents, []

    def broken_from_third(*args):
        calls.append(sample(*args))
        return calls[-1] * float("inf") if len(calls) > 2 else calls[-1]

    monkeypatch.setattr(sd_inputs, "sample_latents", broken_from_third)
    with pytest.raises(options.UserError) as stopped:
        run_fpdm("--max_train_steps=50", "--checkpointing_steps=2", output=tmp_path / "out")
    message = str(stopped.value)
    assert stopped.value.exit_code == 1 and message.startswith("10 steps in a row were not finite (latents 10x")
    assert "--learning_rate" in message and "--vae_dtype" not in message, "this script has no such flag"
    assert len(calls) == 12 and not (tmp_path / "out/transformer").exists()
    weights = fpdm.load_transformer(tmp_path / "out/checkpoint-10")
    assert all(parameter.isfinite().all() for parameter in weights.parameters()), "what was saved is usable"


def test_data_without_a_usable_sample_stop_the_run(run_fpdm, tmp_path):
    features = latents(40)
    write_features(tmp_path / "data", features, classes(40) % 4)
    for path in (tmp_path / "data/imagenet256_features").iterdir():
        path.write_bytes(b"no array")
    with pytest.raises(options.UserError, match="cannot be used for training: unreadable array"):
        run_fpdm(f"--feature_path={tmp_path / 'data'}", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_single_broken_samples_are_skipped_and_counted(run_fpdm, tmp_path):
    features = latents(40)
    features[20:23] = np.nan
    write_features(tmp_path / "data", features, classes(40) % 4)
    done = run_fpdm(f"--feature_path={tmp_path / 'data'}", "--max_train_steps=12")
    assert done.rows[-1]["skipped_samples"] >= 3 and all(row["loss"] is not None for row in done.rows)
    assert "not finite" in done.log
