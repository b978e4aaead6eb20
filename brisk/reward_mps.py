"""MPS, the Multi-dimensional Preference Score (CVPR 2024): CLIP's image tokens look at the words of the prompt that matter.

Its blocks share one key and one value between all heads, and run the feed-forward network beside the attention.
"""

import re

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention, silu
from transformers import CLIPConfig, CLIPModel

from brisk.reward_models import Clip, build, fill, from_hub, renamed

# what its authors call the overall condition, and how near to it a word of the prompt must be
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
NEAR = 0.3
BLOCKS, HEAD_WIDTH = 4, 64
# names in the published state dict -> names here
MPS_NAMES = ((r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"\1.cross."), (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"\1.own."))


class GatedUnit(nn.Module):
    """SwiGLU (arXiv 2002.05202): half of the channels times the silu of the others."""

    def forward(self, x):
        """(..., 2 D) -> (..., D)."""
        value, gate = x.chunk(2, dim=-1)
        return silu(gate) * value


def _attend(queries, keys, values, heads, mask=None):
    """Attention whose heads share one key and value: (B, N, h d), (B, T, d), (B, T, d) -> (B, N, h d)."""
    keys, values = (tensor[:, None].expand(-1, heads, -1, -1) for tensor in (keys, values))
    seen = scaled_dot_product_attention(queries.unflatten(-1, (heads, -1)).transpose(1, 2), keys, values, attn_mask=mask)
    return seen.transpose(1, 2).flatten(2)


def _rotate(x):
    """Rotary positions (arXiv 2104.09864) of (B, N, ..., d)."""
    width, count = x.shape[-1], x.shape[1]
    rates = 10000 ** (-torch.arange(0, width, 2, device=x.device).float() / width)
    angles = torch.outer(torch.arange(count, device=x.device).float(), rates).repeat(1, 2)
    angles = angles.view(1, count, *[1] * (x.ndim - 3), width)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class CrossBlock(nn.Module):
    """Image tokens look at text tokens; a feed-forward network runs beside."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, bias=False)
        self.to_q, self.to_out = nn.Linear(width, heads * HEAD_WIDTH, False), nn.Linear(heads * HEAD_WIDTH, width, False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, False)
        self.ff = nn.Sequential(nn.Linear(width, 8 * width, False), GatedUnit(), nn.Linear(4 * width, width, False))

    def forward(self, tokens, text, mask):
        """Tokens (B, N, D), text (B, T, D), mask (B, 1, 1, T) True where text is looked at -> (B, N, D)."""
        x = self.norm(tokens)
        return tokens + self.to_out(_attend(self.to_q(x), *self.to_kv(text).chunk(2, dim=-1), self.heads, mask)) + self.ff(x)


class OwnBlock(nn.Module):
    """Image tokens look at each other; a feed-forward network runs beside."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, bias=False)
        self.widths = (heads * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 8 * width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.widths), False)
        self.attn_out = nn.Linear(heads * HEAD_WIDTH, width, False)
        self.ff_out = nn.Sequential(GatedUnit(), nn.Linear(4 * width, width, False))

    def forward(self, tokens):
        """(B, N, D) -> (B, N, D)."""
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(tokens)).split(self.widths, dim=-1)
        queries = _rotate(queries.unflatten(-1, (self.heads, -1))).flatten(2)
        return tokens + self.attn_out(_attend(queries, _rotate(keys), values, self.heads)) + self.ff_out(hidden)


def load_mps(file, source, source_key, cache_dir, device):
    """Function of (images, prompts) -> scores of MPS (Multi-dimensional Preference Score, CVPR 2024), overall. UserError.

    The image is read by what in the prompt is near to `CONDITION`. Config and tokenizer of its CLIP are at `source`.
    """
    buffers = ("norm.bias", "inv_freq", "position_ids")  # zeros and constants; `norm.bias` in the blocks only
    state = renamed(file.read(), MPS_NAMES)
    towers = {name.removeprefix("model."): tensor for name, tensor in state.items()
              if name.startswith("model.") and not name.endswith(buffers[2])}  # fmt: skip
    own = {name: tensor for name, tensor in state.items() if re.match(r"\d+\.", name) and not name.endswith(buffers)}
    config = from_hub(CLIPConfig, source, source_key, cache_dir)
    network = build(CLIPModel, config, towers, file)
    clip = Clip(network, source, source_key, cache_dir, device)
    sizes = config.projection_dim, config.projection_dim // HEAD_WIDTH
    layers = [nn.ModuleDict({"cross": CrossBlock(*sizes), "own": OwnBlock(*sizes)}) for _ in range(BLOCKS)]
    blocks = fill(nn.ModuleList(layers), own, file).to(device)

    def words(prompts):
        """Projected states (B, T, D) of all tokens, and of the end token (B, D)."""
        read = network.text_model(clip.tokens(prompts))
        return network.text_projection(read.last_hidden_state), network.text_projection(read.pooler_output)

    def score(images, prompts):
        text, whole = words(prompts)
        near = (text @ words([CONDITION])[0].transpose(1, 2)).amax(-1)
        mask = near / near.amax(-1, keepdim=True) > NEAR
        tokens = network.visual_projection(network.vision_model(clip.pixels(images)).last_hidden_state)
        for block in blocks:
            tokens = block["own"](block["cross"](tokens, text, mask[:, None, None]))
        cosine = (normalize(tokens[:, 0].float(), dim=-1) * normalize(whole.float(), dim=-1)).sum(-1)
        return network.logit_scale.exp().float() * cosine

    return score
