"""What a Stable Diffusion U-Net is called with: prompt embeddings, latents, SDXL's size conditions.

Letters: B batch, L tokens, D text width, H W pixels, h w latent height and width.
"""

import torch


class Tokenize:
    """Callable: text -> {"input_ids_0": token ids (L,), ...}, one per tokenizer; picklable for loader workers."""

    def __init__(self, tokenizers):
        self.tokenizers = tokenizers

    def __call__(self, text):
        text = text.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates
        return {
            f"input_ids_{number}": tokenizer(text, max_length=tokenizer.model_max_length, padding="max_length",
                                             truncation=True, return_tensors="pt").input_ids[0]
            for number, tokenizer in enumerate(self.tokenizers)
        }  # fmt: skip


class EmbeddingTable:
    """Callable in place of `Tokenize`: text -> {"prompt_embeds" fp16 (L, D), SDXL: "pooled"}, all encoded beforehand."""

    def __init__(self, parts, captions, device, progress=None, batch_size=32):
        """`captions`: every text that will be asked for; encoded on `device`, kept on the CPU."""
        texts, columns = sorted({text.strip() for text in captions}), []
        self.place = {text: number for number, text in enumerate(texts)}
        tokenize = Tokenize(parts.tokenizers)
        for first in range(0, len(texts), batch_size):
            rows = [tokenize(text) for text in texts[first : first + batch_size]]
            ids = [torch.stack([row[name] for row in rows]).to(device) for name in rows[0]]
            columns.append([part.half().cpu() for part in encode_prompts(parts, ids) if part is not None])
            if progress is not None:
                progress.update(len(rows))
        names = ("prompt_embeds", "pooled")
        self.table = {name: torch.cat(parts) for name, parts in zip(names, zip(*columns, strict=True), strict=False)}

    def __call__(self, text):
        return {name: column[self.place[text.strip()]] for name, column in self.table.items()}


@torch.no_grad()
def encode_prompts(parts, input_ids):
    """Prompt embeddings (B, L, D), and the pooled ones (B, P) for SDXL, else None.

    Args: `input_ids` one (B, L) tensor per text encoder. SD1/SD2 use the last hidden state, SDXL the penultimate
    ones of both encoders side by side and the projection of the second.
    """
    if not parts.is_xl:
        return parts.text_encoders[0](input_ids[0])[0], None
    outputs = [
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(parts.text_encoders, input_ids, strict=True)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]


def encode_blank(parts, device, mode="encode"):
    """The embeddings (1, L, D) and pooled (1, P) or None of a dropped caption: encoded, `zeros`, or `auto` as sampled."""
    blank = encode_prompts(parts, [row[None].to(device) for row in Tokenize(parts.tokenizers)("").values()])
    if mode == "zeros":
        return tuple(None if part is None else torch.zeros_like(part) for part in blank)
    return unconditional(parts, blank) if mode == "auto" else blank


def unconditional(parts, blank):
    """The embeddings that guidance starts from: those of the empty caption, or zeros where the pipeline says so."""
    if parts.is_xl and parts.zeros_for_empty:
        return torch.zeros_like(blank[0]), torch.zeros_like(blank[1])
    return blank


def condition(parts, embeddings, sizes, batch_size):
    """The keyword arguments of a U-Net call; embeddings of one prompt are repeated to `batch_size`."""
    prompt_embeds, pooled = embeddings
    arguments = {"encoder_hidden_states": prompt_embeds.expand(batch_size, -1, -1)}
    if parts.is_xl:
        arguments["added_cond_kwargs"] = {
            "text_embeds": pooled.expand(batch_size, -1),
            "time_ids": sizes.expand(batch_size, -1),
        }
    return arguments


def stack_conditions(first, second):
    """Two `condition`s as one of twice the batch."""
    joined = {"encoder_hidden_states": torch.cat([first["encoder_hidden_states"], second["encoder_hidden_states"]])}
    if "added_cond_kwargs" in first:
        pairs = {name: torch.cat([value, second["added_cond_kwargs"][name]])
                 for name, value in first["added_cond_kwargs"].items()}  # fmt: skip
        joined["added_cond_kwargs"] = pairs
    return joined


