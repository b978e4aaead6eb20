#!/usr/bin/env python
"""Sample images with a DiT or FPDM network (arXiv 2401.08741) trained by train_fpdm.py.

What the checkpoint knows is read from it. Image number j depends on --global_seed and j alone, unless a tolerance is
shared by the batch: any split over processes or runs gives the same images, and a stopped run goes on where it was.
"""

import datetime
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brisk import fpdm_options, options
from brisk.image_folder import check_settings, read_json, save

RUN_PARTS = re.compile(r"transformer(_ema|_raw)?|checkpoints|checkpoint-\d+|.*\.pt")  # below the folder of a run


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument_group("what to sample").add_argument
    add("--ckpt", required=True, help="folder of a run, checkpoint, pipeline or network, or an official .pt file")
    add("--weights", choices=("ema", "raw"), default="ema", help="the moving average where there is one, or the trained weights")
    add("--sample_index_start", type=options.COUNT_OR_ZERO, default=0, help="number of the first image")
    add("--sample_index_end", type=options.COUNT, default=50000, help="number after the last image")
    add("--class_labels", help="classes like 1,2,3, taken in turns; default: drawn at random; an .npy file of vectors (N, "
        "dino_supervised_dim) for a network that takes these")  # fmt: skip
    add("--global_seed", type=options.COUNT_OR_ZERO, default=0, help="decides noise and classes")
    fpdm_options.add_network_options(parser, stored=True)
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--num_sampling_steps", default="250", help="timesteps: a number, numbers per section (10,15,25), or ddimN")
    add("--cfg_scale", type=options.number(float, low=1), help="guidance, 1 for none; default 4.0, unsupervised 1.0")
    add("--cfg_channels", type=options.COUNT, help="guide the first channels alone; published DiT samples have 3; default all")
    options.add_flag(group, "--ddim", "DDIM steps instead of ancestral ones")
    add("--eta", type=options.FRACTION, default=0.0, help="noise of the DDIM steps")
    group = parser.add_argument_group("fixed-point layer")
    add = group.add_argument
    add("--fixed_point_iters", type=options.COUNT, help="iterations per timestep; default: as many blocks as the plain DiT has")
    options.add_flag(group, "--fixed_point_reuse_solution", "start from the previous timestep's solution")
    add("--fixed_point_first_iters", type=options.COUNT_OR_ZERO,
        help="at least so many at the first, cold timestep; default 8 with reuse, else 0: nothing extra")  # fmt: skip
    add("--iter_schedule", choices=("constant", "increasing", "decreasing"),
        help="how iterations are shared out over timesteps; increasing: more at noisier ones; default constant")  # fmt: skip
    options.add_flag(group, "--adaptive", "the published spelling: share iterations out by --adaptive_type")
    add("--adaptive_type", choices=("fixed", "increasing", "decreasing"), default="increasing", help="needs --adaptive")
    add("--solver", choices=("picard", "anderson"), default="picard", help="plain iteration, or accelerated for tight solves")
    add("--fp_tol", type=options.NOT_NEGATIVE, default=0.0, help="stop at this relative residual; 0: never")
    add("--fp_min_iters", type=options.COUNT, default=1, help="but not before so many iterations")
    add("--fp_check_every", type=options.COUNT, default=2, help="iterations between two looks at the residual")
    add("--fp_tol_over", choices=("mean", "max"), default="mean", help="of the residuals in the batch")
    options.add_flag(group, "--fp_per_sample", "each sample stops by itself")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", default="samples", help="a folder for the run and the settings is made in it")
    add("--output_type", choices=("png", "latent"), default="png", help="latent: .npy files, no VAE needed")
    add("--vae", help="mse or ema (stabilityai/sd-vae-ft-*), a folder or hub id; default: the pipeline's own, else mse")
    add("--dataset_name", default="imagenet256", help="what the classes are; handwriting: their names are known")
    add("--class_names", help="file of their names, JSON list or one a line; default: the checkpoint's, else numbers")
    options.add_flag(group, "--save_npz", "write samples.npz with all images (N, H, W, 3) as evaluators take it")
    options.add_flag(group, "--log_convergence", "write convergence.json and .png: residual and iterations per timestep")
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add("--batch_size", type=options.COUNT, default=32, help="images at a time, per process")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="precision of the network; steps are float32")
    options.add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs", True)
    options.add_flag(group, "--compile", "torch.compile one iteration of the fixed-point layer; of a plain DiT, the blocks")
    add("--compile_mode", choices=fpdm_options.COMPILE_MODES, default="default", help="reduce-overhead: CUDA graphs")
    options.add_flag(group, "--debug", "one batch per process, into a folder of its own")
    options.add_flag(group, "--dry_run", "print the plan and stop")
    fpdm_options.alias_fixed_point(parser)
    args, given = options.parse(parser, argv, "configs/fpdm")
    if args.sample_index_end <= args.sample_index_start:
        raise options.UserError(f"--sample_index_end {args.sample_index_end} must be above --sample_index_start "
                                f"{args.sample_index_start}.")  # fmt: skip
    return args, given


