"""Learning rate as a pure function of the step, and the optimiser's parameter groups."""

from __future__ import annotations

import math

from torch import nn

from engine.config import PARTS, TrainConfig

# Parts that no pre-trained ViT or BERT covers start from nothing: they learn at lr * lr_new. Where others of PARTS came
# pre-trained, so does an E_e or a tower of E_i that did not.
NEW = ("heads.", "edit.gates", "edit.kv_ins", "fuse.", "match.", "project_", "temperature.", "whiten.")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from lr_start to lr over the first `warmup` steps, then a cosine down to lr / 100."""
    if step < config.warmup:
        return config.lr_start + (config.lr - config.lr_start) * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def layers_above(name: str, depth: int) -> int:
    """How many of E_e's `depth` blocks come after this parameter, its stem and tokens before them all; 0 elsewhere."""
    if name.startswith("edit.blocks."):
        return depth - 1 - int(name.split(".")[2])
    first = ("edit.patch_embed.", "edit.cls_", "edit.part_", "edit.pos_embed")
    return depth if name.startswith(first) else 0


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Groups by rate (pre-trained or new layer, and with layer_decay how far from the output) and by weight decay (none
    for vectors: gates, norms, biases).

    `multiplier` scales the scheduled rate of the group.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    new = NEW + tuple(f"{part}." for part in PARTS if config.given and part not in config.given)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("model.")
            rate = config.lr_new if part.startswith(new) else 1.0
            rate *= config.layer_decay ** layers_above(part, config.model.depth)
            plain = parameter.ndim < 2 or name.endswith(("gates", "cls_token", "part_tokens", "pos_embed"))
            groups.setdefault((rate, plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "multiplier": rate,
        }
        for (rate, plain), parameters in sorted(groups.items())
    ]
