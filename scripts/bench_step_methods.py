"""The training steps that bench_step.py times, one class a method, on random weights and synthetic images.

Every step is that of the method's training script, whose stages it names; a row's setting (`bench_step.Setting`) says
which parts are still the plain composition.
"""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from brisk import bksdm, macs, optim, runlog, schedules, sd_inputs, sd_models, seeding, splam, students, tiny
from brisk.feature_taps import FeatureTaps

TEACHER = Path(__file__).resolve().parent.parent / "assets/tiny-teacher"
TEXT_ENCODERS = {"sd15": ["clip_l"], "sd21": ["open_clip_h"], "sdxl": ["clip_l", "open_clip_g"]}


def make_unet(size, device="cpu"):
    """(U-Net, tokens of its prompts): of the built-in teacher (`tiny`), or a real one with random weights on `device`."""
    if size == "tiny":
        parts = sd_models.load_parts(str(TEACHER))
        return parts.unet.to(device), parts.tokenizers[0].model_max_length
    torch.manual_seed(0)
    with torch.device(device):
        return tiny.make_unet(size).requires_grad_(False).eval(), 77


def make_parts(size):
    """All components of the built-in teacher (`tiny`), or of a real pipeline with random weights."""
    if size == "tiny":
        return sd_models.load_parts(str(TEACHER))
    unet, tokens = make_unet(size)
    is_xl, tokenizer, vae = size == "sdxl", tiny.make_tokenizer(tokens), tiny.make_vae(size)
    encoders = [tiny.make_text_encoder(name, tokens, len(tokenizer), projection=name == "open_clip_g")
                for name in TEXT_ENCODERS[size]]  # fmt: skip
    for network in (vae, *encoders):
        network.requires_grad_(False).eval()
    schedule = {**tiny.SCHEDULE, "prediction_type": "v_prediction" if size == "sd21" else "epsilon"}
    return sd_models.Parts(is_xl, True, [tokenizer] * len(encoders), encoders, vae, unet, schedule, {})


def make_plan(parts, preset):
    """The `students.Plan` of a preset for this teacher. UserError."""
    config = sd_models.plain_config(parts.unet)
    return students.make_plan(config, *students.choose_config(config, preset), parts.unet.config.sample_size)


def forward_macs(parts, config=None):
    """Multiply-accumulates of one forward pass on one image: of the teacher, or of the U-Net with `config`."""
    tokens = parts.tokenizers[0].model_max_length
    return macs.unet_size(config or sd_models.plain_config(parts.unet), parts.unet.config.sample_size, tokens).total


class Work(NamedTuple):
    """What a method gives bench_step.py."""

    make: Callable  # of a setting: the `Bench` of its row
    flops: Callable  # of a setting: those of the method's networks in a step
    counted: dict  # {what these FLOPs are: their number}
    facts: dict  # for the report


