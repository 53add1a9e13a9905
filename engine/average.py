"""Weights averaged over training steps: what --ema evaluates."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a model's parameters and buffers, on the model's device and in its types. The decay
    begins at 1/11 and grows to `decay`, so that the first, random weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimiser step `step`, counted from 1."""
        weight = 1 - min(self.decay, step / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, weight)
            else:
                self.values[name].copy_(value)

    def load(self, stored: dict[str, Tensor]) -> None:
        for name, value in stored.items():
            self.values[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """On the CPU, as `average.safetensors` holds it."""
        return {name: value.contiguous().cpu() for name, value in self.values.items()}
