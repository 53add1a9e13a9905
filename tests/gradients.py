"""A window of streams as DeepSpeed accumulates it, against the weighted sum of each stream's own gradients by plain
autograd, in float64 (DeepSpeed reduces in float32). Run by test_zero.py, prints JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
from conftest import SMALL

from engine import runtime, zero
from engine.config import TrainConfig
from engine.data.record import Batch
from engine.losses import TrainingModel
from engine.model.irm import IRM

STREAMS = ["trad/a", "cc/b", "t2i/c", "li/d"]
WEIGHTS = {"trad": 0.3, "cc/b": 2.0, "cc": 9.0}
FACTORS = [0.3, 2.0, 1.0, 1.0]
RATE = 1e-5
OLD, NEW = "edit.blocks.0.mlp.fc1.weight", "heads.trad__a.classify.cls.weight"


def batch(stream: int) -> Batch:
    torch.manual_seed(stream)
    texts = 1 if stream < 2 else 8
    labels = torch.arange(4).repeat_interleave(2)
    images = torch.randn(8, 3, *SMALL.image_size, dtype=torch.float64)
    return Batch(stream, images, labels, torch.randint(4, 40, (texts, 6)), torch.full((texts,), 6), None)


def module() -> TrainingModel:
    torch.manual_seed(0)
    config = TrainConfig(model=SMALL, loss_weights=WEIGHTS, clip=0.0, lr=1e-3, lr_new=7.0)
    model = IRM(SMALL, 40, {"trad/a": 4, "cc/b": 4, "li/d": 4}, ["t2i/c"])
    return TrainingModel(model, config, STREAMS, [False, False, True, False]).double()


def gradients(training: TrainingModel, scale: list[float]) -> dict[str, torch.Tensor]:
    """Sum over streams of scale x the gradient of the terms' sum, one backward for each stream."""
    total: dict[str, torch.Tensor] = {}
    for number, factor in enumerate(scale):
        training.zero_grad()
        training.chance.manual_seed(number)
        loss, _ = training(batch(number))
        loss.backward()
        for name, parameter in training.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + factor * parameter.grad
    return total


def main() -> None:
    place = runtime.start("cpu")
    accelerator = deepspeed.accelerator.get_accelerator()
    types = [*accelerator.supported_dtypes(), torch.float64]  # it only forgets to say so
    accelerator.supported_dtypes = lambda: types
    plain = module()
    plain.config = plain.config.but(loss_weights={})
    want = gradients(plain, [factor / len(STREAMS) for factor in FACTORS])
    training = module()
    ds_engine = zero.initialize(training, training.config, 8, len(STREAMS), place)
    ds_engine.train()
    found: dict[str, torch.Tensor] = {}
    for number in range(len(STREAMS)):
        training.chance.manual_seed(number)
        loss, _ = ds_engine(batch(number))
        ds_engine.backward(loss)
        if number == len(STREAMS) - 1:
            found = {name: p.grad.clone() for name, p in training.named_parameters() if p.grad is not None}
        weights = {name: p.detach().clone() for name, p in training.named_parameters()}
        norm = zero.step(ds_engine, RATE, 0.0)
    # Adam's first step moves each weight by its rate, but for where the gradient is next to nothing, and decay
    moved = {name: (p.detach() - weights[name]).abs().median().item() for name, p in training.named_parameters()}
    rates = {part: moved[f"model.{name}"] / RATE for part, name in (("old", OLD), ("new", NEW))}
    idle = {name.split(".")[2] for name, value in found.items() if name not in want and not value.any()}
    assert found.keys() == want.keys() | {name for name in found if name.split(".")[2] in idle}
    scale = max(value.abs().max().item() for value in want.values())
    error = max((found[name] - value).abs().max().item() for name, value in want.items())
    total = torch.cat([value.flatten() for value in want.values()]).norm().item()
    print(json.dumps({"idle": sorted(idle), "error": error / scale, "norm": norm / total, "rates": rates}))


if __name__ == "__main__":
    main()
