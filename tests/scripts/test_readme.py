"""Every command and code block of the README is run: as printed, but for models, data and sizes."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pickles
import pytest
import torch
from conftest import BKSDM, ROOT, environment

import train_bksdm_distill
from brisk import options

README = (ROOT / "README.md").read_text()
SMALL = ["--max_train_steps", "2", "--resolution", "32", "--train_batch_size", "2", "--validation_steps", "2",
         "--num_validation_images", "1", "--checkpointing_steps", "2", "--seed", "1"]  # fmt: skip
INSTALL = "python3 -m venv"  # the same two steps are what scripts/setup.sh does
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
VAE = "madebyollin/sdxl-vae-fp16-fix"
POKEMON = "lambdalabs/pokemon-blip-captions"


def blocks(language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The bash blocks as single lines, the printed line breaks joined."""
    return [block.replace("\\\n", " ").strip() for block in blocks("bash")]


def fpdm_commands():
    """The lines of the blocks that belong to FPDM, in order."""
    of_fpdm = [block for block in commands() if "_fpdm.py" in block or "--class_labels" in block]
    return [line for block in of_fpdm for line in block.splitlines()]


def epd_commands():
    """The lines of the blocks that belong to EPD, in order; not of those on rewards."""
    return [line for block in commands() if "_epd" in block and "_rl" not in block and "demo" not in block
            for line in block.splitlines()]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, models):
    """A folder in which the README's relative paths exist: own images, the repository's files."""
    from brisk import tiny

    place = tmp_path_factory.mktemp("readme")
    for name in ("assets", "brisk", "configs", "scripts", "docs"):
        (place / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.py"):
        (place / path.name).symlink_to(path)
    (place / "my_images").mkdir()
    rng = __import__("numpy").random.default_rng(0)
    for number in range(6):
        tiny.random_image(rng, 40, 48).save(place / f"my_images/{number}.png")
        (place / f"my_images/{number}.txt").write_text("a red square")
    return place


def shrink(words, models, shards):
    """The command with a tiny teacher, local data and small sizes; everything else as printed."""
    if words[0] == "accelerate":
        words = ["python", "-m", "accelerate.commands.launch", "--cpu", *words[2:]]
    if any(word.endswith("precompute_latents.py") for word in words):
        changes = ["--resolution", "32", "--pretrained_teacher_model", str(models["sd1"])]
        return words + changes
    if not any(word.endswith("train_splam_distill_sd_wds.py") for word in words) or "--help" in words:
        return words
    words = [word if not word.startswith("--train_shards_path_or_url=") else f"--train_shards_path_or_url={shards}"
             for word in words if word != "--push_to_hub"]  # fmt: skip
    lora = ["--lora_rank", "4"] if "sd15_lora" in words else []
    changes = ["--pretrained_teacher_model", str(models["sd1"]), "--mixed_precision", "no", *lora]
    return [*words, *SMALL, *changes]


@pytest.mark.parametrize("line", [line for line in commands() if BKSDM not in line and "convert_bksdm" not in line
                                  and "_fpdm.py" not in line and "--class_labels" not in line and "_epd" not in line
                                  and "evaluate.py" not in line
                                  and ("scripts/" not in line or "precompute" in line)])  # fmt: skip
def test_command_runs(line, workplace, models, shards, warm):
    if line.startswith(INSTALL):
        assert "pip install -r requirements.txt -e ." in line
        return
    words = shrink(shlex.split(line), models, f"pipe:cat {shards}" if "/" in str(shards) else shards)
    run(words, workplace, warm)


@pytest.fixture(scope="module")
def measurable(tmp_path_factory):
    """A folder where what is measured, and what it is compared with, have the README's names, all tiny."""
    import numpy as np
    import tiny_extractor
    import tiny_rewards

    from brisk import protocols, tiny

    place = tmp_path_factory.mktemp("measurable")
    for name in ("outputs/quickstart", "outputs/quickstart/lcm", "outputs/my-splam", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        shutil.copytree(ROOT / "assets/tiny-teacher", place / name, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("val2014", "real_images", "my_images"):
        (place / name).mkdir()
        for number in range(20):
            side = 24 + number % 2 if name == "val2014" else 24  # COCO's are of many sizes
            tiny.random_image(rng, side, 24).save(place / name / f"{number:02d}.png")
    (place / "captions.csv").write_text("text\n" + "a red handwritten seven on a yellow background\n" * 20)
    tiny_extractor.write_inception(place / "inception-2015-12-05.pt", 6, 5)
    tiny_rewards.write_clip(place / protocols.L14)
    return place


def evaluations():
    """The commands of evaluate.py, in order."""
    return [line for line in commands() if "evaluate.py" in line]


@pytest.mark.parametrize("line", evaluations())
def test_evaluation_runs(line, measurable, monkeypatch, capsys):
    """As printed, but for the launcher, the number and size of images, timed repeats, and the teacher or its budgets."""
    import evaluate

    monkeypatch.chdir(measurable)
    words = shlex.split(line.removeprefix("accelerate launch ").removeprefix("python "))
    assert words.pop(0) == "evaluate.py"
    small = ["--batch_size=10", "--latency_repeats=1" if "--protocol" not in words else "--latency_repeats=0"]
    if "--protocol" not in words:  # the teacher at many budgets takes long
        small += ["--samples=50", "--seeds=1", "--teacher=none" if "--nfe" in words else "--nfe=2"]
    small += ["--samples=20", "--resolution=32"] if "coco2014_30k" in words else []
    evaluate.main([*words, *small])
    assert not re.search("has no effect", capsys.readouterr().out)
    output = measurable / words[words.index("--output_dir") + 1]
    report = json.loads((output / "report.json").read_text())
    names = [words[place + 1].split("=")[0] for place, word in enumerate(words) if word in ("--model", "--images")]
    assert names and all(report[name] for name in names)
    assert (output / "frontier.png").is_file() and (output / "report.html").is_file()


def test_there_are_four_evaluations():
    assert len(evaluations()) == 4 and sum("--nfe 1 2 4 8" in line for line in evaluations()) == 1


def run(words, place, warm):
    """Run a command in a folder; `python` is the warm one."""
    words = [warm.python, *words[1:]] if words[0] == "python" else words
    done = subprocess.run(words, cwd=place, env=environment(WANDB_MODE="offline"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def bksdm_commands():
    """The words of every command of train_bksdm_distill.py, those within sentences too."""
    named = re.findall(rf"`(python {BKSDM}\.py [^`]+)`", README)
    return [shlex.split(line) for line in [*commands(), *named] if f"{BKSDM}.py" in line]


@pytest.mark.parametrize("words", bksdm_commands(), ids=" ".join)
def test_bksdm_command_parses_as_printed(words, capsys):
    flags = words[words.index(f"{BKSDM}.py") + 1 :]
    if flags == ["--list_configs"]:
        with pytest.raises(SystemExit):
            train_bksdm_distill.parse_args(flags)
        assert {"toy_sd_cpu", "toy_sdxl_cpu", "small_sd_xl_pokemon_blip"} <= set(capsys.readouterr().out.split())
        return
    args, given = train_bksdm_distill.parse_args(flags)
    train_bksdm_distill.check_args(args)
    assert not options.without_effect(given, train_bksdm_distill.effects(args, args.mixed_precision))
    assert args.output_dir == f"work_dirs/{args.config}"


@pytest.fixture(scope="module")
def hub(workplace):
    """The workplace with a small SDXL, a VAE and a dataset in folders of the names that are hub ids elsewhere."""
    from brisk import tiny

    pipeline = tiny.make_pipeline("sdxl")
    pipeline.unet = tiny.make_unet("toy_xl", transformer_layers_per_block=(1, 1, 1))  # two layers per block, but shallow
    pipeline.save_pretrained(workplace / SDXL)
    pipeline.vae.save_pretrained(workplace / VAE)
    images = workplace / POKEMON / "train"
    images.mkdir(parents=True)
    for path in (workplace / "my_images").glob("*.png"):
        shutil.copy(path, images)
    rows = [json.dumps({"file_name": path.name, "text": "a pokemon"}) for path in sorted(images.glob("*.png"))]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    return workplace


def test_smaller_sdxl_is_trained_converted_and_sampled_as_printed(hub, warm, monkeypatch):
    """The commands and the snippet of the section follow each other; only sizes, precision and device differ."""
    train, convert = (next(line for line in commands() if part in line) for part in
                      ("small_sd_xl_pokemon_blip", "convert_bksdm.py"))  # fmt: skip
    launch, script, *flags = shlex.split(train)[1:]
    assert (launch, script) == ("launch", f"{BKSDM}.py")
    small = ["--max_train_steps=2", "--resolution=32", "--mixed_precision=no", "--dataloader_num_workers=0", "--report_to=none",
             "--checkpointing_steps=2", "--validation_inference_steps=2", "--validation_steps=2"]  # fmt: skip
    run(["python", "-m", "accelerate.commands.launch", "--cpu", script, *flags, *small], hub, warm)
    output = hub / "work_dirs/small_sd_xl_pokemon_blip"
    (output / "checkpoint-2").rename(output / "checkpoint-417")
    assert (output / "validation/step-000002/student-2-steps.png").is_file()
    monkeypatch.chdir(hub)
    monkeypatch.setattr(sys, "argv", shlex.split(convert)[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert (hub / "work_dirs/converted/unet/config.json").is_file()
    [snippet] = [block for block in blocks("python") if SDXL in block]
    for printed, here in (("float16", "float32"), ('"cuda"', '"cpu"'), ("steps=50, height=1024, width=1024", "steps=2")):
        assert printed in snippet
        snippet = snippet.replace(printed, here)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (hub / "yoda.png").is_file()


TRAIN = "accelerate launch --config_file aconfs/1_node_1_gpu_ddp.yaml --num_processes 8 train_fpdm.py --feature_path features"
LAYER = "--fixed_point True --deq_pre_depth {0} --deq_post_depth {0}"
V = "--output_subdir v_pred_exp --predict_v True --use_zero_terminal_snr True"
SAMPLE = "python sample_fpdm.py --ckpt RUN --fixed_point True --fixed_point_pre_depth 1 --fixed_point_post_depth 1 --cfg_scale 4.0"
PUBLISHED = [
    TRAIN, f"{TRAIN} {LAYER.format(1)}", f"{TRAIN} {LAYER.format(1)} {V}", f"{TRAIN} {LAYER.format(4)} {V}",
    f"{SAMPLE} --num_sampling_steps 20",
    f"{SAMPLE} --fixed_point_iters 12 --num_sampling_steps 40 --fixed_point_reuse_solution True",
]  # fmt: skip


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, models):
    """A folder where imagenet/train has pictures of two classes; what the README calls ema is a small VAE."""
    from brisk import sd_models, tiny

    place = tmp_path_factory.mktemp("imagenet")
    rng = __import__("numpy").random.default_rng(0)
    for number in range(8):
        path = place / f"imagenet/train/{('cat', 'dog')[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.random_image(rng, 40, 48).save(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setitem(sd_models.VAES, "ema", str(models["sd1"]))
        yield place


def test_fpdm_is_trained_and_sampled_as_printed(imagenet, run_fpdm, monkeypatch):
    """The commands and the snippet of the section follow each other; only sizes, precision, launcher and device differ."""
    from accelerate.state import AcceleratorState

    precompute, *lines = [" ".join(line.split()) for line in fpdm_commands()]
    own = [line for line in lines if "--name my-fpdm" in line]
    assert len(own) == 1 and [line for line in lines if line not in own] == PUBLISHED
    launch, script, *flags = shlex.split(precompute)[1:]
    monkeypatch.setattr(sys, "argv", [script, *flags, "--resolution=32"])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert launch == "launch" and (imagenet / "features/latents.npy").is_file()
    small = ["--image_size=32", "--sample_size=8", "--num_classes=2", "--mixed_precision=no", "--compile=False"]
    for line in (*PUBLISHED[:4], *own):
        flags = shlex.split(line.split("train_fpdm.py ")[1])
        run_fpdm("--name=", "--output_subdir=runs", *flags, *small, output=imagenet / "results")
    folders = [path.parent.parent.name for path in imagenet.glob("results/*/*/transformer")]
    assert sorted(folders) == ["runs", "runs", "runs", "v_pred_exp", "v_pred_exp"]
    for line in PUBLISHED[4:]:
        flags = shlex.split(line.replace("RUN", str(imagenet / "results/runs/my-fpdm")))[2:]
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, "argv", ["sample_fpdm.py", *flags, "--sample_index_end=2"])
        runpy.run_path(str(ROOT / "sample_fpdm.py"), run_name="__main__")
    AcceleratorState._reset_state(True)
    assert len(list(imagenet.glob("samples/my-fpdm/*/0*.png"))) == 4
    [snippet] = [block for block in blocks("python") if "FPDMPipeline" in block]
    for printed, here in (('"cuda"', '"cpu"'), ("[207]", "[1]"), ("steps=60", "steps=3")):
        assert printed in snippet
        snippet = snippet.replace(printed, here)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (imagenet / "golden-retriever.png").is_file()


@pytest.fixture(scope="module")
def epd_models(tmp_path_factory):
    """A folder where an EDM network, a Stable Diffusion and a published predictor have the README's names, all tiny."""
    from random_predictor import make_predictor

    from brisk import edm_nets, predictor, tiny

    place = tmp_path_factory.mktemp("epd")
    config = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
              "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}  # fmt: skip
    network = edm_nets.make_network(config)
    network._init_args, network._init_kwargs = (), config
    pickles.dump({"ema": network}, place / "edm-cifar10-32x32-uncond-vp.pkl")
    tiny.make_pipeline("sd1").save_pretrained(place / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    (place / "captions.csv").write_text("text\na red square\na blue circle\n")
    published = make_predictor(num_steps=11, dataset="ms_coco", backend="ldm", guidance_type="cfg", guidance_rate=7.5)
    document = predictor.to_document(published)
    document["schedule"] |= {"sigma_min": published.sigmas[-1].item(), "sigma_max": published.sigmas[0].item()}
    document["teacher"] = {"solver": "dpm", "M": 3}
    document["raw"] = dict(zip(("r", "weight"), (torch.zeros(10, 2).tolist(),) * 2, strict=True))
    document["raw"] |= {"scale_dir": torch.zeros(10, 2).tolist(), "scale_time": torch.zeros(10, 2).tolist(),
                        "scale_dir_range": 0.0, "scale_time_range": 0.0}  # fmt: skip
    pickles.dump_predictor(document, place / "network-snapshot-000010.pkl")
    return place


def test_epd_is_distilled_and_sampled_as_printed(epd_models, run_epd, monkeypatch, capsys):
    """The commands and the snippet of the section follow each other; only sizes, precision, launcher and device differ."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(epd_models)
    small = ["--max_train_steps=1", "--batch=2", "--batch_gpu=2", "--eval_every=0", "--mixed_precision=no", "--nosubdir=False"]
    scripts = []
    for line in epd_commands():
        words = shlex.split(line.removeprefix("accelerate launch ").removeprefix("python "))
        scripts.append(words[0])
        if words[0] == "train_epd.py":
            run_epd(*words[1:], *small, output="exps")
            continue
        AcceleratorState._reset_state(True)
        seeds = ["--seeds=0-1"] if "--seeds" in words else []
        monkeypatch.setattr(sys, "argv", [*words, *seeds])
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert [scripts.count(name) for name in ("train_epd.py", "sample_epd.py", "scripts/convert_epd_predictor.py")] == [2, 5, 1]
    assert "interval" in capsys.readouterr().out
    assert sorted(path.name for path in epd_models.glob("exps/*")) == [
        "00001-cifar10-4-5-epd-heun-3-uni1-afs", "00002-ms_coco-6-20-epd-dpm-3-discrete",
    ]  # fmt: skip
    found = sorted(str(path.relative_to(epd_models / "samples")) for path in epd_models.glob("samples/**/*.png"))
    images = [f"{folder}/000000/00000{seed}.png" for folder in ("dpmpp", "epd", "ms_coco/epd_nfe10_npoints2") for seed in (0, 1)]
    assert found == sorted([*images, "grids/cifar10/epd_nfe5_npoints2/grid_batch0000.png"])
    [snippet] = [block for block in blocks("python") if "EPDScheduler" in block]
    assert '"cuda"' in snippet
    exec(compile(snippet.replace('"cuda"', '"cpu"'), "README.md", "exec"), {})
    assert (epd_models / "castle.png").is_file()


def test_epd_is_tuned_by_a_reward_and_sampled_as_printed(epd_models, monkeypatch):
    """The commands follow each other; only sizes, reward model, launcher and device differ, and what has to be downloaded."""
    from accelerate.state import AcceleratorState
    from inprocess import train
    from tiny_rewards import open_clip_shapes, random_state, write_clip
    from transformers import CLIPTokenizer

    from brisk import predictor_files, reward_models, rewards

    monkeypatch.chdir(epd_models)
    write_clip(epd_models / rewards.H14)
    shapes = open_clip_shapes(len(CLIPTokenizer.from_pretrained(epd_models / rewards.H14)))
    torch.save(random_state(shapes), "hps.pt")
    monkeypatch.setattr(reward_models, "download", lambda repository, *rest: {"xswu/HPSv2": "hps.pt"}[repository])
    [tune, sample] = [line for block in commands() if "train_epd_rl.py" in block for line in block.splitlines()]
    [convert] = [line for line in epd_commands() if "convert_epd_predictor" in line]
    monkeypatch.setattr(sys, "argv", shlex.split(convert)[1:])
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    launch, script, *flags = shlex.split(tune)[1:]
    sizes = {"ppo.rollout_batch_size": 4, "ppo.rloo_k": 2, "ppo.minibatch_size": 2, "reward.batch_size": 2}
    small = [*(f"--override={key}={value}" for key, value in sizes.items()), "--max_train_steps=1", "--eval_samples=2"]
    assert (launch, script) == ("launch", "train_epd_rl.py") and flags[-3:] == ["--output_dir", "outputs/sd15-rl", "--nosubdir"]
    [row] = train("outputs/sd15-rl", *flags, *small, script="train_epd_rl")
    assert row["mixed_reward_std"] > 0 and row["hps_mean"] == row["mixed_reward_mean"]
    assert predictor_files.load("outputs/sd15-rl").document["stage"] == "rl"
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(sys, "argv", [*shlex.split(sample)[2:], "--seeds=0-1"])
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    assert len(list(epd_models.glob("samples/sd15-rl/**/*.png"))) == 2


def test_epd_flags_of_the_readme_have_their_defaults():
    from test_docs import parser_of

    import sample_epd
    import train_epd

    table = README.split("## 6.")[1].split("| flag | default | meaning |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) > 15
    train, sample = ({f"--{action.dest}": action.default for action in parser_of(script.parse_args)._actions}
                     for script in (train_epd, sample_epd))  # fmt: skip
    for names, default, _ in rows:
        for name, value in zip(re.findall(r"--\w+", names), [*default.split(", "), *[default] * 2], strict=False):
            if name not in ("--seeds", "--schedule_rho"):  # depend on the model and the type of levels
                assert str(train.get(name, sample.get(name))) in (value, f"{value}.0"), name


def test_shell_scripts_named_in_the_readme_exist():
    named = re.findall(r"bash (scripts/\w+\.sh)", README)
    assert {"scripts/quickstart.sh", "scripts/test.sh", "scripts/demo_bksdm.sh", "scripts/demo_fpdm.sh",
            "scripts/demo_epd.sh", "scripts/demo_epd_rl.sh", "scripts/demo_stack.sh"} <= set(named)
    for name in named:
        assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0


def test_python_snippet_runs(tmp_path):
    shutil.copytree(ROOT / "assets/tiny-teacher", tmp_path / "outputs/quickstart")
    for block in (block for block in blocks("python") if "outputs/quickstart" in block):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "seven.png").is_file()
