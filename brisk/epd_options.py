"""The flags that train_epd.py and sample_epd.py share: which model it is, and on which noise levels it is sampled."""

from brisk import options

DATASETS = ("cifar10", "ffhq", "afhqv2", "imagenet64", "lsun_bedroom", "lsun_cat", "imagenet256", "lsun_bedroom_ldm", "ms_coco")
BACKENDS = ("edm", "adm", "cm", "ldm", "sd", "dit", "pixart", "sd3", "flux", "gmm")
SCHEDULE_TYPES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
GUIDANCE_TYPES = ("cg", "cfg", "uncond")


def add_model_options(parser):
    """Which model: `model_options` makes a `denoiser_sources.ModelOptions` of them."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--dataset_name", help=f"what the model draws: {', '.join(DATASETS)}, or a name of your own")
    add("--pretrained_model_name_or_path", help="pipeline (folder or hub id); of edm a .pkl or folder of the network")
    add("--backend", choices=BACKENDS, help="family of the model; default: by dataset_name, else by the pipeline")
    add("--revision", help="revision of the hub repository")
    add("--variant", help="variant of the weight files, as fp16")
    add("--cache_dir", help="cache of downloaded models")
    add("--resolution", type=options.COUNT, help="side of the images in pixels; default: the model's own")
    add("--gmm_file", help="JSON file of a mixture of Gaussians, FILE or FILE:NAME; the model of --backend gmm")
    add("--classifier", help="module:function of yours; called without arguments it returns the classifier of guidance cg: "
        "(network input, network time) -> logits")  # fmt: skip
    add("--guidance_type", choices=GUIDANCE_TYPES, help="classifier (cg), classifier-free (cfg), unconditional; default none")
    add("--guidance_rate", type=options.NOT_NEGATIVE, help="scale of the guidance")
    parser.alias("--pretrained_model_name_or_path", "--model_path", "--model_id")


def model_options(args):
    """The `denoiser_sources.ModelOptions` of a namespace."""
    from brisk.denoiser_sources import ModelOptions

    return ModelOptions(
        args.dataset_name, args.backend, args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir,
        args.resolution, args.gmm_file,
    )  # fmt: skip
