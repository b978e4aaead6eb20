"""The fixed-point solvers where golden numbers do not reach: early exit, frozen samples, pairs, fallbacks, budgets."""

import pytest
import torch

from brisk import fixed_point

pytestmark = pytest.mark.quick


class Contraction:
    """z -> goal + rate (z - goal) per sample, noting which rows each call was given."""

    def __init__(self, rates, size=6):
        draw = torch.Generator().manual_seed(0)
        self.rates = torch.tensor(rates, dtype=torch.float64)[:, None]
        self.goal = 1 + torch.rand(len(rates), size, generator=draw, dtype=torch.float64)
        self.calls = []

    def __call__(self, z, rows=None):
        self.calls.append(list(range(len(z))) if rows is None else rows.tolist())
        goal, rate = (self.goal, self.rates) if rows is None else (self.goal[rows], self.rates[rows])
        assert len(z) == len(goal)
        return goal + rate * (z - goal)

    def start(self):
        return torch.zeros_like(self.goal)

    def image(self, count):
        """The state after `count` plain steps, in closed form."""
        return self.goal - self.rates**count * self.goal


class Tanh:
    """A map whose solution is not known in closed form."""

    def __init__(self, batch=3, size=8, gain=0.9):
        draw = torch.Generator().manual_seed(1)
        self.matrix = gain * torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0]
        self.shift = torch.randn(batch, size, generator=draw, dtype=torch.float64)
        self.images = []

    def __call__(self, z, rows=None):
        shift = self.shift if rows is None else self.shift[rows]
        self.images.append(torch.tanh(z @ self.matrix.T) + shift)
        return self.images[-1]


def test_residual_is_relative_and_per_sample():
    new = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    assert fixed_point.residual(new, torch.zeros_like(new)).tolist() == pytest.approx([1.0, 0.0])
    assert fixed_point.residual(new.bfloat16(), new.bfloat16()).dtype == torch.float32
    old = torch.tensor([[[3.0, 3.0]], [[1.0, 0.0]]])
    assert fixed_point.residual(new, old).tolist() == pytest.approx([0.2, 1e8], rel=1e-5)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_without_a_tolerance_the_whole_budget_is_spent(solver, count):
    step = Tanh()
    state, used, rho = fixed_point.solve(step, torch.zeros(3, 8, dtype=torch.float64), count, solver)
    assert len(step.images) == count and used.tolist() == [count] * 3
    assert torch.equal(state, step.images[-1]), "the result is an image, not a mixture"
    assert rho.isfinite().all() and rho.dtype == torch.float32


def test_picard_is_plain_repetition():
    step = Contraction([0.5, 0.9])
    state, _, rho = fixed_point.solve(step, step.start(), 5)
    torch.testing.assert_close(state, step.image(5))
    torch.testing.assert_close(fixed_point.picard(step, step.start(), 5), step.image(5))
    gap = (step.image(5) - step.image(4)).norm(dim=1) / step.image(5).norm(dim=1)
    torch.testing.assert_close(rho.double(), gap, rtol=1e-6, atol=0)


def residuals(step, count):
    """The residual of each of `count` plain steps, (count, B), in float64."""
    return torch.stack([(step.image(k) - step.image(k - 1)).norm(dim=1) / step.image(k).norm(dim=1)
                        for k in range(1, count + 1)])  # fmt: skip


@pytest.mark.parametrize("check_every", [1, 2, 3])
@pytest.mark.parametrize("minimum", [1, 8])
def test_early_exit_comes_at_the_first_look_where_the_mean_residual_is_small_enough(check_every, minimum):
    step, tolerance = Contraction([0.2, 0.8]), 0.02
    mean = residuals(step, 30).mean(1)
    expected = next(k for k in range(minimum, 31) if k % check_every == 0 and mean[k - 1] <= tolerance)
    assert expected < 30
    state, used, rho = fixed_point.solve(step, step.start(), 30, tolerance=tolerance, minimum=minimum, check_every=check_every)
    assert used.tolist() == [expected] * 2 == [len(step.calls)] * 2
    torch.testing.assert_close(state, step.image(expected))
    assert rho.mean() <= tolerance
    assert rho[0] < tolerance / 10, "the slow sample alone would not have stopped there"


