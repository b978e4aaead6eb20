"""Sampling with DiT and FPDM networks: plans, the loop, reuse, early exit, pipelines."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline, EulerDiscreteScheduler
from tiny_dit import make_network

from brisk import dit, fixed_point, fpdm, fpdm_sampling, gaussian, options, seeding, tiny
from brisk.fpdm_pipeline import FPDMPipeline
from brisk.fpdm_sampling import make_plan, sample_latents, solver_settings

LABELS = torch.tensor([1, 7, 0, 9, 4])


def generators(indices):
    return [seeding.generator(3, "noise", index) for index in indices]


def draw(network, plan, indices=range(5), labels=LABELS):
    return sample_latents(network, labels[list(indices)], generators(indices), plan)


def watch(network):
    """The calls that reach the network: (latents, timestep, labels, keyword arguments)."""
    calls = []

    def note(module, inputs, named):
        calls.append((*inputs, named))

    network.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("settings", [
    {"guidance_scale": 4.0, "reuse": True, "iterations": 3},
    {"sampler": "ddim", "eta": 0.7},
    {"guidance_scale": 2.0, "iterations": 8, "solver": solver_settings("anderson", 0.05, 1, 1, per_sample=True), "reuse": True},
], ids=["ddpm", "ddim", "per sample exit"])  # fmt: skip
def test_a_sample_does_not_depend_on_its_batch(settings):
    network = make_network()
    plan = make_plan(network, 4, **settings)
    whole = draw(network, plan)
    for part in ([0, 1], [2, 3, 4], [3]):
        found = draw(network, plan, part)
        torch.testing.assert_close(found.latents, whole.latents[part], atol=2e-4, rtol=2e-4)
        assert found.iterations.equal(whole.iterations[:, part])
    assert whole.latents.std() > 0.1 and not whole.latents[0].equal(whole.latents[1])


def test_what_the_network_is_called_with():
    network = make_network()
    calls = watch(network)
    plan = make_plan(network, 5, guidance_scale=3.0, iterations=4, schedule="increasing", reuse=True, first_iterations=9)
    draw(network, plan)
    assert plan.iterations == [*fixed_point.iteration_schedule(5, 4, "increasing")[:4], 9]
    assert [int(timestep) for _, timestep, _, _ in calls] == [999, 749, 500, 250, 0]
    assert [named["num_iters"] for *_, named in calls] == plan.iterations[::-1]
    for latents, _, labels, _ in calls:  # both halves are the same images, the second without a label
        assert len(latents) == 10 and latents[:5].equal(latents[5:])
        assert labels.tolist() == LABELS.tolist() + [10] * 5
    calls.clear()
    draw(network, make_plan(network, 2))
    assert [len(latents) for latents, *_ in calls] == [5, 5]
    assert [labels.tolist() for _, _, labels, _ in calls] == [LABELS.tolist()] * 2


def test_vectors_are_dropped_to_zeros():
    network = make_network(label_type="vector", label_dim=3)
    calls = watch(network)
    samples = draw(network, make_plan(network, 2, guidance_scale=2.0), labels=torch.ones(5, 3))
    assert samples.latents.isfinite().all()
    assert calls[0][2].sum(1).tolist() == [3.0] * 5 + [0.0] * 5


def test_reuse_is_passing_the_state_on():
    network = make_network()
    plan = make_plan(network, 3, "ddim", guidance_scale=2.0, iterations=2, reuse=True, first_iterations=0)
    found = draw(network, plan).latents
    tables = gaussian.make_tables(network.betas(), plan.timesteps)
    x = torch.stack([torch.randn(4, 4, 4, generator=generator) for generator in generators(range(5))])
    labels, state = torch.cat([LABELS, torch.full_like(LABELS, 10)]), None
    with torch.no_grad():
        for step in (2, 1, 0):
            output = network(torch.cat([x, x]), plan.timesteps[step], labels, 2, state)
            state = output.state
            guided = dit.guide(output.sample, 2.0, 4)[:, :4]
            x = gaussian.ddim_step(tables, guided, x, torch.full((5,), step), "epsilon")
    torch.testing.assert_close(found, x)
    cold = draw(network, plan._replace(reuse=False)).latents
    assert (cold - found).abs().max() > 1e-3


def test_the_loop_follows_the_golden_trajectories(pytestconfig, monkeypatch):
    golden = json.loads((Path(pytestconfig.getoption("--conformance")) / "fpdm/trajectories.json").read_text())
    shape = golden["shape"]
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    for case in golden["cases"]:
        count = case["num_steps"]
        betas = gaussian.zero_terminal_snr(gaussian.linear_betas()) if case["zero_snr"] else gaussian.linear_betas()
        added = [1.2 * torch.sin(100 + i + 0.71 * k + 0.013 * (k * k % 700)) for i in range(1, count)]
        noises = [*added, torch.tensor(golden["x_T"])]
        monkeypatch.setattr(fpdm_sampling, "draw_noise", lambda *_, left=noises: left.pop().float().reshape(shape))

        def analytic(x, t, labels):
            t = int(t)
            prediction = 0.8 * x * (0.3 + t / 1000) + 0.1 * torch.sin(3 * x + 5 * t / 1000)
            return fpdm.FPDMOutput(torch.cat([prediction, torch.tanh(0.7 * x - t / 1000)], 1))

        analytic.config = SimpleNamespace(
            in_channels=shape[1], sample_size=shape[2], prediction_type=case["prediction"], fixed_point=False, label_type="class",
            zero_terminal_snr=case["zero_snr"],
        )  # fmt: skip
        analytic.betas, analytic.dtype, analytic.device = (lambda betas=betas: betas), torch.float32, torch.device("cpu")
        plan = make_plan(analytic, count, case["sampler"], case["eta"])
        found = sample_latents(analytic, torch.zeros(shape[0]), None, plan).latents
        torch.testing.assert_close(found.double().flatten(), torch.tensor(case["final"]).double(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", [
    {"fixed_point": False}, {"out_channels": 4}, {"prediction_type": "flow", "out_channels": 4},
    {"prediction_type": "v_prediction", "zero_terminal_snr": True}, {"label_type": "none", "num_classes": 1},
], ids=["DiT", "fixed variance", "flow", "zero SNR", "unlabelled"])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 4, "2,3"])
def test_every_kind_of_network_is_sampled(kind, steps):
    network = make_network(**kind)
    if kind.get("prediction_type") == "flow" and steps == "2,3":
        with pytest.raises(ValueError, match="equal steps"):
            make_plan(network, steps)
        return
    plan = make_plan(network, steps)
    assert plan.timesteps[-1] == 999 and len(plan.timesteps) == {1: 1, 4: 4, "2,3": 5}[steps]
    samples = draw(network, plan, labels=LABELS.clamp(max=network.config.num_classes - 1))
    assert samples.latents.shape == (5, 4, 4, 4) and samples.latents.isfinite().all()
    assert (samples.iterations is None) == (not network.config.fixed_point)
    if kind.get("prediction_type") == "flow":
        assert plan.sampler == "flow"


def test_flow_takes_euler_steps_towards_the_image():
    network = make_network(prediction_type="flow", out_channels=4)
    start = fpdm_sampling.draw_noise(generators(range(5)), (4, 4, 4), "cpu")
    with torch.no_grad():
        x = start + network(start, 999, LABELS).sample / 2
        x = x + network(x, 0, LABELS).sample / 2
    torch.testing.assert_close(draw(network, make_plan(network, 2)).latents, x)


def test_the_first_cold_timestep_gets_more_iterations_where_later_ones_reuse():
    plan = fpdm_sampling.plan_iterations
    assert plan(4, 3, reuse=True) == [3, 3, 3, 8]
    assert plan(4, 12, reuse=True) == [12] * 4
    assert plan(4, 3, reuse=True, first=0) == [3] * 4
    assert plan(4, 3) == [3] * 4
    assert plan(4, 3, first=5) == [3, 3, 3, 5]
    assert sum(plan(20, 3, "decreasing")) == 60  # no budget is exceeded unasked
    assert plan(20, 3, "increasing", first=0)[-1] > plan(20, 3, "increasing", first=0)[0]


def test_costs_are_the_published_ones():
    sized = SimpleNamespace(**dit.size_of("DiT-XL/2"), sample_size=32, in_channels=4, fixed_point=True, pre_depth=1, post_depth=1,
                            prediction_type="epsilon", zero_terminal_snr=False, label_type="class")  # fmt: skip
    network = SimpleNamespace(config=sized, default_iterations=26)
    cost = fpdm_sampling.cost(network, make_plan(network, 40, iterations=12, reuse=True))
    assert (cost.calls, cost.rows, cost.blocks) == (40, 1, 560)
    assert cost.macs / 1e12 == pytest.approx(3.06, abs=0.005)
    assert fpdm_sampling.cost(network, make_plan(network, 40, iterations=12, guidance_scale=4.0)).macs == 2 * cost.macs
    assert fpdm_sampling.cost(network, make_plan(network, 20)).blocks == 560
    sized.fixed_point = False
    assert fpdm_sampling.cost(network, make_plan(network, 20))[2:] == (560, pytest.approx(2.37e12, rel=2e-3))


@pytest.mark.parametrize("network, settings, said", [
    ({}, {"steps": "none"}, "no positive number"), ({}, {"steps": "0"}, "no positive number"),
    ({}, {"steps": "ddim5,5"}, "one number"), ({}, {"steps": 1001}, "1000 timesteps cannot be divided into 1001"),
    ({}, {"steps": "ddim999"}, "no stride"), ({}, {"steps": 2, "guidance_scale": 0.5}, "below 1"),
    ({}, {"steps": 2, "guided_channels": 5}, "latents have 4"),
    ({"label_type": "none"}, {"steps": 2, "guidance_scale": 4.0}, "knows no labels"),
    ({"prediction_type": "v_prediction", "zero_terminal_snr": True}, {"steps": "ddim50"}, "leave out timestep 999"),
    ({"prediction_type": "flow", "out_channels": 4}, {"steps": 2, "sampler": "ddim"}, "Euler"),
])  # fmt: skip
def test_plans_that_contradict_the_network(network, settings, said):
    with pytest.raises(ValueError, match=said):
        make_plan(make_network(**network), **settings)


def test_nothing_is_read_from_the_device(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no such device
    network = make_network().to("meta")  # where reading a value is an error
    plan = make_plan(network, 3, guidance_scale=2.0, reuse=True, solver=solver_settings(measure=True))
    samples = sample_latents(network, LABELS.to("meta"), generators(range(5)), plan)
    assert samples.latents.device.type == "meta" and samples.residual.shape == (3, 5)


def test_half_precision_concerns_the_network_alone():
    network = make_network()
    plan = make_plan(network, 6, "ddim", iterations=3, reuse=True)
    exact = draw(network, plan).latents
    calls = watch(network.to(torch.bfloat16))
    rough = draw(network, plan).latents
    assert rough.dtype == torch.float32 and {latents.dtype for latents, *_ in calls} == {torch.bfloat16}
    assert 0 < ((rough - exact).norm() / exact.norm()).item() < 0.1


def contraction(rates):
    """A map whose sample b approaches its fixed point by `rates[b]` in each evaluation."""
    rates = torch.tensor(rates)[:, None]

    def step(z, rows=None):
        return 1 + (rates if rows is None else rates[rows]) * (z - 1)

    return step


def test_each_sample_stops_by_itself_and_keeps_its_state():
    rates, start = [0.1, 0.8, 0.5, 0.6, 0.3], torch.zeros(5, 3)
    settings = {"tolerance": 0.02, "check_every": 2, "per_sample": True}
    state, used, rho = fixed_point.solve(contraction(rates), start, 20, **settings)
    for number, rate in enumerate(rates):
        alone = fixed_point.solve(contraction([rate]), start[:1], 20, **settings)
        torch.testing.assert_close(state[number : number + 1], alone[0])
        torch.testing.assert_close(rho[number : number + 1], alone[2])
        assert used[number] == alone[1]
    assert len(set(used.tolist())) > 2 and (rho <= 0.02).all()
    shared = fixed_point.solve(contraction(rates), start, 20, tolerance=0.02, check_every=2)
    assert len(set(shared[1].tolist())) == 1 and shared[2].mean() <= 0.02
    assert fixed_point.solve(contraction(rates), start, 5, tolerance=1e-9)[1].tolist() == [5] * 5
    assert fixed_point.solve(contraction(rates), start, 20, tolerance=9.0, minimum=7, check_every=1)[1].tolist() == [7] * 5


def test_a_guided_pair_stops_together():
    state, used, rho = fixed_point.solve(
        contraction([0.1, 0.7, 0.5, 0.2]), torch.zeros(4, 3), 30, tolerance=0.02, check_every=1, per_sample=True, paired=True
    )
    assert used.tolist() == [used[0], used[1]] * 2 and used[0] != used[1]
    single = fixed_point.solve(contraction([0.5]), torch.zeros(1, 3), 30, tolerance=0.02, check_every=1, per_sample=True)
    assert used[0] == single[1]  # the slower half decides


def test_the_record_of_a_run_with_tolerance(tmp_path):
    network = make_network()
    tight = make_plan(network, 4, guidance_scale=2.0, iterations=12, reuse=True,
                      solver=solver_settings(tolerance=0.05, per_sample=True))  # fmt: skip
    samples = draw(network, tight)
    assert samples.iterations.shape == samples.residual.shape == (4, 5)
    rows = fpdm_sampling.convergence(tight, samples.iterations, samples.residual)
    assert [row["timestep"] for row in rows] == [999, 666, 333, 0] and {row["budget"] for row in rows} == {12}
    for row in rows:
        assert 1 <= row["iterations_min"] <= row["iterations"] <= row["iterations_max"] <= 12
        assert 0 <= row["residual_min"] <= row["residual"] <= row["residual_max"]
        assert row["iterations_max"] == 12 or row["residual_max"] <= 0.05
    assert rows[-1]["iterations"] < 12
    fpdm_sampling.draw_convergence(tmp_path / "c.png", rows, "title")
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert draw(network, make_plan(network, 2)).residual is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(network, folder of its pipeline)."""
    network, folder = make_network(), tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    fpdm.save_pipeline(folder, network, tiny.make_vae("tiny"), {label: f"name {label}, word {label}" for label in range(10)})
    return network, folder


