"""The recipes in configs/epd: each holds the published values and trains two batches of a tiny model of its family."""

import ast
import json
import math
import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT
from safetensors.torch import save_file

import train_epd as script
from brisk import denoiser_sources, edm_nets, epd, epd_distill, options, predictor_files
from brisk.options import parse as parse_options

CONFIGS = sorted(path for path in (ROOT / "configs/epd").glob("*.yaml") if not path.stem.startswith("rl_"))
NAMES = [path.stem for path in CONFIGS]
TOYS = {"gmm2d", "tiny_digits"}
TAKES = {"ms_coco": "prompts", "ms_coco_plugin": "prompts", "tiny_digits": "prompts", "imagenet64": "classes",
         "imagenet64_plugin": "classes"}  # fmt: skip
COMMON = {"num_steps": 4, "num_points": 2, "afs": True, "schedule_type": "time_uniform", "schedule_rho": 1.0, "M": 3,
          "teacher_substeps": 2, "total_kimg": 10.0, "learning_rate": 0.2, "coslr": True, "update_mode": "auto", "init": "spread",
          "fcn": False, "seed": 0, "guidance_type": None}  # fmt: skip
EPD_RUN = COMMON | {"sampler_stu": "epd", "sampler_tea": "heun", "max_order": None}
PLUGIN = COMMON | {"sampler_stu": "ipndm", "sampler_tea": "dpm", "max_order": 3, "batch": 16, "scale_dir": 0.05, "scale_time": 0.2}
COCO = {"dataset_name": "ms_coco", "batch": 32, "total_kimg": 5.0, "schedule_type": "discrete", "scale_dir": 0.05,
        "scale_time": 0.2, "learning_rate": 0.01, "coslr": False, "guidance_type": "cfg", "guidance_rate": 7.5}  # fmt: skip
EXPECTED = {
    "cifar10": EPD_RUN | {"dataset_name": "cifar10", "batch": 32, "scale_dir": 0.05, "scale_time": 0.05},
    "ffhq": EPD_RUN | {"dataset_name": "ffhq", "batch": 16, "scale_dir": 0.05, "scale_time": 0.05},
    "imagenet64": EPD_RUN | {"dataset_name": "imagenet64", "batch": 16, "scale_dir": 0.05, "scale_time": 0.1},
    "lsun_bedroom_ldm": EPD_RUN | {"dataset_name": "lsun_bedroom_ldm", "batch": 12, "scale_dir": 0.05, "scale_time": 0.0},
    "cifar10_plugin": PLUGIN | {"dataset_name": "cifar10"},
    "ffhq_plugin": PLUGIN | {"dataset_name": "ffhq"},
    "imagenet64_plugin": PLUGIN | {"dataset_name": "imagenet64"},
    "lsun_bedroom_ldm_plugin": PLUGIN | {"dataset_name": "lsun_bedroom_ldm", "scale_time": 0.02},
    "ms_coco": COCO | {"sampler_stu": "epd"},
    "ms_coco_plugin": COCO | {"sampler_stu": "ipndm", "max_order": 2},
}


@pytest.mark.quick
def test_every_recipe_of_the_table_ships_and_no_other():
    assert set(NAMES) == set(EXPECTED) | TOYS


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
    model = SimpleNamespace(takes=TAKES.get(name), table=None, family=None)
    assert not options.without_effect(given, script.effects(args, args.mixed_precision, model))


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_comment_gives_the_command_and_what_it_costs(path):
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    args, _ = script.parse_args([f"--config={path.stem}"])
    assert f"accelerate launch train_epd.py --config {path.stem}" in comment
    stated = re.search(r"para-NFE (\d+)", comment)
    if stated:
        assert int(stated[1]) == epd.cost(args.num_steps, args.num_points, args.afs).para_nfe
    for flags in re.findall(r"--(?!config|num_steps)[a-z_]+ [\w.]+", comment):  # variants are flags of the script
        if "FILE" not in flags:
            script.parse_args(shlex.split(flags.rstrip(".")))


PUBLISHED = {  # README of the published code; its training flags
    "dataset_name": None, "batch": 64, "total_kimg": 10, "scale_dir": 0.05, "scale_time": 0.05, "sampler_stu": "epd",
    "sampler_tea": "dpm", "num_steps": 4, "num_points": 2, "M": 3, "afs": False, "schedule_type": "polynomial",
    "max_order": None, "predict_x0": True,
    "lower_order_final": True, "guidance_type": None, "guidance_rate": None, "prompt": None, "prompt_path": None, "batch_gpu": None,
    "learning_rate": 5e-3, "bench": True, "desc": None, "nosubdir": False, "tick": 10, "snap": 10, "dump": 50, "seed": None,
    "dry_run": False, "coslr": False, "fcn": False, "alpha": 10, "output_dir": "exps",
}  # fmt: skip


