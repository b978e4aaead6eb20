#!/usr/bin/env python
"""Train a DiT, or its fixed-point form FPDM: one block iterated in place of most of them, by stochastic Jacobian-free backprop.

Equations: arXiv 2401.08741 and 2212.09748; the network is brisk/dit.py, the process brisk/gaussian.py. Launch with
`accelerate launch`, or plain `python`.
"""

import copy
import re
import sys
import time
from pathlib import Path

from brisk import fpdm_options, options

CONFIGS = Path(__file__).resolve().parent / "configs/fpdm"
NO_DATA = """give one source of data: --feature_path (a folder with <dataset_name>_features and _labels of .npy files, or with \
latents.npy and labels.npy, or with .tar shards; scripts/precompute_latents.py --class_labels writes each of them), \
--train_shards_path_or_url, --train_data_dir with --vae, or --synthetic_data N to try it out."""


def parse_args(argv=None):
    """(namespace, names of the flags that were given); see `--help`."""
    parser = options.Parser(__doc__)
    fpdm_options.add_network_options(parser)
    group = parser.add_argument_group("training (arXiv 2401.08741, section 3)")
    add, flag = group.add_argument, lambda *given: options.add_flag(group, *given)
    for phase, low, high in (("no", 0, 10), ("with", 1, 12)):
        kind = {"type": options.COUNT_OR_ZERO if phase == "no" else options.COUNT}
        add(f"--fixed_point_{phase}_grad_min_iters", **kind, default=low, help=f"fewest iterations {phase} gradient")
        add(f"--fixed_point_{phase}_grad_max_iters", **kind, default=high, help="and most, both included")
    flag("--sync_iters", "the same numbers of iterations on all processes: none waits for another", True)
    add("--loss_weighting", choices=fpdm_options.LOSS_WEIGHTINGS, default="uniform", help="of the squared error")
    add("--class_dropout_prob", type=options.FRACTION, default=0.1, help="share of labels dropped, for guidance")
    add("--ema_decay", type=options.FRACTION, default=0.9999, help="EMA decay, constant from the first step")
    add("--global_batch_size", type=options.COUNT, default=512, help="images per optimizer step over all processes")
    group = parser.add_argument_group("data (one source)")
    parser.exclusive.append(fpdm_options.SOURCES)
    add = group.add_argument
    add("--feature_path", help="folder of latents: .npy files, arrays or shards (see docs/data.md)")
    add("--dataset_name", default="imagenet256", help="<dataset_name>_features and _labels below feature_path")
    add("--train_shards_path_or_url", help="WebDataset shards of latents and classes")
    add("--train_data_dir", help="folder of images, one sub-folder a class; needs --vae")
    add("--synthetic_data", type=options.COUNT, help="this many made-up latents instead")
    add("--vae", help="VAE (mse, ema, folder or hub id): encodes --train_data_dir, and is part of the exported pipeline")
    add("--vae_batch_size", type=options.COUNT, default=32, help="images per VAE call")
    options.add_flag(group, "--random_flip", "flip images left to right at random (--train_data_dir)")
    add("--dataloader_num_workers", "--num_workers", type=options.COUNT_OR_ZERO, default=4, help="loader processes")
    options.add_optimizer_options(parser, learning_rate=1e-4, lr_warmup_steps=0)
    group = parser.add_argument_group("precision, memory and speed")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as accelerate is configured")
    options.add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs", True)
    options.add_flag(group, "--gradient_checkpointing", "recompute each block and iteration: slower, less memory")
    options.add_flag(group, "--compile", "torch.compile the fixed-point iteration (of a plain DiT, the blocks)")
    group = parser.add_argument_group("names")
    group.add_argument("--output_subdir", default="runs", help="folder inside output_dir")
    group.add_argument("--name", help="folder inside that; default: a number and the settings")
    options.add_flag(group, "--debug", "TensorBoard, and 'debug' for output_subdir")
    options.add_flag(group, "--export_pt", "write every checkpoint as an official .pt file too, in checkpoints/")
    options.add_run_options(parser, output_dir="results", project="fpdm")
    parser.set_defaults(seed=0, log_every=100, checkpointing_steps=100_000, adam_weight_decay=0.0, num_train_epochs=1400)
    fpdm_options.alias_fixed_point(parser)
    for name, published in {"learning_rate": "lr", "seed": "global_seed", "num_train_epochs": "epochs", "report_to": "log_with",
                            "checkpointing_steps": "ckpt_every", "resume_from_checkpoint": "resume",
                            "gradient_checkpointing": "fp_grad_checkpointing"}.items():  # fmt: skip
        parser.alias(f"--{name}", f"--{published}")
    args, given = options.parse(parser, argv, CONFIGS)
    if args.debug:
        args.report_to, args.output_subdir = "tensorboard", "debug"
    return args, given


