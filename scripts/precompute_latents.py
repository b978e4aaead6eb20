#!/usr/bin/env python
"""Encode images once: with captions as shards for `--precomputed_shards`, or with classes for `train_fpdm.py`."""

import functools
import json
import os
import re
import tarfile
from pathlib import Path

from brisk import options
from brisk.latent_files import FORMATS, LatentParts, add_file, npy_bytes

SOURCES = ("train_shards_path_or_url", "train_data_dir", "dataset_name")
CAPTIONS_ONLY = (
    "train_shards_path_or_url", "dataset_name", "dataset_config_name", "image_column", "caption_column", "revision", "variant",
    "center_crop", "random_flip", "interpolation_type", "wds_min_size", "wds_max_pwatermark", "text_embeddings", "copies",
)  # fmt: skip
CLASSES_ONLY = ("output_format", "features_name", "mirror")


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    parser.exclusive.append(SOURCES)
    add = parser.add_argument
    add("--pretrained_teacher_model", "--pretrained_model_name_or_path",
        help="pipeline folder or hub id of the teacher")  # fmt: skip
    add("--pretrained_vae_model_name_or_path", "--vae",
        help="another VAE, the one that training will be given: mse, ema, a folder or hub id")  # fmt: skip
    add("--revision", help="hub revision of the teacher")
    add("--variant", help="weight variant of the teacher's files, e.g. fp16")
    add("--cache_dir", help="cache of downloaded models")
    add("--train_shards_path_or_url", help="WebDataset shards, as for training")
    add("--train_data_dir", help="image folder, as for training")
    add("--dataset_name", help="dataset of the `datasets` library, as for training")
    add("--dataset_config_name", help="its configuration")
    add("--image_column", help="column of images, or of file names in a folder's metadata")
    add("--caption_column", help="column of captions; default 'text', else 'caption'")
    add("--output_dir", required=True, help="folder for what is written: shards latents-RR-00000.tar ... (RR: process)")
    add("--resolution", type=options.COUNT, help="resized and cropped to it; default 512, SDXL 1024, with classes 256")
    options.add_flag(parser, "--center_crop", "crop the centre instead of a random square")
    options.add_flag(parser, "--random_flip", "flip images left to right at random")
    add("--interpolation_type", default="bilinear", help="resize filter",
        choices=("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"))  # fmt: skip
    add("--wds_min_size", type=options.COUNT, help="skip images whose original shorter side is below this")
    add("--wds_max_pwatermark", type=options.FRACTION, help="skip images whose pwatermark is above this")
    options.add_flag(
        parser, "--text_embeddings", "store prompt embeddings; without, training encodes the stored captions", True
    )
    add(
        "--copies",
        type=options.COUNT,
        default=1,
        help="how often each image is stored, each with its own crop and flip",
    )
    add("--batch_size", type=options.COUNT, default=8, help="images per VAE call")
    add("--samples_per_shard", type=options.COUNT, default=1000, help="samples per written shard")
    add("--dataloader_num_workers", type=options.COUNT_OR_ZERO, default=0, help="loader processes")
    add("--vae_dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of the VAE")
    add("--seed", type=options.COUNT_OR_ZERO, default=0, help="seed of crops, flips, caption choice, sampled features")
    group = parser.add_argument_group("classes in place of captions, ADM's centre crop (needs a VAE alone)")
    group.add_argument("--class_labels", nargs="?", const="folders", choices=("folders", "none"),
                       help="classes are sub-folders, or metadata's label column; none: all images are of one class")  # fmt: skip
    group.add_argument("--output_format", choices=FORMATS, default=FORMATS[0],
                       help="moments in shards or arrays; features: a scaled sample per .npy file, as DiT reads them")  # fmt: skip
    group.add_argument("--features_name", default="imagenet256", help="--dataset_name of the training on features")
    options.add_flag(group, "--mirror", "store the mirror image of each image too", True)
    args, given = options.parse(parser, argv)
    check_mode(args, given)
    if args.class_labels:
        return args
    if sum(getattr(args, name) is not None for name in SOURCES) != 1:
        raise options.UserError(f"give one of {', '.join(f'--{name}' for name in SOURCES)}.")
    if args.wds_max_pwatermark is not None and not args.train_shards_path_or_url:
        raise options.UserError("--wds_max_pwatermark needs the json files of shards; a folder or dataset has none.")
    return args


