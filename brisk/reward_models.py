"""Networks that score images against prompts, on transformers: CLIP, what was tuned from it, and ImageReward.

Images (B, 3, H, W) in [0, 1] go to a network as its authors send them: quantised to 8 bits, the shorter side resized by Pillow's
bicubic filter, the centre cropped, normalised with CLIP's mean and deviation. Scores are (B,) float32. Weights are read without
running anything; the YAML key that names a source stands in the messages.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from brisk import hub
from brisk.options import UserError

# ImageReward (arXiv 2304.05977): statistics of its training set; tokens of a prompt; heads of ViT-L/16; of BERT base unless told
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
PROMPT_TOKENS = 35
VISION_HEADS = 16
TEXT_SETTINGS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}

# names in open_clip's state dicts -> names in CLIPModel's
CLIP_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# names in ImageReward.pt -> names in `ImageReward`
IMAGE_REWARD_NAMES = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv", r"vision.encoder.layers.\1.self_attn.qkv"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj", r"vision.encoder.layers.\1.self_attn.projection"),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
)


def _short(error):
    return hub.why(error, limit=160)


class WeightsFile(NamedTuple):
    """A file of weights: the YAML key that gave it, and how to get it, for the messages."""

    path: str | Path
    key: str
    where: str

    def refusal(self, reason):
        """The UserError that says why the file cannot be used."""
        return UserError(f"{self.key} {self.path} cannot be used: {reason}; {self.where}.")

    def checked(self):
        """Itself, where there is such a file. UserError."""
        if not Path(self.path).is_file():
            raise self.refusal("there is no such file")
        return self

    def read(self):
        """{name: tensor} of a .safetensors file, or of a .pt or .pth file, in which nothing but tensors is read. UserError."""
        self.checked()
        try:
            if Path(self.path).suffix == ".safetensors":
                return load_file(self.path)
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            return dict(found.get("state_dict", found))
        except Exception:  # pickle, zipfile and safetensors raise their own
            raise self.refusal("it is damaged, or a program and no file of weights alone") from None

    def check(self, expected, state):
        """UserError where the weights `state` have other names or shapes than `expected`."""
        wrong = sorted(name for name in expected.keys() | state.keys()
                       if getattr(expected.get(name), "shape", None) != getattr(state.get(name), "shape", None))  # fmt: skip
        if wrong:
            raise self.refusal(f"it lacks weights, or has others than it must ({len(wrong)}, {wrong[0]} among them)")


def build(cls, config, state, file, **arguments):
    """The frozen network `cls` of transformers with exactly the weights `state` of a `WeightsFile`, float32. UserError."""
    with torch.device("meta"):
        file.check(cls(config, **arguments).state_dict(), state)
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, **arguments).requires_grad_(False)


def fill(network, state, file):
    """`network`, frozen, with exactly the weights `state` of a `WeightsFile`. UserError."""
    file.check(network.state_dict(), state)
    network.load_state_dict(state)
    return network.float().eval().requires_grad_(False)


def download(repository, name, cache_dir, key):
    """Path of a file of a hub repository, from the cache where it is there. UserError."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, name, cache_dir=cache_dir)
    except Exception as error:  # the client raises its own, httpx's and OSError
        raise UserError(f"{key} is not given, and {name} of huggingface.co/{repository} cannot be had ({_short(error)}); "
                        f"download it and give its place as {key}.") from None  # fmt: skip


def from_hub(cls, source, key, cache_dir):
    """The `cls` of a folder or hub repository. UserError."""
    try:
        return cls.from_pretrained(source, cache_dir=cache_dir)
    except Exception as error:
        raise UserError(f"{key}: no {cls.__name__} can be loaded from {source} ({_short(error)}); give a folder or a repository "
                        "of the hub that holds one.") from None  # fmt: skip


def load_tokenizer(cls, source, rows, key, cache_dir):
    """The tokenizer `cls` of a folder or hub repository, for a network with `rows` embeddings. UserError.

    Without its files transformers makes an empty one, so it is counted; BLIP's networks have two tokens more than BERT's.
    """
    tokenizer = from_hub(cls, source, key, cache_dir)
    if not rows - 2 <= len(tokenizer) <= rows:
        raise UserError(f"{key}: the tokenizer at {source} has {len(tokenizer)} tokens, the network reads {rows}; give the "
                        "folder or repository that holds its files.")  # fmt: skip
    return tokenizer


