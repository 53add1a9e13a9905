"""Attention module E_f: mixes picture and instruction by attention over `[CLS_img; instruction]` and `[CLS_ins;
image]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.model.instruction import Instruction


class Fusion(nn.Module):
    """image tokens [B, N, C] and an Instruction of B rows -> F_out [B, 2C], the two CLS after `depth` shared blocks."""

    def __init__(self, width: int, depth: int, heads: int, instruction_width: int):
        super().__init__()
        self.project = nn.Linear(instruction_width, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor, instruction: Instruction) -> Tensor:
        """Padded instruction tokens are masked by length: padding changes nothing."""
        B = image.shape[0]
        words = self.project(instruction.tokens).expand(B, -1, -1)
        ask = torch.cat([image[:, :1], words], 1)  # the picture's CLS among the instruction's tokens
        see = torch.cat([words[:, :1], image], 1)  # the instruction's CLS among the picture's tokens
        padding = None
        if instruction.lengths is not None:
            lengths = instruction.lengths.expand(B)
            padding = torch.arange(ask.shape[1], device=image.device) > lengths[:, None]
        for block in self.blocks:
            ask, see = block(ask, src_key_padding_mask=padding), block(see)
        return self.norm(torch.cat([ask[:, :1], see[:, :1]], 1)).flatten(1)
