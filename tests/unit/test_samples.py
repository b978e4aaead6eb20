"""Raw samples to tensors: captions, metadata, decoding, cropping, filters, cached latents."""

import io
import json
import math
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from brisk import samples
from brisk.options import UserError
from brisk.samples import Skip

pytestmark = pytest.mark.quick


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(width=40, height=30, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **save):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **save)
    return buffer.getvalue()


def tokenize(text):
    return {"input_ids_0": torch.tensor([len(text), 7])}


def decoder(**settings):
    return samples.ImageCaptions(tokenize, **{"resolution": 16, **settings})


def raw(image=None, **fields):
    return {"png": encoded(image or picture()), "txt": b"a caption", **fields}


def facts(**values):
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"txt": b" a cat \n"}, "a cat"), ({"text": b"x", "txt": b"y", "caption": b"z"}, "x"),
        ({"txt": b"y", "caption": b"z"}, "y"), ({"caption": b"z", "json": b'{"caption": "j"}'}, "z"),
        ({"json": b'{"caption": "j"}'}, "j"), ({"json": b'{"caption": ["only"]}'}, "only"), ({"txt": b""}, ""),
        ({"txt": b"caf\xe9"}, "caf\ufffd"), ({"txt": "Größe".encode()}, "Größe"),
    ],
)  # fmt: skip
def test_caption_comes_from_the_first_source(fields, expected):
    assert samples.caption_of(fields, samples.metadata_of(fields), rng()) == expected


@pytest.mark.parametrize(
    "json_bytes", [None, b"{}", b"not json", b"[1]", b'{"caption": []}', b'{"caption": 3}', b"\xff"]
)
def test_samples_without_a_caption_are_skipped(json_bytes):
    fields = {} if json_bytes is None else {"json": json_bytes}
    with pytest.raises(Skip, match="no caption"):
        samples.caption_of(fields, samples.metadata_of(fields), rng())


def test_a_caption_list_is_drawn_from_at_random():
    fields = {"json": facts(caption=["a", "b", "c"])}
    drawn = [samples.caption_of(fields, samples.metadata_of(fields), rng(seed)) for seed in range(60)]
    assert set(drawn) == {"a", "b", "c"}
    assert samples.caption_of(fields, samples.metadata_of(fields), rng(3)) == drawn[3]


