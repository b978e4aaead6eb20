"""Bad input: one clear sentence and exit code 2 (1 for failures while running), no traceback, what was saved stays."""

import functools
import http.server
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image
from safetensors.torch import load_file, save_file

from brisk import checkpoint, data, options, runlog, splam


@pytest.fixture
def refused(run_main):
    """A function: flags -> the UserError with which the run is refused, before any step and within one sentence."""

    def run(*flags, exit_code=2, **options_):
        with pytest.raises(options.UserError) as caught:
            run_main(*flags, **options_)
        message = str(caught.value)
        assert caught.value.exit_code == exit_code
        assert message and "\n" not in message and "Traceback" not in message
        assert " step 1 " not in run_main.log(), "work started before the fault was found"
        return message

    return run


@pytest.fixture
def teacher(models, tmp_path):
    """A copy of the sd1 teacher that a test may spoil."""
    return shutil.copytree(models["sd1"], tmp_path / "teacher")


def change_json(path, **changes):
    """Update the JSON object in the file `path`."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_tar(path, members):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def png(width=48, height=40, colour=(200, 30, 30)):
    """A one-colour picture as PNG bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, format="PNG")
    return stream.getvalue()


def good(number):
    """The members of one usable sample."""
    return [(f"{number:05d}.png", png()), (f"{number:05d}.txt", b"a red square")]