def check_args(args):
    """UserError for options that contradict each other."""
    if sum(getattr(args, name) is not None for name in fpdm_options.SOURCES) != 1:
        raise options.UserError(NO_DATA)
    if args.train_data_dir and not args.vae:
        raise options.UserError("--train_data_dir needs --vae to encode the images.")
    for phase in ("no", "with"):
        low, high = (getattr(args, f"fixed_point_{phase}_grad_{end}_iters") for end in ("min", "max"))
        if low > high:
            raise options.UserError(f"--fixed_point_{phase}_grad_min_iters {low} is above the most, {high}.")
    if args.flow and args.loss_weighting != "uniform":
        raise options.UserError("--loss_weighting belongs to diffusion: --flow has uniform weights only.")


def effects(args, mixed_precision):
    """For each flag that may do nothing: (whether it counts in this run, what it needs)."""
    iterating = [f"fixed_point_{phase}_grad_{end}_iters" for phase in ("no", "with") for end in ("min", "max")]
    of_layer = ["fixed_point_pre_depth", "fixed_point_post_depth", "fixed_point_pre_post_timestep_conditioning", *iterating]
    return {name: (args.fixed_point, "--fixed_point") for name in (*of_layer, "sync_iters")} | {
        "dino_supervised_dim": (args.dino_supervised, "--dino_supervised"),
        "class_dropout_prob": (not args.unsupervised, "labels (--unsupervised is set)"),
        "num_classes": (not (args.unsupervised or args.dino_supervised), "classes"),
        "random_flip": (args.train_data_dir, "--train_data_dir"),
        "vae_batch_size": (args.train_data_dir, "--train_data_dir"),
        "dataset_name": (args.feature_path, "--feature_path"),
        "lr_warmup_steps": (args.lr_scheduler != "constant", "an --lr_scheduler other than constant"),
        "mixed_precision": (args.mixed_precision in (None, mixed_precision), "a GPU: float32 is used (bf16 works on CPUs)"),
        "num_train_epochs": (not args.max_train_steps, "leaving out --max_train_steps"),
        "hub_token": (args.push_to_hub, "--push_to_hub"),
        "hub_model_id": (args.push_to_hub, "--push_to_hub"),
    }  # fmt: skip


def automatic_name(args):
    """What the run's folder is called after its number, as the published code calls it."""
    name = f"{args.model.replace('/', '-')}--{'flow' if args.flow else 'diff'}"
    name += "--unsupervised" * args.unsupervised + "--dino_supervised" * args.dino_supervised + f"--{args.learning_rate:.6f}"
    name += "--v" * args.predict_v + "--zero_snr" * args.use_zero_terminal_snr
    if not args.fixed_point:
        return f"{name}--dit"
    ranges = [f"{getattr(args, f'fixed_point_{phase}_grad_{end}_iters'):02d}" for phase in ("no", "with") for end in ("min", "max")]
    return (f"{name}--fixed_point-pre_depth-{args.fixed_point_pre_depth}-post_depth-{args.fixed_point_post_depth}"
            f"-no_grad_iters-{ranges[0]}-{ranges[1]}-with_grad_iters-{ranges[2]}-{ranges[3]}"
            f"-pre_post_time_cond_{args.fixed_point_pre_post_timestep_conditioning}")  # fmt: skip


