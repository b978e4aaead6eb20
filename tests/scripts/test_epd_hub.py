"""The results of both EPD scripts go to a stand-in of the hub, without checkpoints and logs; a refusal is one sentence."""

import subprocess
import sys

import pytest
from conftest import ROOT, environment
from epd_rl_runs import SCRIPT, flags, start_file
from hub_server import HubServer


@pytest.mark.parametrize("script", ["train_epd", SCRIPT])
def test_the_result_is_uploaded_and_a_refusal_is_one_sentence(script, base_flags, tmp_path):
    if script == SCRIPT:
        given = [f"--output_dir={tmp_path / 'out'}", *flags(start_file(tmp_path), "--max_steps=1", "--eval_every=1")]
    else:
        given = base_flags(f"--output_dir={tmp_path / 'out'}", script=script)
    given = [*given, "--push_to_hub", "--report_to=tensorboard"]
    with HubServer(refuse_create=("team/forbidden",)) as hub:
        variables = environment(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN="hf_" + "aBcDeFgHiJkLmN",
                                HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1")  # fmt: skip

        def run(name):
            command = [sys.executable, ROOT / f"{script}.py", *given, f"--hub_model_id={name}"]
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)

        refused, done = run("team/forbidden"), run("team/tables")
    assert refused.returncode == 2 and "--push_to_hub" in refused.stderr and "Traceback" not in refused.stderr
    assert done.returncode == 0, done.stderr[-2000:]
    files = hub.files["team/tables"]
    assert {"export/predictor.json", "README.md", "report.json", "train_config.yaml"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint-", "logs/", "."))]
    assert list((tmp_path / "out").glob("checkpoint-*")), "there was nothing to leave out"