@pytest.mark.parametrize(
    "size, expected",
    [
        ((60, 40), (24, 16)), ((40, 60), (16, 24)), ((33, 33), (16, 16)), ((10, 25), (16, 40)),
        ((48, 40), (19, 16)), ((40, 47), (16, 18)),  # 19.2 and 18.8: down, not to the nearest
        ((5, 1), (80, 16)), ((31, 16), (31, 16)), ((3000, 2001), (23, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_the_longer_side_is_cut_to_whole_pixels_and_the_shorter_one_is_the_resolution(size, expected):
    assert samples.scaled_size(*size, 16) == expected


def test_scaled_sizes_are_those_of_exact_division():
    for width, height in np.random.default_rng(0).integers(1, 3000, (500, 2)).tolist():
        found = samples.scaled_size(width, height, 512)
        exact = [Fraction(side * 512, min(width, height)) for side in (width, height)]
        assert found == tuple(math.floor(side) for side in exact) and min(found) == 512


@pytest.mark.parametrize("interpolation", samples.INTERPOLATIONS)
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 33), (16, 16), (10, 25)], ids=str)
def test_resize_and_crop_equals_resize_then_crop(interpolation, size):
    image, resolution = picture(*size), 16
    scaled = samples.scaled_size(*size, resolution)
    for seed in range(3):
        found, (top, left) = samples.resize_and_crop(image, resolution, interpolation, False, rng(seed))
        whole = image.resize(scaled, getattr(Image.Resampling, interpolation.upper()))
        expected = np.asarray(whole.crop((left, top, left + resolution, top + resolution)))
        assert found.mode == "RGB" and found.size == (resolution, resolution)
        assert 0 <= top <= scaled[1] - resolution and 0 <= left <= scaled[0] - resolution
        difference = abs(np.asarray(found).astype(int) - expected.astype(int))
        # Pillow rounds and clips between its two passes, and at other places when it cuts first
        assert difference.max() <= 8 and difference.mean() < 0.5


def test_random_crops_reach_both_edges_and_the_centre_crop_is_central():
    image = picture(32, 16)
    lefts = {samples.resize_and_crop(image, 16, "bilinear", False, rng(seed))[1][1] for seed in range(200)}
    assert lefts == set(range(17))
    assert samples.resize_and_crop(image, 16, "bilinear", True, rng())[1] == (0, 8)
    assert samples.resize_and_crop(picture(16, 48), 16, "bilinear", True, rng())[1] == (16, 0)
    assert samples.resize_and_crop(picture(40, 47), 16, "bilinear", True, rng())[1] == (1, 0), "of 16 x 18, not 16 x 19"


def test_flip_mirrors_about_half_of_the_samples():
    image = picture(48, 32)
    plain = decoder(center_crop=True)(raw(image), rng())["pixels"]
    outcomes = [decoder(center_crop=True, random_flip=True)(raw(image), rng(n)) for n in range(40)]
    flips = [bool(sample["flipped"]) for sample in outcomes]
    for sample, flipped in zip(outcomes, flips, strict=True):
        assert torch.equal(sample["pixels"], plain.flip(2) if flipped else plain)
        assert sample["flipped"].dtype == torch.bool
    assert not torch.equal(plain, plain.flip(2)) and 8 < sum(flips) < 32
    assert not any(decoder()(raw(image), rng(n))["flipped"] for n in range(10)), "not without the flag"


def test_the_flip_is_drawn_after_the_crop():
    """The same seed cuts the same square with and without it."""
    image = picture(64, 16)
    for seed in range(12):
        plain, other = (decoder(random_flip=flip)(raw(image), rng(seed)) for flip in (False, True))
        left, mirrored = plain["crop_top_left"][1].item(), other["flipped"]
        assert torch.equal(other["pixels"], plain["pixels"].flip(2) if mirrored else plain["pixels"])
        assert other["crop_top_left"].tolist() == [0, 64 - 16 - left if mirrored else left]


def test_crop_offset_of_a_flipped_image_is_counted_in_the_flipped_image():
    image = picture(64, 16)
    whole = np.asarray(image)
    flips = 0
    for seed in range(12):
        sample = decoder(random_flip=True)(raw(image), rng(seed))
        left, found = sample["crop_top_left"][1].item(), sample["pixels"].permute(1, 2, 0).numpy()
        matches = [np.array_equal(found, side[:, left : left + 16]) for side in (whole, whole[:, ::-1])]
        assert matches == [not sample["flipped"], sample["flipped"]]
        flips += matches[1]
    assert 0 < flips < 12


def test_crop_offset_of_a_flipped_image_is_in_pixels_of_the_scaled_image():
    flipped = [s for s in (decoder(random_flip=True, center_crop=True)(raw(picture(40, 33)), rng(n)) for n in range(9))
               if s["flipped"]]  # fmt: skip
    assert flipped, "scaled to 19 x 16, the square starts at round(1.5) = 2, one pixel is left on the other side"
    assert all(sample["crop_top_left"].tolist() == [0, 1] for sample in flipped)


def test_decoded_sample_holds_pixels_tokens_and_sizes():
    sample = decoder(center_crop=True)(raw(picture(64, 32)), rng())
    assert sample["pixels"].shape == (3, 16, 16) and sample["pixels"].dtype == torch.uint8
    assert sample["input_ids_0"].tolist() == [len("a caption"), 7]
    assert sample["original_size"].tolist() == [32, 64], "height before width"
    assert sample["crop_top_left"].tolist() == [0, 8], "in pixels of the resized image"
    assert set(sample) == {"pixels", "input_ids_0", "original_size", "crop_top_left", "flipped", "empty"}
    assert not sample["empty"] and sample["empty"].dtype == torch.bool


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"width": 640, "height": 480}, [480, 640]),
        ({"original_width": 1000, "original_height": 500, "width": 4, "height": 2}, [500, 1000]),
        ({"width": None, "height": None}, [30, 40]), ({}, [30, 40]), ({"width": "640", "height": "480"}, [480, 640]),
    ],
)  # fmt: skip
def test_original_size_comes_from_the_json(values, expected):
    assert decoder()(raw(json=facts(**values)), rng())["original_size"].tolist() == expected


@pytest.mark.parametrize(
    "values",
    [
        {"width": "wide", "height": 4},
        {"width": [1], "height": 4},
        {"pwatermark": "unknown"},
        {"pwatermark": [1]},
        {"width": float("inf"), "height": 4},
    ],
)
def test_unusable_metadata_skips_the_sample(values):
    with pytest.raises(Skip):
        decoder(max_pwatermark=0.5, min_size=1)(raw(json=facts(**values)), rng())


