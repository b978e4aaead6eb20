"""Two gloo processes on the CPU: different draws, equal weights, exact resume, agreed stop; the accelerate configs."""

import json
import subprocess

import pytest
import yaml
from conftest import ROOT, SLAM, environment, free_port, read_rows
from ranks import driver, notes_of, noting, run_driver
from safetensors.torch import load_file

from brisk import checkpoint

STEPS, STOP = 6, 3
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--resume_from_checkpoint=latest", "--random_flip",
         "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--learning_rate=0.01",
         "--gradient_accumulation_steps=2")  # fmt: skip
NOTING = noting(SLAM, '''
from brisk import sd_inputs, sd_models

predict, encode = sd_models.predict, sd_inputs.latent_moments


def noting_predict(unet, dtype, x, timesteps, *rest):
    if not unet.training and len(rest) == 1:  # the teacher's call
        note(times=timesteps[: len(timesteps) // 2].tolist(), inputs=digest([x]))
    return predict(unet, dtype, x, timesteps, *rest)


def noting_encode(vae, pixels, size):
    for image in pixels:
        note(images=digest([image]))
    return encode(vae, pixels, size)


sd_models.predict, sd_inputs.latent_moments = noting_predict, noting_encode
''')


@pytest.fixture(scope="module")
def straight(warm, base_flags, tmp_path_factory):
    """An unbroken run started by `accelerate launch` with configs/accelerate/two_cpu.yaml: (output, notes by rank)."""
    folder = tmp_path_factory.mktemp("straight")
    config = ROOT / "configs/accelerate/two_cpu.yaml"
    command = [warm.python, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port",
               str(free_port()), driver(folder, NOTING), *base_flags(f"--output_dir={folder / 'out'}", *FLAGS)]  # fmt: skip
    variables = environment(ACCELERATE_USE_CPU="true", NOTES_TO=str(folder))
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "out", notes_of(folder)


@pytest.fixture(scope="module")
def broken(warm, base_flags, tmp_path_factory):
    """The same run stopped by a SIGTERM that only rank 1 gets, then continued."""
    folder = tmp_path_factory.mktemp("broken")
    flags = base_flags(f"--output_dir={folder / 'out'}", *FLAGS)
    codes, errors = run_driver(warm, folder, flags, NOTING, STOP_AT=str(STOP))
    stopped_at = [checkpoint.step_of(path) for path in (folder / "out").glob("checkpoint-*")]
    finished = (folder / "out/unet").exists()
    again, more = run_driver(warm, folder / "second", flags, NOTING)
    assert again == [0, 0], more
    return {"codes": codes, "errors": errors, "steps": stopped_at, "finished": finished, "output": folder / "out",
            "notes": notes_of(folder), "second": notes_of(folder / "second")}  # fmt: skip


def test_ranks_draw_different_indices_noise_and_images(straight):
    first, second = straight[1]
    assert len(first["inputs"]) == len(second["inputs"]) == 2 * STEPS
    assert not set(first["inputs"]) & set(second["inputs"]), "both ranks trained on the same noisy latents"
    assert first["times"] != second["times"]
    assert first["images"] != second["images"]
    assert len(set(first["inputs"])) == 2 * STEPS, "a draw was repeated"


def test_weights_are_equal_on_both_ranks_after_every_step(straight):
    first, second = straight[1]
    assert len(first["weights"]) == STEPS and len(set(first["weights"])) == STEPS
    assert first["weights"] == second["weights"]


def test_learning_rate_counts_optimizer_steps_at_any_number_of_processes(straight, run_main):
    alone = run_main(*FLAGS)
    rows = read_rows(straight[0])
    assert [row["lr"] for row in rows] == [row["lr"] for row in alone.rows]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["images"] for row in rows] == [2 * row["images"] for row in alone.rows]
    assert rows[0]["loss"] != alone.rows[0]["loss"], "the loss of one rank only was logged"


def test_every_rank_takes_part_in_a_checkpoint(straight):
    names = {path.name for path in (straight[0] / "checkpoint-2").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "rank_state_0.json", "rank_state_1.json"} <= names
    assert json.loads((straight[0] / "run_manifest.json").read_text())["processes"] == 2
    assert json.loads((straight[0] / "run_manifest.json").read_text())["global_batch"] == 2 * 2 * 2


def test_sigterm_to_one_rank_saves_and_ends_all_with_143(broken):
    assert broken["codes"] == [143, 143], broken["errors"]
    assert max(broken["steps"]) == STOP and not broken["finished"]
    assert all("Traceback" not in error for error in broken["errors"])
    assert "Stopped by signal 15 after step 3" in broken["errors"][0]


