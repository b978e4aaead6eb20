"""Every command and code block of the README is run: as printed, but for models, data and sizes."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment

README = (ROOT / "README.md").read_text()
SMALL = ["--max_train_steps", "2", "--resolution", "32", "--train_batch_size", "2", "--validation_steps", "2",
         "--num_validation_images", "1", "--checkpointing_steps", "2", "--seed", "1"]  # fmt: skip
INSTALL = "python3 -m venv"  # the same two steps are what scripts/setup.sh does


def blocks(language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The bash blocks as single lines, the printed line breaks joined."""
    return [block.replace("\\\n", " ").strip() for block in blocks("bash")]


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


def shrink(words, place, models, shards):
    """The command with a tiny teacher, local data and small sizes; everything else as printed."""
    if words[0] == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words[2:]]
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


@pytest.mark.parametrize("line", [line for line in commands() if "scripts/" not in line or "precompute" in line])
def test_command_runs(line, workplace, models, shards):
    if line.startswith(INSTALL):
        assert "pip install -r requirements.txt -e ." in line
        return
    words = shrink(shlex.split(line), workplace, models, f"pipe:cat {shards}" if "/" in str(shards) else shards)
    if words[0] == "python":
        words[0] = sys.executable
    if "evaluate.py" in words:
        shutil.copytree(ROOT / "assets/tiny-teacher", workplace / "outputs/quickstart", dirs_exist_ok=True)
        words += ["--samples", "50", "--seeds", "1", "--teacher_steps", "2", "--model_steps", "1"]
    done = subprocess.run(words, cwd=workplace, env=environment(WANDB_MODE="offline"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_shell_scripts_named_in_the_readme_exist():
    named = re.findall(r"bash (scripts/\w+\.sh)", README)
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= set(named)
    for name in named:
        assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0


def test_python_snippet_runs(tmp_path):
    shutil.copytree(ROOT / "assets/tiny-teacher", tmp_path / "outputs/quickstart")
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "seven.png").is_file()
