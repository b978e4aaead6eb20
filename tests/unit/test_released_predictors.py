"""Every published table samples a tiny model of its family, through the model's own grid and with as many calls as it says.

The tables lie under `--conformance DIR`/epd/predictors, where there are any; they are no part of the repository.
"""

from pathlib import Path

import pytest
import tiny_pipelines
import torch

from brisk import denoisers, edm_nets, epd, predictor_files, solvers
from brisk.denoiser_sources import family_of
from brisk.pipeline_denoisers import from_pipeline

EDM = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
       "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
BATCH = 2


def make_denoiser(family, classes):
    torch.manual_seed(0)
    if family == "edm":
        config = EDM | {"label_dim": classes}
        return denoisers.edm(edm_nets.make_network(config), config)
    pipe = tiny_pipelines.make({"sd": "sd1"}.get(family, family))
    return from_pipeline(pipe, resolution=16 if family == "flux" else None)


def sample(denoiser, content, given):
    """(end state, calls, rows) of sampling with a predictor."""
    rows = []
    hook = denoiser.network.register_forward_pre_hook(lambda module, args, named: rows.append(len(args[0])), with_kwargs=True)
    if denoiser.family == "edm":  # whose direction calls the network inside
        hook.remove()
        hook = denoiser.network.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    solver, model = content.solver, content.model
    direction = denoisers.direction_for(denoiser, given, BATCH, model["guidance_type"], model["guidance_rate"])
    order = epd.history_order(solver.student, solver.max_order)
    x = torch.randn(BATCH, *denoiser.shape) * (1 if denoiser.flow else content.sigmas[0].item())
    with torch.no_grad():
        states = epd.solve(direction, x, content.sigmas, epd.rows_of(content.tables), order, solver.afs, denoiser.flow)
        end = solvers.last(states)
    hook.remove()
    return end, len(rows), sum(rows)


def test_every_released_table_samples_a_model_of_its_family(pytestconfig):
    paths = sorted((Path(pytestconfig.getoption("--conformance")) / "epd/predictors").glob("*.json"))
    if not paths:
        pytest.skip("no epd/predictors in the folder of --conformance")
    made = {}
    for path in paths:
        content = predictor_files.read(path)
        dataset, backend = content.model["dataset"], content.model["backend"]
        family, classes = family_of(dataset, backend), 10 if dataset == "imagenet64" else 0
        if (family, classes) not in made:
            made[family, classes] = make_denoiser(family, classes)
        denoiser = made[family, classes]
        given = {"prompts": ["a red fox", "b"], "classes": torch.tensor([1, 7]), None: None}[denoiser.takes]
        end, calls, rows = sample(denoiser, content, given)
        assert end.shape == (BATCH, *denoiser.shape) and end.isfinite().all(), path.stem
        assert calls == content.nfe.para_nfe, path.stem
        pair = 2 if content.model["guidance_type"] == "cfg" and not denoiser.guides_itself else 1
        assert rows == content.nfe.total_nfe * pair * BATCH, path.stem
        with torch.no_grad():
            images = denoiser.decode(end)
        assert images.shape == (BATCH, 3, denoiser.resolution, denoiser.resolution) and images.isfinite().all(), path.stem
        schedule = content.document["schedule"]
        if family != "flux":  # whose levels depend on the resolution
            ends = (schedule["sigma_min"], schedule["sigma_max"])
            found = denoisers.grid(denoiser, schedule["type"], content.solver.num_steps, schedule["rho"], *ends)
            torch.testing.assert_close(found, content.sigmas, atol=0, rtol=1e-6)
    assert {family for family, _ in made} == {"edm", "ldm", "sd", "sd3", "flux"}
