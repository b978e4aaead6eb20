"""sample_fpdm.py on tiny networks: the published commands, files, restart, processes, bad inputs."""

import argparse
import datetime
import json
import shlex
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from ranks import run_ranks
from tiny_dit import make_network

import sample_fpdm
from brisk import dit, fpdm, fpdm_options, fpdm_sampling, options, seeding, tiny

FIVE = "--fixed_point True --fixed_point_pre_depth 1 --fixed_point_post_depth 1 --cfg_scale 4.0 --num_sampling_steps 20"
SIX = "--fixed_point_iters 12 --num_sampling_steps 40 --fixed_point_reuse_solution True"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs: pipeline (with autoencoder and names), plain (DiT), unlabelled, vectors, zero (terminal SNR), flow."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    names = {label: f"Name {label}'s, other {label}" for label in range(10)}
    fpdm.save_pipeline(folder / "pipeline", make_network(), tiny.make_vae("tiny"), names)
    kinds = {
        "plain": {"fixed_point": False}, "unlabelled": {"label_type": "none", "num_classes": 1},
        "vectors": {"label_type": "vector", "label_dim": 3},
        "zero": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        "flow": {"prediction_type": "flow", "out_channels": 4},
    }  # fmt: skip
    for name, changes in kinds.items():
        make_network(**changes).save_pretrained(folder / name / "transformer")
    make_network(seed=1).save_pretrained(folder / "zero" / "transformer_ema")
    shutil.copy(folder / "zero/transformer/config.json", folder / "zero/transformer_ema/config.json")
    return folder


