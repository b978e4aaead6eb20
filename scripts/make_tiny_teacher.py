"""Train the built-in teacher (a tiny Stable Diffusion of tinted digits) and its oracle, or write its data as shards."""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CAPTION_LENGTH = 16
FIGURE_STEPS = (50, 20, 10, 4, 2, 1)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shards", metavar="DIR", help="only write the training images as WebDataset shards into DIR")
    what.add_argument("--output_dir", metavar="DIR", help="train everything and save the pipeline here")
    parser.add_argument("--oracle_dir", metavar="DIR", help="where the oracle goes; if not given, handwriting-oracle beside output_dir")
    parser.add_argument("--copies", type=int, default=4, help="colour pairs per scan in the shards (1 to 56)")
    parser.add_argument("--samples_per_shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number may round differently")
    parser.add_argument("--oracle_steps", type=int, default=1200)
    parser.add_argument("--vae_steps", type=int, default=3500)
    parser.add_argument("--text_steps", type=int, default=600)
    parser.add_argument("--unet_steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=128, help="a quarter of it for the autoencoder")
    parser.add_argument("--cached_images", type=int, default=40000, help="images whose latents the U-Net is trained on")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="used for the measured figures")
    parser.add_argument("--samples", type=int, default=1000, help="images behind each measured figure")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with exit code 2 and one sentence when an option cannot work."""
    for name in ("samples_per_shard", "threads", "oracle_steps", "vae_steps", "text_steps", "unet_steps", "batch_size",
                 "cached_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not 1 <= args.copies <= 56:
        parser.error(f"--copies must be between 1 and 56 (the number of colour pairs), got {args.copies}.")
    if args.samples < 64:
        parser.error(f"--samples must be at least 64 (the Frechet distance needs them), got {args.samples}.")
    if args.output_dir and not args.oracle_dir:
        args.oracle_dir = str(Path(args.output_dir).resolve().parent / "handwriting-oracle")
    # A finished folder replaces an older one of its kind, and nothing else.
    for name, mark in (("shards", None), ("output_dir", "model_index.json"), ("oracle_dir", "config.json")):
        folder = Path(getattr(args, name) or ".")
        if folder.exists() and not folder.is_dir():
            parser.error(f"--{name} must be a folder, but {folder} is a file.")
        if getattr(args, name) and mark and folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
            parser.error(f"--{name} must be a new folder or hold an earlier result ({mark}), but {folder} holds other files.")


# Parsed before the heavy imports, so that --help and a wrong flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from brisk import handwriting
from brisk.metrics import frechet_distance
from brisk.scorers import HandwritingOracle, load_oracle, prompt_agreement, save_oracle

COLOUR_COUNT = len(handwriting.COLOURS)


def learning_rate(step: int, steps: int) -> float:
    """Factor of the rate: linear warm-up (5 %), constant, cosine decay over the second half."""
    progress = (step + 1) / steps
    return min(1.0, progress / 0.05) * (1.0 if progress < 0.5 else 0.5 + 0.5 * math.cos(math.pi * (2 * progress - 1)))


def make_optimizer(parameters, rate: float, steps: int):
    """AdamW with the schedule of `learning_rate`; returns the update function (loss -> None)."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return update


def progress_bar(steps: int, name: str):
    return tqdm(range(steps), desc=f"{name:12s}", mininterval=1.0, dynamic_ncols=True)


