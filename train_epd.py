#!/usr/bin/env python
"""Distil EPD-Solver: learn where K parallel directions per interval are taken and how they count, for any diffusion model.

Equations: arXiv 2507.14797 and 2512.22796; the student is brisk/epd.py, its training brisk/epd_distill.py. The network stays as
it is and no data are needed: 4 S K numbers are learned, for S intervals, against a solver of many steps. Launch with
`accelerate launch`, or plain `python`.
"""

import json
import sys
import time
from pathlib import Path

from brisk import epd_options, options

CONFIGS = Path(__file__).resolve().parent / "configs/epd"
CUT_TEACHERS = ("dpm", "heun", "euler", "dpm2", "ddim")  # whose intervals can be cut into sub-steps
MULTISTEP_TEACHERS = {"ipndm": 4, "dpmpp": 3, "unipc": 3, "deis": 4, "ipndm_v": 4}  # and their highest orders
INITS = ("spread", "normal", "thirds")
CUSTOMARY_RHO = {"polynomial": 7.0, "time_uniform": 1.0, "discrete": 1.0}  # the other types have no power
UPDATE_MODES = ("auto", "per_step", "final_only", "detach", "joint")


def parse_seed(text):
    """A whole number, or None for `random`."""
    return None if text == "random" else options.COUNT_OR_ZERO(text)


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    epd_options.add_model_options(parser, cache_dir=False)
    options.add_flag(parser, "--round_timesteps", "tell a network of discrete timesteps trained ones only")
    options.add_flag(parser, "--clip_denoised", "keep the image of a pixel U-Net in [-1, 1]; default: as its scheduler says", None)
    group = parser.add_argument_group("student (arXiv 2507.14797)")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--sampler_stu", choices=("epd", "ipndm"), default="epd", help="EPD, or its plug-in for iPNDM")
    add("--num_steps", type=options.number(int, low=2), default=4, help="noise levels N; the student makes 2 (N - 1) calls in turn")
    add("--num_points", type=options.COUNT, default=2, help="parallel directions K per interval")
    flag("--afs", "analytic first step: one call less")
    add("--scale_dir", type=options.BELOW_ONE, default=0.05, help="how far the factors of directions may be from 1")
    add("--scale_time", type=options.BELOW_ONE, default=0.05, help="how far the factors of noise levels may be from 1")
    flag("--fcn", "factors of directions are 1 in the last interval")
    add("--max_order", type=options.number(int, 1, 4), help="order of ipndm and of multistep teachers; default 3")
    add("--schedule_type", choices=epd_options.SCHEDULE_TYPES, default="polynomial", help="kind of noise levels")
    add("--schedule_rho", type=options.POSITIVE, help="its power; default 7 of polynomial, else 1")
    add("--init", choices=INITS, default="spread", help="tables at the start: spread, normal (as published), thirds")
    group = parser.add_argument_group("teacher")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--sampler_tea", choices=(*CUT_TEACHERS, *MULTISTEP_TEACHERS), default="dpm", help="the solver to be reached")
    add("--M", type=options.COUNT_OR_ZERO, default=3, help="noise levels that it has inside every interval of the student")
    add("--teacher_substeps", type=options.COUNT, help="sub-steps of each of its intervals; default 2, of multistep solvers 1")
    flag("--predict_x0", "dpmpp and unipc extrapolate x0, else the noise", True)
    flag("--lower_order_final", "dpmpp and unipc lower their order at the end", True)
    group = parser.add_argument_group("training (section 3)")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--prompt_path", help="captions for models of prompts: a table with a column text, prompt or caption, or one a line")
    add("--prompt", help="one prompt instead")
    add("--total_kimg", type=options.POSITIVE, default=10.0, help="length in thousands of latents")
    add("--max_train_steps", type=options.COUNT, help="length in batches; overrides total_kimg")
    add("--batch", type=options.COUNT, default=64, help="latents per batch over all processes")
    add("--batch_gpu", type=options.COUNT, help="latents per process at once; default: its share of the batch")
    add("--learning_rate", type=options.NOT_NEGATIVE, default=5e-3, help="of Adam")
    flag("--coslr", "let it go to 0.01 by a cosine")
    add("--update_mode", choices=UPDATE_MODES, default="auto", help="when Adam steps; auto: as published for model and student")
    flag("--detach_history", "ipndm: pass no gradient through earlier directions", True)
    add("--feature_model", help="TorchScript network whose features the last interval is compared in")
    add("--alpha", type=options.NOT_NEGATIVE, default=10.0, help="weight of that comparison")
    add("--ema_decay", type=options.BELOW_ONE, default=0.0, help="average the tables over batches; 0: off")
    add("--eval_every", type=options.COUNT_OR_ZERO, default=20, help="batches between two validations; 0: none")
    add("--eval_samples", type=options.COUNT, default=64, help="latents to validate on, the same in all runs")
    add("--eval_steps", type=options.number(int, low=2), default=100, help="levels of the Heun run to compare with")
    group = parser.add_argument_group("precision, memory and speed")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="of the network; default: as accelerate is configured")
    flag("--gradient_checkpointing", "compute the network's activations again: slower, less memory")
    add("--max_branch_batch", type=options.COUNT, help="at most so many rows per network call")
    flag("--bench", "let cuDNN look for its fastest kernels", True)
    options.add_run_options(parser, output_dir="exps", project="epd")
    group = parser.add_argument_group("names and snapshots")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--desc", help="text at the end of the name of the run's folder")
    flag("--nosubdir", "write into output_dir itself")
    add("--tick", type=options.POSITIVE, default=10.0, help="thousands of latents per tick; each is logged, besides log_every")
    add("--snap", type=options.COUNT_OR_ZERO, default=10, help="ticks between two snapshots of the predictor; 0: the last alone")
    add("--dump", type=options.COUNT_OR_ZERO, default=50, help="ticks between two checkpoints besides checkpointing_steps; 0: none")
    parser.set_defaults(checkpointing_steps=50)
    parser.exclusive.append(("prompt", "prompt_path"))
    parser._option_string_actions["--seed"].type = parse_seed  # `random` is the published default
    for name, others in {"output_dir": ("--outdir",), "learning_rate": ("--lr",), "batch": ("--train_batch_size",),
                         "dry_run": ("-n",), "resume_from_checkpoint": ("--resume",)}.items():  # fmt: skip
        parser.alias(f"--{name}", *others)
    args, given = options.parse(parser, argv, CONFIGS)
    args.teacher_substeps = args.teacher_substeps or (2 if args.sampler_tea in CUT_TEACHERS else 1)
    rho = CUSTOMARY_RHO.get(args.schedule_type)
    args.schedule_rho = rho and (args.schedule_rho or rho)
    return args, given