def schedule_of(args):
    """The iteration schedule that --iter_schedule or its published spelling asks for. UserError where both do and differ."""
    published = "constant" if args.adaptive_type == "fixed" else args.adaptive_type
    if args.adaptive and args.iter_schedule not in (None, published):
        raise options.UserError(f"--iter_schedule {args.iter_schedule} and --adaptive_type {args.adaptive_type} differ: give one.")
    return published if args.adaptive else args.iter_schedule or "constant"


def plan_of(args, network):
    """The `fpdm_sampling.Plan` of the flags. UserError."""
    from brisk import fpdm_sampling

    scale = args.cfg_scale or (1.0 if network.config.label_type == "none" else 4.0)
    solver = fpdm_sampling.solver_settings(args.solver, args.fp_tol, args.fp_min_iters, args.fp_check_every, args.fp_tol_over,
                                           args.fp_per_sample, args.log_convergence)  # fmt: skip
    try:
        return fpdm_sampling.make_plan(
            network, args.num_sampling_steps, "ddim" if args.ddim else "ddpm", args.eta, scale, args.cfg_channels,
            args.fixed_point_iters, schedule_of(args), args.fixed_point_first_iters, args.fixed_point_reuse_solution, solver,
        )  # fmt: skip
    except ValueError as error:
        raise options.UserError(str(error)) from None


def idle_flags(args, given, config):
    """Sentences about given flags that change nothing, and about a tolerance out of reach."""
    layer = (config.fixed_point, "a fixed-point layer, the network is a plain DiT")
    names = ("fixed_point_iters", "fixed_point_reuse_solution", "fixed_point_first_iters", "iter_schedule", "adaptive", "solver",
             "fp_tol", "log_convergence")  # fmt: skip
    rules = dict.fromkeys(names, layer)
    rules |= dict.fromkeys(("fp_min_iters", "fp_check_every", "fp_per_sample"), (args.fp_tol, "--fp_tol"))
    rules |= {"fp_tol_over": (args.fp_tol and not args.fp_per_sample, "--fp_tol, and leaving out --fp_per_sample"),
              "eta": (args.ddim, "--ddim"), "adaptive_type": (args.adaptive, "--adaptive"),
              "compile_mode": (args.compile, "--compile"), "cfg_channels": (args.cfg_scale != 1, "guidance"),
              **dict.fromkeys(("save_npz", "vae"), (args.output_type == "png", "--output_type png")),
              "class_labels": (config.label_type != "none", "labels, the network knows none"),
              "class_names": (config.label_type == "class", "classes, the network knows none")}  # fmt: skip
    said = options.without_effect(given, rules)
    if args.dtype == "bf16" and 0 < args.fp_tol < 1e-2:
        said.append(f"--fp_tol {args.fp_tol:g} is out of reach in bf16, whose residual stays near 7e-3; give 1e-2 or more.")
    return said


