"""The published reward models against plain forwards of their architectures, on tiny random weights; their preprocessing."""

import json
import math

import pytest
import torch
from tiny_rewards import (
    HEADS,
    LENGTH,
    PATCH,
    PROMPTS,
    SIDE,
    by_pillow,
    load,
    make_images,
    open_clip_shapes,
    random_state,
    scores,
    token_ids,
)
from torch.nn import functional
from transformers import CLIPModel

from brisk import reward_models, tiny

pytestmark = pytest.mark.quick


# HPS


def open_clip_cosine(state, pixels, tokens):
    """open_clip's CLIP with GELU, plain: pre-norm blocks, causal text, class token and end token through the projections."""

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def blocks(x, prefix, mask=None):
        for n in range(2):
            at = f"{prefix}transformer.resblocks.{n}"
            y = norm(x, f"{at}.ln_1").transpose(0, 1)
            y, _ = functional.multi_head_attention_forward(
                y, y, y, y.shape[-1], HEADS, state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"], None, None,
                False, 0.0, state[f"{at}.attn.out_proj.weight"], state[f"{at}.attn.out_proj.bias"], False, attn_mask=mask,
            )  # fmt: skip
            x = x + y.transpose(0, 1)
            y = functional.linear(norm(x, f"{at}.ln_2"), state[f"{at}.mlp.c_fc.weight"], state[f"{at}.mlp.c_fc.bias"])
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            x = x + functional.linear(y, state[f"{at}.mlp.c_proj.weight"], state[f"{at}.mlp.c_proj.bias"])
        return x

    x = functional.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.")
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = norm(blocks(x, "", torch.full((LENGTH, LENGTH), -torch.inf).triu(1)), "ln_final")
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"]
    return functional.cosine_similarity(image, text)


