#!/usr/bin/env python
"""Remove blocks from a Stable Diffusion U-Net (SD1, SD2, SDXL) and distil what is left: BK-SDM, KOALA, SSD-1B.

Equations: arXiv 2305.15798, each a function of brisk/bksdm.py. Launch with `accelerate launch`, or plain `python`.
"""

import argparse
import copy
import functools
import json
import sys
import time
from pathlib import Path

from brisk import options

CONFIGS = Path(__file__).resolve().parent / "configs/bksdm"
BROKEN_SHARE = 0.01  # of unreadable images, above which a run stops
WEIGHTS = {"lambda_sd": "loss_sd", "lambda_kd_output": "loss_kd_output", "lambda_kd_feat": "loss_kd_feat"}


class ListConfigs(argparse.Action):
    """`--list_configs`: print the names and leave."""

    def __call__(self, parser, namespace, values, option_string=None):
        print("\n".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))))
        parser.exit()


def add_student_options(parser):
    """Which networks: the teacher, and what the student keeps of it."""
    group = parser.add_argument_group("teacher and student")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    add("--pretrained_model_name_or_path", "--pretrained_teacher_model", required=True,
        help="pipeline folder or hub id of the teacher")  # fmt: skip
    add("--teacher_unet", help="another U-Net (folder or hub id) as the teacher; the rest stays the pipeline's")
    add("--pretrained_vae_model_name_or_path", help="another VAE (folder or hub id), e.g. an fp16-safe one for SDXL")
    add("--revision", help="hub revision of the teacher")
    add("--variant", help="weight variant of the teacher's files, e.g. fp16")
    add("--preset", "--unet_config_name", default="bk_small", help="which blocks go: bk_base, bk_small, bk_tiny, "
        "small_sd_xl, tiny_sd_xl, koala_1b, koala_700m, ssd_1b, segmind_vega; sd_small and sd_tiny by family")  # fmt: skip
    add("--unet_config_path", help="folder of own configs: the student is <folder>/<--unet_config_name>/config.json")
    add("--student_config", help="JSON file of the student's U-Net config, in place of a preset")
    add("--student_init_path", help="go on from this student (folder or hub id) instead of the teacher's weights")
    flag("--use_copy_weight_from_teacher", "start from the teacher's weights; False: from random ones", True)
    flag("--no_copy_weight_from_teacher", "the same as --use_copy_weight_from_teacher False")


