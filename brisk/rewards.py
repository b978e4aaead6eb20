"""Rewards of generated images behind one interface: published reward models, mixes of them, the built-in ones, the user's own.

A head gives raw scores in its authors' units; a mix brings them to [0, 1] (arXiv 2512.22796) and takes their weighted mean.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from brisk import builtin_protocol, epd_policy, handwriting, reward_models, reward_mps
from brisk.options import UserError

H14, L14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
# settings of the heads, YAML section reward.multi, with their defaults
SECTIONS = {
    "pickscore": {"model": "yuvalkirstain/PickScore_v1", "processor": H14},
    "imagereward": {"checkpoint": None, "med_config": None, "tokenizer": "google-bert/bert-base-uncased", "cache_dir": None},
    "clip": {"model": L14, "cache_dir": None},
    "aesthetic": {"predictor_path": None, "clip_path": L14},
    "mps": {"checkpoint": None, "processor": H14},
}
HPS_FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
MIXED = tuple(epd_policy.REWARD_SCALES)
ALONE = ("mps", "handwriting", "dummy", "analytic")
GREY = 0.5
# where weights come from, the end of a message
HPS_SOURCE = "give {} of huggingface.co/xswu/HPSv2, or give null to have it downloaded"
IMAGE_REWARD_SOURCE = "give ImageReward.pt of huggingface.co/THUDM/ImageReward, or give null to have it downloaded"
AESTHETIC_SOURCE = "give sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
MPS_SOURCE = (
    "give MPS_overall_checkpoint_diffsynth.safetensors of modelscope.cn/models/DiffSynth-Studio/QualityMetric_reward_pretrained "
    "(the authors' own file is a pickled program, which is never executed)"
)


class RewardSettings(NamedTuple):
    """The YAML section reward.*; the heads' own settings are dicts of `SECTIONS`, null or left out for the default."""

    type: str = "hps"  # one of `MIXED` or `ALONE`, multi, or module:function
    weights: dict = {}  # reward.multi.weights, of type multi
    weights_path: str | None = None  # of HPS
    batch_size: int = 2
    enable_amp: bool = True
    hps_version: str = "v2.1"
    cache_dir: str | None = None
    pickscore: dict = {}
    imagereward: dict = {}
    clip: dict = {}
    aesthetic: dict = {}
    mps: dict = {}


class Reward:
    """Scores of images by the heads `heads`."""

    def __init__(self, functions, weights, batch_size, enable_amp, device):
        """Args: `functions` {head: function (images, prompts, labels) -> (B,)}; `weights` {head: positive float}."""
        self.functions, self.weights, self.batch_size, self.device = functions, weights, batch_size, torch.device(device)
        self.amp = enable_amp and self.device.type == "cuda"
        self.heads = tuple(weights)

    @torch.no_grad()
    def score(self, images, prompts=None, labels=None):
        """Raw scores {head: (B,) float32} of images (B, C, H, W) in [0, 1], on their device.

        Args: `prompts`: B strings, or None for a model without; `labels`: (B,) classes, or None.
        The head handwriting gives handwriting_hit, 0 or 1, too. Raises UserError where a head cannot score these.
        """
        found = {name: [] for name in self.functions}
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            batch = images[rows].to(self.device, torch.float32)
            given = [None if of is None else of[rows] for of in (prompts, labels)]
            with torch.autocast(self.device.type, enabled=self.amp):
                for name, function in self.functions.items():
                    found[name].append(function(batch, *given).float())
        scores = {name: torch.cat(parts).to(images.device) for name, parts in found.items()}
        for name, raw in scores.items():
            if not raw.isfinite().all():
                raise UserError(f"the reward {name} of {int((~raw.isfinite()).sum())} images is no finite number.", 1)
        return scores

    def mixed(self, scores):
        """The reward (B,) that is maximised: the weighted mean of normalised heads; a head without published scale as it is."""
        if self.heads[0] in MIXED:
            return epd_policy.mixed_reward(scores, self.weights)
        return scores[self.heads[0]]


