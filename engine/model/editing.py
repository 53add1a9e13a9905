"""Editing transformer E_e: a ViT whose every block also attends, through a gate, to the instruction (Eq. 1-4).

Parameter names are timm's, so a ViT checkpoint loads unchanged; with all gates 0 (their initial value) the output is
that ViT's. Shapes: B images, N tokens (class tokens first), M instruction tokens, H heads, D head dimension, C width.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from engine.ranks import place


class Attention(nn.Module):
    """Self-attention of one block, with the gated second softmax over the instruction's keys and values. fused: by the
    kernels, else by their eager reference."""

    def __init__(self, width: int, heads: int, fused: bool = True):
        super().__init__()
        self.heads = heads
        self.attend = kernels.gated_attention_packed if fused else kernels.gated_attention_packed_reference
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, kv_ins: Tensor | None, gate: Tensor | None, lengths: Tensor | None) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        return self.proj(self.attend(qkv, kv_ins, gate, ins_lengths=lengths).reshape(B, N, C))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self,
        x: Tensor,
        kv_ins: Tensor | None,
        gate: Tensor | None,
        lengths: Tensor | None,
        keep_2B11: Tensor | None,
    ) -> Tensor:
        """keep: factors of the two residual branches, one for each sample; None: 1."""
        attended = self.attn(self.norm1(x), kv_ins, gate, lengths)
        x = x + (attended if keep_2B11 is None else keep_2B11[0] * attended)
        edited = self.mlp(self.norm2(x))
        return x + (edited if keep_2B11 is None else keep_2B11[1] * edited)


class ConvStem(nn.Module):
    """Strided 3x3 convolutions down to one token per patch x patch pixels: learns faster than one large convolution."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        steps = patch.bit_length() - 1
        widths = [3, *(width >> (steps - 1 - i) for i in range(steps))]
        layers: list[nn.Module] = []
        for i in range(steps):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)]
            layers += [nn.GroupNorm(max(1, widths[i + 1] // 16), widths[i + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class EditingTransformer(nn.Module):
    """images [B, 3, h, w] (+ instruction tokens) -> tokens [B, N, C].

    stem                "patch", "conv", or "given": none of its own, `forward` gets another transformer's
    cls_stem            CLS begins as a linear map of all patches side by side, not as the same vector for all images
    instruction_width   features of the instruction's tokens; None: a plain ViT (the picture tower)
    fused               attention by the kernels, else by their eager reference
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        patch: int,
        stem: str,
        width: int,
        depth: int,
        heads: int,
        part_tokens: int = 0,
        drop_path: float = 0.0,
        cls_stem: bool = False,
        instruction_width: int | None = None,
        gate: float = 0.0,
        fused: bool = True,
    ):
        super().__init__()
        self.heads, self.class_tokens = heads, 1 + part_tokens
        self.grid = size[0] // patch, size[1] // patch
        if stem == "conv":
            self.patch_embed: nn.Module = ConvStem(patch, width)
        elif stem == "patch":
            self.patch_embed = PatchEmbed(img_size=size, patch_size=patch, embed_dim=width)
        self.cls_stem = nn.Linear(self.grid[0] * self.grid[1] * width, width) if cls_stem else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if part_tokens:
            self.part_tokens = nn.Parameter(torch.zeros(1, part_tokens, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.class_tokens + self.grid[0] * self.grid[1], width))
        self.rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        self.chance = torch.Generator()  # drop path; all ranks seed it alike
        self.checkpointing = False  # compute each block again in the backward pass instead of keeping what it computed
        self.blocks = nn.ModuleList(Block(width, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if instruction_width is not None:
            self.kv_ins = nn.Linear(instruction_width, depth * 2 * width)  # K', V' of all layers in one product
            self.gates = nn.Parameter(torch.full((depth, heads), gate))
        self.apply(_initialise)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.pos_embed.data[0, self.class_tokens :] = sines(*self.grid, width)

    def forward(
        self,
        images: Tensor,
        tokens_BMC: Tensor | None = None,
        lengths: Tensor | None = None,
        stem: nn.Module | None = None,
    ) -> Tensor:
        """tokens_BMC: F_T [B, M, E], or [1, M, E] when one instruction serves the batch; lengths [B or 1] valid
        tokens; stem: used in place of its own."""
        x = (stem or self.patch_embed)(images)
        B = x.shape[0]
        starts = [self.cls_token.expand(B, -1, -1)]
        if self.cls_stem is not None:
            starts[0] = starts[0] + self.cls_stem(x.flatten(1))[:, None]
        if self.class_tokens > 1:
            starts.append(self.part_tokens.expand(B, -1, -1))
        x = torch.cat([*starts, x], 1) + self.pos_embed
        kv_LBM2HD: list[Tensor | None] = [None] * len(self.blocks)
        gates: list[Tensor | None] = [None] * len(self.blocks)
        if tokens_BMC is not None:
            T, M, _ = tokens_BMC.shape
            kv = self.kv_ins(tokens_BMC).view(T, M, len(self.blocks), 2, self.heads, -1)
            kv_LBM2HD = list(kv.expand(B, -1, -1, -1, -1, -1).unbind(2))
            gates = list(self.gates.unbind(0))
            lengths = None if lengths is None else lengths.expand(B)
        keep_L2B11 = self._keep(x) if self.training and any(self.rates) else [None] * len(self.blocks)
        for block, kv_ins, gate, keep in zip(self.blocks, kv_LBM2HD, gates, keep_L2B11, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, kv_ins, gate, lengths, keep, use_reentrant=False)
            else:
                x = block(x, kv_ins, gate, lengths, keep)
        return self.norm(x)

    def _keep(self, x: Tensor) -> Tensor:
        """[depth, 2, B, 1, 1]: what the residual branches are multiplied with, 0 with the layer's rate, else so that
        the mean is 1 (drop path, Huang et al. 2016). Drawn for the batch of all ranks, so their number changes
        nothing."""
        rank, world = place()
        drawn = torch.rand(len(self.rates), 2, world, len(x), generator=self.chance)[:, :, rank]
        rates = torch.tensor(self.rates)[:, None, None]
        return ((drawn >= rates) / (1 - rates)).to(x)[..., None, None]

    def attention_map(self, images: Tensor, tokens_BMC: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """[B, h, w] float32, h x w patches: where the CLS looks in the last block. The mean over heads of its softmax
        over the image's tokens; what falls on patches is divided by its sum, so each map sums to 1."""
        block = self.blocks[-1]
        assert isinstance(block, Block)
        attention = block.attn
        seen: list[Tensor] = []
        hook = attention.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        try:
            self(images, tokens_BMC, lengths)
        finally:
            hook.remove()
        B, N, _ = seen[0].shape
        q, k, _ = attention.qkv(seen[0]).view(B, N, 3, self.heads, -1).float().permute(2, 0, 3, 1, 4)
        maps_BHN = torch.softmax(q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5, -1)[:, :, 0]
        patches = maps_BHN.mean(1)[:, self.class_tokens :]
        return (patches / patches.sum(1, keepdim=True)).view(B, *self.grid)


def sines(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width] initial position embeddings of a grid: a quarter each sine and cosine of row and column,
    half as high as a token's content. With ViT's noise of 0.02 the CLS of an untrained model hardly knows where on the
    body a colour is, and learns it slowly (bench/NOTES.md)."""
    frequencies = 1e-4 ** (torch.arange(width // 4) / (width // 4))
    waves = []
    for places in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"):
        angles = places.flatten()[:, None] * frequencies
        waves += [angles.sin(), angles.cos()]
    return 0.5 * torch.cat(waves, 1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
