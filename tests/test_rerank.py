"""engine.rerank against the paper's sets and sums in loops over dense matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.rerank import rerank


def dense(queries, gallery, k1, k2, weight):
    """[Q, G] re-ranked distances, set by set."""
    x = F.normalize(torch.cat([queries, gallery]).double(), dim=1)
    cosine = (x @ x.T).float().double().numpy()
    d = 2 - 2 * cosine
    d /= d.max(1, keepdims=True)
    n, order = len(x), np.argsort(-cosine, axis=1, kind="stable")
    near = lambda i, k: order[i, : k + 1].tolist()  # noqa: E731
    mutual = lambda i, k: {j for j in near(i, k) if i in near(j, k)}  # noqa: E731
    V = np.zeros((n, n))
    for i in range(n):
        own = mutual(i, k1)
        wanted = set(own)
        for c in own:
            half = mutual(c, round(k1 / 2))
            if len(half & own) > 2 / 3 * len(half):
                wanted |= half
        wanted = sorted(wanted)
        V[i, wanted] = np.exp(-d[i, wanted])
        V[i] /= V[i].sum()
    V = np.stack([V[order[i, :k2]].mean(0) for i in range(n)])
    Q = len(queries)
    smaller = np.minimum(V[:Q, None], V[None, Q:]).sum(2)
    return (1 - weight) * (1 - smaller / (2 - smaller)) + weight * d[:Q, Q:]


def clustered(Q, G, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 16, generator=generator)
    return [
        centres[torch.randint(0, 12, (n,), generator=generator)] + 0.8 * torch.randn(n, 16, generator=generator)
        for n in (Q, G)
    ]


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 1.0), (90, 4, 0.5)])
def test_equals_sets_in_loops(k1, k2, weight):
    queries, gallery = clustered(9, 70)
    expected = dense(queries, gallery, k1, k2, weight)
    for k in (1, 10, 70):
        distances, rows = rerank(queries, gallery, k, k1=k1, k2=k2, weight=weight)
        order = np.argsort(expected, axis=1, kind="stable")[:, :k]
        np.testing.assert_allclose(distances.numpy(), np.take_along_axis(expected, order, 1), atol=2e-6)
        found = np.take_along_axis(expected, rows.numpy(), 1)
        np.testing.assert_allclose(found, np.take_along_axis(expected, order, 1), atol=2e-6)
        assert all(len(set(row)) == k for row in rows.tolist())


def test_helps_where_people_form_clusters():
    queries, gallery = clustered(40, 400, seed=3)
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(12, 16, generator=generator)
    own = [torch.cdist(part, centres).argmin(1) for part in (queries, gallery)]
    plain = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).topk(30).indices
    again = rerank(queries, gallery, 30)[1]
    hits = [(own[1][rows] == own[0][:, None]).float().mean() for rows in (plain, again)]
    assert hits[1] > hits[0] + 0.01


def test_large_enough_to_need_sparsity():
    queries, gallery = clustered(200, 20_000)
    distances, rows = rerank(queries, gallery, 10)
    assert rows.shape == (200, 10)
    assert (distances.diff(dim=1) >= 0).all()


def test_errors_and_nothing():
    queries, gallery = clustered(3, 5)
    assert rerank(queries[:0], gallery, 2)[1].shape == (0, 2)
    with pytest.raises(ValueError, match=r"k: expected 0\.\.5"):
        rerank(queries, gallery, 6)
    with pytest.raises(ValueError, match="k1, k2, weight"):
        rerank(queries, gallery, 2, k1=3, k2=4)
