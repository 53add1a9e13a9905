"""The paper's Table 5 (ablations) and Table 6 (pre-trained models): rows, columns, our figures laid out as there, and
the paper's own in a block apart, copied as printed (PASS, MTL, LLCM† is 67.5 in Table 5 and 68.5 in Table 6).

A row is one model in one mode: STL (one training for each task and data set) or MTL (one for all). Figures are mAP as
fractions, row -> column -> seed -> value; what is printed is percent, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import writing
from engine.grid import Run, metrics
from engine.results import whole_file
from engine.tasks import TASKS

Figures = Mapping[str, Mapping[int, float]]  # column key -> seed -> mAP
MISSING, NONE = "…", "-"
AVERAGE = "average"


class Column(NamedTuple):
    """task, protocol: of metrics.json; dataset: as `recipes/stl.py --dataset` calls it; title: the paper's name."""

    task: str
    dataset: str
    protocol: str
    title: str

    @property
    def key(self) -> str:
        return f"{self.task}/{self.protocol}"


COLUMNS = (
    Column("ctcc", "cocas", "real2", "Real2"),
    Column("li", "cocas", "real2", "Real2"),
    Column("t2i", "cuhk_pedes", "cuhk_pedes", "CUHK-PEDES"),
    Column("vi", "llcm", "llcm:vis2ir", "LLCM†"),
    Column("vi", "llcm", "llcm:ir2vis", "LLCM‡"),
    Column("cc", "ltcc", "ltcc:cc", "LTCC"),
    Column("cc", "prcc", "prcc:single", "PRCC"),
    Column("cc", "vc_clothes", "vc_clothes:cc", "VC-Clothes"),
    Column("trad", "market1501", "market1501", "Market1501"),
    Column("trad", "msmt17", "msmt17", "MSMT17"),
    Column("trad", "cuhk03", "cuhk03", "CUHK03"),
)


class Row(NamedTuple):
    """name: `--rows`; variant: what sets its trainings apart (`options`); paper: mAP in percent, a figure for each of
    COLUMNS and, in Table 5, the average as printed there (not always the mean of what is printed)."""

    name: str
    table: int
    title: str
    variant: str
    paper: tuple[float | None, ...]

    @property
    def mode(self) -> str:
        return self.name[:3]


ABLATIONS: dict[str, tuple[str, ...]] = {"irm": (), "noediting": ("--no-editing",), "plain": ("--plain-triplet",)}
BACKBONES = ("deit", "albef", "hap", "pass")
_NO_EDITING, _PLAIN = "w/o editing", "w/o L_atri"
ROWS = {
    row.name: row
    for row in (
        Row("stl-irm", 5, "IRM (STL)", "irm",
            (32.2, 30.7, 65.3, 66.6, 64.5, 46.7, 46.0, 80.1, 92.3, 71.9, 83.3, 61.8)),
        Row("stl-noediting", 5, f"{_NO_EDITING} (STL)", "noediting",
            (32.6, 30.5, 65.7, 66.2, 65.1, 46.2, 45.7, 77.8, 92.5, 71.4, 83.2, 61.5)),
        Row("stl-plain", 5, f"{_PLAIN} (STL)", "plain",
            (31.5, 30.2, None, 66.6, 64.5, 46.7, 46.0, 80.1, 92.3, 71.9, 83.3, 61.3)),
        Row("mtl-irm", 5, "IRM (MTL)", "irm",
            (41.7, 39.8, 66.5, 67.5, 67.2, 52.0, 52.3, 78.9, 93.5, 72.4, 85.4, 65.1)),
        Row("mtl-noediting", 5, f"{_NO_EDITING} (MTL)", "noediting",
            (41.0, 38.8, 66.1, 67.3, 65.2, 51.2, 51.0, 78.6, 93.0, 71.8, 85.1, 64.5)),
        Row("mtl-plain", 5, f"{_PLAIN} (MTL)", "plain",
            (40.7, 39.2, 65.2, 68.4, 66.3, 52.0, 52.4, 77.9, 92.9, 72.0, 85.5, 64.8)),
        Row("stl-deit", 6, "DeiT STL(256)", "deit", (31.5, 30.1, 64.2, 65.1, 62.3, 46.3, 43.1, 82.1, 87.9, 67.9, 77.5)),
        Row("mtl-deit", 6, "DeiT MTL(256)", "deit", (40.2, 38.7, 65.7, 66.2, 62.9, 53.2, 46.8, 76.3, 90.0, 68.9, 78.7)),
        Row("stl-albef", 6, "ALBEF STL(256)", "albef",
            (30.6, 28.7, 67.7, 61.2, 58.8, 40.2, 42.1, 67.1, 78.9, 60.3, 69.2)),
        Row("mtl-albef", 6, "ALBEF MTL(256)", "albef",
            (37.2, 34.5, 68.3, 62.1, 60.1, 41.2, 44.1, 60.5, 79.7, 62.1, 69.9)),
        Row("stl-hap", 6, "HAP STL(256)", "hap", (30.8, 31.1, 63.2, 66.2, 62.9, 45.3, 44.7, 79.2, 90.2, 70.3, 79.6)),
        Row("mtl-hap", 6, "HAP MTL(256)", "hap", (39.2, 39.8, 65.1, 67.1, 64.3, 49.2, 48.7, 77.3, 91.7, 72.3, 82.2)),
        Row("stl-pass", 6, "PASS STL(256)", "irm", (32.2, 30.7, 65.3, 66.6, 64.5, 46.7, 46.0, 80.1, 92.3, 71.9, 83.3)),
        Row("mtl-pass", 6, "PASS MTL(256)", "irm", (41.7, 39.8, 66.5, 68.5, 67.2, 52.0, 52.3, 78.9, 93.5, 72.4, 85.4)),
        Row("stl-pass384", 6, "PASS STL(384)", "pass384",
            (33.7, 33.8, 65.9, 68.9, 64.7, 48.9, 49.3, 82.5, 92.7, 73.7, 84.1)),
        Row("mtl-pass384", 6, "PASS MTL(384)", "pass384",
            (42.5, 42.3, 67.2, 71.2, 67.3, 54.1, 58.4, 81.8, 93.9, 75.4, 88.7)),
    )
}  # fmt: skip