def run_folder(ckpt):
    """The folder of the run that a checkpoint belongs to."""
    path = Path(ckpt).absolute()
    while RUN_PARTS.fullmatch(path.name) and path.parent != path:
        path = path.parent
    return path


def class_names(args, config):
    """{class: name} of --class_names, the data set, or the checkpoint's pipeline or run; {} if none are known. UserError."""
    run, names = run_folder(args.ckpt), None
    if args.class_names:
        path = Path(args.class_names)
        try:
            text = path.read_text()
            names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise options.UserError(f"--class_names {path} cannot be read: {error}.") from None
        if not isinstance(names, (list, dict)) or len(names) != config.num_classes:
            raise options.UserError(f"--class_names {path} must hold {config.num_classes} names, one per class.")
    elif args.dataset_name == "handwriting" and config.num_classes == 10:
        from brisk.handwriting import DIGIT_WORDS as names
    for file, key in (("model_index.json", "id2label"), ("run_manifest.json", "classes")):
        names = names or read_json(run / file).get(key) or {}
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    return {int(label): str(name).split(",")[0] for label, name in pairs}


def labels_of(args, config, indices):
    """(labels for the network, class numbers for the file names) of images; a function of seed and index alone.

    The labels are a list of numbers, or an array of vectors. UserError.
    """
    import numpy as np
    import torch

    from brisk import fpdm_sampling, seeding

    given = args.class_labels
    if config.label_type == "none":
        return [0] * len(indices), [0] * len(indices)
    if config.label_type == "vector":
        try:
            vectors = np.load(given or "", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise options.UserError(f"--class_labels is {given}, it must be an .npy file of vectors for this network.") from None
        if vectors.ndim != 2 or vectors.shape[1] != config.label_dim:
            raise options.UserError(f"--class_labels {given} has shape {vectors.shape}, not (N, {config.label_dim}).")
        rows = [index % len(vectors) for index in indices]
        return np.float32(vectors[rows]), rows
    if given:
        if not re.fullmatch(r"\d+(,\d+)*", given):
            raise options.UserError(f"--class_labels is '{given}'; it must be a list of classes like 1,2,3.")
        classes = [int(label) for label in given.split(",")]
        try:
            fpdm_sampling.check_labels(config, classes)
        except ValueError as error:
            raise options.UserError(f"--class_labels: {error}") from None
        labels = [classes[index % len(classes)] for index in indices]
    else:
        generators = (seeding.generator(args.global_seed, "label", index) for index in indices)
        labels = [int(torch.randint(config.num_classes, (), generator=generator)) for generator in generators]
    return labels, labels


def file_name(index, label, names, config, suffix):
    """`{index}--{class}--{name}`, the name in lower case with dashes."""
    name = names.get(label, str(label)) if config.label_type == "class" else "unlabeled"
    name = re.sub(r"[\s/\\]+", "-", name.strip().lower().replace("'", "").replace("’", ""))
    return f"{index:05d}--{label:03d}--{name}{suffix}"


def folder_of(args, plan, network):
    """Where the images go."""
    config = network.config
    parts = {"num_sampling_steps": args.num_sampling_steps, "cfg_scale": plan.guidance_scale}
    if config.fixed_point:
        parts |= {"fixed_point_iters": args.fixed_point_iters or network.default_iterations,
                  "fixed_point_reuse_solution": plan.reuse, "fixed_point_pptc": config.pre_post_timestep_conditioning}  # fmt: skip
    name = "--".join(f"{key}-{value}" for key, value in parts.items()) + "--ddim" * (plan.sampler == "ddim")
    return Path(args.output_dir) / ("debug" if args.debug else "") / run_folder(args.ckpt).name / name


def listed(values):
    """A list from its last entry to its first, shortened to runs of equal values or to its ends where it has over 100."""
    if len(values) <= 100:
        return str(values[::-1])
    runs = [(value, len(list(same))) for value, same in itertools.groupby(values[::-1])]
    if len(runs) <= 20:
        return ", ".join(f"{count} times {value}" for value, count in runs)
    return f"[{', '.join(map(str, values[:-6:-1]))}, ... {', '.join(map(str, values[4::-1]))}], {len(values)} of them"


def describe(plan, cost, folder, batches):
    """The plan as people read it."""
    lines = [f"output: {folder}", f"timesteps as sampled: {listed(plan.timesteps)}"]
    if plan.iterations:
        lines += [f"iterations as sampled: {listed(plan.iterations)}, {sum(plan.iterations)} in total"
                  + ", or fewer by tolerance" * bool(plan.solver.get("tolerance"))]  # fmt: skip
    guided = " in each of 2 rows (guidance)" if cost.rows == 2 else ""
    return lines + [
        f"per image: {cost.calls} network calls, {cost.blocks} blocks{guided}, {cost.macs / 1e9:,.4g} GMACs in all",
        f"{batches} batches to draw in this process",
    ]


def settings_of(args, plan, network, vae_source, processes):
    """What the images depend on, as JSON holds it: images of other settings must not be mixed with them."""
    from brisk import sd_models

    plan = {**plan._asdict(), "solver": {name: value for name, value in plan.solver.items() if name != "paired"}}
    if plan["solver"] and not args.fp_tol and args.solver == "picard":
        plan["solver"] = {}  # measured, which changes nothing
    flags = {name: getattr(args, name) for name in ("global_seed", "class_labels", "class_names", "dtype", "output_type")}
    if plan["solver"].get("tolerance") and not args.fp_per_sample:
        flags |= {"batch_size": args.batch_size, "processes": processes}  # a batch stops together
    return {"weights": sd_models.fingerprint(network), **plan, "vae": vae_source, **flags}


def load_vae(args, config):
    """(autoencoder, its source), (None, None) for latents. UserError."""
    from brisk import fpdm, sd_models

    if args.output_type == "latent":
        return None, None
    own = run_folder(args.ckpt)
    given = args.vae or (str(own) if (own / "vae").is_dir() else "mse")
    source = sd_models.VAES.get(given, given)
    try:
        vae = fpdm.load_vae(source, config)
    except options.UserError as error:
        raise options.UserError(f"{str(error).rstrip('.')}: give the folder of a VAE as --vae, or --output_type latent.") from None
    return vae, source


def decode(vae, latents):
    """Latents (B, C, h, h) -> images (B, H, W, 3), uint8 on the CPU."""
    import torch

    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def write_npz(folder, files):
    """Gather pictures into samples.npz (arr_0: (N, H, W, 3) uint8)."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    temporary = folder / ".samples.tmp.npz"
    bar = tqdm(files, desc="samples.npz", unit="image", dynamic_ncols=True)
    np.savez(temporary, arr_0=np.stack([np.asarray(Image.open(file)) for file in bar]))
    temporary.replace(folder / "samples.npz")


def write_convergence(folder, plan, records):
    """Write convergence.json and .png from [(iterations, residual)] of all batches. Returns the rows."""
    import torch

    from brisk import checkpoint, fpdm_sampling

    counts, residuals = (torch.cat(parts, 1) for parts in zip(*records, strict=True))
    rows = fpdm_sampling.convergence(plan, counts, residuals)
    report = {"samples": counts.shape[1], "reuse": plan.reuse, "guidance_scale": plan.guidance_scale, "timesteps": rows}
    checkpoint.write_atomically(folder / "convergence.json", json.dumps(report, indent=1))
    fpdm_sampling.draw_convergence(folder / "convergence.png", rows, f"convergence over {counts.shape[1]} samples")
    return rows


def main(argv=None):
    args, given = parse_args(argv)
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env
    from tqdm import tqdm

    from brisk import checkpoint, fpdm, fpdm_sampling, runlog, sd_models, seeding

    runlog.quiet_libraries()
    # one process may wait for another, or for samples.npz, as long as it takes
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(days=1))
    runlog.check_processes(state)
    device, say = state.device, print if state.is_main_process else lambda *_: None

    # 1 the network and what to do with it
    network = fpdm.load_transformer(args.ckpt, args.weights == "ema")
    config = network.config
    fpdm_options.check_agreement(args, config, args.ckpt)
    plan = plan_of(args, network)
    for sentence in idle_flags(args, given, config):
        say(f"warning: {sentence}")
    names = class_names(args, config) if config.label_type == "class" else {}
    folder, suffix = folder_of(args, plan, network), ".png" if args.output_type == "png" else ".npy"

    # 2 this process's images
    indices = list(range(args.sample_index_start, args.sample_index_end))
    labels, numbers = labels_of(args, config, indices)
    files = [folder / file_name(*pair, names, config, suffix) for pair in zip(indices, numbers, strict=True)]
    share = range(len(indices) * state.process_index // state.num_processes,
                  len(indices) * (state.process_index + 1) // state.num_processes)  # fmt: skip
    batches = [share[first : first + args.batch_size] for first in range(0, len(share), args.batch_size)]
    batches = [batch for batch in batches[: 1 if args.debug else None] if not all(files[place].exists() for place in batch)]
    say("\n".join(describe(plan, fpdm_sampling.cost(network, plan), folder, len(batches))))
    if args.dry_run:
        return

    # 3 models on the device, settings on disk
    vae, vae_source = load_vae(args, config)
    settings = settings_of(args, plan, network, vae_source, state.num_processes)
    check_settings(folder, "args.json", settings, "remove it or give another --output_dir")
    state.wait_for_everyone()
    if state.is_main_process:
        runlog.open_output(0, folder)
        checkpoint.write_atomically(folder / "args.json", json.dumps({**options.public(args), "settings": settings}, indent=1))
    state.wait_for_everyone()
    runlog.allow_fast_maths(args.allow_tf32)
    network.to(device, sd_models.DTYPES[args.dtype])
    if vae is not None:
        vae.to(device)
    if args.compile:
        network.compile_iteration(args.compile_mode)

    # 4 draw
    progress = tqdm(total=len(batches) * len(plan.timesteps), desc="sampling", unit="step", dynamic_ncols=True,
                    disable=not state.is_main_process)  # fmt: skip
    records, drawn, writing = [], 0, []
    with ThreadPoolExecutor(4) as writers:
        for batch in batches:
            generators = [seeding.generator(args.global_seed, "noise", indices[place]) for place in batch]
            chosen = torch.as_tensor(labels[batch.start : batch.stop]).to(device)
            chosen = chosen.to(network.dtype) if config.label_type == "vector" else chosen
            samples = fpdm_sampling.sample_latents(network, chosen, generators, plan, device, progress.update)
            values = samples.latents.cpu().numpy() if vae is None else decode(vae, samples.latents)
            for written in writing:  # of the last batch: files are written while the next one is drawn
                written.result()
            writing = [writers.submit(save, files[place], value) for place, value in zip(batch, values, strict=True)]
            if args.log_convergence and config.fixed_point:
                records.append((samples.iterations.cpu(), samples.residual.cpu()))
            drawn += len(batch)
            progress.set_postfix(images=drawn)
        for written in writing:
            written.result()
    progress.close()

    # 5 reports
    state.wait_for_everyone()
    if args.log_convergence and config.fixed_point:
        records = gather_object(records) if state.num_processes > 1 else records
        if state.is_main_process and records:
            rows = write_convergence(folder, plan, records)
            used = sum(row["iterations"] for row in rows)
            say(f"{used:.1f} iterations per image; residual {rows[0]['residual']:.2g} at the first timestep, "
                f"{rows[-1]['residual']:.2g} at the last")  # fmt: skip
        elif not records:
            say("nothing was left to draw, convergence.json stays as it is")
    finished = [file for file in files if file.exists()] if args.debug else files
    if args.save_npz and suffix == ".png" and state.is_main_process:
        write_npz(folder, finished)
    state.wait_for_everyone()
    say(f"{len(finished)} samples in {folder}")


if __name__ == "__main__":
    options.run(main)
