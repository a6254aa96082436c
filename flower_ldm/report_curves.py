"""The charts of a report: from log lines and sweeps to the paths and data of the page's template and script.

The page stretches the charts to the width of the screen and shows values on hover. matplotlib only chooses the ticks.
"""

import math
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from .formatting import LARGEST, is_finite, number
from .metrics import METRICS, RECONSTRUCTION_METRICS

MAX_POINTS = 600  # of a curve; a longer one is cut into stretches, and the extremes of each are drawn
LOG_SCALE_RATIO = 8  # a loss is drawn on a log scale if its highest value is above this many times its lowest
# The optimizer's entries in a log line; all other entries are losses and scores.
OPTIMIZER_NAMES = ("learning_rate", "grad_norm", "adaptive_weight", "steps_per_second")
SCORES = {
    metric.stage1_key.removeprefix("val_"): metric.title_with_unit
    for metric in RECONSTRUCTION_METRICS
    if metric.hub_type
}
CURVES_FIRST = ("loss", "unweighted_loss", "pixel_loss", "perceptual_loss", *SCORES)
NOT_DRAWN = ("step", "mean_squared_error", "psnr_of_mean_squared_error")  # PSNR shows what the last two show
CURVE_TITLES = {
    **SCORES,
    "kl_loss": "KL loss",
    "loss": "Loss, weighted",
    "grad_norm": "Gradient norm",
    "steps_per_second": "Updates per second",
}


class Series(NamedTuple):
    """One curve. Held-out values have marked points."""

    name: str
    points: list[tuple[float, float]]
    marked: bool = False
    style: str = "s1"  # the style sheet's class for color and dashes


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """About `limit` points at most, in order: the first, the last, and the lowest and highest of each stretch."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def chart(
    heading: str, series: list[Series], x_name: str, x_range: tuple[float, float] | None = None, *,
    may_be_log: bool = False, group: str | None = None, note: str = "",
) -> dict | None:  # fmt: skip
    """A chart for the template: paths in a square of 1000 x 1000 that the page stretches, ticks in percent, and data.

    Args:
        series: the curves. Those without points are left out.
        x_range: range of the x axis. By default, the range of the points.
        may_be_log: use a log scale if the values span more than `LOG_SCALE_RATIO`.
        group: the cross-hair moves in all charts of a group at once.

    Returns:
        `None` if there is nothing to draw.
    """
    series = [one._replace(points=thin(one.points)) for one in series if one.points]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    left, right = x_range or (min(xs), max(xs))
    if left == right:
        left, right = left - 1, right + 1
    log_scale = may_be_log and min(ys) > 1 / LARGEST and max(ys) / min(ys) > LOG_SCALE_RATIO
    bottom, top, ticks = _y_axis(min(ys), max(ys), log_scale)
    scale = math.log if log_scale else float

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def up(y: float) -> float:
        return (scale(y) - scale(bottom)) / (scale(top) - scale(bottom))

    def path(one: Series) -> str:
        places = [f"{1000 * across(x):.1f} {1000 - 1000 * up(y):.1f}" for x, y in one.points]
        return "M" + "L".join(places)

    x_ticks = sorted(set(xs)) if len(set(xs)) <= 6 and group == "sweep" else MaxNLocator(4).tick_values(left, right)
    x_ticks = [x for x in x_ticks if left <= x <= right]
    return {
        "heading": heading, "note": note, "log_scale": log_scale, "x_name": x_name, "group": group or "",
        "paths": [{"d": path(one), "dots": "".join(f"M{p}h0" for p in path(one)[1:].split("L"))} for one in series],
        "series": series,
        "last": [number(float(one.points[-1][1])) for one in series],
        "x_ticks": [(f"{100 * across(x):.2f}", number(_whole(x))) for x in x_ticks],
        "y_ticks": [(f"{100 * up(y):.2f}", number(_whole(y))) for y in ticks],
        "summary": "; ".join(f"{one.name} from {number(one.points[0][1])} to {number(one.points[-1][1])}"
                             for one in series),
        "data": {
            "x": [left, right], "y": [bottom, top], "log": log_scale, "xName": x_name,
            "series": [{"name": one.name, "points": [[x, float(f"{y:.5g}")] for x, y in one.points]}
                       for one in series],
        },
    }  # fmt: skip


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _y_axis(low: float, high: float, log_scale: bool) -> tuple[float, float, list[float]]:
    """The lowest and highest value of an axis, with some margin, and its ticks."""
    if log_scale:
        low, high = low / 1.15, high * 1.15
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(ticks) >= 3:
                break
        return low, high, ticks
    if low >= 0 and low < high / 2:
        low = 0.0  # start at zero if the curve then still fills half of the height
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (0.0 if low == 0 else low - margin), high + margin
    return low, high, [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _curve(log: list[dict], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in log if is_finite(line.get(name)) and is_finite(line["step"])]


def training_curves(log: list[dict]) -> tuple[list[dict], list[dict]]:
    """A chart for every scalar of the log: losses and scores, then the optimizer's. Held-out values are points."""
    names = dict.fromkeys(name.removeprefix("val_") for line in log for name in line)
    names = [*(name for name in CURVES_FIRST if name in names), *(name for name in names if name not in CURVES_FIRST)]
    x_range = (0, log[-1]["step"]) if log else None
    keys = [metric.stage1_key for metric in RECONSTRUCTION_METRICS]
    measured_only = [
        key for key in keys if key and not key.startswith("val_")
    ]  # only validation measures these: no prefix
    charts: dict[str, dict | None] = {}
    for name in names:
        if name in NOT_DRAWN:
            continue
        held_out = _curve(log, name if name in measured_only else f"val_{name}")
        trained = [] if name in measured_only else _curve(log, name)
        if name in OPTIMIZER_NAMES:
            series = [Series("each update" if name == "learning_rate" else "mean since the last line", trained)]
        else:
            series = [Series("training", trained), Series("held out", held_out, marked=True, style="s2")]
        heading = CURVE_TITLES.get(name, name.replace("_", " ").capitalize())
        charts[name] = chart(heading, series, "update", x_range, may_be_log=name.endswith(("loss", "grad_norm")),
                             group="updates")  # fmt: skip
    losses = [one for name, one in charts.items() if one and name not in OPTIMIZER_NAMES]
    return losses, [charts[name] for name in OPTIMIZER_NAMES if charts.get(name)]


