"""Flags of FPDM training: spellings, the network they mean, folders, and official .pt files read without executing them."""

import argparse
import ast
import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from brisk import dit, fpdm, fpdm_options, optim, options

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_fpdm  # noqa: E402

pytestmark = pytest.mark.quick
TINY = ("--hidden_size=16", "--depth=3", "--num_heads=2", "--image_size=32", "--num_classes=5")


def parse(*flags):
    return train_fpdm.parse_args(list(flags))[0]


def config_of(*flags):
    return fpdm_options.network_config(parse(*flags))


ALIASES = {
    "--lr=0.5": "--learning_rate=0.5", "--global_seed=3": "--seed=3", "--epochs=7": "--num_train_epochs=7",
    "--log_with=none": "--report_to=none", "--ckpt_every=9": "--checkpointing_steps=9", "--num_workers=2":
    "--dataloader_num_workers=2", "--resume=latest": "--resume_from_checkpoint=latest",
    "--fp_grad_checkpointing": "--gradient_checkpointing", "--deq": "--fixed_point",
}  # fmt: skip
LAYER = ["pre_depth=2", "post_depth=3", "pre_post_timestep_conditioning", "no_grad_min_iters=1", "no_grad_max_iters=2",
         "with_grad_min_iters=3", "with_grad_max_iters=4"]  # fmt: skip


@pytest.mark.parametrize(("published", "ours"), [
    *ALIASES.items(), *((f"--deq_{flag}", f"--fixed_point_{flag}") for flag in LAYER)])  # fmt: skip
def test_both_spellings_mean_the_same(published, ours):
    dashed = published.split("=")[0].replace("_", "-") + published[len(published.split("=")[0]) :]
    args = [vars(parse(flag)) for flag in (published, ours, dashed)]
    assert args[0] == args[1] == args[2] != vars(parse())


def test_every_flag_of_the_layer_has_the_other_spelling():
    parser = options.Parser("")
    fpdm_options.add_network_options(parser)
    fpdm_options.alias_fixed_point(parser)
    spelt = [action.option_strings for action in parser._actions if any("fixed_point" in flag for flag in action.option_strings)]
    assert len(spelt) == 4
    assert all(one.replace("fixed_point", "deq") == other for one, other in spelt)


@pytest.mark.parametrize(("flag", "value"), {
    "feature_path": None, "dataset_name": "imagenet256", "name": None, "output_dir": "results", "output_subdir": "runs",
    "model": "DiT-XL/2", "num_classes": 1000, "image_size": 256, "predict_v": False, "use_zero_terminal_snr": False,
    "unsupervised": False, "dino_supervised": False, "dino_supervised_dim": 768, "flow": False, "learning_rate": 1e-4,
    "fixed_point": False, "fixed_point_pre_depth": 1, "fixed_point_post_depth": 1, "fixed_point_no_grad_min_iters": 0,
    "fixed_point_no_grad_max_iters": 10, "fixed_point_with_grad_min_iters": 1, "fixed_point_with_grad_max_iters": 12,
    "fixed_point_pre_post_timestep_conditioning": False, "num_train_epochs": 1400, "global_batch_size": 512, "seed": 0,
    "dataloader_num_workers": 4, "log_every": 100, "checkpointing_steps": 100_000, "resume_from_checkpoint": None,
    "compile": False, "debug": False, "learn_sigma": True, "ema_decay": 0.9999, "class_dropout_prob": 0.1,
    "loss_weighting": "uniform", "adam_weight_decay": 0.0, "lr_scheduler": "constant", "max_grad_norm": 1.0,
}.items())  # fmt: skip
def test_defaults_are_the_published_ones(flag, value):
    assert getattr(parse(), flag) == value


def test_debug_reports_to_tensorboard_in_a_folder_of_its_own():
    args = parse("--debug", "--report_to=wandb")
    assert (args.report_to, args.output_subdir) == ("tensorboard", "debug")


def test_every_declared_flag_is_read():
    """A flag nobody reads is a promise not kept; `local_rank` says itself that it is not used."""
    read = {f"fixed_point_{phase}_grad_{end}_iters" for phase in ("no", "with") for end in ("min", "max")}  # by getattr
    assert 'f"fixed_point_{phase}_grad_{end}_iters"' in (ROOT / "train_fpdm.py").read_text()
    for path in ("train_fpdm.py", "brisk/fpdm_options.py"):
        read |= {node.attr for node in ast.walk(ast.parse((ROOT / path).read_text()))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}  # fmt: skip
    declared = set(vars(parse())) - {"config", "local_rank", *fpdm_options.STRUCTURE}
    assert len(declared) > 60 and declared - read == set()
    for flag, name in fpdm_options.STRUCTURE.items():
        assert config_of(f"--{flag}=32")[name] == 32