@pytest.mark.parametrize(
    "values, kept",
    [
        ({"pwatermark": 0.0}, True),
        ({"pwatermark": 0.5}, True),
        ({"pwatermark": 0.51}, False),
        ({}, True),
        ({"pwatermark": None}, True),
    ],
)
def test_pwatermark_filter_keeps_zero_and_missing(values, kept):
    decode = decoder(max_pwatermark=0.5)
    if kept:
        assert decode(raw(json=facts(**values)), rng())
        return
    with pytest.raises(Skip, match="pwatermark"):
        decode(raw(json=facts(**values)), rng())
    assert decoder()(raw(json=facts(**values)), rng()), "no filter without the flag"


def test_minimum_size_looks_at_the_original_size():
    assert decoder(min_size=30)(raw(picture(40, 30)), rng())
    with pytest.raises(Skip, match="minimum size"):
        decoder(min_size=31)(raw(picture(40, 30)), rng())
    assert decoder(min_size=31)(raw(picture(40, 30), json=facts(width=400, height=300)), rng())
    with pytest.raises(Skip, match="minimum size"):
        decoder(min_size=31)(raw(picture(64, 64), json=facts(original_width=400, original_height=30)), rng())


def test_empty_prompt_share():
    dropped = [decoder(proportion_empty_prompts=0.25)(raw(), rng(seed)) for seed in range(200)]
    assert 25 < sum(bool(sample["empty"]) for sample in dropped) < 75
    assert all(sample["input_ids_0"][0] == len("a caption") for sample in dropped), "the flag alone says so"
    assert all(decoder(proportion_empty_prompts=1.0)(raw(), rng(s))["empty"] for s in range(5))
    assert not any(decoder()(raw(), rng(seed))["empty"] for seed in range(50))


def both_decoders(**settings):
    return [(decoder(**settings), raw()), (samples.CachedLatents(tokenize, **settings), cached())]


def test_an_extra_prompt_is_drawn_for_each_sample_beside_its_own():
    prompts = ["a", "bb", "ccc"]
    for decode, sample in both_decoders(extra_prompts=prompts):
        found = [decode(sample, rng(seed)) for seed in range(60)]
        assert {one["extra_input_ids_0"][0].item() for one in found} == {1, 2, 3}
        assert all(one["input_ids_0"][0] == len("a caption") for one in found if "input_ids_0" in one)
        assert torch.equal(decode(sample, rng(3))["extra_input_ids_0"], found[3]["extra_input_ids_0"])


def test_without_extra_prompts_a_sample_has_none_and_its_draws_are_the_same():
    for nothing in (None, []):
        for (decode, sample), (more, _) in zip(
            both_decoders(extra_prompts=nothing, proportion_empty_prompts=0.5),
            both_decoders(extra_prompts=["a", "b"], proportion_empty_prompts=0.5), strict=True,
        ):  # fmt: skip
            for seed in range(10):
                plain, other = decode(sample, rng(seed)), more(sample, rng(seed))
                assert set(other) - set(plain) == {"extra_input_ids_0"} and not set(plain) - set(other)
                assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"nonsense", encoded(picture())[:-40], encoded(picture(), "JPEG")[:90]]
)
def test_broken_images_are_skipped(content):
    with pytest.raises(Skip, match="unreadable image"):
        samples.decode_image({"png": content})


def test_a_sample_without_an_image_is_skipped():
    with pytest.raises(Skip, match="no image"):
        decoder()({"txt": b"x", "gif": b"y"}, rng())