def bend(strokes, generator):
    """Rotate, scale and shift strokes (N, 32, 32) a little; what moves in is background."""
    count = len(strokes)
    angle, stretch_x, stretch_y, shift_x, shift_y = torch.rand(5, count, generator=generator) * 2 - 1
    angle, shift = angle * 0.2, 0.12 * torch.stack([shift_x, shift_y], dim=1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    stretch = 1 + 0.12 * torch.stack([stretch_x, stretch_y], dim=1)
    affine = torch.cat([turn * stretch[:, :, None], shift[:, :, None]], dim=2)
    grid = torch.nn.functional.affine_grid(affine, (count, 1, *strokes.shape[1:]), align_corners=False)
    return torch.nn.functional.grid_sample(strokes[:, None], grid, align_corners=False)[:, 0]


def train_oracle(strokes, digits, args):
    generator = torch.Generator().manual_seed(args.seed)
    oracle = HandwritingOracle()
    update = make_optimizer(oracle.parameters(), 2e-3, args.oracle_steps)
    for _ in progress_bar(args.oracle_steps, "oracle"):
        which = torch.randint(len(strokes), (args.batch_size,), generator=generator)
        bent = bend(strokes[which], generator)
        batch = handwriting.draw_from(bent, digits[which], args.batch_size, generator)
        noise = 0.08 * torch.rand(args.batch_size, 1, 1, 1, generator=generator)
        images = batch["images"] + noise * torch.randn(batch["images"].shape, generator=generator)
        labels = (batch["digits"], batch["foregrounds"], batch["backgrounds"])
        losses = [torch.nn.functional.cross_entropy(*pair, label_smoothing=0.05) for pair in zip(oracle(images), labels)]
        update(sum(losses))
    return oracle.eval().requires_grad_(False)


def train_vae(strokes, digits, args):
    generator = torch.Generator().manual_seed(args.seed + 1)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=1,
        block_out_channels=(16, 32, 32), down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, mid_block_add_attention=False, sample_size=handwriting.IMAGE_SIZE,
    )
    update = make_optimizer(vae.parameters(), 3e-3, args.vae_steps)
    for _ in (bar := progress_bar(args.vae_steps, "autoencoder")):
        images = handwriting.draw_from(strokes, digits, args.batch_size // 4 or 1, generator)["images"]
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = torch.nn.functional.mse_loss(vae.decode(latents).sample, images)
        update(error + 1e-4 * posterior.kl().mean() / latents[0].numel())
        bar.set_postfix_str(f"rmse {error.detach().sqrt():.4f}", refresh=False)
    return round_to_half(vae)


def round_to_half(model):
    """Freeze a model at the float16 values that are going to be saved, kept in float32."""
    return model.half().float().eval().requires_grad_(False)


@torch.no_grad()
def cache_latents(vae, strokes, digits, args) -> dict:
    """Encode random training images once: means and stds (N, 4, 8, 8), labels (N,) rows of `caption_table`."""
    generator = torch.Generator().manual_seed(args.seed + 2)
    parts = {"means": [], "stds": [], "labels": []}
    for start in tqdm(range(0, args.cached_images, 500), desc="latents     ", mininterval=1.0, dynamic_ncols=True):
        batch = handwriting.draw_from(strokes, digits, min(500, args.cached_images - start), generator)
        posterior = vae.encode(batch["images"]).latent_dist
        parts["means"].append(posterior.mean)
        parts["stds"].append(posterior.std)
        parts["labels"].append(label_row(batch["digits"], batch["foregrounds"], batch["backgrounds"]))
    return {name: torch.cat(values) for name, values in parts.items()}


def label_row(digits, foregrounds, backgrounds):
    """Row of a label in the table of all captions."""
    return (digits * COLOUR_COUNT + foregrounds) * COLOUR_COUNT + backgrounds


def all_captions() -> list[str]:
    colours = range(COLOUR_COUNT)
    return [handwriting.caption(d, f, b) for d in range(10) for f in colours for b in colours]


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the captions is one token and any other text falls into characters."""
    characters = sorted(ByteLevel.alphabet())
    merges = []
    for word in sorted({word for text in all_captions() for word in text.split()}):
        # Byte-pair encoding applies the earliest rule first: follow the rules so far, then join what is left.
        parts = [*word[:-1], word[-1] + "</w>"]
        for rule in merges:
            parts = apply_merge(parts, rule)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = apply_merge(parts, merges[-1])
    tokens = characters + [character + "</w>" for character in characters] + ["".join(rule) for rule in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_LENGTH)


def apply_merge(parts: list[str], rule: tuple[str, str]) -> list[str]:
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == rule:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def tokenize(tokenizer, captions: list[str]):
    """Token numbers (N, CAPTION_LENGTH) as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_text_encoder(tokenizer, oracle, strokes, digits, args):
    """Contrast captions with the oracle's features of their images (CLIP's loss); the result is frozen."""
    generator = torch.Generator().manual_seed(args.seed + 3)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CAPTION_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))
    image_side = torch.nn.Linear(oracle.config["feature_dim"], 64)
    text_side = torch.nn.Linear(64, 64)
    sharpness = torch.nn.Parameter(torch.tensor(2.5))
    parameters = [*encoder.parameters(), *image_side.parameters(), *text_side.parameters(), sharpness]
    update = make_optimizer(parameters, 1e-3, args.text_steps)
    table = tokenize(tokenizer, all_captions())
    cross_entropy = torch.nn.functional.cross_entropy
    for _ in (bar := progress_bar(args.text_steps, "text encoder")):
        batch = handwriting.draw_from(strokes, digits, args.batch_size, generator)
        rows = label_row(batch["digits"], batch["foregrounds"], batch["backgrounds"])
        image = torch.nn.functional.normalize(image_side(oracle.features(batch["images"])), dim=1)
        text = torch.nn.functional.normalize(text_side(encoder(table[rows]).pooler_output), dim=1)
        logits = sharpness.exp() * image @ text.T
        # Images that share a caption are no negatives of each other.
        target = (rows[:, None] == rows[None, :]).float()
        target = target / target.sum(dim=1, keepdim=True)
        loss = cross_entropy(logits, target) + cross_entropy(logits.T, target)
        update(loss)
        bar.set_postfix_str(f"loss {loss.detach():.3f}", refresh=False)
    return round_to_half(encoder)


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's shape in small: two layers per block, of which block removal can take one."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=8, attention_head_dim=4,
        block_out_channels=(32, 48, 48, 64), cross_attention_dim=64,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )


def train_unet(latents: dict, conditions, scale: float, args) -> UNet2DConditionModel:
    """Train on noise prediction; `conditions` (rows, L, C) holds every caption's embedding, the empty one last."""
    generator = torch.Generator().manual_seed(args.seed + 4)
    scheduler, unet, average = build_scheduler(), build_unet(), build_unet()
    average.load_state_dict(unet.state_dict())
    weights, averages = list(unet.parameters()), list(average.requires_grad_(False).parameters())
    update = make_optimizer(weights, 3e-3, args.unet_steps)
    for step in (bar := progress_bar(args.unet_steps, "U-Net")):
        progress = step / args.unet_steps
        rows = torch.randint(len(latents["labels"]), (args.batch_size,), generator=generator)
        spread = torch.randn(args.batch_size, 4, 8, 8, generator=generator)
        clean = scale * (latents["means"][rows] + latents["stds"][rows] * spread)
        noise = torch.randn(clean.shape, generator=generator)
        # High noise decides what the sample shows, and is learnt first: the skew starts cubic and ends uniform.
        skew = 1.0 + 2.0 * (1.0 - progress)
        uniform = torch.rand(args.batch_size, generator=generator)
        timesteps = (1000 * (1.0 - uniform**skew)).long().clamp(0, 999)
        labels = latents["labels"][rows]
        labels = labels.where(torch.rand(args.batch_size, generator=generator) >= 0.1, len(conditions) - 1)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, conditions[labels]).sample, noise)
        update(loss)
        decay = min((step + 1) / (step + 10), 0.995 + 0.004 * progress)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
        bar.set_postfix_str(f"loss {loss.detach():.4f}", refresh=False)
    return round_to_half(average)


@torch.no_grad()
def sample(pipeline, captions: list[str], steps: int, guidance: float, seed: int):
    """Images (N, 3, 32, 32) in [-1, 1] of the captions; a guidance of 1 is none."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(captions), 100):
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
        images.append(pipeline(captions[start : start + 100], **call).images)
    return torch.cat(images) * 2.0 - 1.0


def measure(folder: Path, oracle_folder: Path, args) -> dict:
    """Figures of the saved pipeline, read back from disk in float32, and of the oracle on the held-out scans."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    oracle = load_oracle(oracle_folder)
    held_out = handwriting.draw("test", max(args.samples, 2000), args.seed + 10)
    labels = ("digits", "foregrounds", "backgrounds")
    reference = oracle.features(held_out["images"])
    prompts = handwriting.draw("train", args.samples, args.seed + 11)
    wanted = [prompts[name] for name in labels]
    with torch.no_grad():
        decoded = pipeline.vae(held_out["images"][: args.samples]).sample
    report = {
        "samples": args.samples,
        "guidance_scale": args.guidance_scale,
        "oracle_held_out": prompt_agreement(oracle, held_out["images"], *(held_out[name] for name in labels)),
        "autoencoder_rmse": (decoded - held_out["images"][: args.samples]).square().mean().sqrt().item(),
        "training_images_frechet": frechet_distance(oracle.features(prompts["images"]), reference),
        "ddim": {},
    }
    for steps in tqdm(FIGURE_STEPS, desc="figures     ", dynamic_ncols=True):
        images = sample(pipeline, prompts["captions"], steps, args.guidance_scale, args.seed + 12)
        figures = prompt_agreement(oracle, images, *wanted)
        report["ddim"][str(steps)] = figures | {"frechet": frechet_distance(oracle.features(images), reference)}
        if steps == FIGURE_STEPS[0]:
            save_grid(images[:40], folder / "samples.png")
    return report


