"""Tiny random reward models as their authors publish them: folders, state dicts, images, and how to load them."""

import json
import math

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from brisk import rewards, tiny

PROMPTS = ["A red fox", "two  cats on a mat, at night", "b"]
LENGTH = 12  # tokens of a prompt; the second one is longer
WIDTH, HEADS, VISION_WIDTH, SIDE, PATCH = 32, 4, 48, 32, 8
TOKENS = (SIDE // PATCH) ** 2 + 1


def make_images(height=40, width=56, count=3):
    """8-bit images in [0, 1] with edges and gradients."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 7, 9, generator=generator)
    large = functional.interpolate(small, size=(height, width), mode="nearest")
    return ((large + torch.linspace(0, 0.5, width)) / 1.5 * 255).round() / 255


def by_pillow(images, side=SIDE):
    """What the published preprocessing does, written out: Pillow's bicubic resize, centre crop, CLIP's statistics."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    rows = []
    for image in images:
        picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        scale = side / min(picture.size)
        picture = picture.resize([int(length * scale) for length in picture.size], Image.Resampling.BICUBIC)
        left, top = ((length - side) // 2 for length in picture.size)
        values = torch.tensor(list(picture.crop((left, top, left + side, top + side)).tobytes())).view(side, side, 3) / 255
        rows.append((values - torch.tensor(mean)) / torch.tensor(deviation))
    return torch.stack(rows).permute(0, 3, 1, 2)


def token_ids(prompts, vocabulary, length=LENGTH):
    """The tiny tokenizer by hand: start, characters of lower-case words (the last one of each marked), end; cut, padded."""
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    rows = []
    for prompt in prompts:
        words = prompt.lower().replace(",", " ,").split()
        inner = [vocabulary[letter + ("</w>" if n == len(word) - 1 else "")] for word in words for n, letter in enumerate(word)]
        inner = [start, *inner[: length - 2], end]
        rows.append(inner + [end] * (length - len(inner)))
    return torch.tensor(rows)


def random_state(shapes, seed=0):
    """{name: tensor} of {name: shape}; weights of norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.2 if len(shape) < 2 else 1.5 / math.sqrt(shape[-1])
        state[name] = torch.randn(shape, generator=generator) * scale + ("norm" in name.lower() or "ln_" in name)
    return state


def write_clip(folder):
    """Fill `folder` like the one of a CLIP repository, with tiny random weights; projections of 128 as MPS's blocks need."""
    tokenizer = tiny.make_tokenizer(LENGTH)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    layers = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={"hidden_size": WIDTH, "intermediate_size": 37, "vocab_size": len(tokenizer),
                     "max_position_embeddings": LENGTH, **ends, **layers},
        vision_config={"hidden_size": VISION_WIDTH, "intermediate_size": 41, "image_size": SIDE, "patch_size": PATCH, **layers},
        projection_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    network = CLIPModel(config).eval()
    for parameter in network.parameters():  # biases too, and features that differ
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    network.save_pretrained(folder)


def load(kind, folder, **changes):
    """The `Reward` of a type with the CLIP folder `folder`."""
    sections = {"pickscore": {"model": str(folder), "processor": str(folder)}, "clip": {"model": str(folder)}}
    return rewards.load(rewards.RewardSettings(type=kind, **{**sections, **changes}))


def scores(reward, images=None, prompts=PROMPTS):
    """Raw scores of the reward's first head."""
    return reward.score(make_images() if images is None else images, prompts)[reward.heads[0]]


def open_clip_shapes(vocabulary):
    """{name: shape} of an open_clip state dict."""
    def tower(prefix, width, hidden):
        layer = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
                 "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                 "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,), "mlp.c_fc.weight": (hidden, width),
                 "mlp.c_fc.bias": (hidden,), "mlp.c_proj.weight": (width, hidden), "mlp.c_proj.bias": (width,)}  # fmt: skip
        return {f"{prefix}transformer.resblocks.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}

    width = VISION_WIDTH
    return {
        "positional_embedding": (LENGTH, WIDTH), "text_projection": (WIDTH, 128), "logit_scale": (),
        "visual.class_embedding": (width,), "visual.positional_embedding": (TOKENS, width), "visual.proj": (width, 128),
        "visual.conv1.weight": (width, 3, PATCH, PATCH), "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,), "visual.ln_post.bias": (width,), "token_embedding.weight": (vocabulary, WIDTH),
        "ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,), **tower("visual.", width, 41), **tower("", WIDTH, 37),
    }  # fmt: skip


def image_reward_shapes(vocabulary):
    """{name: shape} of a file like ImageReward.pt."""
    width, hidden, wide, text_hidden = 32, 40, WIDTH, 44
    vit = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
           "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}  # fmt: skip
    bert = {"intermediate.dense": (text_hidden, wide), "output.dense": (wide, text_hidden), "output.LayerNorm": (wide,)}
    for part, source in (("attention", wide), ("crossattention", width)):
        bert |= {f"{part}.self.query": (wide, wide), f"{part}.self.key": (wide, source), f"{part}.self.value": (wide, source),
                 f"{part}.output.dense": (wide, wide), f"{part}.output.LayerNorm": (wide,)}  # fmt: skip
    layers = {f"blip.visual_encoder.blocks.{n}.{name}": shape for n in range(2) for name, shape in vit.items()}
    layers |= {f"blip.text_encoder.encoder.layer.{n}.{name}": shape for n in range(2) for name, shape in bert.items()}
    layers |= {"blip.visual_encoder.patch_embed.proj": (width, 3, PATCH, PATCH), "blip.visual_encoder.norm": (width,),
               "blip.text_encoder.embeddings.LayerNorm": (wide,), "mlp.layers.0": (1024, wide), "mlp.layers.2": (128, 1024),
               "mlp.layers.4": (64, 128), "mlp.layers.6": (16, 64), "mlp.layers.7": (1, 16),
               "blip.vision_proj": (24, width), "blip.text_proj": (24, wide)}  # fmt: skip
    shapes = {f"{name}.{kind}": shape if kind == "weight" else shape[:1] for name, shape in layers.items()
              for kind in ("weight", "bias")}  # fmt: skip
    return shapes | {
        "blip.visual_encoder.cls_token": (1, 1, width), "blip.visual_encoder.pos_embed": (1, TOKENS, width),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, wide),
        "blip.text_encoder.embeddings.position_embeddings.weight": (50, wide),
    }  # fmt: skip


