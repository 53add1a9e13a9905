"""Every protocol of every data set found under --data, for a trained model: table, metrics.json and retrieval.html.

python recipes/evaluate.py --checkpoint runs/mtl-20260101-120000 --data DIR
deepspeed --num_gpus 4 recipes/evaluate.py --checkpoint ... --data DIR      # the same numbers by four ranks
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.errors import InputError, writing
from recipes import options


def main() -> int:
    parser = options.Parser(description=str(__doc__), formatter_class=options.RawHelp, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, a run's --output or an exported folder")
    add(
        "--backend",
        choices=("torch", "onnx", "torch-export"),
        default="torch",
        help="what computes the features: the model, or the graphs of an exported folder (default: torch)",
    )
    add("--data", metavar="DIR", help=f"folder with the data sets (default: {options.MINI})")
    add("--output", metavar="DIR", help="folder for metrics.json and retrieval.html (default: runs/evaluate-TIME)")
    add("--dataset", metavar="A,B", help="only these data sets (default: all found)")
    options.add_tasks(parser)
    add("--feature", choices=("cls", "fout", "concat"), help="what is compared (default: as in the checkpoint)")
    add("--quick", action="store_true", help="one instruction sentence instead of 20, the first drawn gallery")
    add(
        "--baselines",
        action="store_true",
        help="also compare colours and pixels, and exchange the queries' instructions and pictures",
    )
    add(
        "--released",
        action="store_true",
        help="measure as the evaluator of the released Instruct-ReID code: a ranking ends at 500, before junk is "
        "removed, and AP is divided by what was found (higher figures, named PROTOCOL:instruct)",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="leave damaged test images out and say how many (default: they are an error that names one)",
    )
    add("--save-features", action="store_true", help="write the test features to features.npz")
    add("--attention", action="store_true", help="show in retrieval.html where the model looks in each query picture")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU where there is one")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    args = parser.parse_args()
    if args.attention and args.backend != "torch":
        raise InputError(f"--attention --backend {args.backend}: graphs do not show where they look; leave one out")
    options.mini_data(args.data)

    from engine.evaluation import evaluate, write_features
    from engine.report import Report
    from engine.results import format_table, is_real, write_metrics
    from engine.runtime import Runtime, pick_device, start

    output = Path(args.output or options.default_output("evaluate"))
    if os.path.exists(output / "metrics.json"):
        raise InputError(f"--output {output}: holds results already; choose another folder")
    with writing(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    report = Report(attention=args.attention)
    launched = "RANK" in os.environ  # by deepspeed; plain python needs no process group
    metrics = evaluate(
        args.checkpoint,
        args.data or options.MINI,
        datasets=tuple(args.dataset.split(",")) if args.dataset else None,
        tasks=tuple(args.tasks.split(",")) if args.tasks else tuple(options.TASKS),
        quick=args.quick,
        with_baselines=args.baselines,
        feature=args.feature,
        released=args.released,
        allow_missing=args.allow_missing,
        backend=args.backend,
        runtime=start(args.device) if launched else Runtime(pick_device(args.device)),
        arrays=arrays if args.save_features else None,
        report=report,
    )
    if metrics is not None:
        run = Path(metrics["checkpoint"]).resolve().parent.parent  # RUN/checkpoints/step-N
        print(format_table(metrics, paper=is_real(args.data or options.MINI)))
        with writing(output):  # what matters most first: a disk may be full
            write_metrics(metrics, output / "metrics.json")
            report.write(output / "retrieval.html", metrics, run / "log.jsonl")
            if args.save_features:
                write_features(arrays, output / "features.npz")
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