class Bench:
    """The trained network of one row and what all methods share: stages 5 and 10g of the training scripts."""

    rate, weight_decay = 1e-4, 1e-2

    def __init__(self, setting, student, batch_size, half, device):
        """`student` is a float32 network."""
        self.setting, self.half, self.device = setting, half, device
        self.student = student.to(device).train()
        self.ema = optim.EMA(copy.deepcopy(self.student))
        self.guard = optim.FiniteGuard(self.terms, device)
        self.run_log = runlog.RunLog(None, None, 10, batch_size)

    def make_optimizer(self):
        """Recomputation, then the optimizer and the scaler of fp16."""
        if self.setting.checkpointing:
            self.student.enable_gradient_checkpointing()
        self.trainable = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.trainable, lr=self.rate, weight_decay=self.weight_decay,
                                           fused=self.setting.fused_updates)  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half == torch.float16)

    def draw_of(self, number):
        """The random numbers of step `number` (0, 1, ...), as a run with `--seed 0` draws them."""
        return seeding.generator(0, 0, number, "noise", device=self.device)

    def autocast(self):
        """The autocast context of the run."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half != torch.float32)

    def finish(self, loss, terms, decay, **logged):
        """Stage 10g: backward, clip, step, EMA; returns the loss.

        Args: `terms` in the order of the class's, whose finiteness is checked on the device where the host does not wait.
        """
        setting = self.setting
        if setting.no_host_sync:
            self.guard.watch(*terms)
        self.scaler.scale(loss).backward()
        if setting.no_host_sync:
            self.run_log.add(loss=loss, **logged)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        scaled = self.scaler.is_enabled()
        finite = self.guard.finish_step(norm, scaled) if setting.no_host_sync else torch.isfinite(norm)
        if setting.fused_updates and not scaled:
            optim.step_if_finite(self.optimizer, finite)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if setting.fused_updates:
            self.ema.update(self.trainable, decay)
        else:
            self.update_average_one_by_one(decay)
        if not setting.no_host_sync:
            loss.item()
        return loss.detach()

    @torch.no_grad()
    def update_average_one_by_one(self, decay):
        """`EMA.update` as a loop over the weights."""
        for average, weight in zip(self.ema.master, self.trainable, strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)
        self.ema._refresh()

    def memory(self):
        """Figures of the memory that the steps took."""
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None}


class UNetBench(Bench):
    """The networks of one row and what the U-Net methods share: stages 4 and 10b of their training scripts."""

    vae_batch_size = None

    def __init__(self, setting, parts, student, encoder_dtype, batch_size, half, device):
        """`parts` are moved and cast."""
        super().__init__(setting, student, batch_size, half, device)
        self.parts = parts
        self.frozen = half if setting.half_frozen else torch.float32
        sd_models.place(parts, device, sd_models.vae_dtype("auto", encoder_dtype, False, parts.is_xl), encoder_dtype)
        self.teacher = parts.unet.to(device, self.frozen)
        self.resolution = parts.unet.config.sample_size * sd_models.vae_factor(parts.vae)
        self.blank = sd_inputs.encode_blank(parts, device)
        self.batch = self.make_batch(batch_size)
        self.alphas_cumprod = DDPMScheduler.from_config(parts.scheduler_config).alphas_cumprod.to(device)
        self.prediction_type = parts.scheduler_config.get("prediction_type", "epsilon")

    def make_ready(self, called):
        """Switches for the networks `called`, then the optimizer; after the method has put its hooks."""
        for network in called:
            sd_models.speed_up(network, self.setting.channels_last, False, self.setting.compiled, print)
        self.make_optimizer()

    def make_batch(self, batch_size):
        """Grey images with a caption, or what scripts/precompute_latents.py stores of them; on the CPU, as a loader gives it."""
        parts, tokenize = self.parts, sd_inputs.Tokenize(self.parts.tokenizers)
        batch = next(tiny.SyntheticBatches(tokenize, batch_size, self.resolution))
        if self.setting.cached:
            on_device = sd_models.to_device(batch, self.device)
            moments = sd_inputs.latent_moments(parts.vae, on_device["pixels"], 8)
            ids = [on_device[f"input_ids_{number}"] for number in range(len(parts.tokenizers))]
            prompt_embeds, pooled = sd_inputs.encode_prompts(parts, ids)
            stored = {"moments": torch.stack(moments, 1).half(), "prompt_embeds": prompt_embeds.half()}
            if parts.is_xl:
                sizes = sd_inputs.time_ids(batch["original_size"], batch["crop_top_left"], self.resolution)
                stored |= {"pooled": pooled.half(), "time_ids": sizes}
            batch = {"empty": batch["empty"], **{name: value.cpu() for name, value in stored.items()}}
            sd_models.set_aside([parts.vae, *parts.text_encoders])
        pin = self.device.type == "cuda"
        return {name: value.contiguous().pin_memory() if pin else value for name, value in batch.items()}

    def encode(self, draw):
        """Stages 10a and 10b: latents, prompt embeddings, SDXL's sizes."""
        batch = sd_models.to_device(self.batch, self.device)
        return sd_inputs.encode_batch(
            self.parts, batch, self.blank, draw, self.resolution, self.vae_batch_size, self.autocast()
        )


class Slam(UNetBench):
    """train_splam_distill_sd_wds.py with its defaults."""

    terms = ("latents", "prompt embeddings", "teacher", "target", "student", "loss")
    work = "6 U-Net forwards per image"

    def __init__(self, setting, parts, plan, batch_size, half, device):
        student = sd_models.create_student(parts.unet, 256, "zero")
        super().__init__(setting, parts, student, half if setting.half_frozen else torch.float32, batch_size, half, device)
        self.make_ready((self.teacher, self.ema.network, self.student))
        self.ema.work_in(self.frozen)
        self.grid = schedules.solver_grid(self.alphas_cumprod, 50).to(device)

    @staticmethod
    def macs_per_image(parts, plan):
        """Two teacher forwards, one of the average, the student's forward and its backward, which is two."""
        return 6 * forward_macs(parts)

    def teach(self, noisy, start, conditions):
        """Stage 10d: raw teacher outputs with and without the prompt."""
        with torch.no_grad(), self.autocast():
            if self.setting.batched_guidance:
                both = sd_inputs.stack_conditions(*conditions)
                out = sd_models.predict(self.teacher, self.frozen, noisy.repeat(2, 1, 1, 1), start.repeat(2), both)
                return out.chunk(2)
            return [sd_models.predict(self.teacher, self.frozen, noisy, start, each) for each in conditions]

    def step(self, number):
        """One training step; returns the loss (a 0-dim tensor)."""
        draw = self.draw_of(number)
        latents, embeddings, sizes = self.encode(draw)
        cond = sd_inputs.condition(self.parts, embeddings, sizes, len(latents))
        uncond = sd_inputs.condition(self.parts, sd_inputs.unconditional(self.parts, self.blank), sizes, len(latents))
        # 10c
        index = torch.randint(50, (len(latents),), generator=draw, device=self.device)
        noise = torch.randn(latents.shape, generator=draw, device=self.device)
        gamma = splam.draw_fraction(torch.rand(2, len(latents), generator=draw, device=self.device))
        start, end = self.grid.start_timesteps[index], self.grid.end_timesteps[index]
        a, s = schedules.signal_and_noise(self.grid.alpha_cumprod_start[index], latents)
        a_end, s_end = schedules.signal_and_noise(self.grid.alpha_cumprod_end[index], latents)
        noisy = a * latents + s * noise
        # 10d
        guided = self.teach(noisy, start, (cond, uncond))
        x_end, _, _ = splam.guided_ddim_step(*guided, noisy, a, s, a_end, s_end, 8.0, self.prediction_type)
        embedded = splam.gamma_embedding(torch.ones_like(gamma), 256)
        with torch.no_grad(), self.autocast():
            target_out = sd_models.predict(self.ema.network, self.frozen, x_end, end, cond, embedded.to(self.frozen))
        target_x0, _ = schedules.to_x0_eps(target_out, x_end, a_end, s_end, self.prediction_type)
        target = splam.consistency_output(x_end, target_x0, end)
        # 10e
        point, sigma = splam.sub_path_point(noisy, x_end, gamma, a, s, a_end, s_end)
        embedded = splam.gamma_embedding(gamma, 256)
        with self.autocast():
            student_out = sd_models.predict(self.student, torch.float32, point, start, cond, embedded)
        x0 = splam.sub_path_x0(student_out, point, a, s, sigma, self.prediction_type)
        # 10f
        loss = splam.distillation_loss(splam.consistency_output(point, x0, start), target)
        return self.finish(loss, (latents, embeddings[0], guided[0], target, student_out, loss), 0.95)


