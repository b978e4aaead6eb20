"""Optimizer, learning-rate schedule, exponential moving average."""

import contextlib
import importlib.util

import torch

from brisk.options import UserError


def whole(tensor):
    """A tensor that FSDP split over the ranks as a plain one (every rank has to ask), others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def lerp_(targets, sources, decay):
    """In place: target <- decay target + (1 - decay) source, over two lists of tensors, in a few fused calls."""
    torch._foreach_lerp_(targets, [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)],
                         1 - decay)  # fmt: skip


class EMA:
    """Exponential moving average of a network: a float32 master, and a network in working precision to call.

    Half-precision masters would lose updates smaller than 2^-9 of a weight, so the working copy is refreshed from
    the master after each update; in float32 the two share storage.
    """

    def __init__(self, network):
        """`network` starts equal to the averaged one; it is frozen and put in eval mode."""
        self.network = network.requires_grad_(False).eval()
        self.master = [parameter.detach() for parameter in network.parameters()]

    def work_in(self, dtype):
        """Keep the float32 master aside and let `network` work in `dtype`; call it after a change of memory format."""
        # a new memory format gave the network new storage, which the master of a float32 network has to share
        self.master = [parameter.detach() for parameter in self.network.parameters()]
        if dtype != torch.float32:
            self.master = [parameter.clone() for parameter in self.master]
            self.network.to(dtype)

    @torch.no_grad()
    def update(self, parameters, decay):
        """One step towards `parameters`, in the order of `network.parameters()`."""
        lerp_(self.master, [whole(parameter.detach()) for parameter in parameters], decay)
        self._refresh()

    def _refresh(self):
        working = list(self.network.parameters())
        if working[0].dtype != self.master[0].dtype:
            torch._foreach_copy_(working, self.master)

    def state_dict(self):
        """The master weights under the network's names (buffers included)."""
        names = [name for name, _ in self.network.named_parameters()]
        return {**self.network.state_dict(), **dict(zip(names, self.master, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Load what `state_dict` returned."""
        for (name, _), master in zip(self.network.named_parameters(), self.master, strict=True):
            master.copy_(state[name])
        self._refresh()


def create_optimizer(name, parameters, learning_rate, betas, weight_decay, epsilon, device, warn):
    """`adamw`, fused; `adamw8bit`, with 8-bit states (bitsandbytes); `adafactor` without its own schedule.

    Where bitsandbytes is missing: UserError on CUDA; elsewhere `warn` gets a sentence and plain AdamW is used.
    Adafactor is transformers' with fixed steps, no momentum and its own epsilons; torch's differs.
    """
    settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=learning_rate, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None,
            weight_decay=weight_decay, scale_parameter=False, relative_step=False,
        )  # fmt: skip
    if name == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(parameters, **settings)
        if device.type == "cuda":
            raise UserError("8-bit Adam needs bitsandbytes: pip install bitsandbytes")
        warn("8-bit Adam: bitsandbytes is not installed (pip install bitsandbytes), plain AdamW is used.")
    return torch.optim.AdamW(parameters, fused=device.type in ("cuda", "cpu"), **settings)


def create_lr_scheduler(name, optimizer, warmup_steps, total_steps, step=0):
    """diffusers' schedule `name` after `step` steps, to be stepped once per optimizer step at any number of processes.

    It is not handed to `accelerator.prepare`, which would step it once per process.
    """
    from diffusers.optimization import get_scheduler

    for group in optimizer.param_groups if step else []:
        group["initial_lr"] = group["lr"]
    return get_scheduler(name, optimizer=optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps,
                         last_epoch=step - 1)  # fmt: skip


def prepare(accelerator, network, optimizer, batch_size, max_grad_norm):
    """`accelerator.prepare`; DeepSpeed is told what it would otherwise read off a prepared dataloader."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    return accelerator.prepare(network, optimizer)


def step_if_finite(optimizer, finite):
    """One optimizer step, skipped where the 0-dim bool tensor `finite` is False.

    The fused AdamW reads the decision on the device (the hook that GradScaler uses), so nothing waits for it; under
    fp16 GradScaler decides by itself. Other optimizers wait for `finite` on the host.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if getattr(optimizer, "scaler", None) is not None:
        optimizer.step()
    elif inner.defaults.get("fused"):
        inner.found_inf = (~finite).float()
        optimizer.step()
        del inner.found_inf
    elif finite.item():
        optimizer.step()


@contextlib.contextmanager
def swapped(tensors, others):
    """Within it two lists of tensors have exchanged their values; does nothing if `others` is None."""

    @torch.no_grad()
    def exchange():
        kept = [tensor.clone() for tensor in tensors]
        torch._foreach_copy_(tensors, others)
        torch._foreach_copy_(others, kept)

    if others is None:
        yield
        return
    exchange()
    try:
        yield
    finally:
        exchange()


class FiniteGuard:
    """Counts steps with non-finite values on the device; the host looks only when `check` is called."""

    LIMIT = 10

    ADVICE = "lower --learning_rate, or use --mixed_precision bf16, or --vae_dtype fp32"

    def __init__(self, names, device, advice=ADVICE):
        """`names` of the terms passed to `watch`, in order; "gradient" is added; `advice` to users whose run stops."""
        self.advice = advice
        self.names = [*names, "gradient"]
        self.hits = torch.zeros(len(self.names), device=device)
        self.seen = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    @torch.no_grad()
    def watch(self, *tensors):
        """Note which of the terms of a micro-step are not finite."""
        self.seen[:-1] |= torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])

    @torch.no_grad()
    def finish_step(self, gradient_norm, scaled):
        """End an optimizer step; returns a 0-dim bool tensor, whether it may be taken.

        Args: `scaled`: gradients are loss-scaled (fp16), where an infinite gradient is GradScaler's business.
        """
        # DeepSpeed clips by itself and may give no norm, or a number
        finite = torch.isfinite(
            torch.as_tensor(0.0 if gradient_norm is None else gradient_norm, device=self.seen.device)
        )
        if not scaled:
            self.seen[-1] |= ~finite
        bad = self.seen.any()
        self.hits += self.seen
        self.skipped += bad
        self.in_a_row = torch.where(bad, self.in_a_row + 1, torch.zeros_like(self.in_a_row))
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self.seen.zero_()
        return finite & ~bad

    def check(self):
        """Number of skipped steps so far; UserError (exit code 1) after `LIMIT` skipped steps in a row."""
        *hits, longest, skipped = torch.cat([self.hits, self.longest[None], self.skipped[None]]).tolist()
        if longest >= self.LIMIT:
            terms = ", ".join(f"{name} {int(hit)}x" for name, hit in zip(self.names, hits, strict=True) if hit)
            raise UserError(
                f"{int(longest)} steps in a row were not finite ({terms}): {self.advice}; earlier checkpoints are intact.", 1
            )  # fmt: skip
        return int(skipped)