def weights_of(settings):
    """{head: positive weight} of `RewardSettings`. UserError for an unknown type or head, or where no weight is positive."""
    if settings.type != "multi":
        if settings.type not in (*MIXED, *ALONE) and ":" not in settings.type:
            known = ", ".join((*MIXED, *ALONE))
            raise UserError(f"reward.type is {settings.type}; it must be one of {known}, multi, or module:function.")
        return {settings.type: 1.0}
    for head in settings.weights:
        if head not in MIXED:
            raise UserError(f"reward.multi.weights.{head}: only {', '.join(MIXED)} can be mixed.")
    weights = {head: float(weight) for head, weight in settings.weights.items() if weight > 0}
    if not weights:
        raise UserError("reward.multi.weights must have a weight above 0.")
    return weights


def load(settings, device="cpu"):
    """The `Reward` of `RewardSettings`, heads of positive weight only. UserError that says which file is missing."""
    weights = weights_of(settings)
    loaders = {
        "hps": _hps, "pickscore": _pickscore, "imagereward": _imagereward, "clip": _clip, "aesthetic": _aesthetic, "mps": _mps,
    }  # fmt: skip
    functions = {}
    for head in weights:
        if head in loaders:
            functions[head] = _guarded(head, loaders[head](settings, torch.device(device)))
        elif head == "handwriting":
            functions |= _handwriting(device)
        elif ":" in head:
            functions[head] = _own(head)
        else:
            functions[head] = {"dummy": _brightness, "analytic": _greyness}[head]
    return Reward(functions, weights, settings.batch_size, settings.enable_amp, device)


def _options(settings, head):
    """A head's settings, defaults where they are null; `cache_dir` falls back to reward.cache_dir."""
    given = {name: value for name, value in getattr(settings, head).items() if value is not None}
    return {"cache_dir": settings.cache_dir, **{k: v for k, v in SECTIONS[head].items() if k != "cache_dir"}, **given}


def _guarded(head, scorer):
    """`scorer` of (images, prompts) as one of (images, prompts, labels) that takes RGB images with prompts only."""

    def score(images, prompts, labels):
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"the reward {head} scores RGB images, this model draws samples of shape {tuple(images.shape[1:])}.")
        if prompts is None and head != "aesthetic":
            raise UserError(f"the reward {head} scores images of prompts, this model has none; give another reward.type.")
        return scorer(images, prompts)

    return score


def _hps(settings, device):
    if settings.hps_version not in HPS_FILES:
        raise UserError(f"reward.hps_version is {settings.hps_version}; it must be one of {', '.join(HPS_FILES)}.")
    name, key = HPS_FILES[settings.hps_version], "reward.weights_path"
    path = settings.weights_path or reward_models.download("xswu/HPSv2", name, settings.cache_dir, key)
    file = reward_models.WeightsFile(path, key, HPS_SOURCE.format(name)).checked()
    source = _options(settings, "pickscore")["processor"]
    return reward_models.load_hps(file, source, "reward.multi.pickscore.processor", settings.cache_dir, device).cosine


def _pickscore(settings, device):
    own, section = _options(settings, "pickscore"), "reward.multi.pickscore"
    return reward_models.load_clip(own["model"], f"{section}.model", own["processor"], f"{section}.processor", own["cache_dir"],
                                   device).logits  # fmt: skip


def _imagereward(settings, device):
    own, section = _options(settings, "imagereward"), "reward.multi.imagereward"
    key, network = f"{section}.checkpoint", dict(reward_models.TEXT_SETTINGS)
    if own["med_config"]:
        try:
            stated = json.loads(Path(own["med_config"]).read_text())
            network = {name: stated.get(name, value) for name, value in network.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{section}.med_config {own['med_config']} cannot be read ({error}); leave the key out for "
                            "the published network.") from None  # fmt: skip
    path = own["checkpoint"] or reward_models.download("THUDM/ImageReward", "ImageReward.pt", own["cache_dir"], key)
    file = reward_models.WeightsFile(path, key, IMAGE_REWARD_SOURCE).checked()
    return reward_models.load_image_reward(file, network, own["tokenizer"], f"{section}.tokenizer", own["cache_dir"], device)


