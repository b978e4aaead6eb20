"""sample_epd.py on several gloo processes: the images of one, and the points of an interval shared between processes."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image
from ranks import run_driver
from test_sample_epd import PIXELS, WORLDS, make_predictor, pictures

CLASSES = f"{WORLDS}:gmm2d"
NOTING = '''
import os

import numpy as np

import sample_epd as script
from brisk import epd, image_folder

save, bounds = image_folder.save, epd.Split.bounds


def save_both(path, values):
    """Write what the picture is made of beside it, as .npy."""
    np.save(path.with_suffix(".npy"), values)
    save(path, (127 * np.tanh(values) + 128).astype(np.uint8))


def noting_bounds(self, count):
    """Append to a file how many rows of the interval this process takes."""
    first, end = bounds(self, count)
    with open(f"rows{os.environ['RANK']}", "a") as file:
        file.write(f"{end - first} ")
    return first, end


image_folder.quantise = lambda images: images.permute(0, 2, 3, 1).numpy()
image_folder.save, epd.Split.bounds = save_both, noting_bounds
'''


def floats(folder):
    return {path.name: np.load(path) for path in sorted(folder.rglob("*.npy"))}


@pytest.fixture
def launch(warm, tmp_path, monkeypatch):
    """launch(world, flags) -> (exit codes, stderrs) of the script on `world` processes, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda world, *flags: run_driver(warm, tmp_path, flags, NOTING, world)


def test_two_processes_draw_what_one_draws(launch, tmp_path):
    make_predictor(tmp_path / "p.json", guidance="cfg", rate=2.0, side=1)
    flags = ["--predictor=p.json", f"--gmm_file={CLASSES}", "--seeds=0-6", "--batch=2"]
    for world in (1, 2):
        codes, errors = launch(world, *flags, f"--outdir=out{world}")
        assert codes == [0] * world, errors
    assert ["sampling: 100%" in error for error in errors] == [True, False]  # one process speaks
    one, two = floats(tmp_path / "out1"), floats(tmp_path / "out2")
    assert list(one) == list(two) == [f"{seed:06d}.npy" for seed in range(7)]
    assert max(abs(one[name] - two[name]).max() for name in one) < 1e-5
    assert len({values.tobytes() for values in one.values()}) == 7
    stored = json.loads((tmp_path / "out2/sampling.json").read_text())
    assert stored["processes"] == 2 and stored["seconds_per_image"] > 0
    (tmp_path / "out2/000000/000003.png").unlink()  # another number of processes goes on with the rest
    codes, errors = launch(1, *flags, "--outdir=out2")
    assert codes == [0] and "1/1" in errors[0] and (tmp_path / "out2/000000/000003.png").exists()


def test_processes_agree_on_the_grids(launch, tmp_path):
    codes, errors = launch(2, "--solver=euler", f"--gmm_file={WORLDS}:gmmimg", "--seeds=0-9", "--batch=4", "--grid", "--outdir=out")
    assert codes == [0, 0], errors
    shapes = {name: picture.shape for name, picture in pictures(tmp_path / "out").items()}
    assert shapes == {"grid_batch0000.png": (12, 4, 3)} | {
        f"grid_batch000{number}.png": (12 if number < 2 else 8, 4, 3) for number in range(4)}  # fmt: skip


@pytest.mark.parametrize("student, world, batch", [("epd", 2, 3), ("ipndm", 3, 1)], ids=["epd", "more processes than rows"])
def test_processes_that_share_the_points_give_the_images_of_one(launch, tmp_path, student, world, batch):
    make_predictor(tmp_path / "p.json", student=student, guidance="cfg", rate=2.0, side=1)
    flags = ["--predictor=p.json", f"--gmm_file={CLASSES}", "--seeds=0-3", f"--batch={batch}"]
    codes, errors = launch(1, *flags, "--outdir=one")
    assert codes == [0], errors
    codes, errors = launch(world, *flags, "--outdir=shared", "--split_branches")
    assert codes == [0] * world, errors
    one, shared = floats(tmp_path / "one"), floats(tmp_path / "shared")
    assert one.keys() == shared.keys() and len(one) == 4
    assert max(abs(one[name] - shared[name]).max() for name in one) < 1e-5
    assert "4/4" in errors[0] and "sampling" not in errors[1]
    taken = [[int(rows) for rows in (tmp_path / f"rows{rank}").read_text().split()] for rank in range(world)]
    whole = {3: (4, 4), 1: (2, 2, 2, 2)}[batch]  # K = 2 rows per image, two batches of two images or four of one
    assert [sum(shares) for shares in zip(*taken, strict=True)] == [rows for rows in whole for _ in range(3)]
    assert max(max(rows) for rows in taken) < max(whole)


def test_an_interrupted_run_leaves_whole_pictures_and_goes_on(fork_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--solver=euler", "--num_steps=50", *PIXELS.split(), "--seeds=0-599", "--batch=1", "--outdir=out"]
    run = fork_script(*flags, whole=True, script="sample_epd",
                      prepare=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    while run.poll() is None and len(list((tmp_path / "out").rglob("0*.png"))) < 20:
        time.sleep(0.01)
    run.kill(signal.SIGINT)
    assert run.wait(60) == 130 and "stopped; the images in out are whole" in run.err()
    done = pictures(tmp_path / "out")
    assert 20 <= len(done) < 600 and not list((tmp_path / "out").rglob(".*"))
    codes = fork_script(*flags, "--batch=64", whole=True, script="sample_epd").wait(60)
    assert codes == 0 and len(pictures(tmp_path / "out")) == 600
    Image.open(tmp_path / "out/000000/000599.png").verify()


def test_bad_input_is_refused_by_all(launch, tmp_path):
    make_predictor(tmp_path / "p.json")
    for flag, message in (("--num_steps=9", "--num_steps is 9, the predictor p was made for 4"),
                          ("--generator_device=cuda", "needs a GPU, this process has cpu")):  # fmt: skip
        codes, errors = launch(2, "--predictor=p.json", *PIXELS.split(), "--outdir=out", flag)
        assert codes == [2, 2] and all(message in error for error in errors), errors
    assert not (tmp_path / "out").exists()
