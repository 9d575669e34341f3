"""One page of several results: a self-contained HTML file, light and dark, that needs no network and no script."""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.ticker import MaxNLocator

from ..run.errors import UserError, one_line
from ..synthetic import load_idc
from . import hours, known
from .load import load_stage
from .report import SELECTED, accuracy_text, table_rows

WIDTH, HEIGHT = 440, 270  # of a chart's coordinates
LEFT, RIGHT, TOP, BOTTOM = 60, 430, 10, 230  # the edges of its axes
CURVE_POINTS = 50  # of a curve
IMAGES_SHOWN = 10  # of each class and stage
LARGEST = 96  # pixels of an image on the page


def render(results):
    """Return the HTML of the page for a list of `compare.EvaluatedResult`."""
    shown = [_describe(number, result) for number, result in enumerate(results, 1)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"accuracy_text": accuracy_text, "width": WIDTH, "height": HEIGHT}
    environment.globals |= {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return environment.get_template("page.html").render(
        results=shown,
        accuracy=_accuracy_charts(shown),
        losses=_curve_charts(shown, "loss", "matching loss"),
        rates=_curve_charts(shown, "syn_lr", "synthetic learning rate"),
        images=_image_tables(shown),
        shown_of_each=IMAGES_SHOWN,
    )


def _describe(number, result):
    """Return what the page says of one result."""
    rows = table_rows(result.report)
    own = [row for row in rows if row["network"] == result.report["model"]]
    by_kind = {kind: [row for row in own if row["kind"] == kind] for kind in ("stages", "fresh", "random", "full")}
    measured, selected = hours.read(result.folder), result.report.get("select_on", "unknown").split(", ")
    return {
        "number": number,
        "colour": (number - 1) % 8,
        "name": f"{number}: {result.label}",
        "result": result,
        "dataset": result.report["dataset"],
        "rows": rows,
        "stages": by_kind["fresh"] or by_kind["stages"],
        "starts": _starts(result),
        "random": by_kind["random"][0] if by_kind["random"] else None,
        "full": by_kind["full"][0] if by_kind["full"] else None,
        "hours": measured,
        "made_in": hours.of_distillation(measured),
        "selected": ", ".join(SELECTED.get(word, word) for word in selected),
    }


def _starts(result):
    """Return in a word how the networks of the headline start; empty for older reports, which do not say it."""
    if result.base != "MTT" or result.report.get("fresh"):
        return "fresh"
    starts = result.report["config"].get("starts")  # a digest of the experts', or random
    return "fresh" if starts == "random" else "matched" if starts else ""


def _accuracy_charts(shown):
    """Return charts of accuracy against images, one for each data set, and against hours, for each unit, too."""
    charts = []
    for dataset in dict.fromkeys(one["dataset"] for one in shown):
        chosen = [one for one in shown if one["dataset"] == dataset]
        series = []
        for one in chosen:
            points = [(row["ipc"], row["mean"], row["std"]) for row in one["stages"]]
            series.append(_series(one["name"], one["colour"], points, "line"))
            if one["random"]:
                row = one["random"]
                points = [(row["ipc"], row["mean"], row["std"])]
                series.append(_series(f"{one['number']}: random real images", one["colour"], points, "cross"))
            if one["full"]:
                points = [(None, one["full"]["mean"], 0.0)]
                series.append(_series(f"{one['number']}: full training set", one["colour"], points, "level"))
        charts.append(_chart(f"{dataset}: accuracy against images", series, "images per class", "test accuracy (%)"))
        for unit in ("CPU", "GPU"):
            timed = [one for one in chosen if one["made_in"] and one["made_in"][1] == unit]
            series = []
            for one in timed:
                last = one["stages"][-1]
                points = [(one["made_in"][0], last["mean"], last["std"])]
                series.append(_series(one["name"], one["colour"], points, "line"))
            if series:
                across = f"{unit} hours of experts and distillation"
                charts.append(_chart(f"{dataset}: accuracy against hours", series, across, "test accuracy (%)"))
    return charts


def _curve_charts(shown, key, words):
    """Return a chart for each result that logged `key`, a curve for each stage."""
    charts = []
    for one in shown:
        logs = one["result"].logs
        series = []
        for stage, log in logs.items():
            found = [(row["iteration"], row[key]) for row in log if key in row]
            if found:
                ramp = round(100 * (stage - 1) / max(len(logs) - 1, 1))
                series.append(_series(f"stage {stage}", None, _thinned(found), "curve") | {"ramp": ramp})
        if series:
            charts.append(_chart(one["name"], series, "iteration", words))
    return charts


def _thinned(found):
    """Return at most `CURVE_POINTS` (mean x, mean y, 0.0) of the (x, y) in `found`, each of neighbouring ones."""
    groups = np.array_split(np.array(found, dtype=float), min(len(found), CURVE_POINTS))
    return [(*map(float, group.mean(0)), 0.0) for group in groups]


def _series(name, colour, points, kind):
    """Return one series of a chart.

    Args:
        name: for the legend.
        colour: number of a colour.
        points: list of (x, y, half length of the bar); x is None for a level.
        kind: line (with points and bars), curve (without), cross (points alone) or level (a horizontal line).
    """
    return {"name": name, "colour": colour, "points": points, "kind": kind}


def _chart(title, series, across, up):
    """Return a chart for the template: the series with their points in coordinates of the drawing, and the ticks."""
    points = [point for one in series for point in one["points"]]
    xs = [x for x, *_ in points if x is not None]
    whole = all(float(x).is_integer() for x in xs) and max(xs) > 1
    ys = [y + side * bar for _, y, bar in points for side in (-1, 1)]
    (left, right), (low, high) = _limits(xs), _limits(ys)
    place_x = lambda x: LEFT + (x - left) / (right - left) * (RIGHT - LEFT)  # noqa: E731
    place_y = lambda y: BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP)  # noqa: E731
    drawn = []
    for one in series:
        marks = []
        for x, y, bar in one["points"]:
            ends = (place_y(y + bar), place_y(y - bar)) if bar else None
            words = f"{y:.2f} ± {bar:.2f}" if bar else f"{y:.4g}"
            where = "" if x is None else f" at {x:.4g}"
            at = LEFT if x is None else place_x(x)
            marks.append({"x": at, "y": place_y(y), "ends": ends, "words": f"{one['name']}: {words}{where}"})
        drawn.append(one | {"marks": marks})
    return {
        "title": title,
        "series": drawn,
        "across": across,
        "up": up,
        "x_ticks": [(place_x(t), f"{t:g}") for t in _ticks(left, right, whole)],
        "y_ticks": [(place_y(t), f"{t:g}") for t in _ticks(low, high)],
    }


