#!/usr/bin/env python
"""Distil Stable Diffusion (SD1, SD2, SDXL; full or LoRA) to 1-8 steps by sub-path linear approximation (SLAM / SPLAM).

Equations: arXiv 2404.13903, each a function of brisk/splam.py. Launch with `accelerate launch`, or plain `python`.
"""

import copy
import functools
import sys
import time
from pathlib import Path

from brisk import options

CONFIGS = Path(__file__).resolve().parent / "configs/splam"


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--pretrained_teacher_model", required=True, help="pipeline folder or hub id of the teacher")
    add("--pretrained_vae_model_name_or_path", help="another VAE (folder or hub id), e.g. an fp16-safe one for SDXL")
    add("--teacher_revision", help="hub revision of the teacher")
    add("--revision", help="used where --teacher_revision is not given")
    add("--variant", help="weight variant of the teacher's files, e.g. fp16")
    group = parser.add_argument_group("method (arXiv 2404.13903)")
    add = group.add_argument
    add(
        "--w_scale",
        type=options.number(float),
        default=8.0,
        help="w of cond + w (cond - uncond): a pipeline's scale minus 1",
    )
    add("--num_ddim_timesteps", type=options.COUNT, default=50, help="N, the teacher's solver steps")
    add("--loss_type", choices=("l2", "huber"), default="l2", help="distance of the consistency loss")
    add("--huber_c", type=options.POSITIVE, default=1e-3, help="width of the Huber loss")
    add("--ema_decay", type=options.FRACTION, default=0.95, help="EMA rate of the target network")
    add("--unet_time_cond_proj_dim", type=options.number(int, low=4), default=256, help="width of gamma's embedding")
    add("--timestep_scaling_factor", type=options.POSITIVE, default=10.0, help="scaling in c_skip and c_out")
    add("--gamma_min", type=options.BELOW_ONE, default=0.0, help="gamma is drawn from (gamma_min, 1]")
    add("--gamma_one_prob", type=options.FRACTION, default=0.0, help="probability of forcing gamma = 1 (1: LCM)")
    add("--gamma_embed_scale", type=options.NOT_NEGATIVE, default=1000.0, help="frequency scale of gamma's embedding")
    add("--cond_proj_init", choices=("zero", "default"), default="zero", help="zero: the student starts as the teacher")
    add(
        "--subpath_param",
        choices=("paper", "snr"),
        default="paper",
        help="snr: student input matched in signal to noise",
    )
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="default: the teacher scheduler's")
    add(
        "--teacher_dtype",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="auto: half under --mixed_precision",
    )
    options.add_flag(group, "--cast_teacher_unet", "accepted: the teacher is cast by default, see --teacher_dtype")
    add("--vae_dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="auto: fp32 where fp16 overflows")
    add("--vae_encode_batch_size", type=options.COUNT, help="images per VAE call; default 32, SDXL 8")
    options.add_flag(
        group, "--use_fix_crop_and_size", "SDXL: tell the networks (resolution, resolution) and crop (0, 0)"
    )
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    options.add_flag(group, "--use_lora", "train adapters that fit any base model instead of all weights")
    add("--lora_rank", type=options.COUNT, default=64, help="rank")
    add("--lora_alpha", type=options.POSITIVE, default=64.0, help="alpha")
    add("--lora_dropout", type=options.BELOW_ONE, default=0.0, help="dropout")
    add(
        "--lora_target_modules",
        help="comma-separated module names; default: all attention, feed-forward and convolutions",
    )
    options.add_flag(group, "--lora_ema", "use an average of the adapters as the target")
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add("--validation_steps", type=options.COUNT_OR_ZERO, default=200, help="optimizer steps between samples; 0: none")
    add("--validation_prompts", help="prompts separated by '|', or a text file of them; default: four built-in ones")
    add("--validation_num_inference_steps", default="1,2,4", help="sampling steps, comma-separated")
    add("--num_validation_images", type=options.COUNT, default=4, help="images per prompt")
    options.add_data_options(parser)
    options.add_batch_options(parser)
    options.add_optimizer_options(parser, learning_rate=1e-4)
    options.add_speed_options(parser)
    options.add_run_options(parser, output_dir="splam-distilled", project="splam-distill")
    return options.parse(parser, argv, CONFIGS)


def check_args(args):
    """The numbers of validation steps; UserError for options that contradict each other."""
    if args.use_lora and args.teacher_dtype in ("fp16", "bf16"):
        raise options.UserError("--use_lora shares the teacher's weights: --teacher_dtype must be auto or fp32.")
    steps = options.read_counts("--validation_num_inference_steps", args.validation_num_inference_steps)
    if args.validation_steps and max(steps) > args.num_ddim_timesteps:
        raise options.UserError(
            f"--validation_num_inference_steps {max(steps)} is above --num_ddim_timesteps {args.num_ddim_timesteps}: "
            "the model knows no more steps than that."
        )
    return steps


def effects(args, mixed_precision):
    """For each flag that may do nothing: (whether it counts in this run, what it needs)."""
    lora = {name: (args.use_lora, "--use_lora") for name in
            ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_ema")}  # fmt: skip
    full = {name: (not args.use_lora, "full training (--use_lora is set)") for name in
            ("unet_time_cond_proj_dim", "gamma_embed_scale", "cond_proj_init")}  # fmt: skip
    return options.common_effects(args, mixed_precision) | lora | full | {
        "vae_encode_batch_size": (not args.precomputed_shards, "online encoding (--precomputed_shards is set)"),
        "huber_c": (args.loss_type == "huber", "--loss_type huber"),
        "ema_decay": (not args.use_lora or args.lora_ema, "--lora_ema (--use_lora is set)"),
        "cast_teacher_unet": (mixed_precision in ("fp16", "bf16"), "--mixed_precision fp16 or bf16"),
        "num_validation_images": (args.validation_steps > 0, "--validation_steps"),
        "validation_prompts": (args.validation_steps > 0, "--validation_steps"),
    }  # fmt: skip


def make_student(args, teacher, warn):
    """(student, None, width of its timestep_cond), or for LoRA (the teacher itself, LoraConfig, None)."""
    from brisk import sd_models

    if teacher.config.time_cond_proj_dim:
        again = f", and --w_scale {args.w_scale:g} guides it once more" if args.w_scale else ""
        warn(f"The teacher takes a timestep_cond of width {teacher.config.time_cond_proj_dim}: it is guidance-distilled already"
             f"{again}; --pretrained_teacher_model should be the model that it was distilled from.")  # fmt: skip
    if args.use_lora:
        targets = args.lora_target_modules.split(",") if args.lora_target_modules else sd_models.LORA_TARGETS
        return teacher, sd_models.add_lora(teacher, args.lora_rank, args.lora_alpha, args.lora_dropout, targets), None
    cond_dim = teacher.config.time_cond_proj_dim or args.unet_time_cond_proj_dim
    return sd_models.create_student(teacher, cond_dim, args.cond_proj_init), None, cond_dim


def main(argv=None):
    # 1 options
    args, given = parse_args(argv)
    step_counts, wanted = check_args(args), options.data_options(args)
    prompts = options.read_prompts(args.validation_prompts)
    import torch  # noqa: I001
    from accelerate.utils import broadcast_object_list
    from diffusers import DDPMScheduler
    from tqdm import tqdm

    from brisk import checkpoint, hub, network_files, optim, runlog, schedules, sd_export, sd_inputs, sd_models
    from brisk import seeding, sources, splam

    # 2 accelerator and seeds and log
    accelerator = runlog.create_accelerator(
        args.output_dir, args.logging_dir, args.gradient_accumulation_steps, args.mixed_precision,
        "none" if args.dry_run else args.report_to, needs_whole_tensors=args.use_lora or args.use_8bit_adam,
    )  # fmt: skip
    device, rank, is_main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    output, log = runlog.open_output(rank, args.output_dir), runlog.setup_logging(accelerator)
    stop = checkpoint.StopSignal(accelerator)
    for sentence in options.without_effect(given, effects(args, accelerator.mixed_precision)):
        log.warning(sentence)
    resume = checkpoint.find_checkpoint(output, args.resume_from_checkpoint, log.info)
    saved = checkpoint.read_state(resume) if resume else {"step": 0}
    seed = broadcast_object_list([saved.get("seed", seeding.fresh_seed()) if args.seed is None else args.seed])[0]
    seeding.seed_libraries(seed, "start")
    push = args.push_to_hub and is_main and not args.dry_run
    repo_id = hub.create_repository(output, args.hub_model_id, args.hub_token) if push else None

    # 3 models (frozen, trainable)
    load_parts = functools.partial(
        sd_models.load_parts, args.pretrained_teacher_model, args.teacher_revision or args.revision, args.variant,
        args.cache_dir, args.pretrained_vae_model_name_or_path,
    )  # fmt: skip
    with accelerator.main_process_first():
        parts = load_parts()
    resolution = sd_models.check_resolution(parts, args.resolution)
    prediction_type = args.prediction_type or parts.scheduler_config.get("prediction_type", "epsilon")
    alphas_cumprod = DDPMScheduler.from_config(parts.scheduler_config).alphas_cumprod
    facts = {name: getattr(args, name) for name in ("num_ddim_timesteps", "use_lora")}
    facts["prediction_type"] = prediction_type
    try:
        grid = schedules.solver_grid(alphas_cumprod, args.num_ddim_timesteps).to(device)
        schedules.check_prediction_type(prediction_type, grid.alpha_cumprod_start)
        checkpoint.check_same(saved, **facts)
    except ValueError as error:
        raise options.UserError(str(error)) from None
    scheduler = sd_export.lcm_scheduler(
        parts.scheduler_config, prediction_type, args.num_ddim_timesteps, args.timestep_scaling_factor
    )
    teacher = parts.unet
    student, lora_config, cond_dim = make_student(args, teacher, log.warning)

    # 4 memory and precision
    half = sd_models.DTYPES.get(accelerator.mixed_precision, torch.float32)
    teacher_dtype = half if args.teacher_dtype == "auto" else sd_models.DTYPES[args.teacher_dtype]
    vae_dtype = sd_models.vae_dtype(args.vae_dtype, half, args.pretrained_vae_model_name_or_path, parts.is_xl)
    manifest = args.precomputed_shards and sd_models.cache_manifest(parts, resolution)
    sd_models.place(parts, device, vae_dtype, half)
    sd_models.cast_frozen(teacher.to(device), teacher_dtype)
    student.to(device).train()
    ema = None if args.use_lora else optim.EMA(copy.deepcopy(student))
    target_dtype = torch.float32 if args.use_lora else half
    target_net = student if args.use_lora else ema.network
    networks = {"online": student} if args.use_lora else {"target": target_net, "online": student}
    use_xformers = args.enable_xformers_memory_efficient_attention
    for network in {teacher, *networks.values()}:
        sd_models.speed_up(network, args.channels_last, use_xformers, args.compile, log.warning)
        use_xformers = use_xformers and device.type == "cuda"  # elsewhere one warning is enough
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    runlog.allow_fast_maths(args.allow_tf32)
    blank = sd_inputs.encode_blank(parts, device)
    sd_models.set_aside(sources.unused_modules(wanted, parts))

    # 5 EMA and optimizer
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    lora_master = [parameter.detach().clone() for parameter in trainable] if args.lora_ema and args.use_lora else None
    if ema:
        ema.work_in(target_dtype)
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    optimizer = optim.create_optimizer(
        "adamw8bit" if args.use_8bit_adam else "adamw", trainable, rate, (args.adam_beta1, args.adam_beta2),
        args.adam_weight_decay, args.adam_epsilon, device, log.warning,
    )  # fmt: skip

    # 6 data
    rows = sources.open_rows(wanted, args.cache_dir, log.warning)
    position = sources.find_position(wanted, rows, seed, resume, saved, accelerator, log.warning)
    batches = sources.open_batches(
        wanted, rows, sd_inputs.Tokenize(parts.tokenizers), args.train_batch_size, resolution, manifest, accelerator, seed,
        position, log.warning,
    )  # fmt: skip
    max_steps = sources.plan_steps(wanted, rows, args.num_train_epochs, args.max_train_steps, args.train_batch_size,
                                   args.gradient_accumulation_steps, accelerator.num_processes)  # fmt: skip

    # 7 schedule and prepare
    lr_scheduler = optim.create_lr_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, max_steps)
    unet, optimizer = optim.prepare(accelerator, student, optimizer, args.train_batch_size, args.max_grad_norm)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]  # FSDP replaces them
    networks = {name: network for name, network in networks.items() if not hasattr(network, "unshard")}  # to validate

    # 8 state and resume
    save, load = network_files.save_networks, network_files.load_networks
    stored = {"network": unet, "name": "unet", "averages": {"unet_target": ema}}
    if args.use_lora:
        save, load, stored = sd_export.save_adapters, sd_export.load_adapters, {"unet": unet, "lora_master": lora_master}
    checkpoint.use_network_hooks(accelerator, save, load, {"accelerator": accelerator, **stored})
    step, micro_step = saved["step"], saved["step"] * args.gradient_accumulation_steps
    if resume:
        accelerator.load_state(str(resume))
        lr_scheduler.load_state_dict(saved["lr_scheduler"])
        log.info(f"Resuming from {resume}: step {step} of {max_steps}.")
        for sentence in options.changed_options(saved.get("options", {}), options.public(args)):
            log.warning(sentence)

    # 9 manifest and dry run
    counts = {"global_batch": global_batch, "processes": accelerator.num_processes, "max_train_steps": max_steps, "seed": seed,
              "parameters": student.num_parameters(), "trainable_parameters": sum(p.numel() for p in trainable)}  # fmt: skip
    log.info("  ".join(f"{name} {value:,}" if name != "seed" else f"seed {value}" for name, value in counts.items()))
    if is_main and not args.dry_run:
        checkpoint.set_aside_earlier(output, resume, log.warning)
        runlog.write_manifest(output, options.public(args), {**facts, **counts})
    runlog.start_trackers(accelerator, args.tracker_project_name, options.public(args), output / args.logging_dir)
    snr_table = splam.log_snr_table(alphas_cumprod).to(device) if args.subpath_param == "snr" else None
    guard = optim.FiniteGuard(("latents", "prompt embeddings", "teacher", "target", "student", "loss"), device)
    run_log = runlog.RunLog(accelerator, None if args.dry_run else output, args.log_every, global_batch, step)
    state = {**facts, "seed": seed, "processes": accelerator.num_processes, "options": options.public(args)}
    uncond = sd_inputs.unconditional(parts, blank)
    fixed_sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], device=device)
    progress = tqdm(total=max_steps, initial=step, desc="SLAM", unit="step", disable=not is_main, dynamic_ncols=True)

    # 10 loop
    while step < max_steps:
        # 10a batch
        batch = sd_models.to_device(run_log.next_batch(batches), device)
        with accelerator.accumulate(unet):
            torch.manual_seed(seeding.derive(seed, rank, micro_step, "dropout"))
            draw = seeding.generator(seed, rank, micro_step, "noise", device=device)
            micro_step += 1

            # 10b encode or read cache
            latents, embeddings, sizes = sd_inputs.encode_batch(
                parts, batch, blank, draw, resolution, args.vae_encode_batch_size, accelerator.autocast()
            )
            sizes = fixed_sizes if args.use_fix_crop_and_size else sizes
            cond = sd_inputs.condition(parts, embeddings, sizes, len(latents))
            both = sd_inputs.stack_conditions(cond, sd_inputs.condition(parts, uncond, sizes, len(latents)))

            # 10c noise and time
            index = torch.randint(args.num_ddim_timesteps, (len(latents),), generator=draw, device=device)
            noise = torch.randn(latents.shape, generator=draw, device=device)
            uniform = torch.rand(2, len(latents), generator=draw, device=device)
            gamma = splam.draw_fraction(uniform, args.gamma_min, args.gamma_one_prob)
            start, end = grid.start_timesteps[index], grid.end_timesteps[index]
            a, s = schedules.signal_and_noise(grid.alpha_cumprod_start[index], latents)
            a_end, s_end = schedules.signal_and_noise(grid.alpha_cumprod_end[index], latents)
            noisy = a * latents + s * noise

            # 10d teacher: one guided DDIM step, then the target at its end
            student.eval()
            with torch.no_grad(), accelerator.autocast(), sd_models.adapters_off(teacher, args.use_lora):
                guided = sd_models.predict(teacher, teacher_dtype, noisy.repeat(2, 1, 1, 1), start.repeat(2), both)
            x_end, _, _ = splam.guided_ddim_step(
                *guided.chunk(2), noisy, a, s, a_end, s_end, args.w_scale, prediction_type
            )
            embedded = splam.gamma_embedding(torch.ones_like(gamma), cond_dim, args.gamma_embed_scale)
            with torch.no_grad(), accelerator.autocast(), optim.swapped(trainable, lora_master):
                target_out = sd_models.predict(target_net, target_dtype, x_end, end, cond, embedded)
            target_x0, _ = schedules.to_x0_eps(target_out, x_end, a_end, s_end, prediction_type)
            target = splam.consistency_output(x_end, target_x0, end, args.timestep_scaling_factor)

            # 10e student: anywhere on the sub-path
            student.train()
            point, sigma = splam.sub_path_point(noisy, x_end, gamma, a, s, a_end, s_end)
            embedded = splam.gamma_embedding(gamma, cond_dim, args.gamma_embed_scale)
            student_in, student_time, rho = splam.student_input(point, start, sigma, a, snr_table)
            with accelerator.autocast():
                student_out = sd_models.predict(unet, torch.float32, student_in, student_time, cond, embedded)
            x0 = splam.student_x0(student_out, point, a, s, sigma, rho, prediction_type)
            prediction = splam.consistency_output(point, x0, start, args.timestep_scaling_factor)

            # 10f loss
            loss = splam.distillation_loss(prediction, target, args.loss_type, args.huber_c)
            guard.watch(latents, embeddings[0], guided, target, student_out, loss)

            # 10g backward, clip, step, EMA
            accelerator.backward(loss)
            run_log.add(loss=loss)
            if not accelerator.sync_gradients:
                continue
            grad_norm = optim.whole(accelerator.clip_grad_norm_(trainable, args.max_grad_norm))
            optim.step_if_finite(optimizer, guard.finish_step(grad_norm, scaled=half == torch.float16))
            optimizer.zero_grad(set_to_none=True)
            lr_scheduler.step()
            if ema:
                ema.update(student.parameters(), args.ema_decay)
            elif lora_master:
                optim.lerp_(lora_master, [parameter.detach() for parameter in trainable], args.ema_decay)
        step += 1
        progress.update()

        # 10h log
        run_log.add(grad_norm=grad_norm)
        if run_log.due(step) or step == max_steps or args.dry_run:
            run_log.flush(step, progress, lr=lr_scheduler.get_last_lr()[0], skipped_steps=guard.check(),
                          skipped_samples=sum(batches.skipped.values()) or None)  # fmt: skip
        if args.dry_run:
            break

        # 10i save
        received = stop.agreed()
        paused = time.perf_counter()
        if step % args.checkpointing_steps == 0 or received or step == max_steps:
            state["lr_scheduler"] = lr_scheduler.state_dict()
            limit = args.checkpoints_total_limit
            problem = checkpoint.save_checkpoint(accelerator, output, step, state, batches.position, limit)
            log.error(problem) if problem else log.info(f"Saved {output}/checkpoint-{step}.")
        if received:
            advice = "this step is not saved" if problem else "go on with --resume_from_checkpoint=latest"
            log.warning(f"Stopped by signal {received} after step {step}; {advice}.")
            accelerator.end_training()
            sys.exit(128 + received)

        # 10j validate
        if args.validation_steps and step % args.validation_steps == 0 and is_main:
            sd_export.validate(accelerator, parts, networks, scheduler, prompts, step_counts, 1.0, args.num_validation_images,
                               resolution, output / f"validation/step-{step:06d}", step, seed)  # fmt: skip
        run_log.pause(time.perf_counter() - paused)
    progress.close()

    # 11 export
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(unet)
    if args.dry_run:
        log.info("Dry run: one step was taken, nothing was saved.")
    elif is_main:
        if {half, vae_dtype} != {torch.float32} and not args.use_lora:  # the components as they were before the cast
            parts = load_parts()
        card = {"teacher": args.pretrained_teacher_model, "name": repo_id or str(output), "w": args.w_scale, "steps": max_steps,
                "batch": global_batch, "resolution": resolution, "n": args.num_ddim_timesteps, "loss": args.loss_type,
                "lr": rate, "prompt": prompts[0]}  # fmt: skip
        sd_export.export(output, parts, student, weights, ema, lora_config, lora_master, scheduler, card)
        log.info(f"Saved the distilled model in {output}.")
        if repo_id:
            hub.upload(output, repo_id, args.hub_token, args.logging_dir)
    accelerator.wait_for_everyone()  # else the other processes would leave the group while the main one still writes
    accelerator.end_training()


if __name__ == "__main__":
    options.run(main)
