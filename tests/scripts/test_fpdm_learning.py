"""A few hundred steps on made-up latents: the loss falls, iterations converge, reuse makes few iterations enough."""

import pytest
import torch

from brisk import fpdm, gaussian

STEPS = 240
LABELS = torch.arange(4).repeat(4)


@pytest.fixture(scope="module")
def trained(run_fpdm):
    """(run, network) of the published ranges of iterations at a high learning rate."""
    done = run_fpdm("--fixed_point", f"--max_train_steps={STEPS}", "--learning_rate=3e-3", "--ema_decay=0.98", "--log_every=20",
                    "--global_batch_size=32", "--synthetic_data=512", f"--checkpointing_steps={STEPS}")  # fmt: skip
    return done, fpdm.load_transformer(done.output)


@torch.no_grad()
def sample(network, steps, iterations, reuse):
    """16 latents by DDIM, always from the same noise."""
    tables = gaussian.make_tables(network.betas(), gaussian.respaced_timesteps(steps))
    x, state = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)), None
    for i in reversed(range(steps)):
        output = network(x, tables.timesteps[i], LABELS, iterations, state)
        state = output.state if reuse else None
        x = gaussian.ddim_step(tables, output.sample[:, :4], x, torch.full((16,), i), "epsilon")
    return x


def distance(one, other):
    return ((one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).median().item()


def test_training_lowers_the_loss(trained):
    rows = trained[0].rows
    assert len(rows) == STEPS // 20 and all(row["skipped_steps"] == 0 for row in rows)
    first, last = rows[0]["mse"], sum(row["mse"] for row in rows[-5:]) / 5
    assert first > 0.6 and last < 0.5 * first
    assert sum(row["vb"] for row in rows[-5:]) < sum(row["vb"] for row in rows[:5])


@torch.no_grad()
def test_the_residual_falls_with_every_iteration_of_the_trained_layer(trained):
    network = trained[1]
    x = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (300, 700, 999):
        found = [network(x, t, LABELS, (0, count)).residual.mean().item() for count in range(1, 13)]
        assert all(later < sooner for sooner, later in zip(found, found[1:], strict=False)), (t, found)
        assert found[-1] < 0.05 * found[0]


@torch.no_grad()
def test_a_wrong_label_makes_the_error_larger(trained):
    from brisk.latent_rows import SyntheticRows
    from brisk.latents import LatentOptions

    wanted = LatentOptions(None, "", None, None, 512, 4, 8, 4, "class", None, 64, False, 0)
    rows = [SyntheticRows(wanted)[number] for number in range(256)]
    x0, labels = torch.stack([torch.from_numpy(row["latent.npy"]) for row in rows]), torch.arange(256) % 4
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)), torch.full((256,), 800)
    x = gaussian.noised(gaussian.make_tables(gaussian.linear_betas()), x0, noise, t)
    errors = [(trained[1](x, t, told, 8).sample[:, :4] - noise).square().mean().item()
              for told in (labels, (labels + 1) % 4, (labels + 2) % 4, (labels + 3) % 4)]  # fmt: skip
    assert errors[0] < min(errors[1:])


def test_with_few_iterations_starting_from_the_last_solution_comes_closer_to_the_converged_sample(trained):
    network = trained[1]
    converged = sample(network, 100, 26, True)
    cold, reused, many = (distance(sample(network, 20, *how), converged) for how in ((3, False), (3, True), (26, False)))
    assert reused < 0.8 * cold, (cold, reused, many)
    assert reused < 2 * many, "nearly as near as with 26 iterations"
