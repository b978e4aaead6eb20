"""The FPDM script on tiny networks: the published command lines, what each objective's loss is, what is logged and written."""

import json
import math
import shlex
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, environment, read_rows
from inprocess import FPDM, OWN, assert_equal, weights
from safetensors.torch import load_file

import train_fpdm
from brisk import dit, fpdm, gaussian, sd_inputs

LAUNCH = "accelerate launch --config_file aconfs/1_node_1_gpu_ddp.yaml --num_processes 8 train_fpdm.py"
LAYER = "--fixed_point True --deq_pre_depth {0} --deq_post_depth {0}"
V = "--output_subdir v_pred_exp --predict_v True --use_zero_terminal_snr True"
PUBLISHED = [LAUNCH, f"{LAUNCH} {LAYER.format(1)}", f"{LAUNCH} {LAYER.format(1)} {V}", f"{LAUNCH} {LAYER.format(4)} {V}"]
FP = ("--fixed_point", "--deq_no_grad_max_iters=2", "--deq_with_grad_max_iters=3")
FILE = "diffusion_pytorch_model.safetensors"
LOGGED = {"step", "images", "loss", "mse", "vb", "lr", "grad_norm", "steps_per_sec", "images_per_second", "peak_memory_gib",
          "data_wait_share", "skipped_steps"}  # fmt: skip
OF_LAYER = {"fp/n_no_grad", "fp/m_with_grad", "fp/residual"}


def load(folder):
    """The network of a run as a user loads it, every weight of which was in the file."""
    network, report = fpdm.FPDMTransformer2DModel.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return network


@pytest.fixture
def noted(monkeypatch):
    """One dict per forward pass of the run: clean latents, input, timesteps, labels, (n, m), output."""
    calls, clean = [], []
    forward, sample = fpdm.FPDMTransformer2DModel.forward, sd_inputs.sample_latents

    def noting_forward(self, x, timestep=None, class_labels=None, num_iters=None, **named):
        output = forward(self, x, timestep, class_labels, num_iters, **named)
        calls.append({"x0": clean[-1], "x": x, "t": timestep, "labels": class_labels, "iters": num_iters,
                      "output": output.sample.detach().clone()})  # fmt: skip
        return output

    monkeypatch.setattr(fpdm.FPDMTransformer2DModel, "forward", noting_forward)
    monkeypatch.setattr(sd_inputs, "sample_latents", lambda *args: clean.append(sample(*args)) or clean[-1])
    return calls


@pytest.mark.parametrize(("line", "depth", "folder"), [
    (PUBLISHED[0], None, "runs/000-DiT-XL-2--diff--0.000100--dit"),
    (PUBLISHED[1], 1, "runs/000-DiT-XL-2--diff--0.000100--fixed_point-pre_depth-1-post_depth-1-no_grad_iters-00-10"
                      "-with_grad_iters-01-12-pre_post_time_cond_False"),
    (PUBLISHED[2], 1, "v_pred_exp/000-DiT-XL-2--diff--0.000100--v--zero_snr--fixed_point-pre_depth-1-post_depth-1"
                      "-no_grad_iters-00-10-with_grad_iters-01-12-pre_post_time_cond_False"),
    (PUBLISHED[3], 4, "v_pred_exp/000-DiT-XL-2--diff--0.000100--v--zero_snr--fixed_point-pre_depth-4-post_depth-4"
                      "-no_grad_iters-00-10-with_grad_iters-01-12-pre_post_time_cond_False"),
], ids=["dit", "fpdm 1/1", "fpdm 1/1 v", "fpdm 4/4 v"])  # fmt: skip
def test_published_command_lines_train_as_printed(line, depth, folder, run_fpdm):
    flags = shlex.split(line.split("train_fpdm.py")[1])
    done = run_fpdm("--name=", "--output_subdir=runs", *flags)
    output = done.output / folder
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert [row["step"] for row in read_rows(output)] == [1, 2]
    config = load(output).config
    assert config.fixed_point == (depth is not None)
    if depth:
        assert (config.pre_depth, config.post_depth) == (depth, depth)
        assert (list(config.no_grad_iters), list(config.with_grad_iters)) == ([0, 10], [1, 12])
        assert not config.pre_post_timestep_conditioning
    is_v = "--predict_v" in flags
    assert config.prediction_type == ("v_prediction" if is_v else "epsilon") and config.zero_terminal_snr == is_v
    assert (output / "checkpoint-2/transformer_ema").is_dir()
    resolved = yaml.safe_load((output / "train_config.yaml").read_text())
    assert resolved["learning_rate"] == 1e-4 and resolved["adam_weight_decay"] == 0 and resolved["ema_decay"] == 0.9999