def load(cls, folder, scheduler=None):
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.parametrize("cls", [DiTPipeline, DiffusionPipeline])
def test_the_saved_folder_samples_in_stock_pipelines(saved, cls):
    network, folder = saved
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    for scheduler in (None, DDIMScheduler):
        pipeline = load(cls, folder, scheduler)
        assert type(pipeline) is DiTPipeline and pipeline.get_label_ids(["word 3"]) == [3]
        images = pipeline([1, 2], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        assert images.shape == (2, 16, 16, 3) and images.std() > 0.01
    for name, weight in pipeline.transformer.state_dict().items():
        assert weight.equal(network.state_dict()[name]), name


def test_the_exported_scheduler_steps_as_we_do(monkeypatch):
    network = make_network()
    scheduler = fpdm.export_scheduler(network.config)
    assert (scheduler.config.variance_type, scheduler.config.timestep_spacing) == ("learned_range", "linspace")
    scheduler.set_timesteps(10)
    plan = make_plan(network, 10)
    assert scheduler.timesteps.tolist() == plan.timesteps[::-1]
    tables = gaussian.make_tables(network.betas(), plan.timesteps)
    torch.manual_seed(0)
    x, output = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 4, 4)
    theirs = scheduler.step(output, plan.timesteps[5], x, generator=torch.Generator().manual_seed(7)).prev_sample
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    ours = gaussian.ddpm_step(tables, output, x, torch.full((2,), 5), "epsilon", noise)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    zero = fpdm.export_scheduler(make_network(prediction_type="v_prediction", zero_terminal_snr=True).config)
    assert zero.alphas_cumprod[-1] == 0 and zero.config.prediction_type == "v_prediction"
    fixed = make_network(out_channels=4).config
    for kind in (True, False):
        scheduler = fpdm.export_scheduler(fixed, sees_variance=kind)
        assert scheduler.config.variance_type == "fixed_large"
    scheduler.set_timesteps(10)
    theirs = scheduler.step(output[:, :4], plan.timesteps[5], x, generator=torch.Generator().manual_seed(7)).prev_sample
    monkeypatch.setattr(fpdm_sampling, "draw_noise", lambda *_: noise)
    ours = fpdm_sampling.take_step(tables, output[:, :4], x, 5, plan, fixed, None)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(options.UserError, match="flow"):
        fpdm.export_scheduler(make_network(prediction_type="flow", out_channels=4).config)


