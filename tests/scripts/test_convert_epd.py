"""convert_epd_predictor.py: pickles as the published ones are built become predictor files; nothing in them runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pickles
import pytest
import torch
from conftest import ROOT, environment
from pickles import Evil, Persistent

from brisk import options, predictor, predictor_files

sys.path.insert(0, str(ROOT / "scripts"))
import convert_epd_predictor  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Every source text in the pickles here would leave a file `pwned`."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()


def document(**changes):
    """The content of a predictor file like the published ones: N = 4, K = 2, cifar10; `changes` as solver__afs=True."""
    generator = torch.Generator().manual_seed(1)
    raw = predictor.Raw(*(torch.randn(3, 2, generator=generator) for _ in range(4)), 0.05, 0.05)
    schedule = {"type": "time_uniform", "rho": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "flow": None,
                "sigmas": [80.0, 6.950235412, 1.286668915, 0.002]}  # fmt: skip
    model = {"dataset": "cifar10", "backend": "edm", "backend_config": None, "img_resolution": 32, "guidance_type": None,
             "guidance_rate": 0.0}  # fmt: skip
    teacher = {"solver": "heun", "M": 3, "num_steps": 13, "substeps_per_interval": 2}
    solver = predictor.Solver("epd", 4, 2, True, 3, False)
    whole = predictor.to_document(predictor.make("one", "distilled", solver, schedule, model, None, raw, teacher))
    for place, value in changes.items():
        section, name = place.split("__")
        whole[section][name] = value
    return whole


def convert(*arguments):
    """Run the script in this process."""
    convert_epd_predictor.main([str(argument) for argument in arguments])


def refused(*arguments):
    with pytest.raises(options.UserError) as caught:
        convert(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(found, stored):
    """Whether the predictor `found` holds what the file content `stored` does."""
    kept = predictor.to_document(found)
    for name in ("solver", "model", "nfe", "stage"):
        assert kept[name] == stored[name], name
    wanted = predictor.from_document(stored, "stored")
    assert all((one - two).abs().max() < 1e-9 for one, two in zip(found.tables, wanted.tables, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(found.raw[:4], wanted.raw[:4], strict=True))
    assert found.raw[4:] == wanted.raw[4:]
    assert ((found.sigmas - wanted.sigmas).abs() <= 1e-8 * wanted.sigmas.clamp(min=1)).all()
    assert all(kept["schedule"][name] == stored["schedule"][name] for name in ("type", "rho"))
    for name in ("sigma_min", "sigma_max"):
        assert kept["schedule"][name] == pytest.approx(stored["schedule"][name], rel=1e-6)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_distilled_predictor(tmp_path, capsys, suffix, protocol):
    folder = tmp_path / "00002-cifar10-4-5-epd-uni1.0-afs"
    folder.mkdir()
    pickles.dump_predictor(document(), folder / "network-snapshot-000010.pkl", protocol)
    convert(folder / "network-snapshot-000010.pkl", f"new/predictor{suffix}", "--repository=owner/name", "--branch=main",
            "--commit=abc", "--licence=unknown")  # fmt: skip
    found = predictor_files.read(f"new/predictor{suffix}")
    if suffix == ".json":
        same(found, document())
    kept = predictor.to_document(found)
    assert found.name == folder.name and kept["training"] == {"alpha": 10.0} and kept["teacher"] == document()["teacher"]
    source = kept["source"]
    assert {name: source[name] for name in ("repository", "branch", "commit", "licence", "file", "class")} == {
        "repository": "owner/name", "branch": "main", "commit": "abc", "licence": "unknown",
        "file": "network-snapshot-000010.pkl", "class": "EPD_predictor"}  # fmt: skip
    assert len(source["sha256"]) == len(source["source_sha256"]) == 64
    assert kept["official_t_steps_fp32"] == pytest.approx(document()["schedule"]["sigmas"])
    printed = capsys.readouterr().out
    assert "5 sequential, 8 evaluations" in printed and f"new/predictor{suffix} written." in printed


def test_exported_predictor_without_a_loss(tmp_path):
    flow = {"shift": None, "mu": 1.15}
    sigmas = [1.0, 0.8515184105, 0.6124320614, 0.003151391599]
    stored = document(schedule__type="flowmatch", schedule__sigmas=sigmas, schedule__sigma_min=0.001, schedule__sigma_max=1.0,
                      schedule__flow=flow, solver__max_order=2, model__dataset="ms_coco", model__backend="flux",
                      model__guidance_type="cfg", model__guidance_rate=3.5, model__img_resolution=1024,
                      model__backend_config={"model_id": "a", "resolution": 1024}) | {"stage": "rl"}  # fmt: skip
    mu = np.exp(1.15)
    stored["schedule"]["sigmas"] = (mu / (mu + 1 / np.linspace(1, 1e-3, 4) - 1)).tolist()
    path = pickles.dump_predictor(stored, tmp_path / "flux-best.pkl", loss=False, backend="flux", sigma_min=0.001, sigma_max=1.0,
                                  backend_config={"model_id": "a", "resolution": 1024}, flowmatch_mu=1.15, flowmatch_shift=3.0)
    convert(path, "flux.json", "--stage=rl")
    found = predictor_files.read("flux.json")
    same(found, stored)
    kept = predictor.to_document(found)
    assert (found.name, kept["training"], kept["teacher"]["num_steps"]) == ("flux-best", None, None)
    assert kept["schedule"]["flow"] == flow


def test_sigmas_of_every_schedule():
    make = convert_epd_predictor.make_sigmas
    for kind in ("polynomial", "logsnr", "time_uniform"):
        for rho in (1.0, 2.0, 7.0):
            found = make(kind, 6, rho, 0.002, 80.0, None, None, None)
            assert found == sorted(found, reverse=True) and len(found) == 6
            assert found[0] == pytest.approx(80.0, rel=1e-12) and found[-1] == pytest.approx(0.002, rel=1e-9)
    sd = make("discrete", 11, 1.0, None, None, (0.00085, 0.012), None, None)
    assert (sd[0], sd[-1]) == pytest.approx((14.61464123, 0.02916715815), rel=1e-9)
    ldm = make("discrete", 3, 1.0, None, None, (0.0015, 0.0195), None, None)
    assert (ldm[0], ldm[-1]) == pytest.approx((83.8225, 0.038759), rel=1e-5)
    sd3 = make("flowmatch", 11, 1.0, None, None, None, None, 3.0)
    assert (sd3[0], sd3[1], sd3[-1]) == pytest.approx((1.0, 0.9644002566, 0.008928571429), rel=1e-9)
    assert make("flowmatch", 9, 1.0, None, None, None, 1.15, 3.0)[-1] == pytest.approx(0.003151391599, rel=1e-9)
    for wrong in (("cosine", 1.15), ("flowmatch", None), ("discrete", None), (None, None)):
        with pytest.raises(options.UserError, match="cannot be built"):
            make(wrong[0], 4, 1.0, 0.002, 80.0, None, wrong[1], None)


def test_golden_schedules_are_rebuilt(pytestconfig):
    """schedules.json of the golden numbers, where their folder has it."""
    path = Path(pytestconfig.getoption("--conformance")) / "epd/schedules.json"
    if not path.is_file():
        pytest.skip("no epd/schedules.json in the folder of --conformance")
    for case in json.loads(path.read_text())["cases"]:
        betas = case.get("betas")
        if betas and betas[0] == "linear":  # of no published predictor
            continue
        ends = case.get("sigma_min"), case.get("sigma_max")
        found = convert_epd_predictor.make_sigmas(case["type"], case["num_steps"], case.get("rho") or 1.0, *ends,
                                                  betas and betas[1:3], case.get("mu"), case.get("shift"))  # fmt: skip
        assert found == pytest.approx(case["sigmas"], rel=1e-8, abs=1e-8), case


def test_released_predictors_survive_a_pickle_like_the_published_ones(pytestconfig, tmp_path):
    found = sorted((Path(pytestconfig.getoption("--conformance")) / "epd/predictors").glob("*.json"))
    if not found:
        pytest.skip("no epd/predictors in the folder of --conformance")
    for path in found:
        stored = json.loads(path.read_text())
        stored["model"] = {name: value for name, value in stored["model"].items() if not name.startswith("note")}
        distilled = stored["official_t_steps_fp32"] is not None
        flow = stored["schedule"]["flow"] or {}
        model, schedule = stored["model"], stored["schedule"]
        more = {} if distilled else {
            "backend": model["backend"], "backend_config": model["backend_config"] or {}, "sigma_min": schedule["sigma_min"],
            "sigma_max": schedule["sigma_max"], "flowmatch_mu": flow.get("mu"), "flowmatch_shift": 3.0 if flow else None,
        }  # fmt: skip
        pickled = pickles.dump_predictor(stored, tmp_path / f"{path.stem}.pkl", loss=distilled, **more)
        content = convert_epd_predictor.convert(pickled, path.stem, stored["stage"], {})
        same(content, stored)
        assert content.name == stored["name"] and content.document["teacher"] == stored["teacher"]


def test_crafted_and_wrong_pickles_are_refused(tmp_path):
    path, out = tmp_path / "in.pkl", tmp_path / "out.json"
    evil = Evil(eval, "open('pwned', 'w')")
    for content, words in (
        ({"model": evil}, "'builtins.eval'"),
        ({"model": Persistent("EPD_predictor", {"num_steps": evil})}, "'builtins.eval'"),
        ({"model": Persistent("EPD_predictor", {}), "loss_fn": Evil(os.system, "touch pwned")}, ".system'"),
        ({"model": 3}, "holds no EPD predictor under 'model', but no class"),
        ([1], "holds no EPD predictor under 'model'"),
        ({"model": Persistent("AMED_predictor", {})}, "the class 'AMED_predictor'"),
        ({"model": Persistent("EPD_predictor", {})}, "has no four tables"),
        ({"model": Persistent("EPD_predictor", {"_buffers": 3})}, "is no pickle that can be read"),
    ):
        assert words in refused(pickles.dump(content, path), out)
    path.write_bytes(b"no pickle")
    assert "is no pickle that can be read" in refused(path, out)
    for changes, words in (
        ({"solver__num_steps": 5}, "has no four tables"),
        ({"solver__num_points": 3}, "has no four tables"),
        ({"solver__student": "amed"}, 'solver.student is "amed"'),
        ({"solver__max_order": 7}, "solver.max_order is 7"),
        ({"schedule__type": "cosine"}, "the sigmas of schedule 'cosine' cannot be built"),
        ({"schedule__rho": -1.0}, "schedule_rho is -1; it must be positive"),
        ({"model__guidance_type": "free"}, 'model.guidance_type is "free"'),
        ({"raw__r": [[float("nan"), 0.0]] * 3}, "it must be a number"),
        ({"raw__scale_time_range": -1.0}, "scale_time -1; none can be negative"),
    ):
        refusal = refused(pickles.dump_predictor(document(**changes), path), out)
        assert words in refusal, refusal
    unknown = document(model__dataset="mine", schedule__sigma_min=None)
    assert "between which sigmas its schedule time_uniform runs" in refused(pickles.dump_predictor(unknown, path), out)
    assert not out.exists()


def test_wrong_arguments_are_refused(tmp_path):
    path = pickles.dump_predictor(document(), tmp_path / "in.pkl")
    assert "must end in .json or .safetensors" in refused(path, "out.pkl")
    assert "is no file" in refused("absent.pkl", "out.json")
    assert "is no file" in refused(tmp_path, "out.json")
    assert "--stage" in refused(path, "out.json", "--stage=final")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(path, "file/out.json")


def test_exit_code_and_stderr_of_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/convert_epd_predictor.py")]
    pickles.dump({"model": Evil(eval, "open('pwned', 'w')")}, tmp_path / "evil.pkl")
    done = subprocess.run([*command, "evil.pkl", "out.json"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: evil.pkl asks for 'builtins.eval'") and not Path("out.json").exists()