def add_method_options(parser):
    """Losses, their weights, features, noise, times and captions."""
    group = parser.add_argument_group("method (arXiv 2305.15798)")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    weight = {"type": options.NOT_NEGATIVE, "default": 1.0}
    add("--lambda_sd", **weight, help="weight of the denoising loss")
    add("--lambda_kd_output", "--output_weight", **weight, help="weight of the distance to the teacher's output")
    add("--lambda_kd_feat", "--feature_weight", **weight, help="weight of the distance to the teacher's features")
    add("--feature_set", help="bk, stage, layer, self_attn, or a JSON file of [teacher module, student module] pairs; "
        "default: the preset's")  # fmt: skip
    flag("--feat_relative", "divide each pair by the mean square of the teacher's feature")
    add("--snr_gamma", type=options.POSITIVE, help="min-SNR weights of the first two losses (5 is usual)")
    flag("--snr_on_features", "weight the features too, as --snr_gamma or --debias says")
    flag("--debias", "weights 1 / sqrt(SNR) of the first two losses")
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="default: the teacher scheduler's")
    add("--noise_offset", type=options.NOT_NEGATIVE, default=0.0, help="constant noise per channel (0.05 is usual)")
    add("--input_perturbation", type=options.NOT_NEGATIVE, default=0.0, help="more noise in the input alone (0.1)")
    add("--timestep_sampling", choices=("uniform", "later", "earlier", "range", "cubic"), default="uniform",
        help="which timesteps to favour")  # fmt: skip
    add("--empty_prompt_mode", choices=("auto", "encode", "zeros"), default="auto",
        help="dropped captions: the empty prompt or zeros; auto: as the teacher samples")  # fmt: skip
    flag("--random_conditioning", "swap captions for others, the more the noisier the input (arXiv 2504.02011)")
    add("--random_conditioning_lambda", type=options.NOT_NEGATIVE, default=5.0, help="exp(-lambda (1 - t / T))")
    add("--extra_prompts_file", help="text file of captions to swap in, half of the time, besides those of the batch")


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    parser.add_argument("--list_configs", action=ListConfigs, nargs=0, help="print the names of the shipped configs")
    parser.add_argument("--dump_config", help="write the resolved options to this YAML file and stop")
    add_student_options(parser)
    add_method_options(parser)
    group = parser.add_argument_group("frozen networks")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    precision = {"choices": ("auto", "fp32", "fp16", "bf16"), "default": "auto"}
    add("--teacher_dtype", **precision, help="auto: half under --mixed_precision")
    add("--vae_dtype", **precision, help="auto: fp32 where fp16 overflows")
    add("--vae_batch_size", type=options.COUNT, default=8, help="images per VAE call")
    flag("--pre_compute_text_embeddings", "encode all captions of a folder or dataset once, before training")
    flag("--compile_teacher", "torch.compile the teacher alone")
    group = parser.add_argument_group("average and validation")
    add = group.add_argument
    options.add_flag(group, "--use_ema", "average the student's weights; the average is what is exported")
    add("--ema_decay", type=options.FRACTION, default=0.9999, help="EMA decay, reached by warm-up")
    add("--validation_prompts", "--valid_prompt", help="prompts separated by '|', or a text file; none: no samples")
    add("--validation_steps", "--valid_steps", type=options.COUNT, default=500, help="optimizer steps between samples")
    add("--num_valid_images", type=options.COUNT, default=2, help="images per prompt")
    add("--validation_inference_steps", type=options.COUNT, default=25, help="sampling steps")
    options.add_flag(parser, "--save_pipeline", "write a complete pipeline, not the U-Net alone")
    options.add_data_options(parser, dataloader_num_workers=4)
    options.add_batch_options(parser)
    options.add_optimizer_options(parser, learning_rate=5e-5, lr_warmup_steps=0)
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "adafactor"), default="adamw", help="optimizer")
    options.add_speed_options(parser)
    options.add_run_options(parser, output_dir=None, project="bksdm-distill")
    args, given = options.parse(parser, argv, CONFIGS)
    name = Path(args.config).stem if args.config else args.preset
    args.output_dir = args.output_dir or f"work_dirs/{name}"
    args.optimizer = "adamw8bit" if args.use_8bit_adam and args.optimizer == "adamw" else args.optimizer
    args.use_copy_weight_from_teacher &= not args.no_copy_weight_from_teacher
    return args, given


def check_args(args):
    """UserError for options that contradict each other."""
    wanted = options.data_options(args)
    if args.snr_gamma and args.debias:
        raise options.UserError("--snr_gamma and --debias are two ways to weight the same losses: give one.")
    if args.use_8bit_adam and args.optimizer != "adamw8bit":
        raise options.UserError(f"--use_8bit_adam contradicts --optimizer {args.optimizer}.")
    if sum(bool(given) for given in (args.unet_config_path, args.student_config, args.student_init_path)) > 1:
        raise options.UserError("give one of --unet_config_path, --student_config and --student_init_path.")
    if args.pre_compute_text_embeddings and not (args.train_data_dir or args.dataset_name):
        raise options.UserError(
            "--pre_compute_text_embeddings needs --train_data_dir or --dataset_name; for shards, scripts/"
            "precompute_latents.py stores the embeddings."
        )
    if args.random_conditioning and not args.extra_prompts_file and args.train_batch_size == 1:
        raise options.UserError(
            "--random_conditioning takes captions from the batch: give --extra_prompts_file, or a --train_batch_size above 1."
        )
    return wanted