def test_our_pipeline_is_our_loop(saved):
    network, folder = saved
    pipeline = load(FPDMPipeline, folder)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "num_iters": 3, "reuse_solution": True,
                "iter_schedule": "increasing"}  # fmt: skip
    output = pipeline(LABELS.tolist(), generator=generators(range(5)), output_type="latent", report_convergence=True, **settings)
    plan = make_plan(network, 4, guidance_scale=3.0, iterations=3, schedule="increasing", reuse=True)
    torch.testing.assert_close(output.images, draw(network, plan).latents)
    assert [row["budget"] for row in output.convergence] == plan.iterations[::-1]
    deterministic = load(FPDMPipeline, folder, DDIMScheduler)
    latents = deterministic(LABELS.tolist(), generator=generators(range(5)), output_type="latent", **settings).images
    torch.testing.assert_close(latents, draw(network, plan._replace(sampler="ddim")).latents)
    images, report = pipeline([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert images[0].size == (16, 16) and report is None
    twice = [pipeline([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images] * 2
    assert twice[0].equal(twice[1]) and twice[0].shape == (1, 3, 16, 16)


def test_our_pipeline_refuses(saved):
    pipeline = load(FPDMPipeline, saved[1])
    with pytest.raises(ValueError, match="class 10 is out of range"):
        pipeline([3, 10], num_inference_steps=2)
    with pytest.raises(ValueError, match="2 generators"):
        pipeline([3], generator=generators(range(2)))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="not like EulerDiscreteScheduler"):
        pipeline([3], num_inference_steps=2)


def test_our_pipeline_needs_no_autoencoder_for_latents_and_saves_as_the_stock_one(saved, tmp_path):
    unlabelled = make_network(label_type="none", num_classes=1)
    pipeline = FPDMPipeline(unlabelled, None, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0], num_inference_steps=2, output_type="latent").images.shape == (1, 4, 4, 4)  # guidance 1 by itself
    load(FPDMPipeline, saved[1], DDIMScheduler).save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16*.safetensors"))) > 1
    again = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert type(again) is DiTPipeline and type(again.scheduler) is DDIMScheduler
    assert again.get_label_ids(["name 4", "word 4"]) == [4, 4]


def test_solution_reuse_inside_the_network():
    network, x, later = make_network(), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    labels = torch.tensor([1, 2])

    def call(latents, timestep, state=None):
        with torch.no_grad():
            return network(latents, timestep, labels[: len(latents)], num_iters=2, init_state=state)

    first, cold = call(x, 999), call(later, 500)
    warm = call(later, 500, first.state)
    network.enable_solution_reuse()
    assert call(x, 999).sample.equal(first.sample)
    assert call(later, 500).sample.equal(warm.sample)
    assert call(later, 700).sample.equal(call_without(network, later, 700, labels))  # the timestep rose: a new run
    torch.testing.assert_close(call(later[:1], 300).sample, call_without(network, later[:1], 300, labels[:1]))  # another batch
    call(x, 0)
    assert call(later, 0).sample.equal(call_without(network, later, 0, labels))  # the same timestep: the next image
    network.enable_solution_reuse(False)
    assert call(later, 500).sample.equal(cold.sample)
    plan = make_plan(network, 3, "ddim", iterations=2)
    told = make_network(reuse_solution=True)  # by its config; our loop decides for itself
    assert draw(told, plan).latents.equal(draw(network, plan).latents)
    call(x, 999)
    assert told(x, 999, labels, num_iters=2).sample.equal(first.sample)
    torch.testing.assert_close(told(later, 500, labels, num_iters=2).sample, warm.sample)
    assert make_network(reuse_solution=True, fixed_point=False)(x, 999, labels).sample.isfinite().all()


def call_without(network, latents, timestep, labels):
    """The sample of a copy of the network that keeps no solution."""
    copy = make_network()
    copy.load_state_dict(network.state_dict())
    with torch.no_grad():
        return copy(latents, timestep, labels, num_iters=2).sample


def test_solution_reuse_under_the_stock_pipeline(saved):
    network, folder = saved
    pipeline = load(DiTPipeline, folder, DDIMScheduler)
    images = {}
    for reuse in (False, True):
        pipeline.transformer.enable_solution_reuse(reuse)
        images[reuse] = [
            pipeline([1, 2], num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images for _ in range(2)
        ]
        assert (images[reuse][0] == images[reuse][1]).all()  # nothing is left of the last call
    calls = watch(pipeline.transformer)
    pipeline([1, 2], num_inference_steps=3)
    assert [int(named["timestep"][0]) for *_, named in calls] == [999, 500, 0]
    assert abs(images[True][0] - images[False][0]).max() > 0


def test_the_stock_null_label_means_no_label_and_none_is_one_too():
    network, x = make_network(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        null = network(x, 10, torch.tensor([10, 10]), num_iters=2).sample
        assert network(x, 10, torch.tensor([1000, 1000]), num_iters=2).sample.equal(null)
        assert network(x, 10, num_iters=2).sample.equal(null)
        for wrong in (11, 999, 1001, -1):
            with pytest.raises(IndexError):
                network(x, 10, torch.tensor([0, wrong]), num_iters=2)
        many = make_network(num_classes=1200)
        labels = torch.tensor([1000, 1200])
        assert not many(x, 10, labels, num_iters=2).sample.equal(many(x, 10, labels.flip(0), num_iters=2).sample)
        unlabelled = make_network(label_type="none", num_classes=1)
        assert unlabelled(x, 10, num_iters=2).sample.equal(unlabelled(x, 10, torch.tensor([0, 0]), num_iters=2).sample)
        vectors = make_network(label_type="vector", label_dim=3)
        assert vectors(x, 10, num_iters=2).sample.equal(vectors(x, 10, torch.zeros(2, 3), num_iters=2).sample)
