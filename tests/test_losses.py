"""Eq. 7 and 8 by their terms."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from engine.config import MODELS, TrainConfig
from engine.data.record import Batch
from engine.losses import TrainingModel, centred, contrastive_loss, matching_losses
from engine.model.instruction import Instruction
from engine.model.irm import IRM, Features

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


def test_identity_losses_follow_the_configuration():
    """By hand: BNNeck of the batch, linear classifier, cross entropy; weight and margin of the triplet."""
    torch.manual_seed(0)
    config = TrainConfig(triplet_weight=0.5, margin=0.7)
    training = TrainingModel(IRM(TINY, 50, {"li/a": 3}), config, ["li/a"], [False])
    loss, terms = training(batch(0))
    torch.testing.assert_close(loss, sum(terms.values()))
    features, head = training.model(batch(0)), training.model.head("li/a")
    for name, value in (("cls", features.cls), ("fout", features.fout)):
        triplet = kernels.adaptive_triplet_reference(
            F.normalize(value, dim=-1), LABELS, features.instruction.cls, margin=0.7
        )
        torch.testing.assert_close(terms[f"triplet_{name}"], 0.5 * triplet, rtol=1e-4, atol=1e-6)
        normal = (value - value.mean(0)) / (value.var(0, unbiased=False) + 1e-5).sqrt()
        logits = normal @ head.classify[name].weight.T
        torch.testing.assert_close(terms[f"id_{name}"], F.cross_entropy(logits, LABELS), rtol=1e-3, atol=1e-4)


def test_a_stream_has_its_weight_or_that_of_its_task(training):
    plain = [training(batch(stream)) for stream in (0, 1)]
    for weights, factors in (({"li": 0.25}, (0.25, 1)), ({"li/a": 3.0, "li": 0.5, "t2i": 0.0}, (3, 0))):
        training.config = TrainConfig(loss_weights=weights)
        training.chance.manual_seed(training.chance.initial_seed())
        weighted = [training(batch(stream)) for stream in (0, 1)]
        torch.testing.assert_close(weighted[0][0], factors[0] * plain[0][0])
        assert weighted[0][1] == plain[0][1]  # the terms are logged as they are
        torch.testing.assert_close(weighted[1][0], factors[1] * torch.stack(list(weighted[1][1].values())).sum())


def test_centred_instructions_are_compared_about_their_mean():
    torch.manual_seed(0)
    instructions = 20 + torch.randn(6, 8, dtype=torch.float64)
    assert F.cosine_similarity(instructions[:1], instructions[1:]).min() > 0.99
    about = instructions - instructions.mean(0)
    for i in range(6):
        got = F.cosine_similarity(centred(instructions)[i], centred(instructions), dim=-1)
        torch.testing.assert_close(got, (1 + F.cosine_similarity(about[i], about, dim=-1)) / 2)


def test_instructions_are_centred_where_a_run_asks_and_they_differ():
    torch.manual_seed(0)
    training = TrainingModel(IRM(TINY, 50, {"li/a": 3}), TrainConfig(centre=True), ["li/a"], [False])
    own = batch(0)
    features = training.model(own)
    unit = F.normalize(features.cls, dim=-1)
    want = kernels.adaptive_triplet_reference(unit, LABELS, centred(features.instruction.cls))
    assert (want - kernels.adaptive_triplet_reference(unit, LABELS, features.instruction.cls)).abs() > 0.01
    torch.testing.assert_close(training(own)[1]["triplet_cls"], want, rtol=1e-4, atol=1e-6)
    one = own._replace(text=own.text[:1], text_lengths=own.text_lengths[:1])  # a sentence for the whole batch
    unit = F.normalize(training.model(one).cls, dim=-1)
    want = kernels.adaptive_triplet_reference(unit, LABELS, torch.ones(6, 1))
    torch.testing.assert_close(training(one)[1]["triplet_cls"], want, rtol=1e-4, atol=1e-6)


def test_plain_triplet_has_one_margin():
    torch.manual_seed(0)
    training = TrainingModel(IRM(TINY, 50, {"li/a": 3}), TrainConfig(plain_triplet=True), ["li/a"], [False])
    unit = F.normalize(training.model(batch(0)).fout, dim=-1)
    d = (unit[:, None] - unit).square().sum(2)
    terms = [
        F.relu(d[a, i] - d[a, j] + 0.3)
        for a in range(6)
        for i in range(6)
        for j in range(6)
        if a != i and LABELS[a] == LABELS[i] and LABELS[a] != LABELS[j]
    ]
    torch.testing.assert_close(training(batch(0))[1]["triplet_fout"], torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)


def test_identity_losses_reach_every_part(training):
    torch.nn.init.normal_(training.model.edit.gates)  # a closed gate keeps gradients from the instruction encoder
    training(batch(0))[0].backward()
    matrices = [(name, matrix.grad) for name, matrix in training.model.named_parameters() if matrix.ndim > 1]
    idle = {name for name, grad in matrices if grad is None or not grad.any()}
    unused = ("project_image.", "project_text.", "match.", "instruct.picture.")  # text search; clothes pictures
    assert idle == {name for name, _ in matrices if name.startswith(unused)}


def test_matching_losses_are_the_two_terms_of_eq_8(training):
    loss, terms = training(batch(1))
    assert set(terms) == {"contrastive", "match"}
    torch.testing.assert_close(loss, sum(terms.values()))
    loss.backward()
    for part in ("project_image", "project_text", "match", "temperature", "fuse"):
        assert all(
            p.grad is not None and p.grad.any() for p in getattr(training.model, part).parameters() if p.ndim < 3
        )


class Pairs:
    """Stands in for IRM: pictures and texts are their numbers, all similarities and matching logits are given."""

    def __init__(self, pictures: torch.Tensor, texts: torch.Tensor, logits: torch.Tensor, divisor: float):
        self.pictures, self.texts, self.logits, self.divisor, self.instruct = pictures, texts, logits, divisor, self

    def of_text(self, text, lengths):
        number = torch.arange(len(text))
        return Instruction(number[:, None, None], lengths, number[:, None])

    def features(self, images, instruction):
        assert instruction is None  # text-to-image pictures carry nothing
        number = torch.arange(len(images))
        return Features(number[:, None], None, None, number[:, None, None])

    def image_embedding(self, features, stream):
        assert stream == "t2i/b"
        return self.pictures[features.cls[:, 0]]

    def text_embedding(self, instruction, stream):
        assert stream == "t2i/b"
        return self.texts[instruction.cls[:, 0]]

    def temperature(self, similarity):
        return similarity / self.divisor

    def match_scores(self, tokens, instruction, stream, cosine):
        assert stream == "t2i/b"
        assert torch.equal(cosine, (self.pictures @ self.texts.T)[tokens[:, 0, 0], instruction.cls[:, 0]])
        assert torch.equal(instruction.tokens[:, 0, 0], instruction.cls[:, 0])
        assert torch.equal(instruction.lengths, 3 + instruction.cls[:, 0])
        return self.logits[tokens[:, 0, 0], instruction.cls[:, 0]]


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_matching_losses_by_hand(apart):
    """The true pairs, then a wrong one of each picture and text (so cold: always the most similar); label 1 = match.
    apart: how far pictures and texts point away from each other; then even the likest have a negative cosine."""
    torch.manual_seed(3)
    pictures, texts = (F.normalize(torch.randn(6, 8) + way, dim=-1) for way in (apart, -apart))
    assert bool((pictures @ texts.T < 0).all()) == (apart > 0)
    logits = torch.randn(6, 6, 2)
    given = Batch(1, torch.zeros(6, 3, 4, 4), LABELS, torch.zeros(6, 9), 3 + torch.arange(6), None)
    terms = matching_losses(Pairs(pictures, texts, logits, 1e-5), given, "t2i/b", TrainConfig(), torch.Generator())
    similarity = pictures @ texts.T
    others = [[j for j in range(6) if LABELS[j] != LABELS[i]] for i in range(6)]
    chosen = [(i, i, 1) for i in range(6)]
    chosen += [(i, max(others[i], key=lambda j: similarity[i, j]), 0) for i in range(6)]
    chosen += [(max(others[j], key=lambda i: similarity[i, j]), j, 0) for j in range(6)]
    wrong = [-F.log_softmax(logits[i, j], -1)[label] for i, j, label in chosen]
    torch.testing.assert_close(terms["match"], torch.stack(wrong).mean())
    torch.testing.assert_close(
        terms["contrastive"], contrastive_loss(similarity / 1e-5, similarity.T / 1e-5, LABELS[:, None] == LABELS)
    )


def test_wrong_pairs_are_drawn_by_similarity_and_never_of_the_same_identity():
    torch.manual_seed(5)
    pictures, texts = torch.eye(6), torch.eye(6).roll(2, 0) * 0.5 + 0.1  # picture i is most like text i + 2, of another
    logits = torch.arange(36.0).reshape(6, 6, 1) * torch.tensor([0.0, 1e-3])
    given = Batch(1, torch.zeros(6, 3, 4, 4), LABELS, torch.zeros(6, 9), 3 + torch.arange(6), None)
    chance = torch.Generator()
    seen = {
        round(
            matching_losses(Pairs(pictures, texts, logits, 1.0), given, "t2i/b", TrainConfig(), chance)["match"].item(),
            7,
        )
        for _ in range(20)
    }
    assert len(seen) > 5  # other pairs each time
    alone = given._replace(labels=torch.zeros(6, dtype=torch.int64))
    assert torch.isfinite(
        matching_losses(Pairs(pictures, texts, logits, 1.0), alone, "t2i/b", TrainConfig(), torch.Generator())["match"]
    )


def test_contrastive_loss_is_the_mean_cross_entropy_with_equal_positives():
    torch.manual_seed(4)
    logits, labels = torch.randn(5, 5), [0, 0, 0, 1, 2]
    rows, columns = [], []
    for i in range(5):
        positives = [j for j in range(5) if labels[j] == labels[i]]
        rows.append(-torch.stack([F.log_softmax(logits[i], 0)[j] for j in positives]).mean())
        columns.append(-torch.stack([F.log_softmax(logits[:, i], 0)[j] for j in positives]).mean())
    want = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    same = torch.tensor(labels)[:, None] == torch.tensor(labels)
    torch.testing.assert_close(contrastive_loss(logits, logits.T, same), want)


def test_contrastive_loss_treats_one_identity_as_positive():
    same = LABELS[:, None] == LABELS
    assert contrastive_loss(torch.where(same, 50.0, 0.0), torch.where(same, 50.0, 0.0), same).item() == pytest.approx(
        torch.tensor(2.0).log().item()
    )
    one = torch.eye(6, dtype=torch.bool)
    logits = torch.randn(6, 6)
    want = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(contrastive_loss(logits, logits.T, one), want)


@pytest.mark.parametrize("function", [kernels.adaptive_triplet, kernels.adaptive_triplet_reference])
def test_no_gradient_flows_to_the_instructions_through_the_margin(function):
    x, t = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    function(x, LABELS, t).backward()
    assert not function(x.detach(), LABELS, t).requires_grad
    assert x.grad is not None
    assert t.grad is None
