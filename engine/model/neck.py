"""BNNeck: batch normalisation between the feature that the triplet loss shapes and the one that is classified.

One neck per stream: the statistics of one data set never mix with another's. Training uses the statistics of the
*global* batch (one all-reduce of sums, so CPU and GPU ranks agree); evaluation uses the running ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.ranks import summed


class GlobalBatchNorm(nn.Module):
    """x [B, C] -> [B, C], normalised per feature over the batches of all ranks. No bias (Luo et al. 2019)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.running_mean) * (torch.rsqrt(self.running_var + self.eps) * self.weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = summed(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
        n = total[-1].detach()
        mean = total[:-1] / n
        var = summed(((x - mean) ** 2).sum(0)) / n  # around the mean: no cancellation
        with torch.no_grad():  # a batch that is not finite is skipped by training and must leave no trace here either
            finite = torch.isfinite(mean) & torch.isfinite(var)
            unbiased = var * n / (n - 1).clamp(min=1)
            self.running_mean.lerp_(torch.where(finite, mean, self.running_mean), self.momentum)
            self.running_var.lerp_(torch.where(finite, unbiased, self.running_var), self.momentum)
        return (x - mean) * (torch.rsqrt(var + self.eps) * self.weight)