BAD_FLAGS = {
    "unknown flag": (["--learning_rat=1"], ["unknown flag --learning_rat", "--learning_rate"]),
    "no value in range": (["--num_ddim_timesteps=0"], ["--num_ddim_timesteps", "0", "at least 1"]),
    "not a number": (["--train_batch_size=many"], ["--train_batch_size", "many"]),
    "not a choice": (["--loss_type=l1"], ["--loss_type", "l1", "huber"]),
    "no data": (["--max_train_steps=1"], ["--train_shards_path_or_url", "--train_data_dir", "--dataset_name"]),
    "two sources": (["--train_shards_path_or_url=a", "--train_data_dir=b"], ["one of", "--train_data_dir"]),
    "endless stream": (["--train_shards_path_or_url=a.tar"], ["--max_train_steps", "--max_train_samples"]),
    "no sampling steps": (["--train_data_dir=b", "--validation_num_inference_steps=0,2"],
                          ["--validation_num_inference_steps", "0,2"]),
    "no prompt": (["--train_data_dir=b", "--validation_prompts= | "], ["--validation_prompts"]),
    "stray word": (["--train_data_dir=b", "word"], ["'word'", "not a flag"]),
    "no such config": (["--config=nonesuch"], ["--config nonesuch"]),
    "neither true nor false": (["--random_flip=maybe"], ["--random_flip", "maybe"]),
    "negative rate": (["--learning_rate=-1", "--train_data_dir=b"], ["--learning_rate", "-1"]),
    "not finite rate": (["--learning_rate=nan", "--train_data_dir=b"], ["--learning_rate", "nan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_command_line_is_refused_before_anything_is_imported(case):
    import train_splam_distill_sd_wds as script

    flags, words = BAD_FLAGS[case]
    with pytest.raises(options.UserError) as caught:
        args, _ = script.parse_args(["--pretrained_teacher_model=teacher", *flags])
        script.check_args(args)
        options.data_options(args)
        options.read_counts("--validation_num_inference_steps", args.validation_num_inference_steps)
        options.read_prompts(args.validation_prompts)
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("flags", "words"), (
    (["--pretrained_teacher_model=x", "--train_data_dir=y", "--resolutoin=512"], ["--resolutoin", "--resolution"]),
    (["--train_data_dir=y"], ["--pretrained_teacher_model"]),
    (["--config={}/wrong.yaml", "--pretrained_teacher_model=x"], ["learning_rte", "learning_rate"]),
    (["--config={}/broken.yaml", "--pretrained_teacher_model=x"], ["broken.yaml", "YAML"]),
))  # fmt: skip
def test_script_says_one_line_and_exits_2(flags, words, run_script, tmp_path):
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1.0\n")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    code, err = run_script(*(flag.format(tmp_path) for flag in flags), bare=True)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in lines[0] for word in words)


@pytest.fixture(scope="module")
def say_all(tmp_path_factory):
    """A driver script: calls the training script's `run` once per command line of a JSON file, prints the exit codes."""
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text("import json, sys\nimport train_splam_distill_sd_wds as script\nfrom brisk import options\n"
                    "for flags in json.load(open(sys.argv[1])):\n    try:\n        options.run(script.main, flags)\n"
                    "        code = 0\n    except SystemExit as stop:\n        code = stop.code\n"
                    "    print('code', code, file=sys.stderr, flush=True)\n")  # fmt: skip
    return path


def test_faults_found_after_the_imports_are_one_error_line_with_exit_code_2(say_all, base_flags, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--pretrained_teacher_model=/no/such/folder"], ["--pretrained_teacher_model /no/such/folder"]),
        ([f"--output_dir={tmp_path}/file/below"], ["--output_dir", "cannot be written"]),
        ([f"--train_data_dir={tmp_path}/none"], ["--train_data_dir", "not a folder"]),
        ([f"--train_shards_path_or_url={tmp_path}/none.tar"], ["none.tar", "gave no sample"]),
        (["--report_to=mlflow"], ["--report_to mlflow"]),
    ]
    lines = [base_flags(f"--output_dir={tmp_path}/out", *flags) for flags, _ in cases]
    (tmp_path / "cases.json").write_text(json.dumps(lines))
    done = subprocess.run([sys.executable, say_all, tmp_path / "cases.json"], env=environment(), capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    blocks = done.stderr.split("code ")
    for (flags, words), block, following in zip(cases, blocks, blocks[1:], strict=False):
        errors = [line for line in block.replace("\r", "\n").splitlines() if "error: " in line]
        assert len(errors) == 1 and errors[0].startswith("error: "), (flags, block)
        assert all(word in errors[0] for word in words), errors
        assert following.startswith("2"), flags
    assert len(blocks) == len(cases) + 1


def test_model_folder_faults_are_named(refused, teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused(f"--pretrained_teacher_model={tmp_path / 'empty'}")
    assert "hub model" in refused("--pretrained_teacher_model=nobody/nothing")
    flag, index = f"--pretrained_teacher_model={teacher}", teacher / "model_index.json"
    intact = index.read_text()
    change_json(index, _class_name="FluxPipeline")
    assert "FluxPipeline" in refused(flag)
    index.write_text("{")
    assert str(teacher) in refused(flag)
    index.write_text(intact)
    change_json(teacher / "unet/config.json", _class_name="PixArtTransformer2DModel")
    message = refused(flag)
    assert "PixArtTransformer2DModel" in message and "UNet2DConditionModel" in message


@pytest.mark.parametrize("name", ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
def test_missing_component_is_named(name, refused, teacher):
    shutil.rmtree(teacher / name)
    assert name in refused(f"--pretrained_teacher_model={teacher}")


@pytest.mark.parametrize("path", ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors", "unet/config.json"))  # fmt: skip
def test_truncated_component_is_named(path, refused, teacher):
    file = teacher / path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert path.split("/")[0] in refused(f"--pretrained_teacher_model={teacher}")


def test_unet_without_some_weights_is_refused(refused, teacher):
    file = teacher / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_out.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert "conv_out.weight" in refused(f"--pretrained_teacher_model={teacher}")


def test_impossible_schedules_are_refused(refused):
    assert "zero terminal SNR" in refused("--prediction_type=epsilon", family="sd2")
    message = refused("--num_ddim_timesteps=2000")
    assert "2000" in message and "between 1 and 1000" in message
    assert "multiple of 4" in refused("--resolution=30")


def test_folder_faults_are_named(refused, tmp_path):
    assert "not a folder" in refused(f"--train_data_dir={tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(f"--train_data_dir={tmp_path / 'empty'}")
    (tmp_path / "empty/a.png").write_bytes(png())
    assert "no caption" in refused(f"--train_data_dir={tmp_path / 'empty'}")
    (tmp_path / "empty/metadata.jsonl").write_text('{"file_name": "a.png"\n')
    assert "metadata.jsonl" in refused(f"--train_data_dir={tmp_path / 'empty'}")


def test_output_below_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(output=tmp_path / "file/out")
    assert "--output_dir" in message and "cannot be written" in message


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("url", (
    "{}/none-{{000..004}}.tar", "pipe:curl -s -f http://127.0.0.1:9/{{00..10}}.tar", "{}/empty.tar", "pipe:false",
    "http://127.0.0.1:9/a.tar", "{}/text.tar",
))  # fmt: skip
def test_shards_without_any_sample_stop_the_run(url, workers, refused, tmp_path):
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "text.tar").write_text("this is no archive")
    message = refused(f"--train_shards_path_or_url={url.format(tmp_path)}", f"--dataloader_num_workers={workers}")
    assert "gave no sample" in message


@pytest.mark.parametrize("workers", (0, 1))
def test_only_unusable_samples_stop_the_run_with_the_reasons(workers, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "HOPELESS", 40)
    members = [("0.png", b""), ("0.txt", b"zero bytes"), ("1.txt", b"no picture"), ("2.png", png()),
               ("3.png", b"nonsense"), ("3.txt", b"x")]  # fmt: skip
    shard = write_tar(tmp_path / "bad.tar", members)
    message = refused(f"--train_shards_path_or_url={shard}", f"--dataloader_num_workers={workers}")
    for reason in ("0 of 40 samples usable", "unreadable image", "no image", "no caption"):
        assert reason in message


def test_filters_that_leave_nothing_stop_the_run(refused, shards, monkeypatch):
    monkeypatch.setattr(data, "HOPELESS", 40)
    message = refused(f"--train_shards_path_or_url={shards}", "--wds_min_size=4000")
    assert "40 x smaller than the minimum size" in message


def test_bad_samples_among_good_ones_are_skipped_and_counted(run_main, tmp_path):
    members = [member for number in range(6) for member in good(number)]
    members += [("a.png", b""), ("a.txt", b"zero bytes"), ("b.png", png(20000, 1)), ("b.txt", b"20,000 pixels wide"),
                ("c.png", png()[:60]), ("c.txt", b"cut"), ("d.txt", b"no picture"), ("e.json", b"{broken"),
                ("f.gif", b"GIF89a"), ("f.txt", b"unknown kind"), ("noextension", b"x")]  # fmt: skip
    shard = write_tar(tmp_path / "mixed.tar", members)
    run = run_main(f"--train_shards_path_or_url={shard}", "--max_train_steps=12")
    last = run.rows[-1]
    assert last["step"] == 12 and last["skipped_samples"] >= 4 and np.isfinite(last["loss"])


def test_picture_of_20000_pixels_a_side_is_skipped_not_decoded(run_main, tmp_path):
    header = io.BytesIO()
    Image.new("1", (20000, 20000)).save(header, format="PNG")
    members = [("big.png", header.getvalue()), ("big.txt", b"a bomb"), *good(0), *good(1)]
    run = run_main(f"--train_shards_path_or_url={write_tar(tmp_path / 'big.tar', members)}", "--max_train_steps=3")
    assert run.rows[-1]["skipped_samples"] >= 1
    assert run.rows[-1]["step"] == 3


def test_truncated_shard_is_reported_and_its_head_is_used(run_main, shards, tmp_path):
    whole = open(data.expand_shards(shards)[0], "rb").read()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 2 // 3 + 200])
    run = run_main(f"--train_shards_path_or_url={tmp_path / 'cut.tar'}", "--max_train_steps=8")
    assert run.rows[-1]["step"] == 8
    assert "cut.tar is broken after" in run.log


def test_one_dead_url_among_good_shards_is_reported_and_training_goes_on(run_main, shards, tmp_path):
    run = run_main(f"--train_shards_path_or_url={tmp_path}/none.tar::{shards}", "--max_train_steps=20")
    assert run.rows[-1]["step"] == 20
    assert "none.tar is broken after 0 samples" in run.log


def test_shards_through_a_pipe_give_the_same_run_as_from_disk(run_main, shards):
    direct = run_main("--max_train_steps=3")
    piped = run_main(f"--train_shards_path_or_url=pipe:cat {shards}", "--max_train_steps=3")
    assert [row["loss"] for row in piped.rows] == [row["loss"] for row in direct.rows]


@pytest.mark.parametrize("prefix", ("pipe:curl -L -s ", ""))
def test_shards_through_http_with_braces_and_a_query_give_the_same_run_as_from_disk(prefix, run_main, shards):
    folder, pattern = shards.rsplit("/", 1)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/moved/"):  # a redirect, as hubs answer
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/moved"))
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"{prefix}http://127.0.0.1:{server.server_address[1]}/moved/{pattern}?download=true"
    try:
        direct = run_main("--max_train_steps=10")
        fetched = run_main(f"--train_shards_path_or_url={url}", "--max_train_steps=10", "--dataloader_num_workers=0")
    finally:
        server.shutdown()
        server.server_close()
    assert [row["loss"] for row in fetched.rows] == [row["loss"] for row in direct.rows]
    assert {f"/synthetic-0000{number}.tar?download=true" for number in (0, 1)} <= set(asked)


def test_steps_that_are_not_finite_are_skipped_then_stop_the_run_with_the_terms(run_main, teacher):
    path = teacher / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(options.UserError) as caught:
        run_main(f"--pretrained_teacher_model={teacher}", "--max_train_steps=50", "--checkpointing_steps=4")
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert "10 steps in a row were not finite" in message and "--learning_rate" in message
    for term in ("teacher 10x", "target 10x", "student 10x", "loss 10x", "gradient 10x"):
        assert term in message
    assert "latents" not in message and "prompt embeddings" not in message


def poison_from(monkeypatch, first, last):
    """Make the loss of the optimizer steps in [first, last] not a number."""
    original, count = splam.distillation_loss, iter(range(1, 10**6))

    def loss(*args):
        value = original(*args)
        return value * float("nan") if first <= next(count) <= last else value

    monkeypatch.setattr(splam, "distillation_loss", loss)


def test_a_single_bad_step_is_skipped_and_counted_and_leaves_the_weights_finite(run_main, monkeypatch):
    poison_from(monkeypatch, 2, 2)
    run = run_main("--max_train_steps=4", "--checkpointing_steps=1")
    assert [row["skipped_steps"] for row in run.rows] == [0, 1, 1, 1]
    files = [run.output / f"checkpoint-{step}/unet/diffusion_pytorch_model.safetensors" for step in (1, 2, 3)]
    states = [load_file(file) for file in files]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "the bad step changed weights"
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert all(torch.isfinite(value).all() for value in states[2].values())


@pytest.mark.parametrize("flags", ((), ("--use_8bit_adam",), ("--gradient_accumulation_steps=2",)), ids=" ".join)
def test_run_that_turns_bad_stops_with_its_earlier_checkpoints_intact(flags, run_main, monkeypatch, tmp_path):
    micro = 2 if "--gradient_accumulation_steps=2" in flags else 1
    poison_from(monkeypatch, 6 * micro, 10**6)
    with pytest.raises(options.UserError) as caught:
        run_main("--max_train_steps=60", "--checkpointing_steps=4", "--log_every=5", *flags, output=tmp_path / "out")
    assert caught.value.exit_code == 1 and "loss 10x" in str(caught.value)
    assert checkpoint.damage(tmp_path / "out/checkpoint-4") is None
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values()), folder


def test_bad_run_of_the_script_says_one_line_and_exits_1(fork_script, teacher, tmp_path):
    path = teacher / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    flags = (f"--pretrained_teacher_model={teacher}", "--max_train_steps=30")
    process = fork_script(f"--output_dir={tmp_path / 'out'}", *flags)
    code, err = process.wait(), process.err()
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "not finite" in errors[0]
    assert "Traceback" not in err


def test_full_disk_keeps_the_earlier_checkpoint_and_ends_with_a_clear_sentence(fork_script, run_main, tmp_path):
    """A file-size limit below the U-Net's stands for the full disk: writes fail, small files still pass."""
    output = tmp_path / "out"
    first = run_main("--max_train_steps=4", "--checkpointing_steps=2", output=output)
    kept = (first.output / "checkpoint-4/unet/diffusion_pytorch_model.safetensors").read_bytes()
    process = fork_script(
        f"--output_dir={output}", "--max_train_steps=7", "--checkpointing_steps=2", "--checkpoints_total_limit=1",
        "--resume_from_checkpoint=latest",
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    code, err = process.wait(), process.err()
    text = err.replace("\r", "\n")
    assert "checkpoint-6 could not be saved" in text and "earlier checkpoints are kept" in text
    assert " step 7 " in text, "the run must go on after a checkpoint that could not be saved"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, err
    assert "final model could not be written" in errors[0] and "--resume_from_checkpoint=latest" in errors[0]
    assert "Traceback" not in text
    assert checkpoint.damage(output / "checkpoint-4") is None
    assert (output / "checkpoint-4/unet/diffusion_pytorch_model.safetensors").read_bytes() == kept
    assert not (output / "checkpoint-6").exists() and not list(output.glob(".checkpoint-*"))
    again = run_main("--max_train_steps=7", "--resume_from_checkpoint=latest", output=output)
    assert again.rows[-1]["step"] == 7


def test_stop_signal_with_a_checkpoint_that_cannot_be_saved_does_not_promise_to_go_on(run_main, monkeypatch):
    flush = runlog.RunLog.flush

    def flush_and_stop(self, *args, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return flush(self, *args, **named)

    def no_space(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog.RunLog, "flush", flush_and_stop)
    monkeypatch.setattr(checkpoint, "_publish", no_space)
    with pytest.raises(SystemExit) as stopped:
        run_main("--max_train_steps=4")
    assert stopped.value.code == 143
    assert "No space left on device" in run_main.log()
    assert "go on with --resume_from_checkpoint=latest" not in run_main.log()
