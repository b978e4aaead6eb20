#!/usr/bin/env python
"""Write a published EPD predictor (.pkl) as JSON or safetensors. Nothing in the pickle is executed."""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk import options

EDM_SETS = ("cifar10", "ffhq", "afhqv2", "imagenet64")
BACKENDS = dict.fromkeys(EDM_SETS, "edm") | {
    "lsun_bedroom": "cm", "lsun_cat": "cm", "imagenet256": "adm", "lsun_bedroom_ldm": "ldm", "ms_coco": "ldm",
}  # fmt: skip
BETAS = {"lsun_bedroom_ldm": (0.0015, 0.0195), "ms_coco": (0.00085, 0.012)}  # scaled-linear, 1000 steps
ENDS = dict.fromkeys(EDM_SETS, (0.002, 80.0)) | {"lsun_bedroom": (0.002, 80.0), "lsun_cat": (0.002, 80.0)}
SHIFTS = {"sd3": (None, 3.0), "flux": (1.15, None)}  # mu, shift of flow matching
TRAINED = ("total_kimg", "batch_size", "gpus", "seed", "cos_lr_schedule", "alpha", "lr")
WEIGHTS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")


def parse_args(argv=None):
    """The namespace; see `--help`. UserError for files that cannot be converted."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("input", metavar="IN", help="network-snapshot-*.pkl, or another .pkl of the published experiments")
    add("output", metavar="OUT", help="file to write, .json or .safetensors; found by its folder if called predictor*")
    add("--name", help="what to call it; default: the file's name, of a network-snapshot the folder's")
    add("--stage", choices=("start", "distilled", "rl"), default="distilled", help="how its tables came about")
    add("--repository", help="where IN is from; kept in the file, like the next three")
    add("--branch", help="its branch")
    add("--commit", help="its commit")
    add("--licence", help="its licence")
    args, _ = options.parse(parser, argv)
    if not Path(args.input).is_file():
        raise options.UserError(f"{args.input} is no file: IN must be a .pkl of a predictor.")
    if Path(args.output).suffix not in (".json", ".safetensors"):
        raise options.UserError(f"OUT {args.output} must end in .json or .safetensors.")
    return args


def read_pickle(path):
    """(class, attributes, weights, attributes of its loss or {}) of the predictor in the pickle at `path`. UserError."""
    from brisk import safe_pickle

    content = safe_pickle.read(path)
    with safe_pickle.reading(path):
        found = safe_pickle.persistent(content.get("model")) if isinstance(content, dict) else None
        if found is None or found.class_name != "EPD_predictor":
            kind = f"the class {found.class_name[:80]!r}" if found else "no class"
            raise options.UserError(f"{path} holds no EPD predictor under 'model', but {kind}.")
        loss = safe_pickle.persistent(content.get("loss_fn"))
        given = safe_pickle.mapping(found.state.get("_init_kwargs", {}))
        values = given | {name: value for name, value in found.state.items() if not name.startswith("_")}
        return found, plain(values), safe_pickle.state_dict(content["model"]), plain(loss.state) if loss else {}


def plain(attributes):
    """The attributes that are plain values; the others (layers, solvers' functions) are of no use here."""
    from brisk import safe_pickle

    found = {}
    for name, value in attributes.items():
        try:
            found[name] = safe_pickle.plain(value)
        except ValueError:
            continue
    return found


def noise_map(betas):
    """The `sigmas.NoiseMap` of scaled-linear betas, given their (first, last) of 1,000; None for none."""
    import torch

    from brisk import sigmas

    if not betas:
        return None
    first_root, last_root = (beta**0.5 for beta in betas)
    return sigmas.noise_map((1 - torch.linspace(first_root, last_root, 1000, dtype=torch.float64) ** 2).cumprod(0))


def make_sigmas(kind, count, rho, low, high, betas, mu, shift):
    """The N sigmas of a schedule in float64. UserError for one that cannot be built."""
    from brisk import sigmas

    try:
        if kind == "flowmatch" and mu is None and shift is None:
            raise ValueError("neither mu nor shift is known")
        return sigmas.schedule(kind, count, low, high, rho, noise_map(betas), shift, mu).tolist()
    except ValueError as error:
        raise options.UserError(
            f"the sigmas of schedule {str(kind)[:40]!r} cannot be built from what the pickle says: {str(error)[:200]}"
        ) from None


def schedule_of(values, loss, count):
    """The section `schedule` of the file, its N = `count` sigmas included. UserError."""
    from brisk import sigmas

    kind, rho, dataset = values.get("schedule_type"), values.get("schedule_rho") or 1.0, values.get("dataset_name")
    inner = values.get("backend_config") or {}
    mu, shift = (first(name, values, inner) for name in ("flowmatch_mu", "flowmatch_shift"))
    if kind == "flowmatch" and mu is None and shift is None:
        mu, shift = SHIFTS.get(values.get("backend"), (None, None))
    betas = BETAS.get(dataset) if kind != "flowmatch" else None
    known = sigmas.sigma_range(noise_map(betas)) if betas else ENDS.get(dataset, (None, None))
    ends = dict(zip(("sigma_min", "sigma_max"), known, strict=True))
    low, high = (first(name, values, loss, ends) for name in ends)
    if kind in ("polynomial", "logsnr", "time_uniform") and None in (low, high):
        raise options.UserError(f"the pickle does not say between which sigmas its schedule {kind} runs.")
    grid = make_sigmas(kind, count, rho, low, high, betas, mu, shift)
    flow = {"shift": None if mu is not None else shift, "mu": mu} if kind == "flowmatch" else None
    return {"type": kind, "rho": rho, "sigma_min": low, "sigma_max": high, "flow": flow, "sigmas": grid}


def first(name, *sources):
    """What the first of the mappings that has a value for `name` says, None if none has."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def convert(path, name, stage, source):
    """The `predictor.Predictor` in the pickle at `path`. UserError."""
    from brisk import predictor, safe_pickle

    found, values, weights, loss = read_pickle(path)
    with safe_pickle.reading(path):
        count, dataset = values.get("num_steps"), values.get("dataset_name")
        shapes = {tuple(weights[key].shape) if key in weights else None for key in WEIGHTS}
        if type(count) is not int or shapes != {(count - 1, values.get("num_points"))}:
            raise options.UserError(f"{path} has no four tables of its num_steps - 1 rows and num_points columns.")
        ranges = [float(values.get(key) or 0) for key in ("scale_dir", "scale_time")]
        raw = predictor.Raw(*(weights[key].float() for key in WEIGHTS), *ranges)
        if min(ranges) < 0:
            raise options.UserError(
                f"{path} has the ranges scale_dir {ranges[0]:g} and scale_time {ranges[1]:g}; none can be negative."
            )
        solver = predictor.Solver(values.get("sampler_stu"), count, values["num_points"], bool(values.get("afs")),
                                  values.get("max_order"), bool(values.get("fcn")))  # fmt: skip
        model = {"dataset": dataset, "backend": values.get("backend") or BACKENDS.get(dataset)}
        model["backend_config"] = values.get("backend_config") or None
        model |= {key: values.get(key) for key in ("img_resolution", "guidance_type", "guidance_rate")}
        teacher = {"solver": values.get("sampler_tea"), "M": values.get("M")}
        teacher |= {"num_steps": None, "substeps_per_interval": None}
        if loss and teacher["M"] is not None:
            teacher["num_steps"] = (teacher["M"] + 1) * (count - 1) + 1
            teacher["substeps_per_interval"] = 2 if teacher["solver"] in ("dpm", "heun") else 1
        training = {key: values[key] for key in TRAINED if key in values} if loss else None
        source = {**source, "class": found.class_name, "source_sha256": found.source_sha256}
        schedule = schedule_of(values, loss, count)
        content = predictor.make(name, stage, solver, schedule, model, None, raw, teacher, training, source)
    content.document["official_t_steps_fp32"] = loss.get("t_steps")
    return content


def main(argv=None):
    args = parse_args(argv)
    from brisk import predictor, predictor_files

    path = Path(args.input)
    name = args.name or (path.resolve().parent.name if path.name.startswith("network-snapshot") else path.stem)
    source = {"repository": args.repository, "branch": args.branch, "commit": args.commit, "file": path.name,
              "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "licence": args.licence}  # fmt: skip
    content = convert(path, name, args.stage, source)
    predictor_files.write(content, args.output)
    print(f"{predictor.describe(content)}\n\n{args.output} written.")


if __name__ == "__main__":
    options.run(main)
