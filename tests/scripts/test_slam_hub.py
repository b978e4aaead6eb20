"""Uploads by the real hub client to a local stand-in: what is sent, what is not, and what a refusal looks like."""

import pytest
from conftest import read_rows
from hub_server import HubServer

from brisk import options

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"
PUSH = ("--push_to_hub", "--checkpointing_steps=1", "--validation_steps=2", "--validation_prompts=a seven",
        "--num_validation_images=1", "--validation_num_inference_steps=1", "--report_to=tensorboard")  # fmt: skip


def push(run_script, hub, output, *flags, by_variable=False):
    """Run the script against the stand-in -> (exit code, stderr)."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
                 "HF_HOME": str(output.parent / "hub-home"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    given = [] if by_variable else [f"--hub_token={TOKEN}"]
    variables |= {"HF_TOKEN": TOKEN} if by_variable else {}
    return run_script(f"--output_dir={output}", *PUSH, *given, *flags, env=variables)


def assert_token_nowhere(output, err):
    """The token is in no file of the run and was not printed."""
    assert TOKEN not in err
    leaks = [path for path in output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not leaks


def error_lines(err):
    """The lines that a refusal or failure may be one of."""
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def test_result_is_uploaded_at_the_end_without_checkpoints_and_logs(run_script, tmp_path):
    output = tmp_path / "fast-model"
    with HubServer() as hub:
        code, err = push(run_script, hub, output)
    assert code == 0, err
    assert hub.created == ["someone/fast-model"] and hub.commits == ["Upload the distilled model"]
    first_commit = next(n for n, (_, path) in enumerate(hub.requests) if "/preupload/" in path)
    assert ("POST", "/api/repos/create") in hub.requests[:first_commit]
    assert hub.tokens <= {f"Bearer {TOKEN}", None} and f"Bearer {TOKEN}" in hub.tokens
    wanted = {"model_index.json", "README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
              "unet_target/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
              "scheduler/scheduler_config.json", "train_config.yaml", "run_manifest.json"}  # fmt: skip
    assert wanted <= set(hub.files)
    unwanted = [name for name in hub.files if name.startswith(("checkpoint-", ".", "logs/")) or name.endswith(".tmp")]
    assert not unwanted
    for name, content in hub.files.items():
        assert (output / name).read_bytes() == content, name
    assert "someone/fast-model" in hub.files["README.md"].decode(), "the card's snippet must name the repository"
    assert any(name.startswith("validation/") for name in hub.files)
    assert_token_nowhere(output, err)


def test_lora_goes_to_the_named_repository_with_the_token_of_the_environment(run_script, tmp_path):
    output = tmp_path / "out"
    with HubServer() as hub:
        code, err = push(run_script, hub, output, "--use_lora", "--hub_model_id=team/lora", "--logging_dir=tb",
                         by_variable=True)  # fmt: skip
    assert code == 0, err
    assert hub.created == ["team/lora"]
    assert {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md"} <= set(hub.files)
    assert not [name for name in hub.files if name.startswith(("checkpoint-", "tb/", "unet"))]
    assert (output / "tb").is_dir()
    assert f"Bearer {TOKEN}" in hub.tokens
    assert_token_nowhere(output, err)


def test_refused_creation_is_one_sentence_before_any_training(run_script, tmp_path):
    output = tmp_path / "out"
    with HubServer(refuse_create=True) as hub:
        code, err = push(run_script, hub, output)
    assert code == 2, err
    (line,) = error_lines(err)
    assert "--push_to_hub" in line and "cannot be created" in line and "rights" in line
    assert "Traceback" not in err
    assert not read_rows(output) and not list(output.glob("checkpoint-*"))
    assert_token_nowhere(output, err)


def test_hub_that_cannot_be_reached_is_one_sentence_before_any_training(run_main, tmp_path):
    with pytest.raises(options.UserError, match="--push_to_hub: the repository 'out' cannot be created: ") as caught:
        run_main(*PUSH, f"--hub_token={TOKEN}", output=tmp_path / "out")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not read_rows(tmp_path / "out")
    assert_token_nowhere(tmp_path / "out", run_main.log())


def test_failed_upload_is_one_sentence_and_the_model_is_kept(run_script, tmp_path):
    output = tmp_path / "out"
    with HubServer(refuse_upload=True) as hub:
        code, err = push(run_script, hub, output)
    assert code == 1, err
    (line,) = error_lines(err)
    assert "the upload to 'someone/out' failed" in line and f"complete in {output}" in line and "quota" in line
    assert "Traceback" not in err
    assert (output / "model_index.json").is_file() and len(read_rows(output)) == 2
    assert not hub.files and not hub.commits
    assert_token_nowhere(output, err)