@torch.no_grad()
def latent_moments(vae, pixels, batch_size):
    """Mean and standard deviation (B, 4, h, w) of the VAE's latent, unscaled, in chunks of `batch_size` images.

    Args: `pixels` uint8 (B, 3, H, W). The VAE runs in its own precision: SDXL's overflows in fp16.
    """
    parts = [vae.encode((chunk.float() / 127.5 - 1).to(vae.dtype)).latent_dist for chunk in pixels.split(batch_size)]
    return torch.cat([part.mean for part in parts]).float(), torch.cat([part.std for part in parts]).float()


def sample_latents(batch, vae, scaling_factor, vae_batch_size, noise_generator):
    """Clean scaled latents (B, 4, h, w) float32, of cached ones drawn anew each time.

    Args: `batch` holds "latents" (scaled), "moments" (B, 2, 4, h, w: mean and standard deviation) or "pixels".
    """
    if "latents" in batch:
        return batch["latents"].float()
    if "moments" in batch:
        mean, std = batch["moments"].float().unbind(1)
    else:
        mean, std = latent_moments(vae, batch["pixels"], vae_batch_size)
    noise = torch.randn(mean.shape, generator=noise_generator, device=mean.device)
    return (mean + std * noise) * scaling_factor


@torch.no_grad()
def encode_batch(parts, batch, blank, noise_generator, resolution, vae_batch_size, autocast):
    """Clean scaled latents (B, 4, h, w) float32, prompt embeddings, and SDXL's sizes (B, 6) or None.

    Args: `batch` of `samples.ImageCaptions` or `samples.CachedLatents`; `blank`: the embeddings of dropped captions,
    None to drop none.
    """
    scaling_factor, chunk = parts.vae.config.scaling_factor, vae_batch_size or (8 if parts.is_xl else 32)
    latents = sample_latents(batch, parts.vae, scaling_factor, chunk, noise_generator)
    sizes = batch.get("time_ids")
    if parts.is_xl and sizes is None:
        sizes = time_ids(batch["original_size"], batch["crop_top_left"], resolution)
    return latents, embeddings_of(parts, batch, blank, autocast), sizes


def embeddings_of(parts, batch, blank, autocast, prefix=""):
    """Prompt embeddings and SDXL's pooled ones (else None) of a batch of token ids or embeddings; `blank` where dropped.

    Args: `blank` None to drop none; `prefix` "extra_" for the second prompt of each sample.
    """
    if f"{prefix}prompt_embeds" in batch:
        found = batch[f"{prefix}prompt_embeds"], batch[f"{prefix}pooled"] if parts.is_xl else None
    else:
        with autocast:
            found = encode_prompts(parts, [batch[f"{prefix}input_ids_{i}"] for i in range(len(parts.tokenizers))])
    return found if blank is None else choose(batch["empty"], blank, found)


def swap_prompts(parts, batch, embeddings, blank, swapped, draw, autocast):
    """`embeddings`, none dropped yet, with other captions' where `swapped` (B,), then `blank` where dropped.

    The other captions are the neighbours'; where the batch has extra prompts, those for half of the samples (all, if one),
    chosen with the generator `draw`.
    """
    others = tuple(None if part is None else part.roll(1, 0) for part in embeddings)
    if any(name.startswith("extra_") for name in batch):
        own = torch.rand(len(swapped), generator=draw, device=swapped.device) < (0.5 if len(swapped) > 1 else 1)
        others = choose(own, embeddings_of(parts, batch, None, autocast, "extra_"), others)
    return choose(batch["empty"], blank, choose(swapped, others, embeddings))


def choose(mask, first, second):
    """Per sample, where `mask` (B,) the embeddings `first`, elsewhere `second`, both (embeddings, pooled or None)."""
    embeddings = torch.where(mask[:, None, None], first[0], second[0].to(first[0].dtype))
    return embeddings, None if first[1] is None else torch.where(mask[:, None], first[1], second[1].to(first[1].dtype))


def time_ids(original_size, crop_top_left, resolution):
    """SDXL's size conditions (B, 6): original (height, width), crop (top, left), target (height, width)."""
    target = torch.full_like(original_size, resolution)
    return torch.cat([original_size, crop_top_left, target], dim=1)
