"""Seeds derived from keys: reproducible over processes, different for every key."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from brisk import seeding

pytestmark = pytest.mark.quick


def test_derived_seeds_fit_torch_and_differ_for_every_part_of_the_key():
    keys = [(seed, rank, step, purpose) for seed in (0, 1) for rank in (0, 1) for step in (1, 11) for purpose in "ab"]
    seeds = {seeding.derive(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeding.derive(1, 11) != seeding.derive(11, 1) != seeding.derive(111)


def test_derived_seeds_are_the_same_in_another_process(root):
    code = "from brisk.seeding import derive; print(derive(453645634, 1, 7, 'noise'))"
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(other.stdout) == seeding.derive(453645634, 1, 7, "noise")


def test_generators_repeat_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, second = (torch.rand(8, generator=seeding.generator(3, "noise")) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(8, generator=seeding.generator(3, "time")))
    assert torch.equal(before, torch.get_rng_state())


def test_libraries_are_seeded_together():
    def draw():
        seeding.seed_libraries(5, "start")
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_fresh_seeds_differ_and_are_small_enough_for_every_library():
    seeds = {seeding.fresh_seed() for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**31 for seed in seeds)
