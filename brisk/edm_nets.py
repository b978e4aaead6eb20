"""The EDM networks (arXiv 2206.00364): DDPM++ and NCSN++ (`SongUNet`), ADM (`DhariwalUNet`), and their preconditioning.

Letters: B batch, C channels, H side, E width of the noise embedding, L classes. Names of weights are those of the
published networks, which load by name. `sigma` is the noise level of x = x0 + sigma * noise.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

SONG, ADM = "SongUNet", "DhariwalUNet"
SQRT_HALF = math.sqrt(0.5)
# what a config may hold beside the arguments of the network itself
OUTER = {"img_resolution", "img_channels", "label_dim", "model_type", "sigma_data", "sigma_min", "sigma_max",
         "use_fp16"}  # fmt: skip


class Conv(nn.Module):
    """A convolution with resampling by two before it (after it if `fused`); `kernel` 0: resampling alone."""

    def __init__(self, channels_in, channels_out, kernel, resample=None, taps=(1, 1), fused=False):
        """Args: `resample`: "up", "down" or None; `taps`: the filter along one axis."""
        super().__init__()
        self.resample, self.fused = resample, fused
        self.weight = self.bias = None
        if kernel:
            bound = 1 / math.sqrt(channels_in * kernel * kernel)
            self.weight = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(channels_out))
        if resample:
            taps = torch.as_tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None])

    def forward(self, x):
        """(B, C, H, H) -> (B, C', H', H'); H' is H, 2 H ("up") or H / 2 ("down")."""
        padding = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.resample:
            filters = self.resample_filter.to(x.dtype)
            margin = (filters.shape[-1] - 1) // 2
            if self.resample == "down" and self.fused:
                x = F.conv2d(x, self.weight, padding=padding + margin)
                return F.conv2d(x, filters.repeat(x.shape[1], 1, 1, 1), self.bias, stride=2, groups=x.shape[1])
            filters, convolve = (4 * filters, F.conv_transpose2d) if self.resample == "up" else (filters, F.conv2d)
            x = convolve(x, filters.repeat(x.shape[1], 1, 1, 1), stride=2, padding=margin, groups=x.shape[1])
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=padding)


def group_norm(channels, eps):
    """GroupNorm of at least four channels a group, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Block(nn.Module):
    """A residual block with the noise embedding and, where `heads` > 0, self-attention."""

    def __init__(self, channels_in, channels_out, width, heads, resample=None, taps=(1, 1), dropout=0.0,
                 resample_proj=False, adaptive=False, scale=1.0, eps=1e-5):  # fmt: skip
        """Args: `width` E; `adaptive`: the embedding scales and shifts; `scale`: of the sums; others as for `Conv`."""
        super().__init__()
        self.heads, self.dropout, self.adaptive, self.scale = heads, dropout, adaptive, scale
        self.norm0 = group_norm(channels_in, eps)
        self.conv0 = Conv(channels_in, channels_out, 3, resample, taps)
        self.affine = nn.Linear(width, channels_out * (2 if adaptive else 1))
        self.norm1 = group_norm(channels_out, eps)
        self.conv1 = Conv(channels_out, channels_out, 3)
        self.skip = None
        if channels_in != channels_out or resample:
            kernel = 1 if resample_proj or channels_in != channels_out else 0
            self.skip = Conv(channels_in, channels_out, kernel, resample, taps)
        if heads:
            self.norm2 = group_norm(channels_out, eps)
            self.qkv, self.proj = Conv(channels_out, 3 * channels_out, 1), Conv(channels_out, channels_out, 1)

    def forward(self, x, embedding):
        """(B, C, H, H) and (B, E) -> (B, C', H', H')."""
        hidden = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = shift.chunk(2, dim=1)
            hidden = F.silu(shift + self.norm1(hidden) * (1 + scale))
        else:
            hidden = F.silu(self.norm1(hidden + shift))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        hidden = (hidden + (x if self.skip is None else self.skip(x))) * self.scale
        return (hidden + self.proj(self.attend(hidden))) * self.scale if self.heads else hidden

    def attend(self, x):
        """Self-attention over the positions, (B, C, H, H) -> the same; of each channel's three values q, k, v."""
        qkv = self.qkv(self.norm2(x)).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = qkv.transpose(2, 4).unbind(3)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class FourierFeatures(nn.Module):
    """Random frequencies of NCSN++."""

    def __init__(self, channels, scale=16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, noise):
        """(B,) -> cosines, then sines, (B, C)."""
        angles = torch.outer(noise, 2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class PositionalFeatures(nn.Module):
    """Frequencies from 1 down to 1/10000, that end included if `endpoint`."""

    def __init__(self, channels, endpoint):
        super().__init__()
        self.half, self.steps = channels // 2, channels // 2 - (1 if endpoint else 0)

    def forward(self, noise):
        """(B,) -> cosines, then sines, (B, C)."""
        place = torch.arange(self.half, dtype=noise.dtype, device=noise.device)
        angles = torch.outer(noise, 10000.0 ** (-place / self.steps))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def widths(model_channels, channel_mult, resolution):
    """[(side, channels)] of the levels, finest first."""
    return [(resolution >> level, model_channels * factor) for level, factor in enumerate(channel_mult)]


class SongUNet(nn.Module):
    """DDPM++ (positional, standard encoder) and NCSN++ (fourier, residual encoder) of arXiv 2011.13456."""

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.1,
                 label_dropout=0.0, embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                 decoder_type="standard", resample_filter=(1, 1)):  # fmt: skip
        """Raises ValueError for a type that no published network has. `label_dropout` matters in EDM's training only."""
        super().__init__()
        for value, known in ((embedding_type, ("positional", "fourier")), (encoder_type, ("standard", "residual")),
                             (decoder_type, ("standard",))):  # fmt: skip
            if value not in known:
                raise ValueError(f"the EDM network has '{value}' where it must have one of {', '.join(known)}.")
        noise, width = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = FourierFeatures(noise) if embedding_type == "fourier" else PositionalFeatures(noise, True)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, width), nn.Linear(width, width)
        levels = widths(model_channels, channel_mult, img_resolution)

        def block(channels_in, channels_out, attention=False, resample=None):
            return Block(channels_in, channels_out, width, int(attention), resample, resample_filter, dropout,
                         resample_proj=True, scale=SQRT_HALF, eps=1e-6)  # fmt: skip

        self.enc, channels, skips = encoder(levels, img_channels, model_channels, num_blocks, attn_resolutions, block)
        if encoder_type == "residual":
            aux = img_channels
            order = {}
            for name, module in self.enc.items():
                order[name] = module
                if name.endswith("_down"):
                    out = module.conv1.weight.shape[0]
                    name = name.replace("_down", "_aux_residual")
                    order[name] = Conv(aux, out, 3, "down", resample_filter, fused=True)
                    aux = out
            self.enc = nn.ModuleDict(order)
        self.dec, channels = decoder(levels, channels, skips, num_blocks, attn_resolutions, block, last_only=True)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(channels, 1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv(channels, img_channels, 3)

    def embed(self, noise, labels, augment):
        """Noise (B,), one-hot labels (B, L) and what says of augmentation, or None -> (B, E)."""
        cosines, sines = self.map_noise(noise).chunk(2, dim=1)
        embedding = torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            embedding = embedding + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def forward(self, x, noise, labels=None, augment=None):
        """(B, C, H, H), (B,), (B, L) or None -> (B, C, H, H)."""
        embedding = self.embed(noise, labels, augment)
        aux, skips = x, []
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + module(aux)) * SQRT_HALF
            else:
                x = module(x) if isinstance(module, Conv) else module(x, embedding)
                skips.append(x)
        for name, module in self.dec.items():
            if name.endswith("_aux_norm"):
                x = F.silu(module(x))
            elif name.endswith("_aux_conv"):
                x = module(x)
            else:
                x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, embedding)
        return x