@pytest.fixture
def sample(runs, tmp_path, monkeypatch, capsys):
    """Run the script in this process: sample(run, flags) -> (folder of the images, what was printed); 3 images, no launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(name, flags=""):
        AcceleratorState._reset_state(True)
        given = shlex.split(flags)
        defaults = [] if "--sample_index_end" in flags else ["--sample_index_end=3"]
        defaults += [] if "--num" in flags else ["--num_sampling_steps=2"]
        kind = [] if name == "pipeline" or "--vae" in flags else ["--output_type=latent"]
        try:
            sample_fpdm.main([f"--ckpt={runs / name}", *defaults, *kind, *given])
        finally:
            AcceleratorState._reset_state(True)
        printed = capsys.readouterr().out
        folder = next(line.removeprefix("output: ") for line in printed.splitlines() if line.startswith("output: "))
        return tmp_path / folder, printed

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def latents(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob("0*.npy"))}


def test_the_published_command_of_20_steps(sample, tmp_path):
    folder, _ = sample("pipeline", f"{FIVE} --sample_index_end 2")
    assert folder == tmp_path / "samples/pipeline" / (
        "num_sampling_steps-20--cfg_scale-4.0--fixed_point_iters-4--fixed_point_reuse_solution-False--fixed_point_pptc-False")
    assert [name for name in names(folder) if name.endswith(".png")] == [
        f"{index:05d}--{label:03d}--name-{label}s.png" for index, label in enumerate(drawn_labels(2))
    ]


def drawn_labels(count, seed=0):
    return [int(torch.randint(10, (), generator=seeding.generator(seed, "label", index))) for index in range(count)]


def test_the_published_command_of_reuse_and_its_files(sample, runs):
    spelt = f"{FIVE} {SIX}".replace("--fixed_point", "--deq")
    folder, printed = sample("pipeline", f"{spelt} --save_npz --log_convergence --batch_size 2")
    assert folder.name.startswith("num_sampling_steps-40--cfg_scale-4.0--fixed_point_iters-12--fixed_point_reuse_solution-True")
    assert "40 network calls, 560 blocks in each of 2 rows (guidance)" in printed
    macs = 2 * 40 * dit.fixed_point_macs(16, 4, 1, 1, 12)
    assert f"{macs / 1e9:,.4g} GMACs" in printed
    assert str([12] * 40) in printed

    network = fpdm.load_transformer(runs / "pipeline")
    plan = fpdm_sampling.make_plan(network, 40, guidance_scale=4.0, iterations=12, reuse=True)
    generators = [seeding.generator(0, "noise", index) for index in range(3)]
    expected = fpdm_sampling.sample_latents(network, torch.tensor(drawn_labels(3)), generators, plan).latents
    vae, _ = sample_fpdm.load_vae(sample_fpdm.parse_args([f"--ckpt={runs / 'pipeline'}"])[0], network.config)
    decoded = sample_fpdm.decode(vae, expected)
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])
    assert pictures.shape == (3, 16, 16, 3) and pictures.dtype == np.uint8
    assert abs(pictures.astype(int) - decoded).max() <= 1 and pictures.std() > 5
    with np.load(folder / "samples.npz") as stored:
        assert (stored["arr_0"] == pictures).all()

    report = json.loads((folder / "convergence.json").read_text())
    assert report["samples"] == 3 and [row["timestep"] for row in report["timesteps"]] == plan.timesteps[::-1]
    assert {row["iterations"] for row in report["timesteps"]} == {12}
    assert report["timesteps"][-1]["residual"] < report["timesteps"][0]["residual"]
    assert Image.open(folder / "convergence.png").size[0] > 400
    stored = json.loads((folder / "args.json").read_text())
    assert stored["fixed_point_iters"] == 12 and stored["settings"]["iterations"] == [12] * 40


def test_a_stopped_run_goes_on(sample, calls_of):
    calls = calls_of(fpdm_sampling, "sample_latents")
    folder, _ = sample("plain", "--sample_index_end 5 --batch_size 2")
    before = latents(folder)
    assert len(before) == 5 and len(calls) == 3
    (folder / sorted(before)[2]).unlink()
    (folder / ".00002.tmp.npy").write_bytes(b"half")
    _, printed = sample("plain", "--sample_index_end 5 --batch_size 2")
    assert len(calls) == 4 and "1 batches to draw" in printed
    after = latents(folder)
    assert all((after[name] == before[name]).all() for name in before)
    sample("plain", "--sample_index_start 3 --sample_index_end 7 --batch_size 4")  # another part, another batch size
    longer = latents(folder)
    assert len(longer) == 7 and all(np.allclose(longer[name], before[name], atol=1e-2, rtol=1e-4) for name in before)
    with pytest.raises(options.UserError, match="holds samples whose global seed is 0, not 1: remove it"):
        sample("plain", "--sample_index_end 5 --global_seed 1")


def test_two_processes_draw_what_one_draws(sample, runs, warm, tmp_path):
    flags = ["--num_sampling_steps=3", "--fixed_point_iters=4", "--fixed_point_reuse_solution", "--sample_index_end=5",
             "--batch_size=2", "--save_npz", "--log_convergence"]  # fmt: skip
    one, _ = sample("pipeline", shlex.join(flags))
    flags = [f"--ckpt={runs / 'pipeline'}", "--output_dir=two", *flags]
    codes, errors = run_ranks(warm, tmp_path, ROOT / "sample_fpdm.py", flags)
    assert codes == [0, 0], errors
    assert ["sampling: 100%" in error for error in errors] == [True, False]  # one process speaks
    two = tmp_path / "two" / "pipeline" / one.name
    assert names(one) == names(two)
    with np.load(one / "samples.npz") as first, np.load(two / "samples.npz") as second:
        assert abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    reports = [json.loads((folder / "convergence.json").read_text()) for folder in (one, two)]
    assert reports[0]["samples"] == reports[1]["samples"] == 5
    for first, second in zip(reports[0]["timesteps"], reports[1]["timesteps"], strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_dry_run_prints_the_plan_and_writes_nothing(sample, tmp_path):
    _, printed = sample("pipeline", "--dry_run --fixed_point_iters 5 --adaptive True --adaptive_type increasing "
                        "--num_sampling_steps 10 --cfg_scale 1")  # fmt: skip
    counts = fpdm_sampling.plan_iterations(10, 5, "increasing")[::-1]
    assert f"iterations as sampled: {counts}, 50 in total" in printed and counts[0] > counts[-1]
    assert "10 network calls, 70 blocks, " in printed and "timesteps as sampled: [999," in printed
    assert list(tmp_path.iterdir()) == []
    _, printed = sample("pipeline", "--dry_run --iter_schedule increasing --fixed_point_iters 5 --num_sampling_steps 10")
    assert f"{counts}, 50 in total" in printed
    _, printed = sample("pipeline", "--dry_run --fixed_point_iters 3 --fixed_point_reuse_solution")
    assert "[8, 3], 11 in total" in printed
    folder, printed = sample("pipeline", "--dry_run --fixed_point_reuse_solution")
    assert "[8, 4], 12 in total" in printed and "--fixed_point_iters-4--" in folder.name
    _, printed = sample("pipeline", "--dry_run --fixed_point_iters 3 --deq_reuse_solution --deq_first_iters 0 --fp_tol 0.1")
    assert "[3, 3], 6 in total, or fewer by tolerance" in printed
    _, printed = sample("pipeline", "--dry_run --fixed_point_iters 3 --adaptive --num_sampling_steps 250")
    assert "63 times 4, 124 times 3, 63 times 2, 750 in total" in printed
    assert "[999, 995, 991, 987, 983, ... 16, 12, 8, 4, 0], 250 of them" in printed


@pytest.mark.parametrize("name, flags, label, folder", [
    ("plain", "--ddim --eta 0.5 --fixed_point False", None, "num_sampling_steps-2--cfg_scale-4.0--ddim"),
    ("unlabelled", "", "000--unlabeled", "num_sampling_steps-2--cfg_scale-1.0--fixed"),
    ("zero", "--predict_v True --use_zero_terminal_snr True --num_sampling_steps 1", None, "num_sampling_steps-1--"),
    ("flow", "--flow True --class_labels 3,4", "003--3", "num_sampling_steps-2--"),
    ("pipeline", "--output_type latent --num_sampling_steps 10,5 --cfg_channels 3", None, "num_sampling_steps-10,5--"),
    ("pipeline", "--output_type latent --num-sampling-steps ddim5 --dtype bf16", None, "num_sampling_steps-ddim5--"),
    ("pipeline", "--output_type latent --solver anderson --fp_tol 0.05 --fp_per_sample --fp_min_iters 2 --fp_check_every 1",
     None, ""),
    ("pipeline", "--output_type latent --class_labels 2 --dataset_name handwriting", "002--two", ""),
], ids=["ddim", "unlabelled", "zero SNR", "flow", "sections", "bf16", "tolerance", "handwriting"])  # fmt: skip
def test_kinds_of_networks_and_samplers(sample, name, flags, label, folder):
    found, printed = sample(name, flags)
    assert found.name.startswith(folder)
    images = latents(found)
    assert len(images) == 3 and all(values.shape == (4, 4, 4) and np.isfinite(values).all() for values in images.values())
    assert label is None or all(label in file for file in list(images)[:1]), list(images)
    assert "warning" not in printed


def test_labels_that_are_vectors(sample, tmp_path):
    np.save(tmp_path / "features.npy", np.eye(3, dtype=np.float64)[:2])
    folder, _ = sample("vectors", "--dino_supervised True --class_labels features.npy")
    assert list(latents(folder)) == [f"0000{index}--00{index % 2}--unlabeled.npy" for index in range(3)]


def test_names_of_classes(sample, runs, tmp_path):
    folder, _ = sample("flow", "--class_labels 4 --output_dir numbers")
    assert list(latents(folder))[0] == "00000--004--4.npy"
    manifest = runs / "flow" / "run_manifest.json"
    manifest.write_text(json.dumps({"classes": [f"Kind {letter}" for letter in "ABCDEFGHIJ"]}))
    folder, _ = sample("flow", "--class_labels 4 --output_dir names")
    manifest.unlink()
    assert list(latents(folder))[0] == "00000--004--kind-e.npy"
    (tmp_path / "names.txt").write_text("".join(f"Class of {letter}/x\n" for letter in "ABCDEFGHIJ"))
    folder, _ = sample("pipeline", "--output_type latent --class_labels 1,0 --class_names names.txt")
    assert list(latents(folder)) == [
        "00000--001--class-of-b-x.npy", "00001--000--class-of-a-x.npy", "00002--001--class-of-b-x.npy"]  # fmt: skip
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(options.UserError, match="must hold 10 names"):
        sample("pipeline", "--class_names names.json")
    with pytest.raises(options.UserError, match="cannot be read"):
        sample("pipeline", "--class_names missing.json")


def test_raw_and_averaged_weights_are_told_apart(sample, runs):
    average = latents(sample("zero", "--output_dir one")[0])
    raw = latents(sample("zero", "--output_dir two --weights raw")[0])
    assert average.keys() == raw.keys() and all(abs(average[name] - raw[name]).max() > 1e-3 for name in raw)
    with pytest.raises(options.UserError, match="whose weights is"):
        sample("zero", "--output_dir one --weights raw")
    for name, mine in (("transformer", "transformer_ema"), ("transformer_raw", "transformer")):  # as a finished run has them
        shutil.copytree(runs / "zero" / mine, runs / "finished" / name)
    assert (latents(sample("finished", "--output_dir three")[0])["00000--006--6.npy"] == average["00000--006--6.npy"]).all()
    finished = latents(sample("finished", "--output_dir four --weights raw")[0])
    assert (finished["00000--006--6.npy"] == raw["00000--006--6.npy"]).all()


def test_checkpoints_of_a_run_are_named_after_it(sample, runs):
    network = make_network()
    folder = runs / "official" / "checkpoints"
    folder.mkdir(parents=True)
    flags = {name: value for name, value in fpdm_options.flags_of(network.config).items() if name != "model"}
    weights = {"model": network.state_dict(), "ema": make_network(seed=1).state_dict()}
    torch.save({**weights, "args": argparse.Namespace(**flags)}, folder / "latest.pt")
    network.save_pretrained(runs / "official" / "checkpoint-7" / "transformer")
    official, _ = sample("official/checkpoints/latest.pt", "--output_dir pt --weights raw")
    ours, _ = sample("official/checkpoint-7", "--output_dir folder")
    assert official.parent.name == ours.parent.name == "official"
    one, two = latents(official), latents(ours)
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_compile_compiles_the_iteration_or_the_blocks_of_a_plain_dit(sample, monkeypatch):
    seen = []

    def compiler(function, mode):
        def compiled(*inputs):
            seen.append((function.__name__, mode))
            return function(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    plain, _ = sample("pipeline", "--output_type latent --fixed_point_iters 3 --output_dir plain")
    for mode in ("default", "reduce-overhead"):
        seen.clear()
        folder, _ = sample("pipeline", f"--output_type latent --fixed_point_iters 3 --compile --compile_mode {mode} "
                           f"--output_dir {mode}")  # fmt: skip
        assert seen == [("iteration", mode)] * 6
        for name, values in latents(folder).items():
            assert (values == np.load(plain / name)).all()
    seen.clear()
    _, printed = sample("plain", "--compile")
    assert seen == [("forward", "default")] * 12 and "no effect" not in printed


def test_debug_draws_one_batch_apart(sample):
    folder, _ = sample("pipeline", "--debug --save_npz --sample_index_end 9 --batch_size 2")
    assert "debug" in folder.parts and len(list(folder.glob("0*.png"))) == 2
    assert np.load(folder / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_flags_without_effect_are_said(sample):
    _, printed = sample("plain", "--fixed_point_iters 3 --dry_run --eta 0.5 --save_npz")
    for flag in ("fixed_point_iters", "eta", "save_npz"):
        assert f"warning: --{flag} has no effect" in printed
    _, printed = sample("pipeline", "--dtype bf16 --fp_tol 1e-3 --dry_run")
    assert "out of reach in bf16" in printed


@pytest.mark.parametrize("name, flags, said", [
    ("missing", "", "holds no transformer folder"),
    ("pipeline", "--fixed_point_pre_depth 2", "--fixed_point_pre_depth is 2, the network in .* was trained with 1"),
    ("pipeline", "--num_classes 1000", "--num_classes is 1000, .* with 10"),
    ("plain", "--fixed_point True", "--fixed_point is True, .* with False"),
    ("pipeline", "--class_labels 3,10", "class 10 is out of range, the network knows 0 to 9"),
    ("pipeline", "--class_labels cat", "must be a list of classes"),
    ("vectors", "", "must be an .npy file"),
    ("pipeline", "--sample_index_start 5 --sample_index_end 5", "must be above --sample_index_start 5"),
    ("pipeline", "--cfg_scale 0.5", "must be at least 1"),
    ("unlabelled", "--cfg_scale 4.0", "knows no labels"),
    ("zero", "--num_sampling_steps ddim50", "leave out timestep 999"),
    ("pipeline", "--num_sampling_steps 2000", "1000 timesteps cannot be divided into 2000"),
    ("pipeline", "--num_sampling_steps many", "no positive number"),
    ("pipeline", "--iter_schedule decreasing --adaptive", "differ: give one"),
    ("pipeline", "--compile --compile_mode fast", "--compile_mode.*fast"),
    ("pipeline", "--vae nowhere", "nowhere.* cannot be loaded.*give the folder of a VAE as --vae"),
    ("pipeline", "--unknown 3", "unknown flag --unknown"),
])  # fmt: skip
def test_bad_inputs(sample, name, flags, said):
    with pytest.raises(options.UserError, match=said):
        sample(name, flags)


def test_an_autoencoder_of_other_channels(sample, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(options.UserError, match="has 3 channels, the network 4"):
        sample("plain", "--vae vae")


def test_bad_input_is_one_sentence_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        options.run(sample_fpdm.main, [f"--ckpt={tmp_path}"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: --ckpt {tmp_path} holds no transformer")
    AcceleratorState._reset_state(True)


def test_help_loads_no_heavy_library():
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample_fpdm.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--deq_pre_depth" in done.stdout and " torch\n" not in done.stderr


def test_a_tolerance_shared_by_the_batch_makes_it_a_setting(sample):
    flags = "--output_type latent --fp_tol 0.05 --fixed_point_iters 9"
    folder, _ = sample("pipeline", f"{flags} --batch_size 2")
    settings = json.loads((folder / "args.json").read_text())["settings"]
    assert (settings["batch_size"], settings["processes"]) == (2, 1)
    with pytest.raises(options.UserError, match="holds samples whose batch size is 2, not 3"):
        sample("pipeline", f"{flags} --batch_size 3")
    for alone in (f"{flags} --fp_per_sample", "--output_type latent"):
        for size in (2, 3):
            folder, _ = sample("pipeline", f"{alone} --batch_size {size} --output_dir alone{len(alone)}")
        assert "batch_size" not in json.loads((folder / "args.json").read_text())["settings"]


def test_processes_wait_for_each_other_and_tf32_is_a_choice(sample, monkeypatch):
    import accelerate

    given, original = [], accelerate.PartialState
    monkeypatch.setattr(accelerate, "PartialState", lambda **named: given.append(named) or original(**named))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for flags, allowed in (("", True), ("--allow_tf32 False", False)):
            sample("plain", f"{flags} --output_dir tf32-{allowed}")
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    assert given[0]["timeout"] >= datetime.timedelta(days=1)


def test_files_are_written_while_the_next_batch_is_drawn_and_errors_surface(sample, monkeypatch):
    drawn, save, draw = threading.Event(), sample_fpdm.save, fpdm_sampling.sample_latents
    calls, waited = [], []

    def note(*args):
        calls.append(args)
        if len(calls) == 2:
            drawn.set()
        return draw(*args)

    def wait_and_save(path, values):
        waited.append(drawn.wait(20))
        save(path, values)

    monkeypatch.setattr(fpdm_sampling, "sample_latents", note)
    monkeypatch.setattr(sample_fpdm, "save", wait_and_save)
    folder, _ = sample("plain", "--batch_size 2")
    assert waited == [True] * 3 and len(latents(folder)) == 3

    def fail(path, values):
        raise OSError("the disk is full")

    monkeypatch.setattr(sample_fpdm, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        sample("plain", "--output_dir full")
