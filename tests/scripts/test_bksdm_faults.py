"""Bad input to the BK-SDM script: one clear sentence before work starts, exit code 2 (1 while running), nothing written."""

import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import train_bksdm_distill as script
from brisk import options, sd_export, tiny

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def refused(run_bksdm, tmp_path):
    """A function: flags -> the sentence with which the run is refused, before any step and with nothing written."""

    def run(*flags, family="toy_sd1"):
        with pytest.raises(options.UserError) as caught:
            run_bksdm(*flags, family=family, output=tmp_path / "out")
        message = str(caught.value)
        assert caught.value.exit_code == 2
        assert message and "\n" not in message and "Traceback" not in message
        assert " step 1 " not in run_bksdm.log(), "work started before the fault was found"
        assert list((tmp_path / "out").rglob("*")) == []
        return message

    return run


@pytest.fixture
def teacher(models, tmp_path):
    """A copy of the toy teacher that a test may spoil."""
    return shutil.copytree(models["toy_sd1"], tmp_path / "teacher")


@pytest.fixture
def spoil(teacher):
    """A function: change -> the flag naming a teacher whose weights (a dict) were changed by it."""

    def change_weights(change):
        weights = load_file(teacher / WEIGHTS)
        change(weights)
        save_file(weights, teacher / WEIGHTS, metadata={"format": "pt"})
        return f"--pretrained_model_name_or_path={teacher}"

    return change_weights


# the command line


