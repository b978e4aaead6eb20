"""EPD-Solver as a scheduler of diffusers (arXiv 2507.14797): one network call per `step`, for pipelines as they are.

Letters: N sigmas, S = N - 1 intervals [s, s'], K points in each, B samples (2 B for pipelines that step both guidance halves).
"""

from typing import NamedTuple

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput

from brisk import denoiser_maps, predictor_files
from brisk.epd import history_order
from brisk.predictor import Predictor
from brisk.sigmas import noise_map, sigma_range
from brisk.solvers import ADAMS_BASHFORTH, analytic_direction, at, combine, intervals

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
ABOVE_RANGE = 1.01  # factor by which the first sigma may exceed the highest trained one


class Call(NamedTuple):
    """One network call of a run."""

    interval: int
    point: int | None  # 0 to K - 1; None: the direction d at the start of the interval
    tau: float  # where the state lies
    sigma: float  # what the network is told, a_k tau_k


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """EPD and its iPNDM plug-in for diffusers pipelines: make it with `from_predictor`.

    `num_inference_steps` is S, of 1 + K calls each, one less in all with an analytic first step (not for flow matching:
    pipelines show the scheduler no sample before their first call, whose output is then not used). A pipeline gives standard
    normal noise first and gets x = x0 + sigma e, or states of flow matching. The state is kept here, in float32: latents
    cannot be replaced between two calls.
    """

    _compatibles = [*(each.name for each in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]
    init_noise_sigma = 1.0  # the first noise is scaled here: not every pipeline reads this

    @register_to_config
    def __init__(self, sigmas=None, r=None, weight=None, scale_dir=None, scale_time=None, max_order=1, afs=False,
                 num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None,
                 rescale_betas_zero_snr=False, prediction_type="epsilon"):  # fmt: skip
        """Args: `sigmas` (N,); `r`, `weight`, `scale_dir`, `scale_time`: tables (S, K) as lists; `max_order`: of the plug-in, 1
        for EPD; `afs`: analytic first step; then the settings of diffusers' schedulers, `prediction_type` one of
        `PREDICTION_TYPES`. ValueError.
        """
        if sigmas is None:
            raise ValueError("EPDScheduler needs the tables of a predictor: make it with EPDScheduler.from_predictor.")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is '{prediction_type}'; it must be one of {', '.join(PREDICTION_TYPES)}.")
        self._flow = prediction_type == "flow_prediction"
        highest = 1.0
        if not self._flow:
            betas = (num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            trained = DDIMScheduler(*betas, rescale_betas_zero_snr=rescale_betas_zero_snr)
            self._table = noise_map(trained.alphas_cumprod)
            highest = sigma_range(self._table)[1]
        if sigmas[0] > ABOVE_RANGE * highest:
            raise ValueError(f"the predictor starts at sigma {sigmas[0]:g}, the model was trained up to {highest:g}.")
        self._calls = self._list_calls()
        self.set_timesteps()

    @classmethod
    def from_predictor(cls, predictor, config):
        """The scheduler that samples with `predictor` the model whose scheduler has `config` (`pipe.scheduler.config`).

        Args: `predictor`: what `predictor_files.load` takes, or a `Predictor`. Raises UserError for a bad file, ValueError for a
        predictor of another kind of model or of other noise levels.
        """
        if not isinstance(predictor, Predictor):
            predictor = predictor_files.load(predictor)
        kind, needed = _kind(config), _kind_needed(predictor)
        if kind != needed:
            raise ValueError(f"the predictor {predictor.name} is for {needed} models, the scheduler's config is of a {kind} one.")
        tables = {name: table.tolist() for name, table in predictor.tables._asdict().items()}
        order = history_order(predictor.solver.student, predictor.solver.max_order)
        prediction_type = "flow_prediction" if kind == "flow-matching" else config.get("prediction_type", "epsilon")
        return cls.from_config(config, sigmas=predictor.sigmas.tolist(), **tables, max_order=order, afs=predictor.solver.afs,
                               prediction_type=prediction_type)  # fmt: skip

    def _list_calls(self):
        """The `Call`s of a run, in order."""
        config, calls = self.config, []
        for index, start, end in intervals(config.sigmas):
            if index or self._flow or not config.afs:
                calls.append(Call(index, None, start, start))
            for point, r in enumerate(config.r[index]):
                tau = start ** (1 - r) * end**r
                calls.append(Call(index, point, tau, tau * config.scale_time[index][point]))
        return calls

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        """Begin a run; `timesteps` gets one network time per call, not rounded.

        Args: `num_inference_steps`: S, the only possible number, or None; `sigmas`: FLUX's even steps, that many; `mu` is not
        read: the noise levels are the predictor's. ValueError.
        """
        count, calls = len(self.config.r), len(self._calls)
        given = num_inference_steps if sigmas is None else len(sigmas)
        if given not in (None, count):
            raise ValueError(f"num_inference_steps is {given}; this predictor has {count} intervals ({calls} network calls): "
                             f"pass num_inference_steps={count}.")  # fmt: skip
        if sigmas is not None and any(abs(sigma - 1 + place / count) > 1e-6 for place, sigma in enumerate(sigmas)):
            raise ValueError("sigmas cannot be chosen: EPDScheduler has those of its predictor.")
        self.num_inference_steps = count
        # pipelines update their bar every `order` calls; those that give sigmas let it end at the number of calls
        self.order = 1 + len(self.config.r[0]) if sigmas is None else 1
        levels = torch.tensor([call.sigma for call in self._calls], dtype=torch.float64)
        times = levels * self.config.num_train_timesteps if self._flow else denoiser_maps.vp_timestep(self._table, levels)
        self.timesteps = times.float().to(device)
        self._reset()

    def _reset(self):
        self._position = 0
        self._noise = self._scaled = self._returned = None
        self._x = self._point = self._predictor = self._recent = self._total = None

    def set_begin_index(self, begin_index=0):
        """Pipelines say where they begin; only 0 is possible. ValueError."""
        if begin_index:
            raise ValueError("EPDScheduler samples from pure noise only: it cannot begin in the middle (image-to-image).")

    def scale_model_input(self, sample, timestep=None):
        """The network's input at the coming call, like `sample`: x / sqrt(1 + sigma^2), of flow matching `sample` itself."""
        if self._flow:
            return sample
        state = sample.float()
        if self._position == 0:
            self._noise = sample
            state = self._begin(sample)
        self._scaled = denoiser_maps.vp_input(state, at(state, self._calls[self._position].sigma)).to(sample.dtype)
        return self._scaled

    def step(self, model_output, timestep, sample, return_dict=True):
        """From the network's output at the coming call, (B, ...) like `sample`, to the state of the call after it, or the result.

        Args: `timestep` is not read, calls come in the order of `timesteps`; `sample`: what the last `step` returned, or its
        scaled form; at first the noise. ValueError for another one.
        """
        call = self._calls[self._position]
        if self._position == 0:
            if self._noise is None and not self._flow:
                raise ValueError("call scale_model_input before the network: EPDScheduler takes its noise there.")
            self._begin(sample if self._flow else self._noise[: len(model_output)])  # without the second guidance half
        elif not (_same(sample, self._returned) or _same(sample, self._scaled)):
            raise ValueError("the latents were changed between two steps; EPDScheduler cannot continue from others than its own.")
        self._take(call, self._direction(model_output, call.sigma))
        self._position += 1
        following = self._calls[self._position : self._position + 1]
        self._point = self._place(following[0]) if following else self._x
        result = self._returned = self._point.to(sample.dtype)
        if not following:
            self._reset()
        return SchedulerOutput(result) if return_dict else (result,)

    def _direction(self, output, sigma):
        """d (B, ...) float32 of the network's raw output at the state it saw."""
        if self._flow:
            return output.float()
        return denoiser_maps.vp_direction(output, self._point, at(self._point, sigma), self.config.prediction_type)

    def _begin(self, noise):
        """Start from standard normal `noise` (B, ...); gives the state of the first call."""
        self._x = noise.float() * (1.0 if self._flow else self.config.sigmas[0])
        self._recent, first = [], self._calls[0]
        if first.point is not None:
            self._open(analytic_direction(self._x, self.config.sigmas[0]))
        self._point = self._place(first)
        return self._point

    def _open(self, direction):
        """Take d at the start of an interval: its points will lie along the Adams-Bashforth combination of the last ones."""
        self._recent = [direction, *self._recent][: self.config.max_order]
        self._predictor = combine(ADAMS_BASHFORTH[len(self._recent) - 1], self._recent)
        self._total = 0

    def _place(self, call):
        """The state (B, ...) at which `call` evaluates the network."""
        if call.point is None:
            return self._x
        return self._x + (call.tau - self.config.sigmas[call.interval]) * self._predictor

    def _take(self, call, direction):
        """Use the direction of `call`; the last of an interval completes x' = x + (s' - s) sum_k w_k c_k a_k d_k."""
        config, interval, point = self.config, call.interval, call.point
        if point is None:
            analytic = config.afs and interval == 0
            self._open(analytic_direction(self._x, config.sigmas[0], flow=True) if analytic else direction)
            return
        factor = config.weight[interval][point] * config.scale_dir[interval][point] * config.scale_time[interval][point]
        self._total = self._total + factor * direction
        if point + 1 == len(config.r[interval]):
            self._x = self._x + (config.sigmas[interval + 1] - config.sigmas[interval]) * self._total


def _same(sample, own):
    """Whether `sample` is the tensor `own`, or a copy of it."""
    return sample is own or (own is not None and sample.shape == own.shape and bool((sample == own).all()))


def _kind(config):
    """The kind of model that a scheduler's config belongs to. ValueError for others than DDPM-type and flow matching."""
    if config.get("prediction_type") == "flow_prediction" or ("shift" in config and "beta_schedule" not in config):
        return "flow-matching"
    if "beta_schedule" not in config:
        raise ValueError("EPDScheduler needs the config of a scheduler of DDPM-type or flow-matching models.")
    return "DDPM-type"


def _kind_needed(predictor):
    """The kind of model a predictor was made for."""
    backend = predictor.model.get("backend")
    if backend in ("sd3", "flux") or predictor.document["schedule"]["type"] == "flowmatch":
        return "flow-matching"
    return backend if backend in ("edm", "cm", "gmm") else "DDPM-type"
