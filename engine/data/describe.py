"""What lies below a data folder, counted and held against the published numbers of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.data.index import Index, find_indexes
from engine.data.record import SPLITS

COUNTS = ("images", "published", "damaged", "identities", "cameras", "outfits", "captions")


def describe(data: Path) -> list[dict[str, Any]]:
    """One row per data set and split (and one for query + gallery where only their sum is published).

    dataset, title, folder, split; images (damaged ones included; an overlap is part of its train split, too);
    published (number of images; None = not stated); damaged; identities, cameras, outfits (different ones in the
    split), captions (sentences); trains, protocols (tuples of names), terms.
    """
    return [row for index in find_indexes(data) for row in _rows(index)]


def _rows(index: Index) -> list[dict[str, Any]]:
    codes = {split: code for code, split in enumerate(SPLITS)}
    found = [split for split, code in codes.items() if code in index.split and split != "picture"]
    groups = [(split, [split, "overlap"] if split == "train" else [split]) for split in found]
    if "test" in index.dataset.images and "test" not in found:
        groups.append(("query+gallery", [split for split in ("query", "gallery") if split in found]))
    dataset = index.dataset
    rows = []
    for name, splits in groups:
        keep = np.flatnonzero(np.isin(index.split, [codes[split] for split in splits]))
        clothes = index.clothes[keep]
        rows.append(
            {
                "dataset": index.name,
                "title": dataset.title,
                "folder": str(index.root),
                "split": name,
                "images": len(keep),
                "published": dataset.images.get("test" if name == "query+gallery" else name),
                "damaged": int(np.count_nonzero(index.damaged[keep])),
                "identities": len(np.unique(index.pid[keep])),
                "cameras": len(np.unique(index.camera[keep])),
                "outfits": len(np.unique(clothes[clothes >= 0])),
                "captions": int(index.sentences(keep).sum()),
                "trains": dataset.trains,
                "protocols": tuple(dict.fromkeys(name for names in dataset.protocols.values() for name in names)),
                "terms": dataset.terms,
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as plain text: counts first, then tasks, protocols and terms of each data set."""
    head = ["data set", "split", *COUNTS]
    cells = [[row["dataset"], row["split"], *(_cell(row, name) for name in COUNTS)] for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *cells]
    ]
    if any(_differs(row) for row in rows):
        lines.append("* not the published number of images: drawn data or a partial copy")
    lines.append("")
    for row in {row["dataset"]: row for row in rows}.values():
        tested = ", ".join(row["protocols"]) or "nothing"
        lines.append(
            f"{row['dataset'].ljust(widths[0])}  trains {', '.join(row['trains'])}; tests {tested}; {row['terms']}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _differs(row: dict[str, Any]) -> bool:
    return row["published"] is not None and row["published"] != row["images"]


def _cell(row: dict[str, Any], name: str) -> str:
    mark = "*" if name == "published" and _differs(row) else " " if name == "published" else ""
    return (f"{row[name]:,}" if row[name] else "-") + mark