def write_image_reward(folder):
    """Fill `folder` with a tiny ImageReward; (settings, state dict, {token: id}) of it."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    state = random_state(image_reward_shapes(len(words)))
    (folder / "med.json").write_text(json.dumps({"num_attention_heads": HEADS, "encoder_width": 768, "hidden_dropout_prob": 0.1}))
    torch.save({**state, "blip.text_encoder.embeddings.position_ids": torch.arange(50)[None]}, folder / "reward.pt")
    own = {"checkpoint": str(folder / "reward.pt"), "med_config": str(folder / "med.json"), "tokenizer": str(folder)}
    return own, state, vocabulary


def mps_shapes():
    """{name: shape} of the blocks of MPS."""
    shapes, width, inner = {}, 128, 128
    for n in range(4):
        cross, own = f"cross_model.layers.{n}.0.fn", f"cross_model.layers.{n}.1.fn"
        shapes |= {
            f"{cross}.norm.weight": (width,), f"{cross}.to_q.weight": (inner, width), f"{cross}.to_kv.weight": (128, width),
            f"{cross}.to_out.weight": (width, inner), f"{cross}.ff.0.weight": (8 * width, width),
            f"{cross}.ff.2.weight": (width, 4 * width), f"{own}.norm.weight": (width,),
            f"{own}.fused_attn_ff_proj.weight": (inner + 128 + 8 * width, width), f"{own}.attn_out.weight": (width, inner),
            f"{own}.ff_out.1.weight": (width, 4 * width),
        }  # fmt: skip
    return shapes


def write_mps(folder, home):
    """Fill `folder` with a tiny MPS on the CLIP network at `home`; (settings, weights of its blocks, its CLIP network)."""
    network = CLIPModel.from_pretrained(home).eval()
    network.text_model.embeddings.token_embedding.weight.data *= 10  # words that differ, so that some are masked
    network.text_model.final_layer_norm.bias.data.zero_()
    state = random_state(mps_shapes(), seed=1)
    buffers = {f"cross_model.layers.{n}.{m}.fn.norm.bias": torch.zeros(128) for n in range(4) for m in range(2)}
    buffers |= {f"cross_model.layers.{n}.1.fn.rotary_emb.inv_freq": torch.ones(32) for n in range(4)}
    path = folder / "mps.safetensors"
    towers = {f"model.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file({**state, **buffers, **towers, "model.text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}, path)
    return {"checkpoint": str(path), "processor": str(home)}, state, network
