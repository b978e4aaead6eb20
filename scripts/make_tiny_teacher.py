#!/usr/bin/env python
"""Train the built-in teacher (a tiny Stable Diffusion of tinted digits) and its oracle, or write its data as shards or images.

With --random a tiny pipeline of random weights and shards of synthetic pictures, to try things out.
"""

import json
import shutil
import time
from pathlib import Path

from brisk import options

FIGURE_STEPS = (50, 20, 10, 4, 2, 1)
RANDOM = ("toy_sd1", "toy_sd2", "toy_sdxl", "sd1", "sd2", "sdxl")


def parse_args(argv=None):
    """The namespace; see `--help`. Raises UserError for folders that must not be replaced."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--shards", metavar="DIR", help="only write the training images as WebDataset shards into DIR")
    add("--images", metavar="DIR",
        help="only write training images as .png files into DIR/0 ... DIR/9 by digit, on black paper")  # fmt: skip
    add("--output_dir", metavar="DIR", help="train everything and save the pipeline here, in place of an older one")
    add("--random", choices=RANDOM, help="write OUTPUT_DIR/teacher, a tiny pipeline of this family with random weights "
        "(toy_: with every block of the real one), and OUTPUT_DIR/shards, random pictures")  # fmt: skip
    add("--oracle_dir", metavar="DIR", help="folder for the oracle; default: handwriting-oracle beside output_dir")
    add("--copies", type=options.number(int, low=1, high=56), default=4, help="colour pairs per scan; in images at most 7")
    add("--samples_per_shard", type=options.COUNT, default=1000, help="samples per written shard")
    add("--seed", type=options.COUNT_OR_ZERO, default=0, help="seed of everything random")
    add("--threads", type=options.COUNT, default=1, help="CPU threads; another number may round differently")
    add("--oracle_steps", type=options.COUNT, default=1200, help="optimizer steps of the oracle")
    add("--vae_steps", type=options.COUNT, default=3500, help="optimizer steps of the autoencoder")
    add("--text_steps", type=options.COUNT, default=600, help="optimizer steps of the text encoder")
    add("--unet_steps", type=options.COUNT, default=4000, help="optimizer steps of the U-Net")
    add("--batch_size", type=options.COUNT, default=128, help="images per step; a quarter of it for the autoencoder")
    add("--cached_images", type=options.COUNT, default=40000, help="images whose latents the U-Net is trained on")
    add("--guidance_scale", type=options.NOT_NEGATIVE, default=2.0, help="guidance of the measured samples")
    add("--samples", type=options.number(int, low=64), default=1120, help="images behind each measured figure")
    args, _ = options.parse(parser, argv)
    if sum(folder is not None for folder in (args.shards, args.images, args.output_dir)) != 1:
        raise options.UserError("give one of --shards and --output_dir, or --images.")
    for flag in ("shards", "images"):
        if getattr(args, flag):
            check_folder(flag, getattr(args, flag))
    if args.images and args.copies > 7:
        raise options.UserError(f"--copies is {args.copies}; with --images it is at most 7, the inks on one paper.")
    if args.random and not args.output_dir:
        raise options.UserError("--random writes shards of its own: give it --output_dir.")
    if args.random:
        check_folder("output_dir", args.output_dir)
        check_folder("output_dir", Path(args.output_dir) / "teacher", "model_index.json")
        check_folder("output_dir", Path(args.output_dir) / "shards", "synthetic-00000.tar")
    if args.shards or args.images or args.random:
        return args
    args.oracle_dir = args.oracle_dir or str(Path(args.output_dir).resolve().parent / "handwriting-oracle")
    check_folder("output_dir", args.output_dir, "model_index.json")
    check_folder("oracle_dir", args.oracle_dir, "config.json")
    return args


def check_folder(flag, name, mark=None):
    """UserError unless `name` is new, empty or, where a `mark` is given, a folder that holds that file."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise options.UserError(f"--{flag} {name} is a file; give a folder.")
    if mark and folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise options.UserError(f"--{flag} {name} holds other files and would be replaced; give a new folder.")


