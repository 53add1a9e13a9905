"""A trained model as a folder to take away, with graphs for other runtimes; a gallery as a FAISS index.

python recipes/export.py --checkpoint runs/mtl-20260101-120000 --output DIR --onnx
python recipes/export.py --checkpoint DIR --faiss gallery.faiss --data DATA --dataset market1501 --task trad
python recipes/evaluate.py --checkpoint DIR --data DATA --backend onnx         # the graphs' figures
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.errors import InputError
from engine.tasks import TASKS
from recipes import options


def main() -> int:
    parser = options.Parser(description=str(__doc__), formatter_class=options.RawHelp, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, a run's --output or an exported folder")
    add("--output", metavar="DIR", help="new folder for the model: weights, vocabulary, sizes (default: none)")
    add("--onnx", action="store_true", help="also as ONNX graphs in DIR/onnx, checked with onnxruntime")
    add("--torch-export", action="store_true", help="also as programs of torch.export in DIR/torch-export")
    add("--half", action="store_true", help="weights and graphs in float16; features stay float32")
    add("--faiss", metavar="FILE", help="write the gallery of --dataset as a FAISS index, and FILE.npz with its facts")
    add("--data", metavar="DIR", help=f"for --faiss: folder with the data sets (default: {options.MINI})")
    add("--dataset", metavar="NAME", help="for --faiss: the data set, such as market1501 (no default)")
    add("--task", choices=tuple(TASKS), help="for --faiss: the task (no default)")
    add("--protocol", metavar="NAME", help="for --faiss: whose gallery (default: the first of the task)")
    add("--feature", choices=("cls", "fout", "concat"), help="for --faiss: default as in the checkpoint")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for --faiss: default auto, a GPU if any")
    args = parser.parse_args()
    if not args.output and not args.faiss:
        raise InputError("nothing to write: give --output DIR, --faiss FILE or both")
    if not args.output and (args.onnx or args.torch_export or args.half):
        raise InputError("--onnx, --torch-export and --half belong to an exported folder: give --output DIR")
    if args.faiss and not (args.dataset and args.task):
        raise InputError("--faiss: which gallery? give --dataset NAME and --task TASK")
    if not args.faiss and (args.data or args.dataset or args.task or args.protocol or args.feature):
        raise InputError("--data, --dataset, --task, --protocol and --feature belong to an index: give --faiss FILE")

    from engine.export import export, write_index

    if args.output:
        backends = [name for name, asked in (("onnx", args.onnx), ("torch-export", args.torch_export)) if asked]
        export(args.checkpoint, args.output, backends=backends, half=args.half)
        for file in sorted(path for path in Path(args.output).rglob("*") if path.is_file()):
            print(f"{file}  {file.stat().st_size / 1e6:,.1f} MB")
    if args.faiss:
        from engine.runtime import pick_device

        options.mini_data(args.data)
        given = {"protocol": args.protocol, "feature": args.feature, "device": pick_device(args.device)}
        count = write_index(args.checkpoint, args.data or options.MINI, args.dataset, args.task, args.faiss, **given)
        print(f"{count:,} gallery images of {args.dataset} in {args.faiss}, their facts in {args.faiss}.npz")
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