def timestep_chart(log: list[dict]) -> dict | None:
    """The unweighted loss by timestep, in the first, a middle and the last log line."""
    lines = [line for line in log if isinstance(line.get("loss_by_timestep"), list)]
    series = []
    shown = sorted({0, len(lines) // 2, len(lines) - 1}) if lines else []
    for index, style in zip(shown, ("early", "middle", "s1")[3 - len(shown) :], strict=True):
        bins = [(low, high, mean) for low, high, mean in lines[index]["loss_by_timestep"] if is_finite(mean)]
        points = [((low + high) / 2, mean) for low, high, mean in bins]
        series.append(Series(f"update {number(lines[index]['step'])}", points, marked=True, style=style))
    ends = [end for line in lines for low, high, _ in line["loss_by_timestep"] for end in (low, high)]
    return chart("Loss by timestep, unweighted", series, "timestep", (min(ends), max(ends)) if ends else None,
                 may_be_log=True)  # fmt: skip


def sweep_charts(sweep: list[dict]) -> list[dict]:
    """A chart for each metric over the guidance scale, one curve for each number of steps.

    A sweep with one guidance scale is drawn over the number of steps.
    """
    by_guidance = len({row.get("guidance_scale") for row in sweep}) > 1
    x_key, curve_key = ("guidance_scale", "num_inference_steps") if by_guidance else ("num_inference_steps", None)
    values = sorted({row.get(curve_key) for row in sweep}) if curve_key else [None]
    charts = []
    for metric in METRICS:
        if not metric.is_swept:
            continue
        series = []
        for index, value in enumerate(values):
            rows = [row for row in sweep if curve_key is None or row.get(curve_key) == value]
            points = [(row.get(x_key), row.get(metric.key)) for row in rows]
            points = sorted((x, y) for x, y in points if is_finite(x) and is_finite(y))
            label = f"{value} steps" if curve_key else "samples"
            series.append(Series(label, points, marked=True, style=f"s{index % 4 + 1}"))
        x_name = "guidance scale" if by_guidance else "steps"
        charts.append(chart(metric.title, series, x_name, group="sweep", note=f"{metric.better} is better"))
    return [one for one in charts if one]
