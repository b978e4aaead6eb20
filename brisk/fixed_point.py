"""Fixed-point iteration: Picard and Anderson solvers, residuals, early exit, how many iterations each timestep gets.

Source: arXiv 2401.08741 (FPDM), 1910.12430 (Anderson acceleration per sample). Letters: B batch; states are (B, ...).
"""

import torch

SCHEDULES = ("constant", "increasing", "decreasing")


def residual(new, old):
    """Relative change per sample (B,), float32: |new - old| / (|new| + 1e-8), norms over all other dimensions."""
    new, old = new.flatten(1).float(), old.flatten(1).float()
    return (new - old).norm(dim=1) / (new.norm(dim=1) + 1e-8)


def picard(step, state, count):
    """`count` applications of `step` (state -> state)."""
    for _ in range(count):
        state = step(state)
    return state


class Anderson:
    """Anderson acceleration per sample: `mix` a state and its image into the next state."""

    def __init__(self, window=5, ridge=1e-4, damping=1.0):
        """`window` pairs are kept, the current one included."""
        self.window, self.ridge, self.damping = window, ridge, damping
        self.states, self.images = [], []

    def keep(self, rows):
        """Continue with the samples `rows` of the batch alone (an index tensor)."""
        self.states, self.images = ([pair[rows] for pair in pairs] for pairs in (self.states, self.images))

    @torch.no_grad()
    def mix(self, state, image):
        """The next state from z and f = F(z); the plain step f where the small system has no finite solution."""
        wide = torch.promote_types(image.dtype, torch.float32)
        self.states = [*self.states, state.flatten(1).to(wide)][-self.window :]
        self.images = [*self.images, image.flatten(1).to(wide)][-self.window :]
        if len(self.images) == 1:
            return image
        images, states = torch.stack(self.images, 1), torch.stack(self.states, 1)  # (B, w, n)
        rows = images - states
        gram = rows @ rows.transpose(1, 2)
        size = gram.shape[1]
        scale = gram.diagonal(dim1=1, dim2=2).sum(1) / size
        gram = gram + self.ridge * scale[:, None, None] * torch.eye(size, device=gram.device, dtype=wide)
        weights, _ = torch.linalg.solve_ex(gram, torch.ones(len(gram), size, 1, device=gram.device, dtype=wide))
        weights = weights / weights.sum(1, keepdim=True)
        mixed = (weights * (self.damping * images + (1 - self.damping) * states)).sum(1)
        mixed = torch.where(mixed.isfinite().all(1, keepdim=True), mixed, images[:, -1])
        return mixed.view_as(image).to(image.dtype)


def iteration_schedule(steps, mean, kind):
    """Iterations of each respaced timestep (index 0 the least noisy), `steps` x `mean` in total, each at least one.

    `increasing` gives more to noisier timesteps, linearly from half to one and a half times the mean surplus.
    """
    if kind == "constant" or steps == 1:
        return [mean] * steps
    surplus, denominator = steps * mean - steps, 2 * steps * (steps - 1)
    places = [index if kind == "increasing" else steps - 1 - index for index in range(steps)]
    shares = [divmod(surplus * (steps - 1 + 2 * place), denominator) for place in places]
    counts = [1 + whole for whole, _ in shares]
    missing = steps * mean - sum(counts)
    for index in sorted(range(steps), key=lambda index: (-shares[index][1], -index))[:missing]:
        counts[index] += 1
    return counts


def solve(step, state, count, solver="picard", tolerance=0.0, minimum=1, check_every=2, over="mean", per_sample=False,
          paired=False):  # fmt: skip
    """At most `count` evaluations of `step` from `state`; fewer once the residual is at most `tolerance` (0: never).

    Args: `step(state, rows)` is the map for the samples `rows` (an index tensor, None: all). The residual is looked at every
    `check_every` evaluations from `minimum` on: its mean over the batch (`over` max: its largest), or with `per_sample`
    each one's own, where converged samples keep their state and are left out of the batch once they are half of it;
    `paired`: sample b of the first half and of the second (guidance) count as one.
    Returns (state, evaluations (B,) int64, residual of the last evaluation (B,) float32).
    """
    looks = {n for n in range(minimum, count) if tolerance > 0 and n % check_every == 0}
    mixer = Anderson() if solver == "anderson" else None
    if looks and per_sample:
        return _solve_each(step, state, count, mixer, tolerance, looks, paired)
    for number in range(1, count + 1):
        image = step(state, None)
        if number == count or number in looks:
            rho = residual(image, state)
            if number == count or (rho.amax() if over == "max" else rho.mean()) <= tolerance:
                break
        state = mixer.mix(state, image) if mixer else image
    return image, torch.full((len(image),), number, device=image.device), rho


def _solve_each(step, state, count, mixer, tolerance, looks, paired):
    """`solve` where each sample stops by itself."""
    rows = torch.arange(len(state), device=state.device)  # of the batch that are worked on
    going = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not converged
    final, used = state.clone(), torch.zeros_like(rows)
    rho = torch.full((len(state),), float("nan"), device=state.device)
    for number in range(1, count + 1):
        image = step(state, rows)
        used[rows] += going
        if number == count or number in looks:
            rho[rows] = torch.where(going, residual(image, state), rho[rows])
        image = torch.where(_like(going, image), image, state.to(image.dtype))
        if number in looks:
            going = going & ~_converged(rho, tolerance, paired)[rows]
            if 2 * int(going.sum()) <= len(rows):
                final[rows] = image.to(final.dtype)
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    return final, used, rho
                rows, state, image, going = rows[keep], state[keep], image[keep], going[keep]
                if mixer:
                    mixer.keep(keep)
        if number < count:
            state = torch.where(_like(going, image), mixer.mix(state, image), image) if mixer else image
    final[rows] = image.to(final.dtype)
    return final, used, rho


def _like(flags, states):
    return flags.reshape(-1, *[1] * (states.dim() - 1))


def _converged(rho, tolerance, paired):
    if paired:
        rho = torch.maximum(*rho.chunk(2)).repeat(2)
    return rho <= tolerance