def test_published_launch_runs_one_process_where_there_is_no_gpu(warm, tmp_path):
    words = shlex.split(PUBLISHED[1].replace("--num_processes 8", "--num_processes 1"))
    command = [warm.python, "-m", "accelerate.commands.launch", *words[2:], *OWN[FPDM], "--synthetic_data=16",
               "--max_train_steps=1", "--report_to=none", f"--output_dir={tmp_path}", "--log_every=1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = read_rows(tmp_path)
    assert row["step"] == 1 and math.isfinite(row["loss"])
    manifest = json.loads((tmp_path / "run_manifest.json").read_text())
    assert manifest["processes"] == 1 and manifest["config"]["fixed_point"]


def test_the_published_accelerate_config_is_one_of_ours():
    path = ROOT / "aconfs/1_node_1_gpu_ddp.yaml"
    assert path.read_text() == (ROOT / "configs/accelerate/1_node_1_gpu_ddp.yaml").read_text()
    values = yaml.safe_load(path.read_text())
    expected = {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16", "num_processes": 1, "main_process_port": 17337}
    assert {name: values[name] for name in expected} == expected


ZERO = ("--predict_v", "--use_zero_terminal_snr")
OBJECTIVES = {
    "dit": (), "fpdm": FP, "dit p2": ("--loss_weighting=p2",), "fpdm min-snr": (*FP, "--loss_weighting=min_snr"),
    "v": (*FP, "--predict_v"), "v zero snr": (*FP, *ZERO), "v zero snr p2": (*ZERO, "--loss_weighting=p2"),
    "v zero snr min-snr": (*FP, *ZERO, "--loss_weighting=min_snr"), "fixed variance": (*FP, "--learn_sigma=False"),
    "flow": (*FP, "--flow"), "unsupervised": (*FP, "--unsupervised"), "vectors": (*FP, "--dino_supervised",
    "--dino_supervised_dim=6"), "time everywhere": (*FP, "--deq_pre_post_timestep_conditioning"),
}  # fmt: skip


def expected_terms(call, flags):
    """(mse, vb) of a step, re-derived in float64 from what the network was given and gave."""
    betas = gaussian.linear_betas()
    betas = gaussian.zero_terminal_snr(betas) if "--use_zero_terminal_snr" in flags else betas
    signal = (1 - betas).cumprod(0)[call["t"]]
    x0, x, output = (call[name].double() for name in ("x0", "x", "output"))
    a, s = (value[:, None, None, None] for value in (signal.sqrt(), (1 - signal).sqrt()))
    noise, weight, kind = (x - a * x0) / s, torch.ones_like(signal), "epsilon"
    target = noise
    if "--flow" in flags:
        tau = call["t"][:, None, None, None] / 1000
        known = call["t"] > 0
        target = torch.where(known[:, None, None, None], x0 - (x - (1 - tau) * x0) / tau, output)
    elif "--predict_v" in flags:
        target, kind = a * noise - s * x0, "v_prediction"
    snr = signal / (1 - signal)
    if "--loss_weighting=p2" in flags:
        weight = (signal if kind == "v_prediction" else 1) * (1 - signal).sqrt()
    if "--loss_weighting=min_snr" in flags:
        weight = snr.clamp(max=5) / (snr + (kind == "v_prediction"))
    mse = (weight * (target - output[:, :4]).square().flatten(1).mean(1)).mean().item()
    if output.shape[1] == 4:
        return mse, 0.0
    return mse, gaussian.variational_bound(gaussian.make_tables(betas), x0, x, call["t"], output, kind).mean().item()


@pytest.mark.parametrize("setting", OBJECTIVES)
def test_the_logged_loss_is_the_weighted_error_plus_the_bound(setting, run_fpdm, noted):
    flags = OBJECTIVES[setting]
    done = run_fpdm(*flags, "--learning_rate=3e-2", "--global_batch_size=8")
    assert len(noted) == len(done.rows) == 2
    assert not noted[0]["output"].any() and noted[1]["output"].abs().max() > 1e-3, "the second step must say something"
    for call, row in zip(noted, done.rows, strict=True):
        mse, bound = expected_terms(call, flags)
        assert row["mse"] == pytest.approx(mse, rel=1e-4) and row["vb"] == pytest.approx(bound, rel=1e-3, abs=1e-7)
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"], rel=1e-6)
        assert set(row) == LOGGED | (OF_LAYER if "--fixed_point" in flags else set())
        assert call["t"].dtype == torch.long and 0 <= call["t"].min() <= call["t"].max() < 1000 and len(set(call["t"].tolist())) > 3
    has_bound = not {"--flow", "--learn_sigma=False"} & set(flags)
    assert all((row["vb"] > 0) == has_bound for row in done.rows)
    network = load(done.output)
    assert network.config.out_channels == (8 if has_bound else 4)
    assert network(noted[0]["x"], 500, noted[0]["labels"]).sample.isfinite().all()


def test_numbers_of_iterations_are_drawn_anew_in_their_ranges_and_logged(run_fpdm, noted):
    flags = ("--fixed_point", "--deq_no_grad_min_iters=1", "--deq_no_grad_max_iters=3", "--deq_with_grad_min_iters=2",
             "--deq_with_grad_max_iters=5", "--max_train_steps=12")  # fmt: skip
    done = run_fpdm(*flags)
    drawn = [call["iters"] for call in noted]
    args = train_fpdm.parse_args(list(flags))[0]
    assert drawn == [train_fpdm.draw_iterations(args, 7, step) for step in range(12)]
    assert all(1 <= n <= 3 and 2 <= m <= 5 for n, m in drawn) and len(set(drawn)) > 4
    assert [(row["fp/n_no_grad"], row["fp/m_with_grad"]) for row in done.rows] == drawn
    assert all(0 < row["fp/residual"] < 10 for row in done.rows)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_labels_are_dropped_to_the_null_class_at_the_given_rate(share, run_fpdm, noted):
    run_fpdm(f"--class_dropout_prob={share}", "--global_batch_size=64", "--max_train_steps=4")
    labels = torch.cat([call["labels"] for call in noted])
    assert set(labels.tolist()) <= {0, 1, 2, 3, 4} and (labels < 4).any() == (share < 1)
    assert (labels == 4).float().mean().item() == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


def test_without_classes_every_label_is_zero_and_none_is_dropped(run_fpdm, noted):
    done = run_fpdm("--unsupervised", "--class_dropout_prob=0.9", "--global_batch_size=32")
    assert not torch.cat([call["labels"] for call in noted]).any()
    assert load(done.output).y_embedder.embedding_table.weight.shape == (2, 32)
    assert "--class_dropout_prob has no effect" in done.log


def test_feature_vectors_are_dropped_to_zero(run_fpdm, noted):
    run_fpdm("--dino_supervised", "--dino_supervised_dim=6", "--class_dropout_prob=0.5", "--global_batch_size=64")
    labels = torch.cat([call["labels"] for call in noted])
    assert labels.shape == (128, 6) and labels.dtype == torch.float32
    assert 0.35 < (labels == 0).all(1).float().mean() < 0.65 and ((labels == 0).all(1) | (labels != 0).all(1)).all()


def test_trackers_get_the_published_names(run_fpdm):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run_fpdm(*FP, "--debug", "--name=mine", "--log_every=2", "--max_train_steps=4", "--tracker_project_name=p")
    output = done.output / "debug/mine"
    events = EventAccumulator(str(output / "logs/p"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert names == {f"train/{name}" for name in LOGGED} | OF_LAYER
    rows = read_rows(output)
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("train/loss", "train/mse", "train/vb", "fp/residual"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == {row["step"]: pytest.approx(row[name.removeprefix("train/")], rel=1e-6) for row in rows}, name


def test_the_average_moves_by_a_constant_rate_from_the_first_step_on(run_fpdm):
    flags = (*FP, "--ema_decay=0.75", "--checkpointing_steps=1", "--max_train_steps=3")
    average = weights(run_fpdm(*flags, "--learning_rate=0").output)
    average = {name.split(":")[1]: value for name, value in average.items() if name.startswith("transformer/")}
    done = run_fpdm(*flags, "--learning_rate=1e-2")
    for step in (1, 2, 3):
        raw, kept = (load_file(done.output / f"checkpoint-{step}" / name / FILE) for name in ("transformer", "transformer_ema"))
        for name in raw:
            average[name] = 0.75 * average[name] + 0.25 * raw[name]
            torch.testing.assert_close(kept[name], average[name], rtol=1e-5, atol=1e-7)
    assert max((raw[name] - kept[name]).abs().max() for name in raw) > 1e-3
    final = weights(done.output)
    assert all(torch.equal(final[f"transformer/{FILE}:{name}"], kept[name]) for name in raw), "the average is exported"
    assert all(torch.equal(final[f"transformer_raw/{FILE}:{name}"], raw[name]) for name in raw)


@pytest.mark.parametrize("flags", [(), FP], ids=["dit", "fpdm"])
def test_every_weight_of_the_network_is_trained(flags, run_fpdm):
    start = weights(run_fpdm(*flags, "--learning_rate=0", "--max_train_steps=1").output)
    moved = weights(run_fpdm(*flags, "--learning_rate=1e-2", "--max_train_steps=3", "--global_batch_size=16").output)
    unmoved = [name for name in start if name.startswith("transformer_raw") and torch.equal(start[name], moved[name])]
    assert unmoved == [] and len(start) > 40


@pytest.fixture(scope="module")
def class_pictures(tmp_path_factory):
    """A folder of six pictures in two classes."""
    from brisk import tiny

    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number in range(6):
        (folder / f"class {number % 2}").mkdir(exist_ok=True)
        tiny.random_image(rng, 40, 48).save(folder / f"class {number % 2}/{number}.png")
    return folder


def test_pictures_are_encoded_by_the_vae_which_stays_as_it_is_and_is_exported(run_fpdm, models, class_pictures, noted):
    vae = models["sd1"] / "vae"
    before = load_file(vae / FILE)
    done = run_fpdm(*FP, f"--train_data_dir={class_pictures}", f"--vae={vae}", "--image_size=32", "--sample_size=8",
                    "--num_classes=2", "--random_flip", "--class_dropout_prob=0")  # fmt: skip
    assert_equal(load_file(done.output / "vae" / FILE), before)
    assert set(torch.cat([call["labels"] for call in noted]).tolist()) == {0, 1}
    assert all(call["x0"].shape == (4, 4, 8, 8) and call["x0"].dtype == torch.float32 for call in noted)
    index = json.loads((done.output / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["transformer"] == ["brisk.fpdm", "FPDMTransformer2DModel"]
    assert index["id2label"] == {"0": "class 0", "1": "class 1"}


def test_stored_latents_come_as_they_are_and_moments_are_sampled_anew(run_fpdm, noted, tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 4, 8, 8)).astype(np.float32)
    for name, array in {"plain": latents, "moments": np.stack([latents, np.full_like(latents, 0.5)], 1)}.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "latents.npy", array.reshape(4, -1, 8, 8))
        np.save(tmp_path / name / "labels.npy", np.arange(4))
    run_fpdm(f"--feature_path={tmp_path}/plain", "--class_dropout_prob=0")
    for call in noted:
        assert torch.equal(call["x0"], torch.from_numpy(latents)[call["labels"]]), "scaled already, paired with their labels"
    noted.clear()
    run_fpdm(f"--feature_path={tmp_path}/moments", "--class_dropout_prob=0")
    drawn = [(call["x0"] / 0.18215 - torch.from_numpy(latents)[call["labels"]]) / 0.5 for call in noted]
    assert all(0.9 < draw.std() < 1.1 and abs(draw.mean()) < 0.1 for draw in drawn) and not torch.equal(*drawn)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(run_fpdm):
    done = run_fpdm(*FP, "--dry_run", "--max_train_steps=17")
    assert not done.output.exists()
    assert "77,184 parameters" in done.log and "max_train_steps 17" in done.log and "nothing was saved" in done.log
    network = dit.DiT(8, 2, 4, 8, 32, 4, 4, 4.0, 4, fixed_point=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == 77_184


def test_resolved_options_are_a_config_that_repeats_the_run(run_fpdm, tmp_path):
    first = run_fpdm(*FP, "--predict_v", "--learning_rate=1e-2")
    second = run_fpdm(f"--config={first.output}/train_config.yaml", output=tmp_path / "again")
    assert_equal(weights(second.output), weights(first.output))
    other = run_fpdm(f"--config={first.output}/train_config.yaml", "--seed=8", output=tmp_path / "other")
    assert any(not torch.equal(value, weights(first.output)[name]) for name, value in weights(other.output).items())


@pytest.mark.parametrize("flags", [FP, ()], ids=["fpdm", "dit"])
def test_recomputation_and_compilation_change_nothing(flags, run_fpdm, monkeypatch):
    flags = (*flags, "--learning_rate=1e-2", "--adam_epsilon=1e-3")
    plain = weights(run_fpdm(*flags).output)
    assert_equal(weights(run_fpdm(*flags, "--fp_grad_checkpointing").output), plain)
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **named: compiled.append(args) or compile_(*args, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    found = weights(run_fpdm(*flags, "--compile").output)
    assert len(compiled) == (1 if "--fixed_point" in flags else 4)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_accumulated_micro_steps_draw_their_own_iterations_and_sum_up_the_batch(run_fpdm, noted):
    done = run_fpdm(*FP, "--gradient_accumulation_steps=2", "--global_batch_size=8", "--max_train_steps=3")
    assert len(noted) == 6 and all(len(call["x"]) == 4 for call in noted) and len({call["iters"] for call in noted}) > 2
    assert [row["images"] for row in done.rows] == [8, 16, 24]
    for number, row in enumerate(done.rows):
        pair = noted[2 * number : 2 * number + 2]
        assert row["mse"] == pytest.approx(sum(expected_terms(call, FP)[0] for call in pair) / 2, rel=1e-4)
        assert row["fp/m_with_grad"] == sum(call["iters"][1] for call in pair) / 2


def test_bf16_keeps_the_loss_in_float32_and_the_noise_exact(run_fpdm, noted):
    full = run_fpdm(*FP, "--learning_rate=1e-2")
    half = run_fpdm(*FP, "--learning_rate=1e-2", "--mixed_precision=bf16")
    for one, two in zip(noted[:2], noted[2:], strict=True):
        assert two["x"].dtype == torch.float32 and torch.equal(one["x"], two["x"])
    assert half.rows[1]["loss"] == pytest.approx(full.rows[1]["loss"], rel=0.02)
    assert {value.dtype for value in weights(half.output).values()} == {torch.float32}


def test_official_file_is_written_beside_every_checkpoint_and_training_goes_on_from_it(run_fpdm, tmp_path):
    flags = (*FP, "--learning_rate=1e-2", "--ema_decay=0.5")
    first = run_fpdm(*flags, "--export_pt", "--checkpointing_steps=2", "--max_train_steps=4")
    files = sorted((first.output / "checkpoints").iterdir())
    assert [path.name for path in files] == ["0000002.pt", "0000004.pt"]
    again = run_fpdm(*flags, f"--resume={files[0]}", "--max_train_steps=3", output=tmp_path / "again")
    assert [row["step"] for row in again.rows] == [3] and "step 2 of 3" in again.log
    raw = load_file(first.output / "checkpoint-2/transformer" / FILE)
    moved = load_file(again.output / "transformer_raw" / FILE)
    largest = max((moved[name] - raw[name]).abs().max().item() for name in raw)
    assert 1e-3 < largest < 0.02, "one step of Adam away from the file's weights"


def test_learning_rate_goes_on_where_the_official_file_stopped(run_fpdm, tmp_path):
    flags = (*FP, "--lr_scheduler=cosine", "--max_train_steps=4", "--lr_warmup_steps=1", "--export_pt", "--checkpointing_steps=2")
    first = run_fpdm(*flags)
    again = run_fpdm(*flags, f"--resume={first.output / 'checkpoints/0000002.pt'}", output=tmp_path / "again")
    assert [row["lr"] for row in again.rows] == pytest.approx([row["lr"] for row in first.rows[2:]])
    assert len({row["lr"] for row in first.rows}) == 4
    assert "they begin anew" in again.log and "they begin anew" not in first.log


def test_upload_leaves_out_every_kind_of_checkpoint(run_fpdm, monkeypatch):
    import huggingface_hub

    uploads = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda **named: SimpleNamespace(repo_id="me/net"))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **named: uploads.append(named))
    done = run_fpdm(*FP, "--push_to_hub", "--export_pt", "--checkpointing_steps=1", "--checkpoints_total_limit=1")
    assert [path.name for path in (done.output / "checkpoints").iterdir()] == ["0000002.pt"]
    [upload] = uploads
    files = [str(path.relative_to(done.output)) for path in done.output.rglob("*") if path.is_file()]
    sent = set(huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert {"README.md", f"transformer/{FILE}", f"transformer_raw/{FILE}"} <= sent
    assert not [name for name in sent if name.startswith("checkpoint")] and "distilled" not in upload["commit_message"]
