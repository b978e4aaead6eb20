"""DiT (arXiv 2212.09748), and the fixed-point network of FPDM (arXiv 2401.08741): one block iterated between a few others.

Letters: B batch, C channels of the latent, h its side, p patch, T = (h / p)^2 tokens, D width, K classes. Names of weights are
those of the published checkpoints.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brisk import fixed_point

SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}  # layers, width, heads
NAMES = [f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]


class Output(NamedTuple):
    """What a forward pass gives; the last three are None for a plain DiT."""

    sample: torch.Tensor  # (B, O, h, h)
    state: torch.Tensor | None  # (B, T, D), to start the next timestep from
    num_iters: torch.Tensor | None  # (B,) evaluations of the fixed-point layer
    residual: torch.Tensor | None  # (B,) relative change by the last one, NaN if not measured


def _call(function, *inputs):
    return function(*inputs)


def _compiled(function, mode, settings):
    compiled = torch.compile(function, mode=mode, **settings)
    if mode in ("default", "max-autotune-no-cudagraphs"):
        return compiled

    def replay(*inputs):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*inputs).clone()  # a CUDA graph writes its next output over the last

    return replay


def _as_iterated(state):
    """`state` in the layout and precision in which an iteration returns it, so that one compiled graph takes both."""
    kind = state.device.type
    return state.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else state.dtype).contiguous()


def size_of(name):
    """{"num_layers", "hidden_size", "num_attention_heads", "patch_size"} of a name like DiT-XL/2. ValueError."""
    if name not in NAMES:
        raise ValueError(f"'{name}' is none of {', '.join(NAMES)}.")
    size, patch = name.removeprefix("DiT-").split("/")
    layers, width, heads = SIZES[size]
    return {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "patch_size": int(patch)}


def position_table(side, width):
    """Sine and cosine of column, then of row, (1, side^2, width) (section 2.1: the first half is the column)."""
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * rate for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)[None].float()


def norm(x):
    """LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, scale, shift):
    """Normalised, scaled and shifted tokens (B, T, D) by (B, D) vectors."""
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with gelu between."""

    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (arXiv 2212.09748, figure 3)."""

    def __init__(self, width, heads, mlp_ratio=4.0):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, int(mlp_ratio * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        """(B, T, D) and the conditioning (B, D) -> (B, T, D)."""
        return self.apply_with(x, self.adaLN_modulation(condition))

    def apply_with(self, x, modulation):
        """The block, given what `adaLN_modulation` makes of the conditioning (B, 6 D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(x, scale1, shift1))
        return x + gate2[:, None] * self.mlp(modulate(x, scale2, shift2))


class TimestepEmbedder(nn.Module):
    """Timesteps as sines and cosines, then two layers."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """(B,) -> (B, D)."""
        rate = 10000.0 ** -(torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        phase = t[:, None].float() * rate
        return self.mlp(torch.cat([phase.cos(), phase.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of classes whose last row, K, stands for no label."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels):
        """(B,) int64 -> (B, D)."""
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """The head: modulated norm, then one output patch per token."""

    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        """(B, T, D) -> (B, T, p p O)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(x, scale, shift))


