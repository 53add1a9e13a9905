"""The paper's Table 5 (without editing, with the plain triplet loss) and Table 6 (pre-trained models): trains the grid,
one run after another, and prints our figures in the layout of these tables.

python recipes/ablation.py --demo                                     # MTL rows of Table 5 on the mini data, 3 seeds
python recipes/ablation.py --data DIR --seeds 0,1,2 --weights pass=FILE,deit=FILE
python recipes/ablation.py --data DIR --rows mtl-irm,mtl-plain --num_gpus 4 -- --steps 24000 --global-losses

Options that are not listed below, and all behind --, are those of recipes/mtl.py and stl.py and go to every training.
Stopped (Ctrl-C, SIGTERM) or called again, it goes on where it was. --output has a folder for each training, and
ablation.json and ablation.md with the tables. Exit code 1: a training failed; 143: stopped.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import grid, tables
from engine.errors import InputError
from engine.results import is_real
from recipes import options

DEMO = ["mtl-irm", "mtl-noediting", "mtl-plain"]
DEMO_STEPS = 400  # with its evaluation 7 minutes on two cores
OURS = ("data", "output", "seed", "resume", "no_eval", "check", "no_editing", "plain_triplet", "backbone", "pretrained")


def parser() -> options.Parser:
    top = options.Parser(description=__doc__, formatter_class=options.RawHelp, allow_abbrev=False)
    add = top.add_argument
    add(
        "--data",
        metavar="DIR",
        help=f"folder with the data sets (default: drawn mini data, made once in {options.MINI})",
    )
    add("--output", type=Path, default=Path("runs/ablation"), metavar="DIR", help="default: runs/ablation")
    add("--tables", default="5,6", metavar="N,..", help="of the paper: 5, 6 or both (default: both)")
    add("--rows", metavar="ROW,..", help=f"of these tables: {', '.join(tables.ROWS)} (default: all)")
    add("--seeds", metavar="N,..", help="one training each (default: 0)")
    add(
        "--weights",
        metavar="NAME=FILE,..",
        help=f"pre-trained weights of {', '.join(tables.BACKBONES)}. Rows of Table 6 without are left out; Table 5 "
        "starts from those of pass, as in the paper, or from nothing (default: none)",
    )
    add("--num_gpus", type=int, metavar="N", help="ranks of a training, as deepspeed takes it (default: deepspeed's)")
    add("--max-runs", type=int, metavar="N", help="end after so many trainings (default: all)")
    add(
        "--demo",
        action="store_true",
        help=f"on the mini data {', '.join(DEMO)} with seeds 0,1,2 and --steps {DEMO_STEPS}, two ranks where there is "
        "no GPU, unless told otherwise",
    )
    add("--dry-run", action="store_true", help="print the commands of all trainings and end")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args, passed = parser().parse_known_args(given[:cut])
    plan, notes = _plan(args, passed + given[cut + 1 :])
    runs = list({cell.run.name: cell.run for cell in plan}.values())
    if args.dry_run:
        print("\n".join(shlex.join(run.command) for run in runs))
        return 0
    print("\n".join(notes))
    options.mini_data(args.data)
    real = is_real(args.data or options.MINI)

    def write() -> None:
        tables.write(tables.document(plan, notes, real), args.output)

    code = grid.run_all(runs, args.output, args.max_runs, after=write)
    write()
    print(tables.report(tables.document(plan, notes, real)))
    print(f"written to {args.output}/ablation.json and ablation.md")
    return code


def _plan(args: argparse.Namespace, passed: list[str]) -> tuple[list[tables.Cell], list[str]]:
    """The cells that are asked for, seed by seed, and what there is to say about them. InputError for bad options."""
    if "LOCAL_RANK" in os.environ:
        raise InputError("started by deepspeed: use python recipes/ablation.py, which starts deepspeed itself")
    for name in ("num_gpus", "max_runs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_runs', '-runs')} {getattr(args, name)}: expected at least 1")
    if args.demo:
        _demo(args, passed)
    unset, theirs = (options.training_parser("").parse_args(part) for part in ([], passed))
    for name in OURS:
        if getattr(theirs, name, None) != getattr(unset, name, None):
            raise InputError(f"--{name.replace('_', '-')}: leave it out; the grid sets it, or needs its default")
    weights, seeds = _weights(args.weights), _seeds(args.seeds or "0")
    rows, notes = _rows(args, weights)
    datasets = {column.dataset for column in tables.COLUMNS}
    if args.data is not None:
        from engine.data.index import find_roots

        datasets &= {dataset.name for dataset, _ in find_roots(Path(args.data))}
    columns = [column for column in tables.COLUMNS if column.dataset in datasets]
    plan = [
        tables.Cell(row, column, seed, _run(args, passed, weights, trained, column, seed))
        for seed in seeds
        for row in rows
        for column in columns
        if (trained := tables.source(row, column))
    ]
    if not plan:
        raise InputError(f"--data {args.data}: no data set in it that these rows test")
    if any(row.table == 5 for row in rows):
        notes.append(f"Table 5 starts from {'PASS' if 'pass' in weights else 'nothing (the paper: from PASS)'}")
    return plan, [*notes, f"options of the trainings: {shlex.join(passed) or 'the default ones'}"]


def _run(
    args: argparse.Namespace,
    passed: list[str],
    weights: dict[str, str],
    row: tables.Row,
    column: tables.Column,
    seed: int,
) -> grid.Run:
    """The training behind a cell."""
    alone = row.mode == "stl"
    name = "-".join([row.mode, row.variant, *([column.dataset, column.task] if alone else []), f"seed{seed}"])
    common = [*(["--data", args.data] if args.data else []), *passed, *tables.options(row, weights)]
    common += ["--seed", str(seed), "--output", str(args.output / name)]
    values = options.training_parser("").parse_args(common)
    if alone:
        values.dataset, values.tasks = column.dataset, column.task
    config = options.training_config(row.mode, values)
    script = os.path.relpath(Path(__file__).with_name(f"{row.mode}.py"))
    ranks = ["--num_gpus", str(args.num_gpus)] if args.num_gpus else []
    stream = ["--dataset", column.dataset, "--task", column.task] if alone else []
    facts = json.loads(json.dumps({"num_gpus": args.num_gpus, **asdict(config)}))
    return grid.Run(args.output / name, ("deepspeed", *ranks, script, *stream, *common), facts, config.steps)


def _demo(args: argparse.Namespace, passed: list[str]) -> None:
    if args.data is not None:
        raise InputError("--demo --data: the demo is on the mini data; leave one of them out")
    args.seeds = args.seeds or "0,1,2"
    args.rows = args.rows or ",".join(DEMO)
    if not any(option.partition("=")[0] == "--steps" for option in passed):
        passed += ["--steps", str(DEMO_STEPS)]
    if args.num_gpus is None:
        import torch

        args.num_gpus = None if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _rows(args: argparse.Namespace, weights: dict[str, str]) -> tuple[list[tables.Row], list[str]]:
    """The rows to fill, and a note on those that are left out."""
    wanted = args.tables.split(",")
    if not {*wanted} <= {"5", "6"}:
        raise InputError(f"--tables {args.tables}: expected 5, 6 or 5,6")
    rows = [row for row in tables.ROWS.values() if str(row.table) in wanted]
    lacking = [row for row in rows if row.table == 6 and tables.backbone(row) not in weights]
    if args.rows is None:
        rows = [row for row in rows if row not in lacking]
        left = [f"left out, no --weights {tables.backbone(row)}=FILE: {row.title}" for row in lacking]
    else:
        names, left = args.rows.split(","), []
        for name in names:
            if name not in [row.name for row in rows]:
                known = ", ".join(row.name for row in rows)
                raise InputError(f"--rows {name}: unknown; choose from {known} (Table {args.tables})")
            if tables.ROWS[name] in lacking:
                file = f"{tables.backbone(tables.ROWS[name])}=FILE"
                raise InputError(f"--rows {name}: give its pre-trained weights, --weights {file}")
        rows = [row for row in rows if row.name in names]
    if not rows:
        raise InputError(f"--tables {args.tables}: no row can be filled without --weights NAME=FILE,..")
    return rows, left


def _weights(text: str | None) -> dict[str, str]:
    weights = {}
    for pair in text.split(",") if text is not None else ():
        name, _, file = pair.partition("=")
        if name not in tables.BACKBONES or not file or name in weights:
            raise InputError(f"--weights {pair}: expected NAME=FILE once for each of {', '.join(tables.BACKBONES)}")
        if not os.path.isfile(file):
            raise InputError(f"--weights {pair}: no such file")
        weights[name] = file
    return weights


def _seeds(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len({*map(int, numbers)}) < len(numbers):
        raise InputError(f"--seeds {text}: expected different numbers of 0 or more, such as 0,1,2")
    return [int(number) for number in numbers]


if __name__ == "__main__":
    sys.exit(options.run(main))