class DhariwalUNet(nn.Module):
    """ADM (arXiv 2105.05233) as EDM trains it."""

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1,
                 label_dropout=0.0):  # fmt: skip
        """`label_dropout` matters in EDM's training alone."""
        super().__init__()
        width = model_channels * channel_mult_emb
        self.map_noise = PositionalFeatures(model_channels, False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, width), nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        levels = widths(model_channels, channel_mult, img_resolution)

        def block(channels_in, channels_out, attention=False, resample=None):
            heads = channels_out // 64 if attention else 0
            return Block(channels_in, channels_out, width, heads, resample, dropout=dropout, adaptive=True)

        self.enc, channels, skips = encoder(levels, img_channels, levels[0][1], num_blocks, attn_resolutions, block)
        self.dec, channels = decoder(levels, channels, skips, num_blocks, attn_resolutions, block, last_only=False)
        self.out_norm, self.out_conv = group_norm(channels, 1e-5), Conv(channels, img_channels, 3)

    def embed(self, noise, labels, augment):
        """As for `SongUNet`."""
        embedding = self.map_noise(noise).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        return F.silu(embedding if self.map_label is None else embedding + self.map_label(labels))

    def forward(self, x, noise, labels=None, augment=None):
        """(B, C, H, H), (B,), (B, L) or None -> (B, C, H, H)."""
        embedding = self.embed(noise, labels, augment)
        skips = []
        for module in self.enc.values():
            x = module(x) if isinstance(module, Conv) else module(x, embedding)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))


