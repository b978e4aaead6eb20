"""Counted network calls, rows and multiply-accumulates, against counts by hand."""

import itertools
import json
from pathlib import Path

import pytest
import random_predictor
import tiny_pipelines
import torch
from diffusers import HeunDiscreteScheduler
from safetensors.torch import save_file

from brisk import edm_nets, epd, eval_models, fpdm_sampling, macs, predictor_files, sampling_cost

TEACHER = Path(__file__).resolve().parents[2] / "assets/tiny-teacher"
CAPTIONS, SEEDS = ["a red handwritten seven on a yellow background"] * 3, [0, 1, 2]


def cost(model, plan, conditions=CAPTIONS, batch_size=3, repeats=1):
    return sampling_cost.measure(model, plan, conditions, SEEDS, batch_size, repeats, 0)


@pytest.fixture(scope="module")
def teacher():
    return eval_models.load(TEACHER)


@pytest.mark.parametrize(
    ("nfe", "guidance", "scheduler", "rows"),
    [(3, 2.0, None, 2), (4, 1.0, "lcm", 1), (5, 2.0, "pndm", 2)],
)
def test_a_guided_pair_is_one_call_of_two_rows(teacher, nfe, guidance, scheduler, rows):
    found = cost(teacher, eval_models.plan(teacher, nfe, guidance, scheduler))
    assert (found["nfe"], found["total_nfe"]) == (nfe, rows * nfe)
    size = macs.unet_size(teacher.network.config, teacher.network.config.sample_size, teacher.own.tokenizer.model_max_length)
    assert found["parameters"] == size.parameters
    assert found["gmacs_per_image"] == pytest.approx(rows * nfe * size.total / 1e9, rel=1e-12)


def test_heun_calls_its_network_twice_a_step(tmp_path):
    pipe = tiny_pipelines.make("sdxl")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    model = eval_models.load(tmp_path)
    found = cost(model, eval_models.plan(model, 5))
    assert (found["nfe"], found["total_nfe"]) == (5, 10)
    size = macs.unet_size(model.network.config, model.network.config.sample_size, pipe.tokenizer.model_max_length)
    assert found["gmacs_per_image"] == pytest.approx(10 * size.total / 1e9, rel=1e-12)


@pytest.mark.parametrize(("points", "guided", "afs"), itertools.product((1, 2), (False, True), (False, True)))
def test_points_of_a_predictor_are_drawn_together(tmp_path, points, guided, afs):
    tiny_pipelines.make("sd1").save_pretrained(tmp_path / "sd1")
    guidance = {"guidance_type": "cfg", "guidance_rate": 2.0} if guided else {}
    content = random_predictor.make_predictor(points, afs, num_steps=3, backend="sd",
                                              backend_config={"model_name_or_path": str(tmp_path / "sd1")}, **guidance)  # fmt: skip
    predictor_files.write(content, tmp_path / "predictor.json")
    model = eval_models.load(tmp_path / "predictor.json")
    found, wanted = cost(model, eval_models.plan(model)), epd.cost(3, points, afs, guided)
    assert found["nfe"] == wanted.para_nfe == model.fixed_nfe
    assert found["total_nfe"] == wanted.total_nfe * (2 if guided else 1)
    size = macs.unet_size(model.network.config, model.network.config.sample_size, 16)
    assert found["gmacs_per_image"] == pytest.approx(found["total_nfe"] * size.total / 1e9, rel=1e-12)


def test_edm_networks_are_counted_where_they_are_called(tmp_path):
    config = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
              "num_blocks": 1, "attn_resolutions": [4], "label_dim": 4}  # fmt: skip
    network = edm_nets.make_network(config)
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm/config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "edm/model.safetensors")
    content = random_predictor.make_predictor(num_steps=3, backend="edm", img_resolution=8,
                                              backend_config={"model_name_or_path": str(tmp_path / "edm")})  # fmt: skip
    predictor_files.write(content, tmp_path / "predictor.json")
    model = eval_models.load(tmp_path / "predictor.json")
    assert (model.takes, model.classes) == ("classes", 4)
    found = cost(model, eval_models.plan(model), [3, 1, 2])
    assert (found["nfe"], found["total_nfe"]) == (4, 6)
    one = macs.count(edm_nets.make_network(config).model.to("meta"), x=torch.empty(1, 3, 8, 8, device="meta"),
                     noise=torch.empty(1, device="meta"), labels=torch.empty(1, 4, device="meta"))  # fmt: skip
    assert found["gmacs_per_image"] == pytest.approx(6 * one.total / 1e9) and one.total > 0


