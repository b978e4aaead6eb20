#!/usr/bin/env python
"""Sample images with an EPD-Solver predictor (arXiv 2507.14797, 2512.22796), or with a plain solver to compare it with.

What the predictor knows is read from it. An image depends on its seed alone, however batches and processes split the work.
"""

import datetime
import json
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brisk import epd_options, image_folder, options

RECORD = "sampling.json"
SUFFIXES = [f"_{place:02d}" for place in range(1, 1001)]  # of the files of unfinished states
SOLVERS = ("euler", "ddim", "heun", "dpm2", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc", "edm")
BATCH, SEEDS = {"sd3": 4, "flux": 1}, {"sd3": "0-3", "flux": "0"}  # by family, else 64 and 0-63
CONFIG_KEYS = ("model_name_or_path", "model_id", "revision", "variant", "resolution", "torch_dtype", "negative_prompt")


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("predictor, or solver in place of it")
    add = group.add_argument
    add("--predictor_path", help="predictor file, folder of a run, or number of an experiment below ./exps")
    options.add_flag(group, "--describe", "print the predictor's table, cost and model, and stop")
    options.add_flag(group, "--force_model", "use the predictor on a model or with a guidance that it was not made for")
    add("--solver", choices=SOLVERS, help="plain solver; ddim is euler")
    add("--num_steps", type=options.number(int, low=2), help="noise levels; default of solvers 4, of a predictor its own")
    add("--schedule_type", choices=epd_options.SCHEDULE_TYPES,
        help="default: flowmatch for flow matching, discrete for discrete timesteps, else as the solver was published")  # fmt: skip
    add("--schedule_rho", type=options.POSITIVE, help="default 7 of polynomial, 2 of deis, else 1")
    options.add_flag(group, "--afs", "first direction in closed form, without the network", None)
    add("--max_order", type=options.COUNT, help="order of ipndm, ipndm_v, deis (1-4), dpmpp and unipc (1-3); default 3")
    options.add_flag(group, "--predict_x0", "dpmpp and unipc extrapolate the image instead of the noise", True)
    options.add_flag(group, "--lower_order_final", "dpmpp and unipc lower their order at the end", True)
    options.add_flag(group, "--thresholding", "dpmpp and unipc clip the image; default: of pixels with --predict_x0", None)
    add("--unipc_variant", choices=("bh1", "bh2"), default="bh2", help="of unipc")
    epd_options.add_model_options(parser)
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--backend_config", help="JSON object that replaces entries of the predictor's: " + ", ".join(CONFIG_KEYS))
    add("--seeds", help="list with ranges like 1,2,5-10; default 0-63, sd3 0-3, flux 0")
    add("--prompt", help="one prompt for all images")
    add("--prompt_file", help="prompts, one a line, or .csv with a column text, prompt or caption")
    add("--prompt_index", choices=("position", "seed"), default="position",
        help="which prompt a seed gets: prompts taken in turns along --seeds, or number seed of the file")  # fmt: skip
    options.add_flag(group, "--round_timesteps", "tell a network of discrete timesteps trained ones only")
    options.add_flag(group, "--clip_denoised", "keep what a pixel U-Net predicts in [-1, 1]; default: by its scheduler", None)
    add("--negative_prompt", help="in place of the empty one; needs --guidance_type cfg")
    add("--class_labels", help="classes like 1,2,3: seed j gets number j, in turns; default: drawn by the seed's generator")
    add("--generator_device", choices=("cpu", "cuda"), default="cpu", help="cuda: the numbers of published GPU samples")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--outdir", help="default: ./samples/<dataset>/<solver>_nfe<calls>_npoints<points>, ./samples/<sd3|flux>_epd")
    options.add_flag(group, "--subdirs", "a folder per 1000 seeds", True)
    options.add_flag(group, "--grid", "one picture per batch instead of one per image")
    options.add_flag(group, "--return_inters", "also save the decoded state after every interval, in <outdir>_inters")
    options.add_flag(group, "--overwrite", "remove the images of other settings in outdir and draw all anew")
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add("--batch", type=options.COUNT, help="images at a time, per process; default 64, sd3 4, flux 1")
    add("--dtype", choices=("fp32", "bf16", "fp16"),
        help="precision of the network; default fp32, on GPUs with --backend sd3 fp16, flux bf16")  # fmt: skip
    options.add_flag(group, "--use_fp16", "same as --dtype fp16")
    add("--max_branch_batch", type=options.COUNT, help="rows per network call at most, a guided pair counts once")
    options.add_flag(group, "--split_branches", "the processes share the points of each interval instead of the images")
    options.add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs", True)
    options.add_flag(group, "--compile", "torch.compile the network")
    options.add_flag(group, "--dry_run", "print the plan and stop")
    parser.alias("--predictor_path", "--predictor")
    parser.alias("--batch", "--max_batch_size")
    parser.alias("--outdir", "--output_dir")
    parser.alias("--dry_run", "-n")
    parser.exclusive.append(("prompt", "prompt_file"))
    args, given = options.parse(parser, argv, "configs/epd")
    check_flags(args)
    return args, given


def check_flags(args):
    """UserError for flags that contradict each other."""
    rules = (
        (not args.predictor_path and not args.solver, "give either --predictor_path or --solver."),
        (args.predictor_path and args.solver, "give either --predictor_path or --solver: a plain solver takes a predictor's model, "
         "levels and guidance as flags, --predictor_path with --describe prints them."),
        (args.describe and not args.predictor_path, "--describe needs --predictor_path."),
        (args.prompt_index == "seed" and not args.prompt_file, "--prompt_index seed needs --prompt_file."),
        (args.use_fp16 and args.dtype not in (None, "fp16"), f"--use_fp16 and --dtype {args.dtype} differ: give one."),
        (args.split_branches and args.solver, f"--split_branches shares a predictor's points, --solver {args.solver} has none."),
    )  # fmt: skip
    for broken, sentence in rules:
        if broken:
            raise options.UserError(sentence)


def backend_config(args):
    """The entries of --backend_config. UserError."""
    try:
        found = json.loads(args.backend_config or "{}")
    except ValueError as error:
        raise options.UserError(f"--backend_config is no JSON: {error}.") from None
    unknown = sorted(set(found) - set(CONFIG_KEYS)) if isinstance(found, dict) else [args.backend_config]
    if isinstance(found, dict):
        kinds = {"resolution": int, "negative_prompt": object}
        unknown += [name for name, value in found.items() if not isinstance(value, kinds.get(name, str))]
    if unknown:
        raise options.UserError(f"--backend_config: '{unknown[0]}' is not one of the entries of a JSON object that can be given: "
                                f"{', '.join(CONFIG_KEYS)}; resolution a whole number, the others texts.")  # fmt: skip
    return found


def resolve(args, predictor):
    """(ModelOptions, backend_config, warnings) of the flags and the predictor, which also completes the guidance. UserError."""
    from brisk import epd_sampling

    config, wanted, said = backend_config(args), epd_options.model_options(args), []
    wanted = wanted._replace(
        source=wanted.source or epd_sampling.source_of(config), revision=wanted.revision or config.get("revision"),
        variant=wanted.variant or config.get("variant"), resolution=wanted.resolution or config.get("resolution"),
        round_timesteps=args.round_timesteps, clip_denoised=args.clip_denoised,
    )  # fmt: skip
    if predictor is not None:
        names = ("num_steps", "schedule_type", "schedule_rho", "afs", "max_order")
        conflicts = epd_sampling.solver_conflicts(predictor, {name: getattr(args, name) for name in names})
        if conflicts:
            raise options.UserError(f"{conflicts[0]}: leave the flag out.")
        said = refuse(epd_sampling.model_conflicts(predictor, wanted, args.guidance_type, args.guidance_rate), args.force_model)
        wanted = epd_sampling.complete(wanted, predictor, args.force_model)
        said = said + epd_sampling.other_model(predictor, wanted.source)
        config = {**(predictor.model.get("backend_config") or {}), **config}
        stored = predictor.model.get("guidance_type")
        if args.guidance_type in (None, stored):
            rate = predictor.model.get("guidance_rate")
            args.guidance_type, args.guidance_rate = stored, rate if args.guidance_rate is None else args.guidance_rate
    if args.guidance_type in ("cfg", "cg") and args.guidance_rate is None:
        raise options.UserError(f"--guidance_type {args.guidance_type} needs --guidance_rate.")
    return wanted, config, said


def load_model(wanted, predictor, device, dtype):
    """The `Denoiser` of `ModelOptions`. UserError, which tells of a place that the predictor recorded that it did."""
    from brisk import denoiser_sources

    try:
        return denoiser_sources.load(wanted, device, dtype)
    except options.UserError as error:
        config = (predictor.model.get("backend_config") or {}) if predictor else {}
        flag, place = ("--gmm_file", wanted.gmm_file) if wanted.gmm_file else (denoiser_sources.FLAG, wanted.source)
        if place is None or place not in config.values() or str(Path(place)) not in str(error):
            raise
        raise options.UserError(f"{str(error).rstrip('.')}; the predictor {predictor.name} recorded {place}, {flag} gives another "
                                "place.", error.exit_code) from None  # fmt: skip


def refuse(sentences, force):
    """`sentences` for the user to read where `force`, else UserError with the first."""
    if sentences and not force:
        raise options.UserError(f"{sentences[0]}; --force_model uses it all the same.")
    return sentences


def sampler_of(args, predictor, denoiser):
    """The `epd_sampling.Sampler` of the flags. UserError."""
    from brisk import denoisers, epd_sampling, solvers

    try:
        if predictor is not None:
            flow, levels = predictor.document["schedule"].get("flow") or {}, None
            if flow.get("mu") is not None and epd_sampling.resolution_of(predictor) not in (None, denoiser.resolution):
                levels = denoisers.grid(denoiser, "flowmatch", predictor.solver.num_steps)
            return epd_sampling.of_predictor(predictor, denoiser.flow, levels)
        clips = denoiser.family in epd_sampling.PIXEL_FAMILIES and args.predict_x0
        settings = solvers.SolverOptions(
            bool(args.afs), denoiser.flow, args.max_order or 3, predict_x0=args.predict_x0, variant=args.unipc_variant,
            lower_order_final=args.lower_order_final, thresholding=clips if args.thresholding is None else args.thresholding,
        )  # fmt: skip
        return epd_sampling.of_solver(args.solver, denoiser, args.num_steps or 4, args.schedule_type, args.schedule_rho, settings)
    except ValueError as error:
        raise options.UserError(f"--{'solver' if args.solver else 'predictor_path'}: {error}") from None


def idle_flags(args, given, predictor, denoiser, processes):
    """Sentences about given flags that change nothing."""
    solver, guided = (args.solver or "").replace("ddim", "euler"), args.guidance_type in ("cfg", "cg")
    multistep = solver in ("dpmpp", "unipc")
    prompted = denoiser.takes == "prompts"
    rules = dict.fromkeys(("predict_x0", "lower_order_final"), (multistep, "--solver dpmpp or unipc"))
    rules |= {
        "thresholding": (multistep and args.predict_x0, "--solver dpmpp or unipc with --predict_x0"),
        "unipc_variant": (solver == "unipc", "--solver unipc"),
        "max_order": (multistep or solver in ("ipndm", "ipndm_v", "deis") or predictor and predictor.solver.student == "ipndm",
                      "a solver that remembers directions"),
        "schedule_rho": (args.schedule_type not in ("logsnr", "flowmatch") and not denoiser.flow, "a schedule with a power"),
        "force_model": (predictor, "--predictor_path"), "guidance_rate": (guided, "--guidance_type cfg or cg"),
        "classifier": (args.guidance_type == "cg", "--guidance_type cg"),
        "negative_prompt": (prompted and guided and not denoiser.guides_itself, "--guidance_type cfg"),
        "prompt_index": (args.prompt_file, "--prompt_file"), "subdirs": (not args.grid, "leaving out --grid"),
        "split_branches": (processes > 1, "several processes"), "compile": (denoiser.network is not None, "a network"),
        **dict.fromkeys(("prompt", "prompt_file", "class_labels"), (args.guidance_type != "uncond", "guidance other than uncond")),
        "round_timesteps": (denoiser.table is not None, "a model of discrete timesteps"),
        "clip_denoised": (denoiser.family == "adm", "a pixel U-Net of discrete timesteps"),
    }  # fmt: skip
    return options.without_effect(given, rules)


def read_seeds(text):
    """The seeds of --seeds. UserError."""
    from brisk import sample_seeds

    try:
        return sample_seeds.parse_seeds(text)
    except ValueError as error:
        raise options.UserError(f"--seeds: {error}") from None


def prompts_of(args, denoiser, seeds):
    """All prompts, None for a model without them. UserError."""
    if denoiser.takes != "prompts":
        for flag in ("prompt", "prompt_file", "negative_prompt"):
            if getattr(args, flag) is not None:
                raise options.UserError(f"--{flag} was given, a model of family {denoiser.family} knows no prompts.")
        return None
    prompts = epd_options.read_prompts(args.prompt, args.prompt_file, "--prompt_file")
    if args.guidance_type == "uncond":
        return [""]
    if prompts is None and denoiser.family not in SEEDS:
        raise options.UserError("the model draws what it is told: give --prompt, or --prompt_file with captions.")
    prompts = prompts or [""]
    if args.prompt_index == "seed" and max(seeds) >= len(prompts):
        raise options.UserError(f"--prompt_index seed: seed {max(seeds)} has no prompt, --prompt_file {args.prompt_file} holds "
                                f"{len(prompts)}, numbered from 0.")  # fmt: skip
    return prompts


def classes_of(args, denoiser):
    """The classes of --class_labels, None if they are to be drawn. UserError."""
    if args.class_labels is None:
        return None
    if denoiser.takes != "classes":
        raise options.UserError(f"--class_labels was given, the model ({denoiser.family}) knows no classes.")
    if not all(part.isdecimal() for part in args.class_labels.split(",")):
        raise options.UserError(f"--class_labels is '{args.class_labels}'; it must be a list of classes like 1,2,3.")
    classes = [int(part) for part in args.class_labels.split(",")]
    if max(classes) >= denoiser.classes:
        raise options.UserError(f"--class_labels: class {max(classes)} is out of range, the model knows 0 to "
                                f"{denoiser.classes - 1}.")  # fmt: skip
    return classes


def folder_of(args, sampler, denoiser, dataset_name, calls):
    """Where the images go."""
    if args.outdir:
        return Path(args.outdir)
    root = Path("samples") / ("grids" if args.grid else "")
    name = f"{sampler.name}_nfe{calls.para_nfe}" + f"_npoints{sampler.points}" * (sampler.tables is not None)
    if denoiser.family in SEEDS:
        return root / f"{denoiser.family}_{'epd' if sampler.tables is not None else name}"
    return root / (dataset_name or denoiser.family) / name


def settings_of(args, sampler, denoiser, model, precision, prompts, negative, processes):
    """What the images depend on, as JSON holds it: images of other settings must not be mixed with them."""
    from brisk import sd_models

    solver = {name: value for name, value in sampler.options._asdict().items() if name not in ("noise", "churn_max")}
    names = ["guidance_type", "guidance_rate", "classifier", "class_labels", "generator_device", "subdirs", "grid",
             "round_timesteps", "clip_denoised"]  # fmt: skip
    found = {
        "model": model.source or model.gmm_file,
        "weights": None if denoiser.network is None else sd_models.fingerprint(denoiser.network), "resolution": denoiser.resolution,
        "solver": sampler.name, "noise_levels": sampler.sigmas.tolist(), "solver_options": solver,
        "tables": None if sampler.tables is None else [table.tolist() for table in sampler.tables],
        "precision": precision, "prompts": prompts, "negative_prompt": negative,
    }  # fmt: skip
    if args.grid:
        found |= {"batch": args.batch, "processes": processes}
    if args.grid or (args.prompt_index == "position" and prompts and len(prompts) > 1):
        names.append("seeds")
    return found | {name: getattr(args, name) for name in names}


def batches_of(args, folder, seeds, intervals, rank, world):
    """[(seeds, files)] of the batches of this process that are missing: a file per seed, or one grid for all.

    Args: `intervals`: how many states --return_inters saves of each.
    """
    from brisk import sample_seeds

    suffixes = SUFFIXES[:intervals] if args.return_inters else ()
    if args.grid:
        own = enumerate(sample_seeds.batches(seeds, args.batch, rank, world))
        named = [(batch, [image_folder.grid_file(folder, place * world + rank)]) for place, batch in own if batch]
        return [(batch, files) for batch, files in named if not image_folder.is_drawn(folder, files[0], suffixes)]
    files = {seed: image_folder.picture_file(folder, seed, args.subdirs) for seed in seeds}
    missing = [seed for seed, file in files.items() if not image_folder.is_drawn(folder, file, suffixes)]
    batches = sample_seeds.batches(missing, args.batch, rank, world) if missing else []
    return [(batch, [files[seed] for seed in batch]) for batch in batches if batch]


def pictures(args, denoiser, states, split_rank):
    """[(suffix of the file's name, uint8 (B, H, W, 3))] of every interval's state with --return_inters, then of the last.

    Only the first of several processes that share an image decodes it.
    """
    states = list(states) if args.return_inters else [deque(states, maxlen=1).pop()]
    if split_rank:
        return []
    named = list(zip(SUFFIXES, states, strict=False)) * args.return_inters + [("", states[-1])]
    images = [(suffix, image_folder.quantise(denoiser.decode(state))) for suffix, state in named]
    return [(suffix, image_folder.tile(values)[None] if args.grid else values) for suffix, values in images]


def main(argv=None):
    args, given = parse_args(argv)
    from brisk import predictor, predictor_files

    # 1 the predictor, and what the flags say
    known = predictor_files.load(args.predictor_path) if args.predictor_path else None
    if args.describe:
        return print(predictor.describe(known))
    wanted, config, said = resolve(args, known)
    if args.seeds:
        read_seeds(args.seeds)  # refused before anything is loaded

    # 2 processes
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env, reduce
    from tqdm import tqdm

    from brisk import checkpoint, denoiser_sources, denoisers, epd, epd_sampling, runlog, sample_seeds, sd_models

    runlog.quiet_libraries()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(days=1))
    runlog.check_processes(state)
    rank, world, say = state.process_index, state.num_processes, print if state.is_main_process else lambda *_: None
    split = epd.Split(rank, world, lambda total: reduce(total, "sum")) if args.split_branches and world > 1 else None

    # 3 the model
    if args.generator_device == "cuda" and state.device.type != "cuda":
        raise options.UserError(f"--generator_device cuda needs a GPU, this process has {state.device.type}.")
    family = denoiser_sources.family_of(wanted.dataset_name, wanted.backend)
    asked = args.dtype or ("fp16" if args.use_fp16 else None)
    precision, warning = epd_sampling.precision_of(asked, config.get("torch_dtype"), family, state.device)
    denoiser = load_model(wanted, known, state.device, sd_models.DTYPES[precision])
    said += [warning] * bool(warning)
    if known is not None:
        said += refuse(epd_sampling.denoiser_conflicts(known, denoiser), args.force_model)
    args.seeds, args.batch = args.seeds or SEEDS.get(denoiser.family, "0-63"), args.batch or BATCH.get(denoiser.family, 64)
    seeds = read_seeds(args.seeds)
    negative = config.get("negative_prompt") if args.negative_prompt is None else args.negative_prompt
    negative = negative if denoiser.takes == "prompts" else None
    epd_sampling.check_guidance(denoiser, args.guidance_type, args.classifier, negative)
    if denoiser.family == "dit":
        denoiser.decode(torch.zeros(1, *denoiser.shape, device=denoiser.device))  # some have no VAE: said before work starts
    classifier = denoiser_sources.load_classifier(args.classifier, state.device) if args.guidance_type == "cg" else None
    prompts, classes = prompts_of(args, denoiser, seeds), classes_of(args, denoiser)
    empty = prompts == [""] and not args.prompt and args.guidance_type != "uncond"
    said += ["no prompt was given, the empty one is used."] * empty

    # 4 the plan
    sampler = sampler_of(args, known, denoiser)
    pairs = epd_sampling.guided_in_pairs(denoiser, args.guidance_type, args.guidance_rate)
    calls = epd_sampling.cost(sampler, pairs)
    folder = folder_of(args, sampler, denoiser, wanted.dataset_name, calls)
    for sentence in said + idle_flags(args, given, known, denoiser, world):
        say(f"warning: {sentence}")
    say(epd_sampling.describe(sampler, denoiser, calls, pairs, folder))
    if args.dry_run:
        return

    # 5 settings on disk
    settings = settings_of(args, sampler, denoiser, wanted, precision, prompts, negative, world)
    if not args.overwrite:
        image_folder.check_settings(folder, RECORD, settings, "give another --outdir, or --overwrite")
    if not (folder / RECORD).exists() and image_folder.pictures_in(folder):
        raise options.UserError(f"{folder} holds pictures and no {RECORD}: give another --outdir.")
    runlog.open_output(rank, folder)
    state.wait_for_everyone()
    earlier = image_folder.read_json(folder / RECORD)
    record = {"settings": settings, "options": options.public(args), "nfe": calls._asdict(), "seconds_per_image": None,
              "model": {"family": denoiser.family, "source": wanted.source or wanted.gmm_file, "resolution": denoiser.resolution},
              "predictor": known and known.name, "device": str(state.device), "processes": world}  # fmt: skip
    if state.is_main_process:
        if args.overwrite:
            for path in (*image_folder.pictures_in(folder), *image_folder.pictures_in(image_folder.intermediate(folder))):
                path.unlink()
        record["seconds_per_image"] = None if args.overwrite else earlier.get("seconds_per_image")
        checkpoint.write_atomically(folder / RECORD, json.dumps(record, indent=1))
    state.wait_for_everyone()
    batches = batches_of(args, folder, seeds, calls.intervals, *((0, 1) if split else (rank, world)))
    state.wait_for_everyone()  # all have looked before anyone writes

    # 6 draw
    runlog.allow_fast_maths(args.allow_tf32)
    if args.compile and denoiser.network is not None:
        (denoiser.network.model if denoiser.family == "edm" else denoiser.network).compile(dynamic=False)  # two numbers of rows
    paired = sample_seeds.prompts_of(prompts, seeds, args.prompt_index) if prompts else {}
    total, pending, started = sum(len(batch) for batch, _ in batches), [], time.perf_counter()
    bar = tqdm(total=total, desc="sampling", unit="image", dynamic_ncols=True, disable=not state.is_main_process)
    try:
        with ThreadPoolExecutor(4) as writers, torch.no_grad():
            for batch, files in batches:
                x, labels = epd_sampling.start(sampler, denoiser, batch, args.generator_device)
                wants = [paired[seed] for seed in batch] if prompts else labels
                if classes:
                    wants = torch.tensor([classes[seed % len(classes)] for seed in batch])
                direction = denoisers.direction_for(denoiser, wants, len(batch), args.guidance_type, args.guidance_rate,
                                                    [negative] * len(batch) if negative else None, classifier)  # fmt: skip
                if args.max_branch_batch:
                    direction = epd.in_chunks(direction, args.max_branch_batch)
                found = pictures(args, denoiser, epd_sampling.states(sampler, direction, x, split), split and rank)
                for written in pending:  # of the last batch: files are written while the next one is drawn
                    written.result()
                pending = [writers.submit(image_folder.save, *file) for file in image_folder.named(folder, files, found)]
                bar.update(len(batch))
            for written in pending:
                written.result()
    except KeyboardInterrupt:
        raise options.UserError(f"stopped; the images in {folder} are whole, the same command draws the others.", 130) from None
    bar.close()

    # 7 report
    state.wait_for_everyone()
    drawn = total if split else sum(gather_object([total]))
    seconds = (time.perf_counter() - started) / max(drawn, 1)
    if state.is_main_process and drawn:
        record["seconds_per_image"] = seconds
        checkpoint.write_atomically(folder / RECORD, json.dumps(record, indent=1))
    timing = f", {drawn} drawn now, {seconds:.4f} s/image" if drawn else ", nothing was left to draw"
    say(f"{len(seeds)} images in {folder}{timing}")


if __name__ == "__main__":
    options.run(main)
