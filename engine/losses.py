"""Eq. 7 for the five image tasks and Eq. 8 for text-to-image search.

The identity loss is that of the global batch. Terms over pairs (triplet, contrastive, matching) use the pairs of each
rank's own share, so they depend on the number of ranks; with `global_losses` those of the global batch, of which each
rank computes the rows of its own samples. Losses are float32 under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine.config import TrainConfig
from engine.data.record import Batch
from engine.model.instruction import Instruction
from engine.model.irm import IRM, Features
from engine.ranks import gathered, gathered_values, padded, place


class TrainingModel(nn.Module):
    """The model and its losses in one forward, as DeepSpeed wants it: batch -> (loss, terms). The loss is the terms'
    sum times the weight of the stream, or of its task.

    streams: names in the order of Batch.stream; matching: whether each uses Eq. 8 (else Eq. 7).
    """

    def __init__(self, model: IRM, config: TrainConfig, streams: list[str], matching: list[bool]):
        super().__init__()
        self.model, self.config, self.streams, self.matching = model, config, streams, matching
        self.chance = torch.Generator()  # wrong pairs; seeded anew for each micro-step, alike on all ranks

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.matching[batch.stream]:
            terms = matching_losses(self.model, batch, self.streams[batch.stream], self.config, self.chance)
        else:
            terms = identity_losses(self.model, batch, self.streams[batch.stream], self.config)
        stream = self.streams[batch.stream]
        weights = self.config.loss_weights
        weight = weights.get(stream, weights.get(stream.partition("/")[0], 1.0))
        total = weight * torch.stack(list(terms.values())).sum()
        return total, {name: term.detach() for name, term in terms.items()}


def identity_losses(model: IRM, batch: Batch, stream: str, config: TrainConfig) -> dict[str, Tensor]:
    """Eq. 7: adaptive triplet and identity loss on F and on F_out, as scalars "triplet_cls", "id_cls", "triplet_fout",
    "id_fout", float32, whose mean over ranks is the loss. The triplet sees unit vectors: on features of length
    sqrt(width) its first gradients are a hundred times the identity loss's and pull all features together."""
    features: Features = model(batch)
    head = model.head(stream)
    assert features.instruction is not None
    assert features.fout is not None
    assert head is not None
    rank, world = place() if config.global_losses else (0, 1)
    B, labels, instructions = len(batch.images), batch.labels, _wide(features.instruction.cls.detach())
    if world > 1:
        labels = gathered_values(labels)
        instructions = instructions if len(instructions) == 1 else gathered_values(instructions)
    if config.centre and len(instructions) > 1:  # one for the whole batch is like itself
        instructions = centred(instructions)
    if config.plain_triplet:
        instructions = torch.ones_like(instructions[:1, :1])
    instructions = instructions.expand(world * B, -1)
    terms = {}
    with torch.autocast(batch.images.device.type, enabled=False):  # losses in float32
        for name, value in (("cls", _wide(features.cls)), ("fout", _wide(features.fout))):
            unit = F.normalize(value, dim=-1)
            if world > 1:  # the gradient of its own rows is whole: none has to come back from other ranks
                parts = list(gathered_values(unit).chunk(world))
                unit = torch.cat([*parts[:rank], unit, *parts[rank + 1 :]])
            rows = rank * B, (rank + 1) * B
            triplet = kernels.adaptive_triplet(
                unit, labels, instructions, margin=config.margin, mining=config.mining, rows=rows
            )
            assert isinstance(triplet, Tensor)
            terms[f"triplet_{name}"] = config.triplet_weight * world * triplet  # ranks are averaged
            logits = head.classify[name](head.neck[name](value))
            terms[f"id_{name}"] = F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)
    return terms


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def centred(instructions: Tensor) -> Tensor:
    """[N, E] -> [N, E + 1] vectors whose cosine is (1 + c) / 2, c that of the instructions about their mean. From
    nothing all instructions are nearly parallel (cosine 0.95 and more), and so Eq. 6 would tell none from another."""
    unit = F.normalize(instructions - instructions.mean(0), dim=-1)
    return torch.cat([unit, torch.ones_like(unit[:, :1])], 1)


def matching_losses(
    model: IRM, batch: Batch, stream: str, config: TrainConfig, chance: torch.Generator
) -> dict[str, Tensor]:
    """Eq. 8: contrastive loss on the projections, and matching loss on F_out of true pairs and of wrong ones: one for
    each picture and each text, the likelier the more similar (ALBEF), drawn by `chance`, which all ranks seed alike.
    The most similar ones alone teach nothing: they are people who look the same. Returns scalars "contrastive" and
    "match", float32, whose mean over ranks is the loss."""
    assert batch.text is not None
    assert batch.text_lengths is not None
    instruction = model.instruct.of_text(batch.text, batch.text_lengths)
    seen = model.features(batch.images, None)
    rank, world = place()
    B, labels, picture_tokens = len(batch.images), batch.labels, seen.tokens
    pictures_BE = pictures = _wide(model.image_embedding(seen, stream))
    texts_BE = texts = _wide(model.text_embedding(instruction, stream))
    drawn = torch.rand(2, world * B, generator=chance)[:, rank * B : (rank + 1) * B]
    first = 0  # of its own samples among all
    if config.global_losses and world > 1:
        first, labels, pictures, texts = rank * B, gathered_values(labels), gathered(pictures), gathered(texts)
        picture_tokens = gathered(picture_tokens)
        parts = gathered(padded(instruction.tokens)), instruction.lengths, gathered(instruction.cls)
        instruction = Instruction(parts[0], None if parts[1] is None else gathered_values(parts[1]), parts[2])
    same = batch.labels[:, None] == labels
    with torch.autocast(batch.images.device.type, enabled=False):
        to_texts, to_pictures = pictures_BE @ texts.mT, texts_BE @ pictures.mT
        rows, columns = model.temperature(to_texts), model.temperature(to_pictures)
        contrastive = contrastive_loss(rows, columns, same)
    text_of, picture_of = (_wrong(part, same, u) for part, u in zip((rows, columns), drawn, strict=True))
    own = torch.arange(B, device=same.device)
    chosen = torch.cat([first + own, first + own, picture_of]), torch.cat([first + own, text_of, first + own])
    cosines = torch.cat([to_texts[own, first + own], to_texts[own, text_of], to_pictures[own, picture_of]])
    lengths = instruction.lengths
    told = Instruction(
        instruction.tokens[chosen[1]], None if lengths is None else lengths[chosen[1]], instruction.cls[chosen[1]]
    )
    logits = _wide(model.match_scores(picture_tokens[chosen[0]], told, stream, cosines))
    truth = (labels[chosen[0]] == labels[chosen[1]]).long()
    return {"contrastive": contrastive, "match": F.cross_entropy(logits, truth)}


def _wrong(logits: Tensor, same: Tensor, drawn: Tensor) -> Tensor:
    """For each row of logits [B, N] a column that is not the same, by softmax and a number in [0, 1) for each row; any
    column where all are the same."""
    cumulated = logits.detach().masked_fill(same, -1e9).double().softmax(1).cumsum(1)  # finite: a single identity
    at = drawn.to(cumulated)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, at, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def contrastive_loss(rows: Tensor, columns: Tensor, same: Tensor) -> Tensor:
    """Symmetric image-text cross entropy (L_cl of Eq. 8). rows, columns [B, N]: logits of own pictures with all texts
    and of own texts with all pictures; same [B, N] bool: every pair of one identity is a positive."""
    target = same.to(rows.dtype)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2