class Bksdm(UNetBench):
    """train_bksdm_distill.py with its defaults and --use_ema."""

    rate, vae_batch_size = 5e-5, 8
    terms = ("latents", "prompt embeddings", "teacher", "student", "loss_sd", "loss_kd_output", "loss_kd_feat")
    work = "1 teacher and 3 student forwards per image"

    def __init__(self, setting, parts, plan, batch_size, half, device):
        # the official script keeps the encoders in half precision
        super().__init__(setting, parts, students.create(plan, parts.unet), half, batch_size, half, device)
        self.plan = plan
        self.of_teacher, self.of_student = map(FeatureTaps, (self.teacher, self.student), zip(*plan.pairs, strict=True))
        self.make_ready((self.teacher, self.student, self.ema.network))
        self.ema.work_in(torch.float32)

    @staticmethod
    def macs_per_image(parts, plan):
        """The teacher's forward, the student's, and its backward, which is two; recomputation is no work of the model."""
        return forward_macs(parts) + 3 * forward_macs(parts, plan.config)

    def step(self, number):
        """One training step; returns the loss (a 0-dim tensor)."""
        setting = self.setting
        draw = self.draw_of(number)
        latents, embeddings, time_ids = self.encode(draw)
        # 10c
        uniform = torch.rand(len(latents), generator=draw, device=self.device)
        timesteps = bksdm.draw_timesteps(uniform, "uniform", len(self.alphas_cumprod))
        noise = torch.randn(latents.shape, generator=draw, device=self.device)
        a, s = schedules.signal_and_noise(self.alphas_cumprod[timesteps], latents)
        target = schedules.prediction_target(latents, noise, a, s, self.prediction_type)
        noisy = a * latents + s * noise
        cond = sd_inputs.condition(self.parts, embeddings, time_ids, len(latents))
        # 10d
        self.of_teacher.arm()
        with torch.no_grad(), contextlib.nullcontext() if setting.half_frozen else self.autocast():
            teacher_out = sd_models.predict(self.teacher, self.frozen, noisy, timesteps, cond)
        # 10e
        self.of_student.arm()
        with self.autocast():
            student_out = sd_models.predict(self.student, torch.float32, noisy, timesteps, cond)
        # 10f
        if setting.lean_features:
            features = bksdm.feature_loss(self.of_student.read(), self.of_teacher.read())
        else:
            kept = list(zip(self.of_student.read(), self.of_teacher.read(), strict=True))  # to the end of the step
            features = torch.stack([F.mse_loss(mine.float(), theirs.float()) for mine, theirs in kept])
        losses = {"loss_sd": bksdm.output_loss(student_out, target),
                  "loss_kd_output": bksdm.output_loss(student_out, teacher_out), "loss_kd_feat": features.sum()}  # fmt: skip
        loss = sum(losses.values())
        terms = (latents, embeddings[0], teacher_out, student_out, *losses.values())
        by_pair = {f"feat/{pair[1]}": term for pair, term in zip(self.plan.pairs, features, strict=True)}
        return self.finish(loss, terms, bksdm.ema_decay(number + 1, 0.9999), **losses, **by_pair)


METHODS = {"slam": Slam, "bksdm": Bksdm}


def prepare(args, half, device):
    """The `Work` of a U-Net method. UserError."""
    method, parts = METHODS[args.method], make_parts(args.size)
    plan = make_plan(parts, args.preset) if args.method == "bksdm" else None
    for line in plan.describe(with_table=False) if plan else ():
        print(line)
    flops = 2 * args.batch_size * method.macs_per_image(parts, plan)

    def make(setting):
        return method(setting, copy.deepcopy(parts), plan, args.batch_size, half, device)

    return Work(make, lambda setting: flops, {method.work: flops}, {"preset": plan and plan.preset})