def _ticks(low, high, whole=False):
    return [float(t) for t in MaxNLocator(5, integer=whole).tick_values(low, high) if low <= t <= high]


def _limits(values):
    """Return the ends of an axis, a little outside of all `values`."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def _image_tables(shown):
    """Return a table of images for each data set: a row for each class, a column for each stage of each result."""
    tables = {}
    for one in shown:
        try:
            names, pixels, classes, stages = _learned(one["result"].folder)
        except UserError as error:
            one["no_images"] = one_line(error)
            continue
        table = tables.setdefault((one["dataset"], tuple(names)), {"dataset": one["dataset"], "rows": [], "heads": []})
        numbers = sorted(set(stages.tolist()))
        table["heads"].append((one, numbers))
        if not table["rows"]:
            table["rows"] = [(name, []) for name in names]
        for label, (name, cells) in enumerate(table["rows"]):
            for stage in numbers:
                chosen = pixels[(classes == label) & (stages == stage)][:IMAGES_SHOWN]
                words = f"{name}, learned in stage {stage} by {one['name']}"
                cells.append({"count": len(chosen), "url": _png(chosen), "words": words, "first": stage == numbers[0]})
    return list(tables.values())


def _learned(folder):
    """Return (class names, images (N, C, H, W) in [0, 1], labels (N,), stages (N,)) as they were learned, not decoded.

    Raises:
        UserError: they are missing or damaged, or their space is not known.
    """
    found = known.find(folder)
    if found.method == "PDD+MTT":
        data = load_stage(found)
        return data.class_names, data.pixels, data.labels, data.stage
    union = load_idc(found.folder, max(found.stages), found.info)
    return found.info.class_names, union.images.clamp(0, 1), union.labels, union.stage


def _png(images):
    """Return images (n, C, H, W) in [0, 1] side by side as the data URL of a PNG."""
    from torchvision.transforms.functional import to_pil_image

    image = to_pil_image((images * 255).round().byte().permute(1, 2, 0, 3).flatten(2))
    if image.height > LARGEST:
        image = image.resize((image.width * LARGEST // image.height, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