def test_hps_is_the_cosine_of_open_clips_network(clip_home, tmp_path):
    vocabulary = json.loads((clip_home / "tokenizer.json").read_text())["model"]["vocab"]
    state = random_state(open_clip_shapes(len(vocabulary)))
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "hps.pt")
    found = scores(load("hps", clip_home, weights_path=str(tmp_path / "hps.pt")))
    expected = open_clip_cosine(state, by_pillow(make_images()), token_ids(PROMPTS, vocabulary))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert expected.std() > 0.01  # the three differ by much more than the tolerance
    torch.save({"state_dict": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "hps.pt")
    half = scores(load("hps", clip_home, weights_path=str(tmp_path / "hps.pt")))
    torch.testing.assert_close(half, expected, rtol=0, atol=5e-3)
    assert half.dtype == torch.float32


# heads on a CLIPModel of transformers


def clip_outputs(clip_home, images, prompts):
    """Image and text features and the logits by CLIPModel's own forward."""
    network = CLIPModel.from_pretrained(clip_home).eval()
    given = tiny.make_tokenizer(LENGTH)(prompts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        return network, network(**given, pixel_values=by_pillow(images))


def test_pickscore_is_the_scaled_cosine_and_clip_the_cosine(clip_home):
    network, output = clip_outputs(clip_home, make_images(), PROMPTS)
    expected = output.logits_per_image.diagonal()
    torch.testing.assert_close(scores(load("pickscore", clip_home)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(load("clip", clip_home)), expected / network.logit_scale.exp(), rtol=1e-5, atol=2e-6)
    assert expected.std() > 0.1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (57, 40), (33, 100), (16, 24), (64, 64)])
def test_images_reach_the_network_as_pillow_makes_them(height, width):
    images = make_images(height, width)
    torch.testing.assert_close(reward_models.pixel_values(images, SIDE), by_pillow(images), rtol=0, atol=2e-6)


def test_images_are_rounded_to_8_bits():
    images = make_images(SIDE, SIDE)
    for nudge in (-0.4 / 255, 0.4 / 255):
        nudged = (images + nudge).clamp(0, 1)
        assert torch.equal(reward_models.pixel_values(nudged, SIDE), reward_models.pixel_values(images, SIDE))


def test_aesthetic_is_a_chain_of_linear_maps_of_unit_features(clip_home, tmp_path):
    widths = {0: (1024, 128), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = random_state({f"layers.{n}.{kind}": shape if kind == "weight" else shape[:1]
                          for n, shape in widths.items() for kind in ("weight", "bias")})  # fmt: skip
    torch.save(state, tmp_path / "linear.pth")
    own = {"predictor_path": str(tmp_path / "linear.pth"), "clip_path": str(clip_home)}
    found = scores(load("aesthetic", clip_home, aesthetic=own), prompts=None)
    x = clip_outputs(clip_home, make_images(), PROMPTS)[1].image_embeds
    assert torch.allclose(x.norm(dim=-1), torch.ones(3))
    for n in widths:
        x = x @ state[f"layers.{n}.weight"].T + state[f"layers.{n}.bias"]
    torch.testing.assert_close(found, x[:, 0], rtol=1e-5, atol=1e-5)
    assert found.std() > 1e-3


# ImageReward


def plain_image_reward(state, pixels, ids, mask):
    """BLIP's ViT (pre-norm, eps 1e-6) and BERT (post-norm, eps 1e-12) with cross attention, the linear MLP, and the statistics."""

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attention(q, k, v, heads, bias=0.0):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    at = "blip.visual_encoder"
    x = functional.conv2d(pixels, state[f"{at}.patch_embed.proj.weight"], state[f"{at}.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([state[f"{at}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + state[f"{at}.pos_embed"]
    for n in range(2):
        block = f"{at}.blocks.{n}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, 16), f"{block}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{at}.norm", 1e-6)

    at = "blip.text_encoder"
    y = state[f"{at}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{at}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, f"{at}.embeddings.LayerNorm", 1e-12)
    bias = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    for n in range(2):
        for part, source, hidden in (("attention", None, bias), ("crossattention", seen, 0.0)):
            block = f"{at}.encoder.layer.{n}.{part}"
            source = y if source is None else source
            z = attention(linear(y, f"{block}.self.query"), *(linear(source, f"{block}.self.{of}") for of in ("key", "value")),
                          HEADS, hidden)  # fmt: skip
            y = norm(linear(z, f"{block}.output.dense") + y, f"{block}.output.LayerNorm", 1e-12)
        block = f"{at}.encoder.layer.{n}"
        z = linear(functional.gelu(linear(y, f"{block}.intermediate.dense")), f"{block}.output.dense")
        y = norm(z + y, f"{block}.output.LayerNorm", 1e-12)
    y = y[:, 0]
    for n in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{n}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_network(clip_home, image_reward):
    own, state, vocabulary = image_reward
    prompts = ["a red fox", "two cats " * 10, "b"]
    rows = []
    for prompt in prompts:
        inner = [vocabulary[("##" if n else "") + letter] for word in prompt.split() for n, letter in enumerate(word)]
        rows.append([vocabulary["[CLS]"], *inner[:33], vocabulary["[SEP]"]])
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in rows])
    ids = torch.tensor([row + [vocabulary["[PAD]"]] * (35 - len(row)) for row in rows])
    expected = plain_image_reward(state, by_pillow(make_images()), ids, mask)
    found = scores(load("imagereward", clip_home, imagereward=own), prompts=prompts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert expected.std() > 0.05


# MPS


def plain_mps(state, network, pixels, tokens, condition):
    """The published score, head by head and position by position where that is plainer."""
    heads, width = 2, 64

    def words(ids):
        output = network.text_model(ids)
        return output.last_hidden_state @ network.text_projection.weight.T, output.pooler_output @ network.text_projection.weight.T

    def norm(x, at):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * state[f"{at}.norm.weight"]

    def gated(x):
        half = x.shape[-1] // 2
        return x[..., :half] * functional.silu(x[..., half:])

    def turned(x):  # pairs (j, j + 32) of position n turn by n 10000^(-j/32)
        pairs = torch.complex(x[..., :32], x[..., 32:])
        angles = torch.arange(x.shape[-2])[:, None] * 10000 ** (-torch.arange(32) / 32)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(queries, keys, values, allowed=None, turn=lambda x: x):
        found = []
        for head in range(heads):
            logits = turn(queries[..., head * width : (head + 1) * width]) @ turn(keys).transpose(-1, -2) / 8
            logits = logits if allowed is None else logits.masked_fill(~allowed[:, None], -torch.inf)
            found.append(logits.softmax(-1) @ values)
        return torch.cat(found, -1)

    text, whole = words(tokens)
    concept = words(condition)[0][0]
    near = torch.stack([(row @ concept.T).max(-1).values for row in text])
    allowed = torch.stack([row / row.max() > 0.3 for row in near])
    assert allowed.any(-1).all() and not allowed.all()
    x = network.vision_model(pixels).last_hidden_state @ network.visual_projection.weight.T
    for n in range(4):
        at = f"cross_model.layers.{n}.0.fn"
        y = norm(x, at)
        keys, values = (text @ state[f"{at}.to_kv.weight"].T).split(width, -1)
        seen = attention(y @ state[f"{at}.to_q.weight"].T, keys, values, allowed) @ state[f"{at}.to_out.weight"].T
        x = x + seen + gated(y @ state[f"{at}.ff.0.weight"].T) @ state[f"{at}.ff.2.weight"].T
        at = f"cross_model.layers.{n}.1.fn"
        queries, keys, values, hidden = (norm(x, at) @ state[f"{at}.fused_attn_ff_proj.weight"].T).split([128, 64, 64, 1024], -1)
        seen = attention(queries, keys, values, turn=turned) @ state[f"{at}.attn_out.weight"].T
        x = x + seen + gated(hidden) @ state[f"{at}.ff_out.1.weight"].T
    return network.logit_scale.exp() * functional.cosine_similarity(x[:, 0], whole)


def test_mps_reads_the_image_by_the_words_that_matter(clip_home, mps):
    own, state, network = mps
    vocabulary = json.loads((clip_home / "tokenizer.json").read_text())["model"]["vocab"]
    prompts = ["light, color", "a bus in rain", "b"]  # the mask of the second would be another by the nearest word of the batch
    ids = token_ids(prompts, vocabulary), token_ids(["light, color"], vocabulary)  # as far as the tiny network reads
    with torch.no_grad():
        expected = plain_mps(state, network, by_pillow(make_images()), *ids)
    reward = load("mps", clip_home, mps=own, batch_size=3)
    found = scores(reward, prompts=prompts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05
    one_by_one = torch.cat([scores(reward, make_images()[n : n + 1], prompts[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(one_by_one, found, rtol=1e-5, atol=1e-5)
    assert torch.equal(reward.mixed({"mps": found}), found)


@pytest.mark.parametrize("kind", ["pickscore", "clip", "imagereward", "mps"])
def test_scores_under_autocast_stay_close(clip_home, image_reward, mps, kind):
    """What --enable_amp does on CUDA, in bfloat16 on the CPU."""
    reward = load(kind, clip_home, imagereward=image_reward[0], mps=mps[0])
    exact = scores(reward)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = reward.functions[kind](make_images(), PROMPTS, None)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max() and not torch.equal(rough, exact)