def effects(args, mixed_precision):
    """For each flag that may do nothing: (whether it counts in this run, what it needs)."""
    validation = {name: (args.validation_prompts, "--validation_prompts") for name in
                  ("validation_steps", "num_valid_images", "validation_inference_steps")}  # fmt: skip
    adam = {name: (args.optimizer != "adafactor", "--optimizer adamw") for name in
            ("adam_beta1", "adam_beta2", "adam_epsilon")}  # fmt: skip
    preset = not (args.student_config or args.student_init_path)
    copies = (not args.student_init_path, "the teacher's weights to start from (--student_init_path is set)")
    return options.common_effects(args, mixed_precision) | validation | adam | {
        "vae_batch_size": (not args.precomputed_shards, "online encoding (--cached_latents is set)"),
        "snr_on_features": (args.snr_gamma or args.debias, "--snr_gamma or --debias"),
        "feat_relative": (args.lambda_kd_feat > 0, "a --lambda_kd_feat above 0"),
        "empty_prompt_mode": (args.proportion_empty_prompts > 0, "--proportion_empty_prompts"),
        "random_conditioning_lambda": (args.random_conditioning, "--random_conditioning"),
        "extra_prompts_file": (args.random_conditioning, "--random_conditioning"),
        "preset": (preset, "a preset (--student_config or --student_init_path is set)"),
        **dict.fromkeys(("use_copy_weight_from_teacher", "no_copy_weight_from_teacher"), copies),
        "ema_decay": (args.use_ema, "--use_ema"),
    }  # fmt: skip


def make_student(args, teacher, latent):
    """(the checked plan, the student as a trainable float32 U-Net) for the flags."""
    from brisk import sd_models, students

    config, student, copies = sd_models.plain_config(teacher), None, args.use_copy_weight_from_teacher
    if args.student_init_path:
        student, own = students.load(args.student_init_path, args.cache_dir)
        chosen, copies = (None, own), False
    else:
        chosen = students.choose_config(config, args.preset, args.unet_config_path, args.student_config)
    plan = students.make_plan(config, *chosen, latent, args.feature_set, copies)
    return plan, student or students.create(plan, teacher, copies)


def open_captions(args, wanted, parts, device, is_main, say):
    """(rows of the folder or dataset or None, caption -> tensors, extra prompts or None)."""
    from tqdm import tqdm

    from brisk import sd_inputs, sources

    rows = sources.open_rows(wanted, args.cache_dir, say)
    if rows is not None and args.max_train_samples:
        rows = rows.first(args.max_train_samples)
    extra = None
    if args.random_conditioning and args.extra_prompts_file:
        extra = sources.read_lines("--extra_prompts_file", args.extra_prompts_file)
    if not args.pre_compute_text_embeddings:
        return rows, sd_inputs.Tokenize(parts.tokenizers), extra
    captions = list(extra or [])
    for caption in rows.captions():
        captions += caption if isinstance(caption, list) else [caption] * (caption is not None)
    captions = [caption.strip() for caption in captions]
    with tqdm(total=len(set(captions)), desc="captions", unit="caption", disable=not is_main, dynamic_ncols=True) as bar:
        return rows, sd_inputs.EmbeddingTable(parts, captions, device, bar), extra


