"""Trains a very small model under each ZeRO stage while one thing is broken on purpose; prints what came out.

    inject.py DATA OUTPUT KIND STAGES    KIND: loss, infinite, gradient (of step 2), always (every gradient), nothing

Run by test_failures.py, as one process or below the launcher. Breaks the last rank only: the others must learn of it.
"""

import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from conftest import SMALL

from engine import training, zero
from engine.config import TrainConfig
from engine.losses import TrainingModel
from recipes import options

WINDOW, BROKEN = 2, 2  # micro-steps per step; the step that is broken


class Broken(TrainingModel):
    kind, micro_step = "", 0

    def forward(self, batch):
        statistics = [buffer.clone() for buffer in self.buffers()]
        if Broken.micro_step == (BROKEN - 1) * WINDOW:
            Broken.before = statistics
        if Broken.micro_step == BROKEN * WINDOW and self.kind not in ("nothing", "always"):
            assert all(map(torch.equal, statistics, Broken.before))  # a skipped step leaves none
        loss, terms = super().forward(batch)
        Broken.micro_step += 1
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if last and (self.kind == "always" or Broken.micro_step == (BROKEN - 1) * WINDOW + 1):
            if self.kind == "loss":
                loss = loss * math.nan
            elif self.kind == "infinite":  # its gradients are finite
                loss = loss + math.inf
            elif self.kind != "nothing":
                loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, terms


def weights(ds_engine) -> torch.Tensor:
    whole = zero.weights(ds_engine, ds_engine.module)
    return torch.cat([value.flatten() for name, value in whole.items() if "running" not in name])


def main() -> int:
    data, output, kind, stages = sys.argv[-4:]
    training.TrainingModel, Broken.kind = Broken, kind
    step, changed = zero.step, []

    def watched(ds_engine, *arguments):
        ends = ds_engine.is_gradient_accumulation_boundary()
        before = weights(ds_engine)
        norm = step(ds_engine, *arguments)
        after = weights(ds_engine)
        assert torch.isfinite(after).all()
        if ends:
            changed.append(not torch.equal(before, after))
        return norm

    zero.step = watched
    for stage in map(int, stages):
        Broken.micro_step = 0
        changed.clear()
        config = TrainConfig(
            data=data, output=f"{output}/{stage}", model=SMALL, tasks=("trad",), datasets=("market1501", "msmt17"),
            steps=30 if kind == "always" else 4, ids=4, images_per_id=2, window=WINDOW, lr=1e-3, lr_start=1e-3,
            warmup=0, evaluate=False, device="cpu", workers=1, checkpoint_every=5,
            resume=Path(f"{output}/{stage}/checkpoints").exists(), deepspeed={"zero_optimization": {"stage": stage}},
        )  # fmt: skip
        try:
            training.train(config)
        finally:
            if torch.distributed.get_rank() == 0:
                print(json.dumps({"stage": stage, "changed": changed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
