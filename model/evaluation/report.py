"""The report of a run: tables for the terminal and as Markdown, all numbers as JSON, curves and sheets as PNG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table as RichTable

from model.evaluation.protocol import LEVELS, NAMELESS, Bench, Options
from model.evaluation.summary import Figure, Numbers, noc_name, pooled
from model.types import Click, Granularity, Mask, RGBImage

if TYPE_CHECKING:  # the web process draws sheets, and holds no matplotlib for them
    from matplotlib.axes import Axes

_WORDS = 3  # columns of a table, from the left, that hold words
_CELL = 220  # pixels of a sheet's cell
_TINT = np.array([255, 60, 40])
_OUTLINE = np.array([40, 230, 90])


@dataclass(frozen=True, slots=True)
class Table:
    """A table of words, ready to be set."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def rich(self) -> RichTable:
        """Return the table as the terminal shows it."""
        table = RichTable(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < _WORDS else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table as Markdown, under a heading."""
        head = f"## {self.title}\n\n" + (f"{self.note}\n\n" if self.note else "")
        rule = "|" + "---|" * _WORDS + "--:|" * (len(self.header) - _WORDS)
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (self.header, *self.rows)
        ]
        return head + "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def tables_of(numbers: Sequence[Numbers], figures: Sequence[Figure], options: Options) -> list[Table]:
    """Return all tables that have a row."""
    made = (
        _compare(figures),
        _clicks(numbers, options),
        _levels(numbers),
        _phrases(numbers),
        _curves(numbers),
        _monotone(numbers),
        _calibration(numbers),
        _time(numbers),
        _paper(numbers, options),
    )
    return [table for table in made if table.rows]


def _n(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _compare(figures: Sequence[Figure]) -> Table:
    header = ("set", "what", "level", "reach", "base", "ours", "measured", "reached", "n")
    rows = [
        (
            f.set_name,
            f.what,
            f.level,
            f.reach,
            _n(f.base),
            _n(f.ours),
            _n(f.measured),
            "yes" if f.reached else "no",
            str(f.count),
        )
        for f in figures
    ]
    return Table(
        "compare", header, rows, "The figures to reach. `measured` is a difference or a ratio, as `reach` says."
    )


def _clicks(numbers: Sequence[Numbers], options: Options) -> Table:
    names = [noc_name(target) for target in options.targets]
    header: tuple[str, ...] = ("set", "protocol", "level", "n", "IoU@1")
    for name in names:
        header += (name, "misses", f"{name} penalised")
    rows = []
    for group in numbers:
        place = (group["set"], group["level"])
        for protocol, of in group.get("clicks", {}).items():
            row: tuple[str, ...] = (place[0], protocol, place[1], str(of["masks"]), _n(of["iou_at_1"]))
            for name in names:
                noc = of[name]
                row += (_n(noc["reached_mean"], 2), str(noc["misses"]), _n(noc["penalised_mean"], 2))
            rows.append(row)
        if "oracle3" in group:
            of = group["oracle3"]
            cells = (place[0], "base-oracle3", place[1], str(of["masks"]), _n(of["iou_at_1"]))
            rows.append(cells + ("-",) * (3 * len(names)))
    note = (
        f"NoC: mean clicks of the masks that got there, at most {options.budget}; misses did not. "
        f"Penalised, as the literature has it: over all masks, a miss counting {options.budget}."
    )
    return Table("clicks", header, rows, note)


def _levels(numbers: Sequence[Numbers]) -> Table:
    header = ("set", "level", "support", "n", "all levels", "base, three masks", "true masks", "offered")
    rows = [
        (
            group["set"],
            group["level"],
            str(of["support"]),
            str(of["masks"]),
            _n(of["ours"]),
            _n(of["three"]),
            _n(of["truths"], 1),
            _n(of["offered"], 1),
        )
        for group in numbers
        if (of := group.get("levels"))
    ]
    return Table(
        "1-IoU@all granularities", header, rows, "One click at the middle of each mask, all true masks under it."
    )


def _phrases(numbers: Sequence[Numbers]) -> Table:
    header = (
        "set",
        "level",
        "n",
        "base",
        "level given",
        "nearest level",
        "phrase",
        "phrase and level",
        "unknown words",
        "without a name",
    )
    rows = [
        (
            group["set"],
            group["level"],
            str(of["masks"]),
            *(_n(of[name]) for name in ("base", "level", "nearest", "phrase", "both")),
            ", ".join(_n(value) for value in of["unknown"]),
            str(of["unnamed"]),
        )
        for group in numbers
        if (of := group.get("phrase"))
    ]
    note = "IoU@1 at one random click in the mask, the same one for all. Unknown words compare with base."
    return Table("phrase", header, rows, note)


def _curves(numbers: Sequence[Numbers]) -> Table:
    rows = []
    shown = (1, 2, 3, 5, 10, 20)
    for group in numbers:
        if of := group.get("curve"):
            for name in ("base", "level"):
                ious = of[name]
                cells = tuple(_n(ious[k - 1]) if k <= len(ious) else "-" for k in shown)
                rows.append((group["set"], name, group["level"], str(of["masks"]), *cells))
    return Table("IoU@k", ("set", "protocol", "level", "n", *(f"IoU@{k}" for k in shown)), rows)


def _monotone(numbers: Sequence[Numbers]) -> Table:
    header = ("set", "level", "n", "steps", "share not shrinking", "with parts", "area 1.0 / 0.1", "empty")
    rows = [
        (
            group["set"],
            group["level"],
            str(of["masks"]),
            str(of["steps"]),
            _n(of["share"]),
            str(of["with_parts"]),
            _n(of.get("growth_median"), 2),
            str(of.get("empty", "-")),
        )
        for group in numbers
        if (of := group.get("monotone"))
    ]
    note = "Ten levels at one click. The ratio is a median over objects with parts; an empty mask counts 0."
    return Table("monotone", header, rows, note)


def _calibration(numbers: Sequence[Numbers]) -> Table:
    header = ("set", "source", "level", "masks", "mean error", "calibration error", "mean score", "mean IoU")
    keys = ("mean_absolute_error", "expected_calibration_error", "mean_score", "mean_iou")
    rows = [
        (group["set"], source, group["level"], str(of["masks"]), *(_n(of[key]) for key in keys))
        for group in numbers
        for source, of in group.get("calibration", {}).items()
    ]
    note = "Expected against true IoU of all masks shown; an offer of `levels` against the true mask it is closest to."
    return Table("calibration", header, rows, note)


def _time(numbers: Sequence[Numbers]) -> Table:
    header = ("set", "model", "level", "encode s", "decoder s", "SPC median", "SPC mean", "PIE", "ratio", "pairs")
    rows = []
    for group in numbers:
        if of := group.get("time"):
            for name in ("base", "adapted"):
                keys = ("step_median_s", "spc_median_s", "spc_mean_s", "pie_s")
                cells = tuple(_n(of[f"{name}_{key}"], 4) for key in keys)
                ratio = _n(of["step_ratio_median"]) if name == "adapted" else "1"
                rows.append((group["set"], name, group["level"], _n(of["encode_s"]), *cells, ratio, str(of["pairs"])))
    note = "Seconds, the two models in turns. PIE: a click's seconds with the encoding shared out among the budget."
    return Table("time", header, rows, note)


def _paper(numbers: Sequence[Numbers], options: Options) -> Table:
    full = f">={options.budget}@"
    keys = ("NoC@80", "NoC@85", "NoC@90")
    header = ("set", "protocol", "level", "n", *keys, "IoU@1", f"{full}85", f"{full}90", "SPC s", "refused")
    by_level: dict[tuple[str, str], dict[str, Numbers]] = {}
    for group in numbers:
        for protocol, of in group.get("paper", {}).items():
            by_level.setdefault((group["set"], protocol), {})[group["level"]] = of
    rows = []
    for (name, protocol), levels in by_level.items():
        for level, of in (levels | ({"all": pooled([*levels.values()])} if len(levels) > 1 else {})).items():
            nocs, over = (of.get(key) for key in keys), (str(of.get(f"{full}{target}", "-")) for target in (85, 90))
            cells = (*(_n(noc, 2) for noc in nocs), _n(of["iou_at_1"]), *over, _n(of["seconds"] / of["clicks"]))
            rows.append((name, protocol, level, str(of["masks"]), *cells, str(of["refusals"])))
    note = (
        f"By the rules of the published code: a miss counts {options.budget} clicks in NoC, clicking stops at the "
        "highest target, and SPC divides all seconds by the clicks of the level that counts (docs/reproduce.md)."
    )
    return Table("paper", header, rows, note)


def write_report(
    folder: Path, facts: dict[str, Any], numbers: Sequence[Numbers], figures: Sequence[Figure], options: Options
) -> list[Table]:
    """Write report.md and report.json (and curves.png where there is one to draw); return the tables.

    Args:
        folder: where to.
        facts: what the run was: models, options, sets; JSON-able.
        numbers: of each group.
        figures: the figures to reach.
        options: of the protocols.
    """
    tables = tables_of(numbers, figures, options)
    lines = ["# Evaluation", "", *(f"- {name}: {_words(value)}" for name, value in facts.items()), ""]
    pictures = _draw_curves(folder / "curves.png", numbers)
    body = "\n".join(table.markdown() for table in tables)
    text = "\n".join(lines) + "\n" + body + ("\n![curves](curves.png)\n" if pictures else "")
    content = {**facts, "groups": list(numbers), "figures": [asdict(figure) for figure in figures]}
    _write(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    _write(
        folder / "report.json",
        lambda path: path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"),
    )
    return tables


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(of)}" for name, of in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, (list, tuple)) else str(value)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    draft = path.with_name(f".draft-{path.name}")
    write(draft)
    draft.replace(path)


# --- Curves ---------------------------------------------------------------------------------------------------------


def _draw_curves(path: Path, numbers: Sequence[Numbers]) -> bool:
    """Draw IoU@k, IoU over the level asked for, and IoU@1 over the mask's own level; False: nothing to draw."""
    if not any("curve" in group or "own" in group for group in numbers):
        path.unlink(missing_ok=True)
        return False
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(18, 5.5), layout="constrained")
    clicks, asked, own = drawing.subplots(1, 3)
    for number, group in enumerate(numbers):
        name, colour = f"{group['set']} {group['level']}", f"C{number % 10}"
        if curve := group.get("curve"):
            for side, style in (("level", "-"), ("base", ":")):
                label = f"{name}, {side} ({curve['masks']})"
                clicks.plot(range(1, len(curve[side]) + 1), curve[side], style, color=colour, label=label)
            values = [level.value for level in LEVELS]
            asked.plot(values, curve["by_level"], "o-", color=colour, label=f"{name} ({curve['masks']})")
        for side, style, fill in (("level", "o-", "full"), ("base", "o:", "none")):
            if by_level := group.get("own", {}).get(side):
                at = [int(level) / 10 for level in by_level]
                ious = [of["iou_at_1"] for of in by_level.values()]
                count = sum(of["masks"] for of in by_level.values())
                own.plot(at, ious, style, color=colour, fillstyle=fill, label=f"{name}, {side} ({count})")
    clicks.xaxis.get_major_locator().set_params(integer=True)
    _dress(clicks, "IoU@k", "clicks")
    _dress(asked, "IoU@1 over granularity", "level asked for")
    _dress(own, "IoU@1 over granularity", "the mask's own level")
    _write(path, lambda draft: drawing.savefig(draft, dpi=90))
    return True


