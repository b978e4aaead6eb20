"""Sources and aliases over a YAML file, and what a resumed run says about options that changed."""

import pytest

import train_splam_distill_sd_wds as script
from brisk import options
from brisk.options import UserError

pytestmark = pytest.mark.quick

SOURCES = ("train_shards_path_or_url", "train_data_dir", "dataset_name", "precomputed_shards")


def parse(*argv):
    parser = options.Parser("a test")
    options.add_data_options(parser)
    options.add_batch_options(parser)
    options.add_optimizer_options(parser, learning_rate=1e-4)
    return options.parse(parser, argv)


def config(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return f"--config={path}"


def chosen(args):
    return {name: getattr(args, name) for name in SOURCES if getattr(args, name) is not None}


@pytest.mark.parametrize("typed", SOURCES)
@pytest.mark.parametrize("written", SOURCES)
def test_a_source_on_the_command_line_replaces_the_one_of_the_yaml(tmp_path, typed, written):
    file = config(tmp_path, f"{written}: from-yaml\nresolution: 64\nimage_column: picture\n")
    for argv in ([file, f"--{typed}=typed"], [f"--{typed}", "typed", file], [file, f"--{typed.replace('_', '-')}=typed"]):
        args, given = parse(*argv)
        assert chosen(args) == {typed: "typed"}
        assert given & set(SOURCES) == {typed} and {"resolution", "image_column"} <= given
        assert (args.resolution, args.image_column) == (64, "picture"), "the rest of the file stands"
    assert chosen(parse(file)[0]) == {written: "from-yaml"}


def test_other_flags_replace_no_source(tmp_path):
    file = config(tmp_path, "dataset_name: from-yaml\ndataset_config_name: small\n")
    args, _ = parse(file, "--caption_column=alt", "--dataset_config_name=large", "--train_batch_size=3")
    assert chosen(args) == {"dataset_name": "from-yaml"} and args.dataset_config_name == "large"


def test_two_sources_of_one_place_stay_two(tmp_path):
    file = config(tmp_path, "dataset_name: a\ntrain_data_dir: b\n")
    assert set(chosen(parse(file)[0])) == {"dataset_name", "train_data_dir"}
    typed = parse("--dataset_name=a", "--train_data_dir=b")[0]
    assert set(chosen(typed)) == {"dataset_name", "train_data_dir"}
    for argv in ([file], ["--dataset_name=a", "--train_data_dir=b"]):
        args, _ = script.parse_args(["--pretrained_teacher_model=t", "--max_train_steps=1", *argv])
        with pytest.raises(UserError, match="give one of"):
            options.data_options(args)


@pytest.mark.parametrize("name", ["cached_latents", "cached-latents", "precomputed_shards"])
def test_an_alias_is_the_same_flag_in_yaml_and_on_the_command_line(tmp_path, name):
    args, given = parse(f"--{name}=typed")
    assert chosen(args) == {"precomputed_shards": "typed"} and given == {"precomputed_shards"}
    file = config(tmp_path, f"{name}: from-yaml\n")
    args, given = parse(file)
    assert chosen(args) == {"precomputed_shards": "from-yaml"} and given == {"precomputed_shards"}
    assert chosen(parse(file, "--train_data_dir=d")[0]) == {"train_data_dir": "d"}
    for other in ("cached_latents", "precomputed_shards"):
        assert chosen(parse(file, f"--{other}=typed")[0]) == {"precomputed_shards": "typed"}
    assert chosen(parse(config(tmp_path, "dataset_name: d\n"), f"--{name}=typed")[0]) == {"precomputed_shards": "typed"}


def test_a_misspelt_alias_is_told_its_nearest_flag():
    with pytest.raises(UserError, match="unknown flag --cached_latent; the nearest one is --cached_latents"):
        parse("--cached_latent=a")


def test_data_options_are_the_flags_of_the_group():
    parser = options.Parser("a test")
    options.add_data_options(parser)
    declared = {action.dest for action in parser._actions} - {"help", "config"}
    assert declared == set(options.DataOptions._fields)
    argv = ["--pretrained_teacher_model=t", "--dataset_name=n", "--image_column=i", "--proportion_empty_prompts=0.5"]
    args, _ = script.parse_args(argv)
    wanted = options.data_options(args)
    assert wanted._asdict() == {name: getattr(args, name) for name in options.DataOptions._fields}
    assert (wanted.dataset_name, wanted.image_column, wanted.proportion_empty_prompts) == ("n", "i", 0.5)


def test_changed_options_are_named_with_both_values_in_order():
    before = {"train_batch_size": 4, "loss_type": "huber", "seed": 3, "center_crop": False, "caption_column": None}
    assert options.changed_options(before, dict(before)) == []
    now = {**before, "train_batch_size": 8, "loss_type": "mse", "center_crop": True, "caption_column": "alt"}
    assert options.changed_options(before, now) == [
        "--caption_column is alt, the checkpoint had None.", "--center_crop is True, the checkpoint had False.",
        "--loss_type is mse, the checkpoint had huber.", "--train_batch_size is 8, the checkpoint had 4.",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["learning_rate", "scale_lr", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"])
def test_changed_options_that_the_optimizer_keeps_are_said_to_be_kept(name):
    assert options.changed_options({name: 0.1}, {name: 0.2}) == [
        f"--{name} is 0.2, the checkpoint had 0.1; the checkpoint's optimizer keeps it."
    ]  # fmt: skip


def test_options_that_may_change_and_those_of_other_versions_are_not_mentioned():
    before = {"output_dir": "a", "max_train_steps": 4, "resume_from_checkpoint": None, "log_every": 1, "dry_run": False,
              "local_rank": -1, "of_an_older_version": 1}  # fmt: skip
    now = {"output_dir": "b", "max_train_steps": 8, "resume_from_checkpoint": "latest", "log_every": 5, "dry_run": True,
           "local_rank": 0, "of_a_newer_version": 1}  # fmt: skip
    assert options.changed_options(before, now) == []
    assert options.changed_options({}, now) == []


def test_every_option_that_changes_silently_exists():
    args, _ = script.parse_args(["--pretrained_teacher_model=t"])
    assert (options.MAY_CHANGE | options.IN_OPTIMIZER) <= set(vars(args))