def test_early_exit_can_wait_for_the_slowest_sample():
    step, tolerance = Contraction([0.2, 0.8]), 0.02
    largest = residuals(step, 30).amax(1)
    expected = next(k for k in range(1, 31) if largest[k - 1] <= tolerance)
    _, used, rho = fixed_point.solve(step, step.start(), 30, tolerance=tolerance, check_every=1, over="max")
    assert used.tolist() == [expected] * 2 and rho.amax() <= tolerance
    mean = fixed_point.solve(step, step.start(), 30, tolerance=tolerance, check_every=1)[1]
    assert mean[0] < expected


def test_a_budget_too_small_for_the_tolerance_is_kept():
    step = Contraction([0.99, 0.99])
    _, used, rho = fixed_point.solve(step, step.start(), 6, tolerance=1e-3)
    assert used.tolist() == [6, 6] and (rho > 1e-3).all()


def test_each_sample_stops_by_itself_and_keeps_its_state():
    step = Contraction([0.1, 0.1, 0.8, 0.9])
    state, used, rho = fixed_point.solve(step, step.start(), 200, tolerance=1e-3, check_every=1, per_sample=True)
    first = [next(k for k in range(1, 201) if row[k - 1] <= 1e-3) for row in residuals(step, 200).T]
    assert used[0] == used[1] == first[0] < used[2] == first[2] < used[3] == first[3]
    expected = torch.stack([step.image(int(count))[row] for row, count in enumerate(used)])
    torch.testing.assert_close(state, expected)
    assert (rho <= 1e-3).all()
    assert step.calls[first[0] - 1] == [0, 1, 2, 3] and step.calls[first[0]] == [2, 3], "left out once half have converged"
    assert step.calls[first[2] - 1] == [2, 3] and step.calls[first[2]] == [3] and len(step.calls) == first[3]


def test_fewer_than_half_converged_stay_in_the_batch_and_do_not_move_on():
    step = Contraction([0.05, 0.9, 0.9])
    state, used, _ = fixed_point.solve(step, step.start(), 9, tolerance=1e-3, check_every=1, per_sample=True)
    assert all(call == [0, 1, 2] for call in step.calls)
    stop = next(k for k in range(1, 10) if residuals(step, 9)[k - 1, 0] <= 1e-3)
    assert used.tolist() == [stop, 9, 9], "a frozen sample counts the evaluations up to its convergence"
    torch.testing.assert_close(state[0], step.image(stop)[0])
    torch.testing.assert_close(state[1:], step.image(9)[1:])


def test_all_samples_converged_ends_at_once():
    step = Contraction([0.1, 0.1])
    _, used, _ = fixed_point.solve(step, step.start(), 50, tolerance=1e-2, check_every=1, per_sample=True)
    assert used[0] == used[1] == len(step.calls) < 50


def test_a_guided_pair_counts_as_one_sample():
    rates = [0.1, 0.5, 0.9, 0.5]  # sample 0 is (0.1, 0.9), sample 1 (0.5, 0.5)
    alone, paired = Contraction(rates), Contraction(rates)
    _, used_alone, _ = fixed_point.solve(alone, alone.start(), 300, tolerance=1e-3, check_every=1, per_sample=True)
    state, used, _ = fixed_point.solve(paired, paired.start(), 300, tolerance=1e-3, check_every=1, per_sample=True, paired=True)
    assert used_alone[0] < used_alone[2]
    assert used[0] == used[2] == used_alone[2], "as many as its slower half"
    assert used[1] == used[3] == used_alone[1]
    torch.testing.assert_close(state[0], paired.image(int(used[0]))[0])


