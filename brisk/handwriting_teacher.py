"""The built-in teacher, a Stable Diffusion in small, and its oracle: how their parts are built and trained."""

import math

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, mse_loss, normalize
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from brisk import handwriting
from brisk.scorers import HandwritingOracle

CAPTION_LENGTH = 16
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


def progress_bar(steps, name: str):
    """A bar over the numbers of `steps`, a range."""
    return tqdm(steps, desc=f"{name:12s}", mininterval=1.0, dynamic_ncols=True)


def bend(strokes, generator):
    """Rotate, scale and shift strokes (N, 32, 32) a little; what moves in is background."""
    count = len(strokes)
    angle, stretch_x, stretch_y, shift_x, shift_y = torch.rand(5, count, generator=generator) * 2 - 1
    angle, shift = angle * 0.2, 0.12 * torch.stack([shift_x, shift_y], dim=1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    stretch = 1 + 0.12 * torch.stack([stretch_x, stretch_y], dim=1)
    affine = torch.cat([turn * stretch[:, :, None], shift[:, :, None]], dim=2)
    grid = affine_grid(affine, (count, 1, *strokes.shape[1:]), align_corners=False)
    return grid_sample(strokes[:, None], grid, align_corners=False)[:, 0]


def train_oracle(strokes, digits, steps: int, batch_size: int, seed: int) -> HandwritingOracle:
    """Train the oracle on tinted strokes (N, 32, 32) with their digits (N,), bent and with noise."""
    generator = torch.Generator().manual_seed(seed)
    oracle = HandwritingOracle()
    update = make_optimizer(oracle.parameters(), 2e-3, steps)
    for _ in progress_bar(range(steps), "oracle"):
        which = torch.randint(len(strokes), (batch_size,), generator=generator)
        bent = bend(strokes[which], generator)
        batch = handwriting.draw_from(bent, digits[which], batch_size, generator)
        noise = 0.08 * torch.rand(batch_size, 1, 1, 1, generator=generator)
        images = batch["images"] + noise * torch.randn(batch["images"].shape, generator=generator)
        labels = (batch["digits"], batch["foregrounds"], batch["backgrounds"])
        pairs = zip(oracle(images), labels, strict=True)
        update(sum(cross_entropy(logits, wanted, label_smoothing=0.05) for logits, wanted in pairs))
    return oracle.eval().requires_grad_(False)


def train_vae(strokes, digits, steps: int, batch_size: int, seed: int) -> AutoencoderKL:
    """Train the autoencoder (latents 4x8x8) on tinted strokes: squared error and a small KL term."""
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=1,
        block_out_channels=(16, 32, 32), down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, mid_block_add_attention=False, sample_size=handwriting.IMAGE_SIZE,
    )  # fmt: skip
    update = make_optimizer(vae.parameters(), 3e-3, steps)
    for _ in (bar := progress_bar(range(steps), "autoencoder")):
        images = handwriting.draw_from(strokes, digits, batch_size // 4 or 1, generator)["images"]
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = mse_loss(vae.decode(latents).sample, images)
        update(error + 1e-4 * posterior.kl().mean() / latents[0].numel())
        bar.set_postfix_str(f"rmse {error.detach().sqrt():.4f}", refresh=False)
    return round_to_half(vae)


def round_to_half(model):
    """Freeze a model at the float16 values that are going to be saved, kept in float32."""
    return model.half().float().eval().requires_grad_(False)


@torch.no_grad()
def cache_latents(vae, strokes, digits, count: int, seed: int) -> dict:
    """Encode `count` random images once: means and stds (count, 4, 8, 8), labels (count,) rows of `all_captions`."""
    generator = torch.Generator().manual_seed(seed)
    parts = {"means": [], "stds": [], "labels": []}
    for start in progress_bar(range(0, count, 500), "latents"):
        batch = handwriting.draw_from(strokes, digits, min(500, count - start), generator)
        posterior = vae.encode(batch["images"]).latent_dist
        parts["means"].append(posterior.mean)
        parts["stds"].append(posterior.std)
        parts["labels"].append(label_row(batch["digits"], batch["foregrounds"], batch["backgrounds"]))
    return {name: torch.cat(values) for name, values in parts.items()}


def label_row(digits, foregrounds, backgrounds):
    """Row of a label in the table of all captions."""
    return (digits * COLOUR_COUNT + foregrounds) * COLOUR_COUNT + backgrounds


def all_captions() -> list[str]:
    """The captions of all labels, in the order of `label_row`; equal colours are among them."""
    colours = range(COLOUR_COUNT)
    return [handwriting.caption(d, f, b) for d in range(10) for f in colours for b in colours]


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer: every word of the captions is one token, any other text falls into characters."""
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
    """Join each neighbouring pair in `parts` that equals `rule`."""
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


def train_text_encoder(tokenizer, oracle, strokes, digits, steps: int, batch_size: int, seed: int) -> CLIPTextModel:
    """Contrast captions with the oracle's features of their images (CLIP's loss); the result is frozen."""
    generator = torch.Generator().manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CAPTION_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    image_side = torch.nn.Linear(oracle.config["feature_dim"], 64)
    text_side = torch.nn.Linear(64, 64)
    sharpness = torch.nn.Parameter(torch.tensor(2.5))
    parameters = [*encoder.parameters(), *image_side.parameters(), *text_side.parameters(), sharpness]
    update = make_optimizer(parameters, 1e-3, steps)
    table = tokenize(tokenizer, all_captions())
    for _ in (bar := progress_bar(range(steps), "text encoder")):
        batch = handwriting.draw_from(strokes, digits, batch_size, generator)
        rows = label_row(batch["digits"], batch["foregrounds"], batch["backgrounds"])
        image = normalize(image_side(oracle.features(batch["images"])), dim=1)
        text = normalize(text_side(encoder(table[rows]).pooler_output), dim=1)
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
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def train_unet(latents: dict, conditions, scale: float, steps: int, batch_size: int, seed: int) -> UNet2DConditionModel:
    """Train noise prediction on the output of `cache_latents` times `scale`; returns the average of the weights.

    `conditions` (rows, L, C) holds every caption's embedding, that of the empty prompt last."""
    generator = torch.Generator().manual_seed(seed)
    scheduler, unet, average = build_scheduler(), build_unet(), build_unet()
    average.load_state_dict(unet.state_dict())
    weights, averages = list(unet.parameters()), list(average.requires_grad_(False).parameters())
    update = make_optimizer(weights, 3e-3, steps)
    for step in (bar := progress_bar(range(steps), "U-Net")):
        progress = step / steps
        rows = torch.randint(len(latents["labels"]), (batch_size,), generator=generator)
        spread = torch.randn(batch_size, 4, 8, 8, generator=generator)
        clean = scale * (latents["means"][rows] + latents["stds"][rows] * spread)
        noise = torch.randn(clean.shape, generator=generator)
        # High noise decides what the sample shows, and is learnt first: the skew starts cubic and ends uniform.
        skew = 1.0 + 2.0 * (1.0 - progress)
        uniform = torch.rand(batch_size, generator=generator)
        timesteps = (1000 * (1.0 - uniform**skew)).long().clamp(0, 999)
        labels = latents["labels"][rows]
        labels = labels.where(torch.rand(batch_size, generator=generator) >= 0.1, len(conditions) - 1)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = mse_loss(unet(noisy, timesteps, conditions[labels]).sample, noise)
        update(loss)
        decay = min((step + 1) / (step + 10), 0.995 + 0.004 * progress)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
        bar.set_postfix_str(f"loss {loss.detach():.4f}", refresh=False)
    return round_to_half(average)
