"""Predictors of random tables, for tests."""

import torch
from diffusers import DDIMScheduler

from brisk import epd, predictor, sigmas

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = sigmas.noise_map(DDIMScheduler(**BETAS).alphas_cumprod)


def make_predictor(points=2, afs=False, max_order=None, flow=False, num_steps=5, table=TABLE, **model):
    """A predictor for a model of noise levels `table`, or for flow matching; `max_order`: of an ipndm student."""
    raw = epd.initial_raw(num_steps - 1, points, "normal", torch.Generator().manual_seed(points))
    tables = epd.effective(epd.Tables(*(parameter.double() for parameter in raw)), 0.1, 0.2)
    solver = predictor.Solver("ipndm" if max_order else "epd", num_steps, points, afs, max_order, False)
    levels = sigmas.flowmatch(num_steps) if flow else sigmas.discrete(num_steps, table)
    schedule = {"type": "flowmatch" if flow else "discrete", "rho": 1.0, "sigma_min": None, "sigma_max": None, "flow": None}
    facts = {"dataset": "own", "backend": None, "backend_config": None, "img_resolution": 32, "guidance_type": None,
             "guidance_rate": None} | model  # fmt: skip
    return predictor.make("own", "distilled", solver, schedule | {"sigmas": levels.tolist()}, facts, tables)