def check_mode(args, given):
    """UserError for flags that say nothing in the mode that is asked for, with captions or with classes."""
    for name in CAPTIONS_ONLY if args.class_labels else CLASSES_ONLY:
        if name in given:
            raise options.UserError(f"--{name} has no effect {'with' if args.class_labels else 'without'} --class_labels.")
    if args.class_labels and not args.train_data_dir:
        raise options.UserError("--class_labels needs --train_data_dir, a folder of images.")
    if not args.pretrained_teacher_model and not (args.class_labels and args.pretrained_vae_model_name_or_path):
        raise options.UserError(
            "the following arguments are required: --pretrained_teacher_model (with --class_labels, --vae does)."
        )


def array_bytes(tensor):
    """A tensor as the content of an .npy file: float16, or int64 for whole numbers."""
    array = tensor.cpu()
    return npy_bytes((array.half() if array.is_floating_point() else array).numpy())


def encode(parts, samples, device, resolution, text_embeddings):
    """[(suffix, list of bytes)] for decoded samples: what `samples.CachedLatents` reads."""
    import torch

    from brisk import data, sd_inputs, sd_models

    captions = [sample["caption"].encode("utf-8", "replace") for sample in samples]
    batch = data.collate([{k: v for k, v in sample.items() if k != "caption"} for sample in samples])
    batch = sd_models.to_device(batch, device)
    mean, std = sd_inputs.latent_moments(parts.vae, batch["pixels"], len(samples))
    columns = [("latent.npy", torch.stack([mean, std], dim=1))]
    if text_embeddings:
        ids = [batch[f"input_ids_{number}"] for number in range(len(parts.tokenizers))]
        prompt_embeds, pooled = sd_inputs.encode_prompts(parts, ids)
        columns += [("prompt.npy", prompt_embeds)] + [("pooled.npy", pooled)] * parts.is_xl
    if parts.is_xl:
        sizes = sd_inputs.time_ids(batch["original_size"], batch["crop_top_left"], resolution)
        columns.append(("time_ids.npy", sizes))
    facts = [{name: sample[name].tolist() for name in ("original_size", "crop_top_left", "flipped")} for sample in samples]
    arrays = [(suffix, [array_bytes(row) for row in column]) for suffix, column in columns]
    return [*arrays, ("txt", captions), ("json", [json.dumps(fact).encode() for fact in facts])]


def tokens_and_caption(tokenize, text):
    """The token ids of a caption, and the caption itself."""
    return {**tokenize(text), "caption": text}


class ShardWriter:
    """Writes samples into numbered shards, each under a temporary name until it is complete."""

    def __init__(self, folder, rank, manifest, samples_per_shard):
        self.folder, self.rank, self.samples_per_shard = Path(folder), rank, samples_per_shard
        self.manifest = json.dumps(manifest).encode()
        self.written, self.tar = 0, None

    def add(self, columns):
        """Write every sample of a batch, [(suffix, list of bytes)]."""
        from brisk.samples import MANIFEST_KEY

        for row in range(len(columns[0][1])):
            if self.written % self.samples_per_shard == 0:
                self.close()
                number = self.written // self.samples_per_shard
                self.path = self.folder / f"latents-{self.rank:02d}-{number:05d}.tar"
                self.tar = tarfile.open(f"{self.path}.tmp", "w", format=tarfile.USTAR_FORMAT)
                add_file(self.tar, f"{MANIFEST_KEY}.json", self.manifest)
            for suffix, column in columns:
                add_file(self.tar, f"{self.written:09d}.{suffix}", column[row])
            self.written += 1

    def close(self):
        """Give the shard in work its final name."""
        if self.tar:
            self.tar.close()
            os.replace(f"{self.path}.tmp", self.path)
            self.tar = None