def draw_click_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw IoU over clicks, side by side for each title, a line for each name.

    Args:
        path: the PNG file.
        curves: title to name to mean IoU after 1, 2, ... clicks; at least one title.
    """
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6 * len(curves), 5), layout="constrained")
    for axes, (title, lines) in zip(drawing.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, ious in lines.items():
            axes.plot(range(1, len(ious) + 1), ious, "o-", label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _dress(axes, title, "clicks")
    _write(path, lambda draft: drawing.savefig(draft, dpi=90))


def _dress(axes: Axes, title: str, across: str) -> None:
    axes.set(title=title, xlabel=across, ylabel="mean IoU", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=7)


# --- Sheets ---------------------------------------------------------------------------------------------------------


def draw_sheet(path: Path, benches: Sequence[Bench]) -> None:
    """Draw a row for each mask: photo with click and true outline, base, own level, phrase, and levels 0.1 to 1.0."""
    draw_rows(path, [_sheet_row(bench) for bench in benches])


def draw_rows(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Draw a sheet of rows of cells, each row as high as its first cell; at least one row of one cell."""
    width = max(sum(cell.width for cell in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height for row in rows)), "white")
    top = 0
    for row in rows:
        left = 0
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width
        top += row[0].height
    _write(path, sheet.save)


def _sheet_row(bench: Bench) -> list[Image.Image]:
    pixels, base, adapted = bench.scene.pixels(), bench.models.base, bench.models.adapted
    name = bench.mask.name
    cells = [draw_cell(pixels, None, bench.truth, bench.first, f"{name or bench.mask.level} {bench.own.value:.2g}")]

    def show(label: str, mask: Mask, iou: float) -> None:
        cells.append(draw_cell(pixels, mask, bench.truth, bench.first, f"{label}: {iou:.2f}"))

    show("base", *bench.answer(base))
    show(f"own level {bench.own.value:.2g}", *bench.answer(adapted, granularity=bench.own))
    if name not in NAMELESS:
        show("phrase", *bench.answer(adapted, phrase=name))
    else:
        cells.append(draw_cell(pixels, None, bench.truth, bench.first, "no phrase"))
    for level in (1, 2, 3, 4, 5, 6, 8, 10):
        show(f"{level / 10}", *bench.answer(adapted, granularity=Granularity(level)))
    return cells