def choose_folder(args):
    """The run's folder: by `--name`; else of the newest run of these settings if it is to be resumed, else a new number."""
    parent, name = Path(args.output_dir) / args.output_subdir, automatic_name(args)
    if args.name:
        return parent / args.name
    numbers = {int(found[1]): path for path in parent.glob("*") if (found := re.match(r"(\d{3})-", path.name))}
    same = [number for number, path in numbers.items() if path.name == f"{number:03d}-{name}"]
    same = [number for number in same if any(numbers[number].glob("checkpoint-*"))] or same
    if args.resume_from_checkpoint == "latest" and same:
        return numbers[max(same)]
    return parent / f"{max(numbers, default=-1) + 1:03d}-{name}"


def draw_iterations(args, *key):
    """(n without gradient, m with it), both uniform with both ends included (section 3.3 of the paper); None for a DiT."""
    import numpy as np

    from brisk.seeding import derive

    if not args.fixed_point:
        return None
    draw = np.random.default_rng(derive(*key, "iterations"))
    ranges = [[getattr(args, f"fixed_point_{phase}_grad_{end}_iters") for end in ("min", "max")] for phase in ("no", "with")]
    return tuple(int(draw.integers(low, high, endpoint=True)) for low, high in ranges)


def drop_labels(labels, share, null, draw):
    """Labels (B,) or (B, D), each replaced by `null` (a class, or a number for vectors) with probability `share`."""
    import torch

    dropped = torch.rand(len(labels), generator=draw, device=labels.device) < share
    return torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), torch.full_like(labels, null), labels)


def choose_scaling_factor(about, vae):
    """The latents' scaling factor: what the data say of themselves, the VAE's, or Stable Diffusion's. UserError."""
    stored = about.get("scaling_factor")
    own = vae.config.scaling_factor if vae is not None else None
    if stored and own and stored != own:
        raise options.UserError(f"the latents were scaled by {stored}, the VAE of --vae scales by {own}: it is another one.")
    return stored or own or 0.18215


def check_image_size(config, factor):
    """UserError where a VAE of this `factor` encodes images to, or decodes latents of, another size than the network's."""
    side, pixels = config["sample_size"], config["image_size"]
    if side * factor != pixels:
        raise options.UserError(f"latents of side {side} are images of {side * factor} pixels to the VAE of --vae; "
                                f"--image_size is {pixels}: give --image_size / {factor} as --sample_size.")  # fmt: skip


def continue_from_pt(stored, path, network, ema, optimizer, say):
    """Load an official checkpoint into the run; returns its step. The optimizer's state is taken where it fits. UserError.

    Args: `stored` what `fpdm.read_pt` read from `path`.
    """
    from brisk import fpdm

    fpdm.load_weights(network, stored["model"], path)
    fpdm.load_weights(ema.network, stored.get("ema", stored["model"]), path)
    moments = (stored.get("opt") or {}).get("state", {})
    moments = [moments[number] for number in sorted(moments)]  # a frozen parameter has a number and no moments
    shapes = [parameter.shape for parameter in network.parameters()]
    if len(moments) == len(shapes) and all(one["exp_avg"].shape == shape for one, shape in zip(moments, shapes, strict=True)):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(moments))})
    else:
        say(f"The optimizer's state in {path} does not fit this network: its moments start at zero.")
    return int(stored.get("train_steps", 0))


