"""Multi-task training: one model for every task of every data set found under --data.

deepspeed recipes/mtl.py                        # mini data set, irm_tiny, evaluation at the end
deepspeed recipes/mtl.py --data DIR             # irm_base on real data sets, any number of GPUs
deepspeed --num_gpus 2 recipes/mtl.py ...       # two ranks (two CPU processes where there is no GPU)
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes import options


def main() -> int:
    parser = options.training_parser(str(__doc__))
    options.add_tasks(parser)
    parser.add_argument("--dataset", metavar="A,B", help="only these data sets (default: all found)")
    return options.train("mtl", parser.parse_args())


if __name__ == "__main__":
    sys.exit(options.run(main))
