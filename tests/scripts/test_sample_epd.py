"""sample_epd.py on mixtures of Gaussians and tiny networks: images, cost, restart, what contradicts a predictor, bad inputs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import sample_epd
from brisk import (
    edm_nets,
    epd,
    image_folder,
    mixture,
    options,
    predictor,
    predictor_files,
    sample_seeds,
    sigmas,
    solvers,
)

WORLDS = ROOT / "tests/assets/conformance/epd/denoiser.json"
PIXELS, CLASSES = f"--gmm_file {WORLDS}:gmmimg", f"--gmm_file {WORLDS}:gmm2d"
TEACHER = ROOT / "assets/tiny-teacher"
EDM = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1],
       "num_blocks": 1, "attn_resolutions": []}  # fmt: skip
ENDS = {"time_uniform": (0.002, 80.0), "discrete": (None, None), "flowmatch": (None, None)}


def make_predictor(path, backend="gmm", student="epd", num_steps=4, points=2, afs=True, kind="time_uniform", side=4, guidance=None,
                   rate=None, dataset=None, table=None, config=None, mu=None):  # fmt: skip
    """Write a predictor of spread points with unequal weights and scales; its `predictor.Predictor`."""
    generator = torch.Generator().manual_seed(points)
    noisy = epd.Tables(*(0.3 * torch.randn(num_steps - 1, points, generator=generator) for _ in range(4)))
    spread = epd.initial_raw(num_steps - 1, points)
    raw = predictor.Raw(*(a + b for a, b in zip(spread, noisy, strict=True)), 0.05, 0.1)
    levels = sigmas.schedule(kind, num_steps, *ENDS[kind], table=table, mu=mu)
    solver = predictor.Solver(student, num_steps, points, afs, 3 if student == "ipndm" else None, False)
    schedule = {"type": kind, "rho": 1.0, "sigma_min": levels[-1].item(), "sigma_max": levels[0].item(), "sigmas": levels.tolist()}
    schedule["flow"] = {"shift": None if mu else 3.0, "mu": mu} if kind == "flowmatch" else None
    model = {"dataset": dataset, "backend": backend, "backend_config": config, "img_resolution": side, "guidance_type": guidance,
             "guidance_rate": rate}  # fmt: skip
    made = predictor.make(path.stem, "distilled", solver, schedule, model, raw=raw)
    predictor_files.write(made, path)
    return made


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a tiny class-conditional EDM network."""
    folder = tmp_path_factory.mktemp("edm") / "network"
    folder.mkdir()
    torch.manual_seed(0)
    net = edm_nets.make_network(EDM)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(EDM))
    return folder


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Run the script in this process: sample(flags) -> (folder of the images, what was printed); three seeds, no launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(flags):
        AcceleratorState._reset_state(True)
        try:
            sample_epd.main([*shlex.split(flags), *([] if "--seeds" in flags else ["--seeds=0-2"])])
        finally:
            AcceleratorState._reset_state(True)
        printed = capsys.readouterr().out
        folder = next(line.removeprefix("output: ") for line in printed.splitlines() if line.startswith("output: "))
        return tmp_path / folder, printed

    return run


@pytest.fixture
def whole(monkeypatch):
    """Keep what pictures are made of: {file name: float array (H, W, 3)}."""
    kept, original = {}, image_folder.save
    monkeypatch.setattr(image_folder, "quantise", lambda images: images.permute(0, 2, 3, 1).numpy())

    def save(path, values):
        kept[path.name] = values.copy()
        original(path, np.zeros((1, 1, 3), np.uint8))

    monkeypatch.setattr(image_folder, "save", save)
    return kept


def pictures(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("[!.]*.png"))}


def record(folder):
    return json.loads((folder / "sampling.json").read_text())


def by_hand(content, seeds, world="gmmimg", guidance=None):
    """Images (B, 3, 4, 4) float64 of a predictor on a mixture, one network call per point."""
    values = json.loads(WORLDS.read_text())["world"][world]
    gmm = mixture.from_lists(values["means"], values["stds"], values["weights"], values.get("class_weights"))
    images = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(values["shape"], generator=generator)[None].double() * content.sigmas[0]
        label = torch.randint(len(values["class_weights"]), (), generator=generator)[None] if guidance else None

        def direction(state, sigma, label=label):
            level = torch.as_tensor(sigma, dtype=torch.float64).reshape(1)
            own = mixture.direction(gmm, state, level, label)
            return own if label is None else (1 - guidance) * mixture.direction(gmm, state, level) + guidance * own

        recent = []
        for n, (s, e) in enumerate(zip(content.sigmas[:-1], content.sigmas[1:], strict=True)):
            recent.insert(0, x / (1 + s**2).sqrt() if content.solver.afs and n == 0 else direction(x, s))
            weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12))[n if content.solver.student == "ipndm" else 0]
            d = sum(weight * old for weight, old in zip(weights, recent, strict=False))
            r, w, c, a = (table[n] for table in content.tables)
            tau = s ** (1 - r) * e**r
            x = x + (e - s) * sum(w[k] * c[k] * a[k] * direction(x + (tau[k] - s) * d, a[k] * tau[k]) for k in range(len(r)))
        images.append(x[0])
    return torch.stack(images)


