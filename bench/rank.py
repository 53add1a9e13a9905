"""Evaluation of a test set (mAP, CMC, mINP): counting beside sorting.

    python bench/rank.py                            Market-1501's size
    python bench/rank.py --cases msmt17 --rivals ours --rounds 3   MSMT17's; the others take minutes and gigabytes
    python bench/rank.py --json bench/results/rank-cpu.json --plot rank.png

`ours` is what the engine runs for each protocol: `engine.protocols.score_trial`, from features to metrics. Rivals:
`matmul`, the bare product into a buffer that is there already; `argsort, numpy`, the product, an argsort of every row
and array arithmetic, query after query; `argsort, cython`, the same with the pass over the ranking compiled. They must
first return ours mAP; otherwise exit code 1 and no figures. Identities, cameras and features are drawn: unit features
that gather about identities, 6 cameras, Market-1501's numbers of identities. MiB: memory at the peak beyond the
features.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from engine.data.datasets._base import DataSet
from engine.data.index import Index, make_table
from engine.data.record import SPLITS
from engine.protocols import PROTOCOLS, Trial, score_trial

CASES = {"market1501": (3368, 15913, 768, 750), "msmt17": (11659, 82161, 768, 3060)}  # queries, gallery, D, identities
CAMERAS = 6
OURS = "ours"


class Case(NamedTuple):
    name: str
    index: Index
    trial: Trial
    queries: Tensor
    gallery: Tensor


def case_of(name: str, device: torch.device) -> Case:
    Q, G, D, people = CASES[name]
    generator = np.random.default_rng(0)
    pid, camera = generator.integers(0, people, Q + G), generator.integers(0, CAMERAS, Q + G)
    columns: dict[str, Any] = {
        "path": [f"{row:06d}.jpg" for row in range(Q + G)],
        "pid": pid,
        "camera": camera,
        "split": [SPLITS.index("query")] * Q + [SPLITS.index("gallery")] * G,
    }
    dataset = DataSet(name, name, (), (), parse=lambda root: iter(()), trains=(), protocols={}, images={})
    index = Index(dataset, Path(name), make_table(columns))
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(people, D, generator=draw)
    features = [
        F.normalize(centres[torch.from_numpy(part)] + 2 * torch.randn(len(part), D, generator=draw), dim=1).to(device)
        for part in (pid[:Q], pid[Q:])
    ]
    return Case(name, index, PROTOCOLS["market1501"].trials(index)[0], features[0], features[1])


def ours(case: Case) -> Callable[[], float]:
    protocol = PROTOCOLS["market1501"]
    return lambda: score_trial(case.trial, case.index, protocol, case.queries, case.gallery).mAP


def matmul(case: Case) -> Callable[[], None]:
    buffer = case.queries.new_empty(len(case.queries), len(case.gallery))

    def run() -> None:
        torch.mm(case.queries, case.gallery.T, out=buffer)

    return run


def sorted_rows(case: Case) -> np.ndarray:
    """[Q, G] gallery positions, best first."""
    return np.argsort(-(case.queries @ case.gallery.T).cpu().numpy(), axis=1)


def columns_of(case: Case) -> list[np.ndarray]:
    """Identity and camera of the queries and of the gallery."""
    return [
        np.ascontiguousarray(column[rows].astype(np.int64))
        for rows in (case.trial.query, case.trial.gallery)
        for column in (case.index.pid, case.index.camera)
    ]


def argsort_numpy(case: Case) -> Callable[[], float]:
    query_id, query_camera, gallery_id, gallery_camera = columns_of(case)

    def run() -> float:
        found = []
        for q, order in enumerate(sorted_rows(case)):
            same = gallery_id[order] == query_id[q]
            hits = same[~(same & (gallery_camera[order] == query_camera[q]))]
            if hits.any():
                ranks = np.flatnonzero(hits) + 1
                found.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
        return float(np.mean(found))

    return run


def argsort_cython(case: Case) -> Callable[[], float]:
    import pyximport

    with tempfile.TemporaryDirectory() as folder:
        pyximport.install(build_dir=folder, language_level=3)
        from bench import argsort_rank
    given = columns_of(case)
    return lambda: float(np.nanmean(argsort_rank.average_precisions(sorted_rows(case), *given)))


RIVALS = {OURS: ours, "matmul": matmul, "argsort, numpy": argsort_numpy, "argsort, cython": argsort_cython}


def run(case: Case, device: torch.device, rounds: int, rivals: Sequence[str]) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    common = {"case": case.name, "queries": len(case.queries), "gallery": len(case.gallery)}
    expected = ours(case)()
    for name in rivals:
        try:
            runs[name] = RIVALS[name](case)
        except ImportError as error:
            rows.append({**common, "rival": name, "left_out": str(error).splitlines()[0]})
            continue
        found = runs[name]()
        if found is not None and abs(found - expected) > 1e-6:
            sys.exit(f"{case.name}: {name} finds an mAP of {found}, ours {expected}; no figures")
    return rows + measure.beside(runs, device, rounds, ours=OURS, floor="matmul", **common)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["market1501"])
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="ours and matmul always run")
    args, device = measure.arguments(parser, "5")
    rivals = [name for name in RIVALS if name in (OURS, "matmul", *args.rivals)]
    rows = []
    for name in args.cases:
        rows += run(case_of(name, device), device, args.rounds or (30 if device.type == "cuda" else 5), rivals)
    result = {"benchmark": "rank", **measure.facts(device), "rows": rows}
    measure.write(args.json, result)
    columns = ["case", "queries", "gallery", "rival", "seconds", "to matmul", "to ours", "MiB"]
    measure.show(result, columns, ["case"], args.json)
    groups = {
        name: {row["rival"]: row["to matmul"] for row in rows if row["case"] == name and "to matmul" in row}
        for name in args.cases
    }
    measure.bars(args.plot, groups, f"evaluation, {result['device']}", "time / time of the bare product")
    return 0


if __name__ == "__main__":
    sys.exit(main())
