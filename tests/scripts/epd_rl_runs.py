"""Runs of train_epd_rl.py for its tests: in this process, on a mixture of Gaussians unless flags say otherwise."""

import contextlib
import io
from types import SimpleNamespace

import inprocess
import random_predictor
import torch

from brisk import epd, predictor, predictor_files, sigmas

SCRIPT = "train_epd_rl"
MIXTURE = f"{inprocess.MIXTURES}:gmm2d"
TINY = {"ppo.rollout_batch_size": 8, "ppo.rloo_k": 4, "ppo.minibatch_size": 4, "ppo.learning_rate": 1e-3, "ppo.kl_coef": 0.01,
        "ppo.max_grad_norm": 1.0, "ppo.dirichlet_concentration": 20, "ppo.decode_rgb": "false",
        "reward.type": "analytic"}  # fmt: skip


def start_file(folder, name="start.json", scale=0.0, afs=False, num_steps=4, points=2, **model):
    """A predictor of uneven tables for the mixture below `folder`; `scale`: range of its factors."""
    raw = epd.initial_raw(num_steps - 1, points, "normal", torch.Generator().manual_seed(3))
    raw = predictor.Raw(raw.r, *(table / 4 for table in raw[1:]), scale, scale)
    levels = sigmas.time_uniform(num_steps, 0.002, 80.0).tolist()
    schedule = {"type": "time_uniform", "rho": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "flow": None, "sigmas": levels}
    facts = {"dataset": None, "backend": "gmm", "backend_config": {"gmm_file": MIXTURE}, "img_resolution": None,
             "guidance_type": None, "guidance_rate": None} | model  # fmt: skip
    solver = predictor.Solver("epd", num_steps, points, afs, None, False)
    predictor_files.write(predictor.make("own", "distilled", solver, schedule, facts, raw=raw), folder / name)
    return folder / name


def pipeline_start(folder, family, source, flow, points=2, **model):
    """A predictor of random tables for the pipeline in `source`."""
    content = random_predictor.make_predictor(points=points, flow=flow, num_steps=3, backend=family,
                                              backend_config={"model_name_or_path": str(source)}, **model)  # fmt: skip
    predictor_files.write(content, folder / f"{family}.json")
    return folder / f"{family}.json"


def flags(start, *more):
    """A command line: overrides KEY=VALUE and --flags in any order, over those of a short run from the file `start`."""
    overrides = [f"{key}={value}" for key, value in TINY.items()] + [f"data.predictor_snapshot={start}"]
    overrides += [text for text in more if not str(text).startswith("--")]
    own = ["--max_steps=3", "--eval_every=0", "--eval_samples=8", "--report_to=none", "--nosubdir"]
    return [f"--override={text}" for text in overrides] + own + [str(text) for text in more if str(text).startswith("--")]


def run(output, start, *more):
    """Train to the end -> output, rows of metrics.jsonl, stderr's text; errors pass through."""
    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        rows = inprocess.train(output, *flags(start, *more), script=SCRIPT)
    return SimpleNamespace(output=output, rows=rows, log=log.getvalue())

