"""The progress bars of runs within this process."""

from tqdm import tqdm


def close_bars():
    """Close those that are open, as the end of a process does."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
