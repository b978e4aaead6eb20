"""The pages in docs/ against the code: error texts, flags and defaults, functions, links, snippets; the recipes too."""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import sample_epd
import sample_fpdm
import train_bksdm_distill as bksdm
import train_epd as epd
import train_epd_rl as epd_rl
import train_fpdm as fpdm
import train_splam_distill_sd_wds as slam
from brisk import bksdm as method
from brisk import data, dit, epd_rl_options, eval_measures, fpdm_options, options, protocols, report, rewards

pytestmark = pytest.mark.quick

PAGES = sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "configs/splam").glob("*.yaml"))
BKSDM_CONFIGS = sorted((ROOT / "configs/bksdm").glob("*.yaml"))
FPDM_CONFIGS = sorted((ROOT / "configs/fpdm").glob("*.yaml"))
EPD_CONFIGS = sorted((ROOT / "configs/epd").glob("*.yaml"))
RECIPES = sorted((ROOT / "scripts").glob("splam_*.sh"))
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "brisk").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
OTHER_TOOLS_FLAGS = {"--multi_gpu", "--num_processes", "--config_file"}  # of accelerate launch
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name):
    return (ROOT / "docs" / name).read_text()


def without_fences(text):
    return FENCE.sub("", text)


def parser_of(parse_args):
    """The parser that a script's `parse_args` builds."""
    caught = {}

    def catch(parser, *rest):
        caught["parser"] = parser
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(options, "parse", catch)
        parse_args([])
    return caught["parser"]


@functools.cache
def declared_flags():
    """The flags that any script of the repository declares, read from its source, and those that FPDM's and EPD's put together."""
    declared = {"--help"}
    for script in (fpdm, sample_fpdm, epd, epd_rl, sample_epd):
        declared |= set(parser_of(script.parse_args)._option_string_actions)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                declared |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)
                             and isinstance(arg.value, str) and re.fullmatch(r"--\w+", arg.value)}  # fmt: skip
    return declared


def constants(node, without=frozenset()):
    """The fixed strings below a syntax node, those of f-strings included; not those of the nodes `without`."""
    return [part.value for part in ast.walk(node)
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part not in without]  # fmt: skip


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
    """{place: fixed strings} of every `UserError(...)` that the package and the scripts of the root can raise.

    Of a class for pipelines of diffusers, where nothing catches them, of every ValueError.
    """
    found = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "brisk").glob("*.py")]:
        kinds = ("UserError", "ValueError") if path.stem == "epd_scheduler" else ("UserError",)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in kinds:
                braces = [part for part in ast.walk(node) if isinstance(part, ast.FormattedValue)]
                keys = {part for brace in braces for part in ast.walk(brace)}
                found[f"{path.name}:{node.lineno}"] = [text for text in constants(node, keys) if len(text.strip()) > 5]
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


METHODS = [
    # page, script, groups of flags whose every member is listed, flags that are not
    ("splam", slam, ("method (arXiv 2404.13903)", "LoRA"), {"--cast_teacher_unet"}),  # of old command lines, does nothing
    ("bksdm", bksdm, ("teacher and student", "method (arXiv 2305.15798)", "frozen networks", "average and validation"), set()),
    ("fpdm", fpdm, ("network (arXiv 2401.08741)", "training (arXiv 2401.08741, section 3)"), set()),
    ("epd", epd, ("model", "student (arXiv 2507.14797)", "teacher", "training (section 3)", "precision, memory and speed",
                  "names and snapshots"), set()),
]
MODULES = {  # whose every function is in the equation table, where not the page's own
    "fpdm": ("dit", "gaussian", "fixed_point"),
    "epd": ("sigmas", "solvers", "epd", "epd_distill", "denoiser_maps", "epd_policy", "dirichlet"),
}  # fmt: skip
SECTIONS = [  # page, its section, script, groups of flags whose every member is listed there and no other
    ("fpdm", "Sampling", sample_fpdm, ("sampler", "fixed-point layer")),
    ("epd", "Sampling", sample_epd, ("predictor, or solver in place of it", "images", "output", "speed")),
    ("epd", "Stage 2", epd_rl, ("method (arXiv 2512.22796)", "precision, memory and speed", "names",
                                "export of a run's policy, in place of training")),
    ("evaluate", "Flags", evaluate, ("what to measure", "how", "cost and speed", "output")),
]  # fmt: skip