BAD_FLAGS = {
    "no data": ([], ["give one of --train_shards_path_or_url, --train_data_dir, --dataset_name, --precomputed_shards"]),
    "two sources": (["--train_data_dir=a", "--cached_latents=b"], ["give one of", "--train_data_dir"]),
    "endless stream": (["--train_shards_path_or_url=a"], ["--max_train_steps", "--max_train_samples"]),
    "two weightings": (["--train_data_dir=a", "--snr_gamma=5", "--debias"], ["--snr_gamma", "--debias", "give one"]),
    "two optimizers": (["--train_data_dir=a", "--optimizer=adafactor", "--use_8bit_adam"],
                       ["--use_8bit_adam contradicts --optimizer adafactor"]),
    "two students": (["--train_data_dir=a", "--student_config=b", "--student_init_path=c"],
                     ["give one of --unet_config_path, --student_config and --student_init_path"]),
    "nothing to encode": (["--train_shards_path_or_url=a", "--max_train_steps=1", "--pre_compute_text_embeddings"],
                          ["--pre_compute_text_embeddings needs --train_data_dir or --dataset_name", "precompute_latents.py"]),
    "nothing to swap": (["--train_data_dir=a", "--random_conditioning", "--train_batch_size=1"],
                        ["--extra_prompts_file", "--train_batch_size above 1"]),
    "negative weight": (["--train_data_dir=a", "--lambda_kd_feat=-1"], ["--lambda_kd_feat", "-1", "at least 0"]),
    "no such sampling": (["--train_data_dir=a", "--timestep_sampling=late"], ["--timestep_sampling", "late", "cubic"]),
    "no such config": (["--config=bk_smal_sd14"], ["bk_smal_sd14", "bk_small_sd14"]),
    "unknown key": (["--config={}/unknown.yaml"], ["unknown key 'unet_config_nam'", "the nearest one is unet_config_name"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_command_lines_are_refused_before_anything_is_loaded(case, tmp_path):
    (tmp_path / "unknown.yaml").write_text("unet_config_nam: bk_tiny\n")
    flags, words = BAD_FLAGS[case]
    with pytest.raises(options.UserError) as caught:
        script.main(["--pretrained_model_name_or_path=x", f"--output_dir={tmp_path}/out", *(f.format(tmp_path) for f in flags)])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_script_says_one_line_and_exits_with_code_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        options.run(script.main, [f"--pretrained_model_name_or_path={tmp_path}/none", "--train_data_dir=x",
                                  f"--output_dir={tmp_path}/out", "--report_to=none"])  # fmt: skip
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert [line for line in err.splitlines() if "none is no such folder" in line] == err.splitlines()[-1:]
    assert err.splitlines()[-1].startswith("error: --pretrained_model_name_or_path") and "Traceback" not in err


# teacher and student


@pytest.mark.parametrize(("family", "preset", "words"), [
    ("toy_sdxl", "bk_tiny", ["bk_tiny does not fit a teacher of the SDXL family", "tiny_sd_xl", "koala_700m"]),
    ("toy_sd1", "ssd_1b", ["ssd_1b does not fit a teacher of the Stable Diffusion 1 or 2 family", "bk_base, bk_small, bk_tiny"]),
    ("toy_sd1", "bk_smal", ["'bk_smal' is none of bk_base"]),
    ("sd1", "bk_small", ["the teacher has 1 layer per block already"]),
])  # fmt: skip
def test_presets_that_do_not_fit_the_teacher_are_refused(family, preset, words, refused):
    message = refused(f"--preset={preset}", family=family)
    assert message.startswith("--preset") and all(word in message for word in words)


def test_a_teacher_without_some_of_its_weights_is_refused_naming_them(refused, spoil):
    message = refused(spoil(lambda weights: [weights.pop(name) for name in ("conv_in.bias", "mid_block.resnets.0.conv1.weight")]))
    assert "lacks 2 weights of its config" in message
    assert "conv_in.bias" in message and "mid_block.resnets.0.conv1.weight" in message


def test_a_teacher_whose_weights_are_of_another_shape_is_refused_naming_them(refused, spoil):
    names = ("conv_out.weight", "conv_in.weight", "down_blocks.2.resnets.0.conv1.weight")
    message = refused(spoil(lambda weights: weights.update({name: torch.zeros(3, 3, 3, 3) for name in names})))
    assert "unet lacks 3 weights of its config: conv_in.weight (8, 4, 3, 3) (there: (3, 3, 3, 3)), " in message
    assert all(name in message for name in names)


def own_config(tmp_path, **changes):
    """The flag naming a config that differs from the toy teacher's."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps(changes))
    return f"--student_config={path}"


def test_a_student_wider_than_its_teacher_is_refused_listing_every_weight(refused, tmp_path):
    message = refused(own_config(tmp_path, block_out_channels=[8, 8, 16, 24], layers_per_block=1))
    count = int(message.split()[0])
    assert "weights of the student cannot come from this teacher" in message and count > 30
    assert message.count(": ") == count + 1 and "down_blocks.3.resnets.0.conv1.weight (24, 16, 3, 3): " in message


@pytest.mark.parametrize(("changes", "words"), [
    ({"cross_attention_dim": 48}, "it has cross_attention_dim 48, the teacher's is 32"),
    ({"block_out_channels": (8, 8, 16, 24)},
     "feature pairs of different shapes: up_blocks.0 (1, 16, 2, 2) and up_blocks.0 (1, 24, 2, 2)"),
])  # fmt: skip
def test_a_student_to_go_on_from_must_be_of_the_teachers_kind(changes, words, refused, tmp_path):
    tiny.make_unet("toy", **changes).save_pretrained(tmp_path / "student")
    assert words in refused(f"--student_init_path={tmp_path}/student")


def test_a_student_of_another_family_or_none_at_all_is_refused(refused, models, tmp_path):
    message = refused(f"--student_init_path={models['toy_sdxl']}")
    assert "it has cross_attention_dim 64, the teacher's is 32; addition_embed_type text_time" in message
    message = refused(f"--student_init_path={models['toy_sd1']}/vae")
    assert "holds a AutoencoderKL, not a UNet2DConditionModel" in message
    assert "cannot be loaded" in refused(f"--student_init_path={tmp_path}/none")


def test_impossible_settings_of_the_teacher_are_refused(refused, teacher):
    assert "--resolution 30 must be a multiple of 4" in refused("--resolution=30")
    path = teacher / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "flow"}))
    assert "flow" in refused(f"--pretrained_model_name_or_path={teacher}")


@pytest.mark.parametrize(("content", "words"), [
    ('[["mid_block"]]', "must hold a list of [teacher module, student module] pairs"),
    ('[["mid_blok", "down_blocks.3"]]', "feature pairs: teacher: the U-Net has no module mid_blok"),
    ("[", "cannot be read as JSON"),
])  # fmt: skip
def test_bad_files_of_feature_pairs_are_refused(content, words, refused, tmp_path):
    (tmp_path / "pairs.json").write_text(content)
    assert words in refused(f"--feature_set={tmp_path}/pairs.json")


def test_prompt_files_without_a_prompt_are_refused(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    flags = ("--random_conditioning", f"--extra_prompts_file={tmp_path}/")
    assert "holds no line" in refused(*flags[:1], flags[1] + "empty.txt")
    assert "--extra_prompts_file" in refused(*flags[:1], flags[1] + "none.txt")
    assert "holds no prompt" in refused(f"--validation_prompts={tmp_path}/empty.txt")


# data


def pictures(folder, count, broken=()):
    """A folder of pictures with captions, of which the numbers in `broken` are not pictures."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number}.png"
        tiny.random_image(np.random.default_rng(number), 34, 34).save(path)
        path.with_suffix(".txt").write_text("x")
        if number in broken:
            path.write_bytes(b"no picture")
    return f"--train_data_dir={folder}"


def test_folders_without_pictures_or_captions_are_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--train_data_dir {tmp_path}/empty holds no images" in refused(f"--train_data_dir={tmp_path}/empty")
    flag = pictures(tmp_path / "bare", 2)
    for path in (tmp_path / "bare").glob("*.txt"):
        path.unlink()
    assert "holds 2 images and no caption" in refused(flag)


def test_broken_pictures_stop_the_run_above_one_percent(run_bksdm, tmp_path):
    with pytest.raises(options.UserError) as caught:
        run_bksdm(pictures(tmp_path / "bad", 6, broken=(1, 4)), "--max_train_steps=20")
    assert caught.value.exit_code == 2
    assert re.match("[1-4] samples are unreadable, more than 1% of (6|12): mend the data", str(caught.value))
    assert "Samples skipped so far: " in run_bksdm.log() and "unreadable" in run_bksdm.log()


def test_a_broken_picture_among_a_hundred_is_counted_and_training_goes_on(run_bksdm, tmp_path):
    flag = pictures(tmp_path / "one", 100, broken=(50,))
    run = run_bksdm(flag, "--train_batch_size=25", "--max_train_steps=5")
    assert len(run.rows) == 5 and run.rows[-1]["skipped_samples"] >= 1


def test_a_stale_cache_is_refused_with_what_differs(refused, models, tmp_path):
    spec = importlib.util.spec_from_file_location("precompute_latents", ROOT / "scripts/precompute_latents.py")
    precompute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precompute)
    precompute.main([f"--pretrained_model_name_or_path={models['toy_sd1']}", pictures(tmp_path / "images", 2), "--resolution=32",
                     f"--output_dir={tmp_path}/latents"])  # fmt: skip
    message = refused(f"--cached_latents={tmp_path}/latents", "--resolution=40")
    assert "resolution" in message and "32" in message and "40" in message


# while running


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_naming_the_terms(run_bksdm, spoil):
    flag = spoil(lambda weights: weights["conv_out.bias"].fill_(float("nan")))
    with pytest.raises(options.UserError) as caught:
        run_bksdm(flag, "--no_copy_weight_from_teacher", "--max_train_steps=50")
    message = str(caught.value)
    assert caught.value.exit_code == 1 and message.startswith("10 steps in a row were not finite (teacher 10x, ")
    assert "loss_kd_output 10x" in message and "gradient 10x" in message
    assert "student" not in message and "loss_sd" not in message and "loss_kd_feat" not in message


def test_a_loss_table_that_cannot_be_written_does_not_end_the_run(run_bksdm, tmp_path):
    (tmp_path / "out/log_loss.csv").mkdir(parents=True)
    run = run_bksdm(output=tmp_path / "out")
    assert (run.output / "unet").is_dir()
    assert run.log.count(f"{tmp_path}/out/log_loss.csv could not be written: Is a directory.") == 1


def test_lines_of_the_log_that_were_cut_short_are_left_out_of_the_loss_table(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5, "loss_sd": step, "lr": 1, "weight/loss_sd": 2}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2], lines[1][:9]]))
    sd_export.write_loss_table(tmp_path, 2, {"lambda_sd": "loss_sd"}, pytest.fail)
    assert (tmp_path / "log_loss.csv").read_text().splitlines() == [
        "epoch,step,global_step,loss_total,loss_sd,lr,lamb_sd", "0,0,1,0.5,1,1,2", "1,0,3,0.5,3,1,2"
    ]  # fmt: skip