def plan_classes(args, vae, files, classes):
    """(manifest without the count, settings that the output depends on) of the classes mode."""
    import hashlib

    from brisk import sd_models

    size, factor = args.resolution or 256, sd_models.vae_factor(vae)
    if size % factor:
        raise options.UserError(f"--resolution {size} must be a multiple of {factor}, the VAE's down-sampling.")
    if vae.config.shift_factor:
        raise options.UserError(f"the VAE shifts its latents by {vae.config.shift_factor}, which no format here can store.")
    facts = {"size": size, "scaling_factor": vae.config.scaling_factor, "vae": sd_models.fingerprint(vae),
             "vae_name": args.pretrained_vae_model_name_or_path or args.pretrained_teacher_model,
             "latents": "samples" if args.output_format == "features" else "moments",
             "mirror": args.mirror, "classes": classes}  # fmt: skip
    names = "".join(f"{path.relative_to(args.train_data_dir)} {label}\n" for path, label in files)
    chosen = ("output_format", "features_name", "samples_per_shard", "batch_size", "vae_dtype", "seed")
    settings = {**facts, "images": len(files), "image_names": hashlib.sha256(names.encode()).hexdigest()[:16]}
    return facts, settings | {name: getattr(args, name) for name in chosen}


def encode_classes(args, vae, pixels, keys, device, scaling_factor):
    """What `LatentParts.write` takes of images: one array per image, then one per mirror image if those are stored.

    Moments float16; for features mean + std xi, scaled, xi of (seed, sample number). Args: `pixels` uint8 (B, 3, R, R);
    `keys` the sample numbers.
    """
    import torch

    from brisk import sd_inputs, seeding

    pixels = torch.cat([pixels, pixels.flip(-1)]) if args.mirror else pixels
    mean, std = (part.cpu() for part in sd_inputs.latent_moments(vae, pixels.to(device), len(pixels)))
    if args.output_format != "features":
        return list(torch.stack([mean, std], dim=1).half().numpy())
    noise = [torch.randn(mean.shape[1:], generator=seeding.generator(args.seed, "feature", key)) for key in keys]
    return list(((mean + std * torch.stack(noise)) * scaling_factor).numpy())