def check_args(args):
    """UserError for options that contradict each other."""
    highest = MULTISTEP_TEACHERS.get(args.sampler_tea)
    if highest and args.teacher_substeps > 1:
        raise options.UserError(f"--teacher_substeps {args.teacher_substeps} cannot be: {args.sampler_tea} remembers earlier "
                                f"intervals; only {', '.join(CUT_TEACHERS)} can be cut.")  # fmt: skip
    if highest and (args.max_order or 3) > highest:
        raise options.UserError(f"--max_order {args.max_order} is above {highest}, the most of --sampler_tea {args.sampler_tea}.")
    if args.init == "thirds" and args.num_points != 2:
        raise options.UserError(f"--init thirds places two points; --num_points is {args.num_points}.")
    if args.guidance_type in ("cfg", "cg") and args.guidance_rate is None:
        raise options.UserError(f"--guidance_type {args.guidance_type} needs --guidance_rate.")
    if (args.guidance_type == "cg") != bool(args.classifier):
        raise options.UserError("--guidance_type cg and --classifier need each other.")
    if args.desc and "/" in args.desc:
        raise options.UserError(f"--desc {args.desc} is part of a folder's name and cannot have a slash.")
    if args.feature_model and not Path(args.feature_model).is_file():
        raise options.UserError(f"--feature_model {args.feature_model} is no file.")


