"""The recipes in configs/fpdm: each holds the published values and trains two steps of a tiny network in its place."""

import re
import shlex

import numpy as np
import pytest
from conftest import ROOT

import train_fpdm as script
from brisk import fpdm, fpdm_options, options

CONFIGS = sorted((ROOT / "configs/fpdm").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
OF_THE_DEMO = {"tiny_digits"}  # run by scripts/demo_fpdm.sh
LAUNCH = "accelerate launch --config_file aconfs/1_node_1_gpu_ddp.yaml --num_processes 8 train_fpdm.py"

OFFICIAL = {"model": "DiT-XL/2", "image_size": 256, "in_channels": 4, "num_classes": 1000, "learn_sigma": True, "flow": False,
            "global_batch_size": 512, "learning_rate": 1e-4, "lr_scheduler": "constant", "adam_beta1": 0.9, "adam_beta2": 0.999,
            "adam_weight_decay": 0.0, "ema_decay": 0.9999, "class_dropout_prob": 0.1, "mixed_precision": "bf16", "allow_tf32": True,
            "num_train_epochs": 1400, "max_train_steps": None, "feature_path": "features", "dataset_name": "imagenet256",
            "unsupervised": False, "predict_v": False, "use_zero_terminal_snr": False, "output_subdir": "runs",
            "checkpointing_steps": 5000, "checkpoints_total_limit": 2}  # fmt: skip
LAYER = {"fixed_point": True, "fixed_point_no_grad_min_iters": 0, "fixed_point_no_grad_max_iters": 10,
         "fixed_point_with_grad_min_iters": 1, "fixed_point_with_grad_max_iters": 12,
         "fixed_point_pre_post_timestep_conditioning": False, "sync_iters": True}  # fmt: skip
V = {"predict_v": True, "use_zero_terminal_snr": True, "output_subdir": "v_pred_exp"}


def layer(depth):
    return OFFICIAL | LAYER | {"fixed_point_pre_depth": depth, "fixed_point_post_depth": depth}


EXPECTED = {
    "dit_xl2": OFFICIAL | {"fixed_point": False, "global_batch_size": 256},
    "fpdm_xl2_1_1": layer(1),
    "fpdm_xl2_1_1_v": layer(1) | V,
    "fpdm_xl2_4_4_v": layer(4) | V,
    "fpdm_xl2_unsupervised": layer(1) | {"unsupervised": True, "dataset_name": "ffhq256"},
}


@pytest.mark.quick
def test_every_recipe_of_the_table_ships_and_no_other():
    assert set(NAMES) == set(EXPECTED) | OF_THE_DEMO


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_values_are_the_published_ones(name):
    args, _ = script.parse_args([f"--config={name}"])
    assert {key: getattr(args, key) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_flags_agree_with_each_other_and_all_count(name):
    args, given = script.parse_args([f"--config={name}"])
    script.check_args(args)
    fpdm_options.network_config(args)
    assert not options.without_effect(given, script.effects(args, args.mixed_precision))


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_comment_gives_the_command_and_the_size(path):
    if path.stem in OF_THE_DEMO:
        return
    comment = "".join(line.lstrip("# ") for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    [command] = [line for line in comment.replace("\\\n", "").splitlines() if line.startswith("accelerate")]
    assert command.startswith(f"{LAUNCH} --config {path.stem}")
    args, _ = script.parse_args(shlex.split(command.removeprefix(LAUNCH)))
    config = fpdm_options.network_config(args)
    stated = re.search(r"([\d,]{9,}) parameters", comment)
    if stated:
        import torch

        with torch.device("meta"):
            network = fpdm.FPDMTransformer2DModel(**config)
        assert f"{network.num_parameters():,}" == stated[1]
    assert ("predicting v" in comment or "v-prediction" in comment) == args.predict_v


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with features/ in the published layout, as the recipes name it: 8 latents of 8 x 8 of each set."""
    folder = tmp_path_factory.mktemp("recipes")
    rng = np.random.default_rng(0)
    for name in ("imagenet256_features", "imagenet256_labels", "ffhq256_features"):
        (folder / "features" / name).mkdir(parents=True)
        for number in range(8):
            array = np.array([number % 4]) if "labels" in name else rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
            np.save(folder / f"features/{name}/{number}.npy", array)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(name, workplace, run_fpdm, monkeypatch):
    monkeypatch.chdir(workplace)
    flags = [f"--config={name}", "--mixed_precision=no", "--compile=False"]
    if name in OF_THE_DEMO:
        flags += ["--synthetic_data=16", f"--vae={ROOT}/assets/tiny-teacher", "--lr_scheduler=constant",
                  "--image_size=32"]  # fmt: skip
    done = run_fpdm(*flags)
    assert [row["step"] for row in done.rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in done.rows)
    args, _ = script.parse_args([f"--config={name}"])
    network = fpdm.load_transformer(done.output)
    assert network.config.fixed_point == args.fixed_point and network.config.zero_terminal_snr == args.use_zero_terminal_snr
    assert network.config.label_type == ("none" if args.unsupervised else "class")
    if args.fixed_point:
        assert (network.config.pre_depth, network.config.post_depth) == (args.fixed_point_pre_depth, args.fixed_point_post_depth)
        assert all(1 <= row["fp/m_with_grad"] <= 12 for row in done.rows)
