"""Predictor files: what is written comes back, every rule has its sentence, look-up by file, folder and number."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch

from brisk import predictor, predictor_files
from brisk.options import UserError

pytestmark = pytest.mark.quick


def document():
    """A small valid file: N = 3, K = 2, with raw parameters and entries of others."""
    generator = torch.Generator().manual_seed(0)
    raw = predictor.Raw(*(torch.randn(2, 2, generator=generator) for _ in range(4)), 0.05, 0.1)
    solver = predictor.Solver("ipndm", 3, 2, True, 3, False)
    made = predictor.make(
        "one", "distilled", solver, {"type": "time_uniform", "rho": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "flow": None,
                                     "sigmas": [80.0, 2.823688824, 0.002], "own": [1, {"a": None}]},
        {"dataset": "cifar10", "backend": "edm", "backend_config": None, "img_resolution": 32, "guidance_type": None,
         "guidance_rate": 0.0, "note": "kept"},
        raw=raw, teacher={"solver": "dpm", "M": 3, "num_steps": 9}, source={"licence": None},
    )  # fmt: skip
    return predictor.to_document(made) | {"other": {"deep": [1, 2]}, "official_t_steps_fp32": None}


def changed(path, value):
    """`document` with the entry at `path` (names and numbers) replaced, removed if `value` is Ellipsis."""
    whole = document()
    place = whole
    for name in path[:-1]:
        place = place[name]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return whole


def refused(content):
    with pytest.raises(UserError) as caught:
        predictor.from_document(content, "FILE")
    message = str(caught.value)
    assert message.startswith("FILE is no predictor that can be used: ") and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_what_is_written_comes_back_unknown_entries_included(tmp_path, suffix):
    content = predictor.from_document(document(), "FILE")
    predictor_files.write(content, tmp_path / f"new/predictor{suffix}")
    found = predictor_files.read(tmp_path / f"new/predictor{suffix}")
    assert (found.solver, found.model, found.nfe, found.name) == (content.solver, content.model, content.nfe, "one")
    assert torch.equal(found.sigmas, content.sigmas) and found.sigmas.dtype == torch.float64
    for ours, theirs in zip(found.tables, content.tables, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, atol=0 if suffix == ".json" else 1e-7, rtol=0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.raw[:4], content.raw[:4], strict=True))
    assert found.raw[4:] == (0.05, 0.1)
    kept = predictor.to_document(found)
    assert kept["other"] == {"deep": [1, 2]} and kept["schedule"]["own"] == [1, {"a": None}]
    assert kept["model"]["note"] == "kept" and kept["official_t_steps_fp32"] is None
    if suffix == ".json":
        assert kept == document() and list(kept) == list(document())
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"predictor{suffix}"]


def test_safetensors_holds_the_tables_as_tensors_and_reads_without_this_code(tmp_path):
    from safetensors import safe_open

    content = predictor.from_document(document(), "FILE")
    predictor_files.write(content, tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert set(file.keys()) == {*predictor.NAMES, *(f"raw.{name}" for name in predictor.NAMES)}
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["epd_predictor"])["format"] == "epd-predictor"


def test_scales_of_one_are_null_and_raw_is_optional(tmp_path):
    plain = changed(["raw"], None)
    plain["tables"] |= {"scale_dir": None, "scale_time": [[1.0, 1.0], [1, 1]]}
    content = predictor.from_document(plain, "FILE")
    assert content.raw is None and torch.equal(content.tables.scale_dir, torch.ones(2, 2, dtype=torch.float64))
    for suffix in (".json", ".safetensors"):
        predictor_files.write(content, tmp_path / f"p{suffix}")
        again = predictor_files.read(tmp_path / f"p{suffix}")
        assert again.raw is None and torch.equal(again.tables.scale_time, content.tables.scale_time)
        assert predictor.to_document(again)["tables"]["scale_time"] is None
    del plain["raw"], plain["nfe"], plain["teacher"]
    assert predictor.from_document(plain, "FILE").nfe[:3] == (2, 3, 5)


BROKEN = [
    (["format"], "other", "its format is not 'epd-predictor'"),
    (["format"], ..., "its format is not 'epd-predictor'"),
    (["version"], 2, "it is of version 2, here only version 1 can be read"),
    (["version"], "1", 'its version is "1", not a whole number from 1'),
    (["version"], 0, "its version is 0"),
    (["version"], ..., "its version is missing"),
    (["name"], 3, "name is 3, it must be a text"),
    (["stage"], "final", 'stage is "final", it must be one of start, distilled, rl'),
    (["solver"], [], "solver is a list, it must be a mapping"),
    (["model"], ..., "model is missing, it must be a mapping"),
    (["raw"], 1, "raw is 1, it must be a mapping or null"),
    (["source"], "here", 'source is "here", it must be a mapping or null'),
    (["solver", "student"], "amed", 'solver.student is "amed", it must be one of epd, ipndm'),
    (["solver", "num_steps"], 1, "solver.num_steps is 1, it must be a whole number, at least 2"),
    (["solver", "num_steps"], 3.0, "solver.num_steps is 3.0, it must be a whole number"),
    (["solver", "num_steps"], 4, "schedule.sigmas has 3 numbers, solver.num_steps is 4"),
    (["solver", "num_points"], True, "solver.num_points is true, it must be a whole number"),
    (["solver", "num_points"], 3, "tables.r[0] must be a list of 3 numbers, one per point"),
    (["solver", "afs"], 1, "solver.afs is 1, it must be true or false"),
    (["solver", "max_order"], 5, "solver.max_order is 5, it must be 1, 2, 3, 4 or null"),
    (["solver", "fix_last_scale_dir"], ..., "solver.fix_last_scale_dir is missing"),
    (["solver", "midpoint"], "linear", 'solver.midpoint is "linear", it must be geometric'),
    (["schedule", "type"], "cosine", 'schedule.type is "cosine", it must be one of polynomial, logsnr'),
    (["schedule", "rho"], 0, "schedule.rho is 0, it must be a number greater than 0, or null"),
    (["schedule", "flow"], 3.0, "schedule.flow is 3.0, it must be a mapping or null"),
    (["schedule", "sigmas"], "80,2", "schedule.sigmas is \"80,2\", it must be a list of numbers"),
    (["schedule", "sigmas"], [80.0, None, 1.0], "schedule.sigmas is a list, it must be a list of numbers"),
    (["schedule", "sigmas", 2], 0.0, "schedule.sigmas ends at 0, the last sigma must be greater than 0"),
    (["schedule", "sigmas", 2], -1, "schedule.sigmas ends at -1, the last sigma must be greater than 0"),
    (["schedule", "sigmas", 1], 80.0, "schedule.sigmas[1] is 80 after 80, they must decrease"),
    (["schedule", "type"], "flowmatch", "schedule.sigmas begins at 80, flowmatch's are at most 1"),
    (["model", "backend"], 1, "model.backend is 1, it must be a text or null"),
    (["model", "backend_config"], [], "model.backend_config is a list, it must be a mapping or null"),
    (["model", "img_resolution"], 0, "model.img_resolution is 0"),
    (["model", "guidance_type"], "cgf", 'model.guidance_type is "cgf", it must be uncond, cfg, cg or null'),
    (["model", "guidance_rate"], float("nan"), "model.guidance_rate is NaN, it must be a number or null"),
    (["tables", "r"], None, "tables.r is missing, it must be a list of rows"),
    (["tables", "r"], [[0.5, 0.5]], "tables.r has 1 rows, 3 sigmas have 2 intervals"),
    (["tables", "r", 1], 0.5, "tables.r[1] must be a list of 2 numbers, one per point"),
    (["tables", "r", 1, 0], "0.5", 'tables.r[1][0] is "0.5", it must be a number'),
    (["tables", "r", 1, 0], 1.0, "tables.r[1][0] is 1, it must be between 0 and 1"),
    (["tables", "r", 0, 1], 0, "tables.r[0][1] is 0, it must be between 0 and 1"),
    (["tables", "r", 0, 1], float("inf"), "tables.r[0][1] is Infinity, it must be a number"),
    (["tables", "r", 0, 1], 10**400, "too large"),
    (["tables", "weight", 1], [0.5, 0.6], "tables.weight[1] sums to 1.1, it must sum to 1"),
    (["tables", "weight", 1], [0.5, 0.50002], "tables.weight[1] sums to 1.00002, it must sum to 1"),
    (["tables", "weight", 1], [1.2, -0.2], "tables.weight[1][1] is -0.2, it must be 0 or greater"),
    (["tables", "scale_dir", 0, 0], 0.0, "tables.scale_dir[0][0] is 0, it must be greater than 0"),
    (["tables", "scale_time", 0, 0], -1.0, "tables.scale_time[0][0] is -1, it must be greater than 0"),
    (["raw", "r", 0, 0], 9.0, "raw.r does not reproduce tables.r (they differ by 0."),
    (["raw", "weight"], [[0, 0], [0, 0]], "raw.weight does not reproduce tables.weight"),
    (["raw", "scale_dir"], None, "raw.scale_dir is missing, it must be a list of rows"),
    (["raw", "scale_dir_range"], 0.0, "raw.scale_dir does not reproduce tables.scale_dir"),
    (["raw", "scale_time_range"], -0.1, "raw.scale_time_range is -0.1, it must be 0 or greater"),
    (["raw", "scale_time_range"], ..., "raw.scale_time_range is missing"),
    (["solver", "fix_last_scale_dir"], True, "raw.scale_dir does not reproduce tables.scale_dir"),
    (["nfe", "para_nfe"], 4, "nfe.para_nfe is 4, its tables need 3"),
    (["solver", "afs"], False, "nfe.para_nfe is 3, its tables need 4"),
]  # fmt: skip


@pytest.mark.parametrize("path, value, words", BROKEN, ids=[f"{'.'.join(map(str, row[0]))}-{n}" for n, row in enumerate(BROKEN)])
def test_each_rule_has_its_sentence(path, value, words):
    assert words in refused(changed(path, value))


def test_small_differences_are_accepted_and_other_contents_refused():
    within = document()
    within["tables"]["weight"][0] = [value + 4e-6 for value in within["tables"]["weight"][0]]
    within["raw"] = None
    predictor.from_document(within, "FILE")
    near = document()
    near["tables"]["r"][0][0] += 9e-7
    predictor.from_document(near, "FILE")
    near["tables"]["r"][0][0] += 9e-7
    assert "raw.r does not reproduce" in refused(near)
    for content in (None, [], "text", {}, {"format": "epd-predictor"}):
        refused(content)


def test_files_that_are_none_are_refused(tmp_path):
    def message(name, data=None):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            predictor_files.read(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be read: No such file" in message("absent.json")
    assert "cannot be read: No such file" in message("absent.safetensors")
    assert "is damaged" in message("cut.json", json.dumps(document()).encode()[:-20])
    assert "is damaged" in message("binary.json", b"\xff\xfe\x00")
    assert "is damaged: it has NaN, which is no number of JSON" in message("nan.json", b'{"format": NaN}')
    assert "is damaged" in message("deep.json", b"[" * 100000)
    assert "its name must end in .json or .safetensors" in message("predictor.txt", b"{}")
    assert "scripts/convert_epd_predictor.py" in message("network-snapshot-000010.pkl", b"")
    for number, data in enumerate((b"", b"text", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}",
                                   struct.pack("<Q", 4) + b"null")):  # fmt: skip
        assert "is damaged" in message(f"{number}.safetensors", data)
    from safetensors.torch import save

    assert "its header has no 'epd_predictor'" in message("none.safetensors", save({"r": torch.ones(2, 2)}))
    assert "its header has no mapping" in message(
        "raw.safetensors", save({"raw.r": torch.ones(2, 2)}, {"epd_predictor": '{"raw": 3}'}))  # fmt: skip
    assert "its format is not" in message("list.safetensors", save({"r": torch.ones(2, 2)}, {"epd_predictor": "[]"}))
    small = changed(["tables"], {}) | {"raw": None}
    assert "tables.weight is missing" in message(
        "part.safetensors", save({"r": torch.full((2, 2), 0.5)}, {"epd_predictor": json.dumps(small)}))  # fmt: skip


def test_unwritable_places_are_one_sentence(tmp_path):
    content = predictor.from_document(document(), "FILE")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/p.json", tmp_path / "file/p.safetensors"):
        with pytest.raises(UserError, match="cannot be written"):
            predictor_files.write(content, path)
    with pytest.raises(UserError, match="must end in"):
        predictor_files.write(content, tmp_path / "p.pt")


def test_extreme_tables_survive_both_forms(tmp_path):
    whole = document() | {"raw": None}
    whole["tables"] |= {"r": [[1e-9, 1 - 1e-9], [0.5, 0.5]], "weight": [[1.0, 0.0], [0.3, 0.7]]}
    for suffix in (".json", ".safetensors"):
        predictor_files.write(predictor.from_document(copy.deepcopy(whole), "FILE"), tmp_path / f"p{suffix}")
        assert predictor_files.read(tmp_path / f"p{suffix}").tables.weight[0].tolist() == [1, 0]


def save_in(folder, file, **changes):
    predictor_files.write(predictor.from_document(document() | changes, "FILE"), folder / file)
    return folder / file


def test_look_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = save_in(Path("exps/00002-cifar10-3-3-epd"), "predictor-000005.json", name="five")
    two = save_in(Path("exps/00002-cifar10-3-3-epd"), "predictor-000010.json", name="ten")
    os.utime(one, (2e9, 2e9))  # the number in the name decides
    save_in(Path("exps/00003-a"), "predictor-000010.safetensors")
    export = save_in(Path("exps/00003-a/export"), "predictor.json", name="export")
    old = save_in(Path("exps/000021-other"), "predictor.json")
    save_in(Path("exps/00004-b"), "predictor-000010.json")
    save_in(Path("exps/00004-c"), "predictor-000010.json")
    Path("exps/00005-d").mkdir()
    Path("exps/00006-e").mkdir()
    Path("exps/00006-e/network-snapshot-000010.pkl").write_bytes(b"")
    for wanted, path in (("2", two), ("00002", two), (2, two), ("exps/00002-cifar10-3-3-epd", two), (str(one), one), ("3", export),
                         ("exps/00003-a/", export), ("exps/00003-a/export", export), ("exps/000021-other", old)):  # fmt: skip
        assert predictor_files.find(wanted) == path
    assert predictor_files.load("2").name == "ten" and predictor_files.load("2", tmp_path / "exps").name == "ten"
    Path("7").mkdir()
    for wanted, words in (
        ("4", "of 00004 there must be one folder in exps, there is 00004-b, 00004-c."),
        ("12345", "of 12345 there must be one folder in exps, there is none."),
        ("21", "there is none"),
        ("5", "holds no predictor*.json and no predictor*.safetensors."),
        ("6", "convert its .pkl with scripts/convert_epd_predictor.py"),
        ("7", "holds no predictor*.json"),
        ("nothing.json", "nothing.json is neither a file, nor a folder, nor the number of an experiment."),
    ):
        with pytest.raises(UserError) as caught:
            predictor_files.find(wanted)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_description_has_the_facts_and_a_row_per_point():
    text = predictor.describe(predictor.from_document(document(), "FILE"))
    lines = text.splitlines()
    assert lines[0] == "one (distilled)"
    for fact in ("cifar10: edm, 32 px, no guidance", "ipndm, 2 points per interval, order 3 history, analytic first step",
                 "time_uniform rho 1, 3 sigmas from 80 to 0.002", "3 sequential, 5 evaluations in all, 2 intervals",
                 "dpm, 9 points"):  # fmt: skip
        assert fact in text
    rows = lines[-4:]
    assert rows[0].startswith("0         80 -> 2.8237") and rows[2].startswith("1         2.8237 -> 0.002")
    tables = predictor.from_document(document(), "FILE").tables
    assert f"{tables.r[1, 1]:.5f}" in rows[3] and f"{80 ** (1 - tables.r[0, 0]) * 2.823688824 ** tables.r[0, 0]:.5g}" in rows[0]
    guided = changed(["model", "guidance_type"], "cfg")
    guided["model"] |= {"guidance_rate": 7.5, "backend": "ldm"}
    assert "guidance cfg 7.5" in predictor.describe(predictor.from_document(guided, "FILE"))
    assert "twice: 6 sequential" in predictor.describe(predictor.from_document(guided, "FILE"))
    bare = changed(["model"], {}) | {"teacher": None, "raw": None}
    bare["schedule"]["rho"] = None
    assert "not named: unknown family, no guidance" in predictor.describe(predictor.from_document(bare, "FILE"))


def test_released_predictors_load_and_keep_their_content(pytestconfig, tmp_path):
    """The published tables, where a folder of golden numbers has them; they are no part of the repository."""
    found = sorted((Path(pytestconfig.getoption("--conformance")) / "epd/predictors").glob("*.json"))
    if not found:
        pytest.skip("no epd/predictors in the folder of --conformance")
    for path in found:
        content, stored = predictor_files.read(path), json.loads(path.read_text())
        assert stored["nfe"].items() <= content.nfe._asdict().items() and content.raw is not None
        kept = predictor.to_document(content)
        assert {name: kept[name] for name in stored if name not in ("raw", "tables", "schedule")} == {
            name: stored[name] for name in stored if name not in ("raw", "tables", "schedule")}  # fmt: skip
        assert kept["tables"] == stored["tables"] and kept["schedule"] == stored["schedule"]
        for suffix in (".json", ".safetensors"):
            predictor_files.write(content, tmp_path / f"p{suffix}")
            again = predictor_files.read(tmp_path / f"p{suffix}")
            assert all((one - two).abs().max() < 1e-7 for one, two in zip(again.tables, content.tables, strict=True))
            assert all(torch.equal(one, two) for one, two in zip(again.raw[:4], content.raw[:4], strict=True))
        assert content.name in predictor.describe(content)


def test_folders_that_are_nearly_right_are_pointed_out(tmp_path):
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    (tmp_path / "run/checkpoint-2/trainer_state.json").write_text("{}")
    (tmp_path / "run/checkpoint-2/random_states_0.pkl").write_text("")
    (tmp_path / "run/export").mkdir()
    for wanted, hint in (("run/checkpoint-2", "give the folder of the run, one above"), (".", "it holds runs that do: run")):
        with pytest.raises(UserError, match=hint):
            predictor_files.find(tmp_path / wanted)