@pytest.mark.parametrize(("flags", "expected"), [
    ((), {"label_type": "class", "num_classes": 1000, "prediction_type": "epsilon", "out_channels": 8, "sample_size": 32,
          "fixed_point": False, "label_dim": None, "hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16}),
    (("--unsupervised",), {"label_type": "none", "num_classes": 1}),
    (("--unsupervised", "--num_classes=7"), {"label_type": "none", "num_classes": 1}),
    (("--dino_supervised", "--dino_supervised_dim=12"), {"label_type": "vector", "label_dim": 12}),
    (("--predict_v",), {"prediction_type": "v_prediction", "zero_terminal_snr": False}),
    (("--predict_v", "--use_zero_terminal_snr"), {"prediction_type": "v_prediction", "zero_terminal_snr": True}),
    (("--flow",), {"prediction_type": "flow", "out_channels": 4}),
    (("--learn_sigma=False",), {"out_channels": 4}),
    (("--in_channels=16", "--sample_size=20"), {"in_channels": 16, "out_channels": 32, "sample_size": 20}),
    (("--image_size=512",), {"sample_size": 64, "image_size": 512}),
    (("--model=DiT-B/4", "--depth=5"), {"hidden_size": 768, "num_layers": 5, "patch_size": 4}),
    (("--deq", "--deq_pre_depth=0", "--deq_post_depth=4"), {"fixed_point": True, "pre_depth": 0, "post_depth": 4}),
])  # fmt: skip
def test_flags_mean_this_network(flags, expected):
    config = config_of(*flags)
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("labels", [(), ("--unsupervised",), ("--dino_supervised", "--dino_supervised_dim=6")])
@pytest.mark.parametrize("prediction", [(), ("--predict_v", "--use_zero_terminal_snr"), ("--flow",)])
@pytest.mark.parametrize("layer", [(), ("--fixed_point", "--deq_pre_depth=0", "--deq_post_depth=2")])
def test_every_combination_builds_a_network_of_the_right_shapes_and_back(labels, prediction, layer):
    config = config_of(*TINY, *labels, *prediction, *layer)
    network = fpdm.FPDMTransformer2DModel(**config)
    given = torch.randn(2, 6) if "--dino_supervised" in labels else torch.tensor([0, config["num_classes"]])
    output = network(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), given, num_iters=(1, 1))
    assert output.sample.shape == (2, 4 if prediction == ("--flow",) else 8, 4, 4)
    back = parse(*(f"--{flag}={value}" for flag, value in fpdm_options.flags_of(config).items() if value is not None))
    again = fpdm_options.network_config(back)
    idle = {"pre_depth", "post_depth"} if not layer else set()
    idle |= {"num_classes"} if "--dino_supervised" in labels else set()
    assert [name for name in config if again[name] != config[name] and name not in idle] == []


@pytest.mark.parametrize(("flags", "words"), [
    (("--model=DiT-XXL/2",), ("--model", "DiT-XXL/2", "DiT-XL/2")),
    (("--unsupervised", "--dino_supervised"), ("--unsupervised", "--dino_supervised")),
    (("--flow", "--predict_v"), ("--flow", "--predict_v")),
    (("--use_zero_terminal_snr",), ("--use_zero_terminal_snr", "--predict_v")),
    (("--image_size=24",), ("side 3", "patches of 2")), (("--image_size=4",), ("side 0",)),
    (("--hidden_size=30",), ("30", "16 heads")), (("--hidden_size=18", "--num_heads=3"), ("18", "4")),
])  # fmt: skip
def test_networks_that_cannot_be_are_refused(flags, words):
    with pytest.raises(options.UserError) as refused:
        config_of(*flags)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def asked(**values):
    """A sampling namespace in which only `values` were given."""
    parser = options.Parser("")
    fpdm_options.add_network_options(parser, stored=True)
    args = parser.parse_args([])
    assert all(value is None for value in vars(args).values())
    return argparse.Namespace(**{**vars(args), **values})


def test_flags_that_agree_with_the_checkpoint_pass():
    config = config_of("--fixed_point", "--predict_v")
    fpdm_options.check_agreement(asked(), config, "here")
    fpdm_options.check_agreement(asked(model="DiT-XL/2", fixed_point=True, fixed_point_pre_depth=1, predict_v=True), config, "here")
    fpdm_options.check_agreement(asked(num_classes=7), config_of("--unsupervised"), "here")


@pytest.mark.parametrize(("trained", "given", "sentence"), [
    (("--fixed_point",), {"fixed_point_pre_depth": 2}, "--fixed_point_pre_depth is 2, the network in P was trained with 1."),
    ((), {"fixed_point": True}, "--fixed_point is True, the network in P was trained with False."),
    ((), {"fixed_point_pre_depth": 1}, "--fixed_point_pre_depth is given, the network in P is a plain DiT and has no such part."),
    ((), {"model": "DiT-S/2"}, "--model is DiT-S/2, the network in P was trained with DiT-XL/2."),
    ((), {"num_classes": 10}, "--num_classes is 10, the network in P was trained with 1000."),
    (("--predict_v",), {"predict_v": False}, "--predict_v is False, the network in P was trained with True."),
    ((), {"image_size": 512}, "--image_size is 512, the network in P was trained with 256."),
])  # fmt: skip
def test_flags_that_contradict_the_checkpoint_are_named_with_both_values(trained, given, sentence):
    with pytest.raises(options.UserError) as refused:
        fpdm_options.check_agreement(asked(**given), config_of(*trained), "P")
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("flags", "name"), [
    ((), "DiT-XL-2--diff--0.000100--dit"),
    (("--fixed_point", "--deq_pre_depth=1", "--deq_post_depth=1"),
     "DiT-XL-2--diff--0.000100--fixed_point-pre_depth-1-post_depth-1-no_grad_iters-00-10-with_grad_iters-01-12"
     "-pre_post_time_cond_False"),
    (("--fixed_point", "--deq_pre_depth=4", "--deq_post_depth=4", "--predict_v", "--use_zero_terminal_snr",
      "--deq_pre_post_timestep_conditioning", "--lr=0.0025"),
     "DiT-XL-2--diff--0.002500--v--zero_snr--fixed_point-pre_depth-4-post_depth-4-no_grad_iters-00-10-with_grad_iters-01-12"
     "-pre_post_time_cond_True"),
    (("--flow", "--unsupervised", "--model=DiT-S/8"), "DiT-S-8--flow--unsupervised--0.000100--dit"),
    (("--dino_supervised",), "DiT-XL-2--diff--dino_supervised--0.000100--dit"),
])  # fmt: skip
def test_automatic_name_is_the_published_one(flags, name):
    assert train_fpdm.automatic_name(parse(*flags)) == name


