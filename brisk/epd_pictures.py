"""Pictures of EPD-Solver: its samples and errors beside plain solvers, and where in time its directions are taken."""

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from brisk import demo_reports

PLOTS = (("end_error", "calls"), ("end_error", "total_calls"), ("agreement", "calls"), ("frechet", "calls"))
LABELS = {"end_error": "distance to the long run", "agreement": "agreement with the long run",
          "frechet": "Fréchet distance to real images", "calls": "network calls one after the other",
          "total_calls": "network calls in all, per image"}  # fmt: skip
ROW, PLOT = 1.0, 3.7  # heights in inches


def draw_report(path, settings, styles, samples, floors, title):
    """Samples above plots, a row of plots per setting.

    Args: `settings` {words: {model: {calls: measurement}}}; `styles` {model: arguments of a curve}; `samples` {what: images
    (N, 3, H, W) in [-1, 1]}; `floors` {words: the Frechet distance that a long run has}.
    """
    heights = (ROW * len(samples) + 0.4, PLOT * len(settings) + 0.35)
    figure = Figure(figsize=(15.5, sum(heights)))
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    demo_reports.draw_samples(top, samples, {"left": 0.19, "bottom": 0.01, "top": 1 - 0.4 / heights[0]})
    spacing = {"left": 0.045, "right": 0.995, "wspace": 0.27, "hspace": 0.36, "bottom": 0.85 / heights[1],
               "top": 1 - 0.45 / heights[1]}  # fmt: skip
    plots = bottom.subplots(len(settings), len(PLOTS), squeeze=False, gridspec_kw=spacing)
    for line, (words, figures) in zip(plots, settings.items(), strict=True):
        for plot, (measure, axis) in zip(line, PLOTS, strict=True):
            _draw_curves(plot, figures, styles, measure, axis)
        line[0].set_title(words, loc="left", fontsize=11, fontweight="bold")
        line[3].axhline(floors[words], color="gray", linestyle="--", linewidth=1)
        line[3].text(0.99, floors[words], "long run", transform=line[3].get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    curves = {label: curve for line in plots for curve, label in zip(*line[0].get_legend_handles_labels(), strict=True)}
    bottom.legend(curves.values(), curves.keys(), fontsize=8, ncols=len(curves), loc="lower center")
    figure.suptitle(title, fontsize=12, y=1 - 0.06 / sum(heights))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _draw_curves(plot, figures, styles, measure, axis):
    """One measure of every model over calls, with the spread over seeds where the curve is drawn with markers in full size."""
    for model, by_calls in figures.items():
        places, values, spread = demo_reports.points(by_calls.values(), axis, measure)
        style = styles[model]
        label = model if style.get("linestyle") != ":" else None
        plot.errorbar(places, values, spread if style["marker"] == "o" else None, capsize=3, label=label, **style)
    plot.set(xlabel=LABELS[axis], ylabel=LABELS[measure])
    plot.grid(alpha=0.3, which="both")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure != "agreement":
        plot.set_yscale("log")
        demo_reports.plain_numbers(plot.yaxis, (1.5, 2, 3, 5, 7))


def levels_of_points(content):
    """(S, K) noise levels tau = s^(1-r) s'^r at which a `predictor.Predictor` has its points."""
    logs, r = content.sigmas[:, None].log(), content.tables.r
    return (logs[:-1] * (1 - r) + logs[1:] * r).exp()


def draw_tables(path, predictors, titles):
    """Where in time every direction is taken: per predictor a line over ln sigma with a disc per point, its area the weight.

    Args: `predictors`: a list of `predictor.Predictor`; `titles`: what each is called.
    """
    factors = [content.tables.scale_dir * content.tables.scale_time for content in predictors]
    reach = max(0.02, *((factor - 1).abs().max().item() for factor in factors))
    norm = TwoSlopeNorm(1, 1 - reach, 1 + reach)
    figure = Figure(figsize=(14, 0.95 * len(predictors) + 1.6))
    plot = figure.subplots()
    for lane, (content, factor) in enumerate(zip(predictors, factors, strict=True)):
        sigmas, tau, weight = content.sigmas, levels_of_points(content).flatten(), content.tables.weight.flatten()
        plot.hlines(lane, sigmas[-1], sigmas[0], color="silver", linewidth=1.2, zorder=1)
        called = sigmas[int(content.solver.afs) : -1]  # borders where the network is called, for the direction to the points
        plot.vlines(sigmas, lane - 0.32, lane + 0.32, color="black", linewidth=1, zorder=2)
        plot.vlines(called, lane - 0.32, lane + 0.32, color="black", linewidth=3.6, zorder=2)
        order = weight.argsort(descending=True)  # small discs on top
        discs = plot.scatter(tau[order], [lane] * len(tau), s=900 * weight[order], c=factor.flatten()[order], cmap="coolwarm",
                             norm=norm, edgecolors="black", linewidths=0.7, zorder=3)  # fmt: skip
    plot.set(xscale="log", xlabel="noise level σ, from noise to data", yticks=range(len(predictors)),
             ylim=(len(predictors) - 0.45, -0.55))  # fmt: skip
    plot.set_yticklabels(titles, fontsize=9)
    plot.xaxis.set_major_formatter("{x:g}")
    plot.invert_xaxis()
    plot.spines[["top", "right", "left"]].set_visible(False)
    plot.tick_params(left=False)
    plot.set_title("where every predictor takes its directions: a disc per point on its noise level, the area its weight; "
                   "bars are the borders of intervals, thick where the network is called too", fontsize=9)  # fmt: skip
    figure.colorbar(discs, ax=plot, label="factor c·a of the direction", pad=0.01, aspect=14)
    figure.savefig(path, dpi=110, bbox_inches="tight")
