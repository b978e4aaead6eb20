"""convert_bksdm.py: our checkpoints and DiffEngine's .pth files become U-Nets for stock diffusers; wrong input is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, environment
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train_bksdm_distill
from brisk import bksdm, options, sd_models, tiny

sys.path.insert(0, str(ROOT / "scripts"))
import convert_bksdm  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `teacher`, `shards`, `run/checkpoint-2` of a small student with an average, and `toy.yaml` of that run."""
    from accelerate.state import AcceleratorState, GradientState

    folder = tmp_path_factory.mktemp("convert")
    tiny.make_pipeline("toy_sd1").save_pretrained(folder / "teacher")
    tiny.write_shards(folder / "shards")
    write_config(folder, "toy", preset="bk_small")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        train_bksdm_distill.main([
            f"--config={folder}/toy.yaml", f"--train_shards_path_or_url={folder}/shards", "--resolution=32",
            "--train_batch_size=2", "--max_train_steps=2", "--learning_rate=0.01", "--use_ema", "--report_to=none", "--seed=1",
            "--dataloader_num_workers=0", f"--output_dir={folder}/run",
        ])  # fmt: skip
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return folder


def write_config(folder, name, **values):
    """FOLDER/NAME.yaml of the folder's teacher."""
    lines = {"pretrained_model_name_or_path": folder / "teacher", **values}
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder / f"{name}.yaml"


def convert(*arguments):
    convert_bksdm.main([*map(str, arguments), "--save-keys", "unet"])


def refused(*arguments):
    """The one-line message with which the conversion ends."""
    with pytest.raises(options.UserError) as caught:
        convert_bksdm.main([str(argument) for argument in arguments])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def stored(folder):
    return load_file(folder / WEIGHTS)


