"""Randomness as a function of (seed, rank, step, purpose): nothing to save, the same after a resume."""

import hashlib
import random
import secrets

import numpy as np
import torch


def derive(*key):
    """A 63-bit seed from any printable values, e.g. `derive(seed, rank, step, "noise")`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key, device="cpu"):
    """A fresh torch generator on `device` for the values in `key`."""
    return torch.Generator(device).manual_seed(derive(*key))


def fresh_seed():
    """A seed for runs that were given none; recorded, so that they can be resumed and repeated."""
    return secrets.randbelow(2**31)


def seed_libraries(*key):
    """Seed the global generators of python, numpy and torch (library initialisers, dropout) for the values in `key`."""
    seed = derive(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
