"""Prompt embeddings of a batch: encoded online, from a table made beforehand, from a cache; dropped and extra prompts."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from brisk import data, samples, sd_inputs, sd_models, tiny

pytestmark = pytest.mark.quick

CAPTIONS = ["a red square", "x" * 60, "", "Größe", "a red square", "two   words"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The parts of a tiny pipeline of both families."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("sd1", "sdxl"):
        tiny.make_pipeline(family).save_pretrained(folder / family)
    return {family: sd_models.load_parts(str(folder / family)) for family in ("sd1", "sdxl")}


def batch_of(decode, texts):
    """Samples that `decode` makes of one picture with these captions, drawn alike for every `decode`."""
    raws = [{"png": PICTURE, "txt": text.encode()} for text in texts]
    return data.collate([decode(raw, np.random.default_rng(n)) for n, raw in enumerate(raws)])


def png():
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


PICTURE = png()


def embed(parts, batch, prefix=""):
    return sd_inputs.embeddings_of(parts, batch, sd_inputs.encode_blank(parts, "cpu"), contextlib.nullcontext(), prefix)


def make_table(parts, captions=CAPTIONS, **settings):
    return sd_inputs.EmbeddingTable(parts, captions, "cpu", **settings)


def assert_close(found, wanted):
    """Embeddings and pooled ones of which one side went through float16."""
    for one, two in zip(found, wanted, strict=True):
        if two is None:
            assert one is None
        else:
            torch.testing.assert_close(one.float(), two.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_a_table_gives_the_embeddings_of_online_encoding(loaded, family, dropped):
    parts = loaded[family]
    tokenize, table = sd_inputs.Tokenize(parts.tokenizers), make_table(parts, batch_size=2)
    batches = [batch_of(samples.ImageCaptions(either, 32, proportion_empty_prompts=dropped), CAPTIONS)
               for either in (tokenize, table)]  # fmt: skip
    online, beforehand = batches
    assert "input_ids_0" in online and "input_ids_0" not in beforehand
    assert beforehand["prompt_embeds"].dtype == torch.float16 and ("pooled" in beforehand) == parts.is_xl
    assert torch.equal(online["empty"], beforehand["empty"]) and bool(online["empty"].any()) == bool(dropped)
    wanted = embed(parts, online)
    assert_close(embed(parts, beforehand), wanted)
    first = wanted[0]
    assert len(first) == 6 and not torch.allclose(first[0], first[1], atol=1e-1), "the captions differ"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_table_of_captions_gives_the_latents_of_online_encoding_too(loaded, family):
    parts = loaded[family]
    blank = sd_inputs.encode_blank(parts, "cpu")
    found = []
    for either in (sd_inputs.Tokenize(parts.tokenizers), make_table(parts)):
        batch, draw = batch_of(samples.ImageCaptions(either, 32), CAPTIONS), torch.Generator().manual_seed(0)
        found.append(sd_inputs.encode_batch(parts, batch, blank, draw, 32, 8, contextlib.nullcontext()))
    (latents, online, sizes), (again, beforehand, other_sizes) = found
    assert torch.equal(latents, again)
    assert sizes is None if family == "sd1" else torch.equal(sizes, other_sizes)
    assert_close(beforehand, online)


def test_a_table_holds_each_caption_once_on_the_cpu_and_counts_its_progress(loaded):
    class Progress:
        count = 0

        def update(self, number):
            self.count += number

    progress = Progress()
    table = make_table(loaded["sdxl"], batch_size=2, progress=progress)
    assert progress.count == 5 and set(table.table) == {"prompt_embeds", "pooled"}
    assert all(len(column) == 5 and column.dtype == torch.float16 for column in table.table.values())
    assert all(column.device.type == "cpu" for column in table.table.values())
    for batch_size in (1, 5, 32):
        other = make_table(loaded["sdxl"], batch_size=batch_size)
        assert_close([other(text)["pooled"] for text in CAPTIONS], [table(text)["pooled"] for text in CAPTIONS])
    assert set(make_table(loaded["sd1"]).table) == {"prompt_embeds"}


def test_a_table_can_be_sent_to_loader_workers(loaded):
    table = make_table(loaded["sdxl"])
    again = pickle.loads(pickle.dumps(table))
    assert all(torch.equal(again("Größe")[name], value) for name, value in table("Größe").items())


def test_a_table_is_asked_for_captions_as_they_stand_in_the_rows(loaded):
    """Decoders cut the white space around captions, lists of captions keep theirs."""
    table = make_table(loaded["sd1"], [" a cat \n", "a dog"])
    cut = samples.caption_of({"txt": b" a cat \n"}, {}, None)
    assert torch.equal(table(cut)["prompt_embeds"], table(" a cat \n")["prompt_embeds"])
    assert not torch.equal(table(cut)["prompt_embeds"], table("a dog")["prompt_embeds"])
    with pytest.raises(KeyError):
        table("a cow")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("way", ["tokens", "table"])
def test_extra_prompts_are_encoded_like_captions(loaded, family, way):
    parts = loaded[family]
    tokenize = sd_inputs.Tokenize(parts.tokenizers)
    either = tokenize if way == "tokens" else make_table(parts)
    batch = batch_of(samples.ImageCaptions(either, 32, extra_prompts=["Größe"]), ["a red square"] * 3)
    assert_close(embed(parts, batch, "extra_"), embed(parts, batch_of(samples.ImageCaptions(tokenize, 32), ["Größe"] * 3)))
    assert not torch.allclose(embed(parts, batch, "extra_")[0], embed(parts, batch)[0], atol=1e-1)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_dropped_prompts_get_the_blank_embeddings_whatever_the_batch_holds(loaded, family):
    parts = loaded[family]
    blank = sd_inputs.encode_blank(parts, "cpu")
    marked = tuple(None if part is None else torch.full_like(part, 7.0) for part in blank)
    for either in (sd_inputs.Tokenize(parts.tokenizers), make_table(parts)):
        batch = batch_of(samples.ImageCaptions(either, 32), CAPTIONS)
        kept = sd_inputs.embeddings_of(parts, batch, marked, contextlib.nullcontext())
        batch["empty"] = torch.tensor([False, True, False, False, True, False])
        found = sd_inputs.embeddings_of(parts, batch, marked, contextlib.nullcontext())
        for one, plain in zip(found, kept, strict=True):
            if one is not None:
                assert (one[batch["empty"]] == 7).all() and torch.equal(one[~batch["empty"]], plain[~batch["empty"]])


@pytest.mark.parametrize("prompts", [None, ["Größe"]])
def test_swapped_captions_are_the_neighbours_or_extra_ones_and_are_dropped_once(loaded, prompts):
    parts, size = loaded["sd1"], 2000
    decode = samples.ImageCaptions(sd_inputs.Tokenize(parts.tokenizers), 32, extra_prompts=prompts)
    batch = {name: value.repeat(size // 2, *[1] * (value.ndim - 1)) for name, value in batch_of(decode, ["a cat", "a dog"]).items()}
    batch["empty"] = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.3
    own, blank = torch.arange(float(size)).view(-1, 1, 1), torch.full((1, 1, 1), -1.0)
    batch["prompt_embeds"], extra = own, torch.full((size, 1, 1), -2.0)
    batch |= {"extra_prompt_embeds": extra} if prompts else {}
    embeddings = sd_inputs.embeddings_of(parts, batch, None, contextlib.nullcontext())
    assert torch.equal(embeddings[0], own), "none dropped yet"
    swapped, draw = torch.arange(size) % 4 > 0, torch.Generator().manual_seed(0)
    found = sd_inputs.swap_prompts(parts, batch, embeddings, (blank, None), swapped, draw, contextlib.nullcontext())[0].flatten()
    assert torch.equal(found == -1, batch["empty"])
    kept = ~batch["empty"]
    assert torch.equal(found[kept & ~swapped], own.flatten()[kept & ~swapped])
    others, drawn = found[kept & swapped], (found == -2)[kept & swapped]
    assert drawn.float().mean().item() == pytest.approx(0.5 if prompts else 0, abs=0.05)
    assert torch.equal(others[~drawn], own.roll(1).flatten()[kept & swapped][~drawn])


def test_a_caption_with_half_a_surrogate_pair_is_encoded(loaded):
    caption = "a cat \ud83d"
    expected = sd_inputs.Tokenize(loaded["sd1"].tokenizers)("a cat ?")
    assert torch.equal(sd_inputs.Tokenize(loaded["sd1"].tokenizers)(caption)["input_ids_0"], expected["input_ids_0"])
    assert make_table(loaded["sd1"], [caption])(caption)["prompt_embeds"].isfinite().all()


def test_encoding_online_happens_within_autocast(loaded):
    entered = []

    class Autocast(contextlib.nullcontext):
        def __enter__(self):
            entered.append(True)

    parts = loaded["sd1"]
    blank = sd_inputs.encode_blank(parts, "cpu")
    for either, times in ((sd_inputs.Tokenize(parts.tokenizers), 1), (make_table(parts), 0)):
        entered.clear()
        sd_inputs.embeddings_of(parts, batch_of(samples.ImageCaptions(either, 32), CAPTIONS), blank, Autocast())
        assert len(entered) == times


@pytest.mark.parametrize("pooled", [True, False])
def test_choose_takes_the_first_where_the_mask_is_set_in_its_precision(pooled):
    mask = torch.tensor([True, False, True])
    first = torch.arange(3.0).view(1, 1, 3) + 100, torch.full((1, 2), 50.0)
    second = torch.arange(18.0).view(3, 2, 3).half(), torch.arange(6.0).view(3, 2).half()
    if not pooled:
        first, second = (first[0], None), (second[0], None)
    found = sd_inputs.choose(mask, first, second)
    assert found[0].dtype == torch.float32 and found[0].shape == (3, 2, 3)
    assert found[0][:, 1].tolist() == [[100, 101, 102], [9, 10, 11], [100, 101, 102]]
    assert found[1].tolist() == [[50, 50], [2, 3], [50, 50]] if pooled else found[1] is None
    whole = (first[0].expand(3, 2, 3), None if first[1] is None else first[1].expand(3, 2))
    again = sd_inputs.choose(~mask, second, whole)
    assert again[0].dtype == torch.float16 and torch.equal(again[0].float(), found[0])


def test_grey_images_of_a_dry_run_look_like_batches_of_data(loaded):
    for family in ("sd1", "sdxl"):
        for either in (sd_inputs.Tokenize(loaded[family].tokenizers), make_table(loaded[family], [tiny.CAPTION])):
            batch = next(tiny.SyntheticBatches(either, 3, 32))
            real = batch_of(samples.ImageCaptions(either, 32), [tiny.CAPTION] * 3)
            assert set(real) - set(batch) == {"flipped"} and set(batch) <= set(real)
            assert all(batch[name].shape == real[name].shape and batch[name].dtype == real[name].dtype for name in batch)
            assert_close(embed(loaded[family], batch), embed(loaded[family], real))