def test_a_predictor_gives_the_images_of_its_equations_in_as_many_calls_as_it_says(sample, tmp_path, calls_of):
    content = make_predictor(tmp_path / "p.json", points=3)
    calls = calls_of(mixture, "direction")
    folder, printed = sample(f"--predictor p.json {PIXELS} --seeds 7,0-2 --return_inters")
    assert folder == tmp_path / "samples/gmm/epd_nfe5_npoints3"
    assert len(calls) == 5 and [len(args[1]) for args, _, _ in calls] == [12, 4, 12, 4, 12]
    expected = by_hand(content, (0, 1, 2, 7))
    found = pictures(folder)
    assert list(found) == [f"000000/{seed:06d}.png" for seed in (0, 1, 2, 7)]
    levels = (255 * ((expected + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1)
    assert abs(np.stack(list(found.values())) - levels.numpy()).max() < 0.51
    assert levels.std() > 20
    inters = pictures(folder.with_name("epd_nfe5_npoints3_inters"))
    assert list(inters)[:3] == [f"000000/000000_{n:02d}.png" for n in (1, 2, 3)] and len(inters) == 12
    assert (inters["000000/000007_03.png"] == found["000000/000007.png"]).all()
    assert (inters["000000/000007_01.png"] != found["000000/000007.png"]).any()
    stored = record(folder)
    assert stored["nfe"] == {"intervals": 3, "para_nfe": 5, "total_nfe": 11, "para_nfe_cfg": 5}
    assert stored["seconds_per_image"] > 0 and stored["model"]["family"] == "gmm" and stored["predictor"] == "p"
    assert "NFE: 5 network calls one after the other, 11 evaluations per image in all" in printed
    assert f"4 images in {folder.relative_to(tmp_path)}, 4 drawn now" in printed


def test_the_plug_in_places_its_points_along_earlier_directions(sample, tmp_path, whole):
    content = make_predictor(tmp_path / "p.json", student="ipndm")
    folder, _ = sample(f"--predictor p.json {PIXELS}")
    assert folder.name == "ipndm_nfe5_npoints2"
    found = np.stack([whole[f"{seed:06d}.png"] for seed in range(3)])
    np.testing.assert_allclose(found, by_hand(content, range(3)).permute(0, 2, 3, 1), atol=1e-4)


def test_guidance_comes_from_the_predictor_and_pairs_count_once_or_twice(sample, tmp_path, calls_of, whole):
    content = make_predictor(tmp_path / "p.json", guidance="cfg", rate=2.5, side=1, afs=False)
    calls = calls_of(mixture, "direction")
    folder, printed = sample(f"--predictor p.json {CLASSES}")
    assert len(calls) == 6 and [len(args[1]) for args, _, _ in calls] == [6, 12] * 3
    assert "NFE: 6 network calls one after the other (12 if a guided pair counts twice), 9 evaluations" in printed
    assert record(folder)["nfe"]["para_nfe_cfg"] == 12
    found = np.stack([whole[f"{seed:06d}.png"] for seed in range(3)])[..., 0].reshape(3, 2)
    np.testing.assert_allclose(found, by_hand(content, range(3), "gmm2d", 2.5).reshape(3, 2), atol=1e-4)


def test_labels_are_drawn_after_the_latents_or_given_by_seed(sample, network, calls_of):
    calls = calls_of(edm_nets.EDMPrecond, "direction")
    sample(f"--solver euler --num_steps 3 --backend edm --model_path {network} --seeds 3-5")
    drawn = calls[0][0][3].argmax(1).tolist()
    assert drawn == sample_seeds.draw_labels(after_latents((3, 4, 5)), 3).tolist() and len(set(drawn)) > 1
    assert len(calls) == 2 and len(calls[0][0][1]) == 3
    calls.clear()
    sample(f"--solver euler --num_steps 3 --backend edm --model_path {network} --seeds 3-5 --class_labels 2,0 --outdir given")
    assert calls[0][0][3].argmax(1).tolist() == [0, 2, 0]


def after_latents(seeds):
    sources = sample_seeds.generators(seeds)
    sample_seeds.draw_latents(sources, (3, 8, 8))
    return sources


@pytest.mark.parametrize("name", sample_epd.SOLVERS)
def test_every_baseline_by_the_same_path_with_the_calls_it_says(sample, calls_of, name, whole):
    calls = calls_of(mixture, "direction")
    folder, _ = sample(f"--solver {name} --num_steps 5 --afs {PIXELS}")
    nfe = record(folder)["nfe"]
    assert nfe["para_nfe"] == nfe["total_nfe"] == len(calls) == {"heun": 7, "dpm2": 7, "edm": 8}.get(name, 3)
    real = "euler" if name == "ddim" else name
    assert folder.name == f"{real}_nfe{len(calls)}"
    kind, rho = {"dpmpp": ("logsnr", None), "unipc": ("logsnr", None), "deis": ("time_uniform", 2.0)}.get(real, ("polynomial", 7.0))
    levels = sigmas.schedule(kind, 5, 0.002, 80.0, rho)
    values = json.loads(WORLDS.read_text())["world"]["gmmimg"]
    gmm = mixture.from_lists(values["means"], values["stds"], values["weights"])
    x = sample_seeds.draw_latents(sample_seeds.generators(range(3)), (3, 4, 4)).double() * 80.0
    run = solvers.find(real).run(lambda x, sigma: mixture.direction(gmm, x, sigma), x, levels, solvers.SolverOptions(afs=True))
    expected = solvers.last(run).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.stack([whole[f"{seed:06d}.png"] for seed in range(3)]), expected, atol=2e-4)


def test_options_of_baselines_reach_the_solver(sample, whole):
    images = {}
    for flags in ("", "--max_order 1", "--predict_x0 False", "--lower_order_final False", "--schedule_type polynomial",
                  "--schedule_type polynomial --schedule_rho 3", "--num_steps 7"):  # fmt: skip
        sample(f"--solver dpmpp --num_steps 5 {flags} {PIXELS} --outdir out{len(images)}")
        images[flags] = whole.pop("000001.png").tobytes()
    assert len(set(images.values())) == len(images)


def test_pixel_models_are_clipped_by_default(sample, network):
    flags = f"--solver dpmpp --backend edm --model_path {network}"
    clips = [record(sample(f"{flags} {more} --outdir out{place}")[0])["settings"]["solver_options"]["thresholding"]
             for place, more in enumerate(("", "--thresholding False", "--predict_x0 False"))]  # fmt: skip
    assert clips == [True, False, False]


def test_classifier_guidance(sample, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    tiny_pipelines.make("adm_classes").save_pretrained(tmp_path / "model")
    (tmp_path / "judge_of_tests.py").write_text(
        "import torch\n\ndef make():\n    return lambda x, time: x.flatten(1)[:, :10] * 50\n")  # fmt: skip
    flags = "--solver euler --num_steps 3 --model_path model --backend adm"
    plain = pictures(sample(flags)[0])
    guided = f"{flags} --guidance_type cg --guidance_rate 3 --classifier judge_of_tests:make"
    folder, printed = sample(f"{guided} --outdir guided")
    assert "warning" not in printed and any((value != plain[name]).any() for name, value in pictures(folder).items())
    with pytest.raises(options.UserError, match="--guidance_type uncond: the network needs class labels"):
        sample(f"{flags} --guidance_type uncond")


def test_compile_compiles_the_network(sample, network, monkeypatch):
    seen = []

    def compiler(function, *args, **kwargs):
        def compiled(*inputs, **named):
            seen.append(function)
            return function(*inputs, **named)

        return compiled

    flags = f"--solver euler --num_steps 3 --backend edm --model_path {network}"
    plain = pictures(sample(flags)[0])
    monkeypatch.setattr(torch, "compile", compiler)
    found = pictures(sample(f"{flags} --compile --outdir compiled")[0])
    assert len(seen) == 2 and all((found[name] == plain[name]).all() for name in plain)


def test_images_do_not_depend_on_the_batch_nor_on_the_rows_of_a_call(sample, tmp_path, network, whole):
    make_predictor(tmp_path / "p.json", backend="edm", side=8, student="ipndm", points=3)
    found = []
    for place, flags in enumerate(("--batch 5", "--batch 1", "--batch 2", "--batch 5 --max_branch_batch 4")):
        sample(f"--predictor p.json --model_path {network} --seeds 0-4 {flags} --outdir out{place}")
        found.append(dict(whole))
        whole.clear()
    assert all(values.keys() == found[0].keys() and len(values) == 5 for values in found)
    for values in found[1:]:
        for name in values:
            np.testing.assert_allclose(values[name], found[0][name], rtol=1e-5, atol=1e-5)
    assert np.std([values.mean() for values in found[0].values()]) > 1e-3


def test_a_stopped_run_goes_on_and_other_settings_are_refused(sample, tmp_path, calls_of, monkeypatch):
    make_predictor(tmp_path / "p.json")
    save, flags = image_folder.save, f"--predictor p.json {PIXELS} --seeds 0-6 --batch 2 --outdir out"

    def stop_at_three(path, values):
        if path.name == "000003.png":
            path.with_name(f".{path.stem}.tmp.png").write_bytes(b"half")
            raise KeyboardInterrupt
        save(path, values)

    monkeypatch.setattr(image_folder, "save", stop_at_three)
    with pytest.raises(options.UserError, match="stopped; the images in out are whole") as stop:
        sample(flags)
    assert stop.value.exit_code == 130
    monkeypatch.setattr(image_folder, "save", save)
    before = pictures(tmp_path / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
    assert "000000/000000.png" in before and "000000/000003.png" not in before
    calls = calls_of(mixture, "direction")
    folder, printed = sample(flags)
    assert f"7 images in out, {7 - len(before)} drawn now" in printed and calls
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == times
    fresh, _ = sample(f"--predictor p.json {PIXELS} --seeds 0-6 --outdir fresh")
    assert {name: value.tolist() for name, value in pictures(fresh).items()} == {
        name: value.tolist() for name, value in pictures(folder).items()}  # fmt: skip
    calls.clear()
    seconds = record(folder)["seconds_per_image"]
    _, printed = sample(flags)
    assert "nothing was left to draw" in printed and not calls and record(folder)["seconds_per_image"] == seconds
    sample(f"--predictor p.json {PIXELS} --seeds 5-8 --outdir out")  # more of the same
    assert len(pictures(folder)) == 9
    with pytest.raises(options.UserError, match="whose subdirs is True, not False: give another --outdir, or --overwrite"):
        sample(f"{flags} --subdirs False")
    make_predictor(tmp_path / "q.json", points=1)
    with pytest.raises(options.UserError, match="made with other tables"):
        sample(f"--predictor q.json {PIXELS} --outdir out")
    sample(f"--predictor q.json {PIXELS} --outdir out --overwrite")
    assert len(pictures(folder)) == 3


def test_pictures_without_a_record_are_not_mixed_with(sample, tmp_path):
    (tmp_path / "out/000000").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "out/000000/000001.png")
    for flag in ("", "--overwrite"):
        with pytest.raises(options.UserError, match="out holds pictures and no sampling.json"):
            sample(f"--solver euler {PIXELS} --outdir out {flag}")


def test_unfinished_states_are_drawn_where_they_are_missing(sample, tmp_path, calls_of):
    flags = f"--solver euler --num_steps 3 {PIXELS} --outdir out"
    sample(f"{flags} --seeds 0-2")
    folder, printed = sample(f"{flags} --seeds 0-2 --return_inters")
    inters = tmp_path / "out_inters/000000"
    assert "3 drawn now" in printed and sorted(path.name for path in inters.iterdir()) == [
        f"00000{seed}_0{place}.png" for seed in range(3) for place in (1, 2)
    ]  # fmt: skip
    (inters / "000001_02.png").unlink()
    assert "1 drawn now" in sample(f"{flags} --seeds 0-2 --return_inters")[1]
    assert "nothing was left to draw" in sample(f"{flags} --seeds 0-2 --return_inters")[1]


def test_how_a_model_is_called_is_read_from_the_predictor(tmp_path):
    from brisk import denoiser_sources, epd_sampling

    config = {"model_name_or_path": "mine", "revision": "abc", "variant": "fp16", "round_timesteps": True, "clip_denoised": False}
    content = make_predictor(tmp_path / "p.json", backend="adm", config=config)
    found = epd_sampling.complete(denoiser_sources.ModelOptions(), content)
    assert found == denoiser_sources.ModelOptions(None, "adm", "mine", "abc", "fp16", round_timesteps=True, clip_denoised=False)
    assert epd_sampling.other_model(content, "mine") == epd_sampling.other_model(content, None) == []
    assert "was made for mine" in epd_sampling.other_model(content, "yours")[0]
    assert epd_sampling.other_model(content, str(Path("mine").absolute())) == []
    other = epd_sampling.complete(denoiser_sources.ModelOptions(source="yours"), content)
    assert other.backend == "adm"  # which the model must be
    assert epd_sampling.complete(denoiser_sources.ModelOptions(source="yours"), content, force=True).backend is None
    mixture_of = make_predictor(tmp_path / "q.json", config={"gmm_file": "world.json"})
    found = epd_sampling.complete(denoiser_sources.ModelOptions(source="yours"), mixture_of)
    assert (found.backend, found.gmm_file) == (None, None)


@pytest.mark.parametrize("place", ["models/own", "./models/own"])
def test_a_model_that_is_not_where_the_predictor_recorded_it_is_named_with_the_flag(sample, tmp_path, place):
    make_predictor(tmp_path / "p.json", backend="sd", config={"model_name_or_path": place})
    said = f"; the predictor p recorded {place}, --pretrained_model_name_or_path gives another place."
    with pytest.raises(options.UserError) as refused:
        sample("--predictor p.json --prompt a")
    assert f" {place} is n" in str(refused.value) and str(refused.value).endswith(said)
    with pytest.raises(options.UserError, match="other/model is neither a pipeline") as refused:
        sample("--predictor p.json --prompt a --model_path other/model")
    assert "recorded" not in str(refused.value)


def test_layouts_of_the_folder(sample, tmp_path):
    folder, _ = sample(f"--solver euler {PIXELS} --seeds 998-1001 --outdir deep")
    deep = pictures(folder)
    assert list(deep) == ["000000/000998.png", "000000/000999.png", "001000/001000.png", "001000/001001.png"]
    folder, _ = sample(f"--solver euler {PIXELS} --seeds 998-1001 --outdir flat --subdirs False")
    flat = pictures(folder)
    assert list(flat) == ["000998.png", "000999.png", "001000.png", "001001.png"]
    folder, _ = sample(f"--solver euler {PIXELS} --seeds 0-8 --batch 5 --grid")
    assert folder == tmp_path / "samples/grids/gmm/euler_nfe3"
    grids = pictures(folder)
    assert {name: grid.shape for name, grid in grids.items()} == {"grid_batch0000.png": (12, 8, 3), "grid_batch0001.png": (8, 8, 3)}
    single = pictures(sample(f"--solver euler {PIXELS} --seeds 0-8 --outdir single")[0])
    first = np.concatenate([single[f"000000/00000{seed}.png"] for seed in (0, 1)], 1)
    assert abs(grids["grid_batch0000.png"][:4].astype(int) - first).max() <= 1


def test_pixels_are_rounded_to_the_nearest_level():
    values = torch.tensor([-1.2, -1.0, 0.0, 0.003, 0.996, 1.0, 3.0])[None, None, None].expand(1, 3, 1, 7)
    assert image_folder.quantise(values)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 254, 255, 255]


def test_describe_prints_the_table_and_stops(tmp_path, monkeypatch):
    make_predictor(tmp_path / "p.json", dataset="cifar10", backend="edm", side=32)
    code = """
import sys, sample_epd
sample_epd.main(["--predictor_path", sys.argv[1], "--describe"])
print("HEAVY", sorted({"diffusers", "transformers", "accelerate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "p.json"], cwd=ROOT, capture_output=True, text=True)
    assert "cifar10: edm, 32 px, no guidance" in done.stdout and "5 sequential, 8 evaluations" in done.stdout, done.stderr
    assert done.stdout.count("->") == 3 and done.stdout.strip().endswith("HEAVY []")


def test_help_loads_no_heavy_library():
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample_epd.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--max_branch_batch" in done.stdout and " torch\n" not in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(sample, tmp_path):
    _, printed = sample(f"--solver heun --num_steps 6 {PIXELS} --dry_run")
    assert "sampler: heun, 6 noise levels from 80 to 0.002, 5 intervals" in printed and "NFE: 10 network calls" in printed
    assert list(tmp_path.iterdir()) == []


def test_runs_and_numbers_name_predictors(sample, tmp_path):
    run = tmp_path / "exps/00012-gmm-4-5-epd"
    run.mkdir(parents=True)
    make_predictor(run / "predictor-000010.json", config={"gmm_file": f"{WORLDS}:gmmimg"})
    for name in (run, "12"):
        _, printed = sample(f"--predictor_path {name} --dry_run --afs True --num_steps 4 --schedule_type time_uniform")
        assert "sampler: epd, 4 noise levels" in printed and "warning" not in printed


def test_another_model_or_guidance_is_refused_or_with_force_warned_about(sample, tmp_path, network):
    make_predictor(tmp_path / "p.json", backend="edm", dataset="cifar10", side=32)
    for flags, said in (
        (PIXELS, "the predictor p is for models of the family edm, this one is of gmm"),
        (f"--model_path {network} --dataset_name ffhq", "--dataset_name is ffhq, the predictor p is for cifar10"),
        (f"--model_path {network}", "the predictor p is for images of 32 pixels, this model draws 8"),
        (f"--model_path {network} --guidance_type cfg --guidance_rate 2", "--guidance_type is cfg, the predictor p is for none"),
    ):
        with pytest.raises(options.UserError, match=f"{said}; --force_model uses it all the same"):
            sample(f"--predictor p.json {flags} --dry_run")
        _, printed = sample(f"--predictor p.json {flags} --dry_run --force_model")
        assert f"warning: {said}" in printed
    make_predictor(tmp_path / "q.json", guidance="cfg", rate=2.0, side=1)
    with pytest.raises(options.UserError, match="--guidance_rate is 3.0, the predictor q is for 2.0"):
        sample(f"--predictor q.json {CLASSES} --guidance_rate 3")
    sample(f"--predictor q.json {CLASSES} --guidance_rate 2 --guidance_type cfg --dry_run")


def test_flow_matching_starts_at_noise_and_recomputes_mu_for_another_resolution(sample, tmp_path, whole):
    values = json.loads(WORLDS.read_text())["world"]["gmmimg"] | {"flow": True}
    (tmp_path / "flow.json").write_text(json.dumps(values))
    content = make_predictor(tmp_path / "p.json", kind="flowmatch", afs=False)
    folder, printed = sample("--predictor p.json --gmm_file flow.json")
    gmm = mixture.from_lists(values["means"], values["stds"], values["weights"])
    x = sample_seeds.draw_latents(sample_seeds.generators(range(3)), (3, 4, 4)).double()
    rows = epd.rows_of(content.tables)
    run = epd.solve(lambda x, s, rows=None: mixture.direction(gmm, x, s, flow=True), x, content.sigmas, rows, flow=True)
    np.testing.assert_allclose(whole["000002.png"], solvers.last(run)[2].permute(1, 2, 0), atol=1e-4)
    _, printed = sample("--solver euler --num_steps 4 --gmm_file flow.json --dry_run")
    assert "from 1 to 0.00892" in printed
    make_predictor(tmp_path / "p.json", kind="flowmatch", afs=False, side=1024, mu=1.15, backend="flux")
    _, printed = sample("--predictor p.json --gmm_file flow.json --force_model --dry_run")
    assert "from 1 to 0.00892" in printed  # the model's own shift in place of mu
    with pytest.raises(options.UserError, match="the predictor p is for a flow-matching model, this is a noise-level model"):
        sample(f"--predictor p.json {PIXELS} --force_model --dry_run")


def test_a_text_model_with_prompts_by_position_or_seed(sample, tmp_path, calls_of):
    from brisk import denoisers

    (tmp_path / "p.txt").write_text("a red one\n\na blue two\n")
    (tmp_path / "p.csv").write_text("id,caption\n0,zero\n1,one\n2,two\n3,three\n")
    calls = calls_of(denoisers, "direction_for")
    flags = f"--solver ddim --num_steps 2 --model_path {TEACHER} --guidance_type cfg --guidance_rate 2"
    folder, printed = sample(f"{flags} --prompt_file p.txt --seeds 3-5 --batch 2 --negative_prompt green")
    assert [call[0][1] for call in calls] == [["a red one", "a blue two"], ["a red one"]]
    assert calls[0][0][5] == ["green", "green"] and "14.6146" in printed and "guided pair" in printed
    assert all(picture.shape == (32, 32, 3) for picture in pictures(folder).values())
    calls.clear()
    sample(f"{flags} --prompt_file p.csv --prompt-index seed --seeds 3,1 --outdir seeds")
    assert calls[0][0][1] == ["three", "one"]
    with pytest.raises(options.UserError, match="seed 4 has no prompt, --prompt_file p.csv holds 4"):
        sample(f"{flags} --prompt_file p.csv --prompt_index seed --seeds 0-4")
    with pytest.raises(options.UserError, match="whose seeds is 3-5, not 4-6"):
        sample(f"{flags} --prompt_file p.txt --seeds 4-6 --negative_prompt green")
    with pytest.raises(options.UserError, match="give --prompt, or --prompt_file"):
        sample(flags)
    sample(f"--solver ddim --num_steps 2 --model_path {TEACHER} --guidance_type uncond --outdir unconditional --seeds 0")
    assert calls[-1][0][1] == [""]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(options.UserError, match="--prompt_file empty.txt holds no prompt"):
        sample(f"{flags} --prompt_file empty.txt")


@pytest.fixture(scope="module")
def flow_models(tmp_path_factory):
    """Folders of tiny pipelines by family: sd3 and flux."""
    folder = tmp_path_factory.mktemp("flow")
    for family in ("sd3", "flux"):
        tiny_pipelines.make(family).save_pretrained(folder / family)
    return folder


def test_sd3_has_its_own_defaults(sample, tmp_path, flow_models, calls_of):
    config = {"model_name_or_path": str(flow_models / "sd3"), "torch_dtype": "float16"}
    make_predictor(tmp_path / "p.json", "sd3", kind="flowmatch", num_steps=3, afs=False, side=16, guidance="cfg", rate=4.5,
                   dataset="ms_coco", config=config)  # fmt: skip
    calls = calls_of(sample_epd.image_folder, "quantise")
    folder, printed = sample("--predictor p.json --seeds=")
    assert folder == tmp_path / "samples/sd3_epd" and [len(call[0][0]) for call in calls] == [4]
    assert "warning: no prompt was given, the empty one is used" in printed and "NFE: 4 network calls" in printed
    assert "(8 if a guided pair counts twice)" in printed and record(folder)["settings"]["precision"] == "fp32"
    assert [picture.shape for picture in pictures(folder).values()] == [(16, 16, 3)] * 4
    with pytest.raises(options.UserError, match="--resolution is 32, the predictor p is for 16"):
        sample("--predictor p.json --prompt cat --resolution 32")
    _, printed = sample("--predictor p.json --prompt cat --resolution 32 --force_model --dry_run")
    assert "model: sd3, 32 px" in printed
    with pytest.raises(options.UserError, match="--resolution 30 must be a multiple of"):
        sample("--predictor p.json --prompt cat --resolution 30 --force_model")


def test_flux_guides_itself_and_its_levels_depend_on_the_resolution(sample, tmp_path, flow_models, calls_of, monkeypatch):
    make_predictor(tmp_path / "p.json", "flux", kind="flowmatch", num_steps=3, afs=False, side=1024, guidance="cfg", rate=3.5,
                   dataset="ms_coco", config={"model_name_or_path": "nowhere/at-all"}, mu=1.15)  # fmt: skip
    monkeypatch.setenv("FLUX_MODEL_PATH", str(flow_models / "flux"))
    flags = "--predictor p.json --prompt cat --resolution 32 --force_model --seeds="
    folder, printed = sample(f"{flags} --return_inters")
    assert folder == tmp_path / "samples/flux_epd" and list(pictures(folder)) == ["000000/000000.png"]
    assert "NFE: 4 network calls one after the other, 6 evaluations" in printed
    levels = record(folder)["settings"]["noise_levels"]
    assert levels == pytest.approx(sigmas.flowmatch(3, mu=sigmas.flow_mu(16)).tolist())
    assert levels[1] != pytest.approx(sigmas.flowmatch(3, mu=1.15)[1].item(), abs=0.1)
    with pytest.raises(options.UserError, match="--negative_prompt 'dog': flux guides itself and knows no negative prompt"):
        sample(f"{flags} --negative_prompt dog")
    for given, said in (('"dog"', "--negative_prompt 'dog': flux guides itself"), ('["a"]', "is .*, it must be one text")):
        with pytest.raises(options.UserError, match=said):
            sample(f"{flags} --backend_config '{{\"negative_prompt\": {given}}}'")


def test_a_network_without_a_vae_is_refused_before_anything_is_drawn(sample, tmp_path):
    tiny_pipelines.fpdm_pipeline(vae=False).transformer.save_pretrained(tmp_path / "bare/transformer")
    with pytest.raises(options.UserError, match="has no VAE to make images"):
        sample("--solver euler --num_steps 3 --backend dit --model_path bare --outdir out")
    assert not (tmp_path / "out").exists()


def test_half_precision_on_a_cpu_is_said(sample, network):
    _, printed = sample(f"--solver euler --backend edm --model_path {network} --use_fp16")
    assert "warning: fp16 needs a GPU: the network runs in float32" in printed
    folder, printed = sample(f"--solver euler --backend edm --model_path {network} --dtype bf16 --outdir bf16")
    assert "warning" not in printed and record(folder)["settings"]["precision"] == "bf16"


def test_flags_without_effect_are_said(sample, tmp_path):
    make_predictor(tmp_path / "p.json")
    _, printed = sample(f"--predictor p.json {PIXELS} --dry_run --predict_x0 False --unipc_variant bh1 --compile --split_branches")
    for flag in ("predict_x0", "unipc_variant", "compile", "split_branches"):
        assert f"warning: --{flag} has no effect" in printed
    _, printed = sample(f"--solver euler {PIXELS} --dry_run --max_order 2 --guidance_rate 3 --schedule_type logsnr "
                        "--schedule_rho 2")  # fmt: skip
    for flag in ("max_order", "guidance_rate", "schedule_rho"):
        assert f"warning: --{flag} has no effect" in printed


@pytest.mark.parametrize("flags, said", [
    (PIXELS, "give either --predictor_path or --solver"),
    (f"--solver euler --predictor p.json {PIXELS}", "or --solver: a plain solver takes a predictor's model, levels"),
    (f"--predictor missing.json {PIXELS}", "missing.json is neither a file, nor a folder, nor the number"),
    (f"--predictor broken.json {PIXELS}", "broken.json is damaged"),
    (f"--predictor old.pkl {PIXELS}", "old.pkl is a pickle, which is never executed: convert it by scripts/convert"),
    (f"--predictor zero.json {PIXELS}", "schedule.sigmas ends at 0, the last sigma must be greater than 0"),
    (f"--predictor rows.json {PIXELS}", "tables.r has 2 rows, 4 sigmas have 3 intervals"),
    (f"--predictor p.json {PIXELS} --num_steps 6", "--num_steps is 6, the predictor p was made for 4: leave the flag out"),
    (f"--predictor p.json {PIXELS} --afs False", "--afs is False, the predictor p was made for True"),
    (f"--predictor p.json {PIXELS} --schedule_type logsnr", "--schedule_type is logsnr, the predictor p was made for time_uniform"),
    (f"--solver euler {PIXELS} --seeds 5-2", "--seeds: seeds '5-2': '5-2' is neither a number nor a rising range"),
    (f"--solver euler {PIXELS} --seeds a", "'a' is neither a number"),
    (f"--solver euler {PIXELS} --seeds=-3", "'-3' is neither a number"),
    (f"--solver euler {PIXELS} --prompt cat", "--prompt was given, a model of family gmm knows no prompts"),
    (f"--solver euler {PIXELS} --class_labels 1", "--class_labels was given, the model (gmm) knows no classes"),
    (f"--solver euler {CLASSES} --class_labels 1,3", "class 3 is out of range, the model knows 0 to 2"),
    (f"--solver euler {CLASSES} --class_labels=-1", "must be a list of classes"),
    (f"--solver euler {CLASSES} --guidance_type cfg", "--guidance_type cfg needs --guidance_rate"),
    (f"--solver euler {PIXELS} --guidance_type cfg --guidance_rate 2", "needs a model with classes or prompts"),
    (f"--solver euler {CLASSES} --guidance_type cg --guidance_rate 2", "--guidance_type cg needs a model of discrete timesteps"),
    (f"--solver heum {PIXELS}", "--solver: invalid choice: 'heum'"),
    (f"--solver euler {PIXELS} --backend magic", "--backend: invalid choice: 'magic'"),
    (f"--solver unipc {PIXELS} --max_order 4", "max_order is 4; unipc takes 1 to 3"),
    (f"--solver euler {PIXELS} --num_steps 1", "--num_steps: 1 is out of range"),
    (f"--solver euler {PIXELS} --schedule_type discrete", "schedule_type 'discrete' needs a model with a table"),
    (f"--solver euler {PIXELS} --schedule_type flowmatch", "schedule_type is 'flowmatch'; a diffusion model takes"),
    (f"--solver euler {PIXELS} --split_branches", "--split_branches shares a predictor's points, --solver euler has none"),
    (f"--solver euler {PIXELS} --outdir file.txt/x", "file.txt/x cannot be written"),
    (f"--solver euler {PIXELS} --describe", "--describe needs --predictor_path"),
    (f"--solver euler {PIXELS} --dtype bf16 --use_fp16", "--use_fp16 and --dtype bf16 differ"),
    (f"--solver euler {PIXELS} --backend_config [1]", "JSON object"),
    (f"--solver euler {PIXELS} --backend_config '{{\"x\": 1}}'", "'x' is not one of the entries"),
    (f"--solver euler {PIXELS} --backend_config '{{\"torch_dtype\": 5}}'", "'torch_dtype' is not one of the entries"),
    (f"--solver euler {PIXELS} --backend_config '{{\"resolution\": \"x\"}}'", "resolution a whole number, the others texts"),
    (f"--solver euler {PIXELS} --prompt_index seed", "--prompt_index seed needs --prompt_file"),
    (f"--solver euler {PIXELS} --generator_device cuda", "--generator_device cuda needs a GPU"),
    ("--solver euler --gmm_file missing.json", "--gmm_file missing.json cannot be read"),
])  # fmt: skip
def test_bad_inputs_are_one_sentence_and_code_2(sample, tmp_path, flags, said):
    make_predictor(tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "old.pkl").write_bytes(b"")
    zero, rows = json.loads(json.dumps(document)), json.loads(json.dumps(document))
    zero["schedule"]["sigmas"][-1] = 0.0
    rows["tables"]["r"].pop()
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(options.UserError) as error:
        sample(flags)
    assert said in str(error.value) and error.value.exit_code == 2
    assert not list(tmp_path.rglob("*.png"))
