#!/usr/bin/env python
"""Tune EPD-Solver by rewards: residual Dirichlet policy optimisation of the tables of a predictor, for any diffusion model.

Equations: arXiv 2512.22796; the policy is brisk/epd_policy.py, its rollouts brisk/epd_rl.py, the rewards brisk/rewards.py. The
network stays as it is; 4 S K numbers are learned, for S intervals of K points. Launch with `accelerate launch`, or plain `python`.
Settings come from the sections of a YAML file, `--override section.key=value` over it, flags over both.
"""

import dataclasses
import datetime
import functools
import json
import sys
import time
from pathlib import Path

from brisk import epd_options, epd_rl_options, options

CONFIGS = Path(__file__).resolve().parent / "configs/epd"


def parse_args(argv=None):
    """(namespace, names of the flags that were given, settings, stated keys); see `--help` and `epd_rl_options.parse`."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("method (arXiv 2512.22796)")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--override", action="append", metavar="KEY=VALUE", help="value of a key of the YAML file, as ppo.rloo_k=4; repeatable")
    add("--max_train_steps", type=options.COUNT, default=10, help="updates of the policy (ppo.steps)")
    add("--rloo_group", choices=("prompt", "mixed"), default="prompt",
        help="whose mean reward is the baseline: other images of the prompt, or groups across prompts as published")  # fmt: skip
    flag("--share_latents", "the images of a prompt start from the same latent", True)
    flag("--prefer_yaml", "section model of the YAML file goes before what the predictor says of its model")
    add("--eval_prompts", help="prompts to evaluate on, as data.prompt_csv; default: a part of those, which is then held out")
    add("--eval_every", type=options.COUNT_OR_ZERO, default=100, help="updates between two evaluations of the mean table; 0: none")
    add("--eval_samples", type=options.COUNT, default=64, help="images of an evaluation, the same prompts and latents each time")
    group = parser.add_argument_group("precision, memory and speed")
    add = group.add_argument
    add("--mixed_precision", choices=("no", "fp16", "bf16"),
        help="of the network; default: model.backend_options.torch_dtype, else as accelerate is configured")  # fmt: skip
    add("--max_branch_batch", type=options.COUNT, help="at most so many rows per network call")
    options.add_run_options(parser, output_dir="exps", project="epd_rl")
    group = parser.add_argument_group("names")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--run_name", default="rl_run", help="what the run's folder is called after its date (run.run_name)")
    flag("--nosubdir", "write into output_dir itself")
    group = parser.add_argument_group("export of a run's policy, in place of training")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--export", metavar="RUN_DIR", help="write the policy of a checkpoint of this run as a predictor, and stop")
    add("--checkpoint", help="which; default: the newest; the file goes to output_dir, default RUN_DIR/export")
    add("--device", default="cpu", help="where to compute it")
    flag("--no_manifest", "write no manifest beside it")
    add("--export_point", choices=("mean", "mode"), default="mean", help="of the Dirichlet distributions")
    add("--export_scale", choices=("mean", "median"), default="mean", help="of the log-normal distributions")
    parser.set_defaults(seed=0, log_every=1, checkpointing_steps=5)
    parser.alias("--resume_from_checkpoint", "--resume")
    parser.alias("--max_train_steps", "--max_steps")
    return epd_rl_options.parse(parser, argv, CONFIGS)


def export(args, given):
    """What `--export` asks for."""
    from brisk import epd_rl

    folder = args.output_dir if "output_dir" in given else None
    path = epd_rl.export_run(args.export, args.checkpoint, folder, args.device, not args.no_manifest, args.export_point,
                             args.export_scale)  # fmt: skip
    print(f"Saved {path}; sample with sample_epd.py --predictor_path {path}.")


def read_start(settings, stated, prefer_yaml):
    """(start predictor, merged settings, sentences on what was overridden, whether its levels are other ones). UserError."""
    from brisk import predictor_files

    start = predictor_files.load(settings["data.predictor_snapshot"])
    return start, *epd_rl_options.merge_model(settings, stated, start, prefer_yaml)


def load_model(settings, start, others, device, dtype):
    """(`Denoiser`, N noise levels) of merged `settings`. Args: `others`: not the levels of the predictor `start`. UserError."""
    from brisk import denoiser_sources, denoisers, epd_sampling

    denoiser = denoiser_sources.load(epd_rl_options.model_options(settings), device, dtype)
    said = start.document["schedule"].get("flow") or {}
    resized = said.get("mu") is not None and epd_sampling.resolution_of(start) not in (None, denoiser.resolution)
    if not (others or resized):
        return denoiser, start.sigmas.tolist()
    if others and denoiser.flow:
        stated = {name: settings[f"model.flowmatch_{name}"] for name in ("mu", "shift")}
        denoiser = dataclasses.replace(denoiser, **{name: value for name, value in stated.items() if value is not None})
    kind, rho, low, high = (settings[f"model.{name}"] for name in ("schedule_type", "schedule_rho", "sigma_min", "sigma_max"))
    try:
        return denoiser, denoisers.grid(denoiser, kind, settings["model.num_steps"], rho, low, high).tolist()
    except ValueError as error:
        raise options.UserError(f"model.schedule_type {kind}: {error}") from None


def read_prompts(args, settings, denoiser, log):
    """(prompts to train on, prompts to evaluate on), None for a model that is asked without. UserError."""
    from brisk import epd_rl

    if denoiser.takes != "prompts" or settings["model.guidance_type"] == "uncond":
        if settings["data.prompt_csv"]:
            log.warning("data.prompt_csv has no effect: the model is not asked by prompts.")
        return None, None
    prompts = epd_options.read_prompts(None, settings["data.prompt_csv"], "data.prompt_csv")
    held = epd_options.read_prompts(None, args.eval_prompts, "--eval_prompts")
    if prompts is None and not args.dry_run:
        raise options.UserError("the model draws what prompts say: give data.prompt_csv, a .csv with a column text, prompt or "
                                "caption, or a file with one prompt a line.")  # fmt: skip
    if prompts is None:
        log.warning("data.prompt_csv is not given, training needs it.")
    prompts = prompts or [""]
    return (prompts, held) if held or not args.eval_every else epd_rl.hold_out(prompts, args.eval_samples)


def open_evaluation(args, settings, accelerator, denoiser, sampler, direction_of, reward, prompts):
    """A function: tables (S, K) -> {head: scores (n,)} of their images from the seeds 0, 1, 2, ..., and the prompts in turns.

    Each process draws a part of them; all get all scores.
    """
    import torch
    from tqdm import tqdm

    from brisk import epd_rl, epd_sampling

    rank, processes, count = accelerator.process_index, accelerator.num_processes, args.eval_samples
    first, end = count * rank // processes, count * (rank + 1) // processes
    size = settings["ppo.rollout_batch_size"] // processes

    def evaluate(tables):
        parts = []
        for at in tqdm(range(first, end, size), desc="Evaluation", unit="batch", disable=rank > 0, leave=False):
            seeds = range(at, min(at + size, end))
            x, given = epd_sampling.start(sampler, denoiser, seeds)
            given = [prompts[seed % len(prompts)] for seed in seeds] if prompts else given
            states = epd_rl.sample(sampler, direction_of(given, len(x)), x, tables)
            parts.append(epd_rl.score(reward, denoiser, states, given, settings["reward.batch_size"], settings["ppo.decode_rgb"]))
        own = {head: torch.cat([part[head] for part in parts]) for head in parts[0]}
        return epd_rl.gather(accelerator, own, first, count)

    return evaluate


def check_processes(args, settings, accelerator):
    """UserError where the images of an update or of an evaluation cannot be shared out."""
    processes, size = accelerator.num_processes, settings["ppo.rollout_batch_size"]
    if size % processes or (args.eval_every and args.eval_samples < processes):
        what = (f"ppo.rollout_batch_size {size} cannot be divided" if size % processes else
                f"--eval_samples {args.eval_samples} cannot be shared")  # fmt: skip
        raise options.UserError(f"{what} among {processes} processes.")


def naming_keys(run):
    """`run` of a command line, whose errors speak of keys where keys were written, not of the flags of other scripts."""

    @functools.wraps(run)
    def named(argv=None):
        parsed = parse_args(argv)
        try:
            run(*parsed)
        except options.UserError as error:
            raise options.UserError(epd_rl_options.in_keys(str(error), parsed[0].origins), error.exit_code) from None

    return named


@naming_keys
def main(args, given, settings, stated):
    # 1 options
    if args.export:
        export(args, given)
        return
    epd_rl_options.check(settings, stated)
    import numpy as np  # noqa: I001
    import torch
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from brisk import checkpoint, denoisers, epd, epd_policy, epd_rl, epd_sampling, hub, predictor, predictor_files, rewards
    from brisk import runlog, sd_models, seeding

    start, settings, overridden, others = read_start(settings, stated, args.prefer_yaml)
    for key in ("model.backend_options.cache_dir", "reward.cache_dir"):
        settings[key] = settings[key] or args.cache_dir

    # 2 accelerator and seeds and log
    stored_dtype = settings["model.backend_options.torch_dtype"] if torch.cuda.is_available() else None
    accelerator = runlog.create_accelerator(
        args.output_dir, args.logging_dir, 1, args.mixed_precision or epd_rl_options.PRECISIONS.get(stored_dtype),
        "none" if args.dry_run else args.report_to,
    )  # fmt: skip
    device, rank, is_main, processes = (accelerator.device, accelerator.process_index, accelerator.is_main_process,
                                        accelerator.num_processes)  # fmt: skip
    check_processes(args, settings, accelerator)
    output = Path(args.output_dir)
    if not args.nosubdir:  # one process decides: the others might see its folder already
        output = epd_rl.choose_folder(output, args.run_name, args.resume_from_checkpoint == "latest", datetime.datetime.now())
        output = Path(broadcast_object_list([output])[0])
    accelerator.project_configuration.logging_dir = str(output / args.logging_dir)
    log = runlog.setup_logging(accelerator)
    stop = checkpoint.StopSignal(accelerator)
    resume = checkpoint.find_checkpoint(output, args.resume_from_checkpoint, log.info)
    saved = checkpoint.read_state(resume) if resume else {"step": 0}
    seed = args.seed
    seeding.seed_libraries(seed, "start")
    for sentence in overridden:
        log.info(sentence)

    # 3 models (frozen, trainable)
    dtype = sd_models.DTYPES.get(accelerator.mixed_precision, torch.float32)
    denoiser, levels = load_model(settings, start, others, device, dtype)
    reward = None
    try:
        reward = rewards.load(epd_rl_options.reward_settings(settings), device)
    except options.UserError as error:
        if not args.dry_run:
            raise
        log.warning(f"Training needs the reward: {error}")
    wanted = (settings["ppo.train_scale_dir"], settings["ppo.train_scale_time"])
    learned = epd_rl.learns_scales(start, wanted)
    effects = epd_rl_options.effects(args, settings, accelerator.mixed_precision, denoiser.takes)
    for sentence in options.without_effect(given, effects):
        log.warning(epd_rl_options.in_keys(sentence, args.origins))
    if settings["model.backend_options.enable_model_cpu_offload"]:
        log.warning("model.backend_options.enable_model_cpu_offload has no effect: the model stays on the device.")
    if start.solver.afs:
        log.warning("The predictor takes its first step in closed form; rollouts and the tuned predictor use the network there: "
                    "one call more.")  # fmt: skip
    start = epd_rl.make_start(start, denoiser, levels, settings, learned)
    base = epd_policy.base_factors(start.tables, settings["ppo.dirichlet_concentration"], *learned, settings["ppo.scale_std"])

    # 4 memory and precision
    guidance = (settings["model.guidance_type"], settings["model.guidance_rate"] or 0.0)
    negative = settings["model.backend_options.negative_prompt"]

    def direction_of(given, count):
        direction = denoisers.direction_for(denoiser, given, count, *guidance, negative and [negative] * count)
        return epd.in_chunks(direction, args.max_branch_batch) if args.max_branch_batch else direction

    # 5 EMA and optimizer
    policy = epd_rl.make_policy(start.tables, base, settings["ppo.learning_rate"], seed)
    origin = epd_rl.mean_tables(policy)
    best = epd.Tables(*(table.clone() for table in origin[0]))

    # 6 data
    step, size, variants = saved["step"], settings["ppo.rollout_batch_size"], settings["ppo.rloo_k"]
    first, end = size * rank // processes, size * (rank + 1) // processes
    prompts, held = read_prompts(args, settings, denoiser, log)
    batches = epd_rl.draw_batches(denoiser, prompts, size, variants, args.share_latents, seed, step, (first, end))

    # 7 schedule and prepare
    sampler = epd_sampling.of_predictor(start, denoiser.flow)
    cost = epd_sampling.cost(sampler, epd_sampling.guided_in_pairs(denoiser, *guidance))
    try:
        direction_of(next(batches)[1], end - first)
    except ValueError as error:
        raise options.UserError(f"model.guidance_type {guidance[0]}: {error}") from None
    batches = epd_rl.draw_batches(denoiser, prompts, size, variants, args.share_latents, seed, step, (first, end))
    if reward is not None:  # one image shows whether it can judge this model's
        noise, given_one = next(epd_rl.draw_batches(denoiser, prompts, 1, 1, True, seed, 0, (0, 1)))
        epd_rl.score(reward, denoiser, torch.zeros_like(noise), given_one, 1, settings["ppo.decode_rgb"])

    # 8 state and resume
    arguments = {"accelerator": accelerator, "policy": policy, "best": best}
    checkpoint.use_network_hooks(accelerator, epd_rl.save_policy, epd_rl.load_policy, arguments)
    record = saved.get("record", {"start_rewards": None, "best": None, "history": []})
    if resume:
        flags = options.public(args)
        epd_rl_options.check_comparable(saved["settings"] | saved["options"], settings | flags, resume)
        changed = epd_rl_options.changed(saved["settings"], settings)
        epd_rl.check_same_start(resume, policy, changed)
        accelerator.load_state(str(resume))
        for sentence in [*changed, *options.changed_options(saved["options"], flags)]:
            log.warning(epd_rl_options.in_keys(sentence, args.origins))
        log.info(f"Resuming from {resume}: step {step} of {args.max_train_steps}.")

    # 9 manifest and dry run
    log.info(f"The start:\n{predictor.describe(start)}")
    counts = {"rollout_batch_size": size, "rloo_k": variants, "prompts_per_update": size // variants, "seed": seed,
              "processes": processes, "max_train_steps": args.max_train_steps, "prompts": prompts and len(prompts),
              **cost._asdict()}  # fmt: skip
    log.info("  ".join(f"{key} {value}" for key, value in counts.items()))
    log.info(f"Output: {output}")
    if args.dry_run:
        log.info("Dry run: nothing was trained, nothing was saved.")
        accelerator.end_training()
        return
    runlog.open_output(rank, output)
    repo_id = hub.create_repository(output, args.hub_model_id, args.hub_token) if args.push_to_hub and is_main else None
    if is_main:
        checkpoint.set_aside_earlier(output, resume, log.warning, ("export", "predictor-*.json", "report.json", "README.md"))
        runlog.write_manifest(output, epd_rl_options.resolved(args, settings), counts)
        predictor_files.write(start, output / epd_rl.START_FILE)
    flat = options.public(args) | {key: value for key, value in settings.items() if not isinstance(value, str)}
    runlog.start_trackers(accelerator, args.tracker_project_name, flat, output / args.logging_dir)
    score_images = open_evaluation(args, settings, accelerator, denoiser, sampler, direction_of, reward, held)

    def write_report(at):
        report = {**record, **cost._asdict(), "steps": at, "rollout_batch_size": size}
        checkpoint.write_atomically(output / "report.json", json.dumps(report, indent=1) + "\n")

    def evaluate(at, tables, rows, divergence):
        scores = score_images(tables)
        mixed = reward.mixed(scores).double()
        record["start_rewards"] = record["start_rewards"] or mixed.tolist()
        found = {"step": at, "kl": divergence, **epd_rl.judge(scores, mixed, torch.tensor(record["start_rewards"]))}
        accelerator.log({f"evaluation/{name}": value for name, value in found.items() if name != "step"}, step=at)
        record["history"].append(found | {"sanitised_rows": rows})
        if record["best"] is None or found["reward"] > record["best"]["reward"]:
            record["best"] = record["history"][-1]
            torch._foreach_copy_(list(best), list(tables))
        if is_main:
            write_report(at)
        log.info(f"Evaluation at update {at}: reward {found['reward']:.4g} +- {found['standard_error']:.1g}, gain "
                 f"{found['gain']:.2g} +- {found['gain_standard_error']:.1g}, KL {found['kl']:.3g}.")  # fmt: skip

    def due(at):
        return args.eval_every and (at % args.eval_every == 0 or at == args.max_train_steps)

    if args.eval_every and not record["history"]:
        evaluate(0, *origin, 0.0)
    if step and due(step):
        evaluate(step, *epd_rl.mean_tables(policy), epd_rl.divergence(policy))  # the checkpoint was written before it
    run_log = runlog.RunLog(accelerator, output, args.log_every, size, step, "train/")
    state = {"seed": seed, "processes": processes, "options": options.public(args), "settings": settings, "record": record}
    progress = tqdm(total=args.max_train_steps, initial=step, desc="EPD RL", unit="update", disable=not is_main, dynamic_ncols=True)
    began = time.perf_counter() - saved.get("elapsed_sec", 0.0)

    # 10 loop
    while step < args.max_train_steps:
        # 10a batch
        noise, labels_or_prompts = run_log.next_batch(batches)

        # 10b encode or read cache
        direction = direction_of(labels_or_prompts, end - first)

        # 10c noise and time
        x = noise if denoiser.flow else levels[0] * noise
        rng = np.random.default_rng(seeding.derive(seed, step, "actions"))
        with torch.no_grad():
            action = epd_policy.draw(policy.factors(), size, rng)
            old_log_density = epd_policy.log_density(policy.factors(), action)

        # 10d teacher: here the reward, of the images that the drawn tables make
        tables = epd.Tables(*(table[first:end] for table in epd_policy.action_tables(action, policy.start)))
        states = epd_rl.sample(sampler, direction, x, tables)
        own = epd_rl.score(reward, denoiser, states, labels_or_prompts, settings["reward.batch_size"], settings["ppo.decode_rgb"])
        scores = epd_rl.gather(accelerator, own, first, size)
        mixed = reward.mixed(scores)

        # 10e student
        advantage = epd_policy.advantages(mixed, variants, args.rloo_group)
        run_log.add(mixed_reward_mean=mixed.mean(), mixed_reward_std=mixed.std(correction=0),
                    **{f"{head}_mean": values.mean() for head, values in scores.items()})  # fmt: skip
        for rows in epd_rl.minibatches(size, settings["ppo.minibatch_size"], settings["ppo.ppo_epochs"], seed, step, "minibatches"):
            # 10f loss
            found = epd_rl.loss_of(policy, action, old_log_density, advantage, rows, settings["ppo.clip_range"],
                                   settings["ppo.kl_coef"], settings["ppo.entropy_coef"])  # fmt: skip
            # 10g backward, clip, step, EMA
            norm = epd_rl.take_step(policy, found.loss, settings["ppo.max_grad_norm"])
            run_log.add(loss=found.loss, policy_loss=found.policy_loss, kl=found.divergence, ratio=found.ratio.mean(),
                        grad_norm=norm, clip_fraction=found.clip_fraction, entropy=found.entropy)  # fmt: skip
        if processes > 1:
            epd_rl.agree(policy, device)
        step += 1
        progress.update()

        # 10h log
        if run_log.due(step) or step == args.max_train_steps:
            row = run_log.flush(step, elapsed_sec=round(time.perf_counter() - began, 3), lr=settings["ppo.learning_rate"])
            progress.set_postfix_str(f"reward {row['mixed_reward_mean']:.4g}  kl {row['kl']:.3g}", refresh=False)

        # 10i save
        received = stop.agreed()
        paused = time.perf_counter()
        if step % args.checkpointing_steps == 0 or received or step == args.max_train_steps:
            state["elapsed_sec"] = paused - began
            problem = checkpoint.save_checkpoint(accelerator, output, step, state, {}, args.checkpoints_total_limit)
            log.error(problem) if problem else log.info(f"Saved {output}/checkpoint-{step}.")
        if received:
            advice = "this update is not saved" if problem else "go on with --resume_from_checkpoint latest"
            log.warning(f"Stopped by signal {received} after update {step}; {advice}.")
            accelerator.end_training()
            sys.exit(128 + received)

        # 10j validate
        if due(step):
            evaluate(step, *epd_rl.mean_tables(policy), epd_rl.divergence(policy))
        run_log.pause(time.perf_counter() - paused)
    progress.close()

    # 11 export
    accelerator.wait_for_everyone()
    if is_main:
        last, rows = epd_rl.mean_tables(policy)
        epd_rl.write_export(output, f"predictor-{step:06d}", start, output.name, last, {"step": step}, rows, manifest=False)
        at, chosen, rows = ((record["best"]["step"], best, record["best"]["sanitised_rows"]) if record["best"] else
                            (step, last, rows))  # fmt: skip
        facts = {"run": output.name, "checkpoint": f"checkpoint-{step}" if at == step else None, "step": at, "point": "mean",
                 "scale_point": "mean", "seed": seed, "reward": settings["reward.type"], "rloo_group": args.rloo_group,
                 "share_latents": args.share_latents, "evaluation": record["best"],
                 "metrics": epd_rl.last_row(output / "metrics.jsonl", at)}  # fmt: skip
        path = epd_rl.write_export(output / "export", "predictor", start, output.name, chosen, facts, rows)
        quality = epd_rl.say_gain(record, args.eval_samples)
        write_report(step)
        epd_rl.write_card(output, predictor_files.read(path), start, settings, denoiser, step, quality)
        log.info(quality)
        if record["best"] and at == 0:
            log.warning("No evaluated table was better than the start, which is what export/predictor.json holds: train longer, or "
                        "change ppo.learning_rate.")  # fmt: skip
        log.info(f"Saved the predictor in {path}; sample with sample_epd.py --predictor_path {output}.")
        if repo_id:
            hub.upload(output, repo_id, args.hub_token, args.logging_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    options.run(main)