def flags_of_table(table):
    """{flag: default} of a table whose first columns they are."""
    return dict(re.findall(r"^\| `(--\w+)` \| (\S+) \|", table, re.MULTILINE))


@pytest.mark.parametrize("name, script, titles, unlisted", METHODS, ids=[method[0] for method in METHODS])
def test_method_flags_are_all_listed_with_their_defaults(name, script, titles, unlisted):
    parser = parser_of(script.parse_args)
    defaults = {f"--{action.dest}": str(action.default) for action in parser._actions}
    table = page(f"{name}.md").split("## Flags of the method")[1].split("\n\n**")[0]
    listed = flags_of_table(table)
    assert len(listed) > 20
    assert listed == {name: defaults.get(name) for name in listed}
    groups = {group.title: group for group in parser._action_groups}
    wanted = {f"--{action.dest}" for title in titles for action in groups[title]._group_actions}
    assert wanted - set(listed) == unlisted


@pytest.mark.parametrize("name, section, script, titles", SECTIONS, ids=[script.__name__ for _, _, script, _ in SECTIONS])
def test_flags_of_a_section_are_all_listed_with_their_defaults(name, section, script, titles):
    groups = [group for group in parser_of(script.parse_args)._action_groups if group.title in titles]
    actions = [action for group in groups for action in group._group_actions]
    actions = [action for action in actions if action.dest != "list_protocols"]  # prints and stops
    wanted = {f"--{action.dest}": str(None if action.default == [] else action.default) for action in actions}
    assert len(groups) == len(titles)
    assert flags_of_table(page(f"{name}.md").split(f"\n## {section}")[1].split("\n## ")[0]) == wanted


RECIPES_OF_RL = ("rl_sd15", "rl_sd3_512", "rl_sd3_1024", "rl_flux_dev")


def values_of_keys(*flags):
    """{key: value} of a command line of train_epd_rl.py, the keys that are flags included."""
    args, _, settings, _ = epd_rl.parse_args(list(flags))
    return settings | {key: getattr(args, flag) for key, flag in epd_rl_options.FLAGS.items()}


