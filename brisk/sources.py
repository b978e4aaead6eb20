"""The data source of a training run: which one its flags name, what it holds, batches from it."""

from pathlib import Path

from brisk import checkpoint, data, samples, tiny
from brisk.options import UserError
from brisk.seeding import derive


def open_rows(wanted, cache_dir, say):
    """The rows of the folder or dataset that the `DataOptions` `wanted` name, None for shards. Raises UserError."""
    if wanted.dataset_name:
        return samples.open_dataset(wanted.dataset_name, wanted.dataset_config_name, wanted.image_column,
                                    wanted.caption_column, cache_dir)  # fmt: skip
    if not wanted.train_data_dir:
        return None
    rows = samples.FolderRows(samples.list_folder(wanted.train_data_dir, wanted.image_column, wanted.caption_column))
    without = sum(caption is None for caption in rows.captions())
    if without:
        say(f"{without} of {len(rows)} images have no caption: they are skipped.")
    return rows


def open_batches(wanted, rows, tokenize, batch_size, resolution, manifest, accelerator, seed, position, say,
                 extra_prompts=None, broken_share=None):  # fmt: skip
    """Endless iterator over the training batches of this process; grey images for a dry run without data.

    Args: `rows` of `open_rows`; `tokenize`: caption -> dict of tensors; `manifest`: what precomputed shards must have
    been made with; `position` to start from; `extra_prompts`, `broken_share` as for `ImageCaptions`, `TrainingBatches`.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    if wanted.precomputed_shards:
        urls = data.expand_shards(wanted.precomputed_shards)
        samples.check_manifest(data.read_first_manifest(urls), manifest)
        decode = samples.CachedLatents(tokenize, wanted.proportion_empty_prompts, extra_prompts)
        dataset = data.ShardBatches(urls, decode, batch_size, seed, rank, position, manifest=manifest)
    else:
        decode = samples.ImageCaptions(
            tokenize, resolution, wanted.center_crop, wanted.random_flip, wanted.interpolation_type,
            wanted.proportion_empty_prompts, wanted.wds_min_size, wanted.wds_max_pwatermark, extra_prompts,
        )  # fmt: skip
        if rows is not None:
            dataset = data.FolderBatches(rows, decode, batch_size, seed, rank, processes, position)
        elif wanted.train_shards_path_or_url:
            urls = data.expand_shards(wanted.train_shards_path_or_url)
            dataset = data.ShardBatches(urls, decode, batch_size, seed, rank, position)
        else:
            return tiny.SyntheticBatches(tokenize, batch_size, resolution)
    pin_memory = accelerator.device.type == "cuda"
    return data.TrainingBatches(dataset, wanted.dataloader_num_workers, pin_memory, batch_size * processes, say,
                                broken_share)  # fmt: skip


def plan_steps(wanted, rows, epochs, max_train_steps, batch_size, accumulation, processes):
    """Optimizer steps of the run: `max_train_steps`, or `epochs` of `max_train_samples` (of rows: all) images."""
    images = wanted.max_train_samples or (len(rows) if rows is not None else 1)  # 1: a dry run without data
    workers = wanted.dataloader_num_workers if rows is None else 1  # rows are dealt out in batches, whoever loads them
    return max_train_steps or data.total_steps(epochs, images, batch_size, processes, workers, accumulation)


def unused_modules(wanted, parts, needs_text=False):
    """The VAE and text encoders that this source makes superfluous. Args: `needs_text`: captions are encoded all the same."""
    if not wanted.precomputed_shards:
        return []
    manifest = data.read_first_manifest(data.expand_shards(wanted.precomputed_shards))
    return [parts.vae] if needs_text or not manifest.get("text_embeddings", True) else [parts.vae, *parts.text_encoders]


def find_position(wanted, rows, seed, resume, saved, accelerator, say):
    """Where in the data the run starts: at its beginning, or where the checkpoint `resume` with state `saved` stands."""
    names = (wanted.train_shards_path_or_url, wanted.train_data_dir, wanted.precomputed_shards)
    source = derive(seed, *names, *([wanted.dataset_name, wanted.dataset_config_name] if wanted.dataset_name else []))
    return resume_position(source, rows is not None, wanted.data_resume, wanted.dataloader_num_workers, resume, saved,
                           accelerator, say)  # fmt: skip


def resume_position(source, is_folder, mode, workers, resume, saved, accelerator, say):
    """`find_position` of a hash `source` of data and seed; `is_folder`, `mode` as for `data.continue_position`."""
    if not resume:
        return data.start_position(source)
    return data.continue_position(
        checkpoint.read_rank_state(resume, accelerator.process_index),
        saved["step"] * accelerator.gradient_accumulation_steps, workers,
        saved["processes"] == accelerator.num_processes, is_folder, mode, say, source,
    )  # fmt: skip


def read_lines(flag, path):
    """The non-empty lines of a text file; UserError naming `flag` if there is none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"{flag} {path} holds no line.")
    return lines