def write_random(folder, family, seed):
    """Write FOLDER/teacher and FOLDER/shards of random weights and pictures, in place of older ones."""
    from brisk import tiny

    teacher, shards = Path(folder) / "teacher", Path(folder) / "shards"
    partial, shards_partial = (path.with_name(path.name + ".partial") for path in (teacher, shards))
    for old in (partial, shards_partial):
        shutil.rmtree(old, ignore_errors=True)
    tiny.make_pipeline(family, seed).save_pretrained(partial)
    paths = tiny.write_shards(shards_partial, seed=seed)
    replace_folder(partial, teacher)
    replace_folder(shards_partial, shards)
    print(f"{teacher} ({family}, random weights) and {len(paths)} shards in {shards} written.")


def train_pipeline(oracle, strokes, digits, args):
    """Autoencoder, text encoder and U-Net, trained one after the other; their values fit float16."""
    import torch
    from diffusers import StableDiffusionPipeline

    from brisk import handwriting_teacher as parts

    torch.manual_seed(args.seed + 1)
    vae = parts.train_vae(strokes, digits, args.vae_steps, args.batch_size, args.seed + 1)
    tokenizer = parts.build_tokenizer()
    text_encoder = parts.train_text_encoder(
        tokenizer, oracle, strokes, digits, args.text_steps, args.batch_size, args.seed + 3
    )
    latents = parts.cache_latents(vae, strokes, digits, args.cached_images, args.seed + 2)
    variance = latents["means"].var() + latents["stds"].square().mean()
    vae.register_to_config(scaling_factor=round(1.0 / variance.sqrt().item(), 4))
    with torch.no_grad():
        conditions = text_encoder(parts.tokenize(tokenizer, parts.all_captions() + [""])).last_hidden_state
    scale = vae.config.scaling_factor
    unet = parts.train_unet(latents, conditions, scale, args.unet_steps, args.batch_size, args.seed + 4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=parts.build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def draw(pipeline, captions, steps, guidance_scale, seed):
    """Images (N, 3, 32, 32) in [-1, 1] of N captions, 100 at a time, all from the noise of one generator."""
    import torch

    generator, images = torch.Generator(pipeline.device).manual_seed(seed), []
    for first in range(0, len(captions), 100):
        images.append(pipeline(captions[first : first + 100], num_inference_steps=steps, guidance_scale=guidance_scale,
                               generator=generator, output_type="pt").images.cpu() * 2 - 1)  # fmt: skip
    return torch.cat(images)


def measure(folder, oracle_folder, args):
    """Figures of the saved pipeline, read back; writes samples.png beside it."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import make_image_grid
    from tqdm import tqdm

    from brisk import builtin_protocol, handwriting, metrics, scorers

    torch.set_grad_enabled(False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    oracle, held_out = builtin_protocol.load_oracle(oracle_folder, "--oracle_dir"), builtin_protocol.real_images()
    images, reference = held_out["images"], oracle.features(held_out["images"])
    error = (pipeline.vae(images.to(pipeline.device)).sample.cpu() - images).square().mean().sqrt()
    labels = [held_out[name] for name in ("digits", "foregrounds", "backgrounds")]
    training = oracle.features(handwriting.draw("train", args.samples, seed=0)["images"])
    report = {
        "samples": args.samples, "guidance_scale": args.guidance_scale,
        "oracle_held_out": scorers.prompt_agreement(oracle, images, *labels), "autoencoder_rmse": error.item(),
        "training_images_frechet": metrics.frechet_distance(training, reference), "ddim": {},
    }  # fmt: skip
    labels = builtin_protocol.wanted_labels(args.samples, args.seed)
    captions = builtin_protocol.captions_of(labels)
    for steps in tqdm(FIGURE_STEPS, desc="figures     ", dynamic_ncols=True):
        images = draw(pipeline, captions, steps, args.guidance_scale, args.seed)
        report["ddim"][str(steps)] = builtin_protocol.measure(oracle, [images], [labels], reference)
        if steps == FIGURE_STEPS[0]:
            shown = pipeline.image_processor.postprocess(images[:40], output_type="pil")
            make_image_grid(shown, rows=4, cols=10, resize=64).save(folder / "samples.png")
    return report


def write_card(folder, report, pipeline, args):
    """Write README.md and report.json, with the figures of `measure`, beside the pipeline."""
    from brisk import handwriting, handwriting_teacher

    flags = ("seed", "oracle_steps", "vae_steps", "text_steps", "unet_steps", "batch_size", "cached_images")
    counts = {"U-Net": pipeline.unet, "text encoder": pipeline.text_encoder, "autoencoder": pipeline.vae}
    line = "| {0} | {digit:.3f} | {foreground:.3f} | {background:.3f} | {all:.3f} | {frechet:.2f} |"
    card = CARD.format(
        colours=", ".join(handwriting.COLOURS), length=handwriting_teacher.CAPTION_LENGTH,
        counts=", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in counts.items()),
        flags=" ".join(f"--{name} {getattr(args, name)}" for name in flags),
        rows="\n".join(line.format(steps, **figures) for steps, figures in report["ddim"].items()),
        threads=args.threads, **report, **report["oracle_held_out"],
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Tiny handwriting teacher

A complete Stable Diffusion pipeline in small, for trying out distillation on a CPU: it draws 32x32 images from captions
such as "a red handwritten seven on a yellow background": ten digits in the colours {colours}.

![samples](samples.png)

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("assets/tiny-teacher")
image = pipeline("a red handwritten seven on a yellow background", guidance_scale={guidance_scale:g}).images[0]
```

**Parts** (parameters): {counts}.
Epsilon prediction, 1,000 steps, scaled-linear betas 0.00085 to 0.012; latents 4x8x8; captions of at most {length}
tokens. U-Net and autoencoder are stored in float16.

**Data**: the 1,797 scans of 8x8 pixels that come with scikit-learn (`load_digits`), a copy of the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0). Changes made: enlarged to 32x32 and tinted. One scan in six of each digit
is held out of all training, that of the oracle included.

**Training**:

```
python scripts/make_tiny_teacher.py --output_dir assets/tiny-teacher {flags}
```

This trains the oracle (a classifier of digit and both colours), the autoencoder, the text encoder (contrastively
against the oracle's features, then frozen) and the U-Net (AdamW 3e-3, EMA, 10 % of the captions dropped, time steps
skewed to high noise at first). It took {minutes:.0f} minutes with {threads} CPU thread(s).

**Figures**, read back from disk: {samples} captions, guidance {guidance_scale:g}, DDIM. Agreement is the share of
images in which the oracle reads what the caption asks for. The Frechet distance is taken in the oracle's features
against 2,000 tinted held-out scans; as many training images as samples have {training_images_frechet:.2f}.

| steps | digit | foreground | background | all three | Frechet distance |
|---|---|---|---|---|---|
{rows}

The oracle reads {digit:.1%} of the held-out digits, {foreground:.1%} of their foregrounds and {background:.1%} of their
backgrounds. The autoencoder rebuilds held-out images within {autoencoder_rmse:.3f} (root mean square, values -1 to 1).
"""


def replace_folder(new, old):
    """Put the finished folder `new` in the place of `old`."""
    aside = old.with_name(old.name + ".replaced")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def main(argv=None):
    args = parse_args(argv)
    import torch

    from brisk import handwriting, runlog

    runlog.quiet_libraries()
    torch.set_num_threads(args.threads)
    if args.random:
        write_random(args.output_dir, args.random, args.seed)
        return
    if args.shards:
        paths = handwriting.write_shards(args.shards, args.seed, args.copies, args.samples_per_shard)
        print(f"{len(paths)} shards written: {paths[0]} to {paths[-1].name}.")
        return
    if args.images:
        print(f"{handwriting.write_class_folders(args.images, args.seed, args.copies)} images written to {args.images}.")
        return
    from brisk import handwriting_teacher, scorers

    started = time.perf_counter()
    output, oracle_output = Path(args.output_dir), Path(args.oracle_dir)
    partial, oracle_partial = (path.with_name(path.name + ".partial") for path in (output, oracle_output))
    for folder in (partial, oracle_partial):
        shutil.rmtree(folder, ignore_errors=True)
    strokes, digits = handwriting.load_strokes("train")
    torch.manual_seed(args.seed)
    oracle = handwriting_teacher.train_oracle(strokes, digits, args.oracle_steps, args.batch_size, args.seed)
    scorers.save_oracle(oracle, oracle_partial)
    # The oracle read back: from here on everything sees the float16 values that were saved.
    pipeline = train_pipeline(scorers.load_oracle(oracle_partial), strokes, digits, args)
    minutes = round((time.perf_counter() - started) / 60, 1)
    # transformers loads a part in the type it was saved in, diffusers in float32: the text encoder stays float32.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(partial)
    write_card(partial, {"minutes": minutes, **measure(partial, oracle_partial, args)}, pipeline, args)
    replace_folder(oracle_partial, oracle_output)
    replace_folder(partial, output)
    print(f"{output} and {oracle_output} written; the figures are in {output / 'README.md'}.")


if __name__ == "__main__":
    options.run(main)