def _clip(settings, device):
    own, key = _options(settings, "clip"), "reward.multi.clip.model"
    return reward_models.load_clip(own["model"], key, own["model"], key, own["cache_dir"], device).cosine


def _aesthetic(settings, device):
    own, section = _options(settings, "aesthetic"), "reward.multi.aesthetic"
    key = f"{section}.predictor_path"
    if not own["predictor_path"]:
        raise UserError(f"{key} is not given; {AESTHETIC_SOURCE}.")
    source, clip_key = own["clip_path"], f"{section}.clip_path"
    file = reward_models.WeightsFile(own["predictor_path"], key, AESTHETIC_SOURCE).checked()
    clip = reward_models.load_clip(source, clip_key, source, clip_key, own["cache_dir"], device)
    score = reward_models.load_aesthetic(file, clip)
    return lambda images, prompts: score(images)


def _mps(settings, device):
    own, section = _options(settings, "mps"), "reward.multi.mps"
    key = f"{section}.checkpoint"
    if not own["checkpoint"]:
        raise UserError(f"{key} is not given; {MPS_SOURCE}.")
    file = reward_models.WeightsFile(own["checkpoint"], key, MPS_SOURCE).checked()
    return reward_mps.load_mps(file, own["processor"], f"{section}.processor", own["cache_dir"], device)


def _brightness(images, prompts, labels):
    """Mean of all values, [0, 1] for images."""
    return images.flatten(1).mean(1)


def _greyness(images, prompts, labels):
    """Minus the Euclidean distance of the mean colour (of a point of the plane: of the point) to the middle 0.5."""
    means = images.flatten(2).mean(2) if images.ndim > 2 else images
    return -(means - GREY).norm(dim=1)


def _handwriting(device):
    """Heads of the built-in handwriting set: how surely its oracle reads what the caption (or the class) says, and whether it does.

    The first is the geometric mean of the probabilities of digit, ink and paper, smooth in [0, 1]; of a class, of the digit.
    """
    oracle = builtin_protocol.load_oracle().to(device)

    def wanted(images, prompts, labels):
        if tuple(images.shape[1:]) != (3, 32, 32):
            raise UserError(f"the reward handwriting reads images of shape (3, 32, 32), not {tuple(images.shape[1:])}.")
        if prompts is None and labels is None:
            raise UserError("the reward handwriting needs captions or classes, this model has none.")
        try:
            read = [handwriting.parse_caption(text) for text in prompts] if prompts is not None else labels.reshape(-1, 1)
        except ValueError as error:
            raise UserError(f"the reward handwriting cannot read a prompt: {error}") from None
        read = torch.as_tensor(read, device=images.device)
        return zip(oracle(images * 2 - 1), read.unbind(1), strict=False)

    def surely(images, prompts, labels):
        chances = [logits.float().log_softmax(1).gather(1, of[:, None]) for logits, of in wanted(images, prompts, labels)]
        return torch.cat(chances, 1).mean(1).exp()

    def hit(images, prompts, labels):
        return torch.stack([logits.argmax(1) == of for logits, of in wanted(images, prompts, labels)]).all(0).float()

    return {"handwriting": surely, "handwriting_hit": hit}


def _own(name):
    """The user's function of (images, prompts or else labels) -> one score per image. UserError."""
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward.type {name} is no module:function that can be imported ({error}).") from None
    if not callable(score):
        raise UserError(f"reward.type {name} is a {type(score).__name__}, not a function of (images, prompts).")

    def scorer(images, prompts, labels):
        found = score(images, labels if prompts is None else prompts)
        try:
            raw = torch.as_tensor(found, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError):
            raw = None
        if raw is None or raw.shape != images.shape[:1]:
            what = f"a {type(found).__name__}" if raw is None else f"shape {tuple(raw.shape)}"
            raise UserError(f"reward.type {name} returned {what} for {len(images)} images; it must return one number per image.")
        return raw

    return scorer
