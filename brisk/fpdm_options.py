"""The flags that say which DiT or FPDM network it is, shared by training (which needs them) and sampling (which may)."""

from brisk import options

SOURCES = ("feature_path", "train_shards_path_or_url", "train_data_dir", "synthetic_data")  # of training data
LOSS_WEIGHTINGS = ("uniform", "p2", "min_snr")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
STRUCTURE = {"hidden_size": "hidden_size", "depth": "num_layers", "num_heads": "num_attention_heads", "patch_size": "patch_size"}


def add_network_options(parser, stored=False):
    """Flags of the network and of what it predicts; `stored`: None by default, for a checkpoint knows them."""
    group = parser.add_argument_group("network; read from the checkpoint" if stored else "network (arXiv 2401.08741)")

    def add(name, default, text, **settings):
        group.add_argument(name, default=None if stored else default, help=text, **settings)

    def flag(name, text, default=False):
        options.add_flag(group, name, text, None if stored else default)

    count, whole = {"type": options.COUNT}, {"type": options.COUNT_OR_ZERO}
    add("--model", "DiT-XL/2", "DiT-{XL,L,B,S}/{2,4,8}: blocks, width, heads and patch of the plain DiT")
    for name, text in (("hidden_size", "width"), ("depth", "blocks of the plain DiT"), ("num_heads", "attention heads"),
                       ("patch_size", "side of a patch")):  # fmt: skip
        add(f"--{name}", None, f"{text}, in place of the model's", **count)
    add("--in_channels", 4, "channels of the latents", **count)
    add("--image_size", 256, "side of the images in pixels", **count)
    add("--sample_size", None, "side of the latents; default image_size / 8", **count)
    add("--num_classes", 1000, "number of classes", **count)
    flag("--unsupervised", "no labels: one class, no dropout, no guidance")
    flag("--dino_supervised", "labels are feature vectors")
    add("--dino_supervised_dim", 768, "their length", **count)
    flag("--predict_v", "predict v instead of the noise")
    flag("--use_zero_terminal_snr", "betas with no signal left at the last step (arXiv 2305.08891); needs --predict_v")
    flag("--flow", "straight-path flow matching instead of diffusion")
    flag("--learn_sigma", "learn the variance too (not with --flow)", True)
    flag("--fixed_point", "one fixed-point layer in place of most blocks; without it a plain DiT")
    add("--fixed_point_pre_depth", 1, "blocks before the fixed-point layer", **whole)
    add("--fixed_point_post_depth", 1, "blocks after it", **whole)
    flag("--fixed_point_pre_post_timestep_conditioning", "tell those blocks and the head the timestep as well")


def alias_fixed_point(parser):
    """Let every `--fixed_point...` be spelt `--deq...`, as the published commands do."""
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--fixed_point")]
    for flag in flags:
        parser.alias(flag, flag.replace("--fixed_point", "--deq"))


def network_config(args):
    """The config of `fpdm.FPDMTransformer2DModel` for the flags of a training run. UserError where they contradict."""
    from brisk import dit

    try:
        size = dit.size_of(args.model)
    except ValueError as error:
        raise options.UserError(f"--model: {error}") from None
    size |= {name: getattr(args, flag) for flag, name in STRUCTURE.items() if getattr(args, flag)}
    if args.unsupervised and args.dino_supervised:
        raise options.UserError("--unsupervised and --dino_supervised exclude each other.")
    if args.flow and args.predict_v:
        raise options.UserError("--flow and --predict_v are two things to predict: give one.")
    if args.use_zero_terminal_snr and not args.predict_v:
        raise options.UserError(
            "--use_zero_terminal_snr needs --predict_v True: noise says nothing about the image where no signal is left."
        )
    side = args.sample_size or args.image_size // 8
    if side < 1 or side % size["patch_size"]:
        raise options.UserError(f"latents of side {side} cannot be cut into patches of {size['patch_size']}.")
    if size["hidden_size"] % size["num_attention_heads"] or size["hidden_size"] % 4:
        raise options.UserError(
            f"a width of {size['hidden_size']} must be divisible by 4 and by {size['num_attention_heads']} heads."
        )
    learns_variance = args.learn_sigma and not args.flow
    kind = "none" if args.unsupervised else "vector" if args.dino_supervised else "class"
    return size | {
        "sample_size": side, "image_size": args.image_size, "in_channels": args.in_channels,
        "out_channels": args.in_channels * (2 if learns_variance else 1),
        "num_classes": 1 if args.unsupervised else args.num_classes, "label_type": kind,
        "label_dim": args.dino_supervised_dim if kind == "vector" else None,
        "prediction_type": "flow" if args.flow else "v_prediction" if args.predict_v else "epsilon",
        "zero_terminal_snr": args.use_zero_terminal_snr, "fixed_point": args.fixed_point,
        "pre_depth": args.fixed_point_pre_depth, "post_depth": args.fixed_point_post_depth,
        "pre_post_timestep_conditioning": args.fixed_point_pre_post_timestep_conditioning,
    }  # fmt: skip


def flags_of(config):
    """The flags' values that a network's config stands for; those that mean nothing to it are left out."""
    from brisk import dit

    values = {flag: config[name] for flag, name in STRUCTURE.items()}
    named = [name for name in dit.NAMES if dit.size_of(name) == {name: config[name] for name in STRUCTURE.values()}]
    values |= {name: config[name] for name in ("in_channels", "image_size", "sample_size")}
    values |= {
        "model": named[0] if named else None, "unsupervised": config["label_type"] == "none",
        "dino_supervised": config["label_type"] == "vector", "predict_v": config["prediction_type"] == "v_prediction",
        "use_zero_terminal_snr": config["zero_terminal_snr"], "flow": config["prediction_type"] == "flow",
        "learn_sigma": config["out_channels"] > config["in_channels"], "fixed_point": config["fixed_point"],
    }  # fmt: skip
    if config["label_type"] == "class":
        values["num_classes"] = config["num_classes"]
    if config["label_type"] == "vector":
        values["dino_supervised_dim"] = config["label_dim"]
    if config["fixed_point"]:
        outer = ("pre_depth", "post_depth", "pre_post_timestep_conditioning")
        values |= {f"fixed_point_{name}": config[name] for name in outer}
    return values


def check_agreement(args, config, where):
    """UserError naming the first network flag of `args` that is set and contradicts the stored `config`."""
    stored = flags_of(config)
    for flag, value in stored.items():
        given = getattr(args, flag)
        if given is not None and given != value:
            raise options.UserError(f"--{flag} is {given}, the network in {where} was trained with {value}.")
    foreign = [flag for flag in vars(args) if flag.startswith("fixed_point_p") and flag not in stored]
    for flag in foreign:
        if getattr(args, flag) is not None:
            raise options.UserError(f"--{flag} is given, the network in {where} is a plain DiT and has no such part.")


def check_same_network(config, stored, where):
    """UserError naming the first flag in which the networks of a run and of the checkpoint that it goes on from differ."""
    ours, theirs = flags_of(config), flags_of(stored)
    for flag in ours:
        if flag in theirs and ours[flag] != theirs[flag]:
            raise options.UserError(f"--{flag} is {ours[flag]}, the network in {where} was trained with {theirs[flag]}.")