def test_anderson_beats_plain_steps_and_continues_with_the_rows_that_are_left():
    draw = torch.Generator().manual_seed(2)
    solution = torch.zeros(3, 8, dtype=torch.float64)
    for _ in range(3000):
        solution = Tanh(gain=0.97)(solution)
    errors = {}
    for solver in ("picard", "anderson"):
        step = Tanh(gain=0.97)
        state, _, _ = fixed_point.solve(step, torch.zeros(3, 8, dtype=torch.float64), 12, solver)
        errors[solver] = (state - solution).norm()
    assert errors["anderson"] < errors["picard"] / 2
    step = Tanh(gain=0.97)
    start = solution + torch.tensor([[1e-6], [1e-6], [1.0]]) * torch.randn(3, 8, generator=draw, dtype=torch.float64)
    state, used, rho = fixed_point.solve(step, start, 400, "anderson", tolerance=1e-5, check_every=1, per_sample=True)
    assert used[0] == used[1] < used[2] < 400 and (rho <= 1e-5).all()
    assert len(step.images[-1]) == 1
    torch.testing.assert_close(state, solution, rtol=0, atol=1e-3)


def test_anderson_is_the_least_squares_mixture_of_its_window():
    mixer, draw = fixed_point.Anderson(window=3, ridge=1e-3, damping=0.7), torch.Generator().manual_seed(4)
    pairs = [torch.randn(2, 2, 5, generator=draw, dtype=torch.float64) for _ in range(5)]
    for number, (state, image) in enumerate(pairs):
        found = mixer.mix(state, image)
        window = pairs[max(0, number - 2) : number + 1]
        for sample in range(2):
            states, images = (torch.stack([pair[part, sample] for pair in window]) for part in (0, 1))
            gram = (images - states) @ (images - states).T
            if len(window) > 1:
                gram += 1e-3 * gram.trace() / len(window) * torch.eye(len(window), dtype=torch.float64)
                weights = torch.linalg.inv(gram) @ torch.ones(len(window), dtype=torch.float64)
                weights /= weights.sum()
                expected = weights @ (0.7 * images + 0.3 * states)
            else:
                expected = images[0]
            torch.testing.assert_close(found[sample], expected, rtol=1e-6, atol=1e-8)


def test_anderson_takes_the_plain_step_for_a_sample_without_a_finite_mixture():
    mixer = fixed_point.Anderson()
    mixer.mix(torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [1, 2, 3]]))
    state, image = torch.tensor([[1.0, 1, 1], [0, 0, 0]]), torch.tensor([[float("inf"), 1, 1], [1, 1, 1]])
    mixed = mixer.mix(state, image)
    assert torch.equal(mixed[0], image[0]), "what the map gave, not a mixture of nothing"
    assert mixed[1].isfinite().all() and not torch.equal(mixed[1], image[1])
    converged = fixed_point.Anderson()
    same = torch.ones(1, 3)
    for _ in range(3):
        assert torch.equal(converged.mix(same, same), same), "all residuals zero: the system is singular"


@pytest.mark.parametrize("kind", fixed_point.SCHEDULES)
@pytest.mark.parametrize(("steps", "mean"), [(1, 5), (2, 1), (7, 3), (20, 3), (40, 12), (93, 4)])
def test_schedules_spend_the_budget_exactly_and_never_skip_a_step(kind, steps, mean):
    counts = fixed_point.iteration_schedule(steps, mean, kind)
    assert len(counts) == steps and sum(counts) == steps * mean and min(counts) >= 1
    rising = all(low <= high for low, high in zip(counts, counts[1:], strict=False))
    falling = all(low >= high for low, high in zip(counts, counts[1:], strict=False))
    assert {"constant": rising and falling, "increasing": rising, "decreasing": falling}[kind], counts


def test_increasing_spends_half_to_one_and_a_half_times_the_surplus():
    counts = fixed_point.iteration_schedule(101, 41, "increasing")
    assert (counts[0], counts[50], counts[-1]) == (21, 41, 61)
    assert fixed_point.iteration_schedule(101, 41, "decreasing") == counts[::-1]
