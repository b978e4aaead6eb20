"""Shared by all tests: where the golden numbers lie, tiny reward models."""

import gc
from pathlib import Path

import pytest
from progress_bars import close_bars

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--conformance",
        default=str(ROOT / "tests/assets/conformance"),
        help="folder with one subfolder of golden numbers per method",
    )


def pytest_collection_finish():
    """What all test modules imported stays for good, and need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_bars_left():
    """A bar that a refused or stopped run left is closed now: collected later, it breaks tqdm's loop over its bars in another."""
    yield
    close_bars()


@pytest.fixture(scope="session")
def root():
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def clip_home(tmp_path_factory):
    """The folder of a tiny CLIP repository."""
    import tiny_rewards

    folder = tmp_path_factory.mktemp("clip")
    tiny_rewards.write_clip(folder)
    return folder


@pytest.fixture(scope="session")
def image_reward(tmp_path_factory):
    """What `tiny_rewards.write_image_reward` gives."""
    import tiny_rewards

    return tiny_rewards.write_image_reward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="session")
def mps(clip_home, tmp_path_factory):
    """What `tiny_rewards.write_mps` gives."""
    import tiny_rewards

    return tiny_rewards.write_mps(tmp_path_factory.mktemp("mps"), clip_home)