@pytest.mark.quick
def test_published_flags_have_their_defaults():
    args, given = script.parse_args([])
    assert {name: getattr(args, name) for name in PUBLISHED} == PUBLISHED and not given
    assert args.teacher_substeps == 2
    assert script.parse_args(["--sampler_tea=dpmpp"])[0].teacher_substeps == 1


@pytest.mark.quick
@pytest.mark.parametrize(("published", "ours"), [
    (["--outdir=x"], ["--output_dir=x"]), (["--lr=0.2"], ["--learning_rate=0.2"]), (["--batch=8"], ["--train_batch_size=8"]),
    (["--batch-gpu=4"], ["--batch_gpu=4"]), (["-n"], ["--dry-run"]), (["--seed=random"], []), (["--afs=True"], ["--afs"]),
    (["--predict_x0=False"], ["--predict-x0", "no"]), (["--model_path=a"], ["--pretrained_model_name_or_path=a"]),
    (["--resume=latest"], ["--resume_from_checkpoint=latest"]),
])  # fmt: skip
def test_both_spellings_mean_the_same(published, ours):
    assert vars(script.parse_args(published)[0]) == vars(script.parse_args(ours)[0])


@pytest.mark.quick
def test_choices_are_those_of_the_library():
    assert script.INITS == epd.INITS and script.UPDATE_MODES == epd_distill.UPDATE_MODES
    from brisk import solvers

    for name in script.CUT_TEACHERS:
        assert solvers.find(name).highest_order is None
    assert {name: solvers.find(name).highest_order for name in script.MULTISTEP_TEACHERS} == script.MULTISTEP_TEACHERS


@pytest.mark.quick
def test_every_declared_flag_is_read(monkeypatch):
    """A flag nobody reads is a promise not kept; --local_rank says itself that it is not used."""
    parsers = []

    def capture(parser, *rest):
        parsers.append(parser)
        return parse_options(parser, *rest)

    monkeypatch.setattr(options, "parse", capture)
    script.parse_args([])
    read = set()
    for path in ("train_epd.py", "brisk/epd_options.py", "brisk/epd_run.py"):
        read |= {node.attr for node in ast.walk(ast.parse((ROOT / path).read_text()))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}  # fmt: skip
    declared = {action.dest for action in parsers[0]._actions} - {"help", "config"}
    assert len(declared) > 60 and declared - read == {"local_rank"}
    assert all(action.help for action in parsers[0]._actions)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with tiny random models in place of those that the recipes name: networks of EDM, an LDM pipeline, captions."""
    import torch
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    folder = tmp_path_factory.mktemp("recipes")
    for name, classes in (("edm", 0), ("edm-classes", 5)):
        config = {"img_resolution": 8, "img_channels": 3, "label_dim": classes, "model_type": "SongUNet", "model_channels": 8,
                  "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(edm_nets.make_network(config).state_dict(), folder / name / "model.safetensors")
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D"), **blocks)  # fmt: skip
    vqvae = VQModel(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
                    num_vq_embeddings=16, **blocks)  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(folder / "ldm")
    (folder / "captions.csv").write_text("caption\na dog\na cat\n")
    return folder


def tiny_model(name, place, models):
    """The flags that put a tiny model in the place of a recipe's."""
    if name == "gmm2d":
        return []
    if name.startswith("ms_coco"):
        return [f"--pretrained_model_name_or_path={models['sd1']}"]
    if name.startswith("lsun"):
        source = place / "ldm"
    elif denoiser_sources.family_of(name.removesuffix("_plugin")) == "edm":
        source = place / ("edm-classes" if name.startswith("imagenet") else "edm")
    else:
        source = ROOT / "assets/tiny-teacher"
    return [f"--pretrained_model_name_or_path={source}"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_batches(name, workplace, models, run_epd, monkeypatch):
    monkeypatch.chdir(workplace if name not in TOYS else ROOT)
    done = run_epd(f"--config={name}", *tiny_model(name, workplace, models), "--batch=2", "--batch_gpu=1", "--M=1",
                   "--teacher_substeps=1", "--eval_samples=2", "--eval_steps=3", "--mixed_precision=no")  # fmt: skip
    args, _ = script.parse_args([f"--config={name}"])
    assert [row["step"] for row in done.rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in done.rows)
    found = predictor_files.load(done.output)
    assert (found.solver.student, found.solver.num_steps, found.solver.afs) == (args.sampler_stu, args.num_steps, args.afs)
    assert found.document["schedule"]["type"] == args.schedule_type and found.model["dataset"] == args.dataset_name
    useless = [line for line in done.log.splitlines() if "has no effect" in line]
    assert all("--total_kimg" in line for line in useless), "of which --max_train_steps takes the place here"