def test_resumed_pair_continues_bit_for_bit(straight, broken):
    for name in ("unet", "unet_target"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (straight[0] / file).read_bytes() == (broken["output"] / file).read_bytes()
    for rank in (0, 1):
        for what in ("inputs", "times", "images", "weights"):
            assert broken["notes"][rank][what] + broken["second"][rank][what] == straight[1][rank][what], what
    keys = ("step", "images", "loss", "lr", "grad_norm")
    rows = [[[row[key] for key in keys] for row in read_rows(output)] for output in (straight[0], broken["output"])]
    assert rows[0] == rows[1]


def test_checkpoint_of_two_processes_continues_in_one_with_fresh_shards_and_says_so(straight, run_main, tmp_path):
    run = run_main(*FLAGS, f"--resume_from_checkpoint={straight[0] / 'checkpoint-4'}", output=tmp_path / "out")
    assert [row["step"] for row in run.rows] == [5, 6]
    assert "shard stream starts afresh" in run.log
    start = load_file(straight[0] / "checkpoint-4/unet/diffusion_pytorch_model.safetensors")
    end = load_file(run.output / "unet/diffusion_pytorch_model.safetensors")
    assert 0 < (start["conv_in.weight"] - end["conv_in.weight"]).abs().max() < 0.1


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}  # fmt: skip
ON_CPU = """
import accelerate.state as state
from accelerate.utils import DistributedType

make = state.AcceleratorState.__init__


def make_with_fsdp(self, *args, fsdp_plugin=None, **named):  # accelerate offers FSDP on accelerators only
    make(self, *args, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is None:
        return
    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
    state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


state.AcceleratorState.__init__ = make_with_fsdp
"""


def test_sharded_weights_train_stop_resume_and_export_like_replicated_ones(straight, warm, base_flags, tmp_path):
    from diffusers import UNet2DConditionModel

    flags = base_flags(f"--output_dir={tmp_path / 'out'}", *FLAGS, "--validation_steps=4", "--validation_prompts=a|b",
                       "--num_validation_images=1", "--validation_num_inference_steps=1")  # fmt: skip
    for stop_at, expected in ((STOP, [143, 143]), (0, [0, 0])):
        codes, errors = run_driver(warm, tmp_path, flags, ON_CPU + NOTING, STOP_AT=str(stop_at), **FSDP)
        assert codes == expected, errors
    keys = ("loss", "grad_norm", "lr")
    for row, wanted in zip(read_rows(tmp_path / "out"), read_rows(straight[0]), strict=True):
        assert [row[key] for key in keys] == pytest.approx([wanted[key] for key in keys], rel=1e-2)
    for name in ("unet", "unet_target"):
        ours = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder=name).state_dict()
        theirs = UNet2DConditionModel.from_pretrained(straight[0], subfolder=name).state_dict()
        assert ours.keys() == theirs.keys()
        error = sum((ours[key] - theirs[key]).square().sum() for key in ours)
        assert error < 1e-3 * sum(value.square().sum() for value in theirs.values()), name
    assert {path.name for path in (tmp_path / "out/validation/step-000004").iterdir()} == {"target-1-steps.png"}


def test_processes_that_do_not_know_of_each_other_are_refused(run_main, monkeypatch):
    from brisk import options

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(options.UserError, match="2 processes were launched .* ACCELERATE_USE_CPU=true"):
        run_main()


CONFIGS = {
    "single_cpu": ("NO", 1, True), "two_cpu": ("MULTI_GPU", 2, True), "single_gpu": ("NO", 1, False),
    "multi_gpu": ("MULTI_GPU", 2, False), "1_node_1_gpu_ddp": ("MULTI_GPU", 1, False), "fsdp": ("FSDP", 2, False),
    "deepspeed_zero2": ("DEEPSPEED", 2, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_its_config(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / f"configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    kind, processes, on_cpu = CONFIGS[name]
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == (kind, processes, on_cpu)
    known = set(vars(config))
    assert set(yaml.safe_load(path.read_text())) <= known, "a key that accelerate does not know"
    assert config.mixed_precision == ("no" if on_cpu else "bf16")


def test_every_accelerate_config_is_listed_here():
    assert {path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml")} == set(CONFIGS)


def test_launcher_reads_the_sharding_settings(monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    for name, settings in (
        ("fsdp", {"use_fsdp": True, "fsdp_version": 2, "fsdp_offload_params": "false"}),
        ("deepspeed_zero2", {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "none"}),
    ):
        command = ["--config_file", str(ROOT / f"configs/accelerate/{name}.yaml"), "script.py"]
        args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
        for key, value in settings.items():
            assert str(getattr(args, key)).lower() == str(value).lower(), key
        if name == "fsdp":
            variables = prepare_multi_gpu_env(args)
            assert variables["FSDP_VERSION"] == "2" and variables["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
            assert variables["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "BasicTransformerBlock,ResnetBlock2D"
