"""Settings of the BK-SDM script that must not change its result: memory, accumulation, caches, compilation."""

import importlib.util

import numpy as np
import pytest
import torch
from inprocess import BKSDM, make_inputs, train, weights
from test_slam_equivalence import assert_close

from brisk import sd_inputs, seeding, tiny
from brisk.feature_taps import FeatureTaps

pytestmark = [
    pytest.mark.equivalence,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
TERMS = ("loss", "loss_sd", "loss_kd_output", "loss_kd_feat", "grad_norm")
OWN = {"toy_sd1": ("--preset=bk_tiny", "--max_train_steps=3"), "toy_sdxl": ("--preset=tiny_sd_xl", "--max_train_steps=2")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder for teachers and shards, with four pictures of different captions."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    for number in range(4):
        tiny.random_image(np.random.default_rng(number), 40, 48).save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text(f"{number} red squares")
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A function: (flags, family) -> (weights, rows) of a short run on that toy teacher; from shards if no flag says else."""

    def go(*flags, family="toy_sd1"):
        output = tmp_path_factory.mktemp("run") / "out"
        given = [*make_inputs(inputs, family, BKSDM), *OWN[family], *flags]
        if any(flag.startswith(("--train_data_dir", "--cached_latents")) for flag in flags):
            given = [flag for flag in given if not flag.startswith("--train_shards")]
        rows = train(output, *given, script=BKSDM)
        return weights(output), rows

    return go


@pytest.fixture(scope="module")
def plain(run):
    """`run`, to whose result others are compared; each made once."""
    done = {}

    def remembered(*flags, **named):
        key = str((flags, named))
        done[key] = done.get(key) or run(*flags, **named)
        return done[key]

    return remembered


def assert_same(found, expected, tolerance=2e-5, rel=1e-4):
    """The same weights, and the same terms at each step, each pair of features among them."""
    assert_close(found[0], expected[0], tolerance)
    names = [name for name in expected[1][0] if name in TERMS or name.startswith("feat/")]
    assert len(names) > len(TERMS) + 4
    for row, wanted in zip(found[1], expected[1], strict=True):
        assert [row[name] for name in names] == pytest.approx([wanted[name] for name in names], rel=rel)


def assert_near(found, expected, start, share):
    """Where rounding differs: weights that lie nearer to each other than `share` of the way from `start`, near losses."""

    def distance(one, two):
        return sum((one[name] - two[name]).square().sum().item() for name in one) ** 0.5

    assert 0 < distance(found[0], expected[0]) < share * distance(expected[0], start)
    for name in TERMS:
        assert [row[name] for row in found[1]] == pytest.approx([row[name] for row in expected[1]], rel=share), name


def start(plain, *flags):
    """The student's weights before training."""
    return plain("--learning_rate=0", "--max_train_steps=1", *flags)[0]


def test_the_plain_run_moves_every_weight(plain):
    """Guards the comparisons below: networks that do not train would be equal too."""
    before, after = start(plain), plain()[0]
    assert min((after[name] - before[name]).abs().max() for name in before) > 1e-5


@pytest.mark.parametrize("family", ["toy_sd1", "toy_sdxl"])
def test_gradient_checkpointing_changes_nothing(family, plain, run, monkeypatch):
    expected, calls, reads = plain(family=family), [], []
    checkpoint, read = torch.utils.checkpoint.checkpoint, FeatureTaps.read
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    monkeypatch.setattr(FeatureTaps, "read", lambda self: reads.append(read(self)) or reads[-1])
    found = run("--gradient_checkpointing", family=family)
    assert_same(found, expected, 1e-6, 1e-5)
    steps = len(found[1])
    assert len(calls) >= steps and len(calls) % steps == 0, "it was used, by the student alone, once per step and block"
    mine = [features for features in reads if features[0].requires_grad]
    assert len(mine) == steps and all(feature.requires_grad for features in mine for feature in features)


def share_draws(monkeypatch):
    """Make the draws of two micro-steps the two halves of what one step of twice the batch draws."""
    generator, half = seeding.generator, [0]

    def halved(draw):
        def drawn(*shape, generator=None, **named):
            if generator is None:
                return draw(*shape, generator=generator, **named)
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            mine = slice(half[0] * shape[0], (half[0] + 1) * shape[0])
            return draw((2 * shape[0], *shape[1:]), generator=generator, **named)[mine]

        return drawn

    def of_step(seed, rank, micro_step, *rest, **named):
        half[0] = micro_step % 2
        return generator(seed, rank, micro_step // 2, *rest, **named)

    monkeypatch.setattr(seeding, "generator", of_step)
    monkeypatch.setattr(torch, "randn", halved(torch.randn))
    monkeypatch.setattr(torch, "rand", halved(torch.rand))


def test_two_micro_steps_of_two_equal_a_step_of_four(inputs, run, monkeypatch):
    flags = (f"--train_data_dir={inputs}/images", "--center_crop", "--snr_gamma=5", "--snr_on_features", "--noise_offset=0.1",
             "--use_ema")  # fmt: skip
    whole = run(*flags, "--train_batch_size=4")
    share_draws(monkeypatch)
    parts = run(*flags, "--gradient_accumulation_steps=2")
    assert_same(parts, whole, 1e-5)
    assert [row["images"] for row in parts[1]] == [4, 8, 12]
    assert {name.split("/")[0] for name in parts[0]} == {"unet", "unet_raw"}


@pytest.mark.parametrize("embeddings", [True, False], ids=["with embeddings", "captions alone"])
def test_cached_latents_train_like_online_encoding(embeddings, inputs, plain, run, root):
    spec = importlib.util.spec_from_file_location("precompute_latents", root / "scripts/precompute_latents.py")
    precompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precompute)
    online = plain("--center_crop")
    folder = inputs / f"latents-{embeddings}"
    precompute.main([f"--pretrained_teacher_model={inputs}/toy_sd1", f"--output_dir={folder}", "--resolution=32", "--center_crop",
                     f"--train_shards_path_or_url={inputs}/shards/synthetic-{{00000..00001}}.tar", "--samples_per_shard=16",
                     f"--text_embeddings={embeddings}"])  # fmt: skip
    cached = run(f"--cached_latents={folder}/latents-00-{{00000..00001}}.tar")
    assert_near(cached, online, start(plain, "--center_crop"), 0.02)


@pytest.mark.parametrize("family", ["toy_sd1", "toy_sdxl"])
def test_embeddings_made_beforehand_train_like_those_made_online(family, inputs, run, monkeypatch):
    flags = (f"--train_data_dir={inputs}/images", "--proportion_empty_prompts=0.3")
    online = run(*flags, family=family)
    encode, seen = sd_inputs.encode_prompts, []
    monkeypatch.setattr(sd_inputs, "encode_prompts", lambda parts, ids: seen.append(len(ids[0])) or encode(parts, ids))
    before = run(*flags, "--pre_compute_text_embeddings", family=family)
    assert seen == [4, 1], "the captions, each once, and the empty one"
    for name in TERMS:
        assert [row[name] for row in before[1]] == pytest.approx([row[name] for row in online[1]], rel=2e-3), name


def test_vae_batch_size_cuts_the_batch_and_changes_nothing(plain, run, monkeypatch):
    from diffusers import AutoencoderKL

    sizes, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, *rest: sizes.append(len(x)) or encode(self, x, *rest))
    assert_same(run("--vae_batch_size=1"), plain(), 1e-6, 1e-5)
    assert sizes == [1] * 6


@pytest.mark.parametrize(("flag", "modes"), [("--compile_teacher", [False]), ("--compile", [False, True]), ("--channels_last", [])])
def test_speed_switches_change_nothing(flag, modes, plain, run, monkeypatch):
    """Taps included: hooks within a compiled network see every pass."""
    compiled, real = [], torch.nn.Module.compile
    really = flag == "--compile"

    def compile(self):
        compiled.append(self.training)
        if really:
            real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    found = run(flag)
    torch._dynamo.reset()
    assert compiled == modes, "the teacher, which does not train, then the student"
    assert not [name for name in found[0] if "_orig_mod" in name]
    assert_same(found, plain(), 2e-5, 1e-4)


def test_a_compiled_and_checkpointed_student_trains_like_the_plain_one(plain, run, monkeypatch):
    """The taps sit within the recomputed blocks."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    found = run("--compile", "--gradient_checkpointing", "--feature_set=self_attn")
    torch._dynamo.reset()
    assert_same(found, plain("--feature_set=self_attn"), 2e-5, 1e-4)


def test_bf16_stays_close_to_float32(plain, run):
    assert_near(run("--mixed_precision=bf16"), plain(), start(plain), 0.2)