@pytest.mark.parametrize("reuse", [False, True])
def test_fixed_point_networks_cost_what_their_iterations_do(tmp_path, reuse):
    pipe = tiny_pipelines.make("fpdm")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.vae.save_pretrained(tmp_path / "vae")
    model = eval_models.load(tmp_path)
    found = cost(model, eval_models.plan(model, 4, 2.0, iterations=5, reuse=reuse), [1, 2, 3])
    made = fpdm_sampling.make_plan(model.network, 4, guidance_scale=2.0, iterations=5, reuse=reuse)
    wanted = fpdm_sampling.cost(model.network, made)
    assert (found["nfe"], found["total_nfe"]) == (wanted.calls, wanted.calls * wanted.rows) == (4, 8)
    assert found["gmacs_per_image"] == pytest.approx(wanted.macs / 1e9)


def test_a_predictor_on_a_fixed_point_network_costs_its_iterations(tmp_path):
    pipe = tiny_pipelines.fpdm_pipeline(prediction_type="v_prediction")
    pipe.transformer.save_pretrained(tmp_path / "run/transformer")
    pipe.vae.save_pretrained(tmp_path / "run/vae")
    content = random_predictor.make_predictor(num_steps=3, backend="dit", img_resolution=16, guidance_type="cfg",
                                              backend_config={"model_name_or_path": str(tmp_path / "run")},
                                              guidance_rate=2.0)  # fmt: skip
    predictor_files.write(content, tmp_path / "predictor.json")
    model = eval_models.load(tmp_path / "predictor.json")
    found = cost(model, eval_models.plan(model), [1, 2, 3])
    assert (found["nfe"], found["total_nfe"]) == (4, 12)
    made = fpdm_sampling.make_plan(model.network, 3, guidance_scale=2.0)
    assert found["gmacs_per_image"] == pytest.approx(2 * fpdm_sampling.cost(model.network, made).macs / 1e9)


def test_times_and_memory_are_of_whole_batches(teacher):
    plan, sizes = eval_models.plan(teacher, 1, 1.0), []

    def draw(conditions, seeds):
        sizes.append((len(conditions), len(seeds)))
        return plan.draw(conditions, seeds)

    found = sampling_cost.measure(teacher, plan._replace(draw=draw), CAPTIONS, SEEDS, 2, repeats=3, warmup=1)
    assert sizes == [(1, 1), (2, 2)] * 5, "counted, warmed up, timed three times, in turns"
    for name in ("seconds_alone", "seconds_per_image"):
        assert 0 < found[f"{name}_min"] <= found[name] <= found[f"{name}_max"]
    assert found["peak_memory_gib"] > 0.05
    assert not teacher.network._forward_pre_hooks
    alone = cost(teacher, plan, batch_size=1)
    assert alone["seconds_alone"] == alone["seconds_per_image"]


def test_seconds_are_per_image(teacher, monkeypatch):
    taken = iter([2.0, 9.0, 1.0, 3.0, 4.0, 6.0])  # alone, together, alone, ...
    monkeypatch.setattr(sampling_cost, "time_once", lambda device, call: (next(taken), None))
    found = cost(teacher, eval_models.plan(teacher, 1, 1.0), repeats=3)
    assert [found[f"seconds_alone{end}"] for end in ("", "_min", "_max")] == [2.0, 1.0, 4.0]
    assert [found[f"seconds_per_image{end}"] for end in ("", "_min", "_max")] == [2.0, 1.0, 3.0]


def test_models_that_take_nothing_are_measured(tmp_path):
    tiny_pipelines.make("ldm").save_pretrained(tmp_path)
    model = eval_models.load(tmp_path)
    found = cost(model, eval_models.plan(model, 2), None, batch_size=50)
    assert (found["nfe"], found["total_nfe"]) == (2, 2) and found["gmacs_per_image"] > 0


class Reader(torch.nn.Module):
    """A network that looks at values, which the meta device does not have."""

    def forward(self, sample, scale=1.0):
        return sample if sample.sum() > 0 else scale * sample


def test_what_cannot_be_counted_is_left_out_and_arguments_are_found_by_name():
    network = Reader()
    rows, first = sampling_cost.watch_calls(network, lambda: network(torch.ones(3, 2), scale=2.0))
    assert rows == [3] and first["scale"] == 2.0
    assert sampling_cost.call_macs(network, first) is None
    linear = torch.nn.Linear(4, 5)
    assert sampling_cost.call_macs(linear, {"input": torch.ones(7, 4)}) == 20, "of one row"
    assert linear.weight.device.type == "cpu"
    nest = sampling_cost.one_row({"a": [torch.ones(2, 3), torch.ones(5)], "b": "text"}, 2)
    assert nest["a"][0].shape == (1, 3) and nest["a"][1].shape == (5,) and nest["b"] == "text"
    assert nest["a"][0].device.type == "meta"


def test_a_call_is_timed_once():
    called = []
    seconds, memory = sampling_cost.time_once(torch.device("cpu"), lambda: called.append(1))
    assert called == [1] and seconds >= 0 and memory is None
