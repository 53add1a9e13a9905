"""Eq. 7 for the five image tasks and Eq. 8 for text-to-image search.

The identity loss is that of the global batch. Terms over pairs (triplet, contrastive, matching) use the pairs of each
rank's own share, so they depend on the number of ranks.
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


class TrainingModel(nn.Module):
    """The model and its losses in one forward, as DeepSpeed wants it: batch -> (loss, terms).

    streams: names in the order of Batch.stream; matching: whether each uses Eq. 8 (else Eq. 7).
    """

    def __init__(self, model: IRM, config: TrainConfig, streams: list[str], matching: list[bool]):
        super().__init__()
        self.model, self.config, self.streams, self.matching = model, config, streams, matching

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.matching[batch.stream]:
            terms = matching_losses(self.model, batch, self.streams[batch.stream])
        else:
            terms = identity_losses(self.model, batch, self.streams[batch.stream], self.config)
        return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}


def identity_losses(model: IRM, batch: Batch, stream: str, config: TrainConfig) -> dict[str, Tensor]:
    """Eq. 7: adaptive triplet and identity loss on F and on F_out. The triplet sees unit vectors: on features of length
    sqrt(width) its first gradients are a hundred times the identity loss's and pull all features together."""
    features: Features = model(batch)
    head = model.head(stream)
    assert features.instruction is not None
    assert features.fout is not None
    assert head is not None
    instructions = features.instruction.cls.float()
    if config.centre and len(instructions) > 1:  # one for the whole batch is like itself
        instructions = centred(instructions)
    instructions = instructions.expand(len(batch.images), -1)
    terms = {}
    with torch.autocast(batch.images.device.type, enabled=False):  # losses in float32
        for name, value in (("cls", features.cls.float()), ("fout", features.fout.float())):
            unit = F.normalize(value, dim=-1)
            triplet = kernels.adaptive_triplet(
                unit, batch.labels, instructions, margin=config.margin, mining=config.mining
            )
            assert isinstance(triplet, Tensor)
            terms[f"triplet_{name}"] = config.triplet_weight * triplet
            logits = head.classify[name](head.neck[name](value))
            terms[f"id_{name}"] = F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)
    return terms


def centred(instructions: Tensor) -> Tensor:
    """[N, E] -> [N, E + 1] vectors whose cosine is (1 + c) / 2, c that of the instructions about their mean. From
    nothing all instructions are nearly parallel (cosine 0.95 and more), and so Eq. 6 would tell none from another."""
    unit = F.normalize(instructions - instructions.mean(0), dim=-1)
    return torch.cat([unit, torch.ones_like(unit[:, :1])], 1)


def matching_losses(model: IRM, batch: Batch, stream: str) -> dict[str, Tensor]:
    """Eq. 8: contrastive loss on the projections, and matching loss on F_out of true pairs and of wrong ones: one for
    each picture and each text, the likelier the more similar (ALBEF). The most similar ones alone teach nothing: they
    are people who look the same."""
    assert batch.text is not None
    assert batch.text_lengths is not None
    instruction = model.instruct.of_text(batch.text, batch.text_lengths)
    seen = model.features(batch.images, None)
    same = batch.labels[:, None] == batch.labels
    pictures_BE = model.image_embedding(seen, stream).float()
    texts_BE = model.text_embedding(instruction, stream).float()
    with torch.autocast(batch.images.device.type, enabled=False):
        similarity = pictures_BE @ texts_BE.mT
        logits = model.temperature(similarity)
        contrastive = contrastive_loss(logits, same)
    wrong = logits.detach().masked_fill(same, -1e9)  # finite: a rank may hold a single identity
    sentence_of = torch.multinomial(wrong.softmax(1), 1)[:, 0]
    picture_of = torch.multinomial(wrong.mT.softmax(1), 1)[:, 0]
    pairs = torch.arange(len(same), device=same.device)
    pictures = torch.cat([pairs, pairs, picture_of])
    texts = torch.cat([pairs, sentence_of, pairs])
    lengths = instruction.lengths
    chosen = Instruction(instruction.tokens[texts], None if lengths is None else lengths[texts], instruction.cls[texts])
    logits = model.match_scores(seen.tokens[pictures], chosen, stream, similarity[pictures, texts]).float()
    truth = (batch.labels[pictures] == batch.labels[texts]).long()
    return {"contrastive": contrastive, "match": F.cross_entropy(logits, truth)}


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric image-text cross entropy; logits [B, B], same [B, B] bool: every pair of one identity is a positive."""
    target = same.to(logits.dtype)
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.mT, (target / target.sum(0, keepdim=True)).mT)
    return (rows + columns) / 2