def effects(args, mixed_precision, denoiser):
    """For each flag that may do nothing: (whether it counts in this run, what it needs)."""
    has_order = args.sampler_stu == "ipndm" or args.sampler_tea in MULTISTEP_TEACHERS
    prompts = denoiser.takes == "prompts" and args.guidance_type != "uncond"
    return {name: (args.sampler_tea in ("dpmpp", "unipc"), "--sampler_tea dpmpp or unipc")
            for name in ("predict_x0", "lower_order_final")} | {
        "max_order": (has_order, "--sampler_stu ipndm or a multistep teacher"),
        "schedule_rho": (args.schedule_type in CUSTOMARY_RHO, "a --schedule_type that has a power"),
        "round_timesteps": (denoiser.table is not None, "a model of discrete timesteps"),
        "clip_denoised": (denoiser.family == "adm", "a pixel U-Net of discrete timesteps"),
        "fcn": (args.scale_dir, "--scale_dir above 0"),
        "detach_history": (args.sampler_stu == "ipndm", "--sampler_stu ipndm"),
        "alpha": (args.feature_model, "--feature_model"),
        "guidance_rate": (args.guidance_type in ("cfg", "cg"), "--guidance_type cfg or cg"),
        "prompt": (prompts, "a model of prompts, guided by something else than uncond"),
        "prompt_path": (prompts, "a model of prompts, guided by something else than uncond"),
        "total_kimg": (not args.max_train_steps, "leaving out --max_train_steps"),
        "eval_samples": (args.eval_every, "--eval_every above 0"),
        "eval_steps": (args.eval_every, "--eval_every above 0"),
        "desc": (not args.nosubdir, "a folder of its own (--nosubdir is set)"),
        "mixed_precision": (args.mixed_precision in (None, mixed_precision), "a GPU: float32 is used (bf16 works on CPUs)"),
        "hub_token": (args.push_to_hub, "--push_to_hub"),
        "hub_model_id": (args.push_to_hub, "--push_to_hub"),
    }  # fmt: skip


def ticked(args, step, ticks=1):
    """Whether a multiple of `ticks` ticks of --tick thousand latents was passed in the batch that led to `step`; 0: never."""
    latents = 1000 * args.tick * ticks
    return bool(ticks) and step * args.batch // latents > (step - 1) * args.batch // latents


