"""Eq. 7 and 8 by their terms."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from engine.config import MODELS, TrainConfig
from engine.data.record import Batch
from engine.losses import TrainingModel, contrastive_loss
from engine.model.irm import IRM

TINY = MODELS["irm_tiny"]
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture
def training() -> TrainingModel:
    torch.manual_seed(0)
    return TrainingModel(IRM(TINY, 50, {"li/a": 3}), TrainConfig(), ["li/a", "t2i/b"], [False, True])


def batch(stream: int) -> Batch:
    torch.manual_seed(1)
    return Batch(
        stream, torch.randn(6, 3, *TINY.image_size), LABELS, torch.randint(4, 50, (6, 9)), torch.full((6,), 9), None
    )


def test_identity_losses_are_the_four_terms_of_eq_7(training):
    loss, terms = training(batch(0))
    assert set(terms) == {"triplet_cls", "id_cls", "triplet_fout", "id_fout"}
    torch.testing.assert_close(loss, sum(terms.values()))
    features = training.model(batch(0))
    want = kernels.adaptive_triplet_reference(F.normalize(features.cls, dim=-1), LABELS, features.instruction.cls)
    torch.testing.assert_close(terms["triplet_cls"], want, rtol=1e-4, atol=1e-6)
    assert abs(terms["id_cls"].item() - torch.tensor(3.0).log().item()) < 0.3  # an untrained classifier knows little


def test_identity_losses_reach_every_part(training):
    torch.nn.init.normal_(training.model.edit.gates)
    training(batch(0))[0].backward()
    without = [n for n, p in training.named_parameters() if p.grad is None or not p.grad.any()]
    parts = ("model.project_", "model.temperature", "model.match", "model.instruct.picture")
    expected = ("attention.self.key.bias", "position_embeddings", "token_type_embeddings")
    unexpected = [n for n in without if not n.startswith(parts) and not n.endswith((*expected, "in_proj_bias"))]
    assert [n for n in unexpected if "embeddings" not in n] == []


def test_matching_losses_are_the_two_terms_of_eq_8(training):
    loss, terms = training(batch(1))
    assert set(terms) == {"contrastive", "match"}
    torch.testing.assert_close(loss, sum(terms.values()))
    loss.backward()
    for part in ("project_image", "project_text", "match", "temperature", "fuse"):
        assert all(
            p.grad is not None and p.grad.any() for p in getattr(training.model, part).parameters() if p.ndim < 3
        )


def test_contrastive_loss_treats_one_identity_as_positive():
    same = LABELS[:, None] == LABELS
    assert contrastive_loss(torch.where(same, 50.0, 0.0), same).item() == pytest.approx(torch.tensor(2.0).log().item())
    one = torch.eye(6, dtype=torch.bool)
    logits = torch.randn(6, 6)
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(contrastive_loss(logits, one), want)


def test_no_gradient_flows_to_the_instructions_through_the_margin():
    x, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    kernels.adaptive_triplet(x, LABELS, t).backward()
    assert x.grad is not None
    assert t.grad is None
