"""Command line: precedence, spelling, ranges, YAML files, and secrets that must never be written."""

import argparse
import ast
import json
import re
import subprocess
import sys
import types

import pytest

import train_splam_distill_sd_wds as script
from brisk import options
from brisk.options import UserError

pytestmark = pytest.mark.quick

PUBLISHED = [
    "--pretrained_teacher_model=runwayml/stable-diffusion-v1-5", "--output_dir=out", "--mixed_precision=fp16",
    "--resolution=512", "--learning_rate=8e-6", "--loss_type=huber", "--ema_decay=0.95", "--adam_weight_decay=0.0",
    "--max_train_steps=1000", "--max_train_samples=4000000", "--dataloader_num_workers=8",
    "--train_shards_path_or_url=pipe:curl -L -s https://host/data/cc12m-train-{00000..01099}.tar?download=true",
    "--validation_steps=200", "--checkpointing_steps=200", "--checkpoints_total_limit=10", "--train_batch_size=12",
    "--gradient_checkpointing", "--enable_xformers_memory_efficient_attention", "--gradient_accumulation_steps=1",
    "--use_8bit_adam", "--resume_from_checkpoint=latest", "--report_to=wandb", "--seed=453645634", "--push_to_hub",
]  # fmt: skip
TEACHER = "--pretrained_teacher_model=t"


def make_parser():
    parser = options.Parser("a test")
    parser.add_argument("--learning_rate", type=options.NOT_NEGATIVE, default=1e-4)
    parser.add_argument("--train_batch_size", type=options.COUNT, default=16)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--output_dir", default="out")
    options.add_flag(parser, "--center_crop", "crop")
    return parser


def parse(argv, folder="configs"):
    return options.parse(make_parser(), argv, folder)


def config(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return f"--config={path}"


def test_flag_beats_yaml_beats_default(tmp_path):
    chosen = config(tmp_path, "learning_rate: 2e-5\ntrain_batch_size: 3\n")
    args, given = parse([chosen, "--train_batch_size", "5"])
    assert (args.learning_rate, args.train_batch_size, args.output_dir) == (2e-5, 5, "out")
    assert {"learning_rate", "train_batch_size"} <= given and "output_dir" not in given
    args, _ = parse(["--train_batch_size", "5", chosen])
    assert args.train_batch_size == 5, "also where --config comes last"


def test_config_is_found_by_name(tmp_path):
    config(tmp_path, "train_batch_size: 7", "tiny.yaml")
    assert parse(["--config", "tiny"], tmp_path)[0].train_batch_size == 7
    with pytest.raises(UserError, match="neither a file nor one of tiny"):
        parse(["--config", "huge"], tmp_path)


@pytest.mark.parametrize("value", ["no", "'no'", "bf16"])
def test_yaml_values_that_look_like_booleans_reach_choices_as_written(tmp_path, value):
    args, _ = parse([config(tmp_path, f"mixed_precision: {value}\n")])
    assert args.mixed_precision == value.strip("'")


@pytest.mark.parametrize("text", ["center_crop: true", "center_crop: True", "center-crop: yes", "center_crop: 'on'"])
def test_yaml_booleans_and_dashes(tmp_path, text):
    assert parse([config(tmp_path, text)])[0].center_crop is True


def test_yaml_null_leaves_the_default(tmp_path):
    args, given = parse([config(tmp_path, "learning_rate: null\nmixed_precision: ~\ntrain_batch_size:\n")])
    assert (args.learning_rate, args.mixed_precision, args.train_batch_size) == (1e-4, None, 16)
    assert not {"learning_rate", "mixed_precision", "train_batch_size"} & given


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rte: 1", "unknown key 'learning_rte'; the nearest one is learning_rate"),
        ("config: x.yaml", "unknown key 'config'"),
        ("learning_rate: [1, 2]", "'learning_rate' must be a single value"),
        ("learning_rate: {a: 1}", "'learning_rate' must be a single value"),
        ("- learning_rate", "must hold 'flag: value' lines"),
        ("learning_rate: [", "cannot be read as YAML"),
        ("a: b: c", "cannot be read as YAML"),
        ("learning_rate: fast", "'fast' is not a number"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse([config(tmp_path, text)])
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_binary_config_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        parse([f"--config={tmp_path}/c.yaml"])


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--center_crop"], True), (["--center-crop"], True), (["--center_crop", "True"], True),
        (["--center_crop=true"], True), (["--center_crop", "False"], False), (["--center-crop=no"], False), ([], False),
    ],
)  # fmt: skip
def test_booleans_bare_or_with_a_value(argv, expected):
    assert parse(argv)[0].center_crop is expected