def save_grid(images, path: Path, columns: int = 10) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, twice enlarged."""
    pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = [torch.cat(list(pixels[i : i + columns]), dim=2) for i in range(0, len(pixels) // columns * columns, columns)]
    grid = Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(path)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Tiny handwriting teacher
A complete Stable Diffusion pipeline in small, for trying out distillation on a CPU: it draws 32x32 images from captions
such as "a red handwritten seven on a yellow background" (ten digits; {colours}).

![samples](samples.png)
```python
pipeline = diffusers.StableDiffusionPipeline.from_pretrained("assets/tiny-teacher")
image = pipeline("a red handwritten seven on a yellow background", guidance_scale={guidance_scale:g}).images[0]
```
**Parts**: {parts} parameters. Epsilon prediction, 1,000 steps, scaled-linear betas 0.00085 to 0.012,
latents 4x8x8, captions of at most {length} tokens. U-Net and autoencoder are stored in float16.

**Data**: the 1,797 scans of 8x8 pixels that come with scikit-learn (`load_digits`), a copy of the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0); changes made: enlarged to 32x32 and tinted. One scan in six of each digit is
held out of all training, that of the oracle included.

**Training**: `python scripts/make_tiny_teacher.py --output_dir assets/tiny-teacher {flags}`
trains the oracle (a classifier of digit and both colours), the autoencoder, the text encoder (contrastively against the
oracle's features, then frozen) and the U-Net (AdamW 3e-3, EMA, 10 % of the captions dropped, time steps skewed to high
noise at first). It took {minutes:.0f} minutes with {threads} CPU thread(s).

**Figures**, read back from disk: {samples} random captions, guidance {guidance_scale:g}, DDIM. Agreement is the share of
images in which the oracle reads what the caption asks for. The Frechet distance is taken in the oracle's features
against tinted held-out scans; as many training images have {training_images_frechet:.2f}.

| steps | digit | foreground | background | all three | Frechet distance |
|---|---|---|---|---|---|
{rows}

The oracle reads {digit:.1%} of the held-out digits, {foreground:.1%} of their foregrounds and {background:.1%} of their
backgrounds. The autoencoder rebuilds held-out images within {autoencoder_rmse:.3f} (root mean square, values -1 to 1).
"""


def write_card(folder: Path, report: dict, pipeline, args) -> None:
    """Write README.md and report.json, with the figures of `measure`, beside the pipeline."""
    shown = ("seed", "oracle_steps", "vae_steps", "text_steps", "unet_steps", "batch_size", "cached_images")
    parts = {"U-Net": pipeline.unet, "text encoder": pipeline.text_encoder, "autoencoder": pipeline.vae}
    line = "| {0} | {digit:.3f} | {foreground:.3f} | {background:.3f} | {all:.3f} | {frechet:.2f} |"
    card = CARD.format(
        colours=", ".join(handwriting.COLOURS), length=CAPTION_LENGTH,
        parts=", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items()),
        flags=" ".join(f"--{name} {getattr(args, name)}" for name in shown),
        rows="\n".join(line.format(steps, **figures) for steps, figures in report["ddim"].items()),
        threads=args.threads, **report, **report["oracle_held_out"],
    )
    (folder / "README.md").write_text(card)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def train_pipeline(oracle, strokes, digits, args) -> StableDiffusionPipeline:
    """Train autoencoder, text encoder and U-Net one after the other; their values fit float16."""
    torch.manual_seed(args.seed + 1)
    vae = train_vae(strokes, digits, args)
    tokenizer = build_tokenizer()
    text_encoder = train_text_encoder(tokenizer, oracle, strokes, digits, args)
    latents = cache_latents(vae, strokes, digits, args)
    variance = latents["means"].var() + latents["stds"].square().mean()
    vae.register_to_config(scaling_factor=round(1.0 / variance.sqrt().item(), 4))
    with torch.no_grad():
        conditions = text_encoder(tokenize(tokenizer, all_captions() + [""])).last_hidden_state
    unet = train_unet(latents, conditions, vae.config.scaling_factor, args)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def replace_folder(new: Path, old: Path) -> None:
    """Put the finished folder `new` in the place of `old`."""
    aside = old.with_name(old.name + ".replaced")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.shards:
        paths = handwriting.write_shards(args.shards, args.seed, args.copies, args.samples_per_shard)
        print(f"Wrote {len(paths)} shards: {paths[0]} to {paths[-1].name}")
        return 0
    started = time.perf_counter()
    output = Path(args.output_dir)
    oracle_output = Path(args.oracle_dir)
    partial, oracle_partial = (path.with_name(path.name + ".partial") for path in (output, oracle_output))
    for folder in (partial, oracle_partial):
        shutil.rmtree(folder, ignore_errors=True)
    strokes, digits = handwriting.load_strokes("train")
    torch.manual_seed(args.seed)
    save_oracle(train_oracle(strokes, digits, args), oracle_partial)
    pipeline = train_pipeline(load_oracle(oracle_partial), strokes, digits, args)
    minutes = (time.perf_counter() - started) / 60.0
    # transformers loads a part in the type it was saved in, diffusers in float32: the text encoder stays float32.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(partial)
    report = measure(partial, oracle_partial, args) | {"minutes": round(minutes, 1)}
    write_card(partial, report, pipeline, args)
    replace_folder(oracle_partial, oracle_output)
    replace_folder(partial, output)
    print(f"Wrote {output} and {oracle_output}; figures are in {output / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
