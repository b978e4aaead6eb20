#!/usr/bin/env python
"""Time one training step on synthetic data: the plain composition beside ours, one change a row.

`floor` is the time that the method's network FLOPs alone take at the matrix-product rate measured here, so that
"share of floor" is the model-FLOPs utilisation against a rate this machine really reaches.
"""

import copy
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from brisk import options


class Setting(NamedTuple):
    """What a row does; the defaults are the plain composition of the official script."""

    name: str = "plain"
    batched_guidance: bool = False
    half_frozen: bool = False
    fused_updates: bool = False
    no_host_sync: bool = False
    channels_last: bool = False
    cached: bool = False
    checkpointing: bool = True
    compiled: bool = False


TEACHER = Path(__file__).resolve().parent.parent / "assets/tiny-teacher"
# size: (pixels of the latent, down-sampling of the VAE); tiny is the built-in teacher
SIZES = {"tiny": (8, 4), "sd15": (64, 8), "sdxl": (128, 8)}
BATCHES = {"tiny": 16, "sd15": 16, "sdxl": 4}


def rows(compiled):
    """The settings in order: same work first, then less work, then another compiler."""
    setting = Setting()
    listed = [setting]
    changes = [
        ("+ batched guidance", {"batched_guidance": True}), ("+ half frozen networks", {"half_frozen": True}),
        ("+ foreach EMA, fused AdamW", {"fused_updates": True}), ("+ no host sync", {"no_host_sync": True}),
        ("+ channels_last", {"channels_last": True}), ("+ cached latents and text", {"cached": True}),
        ("- gradient checkpointing", {"checkpointing": False}), ("+ compile", {"compiled": True}),
    ]  # fmt: skip
    for name, change in changes if compiled else changes[:-1]:
        setting = setting._replace(name=name, **change)
        listed.append(setting)
    return listed


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=("slam",), default="slam", help="whose step")
    add("--size", choices=tuple(SIZES), default="tiny", help="random weights of this size")
    add("--batch_size", type=options.COUNT, help="images per step; default 16, SDXL 4")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="autocast type")
    add("--steps", type=options.COUNT, default=10, help="timed steps per row")
    add("--warmup", type=options.COUNT_OR_ZERO, default=3, help="untimed steps per row")
    options.add_flag(parser, "--allow_tf32", "allow TF32 matrix products")
    options.add_flag(parser, "--compile", "add the torch.compile row")
    add("--output", help="JSON file for the figures")
    return options.parse(parser, argv)[0]


class Bench:
    """The networks of one row and its training step (stages 10b to 10g of the training script)."""

    def __init__(self, setting, size, batch_size, half, device, networks):
        import torch
        from diffusers import DDPMScheduler

        from brisk import optim, schedules, sd_models, seeding, tiny

        self.setting, self.batch_size, self.half, self.device = setting, batch_size, half, device
        unet, self.vae, self.text = (copy.deepcopy(network).to(device) for network in networks)
        self.latent, factor = SIZES[size]
        self.pixels = self.latent * factor
        frozen = half if setting.half_frozen else torch.float32
        self.student = sd_models.create_student(unet, 256, "zero").to(device).train()
        self.teacher = unet.to(frozen).requires_grad_(False).eval()
        self.ema = optim.EMA(copy.deepcopy(self.student))
        if setting.checkpointing:
            self.student.enable_gradient_checkpointing()
        for network in (self.teacher, self.ema.network, self.student):
            sd_models.speed_up(network, setting.channels_last, False, setting.compiled, print)
        self.ema.work_in(frozen)
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=setting.fused_updates)
        alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        self.grid = schedules.solver_grid(alphas, 50).to(device)
        self.frozen = frozen
        inputs = tiny.unet_inputs(
            unet, batch_size, self.latent, device=device, generator=seeding.generator(0, device=device)
        )
        self.cond = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}

    def encode(self, draw):
        """Stage 10b: latents; without a cache by way of the VAE and the text encoder."""
        import torch

        from brisk import sd_models

        if self.setting.cached:
            return torch.randn(self.batch_size, 4, self.latent, self.latent, generator=draw, device=self.device)
        pixels = torch.zeros(self.batch_size, 3, self.pixels, self.pixels, dtype=torch.uint8, device=self.device)
        mean, std = sd_models.latent_moments(self.vae, pixels, 32)
        with torch.no_grad(), self.autocast():
            self.text(torch.zeros(self.batch_size, self.text.config.max_position_embeddings, dtype=torch.long,
                                  device=self.device))  # fmt: skip
        return mean + std * torch.randn(mean.shape, generator=draw, device=self.device)

    def autocast(self):
        """The autocast context of the run."""
        import torch

        if self.half == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)

    def teach(self, noisy, start):
        """Stage 10d: raw teacher outputs with and without the prompt."""
        import torch

        from brisk import sd_models

        with torch.no_grad(), self.autocast():
            if self.setting.batched_guidance:
                both = sd_models.stack_conditions(self.cond, self.cond)
                out = sd_models.predict(self.teacher, self.frozen, noisy.repeat(2, 1, 1, 1), start.repeat(2), both)
                return out.chunk(2)
            return [sd_models.predict(self.teacher, self.frozen, noisy, start, self.cond) for _ in range(2)]

    def step(self, number):
        """One training step; returns the loss (a 0-dim tensor)."""
        import torch

        from brisk import optim, schedules, sd_models, seeding, splam

        draw = seeding.generator(0, number, device=self.device)
        latents = self.encode(draw)
        index = torch.randint(50, (len(latents),), generator=draw, device=self.device)
        noise = torch.randn(latents.shape, generator=draw, device=self.device)
        gamma = splam.draw_fraction(torch.rand(2, len(latents), generator=draw, device=self.device))
        start, end = self.grid.start_timesteps[index], self.grid.end_timesteps[index]
        a, s = schedules.signal_and_noise(self.grid.alpha_cumprod_start[index], latents)
        a_end, s_end = schedules.signal_and_noise(self.grid.alpha_cumprod_end[index], latents)
        noisy = a * latents + s * noise
        x_end, _, _ = splam.guided_ddim_step(*self.teach(noisy, start), noisy, a, s, a_end, s_end, 8.0, "epsilon")
        with torch.no_grad(), self.autocast():
            embedded = splam.gamma_embedding(torch.ones_like(gamma), 256)
            out = sd_models.predict(self.ema.network, self.frozen, x_end, end, self.cond, embedded.to(self.frozen))
        target = splam.consistency_output(x_end, schedules.to_x0_eps(out, x_end, a_end, s_end, "epsilon")[0], end)
        point, sigma = splam.sub_path_point(noisy, x_end, gamma, a, s, a_end, s_end)
        with self.autocast():
            out = sd_models.predict(
                self.student, torch.float32, point, start, self.cond, splam.gamma_embedding(gamma, 256)
            )
        x0 = splam.sub_path_x0(out, point, a, s, sigma, "epsilon")
        loss = splam.distillation_loss(splam.consistency_output(point, x0, start), target, "huber")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if self.setting.fused_updates:
            optim.step_if_finite(self.optimizer, torch.isfinite(norm))
            self.ema.update(self.parameters, 0.95)
        else:
            self.optimizer.step()
            with torch.no_grad():
                for target_weight, weight in zip(self.ema.master, self.parameters, strict=True):
                    target_weight.mul_(0.95).add_(weight, alpha=0.05)
                self.ema._refresh()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.setting.no_host_sync:
            loss.item()
        return loss.detach()


