"""The pages in docs/ against the code: error texts, flags and defaults, functions, links, snippets; the recipes too."""

import ast
import functools
import importlib
import os
import re
import subprocess

import pytest
from conftest import ROOT

import train_splam_distill_sd_wds as slam
from brisk import data, options

pytestmark = pytest.mark.quick

PAGES = sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "configs/splam").glob("*.yaml"))
RECIPES = sorted((ROOT / "scripts").glob("splam_*.sh"))
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "brisk").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
OTHER_TOOLS_FLAGS = {"--multi_gpu", "--num_processes"}  # of accelerate launch
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name):
    return (ROOT / "docs" / name).read_text()


def without_fences(text):
    return FENCE.sub("", text)


def parser_of(parse_args, monkeypatch):
    """The parser that a script's `parse_args` builds."""
    caught = {}

    def catch(parser, *rest):
        caught["parser"] = parser
        raise InterruptedError

    monkeypatch.setattr(options, "parse", catch)
    with pytest.raises(InterruptedError):
        parse_args([])
    monkeypatch.undo()
    return caught["parser"]


@functools.cache
def declared_flags():
    """The flags that any script of the repository declares, read from its source."""
    declared = {"--help"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                declared |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)
                             and isinstance(arg.value, str) and re.fullmatch(r"--\w+", arg.value)}  # fmt: skip
    return declared


def constants(node):
    """The fixed strings below a syntax node, those of f-strings included."""
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@functools.cache
def source_texts():
    """Every fixed string of the code."""
    return [text for path in SOURCES for text in constants(ast.parse(path.read_text()))]


def error_headings():
    """The fragments of messages that stand in a heading each: "### `holds a` ... `, not a`" has two."""
    found = re.findall(r"^### (`.+`)$", page("troubleshooting.md"), re.MULTILINE)
    assert len(found) > 40
    return [re.findall(r"`([^`]+)`", heading) for heading in found]


def messages():
    """{place: fixed strings} of every `UserError(...)` that the package and the scripts of the root can raise."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "brisk").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "UserError":
                found[f"{path.name}:{node.lineno}"] = [text for text in constants(node) if len(text.strip()) > 5]
    return found


def anchors(text):
    """The link targets of a page's headings, as hosts of repositories make them."""
    titles = re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("heading", error_headings(), ids=" ... ".join)
def test_error_heading_is_a_fixed_part_of_a_message(heading):
    assert all(any(fragment in text for text in source_texts()) for fragment in heading)


def test_each_error_of_the_code_has_its_heading():
    def explained(texts):
        return any(all(any(fragment in text for text in texts) for fragment in heading) for heading in error_headings())

    missing = {place: texts for place, texts in messages().items() if texts and not explained(texts)}
    assert not missing, "docs/troubleshooting.md has no entry for these"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_exist(path):
    mentioned = set(re.findall(r"(?<![\w-])--[a-z]\w*", path.read_text()))
    assert mentioned and mentioned <= declared_flags() | OTHER_TOOLS_FLAGS, (
        mentioned - declared_flags() - OTHER_TOOLS_FLAGS
    )


def test_method_flags_are_all_listed_with_their_defaults(monkeypatch):
    parser = parser_of(slam.parse_args, monkeypatch)
    defaults = {f"--{action.dest}": str(action.default) for action in parser._actions}
    table = page("splam.md").split("## Flags of the method")[1].split("\n\n**")[0]
    listed = dict(re.findall(r"^\| `(--\w+)` \| (\S+) \|", table, re.MULTILINE))
    assert len(listed) > 20
    assert listed == {name: defaults.get(name) for name in listed}
    groups = {group.title: group for group in parser._action_groups}
    wanted = {
        f"--{action.dest}" for title in ("method (arXiv 2404.13903)", "LoRA") for action in groups[title]._group_actions
    }
    assert wanted - set(listed) == {"--cast_teacher_unet"}  # accepted for old command lines, does nothing