def test_runs_are_numbered_on_and_the_newest_of_the_same_settings_is_resumed(tmp_path):
    flags, name = (f"--output_dir={tmp_path}",), "DiT-XL-2--diff--0.000100--dit"
    runs = tmp_path / "runs"
    assert train_fpdm.choose_folder(parse(*flags)) == runs / f"000-{name}"
    assert train_fpdm.choose_folder(parse(*flags, "--resume=latest")) == runs / f"000-{name}"
    for folder in (f"000-{name}", f"003-{name}", "004-another", "notes", f"9-{name}", f"002-{name}-old"):
        (runs / folder).mkdir(parents=True)
    assert train_fpdm.choose_folder(parse(*flags)) == runs / f"005-{name}"
    assert train_fpdm.choose_folder(parse(*flags, "--resume=latest")) == runs / f"003-{name}"
    assert train_fpdm.choose_folder(parse(*flags, "--resume=latest", "--lr=1")).name.startswith("005-")
    (runs / f"000-{name}/checkpoint-5").mkdir()
    assert train_fpdm.choose_folder(parse(*flags, "--resume=latest")) == runs / f"000-{name}", "a run without any is not newer"
    assert train_fpdm.choose_folder(parse(*flags, "--name=mine", "--output_subdir=x")) == tmp_path / "x/mine"


def test_labels_are_dropped_to_the_null_class_or_the_zero_vector():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(2000)
    dropped = train_fpdm.drop_labels(labels, 0.1, 5, draw)
    is_null = dropped == 5
    assert 0.09 < is_null.float().mean() < 0.11 and torch.equal(dropped[~is_null], labels[~is_null])
    vectors = torch.ones(2000, 3)
    rows = train_fpdm.drop_labels(vectors, 0.3, 0, draw)
    assert set(rows.sum(1).tolist()) == {0.0, 3.0} and 0.25 < (rows.sum(1) == 0).float().mean() < 0.35
    assert torch.equal(train_fpdm.drop_labels(labels, 0.0, 5, draw), labels)