def draw_cell(pixels: RGBImage, mask: Mask | None, truth: Mask, click: Click, label: str) -> Image.Image:
    """Return a small photo with a click, the outline of the true mask, a mask tinted, and a label above.

    Args:
        pixels: the photo, uint8 H, W, 3.
        mask: what is tinted; None: nothing.
        truth: what is outlined, bool H, W.
        click: the dot.
        label: a few words.
    """
    shown: npt.NDArray[np.floating] = pixels.astype(np.float32)
    if mask is not None:
        shown[mask] = 0.45 * shown[mask] + 0.55 * _TINT
    inside = truth.copy()
    inside[1:-1, 1:-1] = truth[1:-1, 1:-1] & truth[:-2, 1:-1] & truth[2:, 1:-1] & truth[1:-1, :-2] & truth[1:-1, 2:]
    edge = truth & ~inside
    thick = edge.copy()
    thick[1:] |= edge[:-1]
    thick[:, 1:] |= edge[:, :-1]
    shown[thick] = _OUTLINE
    scale = _CELL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    photo = Image.fromarray(shown.astype(np.uint8)).resize(size, Image.Resampling.BOX)
    cell = Image.new("RGB", (max(size[0], _CELL // 2) + 4, size[1] + 20), "white")
    cell.paste(photo, (2, 18))
    draw = ImageDraw.Draw(cell)
    x, y = 2 + click.x * scale, 18 + click.y * scale
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="yellow", outline="black")
    draw.text((3, 2), label, fill="black", font=ImageFont.load_default(12))
    return cell