def backbone(row: Row) -> str:
    """Whose weights a row starts from: in Table 5 PASS, as in the paper."""
    return "pass" if row.variant in ABLATIONS else row.variant.removesuffix("384")


def options(row: Row, weights: Mapping[str, str]) -> list[str]:
    """Training options of a row. weights: backbone -> file; Table 5 starts from nothing where PASS has none."""
    name = backbone(row)
    start = ["--backbone", name, "--pretrained", weights[name]] if name in weights else []
    return [*start, *ABLATIONS.get(row.variant, ()), *(["--image-size", "384x192"] if "384" in row.variant else [])]


def source(row: Row, column: Column) -> Row | None:
    """The row whose training gives this cell; None: the cell has no meaning.

    Nearly always its own. But alone, a task with fixed sentences tells all images of a batch the same, and so the
    adaptive margin is the plain one: IRM's training serves. Text search has no triplet.
    """
    if row.name == "stl-plain" and TASKS[column.task].loss == "matching":
        return None
    if row.name == "stl-plain" and TASKS[column.task].instruction == "sentence":
        return ROWS["stl-irm"]
    return row


def summary(values: Mapping[int, float]) -> dict[str, Any]:
    """A cell of ablation.json. std: of a sample (n - 1); None for fewer than two seeds."""
    numbers = list(values.values())
    return {
        "seeds": {str(seed): value for seed, value in values.items()},
        "mean": statistics.fmean(numbers) if numbers else None,
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


def cells(figures: Figures, columns: Sequence[Column]) -> dict[str, Any]:
    """Summaries of these columns and of their average, which a seed has only where it has every column."""
    keys = [column.key for column in columns]
    values = {key: figures.get(key, {}) for key in keys}
    whole = [seed for seed in values[keys[0]] if all(seed in values[key] for key in keys)] if keys else []
    average = {seed: statistics.fmean(values[key][seed] for key in keys) for seed in whole}
    return {key: summary(value) for key, value in [*values.items(), (AVERAGE, average)]}


def results(table: int, figures: Mapping[str, Figures], columns: Sequence[Column]) -> dict[str, Any]:
    """One table of ablation.json. figures: of the rows asked for; columns: those the data can fill.

    rows         row -> cells
    differences  row -> cells of IRM minus this row, over the seeds and columns that both have
    """
    chosen = [row for row in ROWS.values() if row.table == table and row.name in figures]
    told = {row.name: [column for column in columns if source(row, column)] for row in chosen}
    rows = {row.name: {"title": row.title, **cells(figures[row.name], told[row.name])} for row in chosen}
    differences = {}
    for row in chosen:
        whole = f"{row.mode}-irm"
        if table == 5 and row.name != whole and whole in figures:
            title = f"IRM minus {row.title}"
            differences[row.name] = {"title": title, **cells(_minus(figures[whole], figures[row.name]), told[row.name])}
    return {"rows": rows, "differences": differences}


def _minus(whole: Figures, without: Figures) -> Figures:
    return {
        key: {seed: value - without[key][seed] for seed, value in seeds.items() if seed in without[key]}
        for key, seeds in whole.items()
        if key in without
    }


def paper_figures(table: int) -> dict[str, dict[str, float | None]]:
    """Row -> column -> mAP as a fraction, as the paper prints it."""
    return {
        row.name: {
            key: None if value is None else round(value / 100, 4)
            for key, value in zip([*(column.key for column in COLUMNS), AVERAGE], row.paper, strict=False)
        }
        for row in ROWS.values()
        if row.table == table
    }


NAMES = {5: "Table 5 (ablations)", 6: "Table 6 (pre-trained models)"}
LEGEND = (
    f"mAP in %, mean ± standard deviation over seeds (n - 1), in brackets how many where some lack; {MISSING} not "
    "there (yet)",
    "† visible images search near-infrared ones, ‡ the reverse, as LLCM was published at first; below the data set "
    "stands the protocol that was measured",
    "the paper does not tell which protocols of LTCC, PRCC and VC-Clothes it used: the three here are our choice",
    f"w/o L_atri (STL): with fixed sentences all instructions of a batch are alike, both losses are the same, and the "
    f"cell is that of IRM's training; text search has no triplet ({NONE})",
)


def lay_out(table: int, result: Mapping[str, Any], seeds: int) -> list[list[str]]:
    """Our figures as lines of cells; the first is the head (task, data set and protocol apart by line breaks)."""
    average = ["Avg."] if table == 5 else []
    lines = [["ours", *(f"{TASKS[c.task].title}\n{c.title}\n{c.protocol}" for c in COLUMNS), *average]]
    for part, sign in (("rows", ""), ("differences", "+")):
        for name, row in result[part].items():
            keys = [None if source(ROWS[name], column) is None else column.key for column in COLUMNS]
            keys += [AVERAGE] if average else []
            shown = [NONE if key is None else _shown(row.get(key, summary({})), seeds, sign) for key in keys]
            lines.append([row["title"], *shown])
    return lines


def lay_out_paper(table: int) -> list[list[str]]:
    lines = [
        ["the paper's", *(f"{TASKS[c.task].title}\n{c.title}" for c in COLUMNS), *(["Avg."] if table == 5 else [])]
    ]
    rows = [row for row in ROWS.values() if row.table == table]
    return lines + [[row.title, *(NONE if v is None else f"{v:.1f}" for v in row.paper)] for row in rows]


def _shown(cell: Mapping[str, Any], seeds: int, sign: str) -> str:
    count = len(cell["seeds"])
    if not count:
        return MISSING
    text = f"{100 * cell['mean']:{sign}.1f}"
    text += f" ± {100 * cell['std']:.1f}" if count > 1 else ""
    return text + (f" ({count})" if count < seeds else "")


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal; the head takes as many lines as it has."""
    head = [cell.split("\n") for cell in lines[0]]
    tall = max(map(len, head))
    rows = [[(cell + [""] * tall)[number] for cell in head] for number in range(tall)] + [
        list(row) for row in lines[1:]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    printed = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    printed.insert(tall, "-" * len(printed[0]))
    return "\n".join(line.rstrip() for line in printed)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


class Cell(NamedTuple):
    """Where a figure of the tables comes from."""

    row: Row
    column: Column
    seed: int
    run: Run


def document(plan: Sequence[Cell], notes: Sequence[str], real: bool) -> dict[str, Any]:
    """Content of ablation.json from what is finished of a plan. real: not the drawn data; then the paper's figures are
    in it, apart."""
    runs = {cell.run.name: cell.run for cell in plan}
    measured = {name: metrics(run) for name, run in runs.items()}
    figures: dict[str, dict[str, dict[int, float]]] = {cell.row.name: {} for cell in plan}
    for row, column, seed, run in plan:
        found = (measured[run.name] or {"tasks": {}})["tasks"].get(column.task, {}).get(column.protocol)
        if found:
            figures[row.name].setdefault(column.key, {})[seed] = found["mAP"]
    numbers = sorted({cell.row.table for cell in plan})
    columns = [column for column in COLUMNS if any(cell.column == column for cell in plan)]
    return {
        "data": "on the data sets themselves" if real else "on drawn data: not to be compared with published figures",
        "seeds": list(dict.fromkeys(cell.seed for cell in plan)),
        "notes": [f"Avg. over the {len(columns)} columns that the data and these rows have", *notes],
        "tables": {str(number): results(number, figures, columns) for number in numbers},
        **({"paper": {str(number): paper_figures(number) for number in numbers}} if real else {}),
        "runs": {
            name: {"finished": bool(measured[name]), "command": shlex.join(run.command), "config": run.facts}
            for name, run in runs.items()
        },
    }


def write(document: Mapping[str, Any], output: Path) -> None:
    """ablation.json and ablation.md, each whole."""
    with writing(f"--output {output}"):
        for name, text in (("json", json.dumps(document, indent=1)), ("md", report(document, markdown=True))):
            with whole_file(output / f"ablation.{name}") as stream:
                stream.write(text + "\n")


def report(document: Mapping[str, Any], markdown: bool = False) -> str:
    """ablation.json as text for a terminal or as markdown."""
    table_of, mark = (as_markdown, "## ") if markdown else (as_text, "")
    parts = []
    for number, result in document["tables"].items():
        layout = lay_out(int(number), result, len(document["seeds"]))
        parts += [f"{mark}{NAMES[int(number)]}: ours, {document['data']}", table_of(layout)]
    notes = [*LEGEND, *document["notes"]]
    parts.append("\n".join(f"- {note}" for note in notes))
    for number in document.get("paper", {}):
        parts.append(
            f"{mark}{NAMES[int(number)]}: the figures printed in the paper (He et al., Instruct-ReID), not ours"
        )
        parts.append(table_of(lay_out_paper(int(number))))
    return "\n\n".join(parts)
