"""Uploads by the real hub client to a local stand-in: what is sent, what is not, and what a refusal looks like."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import environment, read_rows
from hub_server import HubServer

from brisk import options

FLAG_TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"
ENVIRONMENT_TOKEN = "hf_" + "zYxWvUtSrQpOnMlKjIhGfEdCbA"
PUSH = ("--push_to_hub", "--checkpointing_steps=1", "--validation_steps=2", "--validation_prompts=a seven",
        "--num_validation_images=1", "--validation_num_inference_steps=1", "--report_to=tensorboard")  # fmt: skip
RUNS = {
    "forbidden": ("--hub_model_id=team/forbidden",),
    "full": ("--hub_model_id=team/full",),
    "fast-model": (f"--hub_token={FLAG_TOKEN}",),
    "lora": ("--hub_model_id=team/lora", "--use_lora", "--logging_dir=tb"),
}
DRIVER = """
import json, sys
import train_splam_distill_sd_wds as script
from accelerate.state import AcceleratorState, GradientState
from brisk import options

for flags in json.load(open(sys.argv[1])):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    code = 0
    try:
        options.run(script.main, flags)
    except SystemExit as stop:
        code = stop.code
    print("\\nexit code", code, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def pushed(base_flags, tmp_path_factory):
    """All of `RUNS`, one after the other in a process whose hub is the stand-in: (hub, runs by name)."""
    folder = tmp_path_factory.mktemp("hub")
    lines = [base_flags(f"--output_dir={folder / name}", *PUSH, *flags) for name, flags in RUNS.items()]
    (folder / "lines.json").write_text(json.dumps(lines))
    (folder / "driver.py").write_text(DRIVER)
    with HubServer(refuse_create=("team/forbidden",), refuse_upload=("team/full",)) as hub:
        variables = environment(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN=ENVIRONMENT_TOKEN,
                                HF_HOME=str(folder / "home"), NO_PROXY="127.0.0.1")  # fmt: skip
        done = subprocess.run([sys.executable, folder / "driver.py", folder / "lines.json"], env=variables,
                              capture_output=True, text=True, timeout=240)  # fmt: skip
    blocks = done.stderr.replace("\r", "\n").split("\nexit code ")
    assert done.returncode == 0 and len(blocks) == len(RUNS) + 1, done.stderr
    codes = [int(block.split("\n")[0]) for block in blocks[1:]]
    runs = {name: SimpleNamespace(code=code, err=err, output=folder / name,
                                  errors=[line for line in err.split("\n") if line.startswith("error: ")])
            for name, code, err in zip(RUNS, codes, blocks, strict=False)}  # fmt: skip
    return hub, runs


def test_result_is_uploaded_at_the_end_without_checkpoints_and_logs(pushed):
    hub, runs = pushed
    run, files = runs["fast-model"], hub.files["someone/fast-model"]
    assert run.code == 0 and not run.errors, run.err
    assert hub.created.count("someone/fast-model") == 1
    assert hub.commits["someone/fast-model"] == ["Upload the trained model"]
    wanted = {"model_index.json", "README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
              "unet_target/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
              "scheduler/scheduler_config.json", "train_config.yaml", "run_manifest.json"}  # fmt: skip
    assert wanted <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint-", ".", "logs/")) or name.endswith(".tmp")]
    assert list(run.output.glob("checkpoint-*")) and (run.output / "logs").is_dir(), "there was nothing to leave out"
    for name, content in files.items():
        assert (run.output / name).read_bytes() == content, name
    assert "someone/fast-model" in files["README.md"].decode(), "the card's snippet must name the repository"
    assert any(name.startswith("validation/") for name in files)


def test_lora_goes_to_the_named_repository_without_the_renamed_logs(pushed):
    hub, runs = pushed
    files = hub.files["team/lora"]
    assert runs["lora"].code == 0, runs["lora"].err
    assert {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint-", "tb/", "unet"))]
    assert (runs["lora"].output / "tb").is_dir()


def test_token_of_the_flag_wins_over_that_of_the_environment(pushed):
    hub, _ = pushed
    used = {name: {token for path, token in hub.requests if f"/{name}/" in path and token} for name in hub.files}
    assert used == {"someone/fast-model": {f"Bearer {FLAG_TOKEN}"}, "team/lora": {f"Bearer {ENVIRONMENT_TOKEN}"}}


def test_repository_is_created_before_and_filled_after_training(pushed):
    hub, _ = pushed
    paths = [path for path, _ in hub.requests]
    assert [path for path in paths if path == "/api/repos/create"] == ["/api/repos/create"] * len(RUNS)
    before = paths[: next(n for n, path in enumerate(paths) if "/preupload/" in path)]
    assert before.count("/api/repos/create") == 2, "forbidden and full, before the upload to full"


def test_refused_creation_is_one_sentence_before_any_training(pushed):
    run = pushed[1]["forbidden"]
    assert run.code == 2, run.err
    (line,) = run.errors
    assert "--push_to_hub" in line and "cannot be created" in line and "rights" in line
    assert "Traceback" not in run.err
    assert not read_rows(run.output) and not list(run.output.glob("checkpoint-*"))


def test_failed_upload_is_one_sentence_and_the_model_is_kept(pushed):
    hub, runs = pushed
    run = runs["full"]
    assert run.code == 1, run.err
    (line,) = run.errors
    assert "the upload to 'team/full' failed" in line and f"complete in {run.output}" in line and "quota" in line
    assert "Traceback" not in run.err
    assert (run.output / "model_index.json").is_file() and len(read_rows(run.output)) == 2
    assert "team/full" not in hub.files


def test_tokens_are_in_no_file_and_not_on_the_screen(pushed):
    for run in pushed[1].values():
        for token in (FLAG_TOKEN, ENVIRONMENT_TOKEN):
            assert token not in run.err
            files = [path for path in run.output.rglob("*") if path.is_file()]
            assert not [path for path in files if token.encode() in path.read_bytes()]


def test_hub_that_cannot_be_reached_is_one_sentence_before_any_training(run_main, tmp_path):
    with pytest.raises(options.UserError, match="--push_to_hub: the repository 'out' cannot be created: ") as caught:
        run_main(*PUSH, f"--hub_token={FLAG_TOKEN}", output=tmp_path / "out")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not read_rows(tmp_path / "out") and FLAG_TOKEN not in run_main.log()
