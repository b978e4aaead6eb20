"""Training from a dataset of the `datasets` library: the same run as from a folder, resumed exactly, faults named."""

import datasets
import numpy as np
import pytest

from brisk import options, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of five pictures with sidecar captions."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        tiny.random_image(np.random.default_rng(number), 40, 48).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"number {number}")
    return path


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """The same as a dataset on disk, with further columns."""
    path, numbers = tmp_path_factory.mktemp("saved") / "dataset", range(5)
    columns = {
        "image": [str(folder / f"{n}.png") for n in numbers], "text": [f"number {n}" for n in numbers],
        "upside_down": [str(folder / f"{4 - n}.png") for n in numbers], "none": [""] * 5,
        "many": [[f"number {n}"] * 2 for n in numbers],
    }  # fmt: skip
    made = datasets.Dataset.from_dict(columns)
    for name in ("image", "upside_down"):
        made = made.cast_column(name, datasets.Image())
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(path)
    return path


def losses(run):
    return [row["loss"] for row in run.rows]


@pytest.fixture(scope="module")
def from_folder(folder, run_main):
    """The losses of six steps from the folder: more than two epochs."""
    return losses(run_main(f"--train_data_dir={folder}", "--max_train_steps=6", "--random_flip"))


@pytest.mark.parametrize("workers", (0, 2))
def test_a_dataset_trains_like_the_same_folder(workers, run_main, saved, from_folder):
    run = run_main(f"--dataset_name={saved}", "--max_train_steps=6", "--random_flip", f"--dataloader_num_workers={workers}")
    assert losses(run) == from_folder and len(set(from_folder)) == 6


def test_two_steps_from_an_image_folder_of_the_library(run_main, folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = ["file_name,text"]
    for path in sorted(folder.glob("*.png")):
        (tmp_path / "pictures" / path.name).write_bytes(path.read_bytes())
        lines.append(f"{path.name},a red square")
    (tmp_path / "pictures/metadata.csv").write_text("\n".join(lines))
    run = run_main(f"--dataset_name={tmp_path / 'pictures'}", f"--cache_dir={tmp_path / 'cache'}")
    assert [row["step"] for row in run.rows] == [1, 2] and np.isfinite(losses(run)).all()
    assert (run.output / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert any((tmp_path / "cache").rglob("*.arrow")), "--cache_dir is used"


def test_columns_choose_pictures_and_captions(run_main, saved, from_folder):
    def train(*flags):
        return losses(run_main(f"--dataset_name={saved}", "--random_flip", *flags))

    plain, silent = from_folder[:2], train("--caption_column=none")
    assert train("--caption_column=text", "--image_column=image") == plain != train("--image_column=upside_down")
    # the empty prompt is encoded in a batch of one
    assert silent == pytest.approx(train("--proportion_empty_prompts=1"), rel=1e-4)
    assert silent != pytest.approx(plain, rel=1e-2)
    assert len(train("--caption_column=many")) == 2


def test_a_dataset_goes_on_exactly_with_another_number_of_workers(run_main, saved, from_folder, tmp_path):
    flags = (f"--dataset_name={saved}", "--random_flip", "--checkpointing_steps=3", "--resume_from_checkpoint=latest")
    run_main(*flags, "--max_train_steps=3", output=tmp_path / "out")
    run = run_main(*flags, "--max_train_steps=6", "--dataloader_num_workers=2", output=tmp_path / "out")
    assert losses(run) == from_folder and "starts afresh" not in run.log


@pytest.mark.parametrize(("flags", "words"), (
    (("--dataset_name={}/none",), ("--dataset_name", "cannot be loaded")),
    (("--dataset_name={}", "--image_column=picture"), ("--image_column picture is no column", "upside_down")),
    (("--dataset_name={}", "--caption_column=title"), ("--caption_column title is no column", "text")),
    (("--dataset_name={}", "--train_data_dir=x"), ("give one of", "--dataset_name")),
    (("--dataset_name={}", "--wds_max_pwatermark=0.5"), ("--wds_max_pwatermark",)),
))  # fmt: skip
def test_faults_of_a_dataset_are_one_sentence_before_any_step(flags, words, run_main, saved):
    with pytest.raises(options.UserError) as error:
        run_main(*(flag.format(saved) for flag in flags))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert " step 1 " not in run_main.log()
