#!/usr/bin/env python
"""Encode images and captions once: shards of latent moments and prompt embeddings for `--precomputed_shards`."""

import io
import json
import os
import tarfile
from pathlib import Path

from brisk import options


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--pretrained_teacher_model", required=True, help="pipeline folder or hub id of the teacher")
    add("--pretrained_vae_model_name_or_path", help="another VAE, the one that training will be given")
    add("--revision", help="hub revision of the teacher")
    add("--variant", help="weight variant of the teacher's files, e.g. fp16")
    add("--cache_dir", help="cache of downloaded models")
    add("--train_shards_path_or_url", help="WebDataset shards, as for training")
    add("--train_data_dir", help="image folder, as for training")
    add("--output_dir", required=True, help="folder for the shards latents-RR-00000.tar ... (RR: process)")
    add("--resolution", type=options.COUNT, help="the shorter side is resized to it, then cropped; 512, SDXL 1024")
    options.add_flag(parser, "--center_crop", "crop the centre instead of a random square")
    options.add_flag(parser, "--random_flip", "flip images left to right at random")
    add("--interpolation_type", default="bilinear", help="resize filter",
        choices=("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"))  # fmt: skip
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
    add("--seed", type=options.COUNT_OR_ZERO, default=0, help="seed of crops, flips and caption choice")
    args, _ = options.parse(parser, argv)
    if (args.train_shards_path_or_url is None) == (args.train_data_dir is None):
        raise options.UserError("give one of --train_shards_path_or_url and --train_data_dir.")
    return args


def add_file(tar, name, content):
    """Append bytes to an open tar under `name`, with no time and no owner: equal inputs give equal shards."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def array_bytes(tensor):
    """A tensor as the content of an .npy file: float16, or int64 for whole numbers."""
    import numpy as np

    buffer = io.BytesIO()
    array = tensor.cpu()
    np.save(buffer, (array.half() if array.is_floating_point() else array).numpy())
    return buffer.getvalue()


def encode(parts, batch, resolution):
    """[(suffix, tensor (B, ...))] of a collated batch: what `samples.CachedLatents` reads."""
    import torch

    from brisk import sd_models

    mean, std = sd_models.latent_moments(parts.vae, batch["pixels"], len(batch["pixels"]))
    ids = [batch[f"input_ids_{number}"] for number in range(len(parts.tokenizers))]
    prompt_embeds, pooled = sd_models.encode_prompts(parts, ids)
    columns = [("latent.npy", torch.stack([mean, std], dim=1)), ("prompt.npy", prompt_embeds)]
    if parts.is_xl:
        sizes = sd_models.time_ids(batch["original_size"], batch["crop_top_left"], resolution)
        columns += [("pooled.npy", pooled), ("time_ids.npy", sizes)]
    return columns


class ShardWriter:
    """Writes samples into numbered shards, each under a temporary name until it is complete."""

    def __init__(self, folder, rank, manifest, samples_per_shard):
        self.folder, self.rank, self.samples_per_shard = Path(folder), rank, samples_per_shard
        self.manifest = json.dumps(manifest).encode()
        self.written, self.tar = 0, None

    def add(self, columns):
        """Write every sample of a batch."""
        from brisk.samples import MANIFEST_KEY

        for row in range(len(columns[0][1])):
            if self.written % self.samples_per_shard == 0:
                self.close()
                number = self.written // self.samples_per_shard
                self.path = self.folder / f"latents-{self.rank:02d}-{number:05d}.tar"
                self.tar = tarfile.open(f"{self.path}.tmp", "w", format=tarfile.USTAR_FORMAT)
                add_file(self.tar, f"{MANIFEST_KEY}.json", self.manifest)
            for suffix, column in columns:
                add_file(self.tar, f"{self.written:09d}.{suffix}", array_bytes(column[row]))
            self.written += 1

    def close(self):
        """Give the shard in work its final name."""
        if self.tar:
            self.tar.close()
            os.replace(f"{self.path}.tmp", self.path)
            self.tar = None


def main(argv=None):
    args = parse_args(argv)
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from brisk import data, runlog, samples, sd_models

    state = Accelerator()
    runlog.quiet_libraries()
    runlog.open_output(state.process_index, args.output_dir)
    with state.main_process_first():
        parts = sd_models.load_parts(args.pretrained_teacher_model, args.revision, args.variant, args.cache_dir,
                                     args.pretrained_vae_model_name_or_path)  # fmt: skip
    resolution = sd_models.check_resolution(parts, args.resolution)
    writer = ShardWriter(args.output_dir, state.process_index, sd_models.cache_manifest(parts, resolution),
                         args.samples_per_shard)  # fmt: skip
    sd_models.place(parts, state.device, sd_models.DTYPES[args.vae_dtype], torch.float32)
    decode = samples.ImageCaptions(sd_models.Tokenize(parts.tokenizers), resolution, args.center_crop, args.random_flip,
                                   args.interpolation_type)  # fmt: skip
    sources = samples.list_folder(args.train_data_dir) if args.train_data_dir else data.expand_shards(
        args.train_shards_path_or_url)  # fmt: skip
    once = data.OnePass(sources, decode, args.copies, args.seed, state.process_index, state.num_processes)
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
            writer.add(encode(parts, sd_models.to_device(data.collate(waiting), state.device), resolution))
            waiting = []
    if waiting:
        writer.add(encode(parts, sd_models.to_device(data.collate(waiting), state.device), resolution))
    writer.close()
    reasons = "".join(f", {count} x {reason}" for reason, count in skipped.items())
    print(f"{writer.written} samples written to {args.output_dir}; {sum(skipped.values())} skipped{reasons}.")
    if skipped and not writer.written:
        raise options.UserError(f"0 of {sum(skipped.values())} samples usable{reasons}.")


if __name__ == "__main__":
    options.run(main)