def write_part(args, parts, number, images, labels, decoded, encode_batch):
    """Encode the images numbered `images`, the next ones of the iterator `decoded`, and write them as part `number`."""
    import torch

    copies, written, skipped, waiting = 1 + args.mirror, [], {}, []
    for image in images:
        sample = next(decoded)
        if "skip" in sample:
            skipped[sample["skip"]] = skipped.get(sample["skip"], 0) + 1
        else:
            waiting.append((image, sample["pixels"]))
        if waiting and (len(waiting) == args.batch_size or image == images[-1]):
            keys = [image * copies + copy for copy in range(copies) for image, _ in waiting]
            written += zip(keys, encode_batch(torch.stack([pixels for _, pixels in waiting]), keys), strict=True)
            waiting = []
    written.sort(key=lambda pair: pair[0])
    keys = [key for key, _ in written]
    parts.write(number, keys, [value for _, value in written], [labels[key // copies] for key in keys], skipped)


def main_classes(args):
    """The mode of classes: images of a folder to `--output_format`. Parts that are written already are left as they are."""
    import datetime

    import numpy as np
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from diffusers import AutoencoderKL
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from brisk import class_images, data, runlog, sd_models

    # processes wait at the end for the slowest one
    state = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))])
    runlog.quiet_libraries()
    runlog.check_processes(state)
    runlog.open_output(state.process_index, args.output_dir)
    files, classes = class_images.list_class_images(args.train_data_dir, args.class_labels == "folders")
    if args.output_format == "shards":  # a stream is shuffled in blocks only, which would be of one class each
        files = [files[place] for place in np.random.default_rng(args.seed).permutation(len(files))]
    with state.main_process_first():
        vae = sd_models.load_network(AutoencoderKL, args.pretrained_vae_model_name_or_path or args.pretrained_teacher_model,
                                     "vae", args.cache_dir)  # fmt: skip
        facts, settings = plan_classes(args, vae, files, classes)
        parts = LatentParts(args.output_dir, args.output_format, args.features_name, facts, settings)
    images_per_part = max(1, args.samples_per_shard // (1 + args.mirror))
    spans = [range(start, min(start + images_per_part, len(files))) for start in range(0, len(files), images_per_part)]
    mine = [number for number in range(state.process_index, len(spans), state.num_processes)
            if not parts.record(number).is_file()]  # fmt: skip
    rows = class_images.ClassImageRows([files[image] for number in mine for image in spans[number]], classes)
    once = data.OnePass(rows, class_images.CutClassImage(facts["size"]), 1, args.seed, 0, 1)
    loader = DataLoader(once, batch_size=None, num_workers=args.dataloader_num_workers)
    decoded = iter(tqdm(loader, desc="encoding", unit="image", total=len(rows), disable=not state.is_local_main_process,
                        dynamic_ncols=True))  # fmt: skip
    vae.to(state.device, sd_models.DTYPES[args.vae_dtype])
    encode_batch = functools.partial(encode_classes, args, vae, device=state.device, scaling_factor=facts["scaling_factor"])
    labels = [label for _, label in files]
    for number in mine:
        write_part(args, parts, number, spans[number], labels, decoded, encode_batch)
    next(decoded, None)  # ends the progress bar
    state.wait_for_everyone()
    if state.is_main_process:
        finish_classes(args, parts, len(spans))


def finish_classes(args, parts, count):
    """Join what the processes wrote and say what there is; UserError if there is nothing."""
    written, skipped = parts.finish(count)
    reasons = "".join(f", {number} x {reason}" for reason, number in skipped.items())
    if not written:
        raise options.UserError(f"0 of {sum(skipped.values())} samples usable{reasons}.")
    named = f"{len(parts.facts['classes'])} classes" if parts.facts["classes"] else "one class"
    print(f"{written} samples of {named} written to {args.output_dir}; {sum(skipped.values())} skipped{reasons}.")


def remove_earlier(folder):
    """Delete the shards that an earlier run left: a shorter one would leave some of them among its own."""
    earlier = [path for path in Path(folder).iterdir() if re.fullmatch(r"latents-\d{2}-\d{5}\.tar(\.tmp)?", path.name)]
    for path in earlier:
        path.unlink()
    if earlier:
        print(f"{len(earlier)} shards of an earlier run in {folder} are replaced.")


def main(argv=None):
    args = parse_args(argv)
    from brisk import sd_models

    vae = args.pretrained_vae_model_name_or_path
    args.pretrained_vae_model_name_or_path = sd_models.VAES.get(vae, vae)
    if args.class_labels:
        return main_classes(args)
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from brisk import data, runlog, samples, sd_inputs, sources

    state = Accelerator()
    runlog.quiet_libraries()
    runlog.check_processes(state)
    runlog.open_output(state.process_index, args.output_dir)
    with state.main_process_first():
        parts = sd_models.load_parts(args.pretrained_teacher_model, args.revision, args.variant, args.cache_dir,
                                     args.pretrained_vae_model_name_or_path)  # fmt: skip
    resolution = sd_models.check_resolution(parts, args.resolution)
    manifest = {**sd_models.cache_manifest(parts, resolution), "text_embeddings": args.text_embeddings}
    if state.is_main_process:
        remove_earlier(args.output_dir)
    state.wait_for_everyone()
    writer = ShardWriter(args.output_dir, state.process_index, manifest, args.samples_per_shard)
    sd_models.place(parts, state.device, sd_models.DTYPES[args.vae_dtype], torch.float32)
    tokenize = sd_inputs.Tokenize(parts.tokenizers)
    decode = samples.ImageCaptions(functools.partial(tokens_and_caption, tokenize), resolution, args.center_crop, args.random_flip,
                                   args.interpolation_type, 0.0, args.wds_min_size, args.wds_max_pwatermark)  # fmt: skip
    rows = sources.open_rows(args, args.cache_dir, print)
    source = data.expand_shards(args.train_shards_path_or_url) if rows is None else rows
    once = data.OnePass(source, decode, args.copies, args.seed, state.process_index, state.num_processes)
    loader = DataLoader(once, batch_size=None, num_workers=args.dataloader_num_workers)
    waiting, skipped = [], {}
    for sample in tqdm(
        loader, desc="encoding", unit="image", disable=not state.is_local_main_process, dynamic_ncols=True
    ):
        if "skip" in sample:
            skipped[sample["skip"]] = skipped.get(sample["skip"], 0) + 1
            continue
        waiting.append(sample)
        if len(waiting) == args.batch_size:
            writer.add(encode(parts, waiting, state.device, resolution, args.text_embeddings))
            waiting = []
    if waiting:
        writer.add(encode(parts, waiting, state.device, resolution, args.text_embeddings))
    writer.close()
    reasons = "".join(f", {count} x {reason}" for reason, count in skipped.items())
    print(f"{writer.written} samples written to {args.output_dir}; {sum(skipped.values())} skipped{reasons}.")
    if skipped and not writer.written:
        raise options.UserError(f"0 of {sum(skipped.values())} samples usable{reasons}.")


if __name__ == "__main__":
    options.run(main)