@pytest.mark.parametrize(
    "mode, kind",
    [("P", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")],
)
def test_every_colour_mode_becomes_rgb(mode, kind):
    image = samples.decode_image({{"WEBP": "webp", "JPEG": "jpg"}.get(kind, "png"): encoded(picture(mode=mode), kind)})
    assert image.mode == "RGB" and image.size == (40, 30)
    expected = picture(mode=mode).convert("RGB")
    if kind == "PNG":
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    else:  # lossy, but not inverted or shifted
        assert abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 12


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image = samples.decode_image({"jpg": encoded(picture(40, 30), "JPEG", exif=exif, quality=95)})
    assert image.size == (30, 40)
    expected = np.asarray(picture(40, 30).rotate(-90, expand=True)).astype(int)
    assert abs(np.asarray(image).astype(int) - expected).mean() < 8


def one_bit_png(width, height):
    """A valid PNG of black pixels, one bit each, that takes a few kilobytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row, packer = b"\0" * (1 + width // 8), zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_skipped_as_too_large():
    bomb = one_bit_png(20_000, 20_000)
    assert len(bomb) < 200_000
    with pytest.raises(Skip, match="image too large"):
        samples.decode_image({"png": bomb})


def test_a_very_long_image_is_cropped():
    for size in ((20_000, 20), (20, 20_000)):
        sample = decoder()({"png": encoded(picture(*size)), "txt": b"x"}, rng())
        assert sample["pixels"].shape == (3, 16, 16) and sample["original_size"].tolist() == [size[1], size[0]]


def test_an_image_one_pixel_high_is_handled():
    assert decoder()({"png": encoded(picture(5, 1)), "txt": b"x"}, rng())["pixels"].shape == (3, 16, 16)


MANIFEST = {"resolution": 16, "vae": "v", "text_encoders": ["t"], "tokens": [4]}


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def cached(**changes):
    latent, prompt = np.ones((2, 4, 2, 2), np.float16), np.ones((4, 8), np.float16)
    return {"latent.npy": array(latent), "prompt.npy": array(prompt), **changes}


def test_cached_latents_are_read_back():
    decode = samples.CachedLatents(tokenize, 0.0)
    sample = decode(cached(), rng())
    assert set(sample) == {"moments", "prompt_embeds", "empty"} and not sample["empty"]
    assert sample["moments"].shape == (2, 4, 2, 2) and sample["moments"].dtype == torch.float16
    xl = {"pooled.npy": array(np.ones(3, np.float16)), "time_ids.npy": array(np.arange(6))}
    assert decode(cached(**xl), rng())["time_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    hidden = [samples.CachedLatents(tokenize, 0.5)(cached(), rng(seed))["empty"].item() for seed in range(60)]
    assert 15 < sum(hidden) < 45


@pytest.mark.parametrize(
    "changes",
    [
        {"latent.npy": b""}, {"latent.npy": b"garbage"}, {"latent.npy": array(np.ones(8))[:-10]},
        {"prompt.npy": b"PK\x03\x04"}, {"latent.npy": array(np.array(["text"]))},
    ],
)  # fmt: skip
def test_broken_arrays_are_skipped(changes):
    with pytest.raises(Skip, match="unreadable array"):
        samples.CachedLatents(tokenize)(cached(**changes), rng())


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_in_an_array_is_run(tmp_path):
    trap = array(np.array([Trap(str(tmp_path / "sprung"))], dtype=object))
    with pytest.raises(Skip, match="unreadable array"):
        samples.CachedLatents(tokenize)(cached(**{"latent.npy": trap}), rng())
    assert not (tmp_path / "sprung").exists()
    np.load(io.BytesIO(trap), allow_pickle=True)
    assert (tmp_path / "sprung").exists(), "the trap itself works"


@pytest.mark.parametrize("missing", ["prompt.npy", "latent.npy"])
def test_an_incomplete_cached_sample_is_skipped(missing):
    incomplete = cached()
    del incomplete[missing]
    with pytest.raises(Skip, match="no latent or no prompt"):
        samples.CachedLatents(tokenize)(incomplete, rng())


def test_a_cached_caption_without_embeddings_is_tokenized():
    captions = cached(txt="Größe".encode())
    stored = samples.CachedLatents(tokenize)(captions, rng())
    assert "input_ids_0" not in stored and "prompt_embeds" in stored, "embeddings are used where they are stored"
    del captions["prompt.npy"]
    found = samples.CachedLatents(tokenize)(captions, rng())
    assert set(found) == {"moments", "input_ids_0", "empty"} and found["input_ids_0"].tolist() == [5, 7]
    hidden = [samples.CachedLatents(tokenize, 0.5)(captions, rng(seed)) for seed in range(60)]
    assert 15 < sum(sample["empty"].item() for sample in hidden) < 45
    assert all(sample["input_ids_0"][0] == 5 for sample in hidden)
    del captions["latent.npy"]
    with pytest.raises(Skip, match="no latent or no prompt"):
        samples.CachedLatents(tokenize)(captions, rng())


def test_stale_manifests_are_refused_with_what_differs():
    samples.check_manifest({**MANIFEST, "made_by": "more"}, MANIFEST)
    with pytest.raises(UserError, match="resolution 32 instead of 16"):
        samples.check_manifest({**MANIFEST, "resolution": 32}, MANIFEST)
    with pytest.raises(UserError, match="vae None instead of v"):
        samples.check_manifest({}, MANIFEST)
