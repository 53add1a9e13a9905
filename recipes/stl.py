"""Single-task training: one data set, any folder in its authors' layout.

deepspeed recipes/stl.py --dataset market1501 --data DIR
deepspeed recipes/stl.py --dataset ltcc --task ctcc --data DIR     # a data set that serves several tasks
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the checkout's root, not recipes/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.tasks import TASKS
from recipes import options


def main() -> int:
    parser = options.training_parser(str(__doc__))
    parser.add_argument("--dataset", required=True, metavar="NAME", help="data set to train and test")
    parser.add_argument("--task", dest="tasks", choices=list(TASKS), help="task, where the data set serves several")
    return options.train("stl", parser.parse_args())


if __name__ == "__main__":
    sys.exit(options.run(main))
