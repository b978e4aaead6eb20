"""Networks on disk: diffusers folders, and what a checkpoint holds of the trained network and its averages."""

import contextlib
from pathlib import Path

from brisk.options import UserError

FILE = "diffusion_pytorch_model.safetensors"


def save_network(network, folder, state):
    """Write a diffusers network's config and the weights `state` (not its own ones) as one file for `from_pretrained`."""
    from safetensors.torch import save_file

    network.save_config(folder)
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(weights, Path(folder) / FILE, metadata={"format": "pt"})


def save_networks(folder, accelerator, network, name, averages):
    """Write the networks of a checkpoint (called on every rank): `network` as `name`, each EMA of `averages` by its own."""
    state = accelerator.get_state_dict(network)
    if accelerator.is_main_process:
        save_network(accelerator.unwrap_model(network), folder / name, state)
        for own_name, ema in averages.items():
            save_network(ema.network, folder / own_name, ema.state_dict())


def load_networks(folder, accelerator, network, name, averages):
    """Read back what `save_networks` wrote. Raises UserError where it is of other networks than this run's."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with other_networks(folder):
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(accelerator.unwrap_model(network), load_file(folder / name / FILE), options=options)
        for own_name, ema in averages.items():
            ema.load_state_dict(load_file(folder / own_name / FILE))


@contextlib.contextmanager
def other_networks(folder):
    """Within it errors of loading become a UserError: the checkpoint `folder` is of other networks."""
    try:
        yield
    except (RuntimeError, KeyError, OSError) as error:
        raise UserError(
            f"the networks in {folder} do not fit this run (another teacher, another student, or other flags of the "
            f"network?): {' '.join(str(error).split())[:200]}"
        ) from None


@contextlib.contextmanager
def complete(output):
    """Within it errors of writing the final model become a UserError (exit code 1)."""
    try:
        yield
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
        raise UserError(
            f"the final model could not be written to {output}: {' '.join(str(error).split())}; its last "
            "checkpoint is intact, run the same command with --resume_from_checkpoint=latest.", 1
        ) from error  # fmt: skip
