"""IRM, the Instruct-ReID model: instruction encoder E_i, editing transformer E_e, attention module E_f, heads.

    F_T = E_i(instruction)     F = CLS of E_e(image, F_T)     F_out = E_f(E_e tokens, F_T)

Shapes: B images, N image tokens, C width, E instruction width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.data.record import Batch
from engine.model.editing import EditingTransformer
from engine.model.fusion import Fusion
from engine.model.instruction import Instruction, InstructionEncoder
from engine.model.neck import GlobalBatchNorm
from engine.tasks import Task


class Features(NamedTuple):
    """What one batch becomes.

    cls          [B, C] F, the CLS of E_e
    fout         [B, 2C] F_out, the two CLS of E_f; None without an instruction
    instruction  F_T; None without an instruction
    tokens       [B, N, C] output of E_e
    """

    cls: Tensor
    fout: Tensor | None
    instruction: Instruction | None
    tokens: Tensor


class Head(nn.Module):
    """One stream's BNNecks and identity classifiers, for F and for F_out. identities 0: no classifiers, as exported."""

    def __init__(self, width: int, identities: int):
        super().__init__()
        self.neck = nn.ModuleDict({"cls": GlobalBatchNorm(width), "fout": GlobalBatchNorm(2 * width)})
        sizes = {"cls": width, "fout": 2 * width} if identities else {}
        self.classify = nn.ModuleDict({name: nn.Linear(size, identities, bias=False) for name, size in sizes.items()})
        for weight in self.classify.parameters():
            nn.init.normal_(weight, std=0.03)  # so that each identity pulls its own way from the first step


class Whitening(nn.Module):
    """One stream's batch statistics of its projections: pictures and texts, each normalised per feature."""

    def __init__(self, embed: int):
        super().__init__()
        self.image, self.text = GlobalBatchNorm(embed), GlobalBatchNorm(embed)


class Temperature(nn.Module):
    """Similarities -> logits, divided by a learned temperature kept in 0.01 .. 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.07]))

    def forward(self, similarity: Tensor) -> Tensor:
        return similarity / self.value.clamp(0.01, 0.5)


class IRM(nn.Module):
    """The model. heads: stream name -> identities, for streams with an identity loss (Eq. 7); matching: names of the
    streams that match texts and pictures (Eq. 8)."""

    def __init__(self, config: ModelConfig, vocabulary: int, heads: dict[str, int], matching: Sequence[str] = ()):
        super().__init__()
        self.config = config
        self.instruct = InstructionEncoder(config, vocabulary)
        self.edit = EditingTransformer(
            size=config.image_size,
            patch=config.patch,
            stem=config.stem,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            part_tokens=config.part_tokens,
            drop_path=config.drop_path,
            cls_stem=config.cls_stem,
            instruction_width=config.instruction_width if config.editing else None,
            gate=config.gate,
            fused=config.fused,
        )
        self.fuse = Fusion(config.width, config.fusion_depth, config.heads, config.instruction_width)
        self.heads = nn.ModuleDict({_key(name): Head(config.width, count) for name, count in heads.items()})
        self.project_image = nn.Linear(config.width, config.embed)
        self.project_text = nn.Linear(config.instruction_width, config.embed)
        whitened = matching if config.embed_norm else ()
        self.whiten = nn.ModuleDict({_key(name): Whitening(config.embed) for name in whitened})
        self.temperature = Temperature()
        self.match = nn.Linear(2 * config.width + 1, 2)  # sees F_out and the cosine; begins near the cosine's order
        nn.init.normal_(self.match.weight, std=0.01)
        self.match.weight.data[:, -1] += torch.tensor([-0.5, 0.5])

    def freeze_unused(self, tasks: Iterable[Task]) -> None:
        """Freeze the tower of E_i that none of these tasks asks. DeepSpeed would hand it gradients of 0, with which
        AdamW decays it and keeps its moments."""
        asked = {"picture" if task.instruction == "clothes" else "text" for task in tasks}
        self.instruct.freeze(*{"text", "picture"} - asked)

    def instruction(self, batch: Batch) -> Instruction | None:
        if batch.text is not None and batch.text_lengths is not None:
            return self.instruct.of_text(batch.text, batch.text_lengths)
        return None if batch.clothes is None else self.instruction_of_clothes(batch.clothes)

    def instruction_of_clothes(self, pictures: Tensor) -> Instruction:
        """F_T of clothes pictures [T, 3, h, w]."""
        return self.instruct.of_clothes(pictures, self.edit.patch_embed if self.config.shared_stem else None)

    def forward(self, batch: Batch) -> Features:
        return self.features(batch.images, self.instruction(batch))

    def features(self, images: Tensor, instruction: Instruction | None) -> Features:
        """Instructed features of images; without an instruction E_e is a plain ViT and there is no F_out."""
        if instruction is None:
            tokens = self.edit(images)
            return Features(tokens[:, 0], None, None, tokens)
        told = (instruction.tokens, instruction.lengths) if self.config.editing else ()
        tokens = self.edit(images, *told)
        return Features(tokens[:, 0], self.fuse(tokens, instruction), instruction, tokens)

    def head(self, stream: str) -> Head | None:
        if _key(stream) not in self.heads:
            return None
        head = self.heads[_key(stream)]
        assert isinstance(head, Head)
        return head

    def test_feature(self, features: Features, stream: str, kind: str) -> Tensor:
        """L2-normalised feature that a test compares: BNNeck of F ("cls"), of F_out ("fout"), or both ("concat").

        A stream the model was not trained on has no neck; its feature is compared as it is.
        """
        head = self.head(stream)
        parts = []
        for name, value in (("cls", features.cls), ("fout", features.fout)):
            if kind in (name, "concat") and value is not None:
                parts.append(F.normalize(value if head is None else head.neck[name](value), dim=-1))
        return F.normalize(torch.cat(parts, -1), dim=-1)

    def image_embedding(self, features: Features, stream: str) -> Tensor:
        """[B, embed] unit vectors of pictures, for text-to-image search."""
        projected, whitening = self.project_image(features.cls), self.whitening(stream)
        return F.normalize(projected if whitening is None else whitening.image(projected), dim=-1)

    def text_embedding(self, instruction: Instruction, stream: str) -> Tensor:
        """[T, embed] unit vectors of sentences."""
        projected, whitening = self.project_text(instruction.cls), self.whitening(stream)
        return F.normalize(projected if whitening is None else whitening.text(projected), dim=-1)

    def whitening(self, stream: str) -> Whitening | None:
        """The stream's own; that of the first for a stream not trained on: unlike a neck, it cannot be done without."""
        if not self.whiten:
            return None
        own = self.whiten[_key(stream) if _key(stream) in self.whiten else next(iter(self.whiten))]
        assert isinstance(own, Whitening)
        return own

    def match_scores(
        self, tokens: Tensor, instruction: Instruction, stream: str, cosine: Tensor | None = None
    ) -> Tensor:
        """[B, 2] logits (no match, match) of B (picture, sentence) pairs.

        cosine  [B] of their projections; None: computed here (in training the projections know their own batch)
        """
        if cosine is None:
            pictures = self.image_embedding(Features(tokens[:, 0], None, None, tokens), stream)
            cosine = (pictures * self.text_embedding(instruction, stream)).sum(-1)
        return self.match(torch.cat([self.fuse(tokens, instruction), self.temperature(cosine)[:, None]], -1))


def _key(stream: str) -> str:
    return stream.replace("/", "__")