def assert_same(network, expected):
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("flags, source", [((), "unet"), (("--use_ema",), "unet_ema"), (("--use-ema", "True"), "unet_ema")])
def test_checkpoint_round_trips(flags, source, place, tmp_path):
    checkpoint = place / "run/checkpoint-2"
    convert(place / "toy.yaml", checkpoint, tmp_path / "out", *flags)
    network = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert network.config.mid_block_type is None and network.config.layers_per_block == 1
    assert_same(network, stored(checkpoint / source))
    one, other = (stored(checkpoint / name)["conv_in.weight"] for name in ("unet", "unet_ema"))
    assert not torch.equal(one, other), "else this test sees no difference between the two"
    found = tiny.make_pipeline("toy_sd1")
    found.unet = network
    assert found("a red square", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_teacher_is_the_one_that_the_checkpoint_names_when_the_config_names_a_hub_id(place, tmp_path):
    convert("bk_small_sd14", place / "run/checkpoint-2", tmp_path / "out")
    assert_same(UNet2DConditionModel.from_pretrained(tmp_path / "out/unet"), stored(place / "run/checkpoint-2/unet"))


@pytest.mark.parametrize(
    "flags, dtype, file",
    [
        (("--dtype", "fp16"), torch.float16, WEIGHTS),
        (("--dtype", "bf16"), torch.bfloat16, WEIGHTS),
        (("--variant", "fp16"), torch.float16, "diffusion_pytorch_model.fp16.safetensors"),
        (("--variant", "ema", "--dtype", "fp32"), torch.float32, "diffusion_pytorch_model.ema.safetensors"),
    ],
)
def test_dtype_and_variant(flags, dtype, file, place, tmp_path):
    convert(place / "toy.yaml", place / "run/checkpoint-2", tmp_path, *flags)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json", file}
    assert {tensor.dtype for tensor in load_file(tmp_path / "unet" / file).values()} == {dtype}
    variant = flags[1] if flags[0] == "--variant" else None
    network = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", variant=variant, torch_dtype=dtype)
    expected = stored(place / "run/checkpoint-2/unet")
    assert_same(network, {name: tensor.to(dtype) for name, tensor in expected.items()})


def diffengine_file(path, state, **more):
    """A .pth as mmengine writes it: weights of several networks, and log objects of classes that are not installed here."""

    class HistoryBuffer:
        def __init__(self):
            import numpy

            self.max_length, self._log_history = 1000000, numpy.array([0.5, 0.25])

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    modules = {part: types.ModuleType(part) for part in ("mmengine", "mmengine.logging", name)}
    modules[name].HistoryBuffer = HistoryBuffer
    sys.modules.update(modules)
    try:
        torch.save({"meta": {"iter": 9}, "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
                    "state_dict": state, **more}, path)  # fmt: skip
    finally:
        for part in modules:
            del sys.modules[part]
    return path


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A folder with an SDXL `teacher`, `toy.yaml` (tiny_sd_xl), `student.pth`, and the weights that the latter holds."""
    folder = tmp_path_factory.mktemp("xl")
    pipeline = tiny.make_pipeline("toy_sdxl")
    pipeline.save_pretrained(folder / "teacher")
    write_config(folder, "toy", preset="tiny_sd_xl")
    config = bksdm.derive_student_config(sd_models.plain_config(pipeline.unet), "tiny_sd_xl")
    torch.manual_seed(3)
    state = UNet2DConditionModel.from_config(config).state_dict()
    others = {f"orig_unet.{name}": tensor for name, tensor in pipeline.unet.state_dict().items()}
    others |= {f"vae.{name}": tensor for name, tensor in pipeline.vae.state_dict().items()}
    diffengine_file(folder / "student.pth", {f"unet.{name}": tensor for name, tensor in state.items()} | others)
    return folder, state


def test_diffengine_file_becomes_a_student_of_the_preset(xl, tmp_path):
    folder, state = xl
    convert(folder / "toy.yaml", folder / "student.pth", tmp_path)
    network = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert_same(network, state)
    config = json.loads((tmp_path / "unet/config.json").read_text())
    assert config["mid_block_type"] is None and config["addition_embed_type"] == "text_time"


def test_shipped_config_takes_another_teacher(xl, tmp_path):
    folder, state = xl
    convert("tiny_sd_xl_pokemon_blip", folder / "student.pth", tmp_path, "--pretrained_model_name_or_path", folder / "teacher")
    assert_same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), state)


def test_wrong_preset_is_one_sentence_naming_what_differs(place, xl, tmp_path):
    for preset, words in (
        ("bk_base", ("does not hold the bk_base student", "missing (mid_block.")),
        ("bk_tiny", ("does not hold the bk_tiny student", "unexpected (down_blocks.", "of another shape", "instead of")),
        ("small_sd_xl", ("does not fit a teacher of the Stable Diffusion",)),
    ):
        config = write_config(place, preset, preset=preset)
        message = refused(config, place / "run/checkpoint-2", tmp_path / "out")
        assert all(word in message for word in words), message
        assert len(message) < 4000
    folder, _ = xl
    message = refused(write_config(folder, "other", preset="koala_700m"), folder / "student.pth", tmp_path / "out")
    assert "unexpected (" in message and "is CONFIG the one" in message
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_refused(place, xl, tmp_path):
    folder, state = xl
    config, out = folder / "toy.yaml", tmp_path / "out"
    (tmp_path / "text.pth").write_text("no torch file")
    torch.save({"model": {}}, tmp_path / "no_state.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"vae.a": torch.ones(1)}}, tmp_path / "no_unet.pth")
    torch.save({"state_dict": {f"unet.{name}": tensor for name, tensor in list(state.items())[1:]} | {"unet.more": torch.ones(1)}},
               tmp_path / "part.pth")  # fmt: skip
    torch.save({"state_dict": {f"unet.{name}": 1 for name in state}}, tmp_path / "numbers.pth")
    for name, words in (
        ("missing.pth", "is neither a checkpoint folder nor a .pth file"),
        ("text.pth", "cannot be converted"),
        ("no_state.pth", "has no state_dict"),
        ("list.pth", "has no state_dict"),
        ("no_unet.pth", "begins with 'unet.'"),
        ("numbers.pth", "begins with 'unet.'"),
        ("part.pth", "1 missing (conv_in.weight), 1 unexpected (more)"),
    ):
        assert words in refused(config, tmp_path / name, out), name
    assert "--use_ema takes unet_ema" in refused(config, folder / "student.pth", out, "--use_ema")
    assert "only unet can be written" in refused(config, folder / "student.pth", out, "--save-keys", "vae")
    assert "is neither a file nor one of" in refused("no_such_config", folder / "student.pth", out)
    assert "has no folder unet" in refused(place / "toy.yaml", tmp_path, out)
    shutil.copytree(place / "run/checkpoint-2", tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-2/unet_ema")
    assert "trained without --use_ema" in refused(place / "toy.yaml", tmp_path / "checkpoint-2", out, "--use_ema")
    (tmp_path / "checkpoint-2/unet" / WEIGHTS).write_bytes(b"cut short")
    assert "cannot be converted" in refused(place / "toy.yaml", tmp_path / "checkpoint-2", out)
    absent = write_config(tmp_path, "absent", preset="bk_small")
    assert "give --pretrained_model_name_or_path" in refused(absent, folder / "student.pth", out)
    assert not out.exists()
    out.write_text("a file")
    assert "cannot be written" in refused(config, folder / "student.pth", out)


def test_own_config_of_a_checkpoint_must_fit_its_weights(place, tmp_path):
    shutil.copytree(place / "run/checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2/unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_per_block": 2}))
    assert "does not fit its own config.json" in refused(place / "toy.yaml", tmp_path / "checkpoint-2", tmp_path / "out")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_code_in_a_file_is_never_run(xl, tmp_path, monkeypatch):
    folder, state = xl
    monkeypatch.chdir(tmp_path)
    diffengine_file(tmp_path / "evil.pth", {f"unet.{name}": tensor for name, tensor in state.items()}, hook=Evil())
    with contextlib.suppress(options.UserError):
        convert_bksdm.main([str(folder / "toy.yaml"), "evil.pth", "out"])
    assert not (tmp_path / "pwned").exists()


def test_exit_code_and_stderr_of_the_command(place, tmp_path):
    command = [sys.executable, str(ROOT / "scripts/convert_bksdm.py")]
    done = subprocess.run([*command, write_config(place, "bk_base", preset="bk_base"), place / "run/checkpoint-2", "out"],
                          cwd=tmp_path, env=environment(), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