def read_value(cell):
    """What a cell of the table of keys says: JSON, or plain text."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def test_yaml_keys_are_all_listed_with_their_defaults_and_shipped_values():
    rows = rows_below("\n### Settings", "epd.md")
    defaults, recipes = values_of_keys(), [values_of_keys(f"--config={name}") for name in RECIPES_OF_RL]
    assert {key.strip("`"): read_value(default) for key, default, *_ in rows} == defaults
    for key, _, shipped, _ in rows:
        key = key.strip("`")
        found = [recipe[key] for recipe in recipes]
        if shipped == "own":
            assert len({str(value) for value in found} - {str(defaults[key])}) > 1, key
            continue
        stated = [read_value(cell) for cell in shipped.split(" / ")] if shipped else [defaults[key]]
        assert found == (stated * 4 if len(stated) == 1 else stated), key


def test_rewards_of_the_epd_page_are_the_codes():
    listed = [row[0].strip("`") for row in rows_below("\n### Rewards", "epd.md")]
    assert listed == [*rewards.MIXED, *rewards.ALONE, "module:function"]


def test_protocols_of_the_evaluate_page_are_the_codes():
    rows = {name.strip("`"): cells for name, *cells in rows_below("\n## Protocols", "evaluate.md")}
    assert list(rows) == list(protocols.PROTOCOLS)
    drawn_for = {"handwriting": {"handwriting captions"}, "captions": {"captions"}, "classes": {"classes", "digits"},
                 None: {"nothing"}}  # fmt: skip
    for name, (images, conditions, px, metrics, reference) in rows.items():
        protocol = protocols.PROTOCOLS[name]
        count = str(protocol.samples) + f" x {protocol.seeds}" * (protocol.seeds > 1)
        assert images == (count if protocol.samples else "`--samples`")
        assert conditions in drawn_for[protocol.conditions]
        assert px == str(protocol.resolution or "own") and metrics == ", ".join(protocol.metrics)
        assert not reference.endswith(".npz`") or reference.strip("`") in protocol.reference


def test_metrics_models_keys_and_weights_of_the_evaluate_page_are_the_codes():
    rows = rows_below("\n## Metrics", "evaluate.md")
    named = [name for row in rows for name in row[0].split(", ")]
    assert sorted(named) == sorted([*protocols.METRICS, "module:function"])
    for row in rows:
        assert {name for name in re.findall(r"`(\w+)`", row[1])} <= set(report.QUALITY)
        module, function = re.findall(r"`(\w+)\.(\w+)`", row[3])[0]
        assert callable(getattr(importlib.import_module(f"brisk.{module}"), function))
    assert {row[0].strip("`") for row in rows_below("\n## Models", "evaluate.md")} == set(evaluate.KEYS)
    heads = [key for row in rows_below("The keys of `--weights`:", "evaluate.md") for key in re.findall(r"`([\w.]+)`", row[0])]
    given = eval_measures.reward_settings([f"{key}=file" for key in heads])
    assert given.keys() == {*eval_measures.MAIN_KEY, "inception", "torchscript"}


def test_costs_and_keys_of_the_report_on_the_evaluate_page_are_the_codes():
    assert {row[0].strip("`") for row in rows_below("\n## Cost", "evaluate.md")} <= set(report.COST)
    keys = rows_below("| key of `report.json` |", "evaluate.md")
    assert {key for row in keys for key in re.findall(r"`(\w+)`", row[0])} == set(report.RESERVED)


@pytest.mark.parametrize("name", [method[0] for method in METHODS])
def test_functions_of_the_equation_table_exist_and_none_is_left_out(name):
    table = page(f"{name}.md").split("## Equation to function")[1].split("\n## ")[0].split("\n\n**")[0]
    named = re.findall(r"`(\w+)\.(\w+)`", table)
    assert len(named) > 12
    for module, function in named:
        assert callable(getattr(importlib.import_module(f"brisk.{module}"), function)), (module, function)
    for module in MODULES.get(name, (name,)):
        tree = ast.parse((ROOT / f"brisk/{module}.py").read_text())
        public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
        assert public <= {name for _, name in named}


def rows_below(heading, name="fpdm.md"):
    """The cells of the first table below a heading or text of a page, without the table's head."""
    table = page(name).split(heading)[1].split("\n|---")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]


def test_sizes_on_the_fpdm_page_are_the_stored_counts():
    counts = json.loads((ROOT / "tests/assets/conformance/fpdm/counts.json").read_text())["params"]
    keys = ("model", "num_classes", "fixed_point", "pre", "learn_sigma")
    count = {tuple(row[key] for key in keys): row["params"] for row in counts}
    rows = rows_below("\n## Sizes")
    assert [f"DiT-{row[0]}" for row in rows] == [name for patch in "248" for name in dit.NAMES if name.endswith(patch)]
    for size, *cells in rows:
        def of(classes, depth, model=f"DiT-{size}"):
            return count[model, classes, depth > 0, depth, True]

        saved = f"{100 * of(1000, 1) / of(1000, 0) - 100:.1f} %"
        wanted = [*(of(1000, depth) for depth in (0, 1, 2, 4)), of(1, 0), of(1, 1)]
        assert cells == [f"{number:,}" + f" ({saved})" * (place == 1) for place, number in enumerate(wanted)]


