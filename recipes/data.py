"""Data sets: draw the mini data, count what a folder holds, index it.

python recipes/data.py mini --output DIR        ten small drawn data sets, each in its authors' layout
python recipes/data.py describe --data DIR      counts, tasks and protocols of every data set found, as a table
python recipes/data.py index --data DIR         parse every data set and look into every image, once; later runs open
                                                the result at once. Killed or called again, it goes on where it was
python recipes/data.py pack --data DIR --output DIR
                                                copy indexed data sets into tar files of 1 GB that are read in place
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.errors import InputError
from recipes import options


def mini(args: argparse.Namespace) -> None:
    from engine.data.mini import contact_sheet, write_mini

    if args.sheet and args.sheet.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise InputError(f"--sheet {args.sheet}: expected a name that ends in .jpg or .png")
    given = {name: getattr(args, name) for name in ("seed", "train_ids", "test_ids", "images_per_id")}
    started = time.perf_counter()
    progress = _Progress()
    given["datasets"] = args.dataset.split(",") if args.dataset else None
    write_mini(args.output, **{name: value for name, value in given.items() if value is not None}, progress=progress)
    state = f"{progress.total:,} pictures in {time.perf_counter() - started:.1f} s" if progress.total else "was there"
    print(f"mini data in {args.output}: {state}")
    if args.sheet:
        contact_sheet(args.output, args.sheet)
        print(f"contact sheet in {args.sheet}")


def describe(args: argparse.Namespace) -> None:
    from engine.data.describe import describe, format_table

    print(format_table(describe(args.data)))


def index(args: argparse.Namespace) -> None:
    from engine.data.checking import index_folder

    index_folder(args.data, threads=args.workers, say=print, anew=args.anew)


def pack(args: argparse.Namespace) -> None:
    from engine.data.packing import pack_folder

    names = args.dataset.split(",") if args.dataset else None
    pack_folder(args.data, args.output, names, shard_bytes=args.shard_mb << 20, say=print)


class _Progress:
    """A line that is rewritten on a terminal; elsewhere one line per tenth of the work."""

    def __init__(self) -> None:
        self.started, self.total, self._tenth = time.perf_counter(), 0, 0

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        rate = done / max(time.perf_counter() - self.started, 1e-9)
        line = f"mini: {done:,} / {total:,} pictures, {rate:,.0f}/s, {(total - done) / max(rate, 1e-9):.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // max(total, 1) > self._tenth:
            self._tenth = done * 10 // total
            print(line, file=sys.stderr, flush=True)


def parser() -> options.Parser:
    top = options.Parser(description=__doc__, formatter_class=options.RawHelp, allow_abbrev=False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    sub = commands.add_parser("mini", help="draw the mini data", allow_abbrev=False)
    sub.set_defaults(command=mini)
    add = sub.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write (no default)")
    add("--seed", type=int, metavar="N", help="decides every picture (default: 0)")
    add("--train-ids", type=int, metavar="N", help="people who train, per data set (default: 100)")
    add("--test-ids", type=int, metavar="N", help="people who are tested, per data set (default: 32)")
    add("--images-per-id", type=int, metavar="N", help="pictures of each person, about (default: 12)")
    add("--dataset", metavar="A,B", help="draw only these data sets (default: all ten)")
    add("--sheet", type=Path, metavar="FILE", help="also write a labelled overview picture, jpg or png (default: none)")

    for command, text in (
        (describe, "count what a folder holds"),
        (index, "parse every data set and look into every image, once"),
        (pack, "copy indexed data sets into large files"),
    ):
        sub = commands.add_parser(command.__name__, help=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        written = "; the index is written to DIR/.index" if command is index else ""
        add = sub.add_argument
        add("--data", type=Path, required=True, metavar="DIR", help=f"folder with the data sets (no default){written}")
        if command is index:
            cores = os.cpu_count() or 1
            add("--workers", type=int, default=cores, metavar="N", help=f"threads that decode (default: {cores})")
            add("--anew", action="store_true", help="look into every image again, whatever is known of it")
        if command is pack:
            add("--output", type=Path, required=True, metavar="DIR", help="folder for the packed data (no default)")
            add("--dataset", metavar="NAME", help="pack these data sets only, separated by commas (default: all)")
            add("--shard-mb", type=int, default=1024, metavar="N", help="size of a tar file in MiB (default: 1024)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    def run() -> int:
        args = parser().parse_args(argv)
        try:
            args.command(args)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
        return 0

    return options.run(run)


if __name__ == "__main__":
    sys.exit(main())