def test_functions_of_the_equation_table_exist_and_none_is_left_out():
    table = page("splam.md").split("## Equation to function")[1].split("\n\n**")[0]
    named = re.findall(r"`(\w+)\.(\w+)`", table)
    assert len(named) > 12
    for module, function in named:
        assert callable(getattr(importlib.import_module(f"brisk.{module}"), function)), (module, function)
    tree = ast.parse((ROOT / "brisk/splam.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} <= {name for _, name in named}


def test_skip_reasons_are_the_codes():
    tree = ast.parse((ROOT / "brisk/samples.py").read_text())
    raised = {text for node in ast.walk(tree) if isinstance(node, ast.Raise) and "Skip" in ast.dump(node)
              for text in constants(node)}  # fmt: skip
    section = page("data.md").split("## What is skipped")[1].split("\n\n- ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {reason for row in rows for reason in re.findall(r"`([^`]+)`", row)} == raised


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_compile(path):
    for number, (language, body) in enumerate(FENCE.findall(path.read_text())):
        if language == "python":
            compile(body, f"{path.name} block {number}", "exec")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS, *RECIPES], ids=lambda path: path.name)
def test_text_is_of_the_project_alone(path):
    text = path.read_text()
    assert not re.search(r"\.\./shared|(?<![\w.])/(?:home|root|work|tmp|Users|mnt|opt|var)/|[A-Z]:\\\\", text)
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120 and "https://" not in line]
    assert not long, f"lines above 120 characters: {long}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_repository_files_that_are_named_exist(path):
    for name in re.findall(r"`((?:scripts|brisk|configs|docs|assets)/[\w./]*|\w+\.py)", path.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_holds_known_flags_and_needs_only_data(path):
    data = [] if path.stem == "tiny_digits" else ["--train_data_dir=images"]
    args, given = slam.parse_args([f"--config={path.stem}", *data])
    slam.check_args(args)
    assert {"pretrained_teacher_model", "output_dir"} <= given
    assert options.read_counts("", args.validation_num_inference_steps)[-1] <= args.num_ddim_timesteps
    idle = options.without_effect(given, slam.effects(args, args.mixed_precision))
    assert not idle, idle


def test_lcm_config_differs_from_the_published_one_in_gamma_alone():
    one, other = (vars(slam.parse_args([f"--config={name}", "--train_data_dir=x"])[0]) for name in ("sd15", "lcm_sd15"))
    assert {name for name in one if one[name] != other[name]} == {"config", "output_dir", "gamma_one_prob"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_runs_the_script_with_flags_it_knows(path, tmp_path):
    """`accelerate` is replaced by a script that prints its arguments."""
    fake = tmp_path / "accelerate"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    copy = tmp_path / "scripts" / path.name  # away from .venv, which comes first in PATH
    copy.parent.mkdir()
    copy.write_text(path.read_text())
    done = subprocess.run(["bash", copy, "--report_to=none", "--push_to_hub=False"], capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    launch, script, *flags = done.stdout.splitlines()
    assert launch == "launch" and (ROOT / script).is_file()
    args, _ = slam.parse_args(flags)
    slam.check_args(args)
    assert args.report_to == "none" and not args.push_to_hub, "flags at the end win"
    assert (args.learning_rate, args.train_batch_size, args.max_train_steps) == (8e-6, 12, 1000)
    assert (args.loss_type, args.ema_decay, args.adam_weight_decay) == ("huber", 0.95, 0.0)
    urls = data.expand_shards(args.train_shards_path_or_url)
    assert len(urls) == 1100 and urls[0].startswith("pipe:curl") and "/00000.tar" in urls[0]


def test_published_settings_of_the_config_and_the_recipe_agree():
    recipe = (ROOT / "scripts/splam_sd15_cc12m.sh").read_text().split("exec accelerate launch")[1]
    given = dict(re.findall(r"--(\w+)=\"?([\w.-]+)", recipe))
    config, _ = slam.parse_args(["--config=sd15"])
    shared = ("mixed_precision", "resolution", "learning_rate", "loss_type", "ema_decay", "adam_weight_decay",
              "max_train_steps", "train_batch_size", "validation_steps", "checkpointing_steps",
              "checkpoints_total_limit", "dataloader_num_workers")  # fmt: skip
    assert {name: type(getattr(config, name))(given[name]) for name in shared} == {
        n: getattr(config, n) for n in shared
    }