def test_costs_on_the_fpdm_page_follow_from_the_counts():
    def work(pre, n, m):  # multiply-accumulates of an image; a backward pass is two forward ones
        shared, each = (dit.fixed_point_macs(1152, 256, pre, pre, k) for k in (0, 1))
        return 3 * shared + (n + 3 * m) * (each - shared)

    plain = 28 * dit.macs(1152, 256)["block"]
    counted = [3 * plain, *(work(pre, 5, 6.5) for pre in (1, 4, 1))]
    parameters = [674834720, 86500256, 229931168, 85349408]
    for (names, batch, *cells), macs, count in zip(rows_below("no recomputation:"), counted, parameters, strict=True):
        for name in re.findall(r"`(\w+)`", names):
            assert fpdm.parse_args([f"--config={name}"])[0].global_batch_size == int(batch)
        total = 2 * macs * int(batch) * 400_000
        assert cells == [f"{2e-12 * macs:.3f}", f"{1e-18 * total:.1f}", f"{total / 3.6e17:.0f}", f"{20e-9 * count:.1f}"]
    for iterations, *cells in rows_below("the plain DiT has\n118.4:"):
        ours, theirs = (dit.fixed_point_macs(1152, 256, 1, 1, int(iterations), hoisted) for hoisted in (True, False))
        assert cells == [f"{ours / 1e9:.1f}", f"{theirs / 1e9:.1f}", str(int(20 * plain // ours))]
    assert f"{plain / 1e9:.1f}" == "118.4"


def test_sizes_on_the_bksdm_page_are_those_of_the_stored_counts():
    table = page("bksdm.md").split("## Sizes")[1].split("\n\nThe mid")[0]
    counts = json.loads((ROOT / "tests/assets/conformance/bksdm/param_counts.json").read_text())["unets"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][1:]
    families = {"SD1": ("sd1_teacher", "_sd1"), "SD2, 64": ("sd2_base_teacher", "_sd2_base"),
                "SD2, 96": ("sd2_v_teacher", "_sd2_v"), "SDXL": ("sdxl_teacher", "")}  # fmt: skip
    renamed = {"small_sd_xl": "sdxl_small", "tiny_sd_xl": "sdxl_tiny"}
    seen, teacher, suffix = set(), None, None
    for title, parameters, change, work in rows:
        begin = [values for start, values in families.items() if title.startswith(start)]
        teacher, suffix = begin[0] if begin else (teacher, suffix)
        names = [renamed.get(name, name + suffix) for name in re.findall(r"`(\w+)`", title)] or [teacher]
        found = [counts[name] for name in names]
        seen |= set(names)
        expected = [f"{one['macs_total'] / 1e9:.1f} ({one['macs_thop_convention'] / 1e9:.1f})" for one in found]
        assert work == ", ".join(expected)
        if parameters != "as above":
            assert parameters == f"{found[0]['params']:,}"
            against = found[0]["params"] / counts[teacher]["params"] - 1
            assert change == (f"{100 * against:.1f} %" if against else "")
    assert seen == set(counts)


def test_feature_pairs_on_the_bksdm_page_are_as_many_as_the_stored_ones():
    stored = json.loads((ROOT / "tests/assets/conformance/bksdm/feature_pairs.json").read_text())
    renamed = {"bk_base": "sd_base", "bk_small": "sd_small", "bk_tiny": "sd_tiny", "small_sd_xl": "sdxl_small",
               "tiny_sd_xl": "sdxl_tiny", "segmind_vega": "ssd_1b"}  # fmt: skip
    section = page("bksdm.md").split("### Feature sets")[1].split("\n#")[0]
    stated = {}
    for name, presets, counts in re.findall(r"^\| `(\w+)` \| (`.+`) \| ([\d, ]+) \|", section, re.MULTILINE):
        presets, counts = re.findall(r"`(\w+)`", presets), counts.split(", ")
        stated |= {preset: (name, int(count)) for preset, count in
                   zip(presets, counts * (len(presets) // len(counts)), strict=True)}  # fmt: skip
    assert set(stated) == set(method.PRESETS)
    for preset, (name, count) in stated.items():
        assert method.PRESETS[preset].feature_set == name
        assert len(stored[f"{renamed.get(preset, preset)}/{name}"]) == count


@pytest.mark.parametrize("name", ["fpdm", "epd"])
def test_figures_of_the_demo_have_one_delimited_place(name):
    assert len(re.findall(r"<!-- demo figures: begin -->\n.*?\n<!-- demo figures: end -->", page(f"{name}.md"), re.DOTALL)) == 1


def test_figures_of_the_demo_of_rl_have_one_delimited_place():
    assert len(re.findall(r"<!-- rl demo figures: begin -->\n.*?<!-- rl demo figures: end -->", page("epd.md"), re.DOTALL)) == 1


def test_skip_reasons_are_the_codes():
    tree = ast.parse((ROOT / "brisk/samples.py").read_text())
    raised = {text for node in ast.walk(tree) if isinstance(node, ast.Raise) and "Skip" in ast.dump(node)
              for text in constants(node)}  # fmt: skip
    section = page("data.md").split("## What is skipped")[1].split("\n\n- ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {reason for row in rows for reason in re.findall(r"`([^`]+)`", row)} == raised


def test_skip_reasons_of_latents_are_the_codes():
    tree = ast.parse((ROOT / "brisk/latent_rows.py").read_text())
    texts = {text for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Call) for text in constants(node)}
    [listed] = re.findall(r"- A sample that cannot be used is skipped and counted: (.*?), and for", page("data.md"), re.DOTALL)
    reasons = re.findall(r"`([^`]+)`", listed)
    assert len(reasons) == 6 and set(reasons) <= texts


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_compile(path):
    for number, (language, body) in enumerate(FENCE.findall(path.read_text())):
        if language == "python":
            compile(body, f"{path.name} block {number}", "exec")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_parse_as_printed(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    blocks = [body for language, body in FENCE.findall(path.read_text()) if language == "bash"]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
        if not words or not words[0].endswith(".py"):
            continue
        script = importlib.import_module(Path(words[0]).stem)
        if script.__name__ == "convert_bksdm":
            words[2] = str(tmp_path)  # looks whether the checkpoint is there
        if script.__name__ == "convert_epd_predictor":
            words[1] = str(path)  # looks whether the file is there
        parsed = script.parse_args(words[1:])
        if script in (slam, bksdm):
            script.check_args(parsed[0])
            options.data_options(parsed[0])
        if script is epd:
            script.check_args(parsed[0])
        if script is epd_rl and not parsed[0].export:
            epd_rl_options.check(*parsed[2:])
        if script is fpdm:
            script.check_args(parsed[0])
            fpdm_options.network_config(parsed[0])
            assert not options.without_effect(parsed[1], script.effects(parsed[0], parsed[0].mixed_precision))


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


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS, *BKSDM_CONFIGS, *FPDM_CONFIGS, *EPD_CONFIGS, *RECIPES],
                         ids=lambda path: f"{path.parent.name}/{path.name}")  # fmt: skip
def test_text_is_of_the_project_alone(path):
    text = path.read_text()
    assert not re.search(r"\.\./shared|(?<![\w.])/(?:home|root|work|tmp|Users|mnt|opt|var)/|[A-Z]:\\\\", text)
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120 and "https://" not in line]
    assert not long, f"lines above 120 characters: {long}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_repository_files_that_are_named_exist(path):
    for name in re.findall(r"`((?:scripts|brisk|configs|docs|assets)/[\w./]*|\w+\.py)", path.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_configs_that_are_named_exist(path):
    named = set(re.findall(r"--config (\w+)", path.read_text()))
    assert named <= {config.stem for config in [*CONFIGS, *BKSDM_CONFIGS, *FPDM_CONFIGS, *EPD_CONFIGS]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_holds_known_flags_and_needs_only_data(path):
    data = [] if path.stem == "tiny_digits" else ["--train_data_dir=images"]
    args, given = slam.parse_args([f"--config={path.stem}", *data])
    slam.check_args(args)
    options.data_options(args)
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
    options.data_options(args)
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