def test_dashes_in_names_only():
    args, given = parse(["--learning-rate=1e-5", "--output-dir", "my-out-dir", "--train-batch-size=2"])
    assert (args.learning_rate, args.output_dir, args.train_batch_size) == (1e-5, "my-out-dir", 2)
    assert given == {"learning_rate", "output_dir", "train_batch_size"}
    assert parse(["--output-dir=a-b=c-d"])[0].output_dir == "a-b=c-d"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning_rte=1"], "unknown flag --learning_rte; the nearest one is --learning_rate."),
        (["--learning"], "unknown flag --learning"),
        (["stray"], "'stray' is not a flag"),
        (["--center_crop=maybe"], "'maybe' is neither True nor False"),
        (["--train_batch_size=0"], "0 is out of range, it must be at least 1"),
        (["--train_batch_size=1.5"], "'1.5' is not a whole number"),
        (["--learning_rate=-1"], "out of range"),
        (["--learning_rate=nan"], "'nan' is not a number"),
        (["--learning_rate=inf"], "'inf' is not a number"),
        (["--learning_rate=x"], "'x' is not a number"),
        (["--learning_rate"], "expected one argument"),
        (["--mixed_precision=fp8"], "invalid choice"),
        (["--config"], "expected one argument"),
    ],
)
def test_bad_flags_are_one_sentence(argv, message):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ranges_include_and_exclude_their_ends():
    assert options.FRACTION("0") == 0 and options.FRACTION("1") == 1 and options.POSITIVE("1e-9") == 1e-9
    for kind, text in (
        (options.FRACTION, "1.01"), (options.FRACTION, "-0.1"), (options.POSITIVE, "0"), (options.BELOW_ONE, "1"),
        (options.COUNT_OR_ZERO, "-1"), (options.number(int, low=4), "3"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
            kind(text)


def test_published_command_line_parses_unchanged():
    args, given = script.parse_args(PUBLISHED)
    script.check_args(args)
    options.data_options(args)
    wanted = {
        "mixed_precision": "fp16", "learning_rate": 8e-6, "loss_type": "huber", "ema_decay": 0.95, "push_to_hub": True,
        "adam_weight_decay": 0.0, "max_train_steps": 1000, "max_train_samples": 4_000_000, "dataloader_num_workers": 8,
        "gradient_checkpointing": True, "enable_xformers_memory_efficient_attention": True, "use_8bit_adam": True,
        "w_scale": 8.0, "num_ddim_timesteps": 50, "gamma_one_prob": 0.0, "gamma_min": 0.0, "subpath_param": "paper",
        "train_shards_path_or_url": "pipe:curl -L -s https://host/data/cc12m-train-{00000..01099}.tar?download=true",
        "huber_c": 1e-3, "timestep_scaling_factor": 10.0, "unet_time_cond_proj_dim": 256, "seed": 453645634,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    names = {flag[2:].split("=")[0] for flag in PUBLISHED}
    assert names - given == {"ema_decay", "validation_steps", "gradient_accumulation_steps"}, "those are the defaults"
    assert options.without_effect(given, script.effects(args, "fp16")) == []


def test_contradictions_are_refused():
    shards = "--train_shards_path_or_url=a.tar"
    for argv, message in (
        ([TEACHER], "give one of"),
        ([TEACHER, shards, "--train_data_dir=d"], "give one of"),
        ([TEACHER, shards], "endless stream"),
        ([TEACHER, "--dataset_name=n", "--train_data_dir=d"], "give one of .*--dataset_name"),
        ([TEACHER, "--dataset_name=n", "--precomputed_shards=a", "--dry_run"], "give one of"),
        ([TEACHER, "--cached_latents=a"], "endless stream"),
        ([TEACHER, "--train_data_dir=d", "--wds_max_pwatermark=0.5"], "wds_max_pwatermark"),
        ([TEACHER, "--dataset_name=n", "--wds_max_pwatermark=0.5"], "wds_max_pwatermark"),
        ([TEACHER, "--train_data_dir=d", "--gamma_min=1"], "out of range"),
        ([], "pretrained_teacher_model"),
    ):
        with pytest.raises(UserError, match=message):
            args = script.parse_args(argv)[0]
            script.check_args(args)
            options.data_options(args)
    for fine in (["--dry_run"], [shards, "--max_train_samples=10"], ["--precomputed_shards=a", "--max_train_steps=1"],
                 ["--dataset_name=n"], ["--train_data_dir=d"], [shards, "--dry_run"]):  # fmt: skip
        args = script.parse_args([TEACHER, *fine])[0]
        script.check_args(args)
        assert options.data_options(args).precomputed_shards == args.precomputed_shards


def test_flags_without_effect_are_named():
    args, given = script.parse_args(
        [TEACHER, "--train_data_dir=d", "--huber_c=0.1", "--lora_rank=4", "--ema_decay=0.9"]
    )
    sentences = options.without_effect(given, script.effects(args, "no"))
    assert sentences == [
        "--lora_rank has no effect without --use_lora.", "--huber_c has no effect without --loss_type huber.",
    ]  # fmt: skip
    args, given = script.parse_args(
        [TEACHER, "--precomputed_shards=a", "--random_flip", "--use_lora", "--ema_decay=0.9"]
    )
    named = " ".join(options.without_effect(given, script.effects(args, "no")))
    assert "--random_flip" in named and "--ema_decay" in named and "--use_lora has" not in named
    columns = ["--dataset_config_name=c", "--image_column=i", "--caption_column=t"]
    for source, wanted in (
        ("--dataset_name=n", []), ("--train_data_dir=d", ["dataset_config_name"]),
        ("--train_shards_path_or_url=a", ["caption_column", "dataset_config_name", "image_column"]),
    ):  # fmt: skip
        args, given = script.parse_args([TEACHER, source, *columns])
        named = [sentence.split()[0] for sentence in options.without_effect(given, script.effects(args, "no"))]
        assert sorted(named) == [f"--{name}" for name in wanted]


def test_every_declared_flag_is_read(root):
    """A flag nobody reads is a promise not kept; flags that say themselves that they are not used are exempt."""
    parser = []
    patched = options.parse

    def capture(made, argv, folder):
        parser.append(made)
        return patched(made, argv, folder)

    options.parse = capture
    try:
        script.parse_args([TEACHER])
    finally:
        options.parse = patched
    def read_of(path, variable):
        """The attributes of `variable` that a file reads."""
        return {
            node.attr
            for node in ast.walk(ast.parse((root / path).read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable
        }

    data_flags = read_of("brisk/sources.py", "wanted") | read_of("train_splam_distill_sd_wds.py", "wanted")
    assert data_flags <= set(options.DataOptions._fields)
    read = read_of("train_splam_distill_sd_wds.py", "args") | data_flags
    declared = {a.dest for a in parser[0]._actions if a.dest not in ("help", "config")}
    exempt = {a.dest for a in parser[0]._actions if re.match("accepted", a.help or "")}
    assert len(declared) > 70
    assert declared - read - exempt == set()
    assert exempt <= {"local_rank", "cast_teacher_unet"}


def test_every_flag_has_a_help_text_and_help_shows_the_default():
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0


SECRETS = ("hf_abcdefGHIJ1234567890", "s3cr3tvalue", "pa55word")


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer s3cr3tvalue", "bearer s3cr3tvalue", "Authorization: Basic s3cr3tvalue",
        "x hf_abcdefGHIJ1234567890 y",
        "https://me:pa55word@host/a.tar", "https://host/a.tar?token=s3cr3tvalue&x=1",
        "https://s3/a?X-Amz-Signature=s3cr3tvalue&X-Amz-Credential=pa55word", "--password=pa55word",
        "api_key=s3cr3tvalue", "pipe:curl -H 'Authorization: Bearer hf_abcdefGHIJ1234567890' https://h/{0..9}.tar",
        "pipe:curl -u me:pa55word https://h/a.tar", "pipe:curl --user me:pa55word https://h/a.tar",
        "pipe:curl -H 'PRIVATE-TOKEN: s3cr3tvalue' https://h/a.tar", "HF_TOKEN=s3cr3tvalue",
    ],
)  # fmt: skip
def test_secrets_are_redacted(text):
    shown = options.redact(text)
    assert not any(secret in shown for secret in SECRETS)
    assert "<secret>" in shown


@pytest.mark.parametrize(
    "text",
    [
        "pipe:curl -L -s https://host/data/cc12m-train-{00000..01099}.tar?download=true", "a basic teacher_1.tar",
        "runwayml/stable-diffusion-v1-5", "portrait photo of a girl, token of love", "s3://bucket/key:1",
    ],
)  # fmt: skip
def test_harmless_text_is_left_alone(text):
    assert options.redact(text) == text


def test_public_options_hold_no_token_anywhere():
    token = "plain-token-without-prefix"
    args, _ = script.parse_args(
        [TEACHER, f"--hub_token={token}", f"--train_shards_path_or_url=pipe:curl -H 'X: {token}' https://u:p@h/a.tar",
         f"--output_dir=runs/{token}", "--validation_prompts=a hf_abcdefGHIJ1234567890"]
    )  # fmt: skip
    values = options.public(args)
    written = json.dumps(values)
    assert token not in written and "u:p@" not in written and "hf_abc" not in written
    assert "hub_token" not in values and values["learning_rate"] == 1e-4 and values["push_to_hub"] is False


def test_written_options_are_a_config_that_repeats_the_run(tmp_path):
    import yaml

    args, _ = script.parse_args([TEACHER, "--mixed_precision=no", "--train_data_dir=d", "--center_crop", "--seed=3",
                                 "--learning_rate=8e-6"])  # fmt: skip
    path = tmp_path / "train_config.yaml"
    path.write_text(yaml.safe_dump(options.public(args)))
    again, _ = script.parse_args([f"--config={path}"])
    different = {k: v for k, v in vars(again).items() if v != getattr(args, k)}
    assert different == {"config": str(path)}


def test_prompts_come_from_a_string_a_file_or_the_defaults(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert options.read_prompts(str(path)) == ["a cat", "a dog"]
    assert options.read_prompts("a cat| a dog |") == ["a cat", "a dog"]
    assert len(options.read_prompts(None)) == 4
    for nothing in (" | ", str(tmp_path / "empty.txt")):
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(UserError, match="validation_prompts"):
            options.read_prompts(nothing)


def test_lists_of_counts():
    assert options.read_counts("--n", "1, 2,4") == [1, 2, 4]
    for text in ("", "0,1", "1,,2", "two", "-1"):
        with pytest.raises(UserError, match="--n is"):
            options.read_counts("--n", text)


def test_run_turns_user_errors_into_one_line_and_an_exit_code(capsys):
    def fail(argv):
        raise UserError(f"it is wrong, hf_abcdefGHIJ1234567890 {argv}", 3)

    with pytest.raises(SystemExit) as stop:
        options.run(fail, ["x"])
    printed = capsys.readouterr()
    assert stop.value.code == 3 and printed.out == ""
    assert printed.err == "error: it is wrong, <secret> ['x']\n"


def test_an_error_is_written_in_one_piece(monkeypatch):
    pieces = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=lambda text: text and pieces.append(text), flush=lambda: None))
    monkeypatch.setenv("RANK", "1")

    def fail(argv):
        raise UserError("no")

    with pytest.raises(SystemExit):
        options.run(fail)
    assert pieces == ["[process 1] error: no\n"], "lines of several processes would run into each other"


def test_script_ends_with_code_2_and_one_line_for_a_bad_flag(root):
    done = subprocess.run([sys.executable, "train_splam_distill_sd_wds.py", "--resolutoin=3", TEACHER], cwd=root,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown flag --resolutoin; the nearest one is --resolution.\n"


def test_ctrl_c_ends_a_script_with_a_word_and_130(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        options.run(interrupted)
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"