def test_numbers_of_iterations_are_uniform_with_both_ends():
    args = parse("--fixed_point", "--deq_no_grad_min_iters=1", "--deq_no_grad_max_iters=3", "--deq_with_grad_max_iters=2")
    drawn = [train_fpdm.draw_iterations(args, 0, step) for step in range(3000)]
    for place, values in enumerate(([1, 2, 3], [1, 2])):
        counts = [sum(pair[place] == value for pair in drawn) for value in values]
        assert sum(counts) == 3000 and all(abs(count - 3000 / len(values)) < 150 for count in counts)
    pairs = [sum(pair == (n, m) for pair in drawn) for n in (1, 2, 3) for m in (1, 2)]
    assert all(abs(count - 500) < 100 for count in pairs), "n and m are independent"
    assert drawn == [train_fpdm.draw_iterations(args, 0, step) for step in range(3000)]
    assert train_fpdm.draw_iterations(parse(), 0, 1) is None


def official(seed=0, flags=("--fixed_point",), **changes):
    """(network, content) of a checkpoint as the published code writes it."""
    torch.manual_seed(seed)
    args = parse(*TINY, *flags)
    network = fpdm.FPDMTransformer2DModel(**fpdm_options.network_config(args))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    average = {name: value + 1 for name, value in network.state_dict().items()}
    content = {"model": network.state_dict(), "ema": average, "args": argparse.Namespace(**vars(args)), "train_steps": 7, "opt": {}}
    return network, {**content, **changes}


def same(network, weights):
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


def test_official_file_is_read_with_its_average_and_its_config(tmp_path):
    network, content = official()
    torch.save(content, tmp_path / "latest.pt")
    loaded = fpdm.load_transformer(tmp_path / "latest.pt")
    assert same(loaded, content["ema"]) and not loaded.training
    assert loaded.config.fixed_point and loaded.config.hidden_size == 16 and loaded.config.num_classes == 5
    assert same(fpdm.load_transformer(tmp_path / "latest.pt", prefer_average=False), network.state_dict())
    torch.save({name: value for name, value in content.items() if name != "ema"}, tmp_path / "bare.pt")
    assert same(fpdm.load_transformer(tmp_path / "bare.pt"), network.state_dict())


def test_args_that_the_published_code_never_had_take_their_defaults():
    config = fpdm.config_of_args(argparse.Namespace(model="DiT-S/4", fixed_point=True, fixed_point_pre_depth=2, num_classes=10,
                                                    unknown="value", feature_path=None))  # fmt: skip
    assert (config["hidden_size"], config["patch_size"], config["pre_depth"], config["post_depth"]) == (384, 4, 2, 1)
    assert config == fpdm.config_of_args({"model": "DiT-S/4", "fixed_point": True, "fixed_point_pre_depth": 2, "num_classes": 10})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("table", [(1, 4, 16), (1, 9, 16), None])
def test_launchers_prefixes_and_any_position_table_are_tolerated(prefix, table, tmp_path):
    network, content = official()
    weights = {prefix + name: value for name, value in content["ema"].items()}
    if table:
        weights[f"{prefix}pos_embed"] = torch.nn.Parameter(torch.zeros(table), requires_grad=False)
    torch.save({**content, "ema": weights}, tmp_path / "x.pt")
    loaded = fpdm.load_transformer(tmp_path / "x.pt")
    assert same(loaded, content["ema"])
    assert torch.equal(loaded.pos_embed, dit.position_table(2, 16)), "the table is made anew"


