"""Exact top-k of a gallery: kernels.topk beside what a user would otherwise run.

    python bench/topk.py                                  Market-1501's and MSMT17's size, and few queries on 500,000
    python bench/topk.py --cases market1501 --k 1 10 100 1000
    python bench/topk.py --cases few --gallery 5000000 --rounds 3 --json bench/results/topk-h100.json --plot topk.png
    python bench/topk.py --features runs/evaluate-TIME/features.npz      a model's: recipes/evaluate.py --save-features

Rivals: `matmul` is the bare product of all queries with the gallery into a buffer that is there already;
`matmul + topk` is what is written most often (queries in blocks where the product would not fit); `faiss` is
IndexFlatIP (faiss-cpu, or faiss's GPU index where it is installed). Each must first find what ours finds, but for ties
within float32's error; otherwise exit code 1 and no figures. The cases have unit features that gather about identities
and spread alike in all directions, which a trained model's do not: those of --features let ours do with fewer.
`ours, prepared` searches what `kernels.prepare_gallery` made once; `ours` is given the plain tensor each time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: the checkout's root is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import measure

CASES = {  # queries, gallery rows, features
    "market1501": (3368, 15913, 768),
    "msmt17": (11659, 82161, 768),
    "few": (64, 500_000, 256),
    "large": (20_000, 5_000_000, 768),  # 15 GB: for a GPU
}
MOST = 4 << 30  # bytes of a rival's product


class Case(NamedTuple):
    name: str
    queries: Tensor
    gallery: Tensor
    k: int


def features_of(queries: int, gallery: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors about a centre for each identity (20 gallery rows each), half of the variance the identity's."""
    generator = torch.Generator(device).manual_seed(0)
    people = max(1, gallery // 20)
    centres = torch.randn(people, D, generator=generator, device=device)
    found = []
    for count in (queries, gallery):
        own = torch.randint(0, people, (count,), generator=generator, device=device)
        features = torch.empty(count, D, device=device)
        for start in range(0, count, 65536):  # a large gallery is not held twice
            part = own[start : start + 65536]
            noise = torch.randn(len(part), D, generator=generator, device=device)
            features[start : start + len(part)] = F.normalize(centres[part] + noise, dim=1)
        found.append(features)
    return found[0], found[1]


def stored(file: Path, device: torch.device) -> list[tuple[str, Tensor, Tensor]]:
    """Name, queries and gallery, of unit length, of each data set of pictures in a features.npz."""
    found = []
    with np.load(file) as arrays:
        for name in arrays.files:
            place = name.removesuffix("/features")
            ranked = sorted(key for key in arrays.files if key.startswith(place) and key.endswith("/0/query"))
            if place == name or not ranked or f"{place}/text_features" in arrays.files:
                continue
            rows = F.normalize(torch.from_numpy(arrays[name][0]), dim=1)
            queries, gallery = (arrays[ranked[0].replace("query", part)] for part in ("query", "gallery"))
            found.append((place, rows[queries].to(device), rows[gallery].to(device)))
    return found


def held(rows: Tensor) -> float:
    """The part of the squared length of rows [G, D], 0 to 1, that lies in the eighth of the directions that lead."""
    lengths = torch.linalg.eigvalsh(rows.double().T @ rows.double()).flip(0)
    return float(lengths[: -(-len(lengths) // 8)].sum() / lengths.sum())


def ours(case: Case) -> Callable[[], Any]:
    return lambda: kernels.topk(case.queries, case.gallery, case.k)


def ours_prepared(case: Case) -> Callable[[], Any]:
    gallery = kernels.prepare_gallery(case.gallery)
    return lambda: kernels.topk(case.queries, gallery, case.k)


def blocks(case: Case) -> int:
    """Queries whose product with the gallery takes MOST bytes."""
    return max(1, min(len(case.queries), MOST // (4 * len(case.gallery))))


def matmul(case: Case) -> Callable[[], Any]:
    step = blocks(case)
    buffer = case.queries.new_empty(step, len(case.gallery))

    def run() -> None:
        for part in case.queries.split(step):
            torch.mm(part, case.gallery.T, out=buffer[: len(part)])

    return run


def matmul_topk(case: Case) -> Callable[[], Any]:
    step = blocks(case)

    def run() -> tuple[Tensor, Tensor]:
        parts = [torch.topk(part @ case.gallery.T, case.k) for part in case.queries.split(step)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    return run


def faiss(case: Case) -> Callable[[], Any]:
    import faiss

    index = faiss.IndexFlatIP(case.gallery.shape[1])
    if case.gallery.is_cuda:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
    index.add(case.gallery.cpu().numpy())
    queries = case.queries.cpu().numpy()

    def run() -> tuple[Tensor, Tensor]:
        values, rows = index.search(queries, case.k)
        return torch.from_numpy(values).to(case.queries.device), torch.from_numpy(rows).to(case.queries.device)

    return run


OURS = "ours, prepared"
RIVALS = {OURS: ours_prepared, "ours": ours, "matmul": matmul, "matmul + topk": matmul_topk, "faiss": faiss}


def agrees(found: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], case: Case) -> bool:
    """The same scores, and the same rows wherever the next score is farther than float32 errs."""
    values, rows = found
    error = 2e-6 * case.gallery.shape[1] ** 0.5
    if not torch.allclose(values, ours[0], rtol=0, atol=error):
        return False
    gaps = ours[0].diff(dim=1).abs() > 2 * error
    alone = F.pad(gaps, (1, 0), value=True) & F.pad(gaps, (0, 1), value=False)
    return bool((rows == ours[1])[alone].all())


def run(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    expected = kernels.topk(case.queries, case.gallery, case.k)
    runs: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    common = {
        "case": case.name,
        "queries": len(case.queries),
        "gallery": len(case.gallery),
        "features": case.gallery.shape[1],
        "k": case.k,
    }
    for name, make in RIVALS.items():
        try:
            runs[name] = make(case)
            found = runs[name]()
        except (ImportError, RuntimeError) as error:
            runs.pop(name, None)
            rows.append({**common, "rival": name, "left_out": str(error).splitlines()[0]})
            continue
        if found is not None and not agrees(found, expected, case):
            sys.exit(f"{case.name}, k {case.k}: {name} finds other rows than ours; no figures")
    return rows + measure.beside(runs, device, rounds, ours=OURS, floor="matmul", **common)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: market1501 msmt17 few")
    parser.add_argument(
        "--features", type=Path, help="a features.npz to search, instead of the cases or beside those named"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[100])
    parser.add_argument("--queries", type=int, help="instead of the cases' own number")
    parser.add_argument("--gallery", type=int, help="instead of the cases' own number")
    args, device = measure.arguments(parser, "7")
    cases: list[Callable[[], tuple[str, Tensor, Tensor]]] = []
    for name in args.cases or ([] if args.features else ["market1501", "msmt17", "few"]):
        Q, G, D = CASES[name]
        size = args.queries or Q, args.gallery or G, D
        cases.append(lambda name=name, size=size: (name, *features_of(*size, device)))  # type: ignore[misc]
    if args.features:
        found = stored(args.features, device)
        for name, _, gallery in found:
            print(f"{name}: an eighth of the directions holds {held(gallery):.0%} of the squared length")
        cases += [lambda each=each: each for each in found]  # type: ignore[misc]
    rows = []
    for make in cases:
        name, queries, gallery = make()
        for k in args.k:
            rows += run(Case(name, queries, gallery, k), device, args.rounds or (30 if device.type == "cuda" else 7))
    result = {"benchmark": "topk", **measure.facts(device), "rows": rows}
    columns = ["case", "queries", "gallery", "features", "k", "rival", "seconds", "to matmul", "to ours", "MiB"]
    measure.write(args.json, result)
    measure.show(result, columns, ["case", "k"], args.json)
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "to matmul" in row:
            groups.setdefault(f"{row['case']}\nk {row['k']}", {})[row["rival"]] = row["to matmul"]
    measure.bars(args.plot, groups, f"exact top-k, {result['device']}", "time / time of the bare product")
    return 0


if __name__ == "__main__":
    sys.exit(main())