def main(argv=None):
    # 1 options
    args, given = parse_args(argv)
    check_args(args)
    import torch  # noqa: I001
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from brisk import checkpoint, denoiser_sources, denoisers, epd, epd_distill, epd_run, epd_sampling, epd_validation, hub
    from brisk import optim, predictor, predictor_files, runlog, sd_models, seeding, solvers

    # 2 accelerator and seeds and log
    accelerator = runlog.create_accelerator(
        args.output_dir, args.logging_dir, 1, args.mixed_precision, "none" if args.dry_run else args.report_to,
    )  # fmt: skip
    device, rank, is_main, processes = (accelerator.device, accelerator.process_index, accelerator.is_main_process,
                                        accelerator.num_processes)  # fmt: skip
    if args.batch % (processes * (args.batch_gpu or 1)):
        at_once = f" x --batch_gpu {args.batch_gpu}" if args.batch_gpu else ""
        raise options.UserError(f"--batch {args.batch} cannot be divided among {processes} processes{at_once}.")
    dataset = args.dataset_name or args.pretrained_model_name_or_path or args.backend or "gmm"
    calls = epd.cost(args.num_steps, args.num_points, args.afs).para_nfe
    name = epd_run.run_name(dataset, args.num_steps, calls, args.sampler_stu, args.sampler_tea, args.M,
                            (args.schedule_type, args.schedule_rho), args.afs, args.desc)  # fmt: skip
    output = Path(args.output_dir)
    if not args.nosubdir:  # one process decides: the others might see its folder already
        output = epd_run.choose_folder(output, name, args.resume_from_checkpoint == "latest")
        output = Path(broadcast_object_list([output])[0])
    accelerator.project_configuration.logging_dir = str(output / args.logging_dir)
    log = runlog.setup_logging(accelerator)
    stop = checkpoint.StopSignal(accelerator)
    resume = checkpoint.find_checkpoint(output, args.resume_from_checkpoint, log.info)
    saved = checkpoint.read_state(resume) if resume else {"step": 0}
    if resume:
        epd_run.check_same_student(options.public(args), saved["options"], resume)
    drawn = args.seed if args.seed is not None else saved.get("seed", seeding.fresh_seed())
    seed = args.seed = broadcast_object_list([drawn])[0]
    seeding.seed_libraries(seed, "start")

    # 3 models (frozen, trainable)
    dtype = sd_models.DTYPES.get(accelerator.mixed_precision, torch.float32)
    wanted = epd_options.model_options(args)._replace(round_timesteps=args.round_timesteps, clip_denoised=args.clip_denoised)
    denoiser = denoiser_sources.load(wanted, device, dtype)
    classifier = denoiser_sources.load_classifier(args.classifier, device) if args.classifier else None
    cost = epd.cost(args.num_steps, args.num_points, args.afs,
                    epd_sampling.guided_in_pairs(denoiser, args.guidance_type, args.guidance_rate))  # fmt: skip
    feature = epd_run.load_feature(args.feature_model, denoiser) if args.feature_model else None
    for sentence in options.without_effect(given, effects(args, accelerator.mixed_precision, denoiser)):
        log.warning(sentence)
    raw = epd.initial_raw(args.num_steps - 1, args.num_points, args.init, seeding.generator(seed, "tables"))
    raw = epd.Tables(*(table.to(device).requires_grad_() for table in raw))
    ranges = (args.scale_dir, args.scale_time, args.fcn)
    order, flow = epd.history_order(args.sampler_stu, args.max_order), denoiser.flow

    # 4 memory and precision
    torch.backends.cudnn.benchmark = args.bench

    def direction_of(given, count):
        direction = denoisers.direction_for(denoiser, given, count, args.guidance_type, args.guidance_rate, classifier=classifier)
        direction = epd.checkpointed(direction) if args.gradient_checkpointing else direction
        return epd.in_chunks(direction, args.max_branch_batch) if args.max_branch_batch else direction

    # 5 EMA and optimizer
    averages = epd.Tables(*(table.detach().clone() for table in raw))
    best = epd.Tables(*(table.detach().clone() for table in raw))
    optimizer = torch.optim.Adam(raw, lr=args.learning_rate)

    # 6 data
    prompts = None
    if denoiser.takes == "prompts" and args.guidance_type != "uncond":
        prompts = epd_options.read_prompts(args.prompt, args.prompt_path, "--prompt_path")
        if prompts is None:
            raise options.UserError("the model draws what prompts say: give captions by --prompt_path, or one --prompt.")
    step = saved["step"]
    share = args.batch // processes
    rows = (rank * share, (rank + 1) * share)
    batches = epd_run.draw_batches(args.batch, args.batch_gpu or share, denoiser, prompts, seed, step, rows)

    # 7 schedule and prepare
    grids = []
    for points in (args.num_steps, epd_distill.teacher_points(args.num_steps, args.M)):
        try:
            grids.append(denoisers.grid(denoiser, args.schedule_type, points, args.schedule_rho).tolist())
        except ValueError as error:
            raise options.UserError(f"--schedule_type {args.schedule_type}: {error}") from None
    levels, teacher_levels = grids
    max_steps = args.max_train_steps or -int(-1000 * args.total_kimg // args.batch)
    total = max_steps + 1 if args.max_train_steps else epd_distill.total_batches(args.total_kimg, args.batch)
    mode = epd_distill.resolve_update_mode(args.update_mode, args.sampler_stu, args.num_steps, args.dataset_name)
    teacher = solvers.SolverOptions(flow=flow, max_order=args.max_order or 3, predict_x0=args.predict_x0,
                                    lower_order_final=args.lower_order_final)  # fmt: skip
    try:
        direction_of(epd_run.draw(1, denoiser, prompts, "probe")[1], 1)
    except ValueError as error:
        raise options.UserError(f"--guidance_type {args.guidance_type}: {error}") from None

    # 8 state and resume
    untrained = epd.Tables(*(table.clone() for table in averages))
    others = {"average": averages, "best": best}
    arguments = {"accelerator": accelerator, "raw": raw, "optimizer": optimizer, "others": others}
    checkpoint.use_network_hooks(accelerator, epd_run.save_tables, epd_run.load_tables, arguments)
    record = saved.get("record", {"start": None, "best": None, "history": []})
    if resume:
        accelerator.load_state(str(resume))
        for sentence in options.changed_options(saved["options"], options.public(args)):
            log.warning(sentence)
        log.info(f"Resuming from {resume}: step {step} of {max_steps}.")

    def predictor_of(tables, at):
        training = {"images": at * args.batch, "batch": args.batch, "learning_rate": args.learning_rate, "coslr": args.coslr,
                    "update_mode": mode, "init": args.init, "seed": seed, "ema_decay": args.ema_decay, "rmse": record["best"],
                    "features": args.feature_model and Path(args.feature_model).name}  # fmt: skip
        return epd_run.make_predictor(name, args, denoiser, levels, tables, training)

    # 9 manifest and dry run
    log.info(f"The student:\n{predictor.describe(predictor_of(averages, step))}")
    counts = {"batch": args.batch, "processes": processes, "max_train_steps": max_steps, "update_mode": mode,
              "teacher_levels": len(teacher_levels), "seed": seed}  # fmt: skip
    log.info("  ".join(f"{key} {value}" for key, value in counts.items()))
    log.info(f"Output: {output}")
    if args.dry_run:
        log.info("Dry run: nothing was trained, nothing was saved.")
        accelerator.end_training()
        return
    if not (args.nosubdir or resume):
        output = Path(broadcast_object_list([epd_run.claim_folder(output) if is_main else None])[0])
        accelerator.project_configuration.logging_dir = str(output / args.logging_dir)
    runlog.open_output(rank, output)
    repo_id = hub.create_repository(output, args.hub_model_id, args.hub_token) if args.push_to_hub and is_main else None
    if is_main:
        checkpoint.set_aside_earlier(output, resume, log.warning, ("export", "predictor-*.json"))
        runlog.write_manifest(output, options.public(args), counts)
    runlog.start_trackers(accelerator, args.tracker_project_name, options.public(args), output / args.logging_dir)
    if args.eval_every:
        size = args.batch_gpu or share
        error_of = epd_validation.open_validation(args.eval_samples, size, args.eval_steps, denoiser, prompts, direction_of, levels,
                                                  accelerator)  # fmt: skip

    def sampler_of(tables):
        plain = solvers.SolverOptions(afs=args.afs, flow=flow, max_order=order)
        return epd_sampling.Sampler(args.sampler_stu, torch.tensor(levels), plain, epd.effective(tables, *ranges))

    def validate(at):
        error = error_of(sampler_of(averages))
        record["history"].append([at, error])
        if error < (record["best"]["error"] if record["best"] else float("inf")):
            record["best"] = {"step": at, "error": error}
            torch._foreach_copy_(list(best), list(averages))
            if is_main:
                predictor_files.write(predictor_of(best, at), output / "export/predictor.json")
        accelerator.log({"validation/rmse": error}, step=at)
        log.info(f"Validation at step {at}: RMSE {error:.4g}.")

    if args.eval_every and record["start"] is None:
        record["start"] = epd_validation.measure_start(denoiser, sampler_of(untrained), cost.para_nfe, error_of)
    if args.eval_every and resume and (step % args.eval_every == 0 or step == max_steps):
        validate(step)  # the checkpoint was written before it
    guard = optim.FiniteGuard(("loss",), device, "lower --learning_rate, or use --mixed_precision bf16 or no")
    run_log = runlog.RunLog(accelerator, output, args.log_every, args.batch, step, "train/")
    state = {"seed": seed, "processes": processes, "options": options.public(args), "record": record}
    progress = tqdm(total=max_steps, initial=step, desc="EPD", unit="batch", disable=not is_main, dynamic_ncols=True)

    # 10 loop
    while step < max_steps:
        # 10a batch
        batch = run_log.next_batch(batches)

        # 10b encode or read cache
        directions = [direction_of(given, len(noise)) for noise, given in batch]

        # 10c noise and time
        starts = [noise if flow else levels[0] * noise for noise, _ in batch]

        # 10d teacher
        solver = (teacher_levels, args.M, teacher, args.teacher_substeps)
        targets = [epd_distill.teacher_states(args.sampler_tea, direction, x, *solver)
                   for direction, x in zip(directions, starts, strict=True)]  # fmt: skip

        # 10e student
        norms, chains = [[] for _ in range(cost.intervals)], []
        for direction, x, goals in zip(directions, starts, targets, strict=True):
            rows = epd_distill.fresh_rows(raw, *ranges)
            states = epd.solve(direction, x, levels, rows, order, args.afs, flow, None, args.detach_history, mode == "detach")
            # 10f loss
            chains.append(epd_distill.objectives(epd_distill.noted(states, goals, norms), goals, args.batch, feature, args.alpha))

        # 10g backward, clip, step, EMA
        if args.coslr:
            optimizer.param_groups[0]["lr"] = epd_distill.cosine_rate(args.learning_rate, step, total)
        losses = []
        for parts, found in epd_distill.updates(chains, raw, mode):
            parts, found = epd_run.add_up(accelerator, parts, found)
            epd_distill.set_gradients(raw, found)
            optimizer.step()
            losses += parts
            run_log.add(grad_norm=torch.stack(found).norm())
        optim.lerp_(averages, [table.detach() for table in raw], args.ema_decay)
        step += 1
        progress.update()

        # 10h log
        loss = torch.stack(losses).sum()
        guard.watch(loss)
        guard.finish_step(None, scaled=False)
        run_log.add(loss=loss, **{f"interval/{n}": torch.stack(own).mean() for n, own in enumerate(norms)})
        if run_log.due(step) or ticked(args, step) or step == max_steps:
            values = epd_run.flat_rows(epd.effective(averages, *ranges))
            run_log.flush(step, progress, lr=optimizer.param_groups[0]["lr"], skipped_steps=guard.check(), **values)

        # 10i save
        received = stop.agreed()
        paused = time.perf_counter()
        if is_main and (ticked(args, step, args.snap) or step == max_steps):
            path = output / f"predictor-{step * args.batch // 1000:06d}.json"
            predictor_files.write(predictor_of(averages, step), path)
        if step % args.checkpointing_steps == 0 or ticked(args, step, args.dump) or received or step == max_steps:
            problem = checkpoint.save_checkpoint(accelerator, output, step, state, {}, args.checkpoints_total_limit)
            log.error(problem) if problem else log.info(f"Saved {output}/checkpoint-{step}.")
        if received:
            advice = "this step is not saved" if problem else "go on with --resume_from_checkpoint latest"
            log.warning(f"Stopped by signal {received} after step {step}; {advice}.")
            accelerator.end_training()
            sys.exit(128 + received)

        # 10j validate
        if args.eval_every and (step % args.eval_every == 0 or step == max_steps):
            validate(step)
        run_log.pause(time.perf_counter() - paused)
    progress.close()

    # 11 export
    accelerator.wait_for_everyone()
    if is_main:
        chosen = (best, record["best"]["step"]) if record["best"] else (averages, step)
        content = predictor_of(*chosen)
        predictor_files.write(content, output / "export/predictor.json")
        quality = epd_run.say_errors(record, cost.para_nfe, args.eval_steps)
        report = {**record, **cost._asdict(), "steps": max_steps, "batch": args.batch}
        checkpoint.write_atomically(output / "report.json", json.dumps(report, indent=1) + "\n")
        epd_run.write_card(output, content, args, denoiser, max_steps, quality)
        log.info(quality)
        if record["best"] and record["best"]["error"] > record["start"]["untrained"]:
            log.warning("The trained tables are worse than those at the start: train longer, or lower --learning_rate.")
        log.info(f"Saved the predictor in {output}/export/predictor.json; sample with sample_epd.py --predictor_path {output}.")
        if repo_id:
            hub.upload(output, repo_id, args.hub_token, args.logging_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    options.run(main)