class Harm:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path):
    _, content = official()
    torch.save({**content, "extra": Harm(tmp_path / "ran")}, tmp_path / "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({**content, "extra": Harm(tmp_path / "ran")}))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(options.UserError, match=f"{name} cannot be read as a checkpoint"):
            fpdm.read_pt(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file is as harmful as it is meant to be"


@pytest.mark.parametrize(("content", "words"), [
    (b"no checkpoint", "cannot be read as a checkpoint"), ({"model": {}}, "needs model and args"), ([1], "needs model and args"),
    (None, "is no such file"),
])  # fmt: skip
def test_files_that_are_no_checkpoint_are_refused(content, words, tmp_path):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(options.UserError, match=words) as refused:
        fpdm.read_pt(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("spoil", ["missing", "shape", "unknown"])
def test_weights_that_do_not_fit_are_refused_in_one_sentence(spoil, tmp_path):
    _, content = official()
    weights = dict(content["ema"])
    if spoil == "missing":
        del weights["final_layer.linear.bias"]
    elif spoil == "shape":
        weights["final_layer.linear.bias"] = torch.zeros(3)
    else:
        weights["blocks.0.attn.qkv.bias"] = torch.zeros(3)
    torch.save({**content, "ema": weights}, tmp_path / "x.pt")
    with pytest.raises(options.UserError, match="do not fit the network") as refused:
        fpdm.load_transformer(tmp_path / "x.pt")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def trained(network):
    """An AdamW whose moments are those of one step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    sum(parameter.sum() * number for number, parameter in enumerate(network.parameters(), 1)).backward()
    optimizer.step()
    return optimizer


def resumed(path):
    """(network, average, optimizer, step, what was said) of a fresh run continued from an official file."""
    network = official(1)[0]
    ema, said = optim.EMA(copy.deepcopy(network)), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    step = train_fpdm.continue_from_pt(fpdm.read_pt(path), path, network, ema, optimizer, said.append)
    return SimpleNamespace(network=network, ema=ema, optimizer=optimizer, step=step, said=said)


def test_what_is_exported_as_pt_can_be_resumed_and_sampled(tmp_path):
    network, content = official()
    ema, optimizer = optim.EMA(copy.deepcopy(network)), trained(network)
    path = tmp_path / "checkpoints/0000009.pt"
    fpdm.write_pt(path, network, ema, optimizer, options.public(content["args"]), 9)
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"model", "ema", "opt", "args", "train_steps"} and not list(path.parent.glob("*.tmp"))
    assert stored["model"]["pos_embed"].shape == (1, 4, 16), "the published classes want the table"
    again = resumed(path)
    assert again.step == 9 and again.said == []
    assert same(again.network, network.state_dict()) and same(again.ema.network, ema.state_dict())
    assert same(fpdm.load_transformer(path), ema.state_dict())
    for one, two in zip(again.optimizer.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_moments_of_a_file_whose_position_table_was_a_parameter_are_taken_over(tmp_path):
    network, content = official()
    optimizer = trained(network).state_dict()
    moments = {number + 1: value for number, value in optimizer["state"].items()}  # number 0 is the frozen table
    torch.save({**content, "opt": {**optimizer, "state": moments}}, tmp_path / "x.pt")
    again = resumed(tmp_path / "x.pt")
    assert again.said == []
    for (_, one), two in zip(again.optimizer.state.items(), moments.values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"])


def test_moments_that_do_not_fit_are_left_out_and_it_is_said(tmp_path):
    network, content = official()
    optimizer = trained(network).state_dict()
    del optimizer["state"][3]
    torch.save({**content, "opt": optimizer}, tmp_path / "x.pt")
    again = resumed(tmp_path / "x.pt")
    assert len(again.optimizer.state) == 0 and "moments start at zero" in again.said[0] and again.step == 7
    assert same(again.network, network.state_dict())


def test_going_on_with_another_network_names_the_flag_and_both_values():
    for flags, sentence in {
        ("--model=DiT-S/2",): "--hidden_size is 1152, the network in P was trained with 384.",
        ("--fixed_point",): "--fixed_point is False, the network in P was trained with True.",
        ("--predict_v",): "--predict_v is False, the network in P was trained with True.",
        ("--learn_sigma=False",): "--learn_sigma is True, the network in P was trained with False.",
    }.items():
        with pytest.raises(options.UserError) as refused:
            fpdm_options.check_same_network(config_of(), config_of(*flags), "P")
        assert str(refused.value) == sentence
    fpdm_options.check_same_network(config_of("--fixed_point"), config_of("--deq"), "P")


def test_old_official_files_are_deleted_and_what_was_just_written_stays(tmp_path):
    network, content = official()
    ema, optimizer = optim.EMA(copy.deepcopy(network)), trained(network)

    def names(*steps, limit):
        for step in steps:
            path = tmp_path / f"checkpoints/{step:07d}.pt"
            fpdm.write_pt(path, network, ema, optimizer, options.public(content["args"]), step, limit)
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert len(names(1, 2, 3, 4, limit=None)) == 4
    (tmp_path / "checkpoints/mine.pt").touch()
    assert names(5, limit=9) == [*(f"000000{step}.pt" for step in range(1, 6)), "mine.pt"]
    assert names(6, limit=2) == ["0000005.pt", "0000006.pt", "mine.pt"]
    assert names(3, limit=1) == ["0000003.pt", "mine.pt"], "a run that went back to an older step"
