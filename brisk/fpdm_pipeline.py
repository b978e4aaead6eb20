"""`DiTPipeline` for networks with a fixed-point layer: their null label, learned variance, iterations and reuse."""

from dataclasses import dataclass

import torch
from diffusers import DiTPipeline
from diffusers.utils import BaseOutput

from brisk import fpdm, fpdm_sampling


@dataclass
class FPDMPipelineOutput(BaseOutput):
    """Images as asked for, or latents; `convergence` as `fpdm_sampling.convergence` gives it, None if not asked for."""

    images: list | torch.Tensor
    convergence: list | None = None


class FPDMPipeline(DiTPipeline):
    """`DiTPipeline` with what a fixed-point network can do, and with its own null label and learned variance.

    It steps through `fpdm_sampling.sample_latents`; its scheduler only says whether that is DDPM or DDIM.
    """

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=None, generator=None, num_inference_steps=50, output_type="pil",
                 return_dict=True, *, eta=0.0, guided_channels=None, num_iters=None, iter_schedule="constant", first_iters=None,
                 reuse_solution=None, solver="picard", fp_tol=0.0, fp_min_iters=1, fp_check_every=2, fp_tol_over="mean",
                 fp_per_sample=False, report_convergence=False):  # fmt: skip
        """Sample one image per entry of `class_labels` (numbers, or vectors (B, label_dim)). ValueError.

        Args: `guidance_scale`: None for 4, or 1 for a network without labels; `generator`: one, or one per image;
        `num_inference_steps`: also "10,15"; `output_type`: pil, np, pt or latent; `num_iters`: of the fixed-point layer per
        timestep, shared out by `iter_schedule`; `first_iters`: see `fpdm_sampling.plan_iterations`; `reuse_solution`: start
        from the previous timestep's solution; `fp_tol` and the like: see `fixed_point.solve`.
        """
        network, config, device = self.transformer, self.transformer.config, self._execution_device
        if config.label_type == "vector":
            labels = torch.as_tensor(class_labels, device=device, dtype=network.dtype)
        else:
            fpdm_sampling.check_labels(config, list(class_labels))
            labels = torch.tensor(class_labels, device=device).reshape(-1)
        if guidance_scale is None:
            guidance_scale = 1.0 if config.label_type == "none" else 4.0
        settings = fpdm_sampling.solver_settings(solver, fp_tol, fp_min_iters, fp_check_every, fp_tol_over, fp_per_sample,
                                                report_convergence)  # fmt: skip
        reuse = config.reuse_solution if reuse_solution is None else reuse_solution
        plan = fpdm_sampling.make_plan(network, num_inference_steps, self._sampler(), eta, guidance_scale, guided_channels,
                                       num_iters, iter_schedule, first_iters, reuse, settings)  # fmt: skip
        generators = generator if isinstance(generator, list) else [generator] * len(labels)
        if len(generators) != len(labels):
            raise ValueError(f"{len(generators)} generators were given for {len(labels)} images.")
        with self.progress_bar(total=len(plan.timesteps)) as bar:
            samples = fpdm_sampling.sample_latents(network, labels, generators, plan, device, bar.update)
        report = None
        if report_convergence and plan.iterations:
            report = fpdm_sampling.convergence(plan, samples.iterations, samples.residual)
        images = samples.latents if output_type == "latent" else self._decode(samples.latents, output_type)
        self.maybe_free_model_hooks()
        return FPDMPipelineOutput(images, report) if return_dict else (images, report)

    def _sampler(self):
        """ddpm or ddim, by the scheduler's class. ValueError for others."""
        kinds = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
        name = type(self.scheduler).__name__
        if name not in kinds:
            raise ValueError(f"FPDMPipeline steps like DDPMScheduler or DDIMScheduler, not like {name}: use DiTPipeline for it.")
        return kinds[name]

    def _decode(self, latents, output_type):
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def save_pretrained(self, save_directory, *given, **named):
        """As diffusers saves a `DiTPipeline` of the same parts: a folder of this class would load through no other pipeline."""
        names = {}
        for name, number in self.labels.items():
            names.setdefault(number, []).append(name)
        labels = {number: ", ".join(same) for number, same in names.items()}
        fpdm.stock_pipeline(self.transformer, self.vae, self.scheduler, labels).save_pretrained(save_directory, *given, **named)