def main(argv=None):
    # 1 options
    args, given = parse_args(argv)
    if args.dump_config:
        options.write_config(args, args.dump_config)
        return
    wanted = check_args(args)
    prompts = options.read_prompts(args.validation_prompts) if args.validation_prompts else []
    import torch  # noqa: I001
    from accelerate.utils import broadcast_object_list
    from diffusers import DDPMScheduler
    from tqdm import tqdm

    from brisk import bksdm, checkpoint, hub, network_files, optim, runlog, schedules, sd_export, sd_inputs
    from brisk import sd_models, seeding, sources, students
    from brisk.feature_taps import FeatureTaps

    # 2 accelerator and seeds and log
    accelerator = runlog.create_accelerator(
        args.output_dir, args.logging_dir, args.gradient_accumulation_steps, args.mixed_precision,
        "none" if args.dry_run else args.report_to, needs_whole_tensors=args.optimizer != "adamw",
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
    teacher_at = (args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir,
                  args.pretrained_vae_model_name_or_path, args.teacher_unet, "--pretrained_model_name_or_path")  # fmt: skip
    with accelerator.main_process_first():
        parts = sd_models.load_parts(*teacher_at)
    teacher = parts.unet
    factor = sd_models.vae_factor(parts.vae)
    resolution = sd_models.check_resolution(parts, args.resolution or teacher.config.sample_size * factor)
    plan, student = make_student(args, teacher, resolution // factor)
    prediction_type = args.prediction_type or parts.scheduler_config.get("prediction_type", "epsilon")
    alphas_cumprod = DDPMScheduler.from_config(parts.scheduler_config).alphas_cumprod.to(device)
    facts = {**plan.identity(), "prediction_type": prediction_type}
    try:
        schedules.check_prediction_type(prediction_type)
        checkpoint.check_same(saved, **facts)
    except ValueError as error:
        raise options.UserError(str(error)) from None

    # 4 memory and precision
    half = sd_models.DTYPES.get(accelerator.mixed_precision, torch.float32)
    teacher_dtype = half if args.teacher_dtype == "auto" else sd_models.DTYPES[args.teacher_dtype]
    vae_dtype = sd_models.vae_dtype(args.vae_dtype, half, args.pretrained_vae_model_name_or_path, parts.is_xl)
    manifest = sd_models.cache_manifest(parts, resolution) if args.precomputed_shards else None
    sd_models.place(parts, device, vae_dtype, half)
    teacher.to(device, teacher_dtype)
    student.to(device).train()
    ema = optim.EMA(copy.deepcopy(student)) if args.use_ema else None
    of_teacher, of_student = map(FeatureTaps, (teacher, student), zip(*plan.pairs, strict=True))
    use_xformers = args.enable_xformers_memory_efficient_attention
    for network, compiled in ((teacher, args.compile or args.compile_teacher), (student, args.compile),
                              *([(ema.network, False)] if ema else [])):  # fmt: skip
        sd_models.speed_up(network, args.channels_last, use_xformers, compiled, log.warning)
        use_xformers = use_xformers and device.type == "cuda"  # elsewhere one warning is enough
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    runlog.allow_fast_maths(args.allow_tf32)
    rows, tokenize, extra = open_captions(args, wanted, parts, device, is_main, log.warning)
    blank = sd_inputs.encode_blank(parts, device, args.empty_prompt_mode)
    sd_models.set_aside(parts.text_encoders if args.pre_compute_text_embeddings else
                        sources.unused_modules(wanted, parts, needs_text=extra))  # fmt: skip

    # 5 EMA and optimizer
    if ema:
        ema.work_in(torch.float32)
    trainable = list(student.parameters())
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    optimizer = optim.create_optimizer(
        args.optimizer, trainable, rate, (args.adam_beta1, args.adam_beta2), args.adam_weight_decay, args.adam_epsilon,
        device, log.warning,
    )  # fmt: skip

    # 6 data
    position = sources.find_position(wanted, rows, seed, resume, saved, accelerator, log.warning)
    batches = sources.open_batches(wanted, rows, tokenize, args.train_batch_size, resolution, manifest, accelerator, seed,
                                   position, log.warning, extra, BROKEN_SHARE)  # fmt: skip
    epoch_steps = sources.plan_steps(wanted, rows, 1, None, args.train_batch_size, args.gradient_accumulation_steps,
                                     accelerator.num_processes)  # fmt: skip
    max_steps = args.max_train_steps or args.num_train_epochs * epoch_steps
    epoch_steps = epoch_steps if rows is not None or args.max_train_samples else max_steps  # a stream is one epoch

    # 7 schedule and prepare
    lr_scheduler = optim.create_lr_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, max_steps)
    unet, optimizer = optim.prepare(accelerator, student, optimizer, args.train_batch_size, args.max_grad_norm)
    trainable = list(unet.parameters())  # FSDP replaces them
    if prompts and hasattr(unet, "unshard"):
        log.warning("--validation_prompts: FSDP shards the student, no samples are made.")

    # 8 state and resume
    stored = {"accelerator": accelerator, "network": unet, "name": "unet", "averages": {"unet_ema": ema} if ema else {}}
    checkpoint.use_network_hooks(accelerator, network_files.save_networks, network_files.load_networks, stored)
    step, micro_step = saved["step"], saved["step"] * args.gradient_accumulation_steps
    if resume:
        accelerator.load_state(str(resume))
        lr_scheduler.load_state_dict(saved["lr_scheduler"])
        log.info(f"Resuming from {resume}: step {step} of {max_steps}.")
        for sentence in options.changed_options(saved["options"], options.public(args)):
            log.warning(sentence)

    # 9 manifest and dry run
    for line in plan.describe(with_table=args.dry_run):
        log.info(line)
    counts = {"global_batch": global_batch, "processes": accelerator.num_processes, "max_train_steps": max_steps,
              "images": max_steps * global_batch, "feature_pairs": len(plan.pairs), "seed": seed}  # fmt: skip
    log.info("  ".join(f"{name} {value:,}" if name != "seed" else f"seed {value}" for name, value in counts.items()))
    if args.dry_run:
        log.info("Dry run: nothing was trained, nothing was saved.")
        accelerator.end_training()
        return
    if is_main:
        checkpoint.set_aside_earlier(output, resume, log.warning)
        runlog.write_manifest(output, options.public(args), {**facts, **counts})
    runlog.start_trackers(accelerator, args.tracker_project_name, options.public(args), output / args.logging_dir)
    terms = ("latents", "prompt embeddings", "teacher", "student", *WEIGHTS.values())
    guard = optim.FiniteGuard(terms, device)
    run_log = runlog.RunLog(accelerator, output, args.log_every, global_batch, step)
    state = {**facts, "seed": seed, "processes": accelerator.num_processes, "options": options.public(args)}
    progress = tqdm(total=max_steps, initial=step, desc="BK-SDM", unit="step", disable=not is_main, dynamic_ncols=True)
    last = None

    # 10 loop
    while step < max_steps:
        # 10a batch
        batch = sd_models.to_device(run_log.next_batch(batches), device)
        with accelerator.accumulate(unet):
            torch.manual_seed(seeding.derive(seed, rank, micro_step, "dropout"))
            draw = seeding.generator(seed, rank, micro_step, "noise", device=device)
            micro_step += 1

            # 10b encode or read cache
            latents, embeddings, time_ids = sd_inputs.encode_batch(
                parts, batch, None if args.random_conditioning else blank, draw, resolution, args.vae_batch_size,
                accelerator.autocast(),
            )  # fmt: skip

            # 10c noise and time
            timesteps = bksdm.draw_timesteps(torch.rand(len(latents), generator=draw, device=device), args.timestep_sampling,
                                             len(alphas_cumprod))  # fmt: skip
            normal = functools.partial(torch.randn, generator=draw, device=device)
            noise = normal(latents.shape) + args.noise_offset * normal(*latents.shape[:2], 1, 1)
            a, s = schedules.signal_and_noise(alphas_cumprod[timesteps], latents)
            target = schedules.prediction_target(latents, noise, a, s, prediction_type)
            noisy = a * latents + s * (noise + args.input_perturbation * normal(latents.shape))
            weights = bksdm.loss_weights(alphas_cumprod[timesteps], args.snr_gamma, args.debias, prediction_type)
            task_weights = weights
            if args.random_conditioning:
                chance = bksdm.unpaired_probability(timesteps, args.random_conditioning_lambda, len(alphas_cumprod))
                unpaired = torch.rand(len(latents), generator=draw, device=device) < chance
                embeddings = sd_inputs.swap_prompts(parts, batch, embeddings, blank, unpaired, draw, accelerator.autocast())
                task_weights = weights * ~unpaired
            cond = sd_inputs.condition(parts, embeddings, time_ids, len(latents))

            # 10d teacher
            of_teacher.arm()
            with torch.no_grad():
                teacher_out = sd_models.predict(teacher, teacher_dtype, noisy, timesteps, cond)

            # 10e student
            of_student.arm()
            with accelerator.autocast():
                student_out = sd_models.predict(unet, torch.float32, noisy, timesteps, cond)

            # 10f loss
            features = bksdm.feature_loss(of_student.read(), of_teacher.read(), weights if args.snr_on_features else None,
                                          args.feat_relative)  # fmt: skip
            losses = {"loss_sd": bksdm.output_loss(student_out, target, task_weights),
                      "loss_kd_output": bksdm.output_loss(student_out, teacher_out, weights),
                      "loss_kd_feat": features.sum()}  # fmt: skip
            loss = sum(getattr(args, name) * losses[term] for name, term in WEIGHTS.items())
            guard.watch(latents, embeddings[0], teacher_out, student_out, *losses.values())

            # 10g backward, clip, step, EMA
            accelerator.backward(loss)
            run_log.add(loss=loss, **losses, **{f"feat/{pair[1]}": term for pair, term in zip(plan.pairs, features, strict=True)})
            if not accelerator.sync_gradients:
                continue
            grad_norm = optim.whole(accelerator.clip_grad_norm_(trainable, args.max_grad_norm))
            optim.step_if_finite(optimizer, guard.finish_step(grad_norm, scaled=half == torch.float16))
            optimizer.zero_grad(set_to_none=True)
            lr_scheduler.step()
            if ema:
                ema.update(student.parameters(), bksdm.ema_decay(step + 1, args.ema_decay))
        step += 1
        progress.update()

        # 10h log
        run_log.add(grad_norm=grad_norm)
        if run_log.due(step) or step == max_steps:
            last = run_log.flush(step, progress, lr=lr_scheduler.get_last_lr()[0], skipped_steps=guard.check(),
                                 skipped_samples=sum(batches.skipped.values()) or None,
                                 **{f"weight/{term}": getattr(args, name) for name, term in WEIGHTS.items()})  # fmt: skip

        # 10i save
        received = stop.agreed()
        paused = time.perf_counter()
        if step % args.checkpointing_steps == 0 or received or step == max_steps:
            state["lr_scheduler"] = lr_scheduler.state_dict()
            limit = args.checkpoints_total_limit
            problem = checkpoint.save_checkpoint(accelerator, output, step, state, batches.position, limit)
            log.error(problem) if problem else log.info(f"Saved {output}/checkpoint-{step}.")
            if is_main:
                sd_export.write_loss_table(output, epoch_steps, WEIGHTS, log.warning)
        if received:
            advice = "this step is not saved" if problem else "go on with --resume_from_checkpoint=latest"
            log.warning(f"Stopped by signal {received} after step {step}; {advice}.")
            accelerator.end_training()
            sys.exit(128 + received)

        # 10j validate
        if prompts and step % args.validation_steps == 0 and is_main and not hasattr(unet, "unshard"):
            scheduler = sd_export.own_scheduler(parts.scheduler_config, prediction_type)
            sd_export.validate(accelerator, parts, {"student": ema.network if ema else student}, scheduler, prompts,
                               [args.validation_inference_steps], 7.5, args.num_valid_images, resolution,
                               output / f"validation/step-{step:06d}", step, seed)  # fmt: skip
        run_log.pause(time.perf_counter() - paused)
    progress.close()
    of_teacher.remove()
    of_student.remove()

    # 11 export
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(unet)
    if is_main:
        parts = sd_models.load_parts(*teacher_at) if args.save_pipeline and {half, vae_dtype} != {torch.float32} else parts
        card = {"teacher": args.pretrained_model_name_or_path, "name": repo_id or str(output), "steps": max_steps,
                "batch": global_batch, "resolution": resolution, "lr": rate, "preset": plan.preset or "a config of its own",
                "sizes": plan.sizes, "prompt": (prompts or options.PROMPTS)[0]}  # fmt: skip
        scheduler = sd_export.own_scheduler(parts.scheduler_config, prediction_type)
        sd_export.export_student(output, parts, student, weights, ema, scheduler if args.save_pipeline else None, card)
        report = students.report(plan, args.use_copy_weight_from_teacher and not args.student_init_path, last)
        checkpoint.write_atomically(output / "bksdm_report.json", json.dumps(report, indent=1) + "\n")
        log.info(f"Saved the student in {output}{'' if args.save_pipeline else '/unet'}.")
        if repo_id:
            hub.upload(output, repo_id, args.hub_token, args.logging_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    options.run(main)
