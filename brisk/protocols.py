"""Published ways to measure image generators: how many images of what, drawn and resized how, compared with what.

A figure means nothing without these: they are written into every record, with whatever a run changed.
"""

from typing import NamedTuple

from brisk.options import UserError, nearest

L14, G14 = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
REWARDS = ("hps", "pickscore", "imagereward", "clip", "aesthetic", "mps")
METRICS = ("agreement", "frechet", "fid", "kid", "is", "pr", *REWARDS)
SPELLINGS = {"pick": "pickscore", "inception_score": "is", "precision": "pr", "recall": "pr", "precision_recall": "pr",
             "image_reward": "imagereward"}  # fmt: skip
NVLABS = "of nvlabs-fi-cdn.nvidia.com/edm/fid-refs"


class Protocol(NamedTuple):
    """One way to measure."""

    text: str  # what it is, and whose
    conditions: str | None  # what images are drawn for: "captions" of a file, "handwriting" captions, "classes"; None: nothing
    samples: int | None  # images of one set
    seeds: int = 1  # sets; image j of set s has the seed first_seed + s samples + j
    first_seed: int = 0
    metrics: tuple = ()
    extractor: str = "inception"
    clean: bool = False  # resize to the extractor's 299 px by Pillow as clean-fid does; else by the extractor itself
    resolution: int | None = None  # px, of drawing; None: the model's own
    measured_at: int | None = None  # px, to which images are resized before anything is measured
    resize_filter: str = "bicubic"
    jpeg: int | None = None  # quality of the stored files, and of what is resized; None: PNG
    nfe: tuple = ()  # sampling budgets; none: the model's own
    scheduler: str | None = None
    guidance_scale: float | None = None
    clip_model: str = L14
    reference: str | None = None  # where to get what images are compared with, the end of a message
    prompts: str | None = None  # where to get the captions, the end of a message


PROTOCOLS = {
    "builtin": Protocol(
        "The handwriting set that comes with brisk: a small classifier reads digit and colours off the images, and the Frechet "
        "distance in its features is to 2,000 held-out real images.", "handwriting", 200, 3,
        metrics=("agreement", "frechet"), extractor="handwriting", nfe=(50, 4, 2, 1), guidance_scale=2.0,
    ),
    "builtin_classes": Protocol(
        "As builtin, for models of the digits 0 to 9 by class on black paper.", "classes", 200, 3,
        metrics=("agreement", "frechet"), extractor="handwriting", nfe=(20, 10, 5), guidance_scale=3.0,
    ),
    "coco2014_30k": Protocol(
        "Zero-shot MS-COCO 2014: 30,000 captions of the validation set at 512 px (as SLAM's paper measures).", "captions", 30000,
        metrics=("fid", "clip"), resolution=512, measured_at=512, guidance_scale=7.5,
        reference="the folder of the 30,000 val2014 images of these captions", prompts="30,000 captions of MS-COCO val2014",
    ),
    "coco2014_30k_bksdm": Protocol(
        "Zero-shot MS-COCO 2014 as BK-SDM measures it: 512 px, PNDM with 25 steps, guidance 7.5, JPEG, resized to 256 px.",
        "captions", 30000, metrics=("fid", "is", "clip"), resolution=512, measured_at=256, jpeg=75, nfe=(26,), scheduler="pndm",
        guidance_scale=7.5, clip_model=G14, reference="the folder of all 40,504 val2014 images",
        prompts="metadata.csv (file_name, text) of BK-SDM's 30,000 val2014 captions",
    ),
    "coco2017_5k": Protocol(
        "MS-COCO 2017: a caption of each of the 5,000 validation images at 512 px.", "captions", 5000,
        metrics=("fid", "clip"), resolution=512, measured_at=512, guidance_scale=7.5,
        reference="the folder of the 5,000 val2017 images", prompts="one caption of each of the 5,000 val2017 images",
    ),
    "imagenet_50k": Protocol(
        "ImageNet at 256 px, 50 images a class, against ADM's statistics of the training set.", "classes", 50000,
        metrics=("fid", "is"), resolution=256, guidance_scale=4.0,
        reference="VIRTUAL_imagenet256_labeled.npz of github.com/openai/guided-diffusion",
    ),
    "imagenet64_50k": Protocol("ImageNet at 64 px, 50 a class, seeds 0 to 49,999, against EDM's statistics.", "classes", 50000,
                               metrics=("fid",), reference=f"imagenet-64x64.npz {NVLABS}"),
    "cifar10_50k": Protocol("CIFAR-10, seeds 0 to 49,999, against EDM's statistics.", "classes", 50000,
                            metrics=("fid",), reference=f"cifar10-32x32.npz {NVLABS}"),
    "ffhq_50k": Protocol("FFHQ at 64 px, seeds 0 to 49,999, against EDM's statistics.", None, 50000,
                         metrics=("fid",), reference=f"ffhq-64x64.npz {NVLABS}"),
    "lsun_bedroom_50k": Protocol("LSUN Bedroom at 256 px, seeds 0 to 49,999, as EPD-Solver measures.", None, 50000,
                                 metrics=("fid",), reference="statistics of LSUN Bedroom, of the EPD-Solver repository"),
    "rewards_1k": Protocol("Rewards of 1,000 prompts, an image each, as EPD-Solver with RL measures.", "captions", 1000,
                           metrics=("hps", "pickscore", "imagereward", "clip", "aesthetic"),
                           prompts="1,000 prompts, one a line or in a table"),
    "custom": Protocol("Nothing preset: what the flags say.", "captions", None),
}  # fmt: skip


def resolve(name, **changes):
    """(the `Protocol` of a name with `changes` where they are not None, names of the fields that this changed). UserError."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name} is none of {', '.join(PROTOCOLS)}{nearest(name, list(PROTOCOLS))}.")
    before = PROTOCOLS[name]
    after = before._replace(**{field: value for field, value in changes.items() if value is not None})
    return after, [field for field in Protocol._fields if getattr(before, field) != getattr(after, field)]


def read_metrics(text):
    """The metrics of a comma-separated list, in its order and each once; one of `METRICS` or module:function. UserError."""
    names = [SPELLINGS.get(word.strip(), word.strip()) for word in text.split(",") if word.strip()]
    for name in names:
        if name not in METRICS and ":" not in name:
            raise UserError(f"--metrics: '{name}' is none of {', '.join(METRICS)} and no module:function"
                            f"{nearest(name, [*METRICS, *SPELLINGS])}.")  # fmt: skip
    return tuple(dict.fromkeys(names))


def listing():
    """The protocols as people read them."""
    lines = []
    for name, protocol in PROTOCOLS.items():
        count = f"{protocol.samples:,}" if protocol.samples else ""
        count += f" x {protocol.seeds}" * (protocol.seeds > 1)
        lines.append(f"{name:20s}{count:12s}{', '.join(protocol.metrics):44s}{protocol.text}")
    return "\n".join(lines)
