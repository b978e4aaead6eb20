"""Shared pytest options: where the golden numbers lie."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--conformance",
        default=str(ROOT / "tests/assets/conformance"),
        help="folder with one subfolder of golden numbers per method",
    )


@pytest.fixture(scope="session")
def root():
    """The repository root."""
    return ROOT