def pixel_values(images, side):
    """Images (B, 3, H, W) in [0, 1] as CLIP's networks take them: (B, 3, side, side), normalised, on the device of `images`."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    quantised = (images.float() * 255).round().to(torch.uint8).cpu()
    given = processor(list(quantised), return_tensors="pt", input_data_format="channels_first")
    return given["pixel_values"].to(images.device)


class Clip:
    """A frozen CLIP network with its tokenizer: features (B, D) of unit length, float32."""

    def __init__(self, network, source, key, cache_dir, device):
        """Args: `source`: folder or hub repository of the tokenizer, given by the YAML `key`. Raises UserError."""
        text = network.config.text_config
        self.tokenizer = load_tokenizer(CLIPTokenizer, source, text.vocab_size, key, cache_dir)
        self.network, self.length = network.requires_grad_(False).to(device), text.max_position_embeddings
        self.side = network.config.vision_config.image_size

    def pixels(self, images):
        """The network's input of images in [0, 1]."""
        return pixel_values(images, self.side)

    def tokens(self, prompts):
        """Token ids (B, 77) of B prompts, cut and padded with the end token."""
        given = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return given.input_ids.to(self.network.device)

    def image_features(self, images):
        """Of images (B, 3, H, W) in [0, 1]."""
        return normalize(self.network.get_image_features(self.pixels(images)).pooler_output.float(), dim=-1)

    def text_features(self, prompts):
        """Of B prompts."""
        return normalize(self.network.get_text_features(self.tokens(prompts)).pooler_output.float(), dim=-1)

    def cosine(self, images, prompts):
        """Cosine of the features of image i and prompt i, (B,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def logits(self, images, prompts):
        """`cosine` times the learned scale: PickScore (arXiv 2305.01569, equation 2) where the network is its."""
        return self.network.logit_scale.exp().float() * self.cosine(images, prompts)


def load_clip(source, key, tokenizer, tokenizer_key, cache_dir, device):
    """The `Clip` of a folder or hub repository with every weight present; `tokenizer`: where that is. UserError."""
    try:
        network, found = CLIPModel.from_pretrained(source, cache_dir=cache_dir, dtype=torch.float32, output_loading_info=True)
        missing = sorted(found["missing_keys"])
    except Exception as error:
        raise UserError(f"{key}: no CLIPModel can be loaded from {source} ({_short(error)}); give a folder or a repository of "
                        "the hub that holds one.") from None  # fmt: skip
    if missing:
        raise UserError(f"{key}: {source} is no whole CLIPModel, it lacks {len(missing)} weights, {missing[0]} among them.")
    return Clip(network, tokenizer, tokenizer_key, cache_dir, device)


def renamed(state, names):
    """`state` with its keys changed by (pattern, replacement) of `names`, one after the other."""

    def rename(name):
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def from_open_clip(state):
    """Weights of CLIPModel that compute what open_clip's CLIP with the weights `state` does."""
    found = {}
    for name, tensor in renamed(state, CLIP_NAMES).items():
        if ".in_proj_" in name:  # queries, keys and values in one
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:  # open_clip multiplies by its projections from the right
            found[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return found


def load_hps(file, source, source_key, cache_dir, device):
    """HPSv2 (arXiv 2306.09341), the `Clip` of a `WeightsFile` of open_clip's ViT-H-14; its config and tokenizer are at `source`."""
    config = from_hub(CLIPConfig, source, source_key, cache_dir)
    network = build(CLIPModel, config, from_open_clip(file.read()), file)
    return Clip(network, source, source_key, cache_dir, device)


def score_mlp(width):
    """Features (B, width) -> (B, 1), all linear; the identities stand where the published files count a dropout."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64), nn.Identity(),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


def load_aesthetic(file, clip):
    """Function of images -> score (about 1 to 10) by the linear predictor of a `WeightsFile` on features of a `Clip`."""
    state = {name.removeprefix("layers."): tensor for name, tensor in file.read().items()}
    mlp = fill(score_mlp(clip.network.config.projection_dim), state, file).to(clip.network.device)

    def score(images):
        features = clip.image_features(images)
        with torch.autocast(images.device.type, enabled=False):
            return mlp(features)[:, 0]

    return score


def _count(state, prefix):
    """Layers whose weights are called `prefix`0., `prefix`1., ..."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _blip(state, file, text_settings):
    """(vision network, text network, MLP) of ImageReward from the weights by our names, which tell all sizes. UserError."""
    vision, text, mlp = ({name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
                         for part in ("vision.", "text.", "mlp."))  # fmt: skip
    text.pop("embeddings.position_ids", None)  # a buffer of counted numbers
    try:
        patches, words = vision["embeddings.patch_embedding.weight"], text["embeddings.word_embeddings.weight"]
        side = patches.shape[-1] * math.isqrt(vision["embeddings.position_embedding"].shape[1])
        vision_config = BlipVisionConfig(
            hidden_size=len(patches), patch_size=patches.shape[-1], image_size=side, num_attention_heads=VISION_HEADS,
            num_hidden_layers=_count(vision, "encoder.layers."), layer_norm_eps=1e-6,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
        )  # fmt: skip
        text_config = BlipTextConfig(
            vocab_size=len(words), hidden_size=words.shape[1], encoder_hidden_size=len(patches), is_decoder=True,
            num_hidden_layers=_count(text, "encoder.layer."),
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]), **text_settings,
        )  # fmt: skip
    except KeyError as error:
        raise file.refusal(f"it lacks {error}") from None
    return (
        build(BlipVisionModel, vision_config, vision, file),
        build(BlipTextModel, text_config, text, file, add_pooling_layer=False),
        fill(score_mlp(words.shape[1]), mlp, file),
    )


def load_image_reward(file, text_settings, tokenizer, key, cache_dir, device):
    """Function of (images, prompts) -> rewards (arXiv 2304.05977), mean 0 and deviation 1 over its training set.

    A text network looks at the tokens of the image; a linear MLP reads its first token. Args: `file`: a `WeightsFile` like
    ImageReward.pt; `text_settings`: like `TEXT_SETTINGS`; `tokenizer`: where BERT's is, given by the YAML `key`. Raises UserError.
    """
    networks = _blip(renamed(file.read(), IMAGE_REWARD_NAMES), file, text_settings)
    vision, text, mlp = (network.to(device) for network in networks)
    tokenizer = load_tokenizer(BertTokenizer, tokenizer, text.config.vocab_size, key, cache_dir)

    def score(images, prompts):
        given = tokenizer(prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt")
        given = given.to(images.device)
        seen = vision(pixel_values(images, vision.config.image_size)).last_hidden_state
        read = text(given.input_ids, attention_mask=given.attention_mask, encoder_hidden_states=seen).last_hidden_state
        with torch.autocast(images.device.type, enabled=False):
            return (mlp(read[:, 0].float())[:, 0] - REWARD_MEAN) / REWARD_STD

    return score