def main(argv=None):
    # 1 options
    args, given = parse_args(argv)
    check_args(args)
    config = fpdm_options.network_config(args)
    import torch  # noqa: I001
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from brisk import checkpoint, data, fpdm, gaussian, hub, latents, network_files, optim, runlog, sd_inputs
    from brisk import sd_models, seeding

    # 2 accelerator and seeds and log
    accelerator = runlog.create_accelerator(
        args.output_dir, args.logging_dir, args.gradient_accumulation_steps, args.mixed_precision,
        "none" if args.dry_run else args.report_to, needs_whole_tensors=True,
    )  # fmt: skip
    device, rank, is_main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    batch_size, rest = divmod(args.global_batch_size, processes * accumulation)
    if rest:
        raise options.UserError(f"--global_batch_size {args.global_batch_size} cannot be divided among {processes} processes "
                                f"x {accumulation} micro-steps.")  # fmt: skip
    # one process decides: the others might see its folder already
    output = Path(broadcast_object_list([choose_folder(args)])[0])
    accelerator.project_configuration.logging_dir = str(output / args.logging_dir)
    log = runlog.setup_logging(accelerator)
    stop = checkpoint.StopSignal(accelerator)
    for sentence in options.without_effect(given, effects(args, accelerator.mixed_precision)):
        log.warning(sentence)
    from_pt = args.resume_from_checkpoint if str(args.resume_from_checkpoint).endswith(".pt") else None
    resume = checkpoint.find_checkpoint(output, None if from_pt else args.resume_from_checkpoint, log.info)
    saved = checkpoint.read_state(resume) if resume else {"step": 0}
    seed = args.seed
    seeding.seed_libraries(seed, "start")
    official = fpdm.read_pt(from_pt) if from_pt else None
    if from_pt or resume:
        fpdm_options.check_same_network(config, (official or saved)["config"], from_pt or resume)

    # 3 models (frozen, trainable)
    wanted = latents.LatentOptions(
        args.feature_path, args.dataset_name, args.train_shards_path_or_url, args.train_data_dir, args.synthetic_data,
        config["in_channels"], config["sample_size"], config["num_classes"], config["label_type"], config["label_dim"],
        args.image_size, args.random_flip, args.dataloader_num_workers,
    )  # fmt: skip
    rows = latents.open_rows(wanted, log.warning)
    about = latents.read_facts(wanted, rows)
    images = latents.epoch_size(about, rows)
    if not (images or args.max_train_steps):
        raise options.UserError("shards without a manifest are an endless stream: give --max_train_steps.")
    vae = fpdm.load_vae(sd_models.VAES.get(args.vae, args.vae), config, args.cache_dir) if args.vae else None
    scaling_factor = choose_scaling_factor(about, vae)
    if vae is not None:
        check_image_size(config, sd_models.vae_factor(vae))
    if not args.dry_run:  # here, where what was given has been looked at: a refused run leaves no folder
        runlog.open_output(rank, output)
    push = args.push_to_hub and is_main and not args.dry_run
    repo_id = hub.create_repository(output, args.hub_model_id, args.hub_token) if push else None
    ranges = {f"{phase}_grad_iters": [getattr(args, f"fixed_point_{phase}_grad_{end}_iters") for end in ("min", "max")]
              for phase in ("no", "with")}  # fmt: skip
    network = fpdm.FPDMTransformer2DModel(**config, **ranges, class_dropout_prob=args.class_dropout_prob)

    # 4 memory and precision
    runlog.allow_fast_maths(args.allow_tf32)
    if vae is not None and not args.train_data_dir:
        sd_models.set_aside([vae])
    elif vae is not None:
        vae.to(device, sd_models.vae_dtype("auto", sd_models.DTYPES.get(accelerator.mixed_precision, torch.float32), False, False))
    network.to(device).train()
    ema = optim.EMA(copy.deepcopy(network))
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if args.compile:
        network.compile_iteration()
    null = config["num_classes"] if config["label_type"] == "class" else 0
    dropout = 0.0 if config["label_type"] == "none" else args.class_dropout_prob

    # 5 EMA and optimizer
    optimizer = optim.create_optimizer(
        "adamw8bit" if args.use_8bit_adam else "adamw", list(network.parameters()), args.learning_rate,
        (args.adam_beta1, args.adam_beta2), args.adam_weight_decay, args.adam_epsilon, device, log.warning,
    )  # fmt: skip
    first = continue_from_pt(official, from_pt, network, ema, optimizer, log.warning) if from_pt else saved["step"]
    official = None  # its memory is needed

    # 6 data
    position = latents.find_position(wanted, rows, seed, resume, saved, accelerator, log.warning)
    batches = latents.open_batches(wanted, rows, batch_size, accelerator, seed, position, log.warning)
    workers = args.dataloader_num_workers if rows is None else 1  # rows are dealt out in batches, whoever loads them
    max_steps = args.max_train_steps or data.total_steps(args.num_train_epochs, images, batch_size, processes, workers,
                                                         accumulation)  # fmt: skip

    # 7 schedule and prepare
    lr_scheduler = optim.create_lr_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, max_steps, first)
    model, optimizer = optim.prepare(accelerator, network, optimizer, batch_size, args.max_grad_norm)
    trainable = list(model.parameters())
    tables = gaussian.make_tables(network.betas()).to(device)

    # 8 state and resume
    stored = {"accelerator": accelerator, "network": model, "name": "transformer", "averages": {"transformer_ema": ema}}
    checkpoint.use_network_hooks(accelerator, network_files.save_networks, network_files.load_networks, stored)
    step, micro_step = first, first * accumulation
    if resume:
        accelerator.load_state(str(resume))
        lr_scheduler.load_state_dict(saved["lr_scheduler"])
        for sentence in options.changed_options(saved["options"], options.public(args)):
            log.warning(sentence)
    if step:
        log.info(f"Resuming from {resume or from_pt}: step {step} of {max_steps}.")
    if from_pt:
        log.info("A .pt file does not say where in the data it stopped: they begin anew.")

    # 9 manifest and dry run
    for line in fpdm.describe(network):
        log.info(line)
    counts = {"global_batch": args.global_batch_size, "processes": processes, "max_train_steps": max_steps,
              "images": max_steps * args.global_batch_size, "seed": seed}  # fmt: skip
    log.info("  ".join(f"{name} {value:,}" for name, value in counts.items()))
    log.info(f"Output: {output}")
    if args.dry_run:
        log.info("Dry run: nothing was trained, nothing was saved.")
        accelerator.end_training()
        return
    if is_main:
        checkpoint.set_aside_earlier(output, resume, log.warning)
        runlog.write_manifest(output, options.public(args), {**counts, "config": config})
    runlog.start_trackers(accelerator, args.tracker_project_name, options.public(args), output / args.logging_dir)
    guard = optim.FiniteGuard(("latents", "output", "mse", "vb"), device, "lower --learning_rate, or use --mixed_precision bf16")
    run_log = runlog.RunLog(accelerator, output, args.log_every, args.global_batch_size, step, "train/")
    state = {"config": config, "seed": seed, "processes": processes, "options": options.public(args)}
    name = "FPDM" if args.fixed_point else "DiT"
    progress = tqdm(total=max_steps, initial=step, desc=name, unit="step", disable=not is_main, dynamic_ncols=True)

    # 10 loop
    while step < max_steps:
        # 10a batch
        batch = sd_models.to_device(run_log.next_batch(batches), device)
        with accelerator.accumulate(model):
            draw = seeding.generator(seed, rank, micro_step, "noise", device=device)
            iterations = draw_iterations(args, seed, micro_step, *([] if args.sync_iters else [rank]))
            micro_step += 1

            # 10b encode or read cache
            x0 = sd_inputs.sample_latents(batch, vae, scaling_factor, args.vae_batch_size, draw)
            labels = drop_labels(batch["labels"], dropout, null, draw) if dropout else batch["labels"]

            # 10c noise and time
            timesteps = torch.randint(len(tables.betas), (len(x0),), generator=draw, device=device)
            noise = torch.randn(x0.shape, generator=draw, device=device)
            if args.flow:
                x_t, target = gaussian.flow_path(x0, noise, timesteps)
            else:
                x_t = gaussian.noised(tables, x0, noise, timesteps)
                target = gaussian.target(tables, x0, noise, timesteps, config["prediction_type"])

            # 10d teacher: the data are the only one

            # 10e student
            with accelerator.autocast():
                output_of = model(x_t, timesteps, labels, num_iters=iterations)
            prediction = output_of.sample.float()

            # 10f loss
            error = gaussian.flat_mean((target - prediction[:, : config["in_channels"]]) ** 2)
            bound = torch.zeros_like(error)
            if config["out_channels"] > config["in_channels"]:
                bound = gaussian.variational_bound(tables, x0, x_t, timesteps, prediction, config["prediction_type"])
            weights = gaussian.loss_weights(tables, timesteps, args.loss_weighting, config["prediction_type"]).to(error.dtype)
            mse, vb = (weights * error).mean(), bound.mean()
            loss = mse + vb
            guard.watch(x0, prediction, mse, vb)

            # 10g backward, clip, step, EMA
            accelerator.backward(loss)
            run_log.add(loss=loss, mse=mse, vb=vb)
            if iterations:
                run_log.add(**{"fp/n_no_grad": float(iterations[0]), "fp/m_with_grad": float(iterations[1]),
                               "fp/residual": output_of.residual.mean()})  # fmt: skip
            del output_of  # its state need not wait for the next one
            if not accelerator.sync_gradients:
                continue
            grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
            optim.step_if_finite(optimizer, guard.finish_step(grad_norm, scaled=accelerator.mixed_precision == "fp16"))
            optimizer.zero_grad(set_to_none=True)
            lr_scheduler.step()
            ema.update(network.parameters(), args.ema_decay)
        step += 1
        progress.update()

        # 10h log
        run_log.add(grad_norm=grad_norm)
        if run_log.due(step) or step == max_steps:
            run_log.flush(step, progress, lr=lr_scheduler.get_last_lr()[0], skipped_steps=guard.check(),
                          skipped_samples=sum(batches.skipped.values()) or None)  # fmt: skip

        # 10i save
        received = stop.agreed()
        paused = time.perf_counter()
        if step % args.checkpointing_steps == 0 or received or step == max_steps:
            state["lr_scheduler"] = lr_scheduler.state_dict()
            limit = args.checkpoints_total_limit
            problem = checkpoint.save_checkpoint(accelerator, output, step, state, batches.position, limit)
            log.error(problem) if problem else log.info(f"Saved {output}/checkpoint-{step}.")
            if args.export_pt and is_main:
                fpdm.write_pt(output / f"checkpoints/{step:07d}.pt", network, ema, optimizer, state["options"], step, limit)
        if received:
            advice = "this step is not saved" if problem else "go on with --resume latest"
            log.warning(f"Stopped by signal {received} after step {step}; {advice}.")
            accelerator.end_training()
            sys.exit(128 + received)

        # 10j validate: sample_fpdm.py does it, from any checkpoint
        run_log.pause(time.perf_counter() - paused)
    progress.close()

    # 11 export
    accelerator.wait_for_everyone()
    if is_main:
        card = {"name": repo_id or str(output), "method": name, "steps": max_steps, "batch": args.global_batch_size,
                "lr": args.learning_rate, "path": str(output), "guidance": 1.0 if args.unsupervised else 4.0}  # fmt: skip
        fpdm.export(output, network, ema, vae, about.get("classes"), card)
        log.info(f"Saved the network in {output}{'' if vae is not None else '/transformer'}.")
        if repo_id:
            hub.upload(output, repo_id, args.hub_token, args.logging_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    options.run(main)