def make_networks(size):
    """(U-Net, VAE, text encoder): the built-in teacher's, or Stable Diffusion's with random weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    from brisk import tiny

    torch.manual_seed(0)
    if size == "tiny":
        teacher = StableDiffusionPipeline.from_pretrained(TEACHER, dtype=torch.float32)
        networks = teacher.unet, teacher.vae, teacher.text_encoder
    elif size == "sd15":
        networks = tiny.make_unet("sd15"), tiny.make_vae("sd15"), tiny.make_text_encoder("clip_l")
    else:
        encoder = tiny.make_text_encoder("open_clip_g", projection=True)
        networks = tiny.make_unet("sdxl"), tiny.make_vae("sdxl"), encoder
    return [network.requires_grad_(False).eval() for network in networks]


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product in `dtype`, the best of several."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def synchronize(device):
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def time_row(setting, args, batch_size, half, device, networks):
    """(mean seconds per step, peak GiB) of a row."""
    import torch

    bench = Bench(setting, args.size, batch_size, half, device, networks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(args.warmup):
        bench.step(number)
    synchronize(device)
    started = time.perf_counter()
    for number in range(args.steps):  # no wait in between, so that a row which waits by itself shows it
        bench.step(args.warmup + number)
    synchronize(device)
    seconds = (time.perf_counter() - started) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return seconds, peak


def main(argv=None):
    args = parse_args(argv)
    import torch

    from brisk import runlog, tiny

    runlog.quiet_libraries()
    runlog.allow_fast_maths(args.allow_tf32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    batch_size = args.batch_size or BATCHES[args.size]
    networks = make_networks(args.size)
    flops = 6 * batch_size * tiny.count_unet_flops(copy.deepcopy(networks[0]), SIZES[args.size][0])[1]
    rate = matmul_rate(device, half)
    print(f"{args.size}, batch {batch_size}, {args.mixed_precision}: 6 U-Net forwards per image = {flops / 1e12:.3f} TFLOP "
          f"per step; matrix products reach {rate / 1e12:.3f} TFLOP/s, the floor is {flops / rate:.4f} s")  # fmt: skip
    print(f"{'row':30s} {'s/step':>9s} {'images/s':>9s} {'of floor':>9s} {'peak GiB':>9s} {'ratio':>6s}")
    figures = []
    for setting in rows(args.compile):
        seconds, peak = time_row(setting, args, batch_size, half, device, networks)
        figures.append({"row": setting.name, "seconds_per_step": seconds, "images_per_second": batch_size / seconds,
                        "share_of_floor": flops / rate / seconds, "peak_gib": peak,
                        "ratio_to_plain": figures[0]["seconds_per_step"] / seconds if figures else 1.0})  # fmt: skip
        row = figures[-1]
        print(f"{setting.name:30s} {seconds:9.4f} {row['images_per_second']:9.2f} {row['share_of_floor']:9.3f} "
              f"{f'{peak:.2f}' if peak else '-':>9s} {row['ratio_to_plain']:6.2f}", flush=True)  # fmt: skip
    if args.output:
        facts = {"size": args.size, "batch_size": batch_size, "mixed_precision": args.mixed_precision,
                 "flops_per_step": flops, "matmul_flops_per_second": rate, "environment": runlog.environment()}  # fmt: skip
        with open(args.output, "w") as file:
            json.dump({**facts, "rows": figures}, file, indent=1)


if __name__ == "__main__":
    options.run(main)