class PatchEmbedder(nn.Module):
    """Patches to tokens."""

    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        """(B, C, h, h) -> (B, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    """The network, with a fixed-point layer or as a plain DiT."""

    def __init__(self, sample_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, num_layers=28,
                 num_attention_heads=16, mlp_ratio=4.0, num_classes=1000, fixed_point=False, pre_depth=1, post_depth=1,
                 pre_post_timestep_conditioning=False, label_dim=None):  # fmt: skip
        """`label_dim`: labels are vectors of this width, not classes."""
        super().__init__()
        self.side, self.patch, self.outputs = sample_size // patch_size, patch_size, out_channels
        self.is_fixed_point, self.blocks_know_time = fixed_point, pre_post_timestep_conditioning or not fixed_point
        self.is_compiled = False
        width = hidden_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Linear(label_dim, width) if label_dim else LabelEmbedder(num_classes, width)
        self.register_buffer("pos_embed", position_table(self.side, width), persistent=False)

        def stack(count):
            return nn.ModuleList(Block(width, num_attention_heads, mlp_ratio) for _ in range(count))

        if fixed_point:
            self.blocks_pre, self.blocks_post = stack(pre_depth), stack(post_depth)
            self.block_pre_projection = nn.Linear(width, width)
            self.block_fixed_point_projection_fc1 = nn.Linear(2 * width, 2 * width)
            self.block_fixed_point_projection_fc2 = nn.Linear(2 * width, width)
            self.block_fixed_point = Block(width, num_attention_heads, mlp_ratio)
        else:
            self.blocks = stack(num_layers)
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Section 2.7: Xavier, small embeddings, zero gates and head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        label = self.y_embedder.weight if isinstance(self.y_embedder, nn.Linear) else self.y_embedder.embedding_table.weight
        for weight in (label, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        zeroed = [module.adaLN_modulation[1] for module in self.modules() if hasattr(module, "adaLN_modulation")]
        for linear in (*zeroed, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x, t, labels, num_iters=None, init_state=None, recompute=False, solver=None):
        """`Output` for latents x (B, C, h, h), timesteps t (B,) and labels (B,) int64, or (B, label_dim).

        Args: `num_iters`: k, or (n, m): n iterations without gradient, then m with it (stochastic Jacobian-free
        backpropagation, section 4), whose last change is measured; `init_state` (B, T, D) in place of the embedded
        input; `recompute`: activations of each block and iteration anew in the backward pass; `solver`: for k iterations, a
        dict of settings of `fixed_point.solve`, which also measures the last change. ValueError for training with k
        iterations, which would give the layer no gradient, and for `solver` where nothing is solved.
        """
        is_pair = isinstance(num_iters, tuple)
        if solver and (is_pair or not self.is_fixed_point):
            raise ValueError(f"solver settings are for a number of iterations, not for {'a pair' if is_pair else 'a plain DiT'}.")
        if self.is_fixed_point and self.training and torch.is_grad_enabled() and not is_pair:
            raise ValueError("training needs num_iters=(n, m): call eval(), or sample under torch.no_grad().")
        run = functools.partial(checkpoint, use_reentrant=False) if recompute else _call
        tokens = self.x_embedder(x) + self.pos_embed.to(x.dtype)
        label = self.y_embedder(labels)
        condition = self.t_embedder(t) + label
        outer = condition if self.blocks_know_time else label
        state = iterations = rho = None
        if self.is_fixed_point:
            for block in self.blocks_pre:
                tokens = run(block, tokens, outer)
            start = _as_iterated(tokens.detach() if init_state is None else init_state.to(tokens.dtype))
            tokens, iterations, rho = self.iterate(tokens, condition, start, num_iters, run, solver)
            state, last = tokens, self.blocks_post
        else:
            last = self.blocks
        for block in last:
            tokens = run(block, tokens, outer)
        patches = self.final_layer(tokens, outer).unflatten(2, (self.patch, self.patch, self.outputs))
        image = patches.unflatten(1, (self.side, self.side)).permute(0, 5, 1, 3, 2, 4)
        return Output(image.flatten(4, 5).flatten(2, 3), state, iterations, rho)

    def iterate(self, injected, condition, state, num_iters, run, solver):
        """(state, iterations, residual) after the fixed-point layer; what stays the same over its iterations is made once.

        Args: `run(function, *inputs)` calls a part that gets gradient.
        """
        without, with_grad = num_iters if isinstance(num_iters, tuple) else (num_iters, 0)
        width = injected.shape[-1]
        fuse = self.block_fixed_point_projection_fc1
        from_state, from_input = fuse.weight.split(width, dim=1)
        constant = F.linear(self.block_pre_projection(injected), from_input, fuse.bias)
        modulation = self.block_fixed_point.adaLN_modulation(condition)

        def step(z, rows=None):
            fixed = (constant, modulation) if rows is None else (constant[rows], modulation[rows])
            return self.iteration(z, *fixed, from_state)

        count = torch.full((len(state),), 0, device=state.device)
        rho = torch.full((len(state),), float("nan"), device=state.device)
        with torch.no_grad():
            if with_grad or not solver:
                state = fixed_point.picard(step, state, without)
                count += without
            else:
                state, count, rho = fixed_point.solve(step, state, without, **solver)
        if with_grad and self.is_compiled and torch.is_grad_enabled():
            state = state.detach().requires_grad_()  # as all later ones: else the first iteration needs a graph of its own
        for _ in range(with_grad):
            before, state = state, run(step, state)
        if with_grad:
            with torch.no_grad():
                rho = fixed_point.residual(state, before)
        return state, count + with_grad, rho

    def compile_iteration(self, mode="default", **settings):
        """torch.compile what is called most often: one fixed-point iteration, whose graph serves any number; else the blocks.

        Args: `mode` and `settings` as torch.compile takes them; modes with CUDA graphs are for sampling.
        """
        if self.is_fixed_point:
            self.iteration, self.is_compiled = _compiled(self.iteration, mode, settings), True
        else:
            for block in self.blocks:
                block.forward = _compiled(block.forward, mode, settings)

    def iteration(self, z, constant, modulation, from_state):
        """One application of the fixed-point layer (section 2.5), the injected half and the modulation given."""
        hidden = F.gelu(F.linear(z, from_state) + constant, approximate="tanh")
        return self.block_fixed_point.apply_with(self.block_fixed_point_projection_fc2(hidden), modulation)


def guide(output, scale, channels):
    """Guided output (B, O, h, h) of a batch [conditional ; unconditional] (2 B, O, h, h).

    Args: `channels`: how many of the first channels are guided; the others are the conditional half's.
    """
    conditional, unconditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], 1)


def macs(width, tokens):
    """Multiply-accumulates of a block and of the injection of one iteration, whole and without what is made once (section 8)."""
    return {"block": tokens * (12 * width**2 + 2 * tokens * width), "injection": 6 * width**2 * tokens,
            "injection_hoisted": 4 * width**2 * tokens, "projection": width**2 * tokens}  # fmt: skip


def fixed_point_macs(width, tokens, pre, post, iterations, hoisted=True):
    """Multiply-accumulates of a forward pass with `iterations` of the fixed-point layer."""
    parts = macs(width, tokens)
    outer = (pre + post + iterations) * parts["block"] + parts["projection"]
    if not hoisted:
        return outer + iterations * parts["injection"]
    return outer + iterations * parts["injection_hoisted"] + parts["injection"] - parts["injection_hoisted"]


def forward_macs(config, iterations=None):
    """Multiply-accumulates of a forward pass of the network `config` with `iterations`; None: of the plain DiT of its size."""
    tokens = (config.sample_size // config.patch_size) ** 2
    if iterations is None:
        return config.num_layers * macs(config.hidden_size, tokens)["block"]
    return fixed_point_macs(config.hidden_size, tokens, config.pre_depth, config.post_depth, iterations)
