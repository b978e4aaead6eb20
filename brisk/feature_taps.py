"""Outputs of inner modules of a network, read during one forward pass."""

import torch


class FeatureTaps:
    """Reads the outputs of named modules: `arm`, call the network, `read`.

    Each tap keeps the first output after `arm` and ignores later ones, so that recomputation under gradient
    checkpointing and validation passes neither overwrite nor keep anything alive. Hooks sit on the network itself,
    not on a wrapper (DDP, FSDP) around it.
    """

    def __init__(self, network, names):
        """ValueError naming every module of `names` that `network` lacks."""
        modules = dict(network.named_modules())
        missing = [name for name in names if name not in modules]
        if missing:
            raise ValueError(f"the U-Net has no module {', '.join(missing)}.")
        self.names, self.features, self.armed = list(names), {}, False
        self.handles = [modules[name].register_forward_hook(self._hook(name)) for name in dict.fromkeys(names)]

    def _hook(self, name):
        def keep(module, inputs, output):
            if self.armed and name not in self.features:
                # down blocks return (hidden states, skip connections)
                self.features[name] = output if torch.is_tensor(output) else output[0]

        return keep

    def arm(self):
        """Listen to the next forward pass."""
        self.features, self.armed = {}, True

    def read(self):
        """The features in the order of the names, which are let go; RuntimeError if a module did not run."""
        features, self.features, self.armed = self.features, {}, False
        silent = [name for name in self.names if name not in features]
        if silent:
            raise RuntimeError(f"no output of {', '.join(silent)} was seen.")
        return [features[name] for name in self.names]

    def remove(self):
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def check_pairs(teacher, student, pairs, call):
    """ValueError where paired modules are missing or silent, or outputs differ in shape; `call`: arguments of both networks."""
    shapes = [_shapes(who, network, [pair[side] for pair in pairs], call)
              for side, (who, network) in enumerate((("teacher", teacher), ("student", student)))]  # fmt: skip
    named = [*pairs, ("the teacher's output", "the student's")]
    different = [f"{a} {x} and {b} {y}" for (a, b), x, y in zip(named, *shapes, strict=True) if x != y]
    if different:
        raise ValueError(f"feature pairs of different shapes: {'; '.join(different)}.")


def _shapes(who, network, names, call):
    """The shapes of the modules' outputs, and of the network's at the end."""
    try:
        taps = FeatureTaps(network, names)
    except ValueError as error:
        raise ValueError(f"feature pairs: {who}: {error}") from None
    taps.arm()
    try:
        output = network(**call)[0]
        return [tuple(feature.shape) for feature in (*taps.read(), output)]
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # whatever a layer says of its input
        raise ValueError(f"feature pairs: {who}: a trial call failed: {' '.join(str(error).split())[:300]}") from None
    finally:
        taps.remove()