def encoder(levels, img_channels, first, num_blocks, attn_resolutions, block):
    """({name: module}, channels at its end, channels of its skips); `first`: channels of the first convolution."""
    parts, channels, skips = nn.ModuleDict(), first, []
    for number, (side, wanted) in enumerate(levels):
        if number == 0:
            parts[f"{side}x{side}_conv"] = Conv(img_channels, channels, 3)
        else:
            parts[f"{side}x{side}_down"] = block(channels, channels, resample="down")
        skips.append(channels)
        for index in range(num_blocks):
            parts[f"{side}x{side}_block{index}"] = block(channels, wanted, side in attn_resolutions)
            channels = wanted
            skips.append(channels)
    return parts, channels, skips


def decoder(levels, channels, skips, num_blocks, attn_resolutions, block, last_only):
    """({name: module}, channels at its end); `last_only`: of a level's blocks only the last has attention."""
    parts, skips = nn.ModuleDict(), list(skips)
    for number, (side, wanted) in reversed(list(enumerate(levels))):
        if number == len(levels) - 1:
            parts[f"{side}x{side}_in0"] = block(channels, channels, True)
            parts[f"{side}x{side}_in1"] = block(channels, channels)
        else:
            parts[f"{side}x{side}_up"] = block(channels, channels, resample="up")
        for index in range(num_blocks + 1):
            attention = side in attn_resolutions and (index == num_blocks or not last_only)
            parts[f"{side}x{side}_block{index}"] = block(channels + skips.pop(), wanted, attention)
            channels = wanted
    return parts, channels


class EDMPrecond(nn.Module):
    """A network under EDM's preconditioning: a denoiser of x = x0 + sigma * noise (arXiv 2206.00364, table 1)."""

    def __init__(self, model, img_resolution, img_channels, label_dim=0, sigma_data=0.5):
        super().__init__()
        self.model, self.img_resolution, self.img_channels = model, img_resolution, img_channels
        self.label_dim, self.sigma_data = label_dim, sigma_data

    def raw(self, x, sigma, labels=None):
        """(network output F, sigma as (B, 1, 1, 1)), in x's precision whatever the network's is. Args: as for `forward`."""
        dtype = self.model.map_layer0.weight.dtype
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x))
        if self.label_dim:
            labels = x.new_zeros(len(x), self.label_dim) if labels is None else labels
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        inputs = (scale[:, None, None, None] * x).to(dtype)
        output = self.model(inputs, sigma.log() / 4, labels.to(dtype) if self.label_dim else None)
        return output.to(x.dtype), sigma[:, None, None, None]

    def forward(self, x, sigma, labels=None):
        """D(x, sigma), the expected clean sample: (B, C, H, H), () or (B,), one-hot (B, L) or None -> (B, C, H, H)."""
        output, sigma = self.raw(x, sigma, labels)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total * x + sigma * self.sigma_data * total.rsqrt() * output

    def direction(self, x, sigma, labels=None):
        """(x - D) / sigma in closed form, which loses no digits where sigma is small. Shapes as for `forward`."""
        output, sigma = self.raw(x, sigma, labels)
        total = sigma**2 + self.sigma_data**2
        return sigma / total * x - self.sigma_data * total.rsqrt() * output


def make_network(config):
    """The network of an EDM config, untrained and in float32, evaluation mode.

    Args: `config`: the keyword arguments stored in the published pickles (img_resolution, img_channels, label_dim,
    model_type and those of the network); their sigma_min, sigma_max and use_fp16 change nothing here.
    Raises ValueError for a config of no such network.
    """
    kinds = {SONG: SongUNet, ADM: DhariwalUNet}
    kind = config.get("model_type", ADM)
    if kind not in kinds:
        raise ValueError(f"the EDM network's model_type is '{kind}', it must be one of {', '.join(kinds)}.")
    inner = {name: value for name, value in config.items() if name not in OUTER}
    defaults = {"img_resolution": None, "img_channels": 3, "label_dim": 0}
    outer = {name: config.get(name, default) for name, default in defaults.items()}
    try:
        model = kinds[kind](**outer, **inner)
    except (TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the EDM network cannot be built from its config: {reason}") from None
    return EDMPrecond(model, **outer, sigma_data=config.get("sigma_data", 0.5)).eval()
