"""Protocols and metrics against the field's own evaluators (tests/data), loops over a full sort, and by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_hot, score_similarities
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import TrainConfig
from engine.data.datasets import DATASETS
from engine.data.datasets._base import DataSet
from engine.data.index import Index, find_indexes, make_table
from engine.data.record import MODALITIES, SPLITS
from engine.errors import InputError
from engine.evaluation import evaluate_model
from engine.instructions import SENTENCES
from engine.model.instruction import build_tokenizer
from engine.model.irm import IRM
from engine.protocols import (
    INSTRUCT,
    PROTOCOLS,
    Metrics,
    as_distributed,
    by_identity,
    expected_random,
    group_members,
    mean_metrics,
    metrics_from_counts,
    metrics_from_ranking,
    score_rescored,
    score_trial,
)
from engine.runtime import Runtime
from engine.tasks import TASKS

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "metrics.json").read_text())
RELEASED = {"released_ap_topk_None": None, "released_ap_topk_500": INSTRUCT}
ORACLES = {
    "market": "market1501",
    "ltcc_general": "ltcc:general",
    "ltcc_cc": "ltcc:cc",
    "ltcc_sc": "ltcc:sc",
    "llcm_query_1_on": "llcm:vis2ir",
    "t2i_query_1_on": "cuhk_pedes",
    **dict.fromkeys(RELEASED, "market1501"),
}


def make_index(pid, camera, split, clothes=None, modality=None, path=None, captions=None) -> Index:
    rows = len(pid)
    columns = {
        "path": [f"{row:05d}.jpg" for row in range(rows)] if path is None else path,
        "pid": pid,
        "camera": camera,
        "split": [SPLITS.index(name) for name in split],
        "clothes": [-1] * rows if clothes is None else clothes,
        "modality": [0] * rows if modality is None else [MODALITIES.index(name) for name in modality],
        "captions": [[]] * rows if captions is None else captions,
    }
    dataset = DataSet("hand", "hand", (), (), parse=lambda root: iter(()), trains=(), protocols={}, images={})
    return Index(dataset, Path("hand"), make_table(columns))


def query_gallery(query, gallery) -> Index:
    """Index of [(pid, camera, clothes), ..] queries and gallery images."""
    pid, camera, clothes = zip(*query, *gallery, strict=True)
    return make_index(pid, camera, ["query"] * len(query) + ["gallery"] * len(gallery), clothes)


# The field's own evaluators.


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("case", EXPECTED)
def test_agrees_with_public_evaluator(case, oracle):
    arrays = np.load(DATA / "metrics.npz")
    column = {
        name: np.concatenate([arrays[f"{case}_query_{name}"], arrays[f"{case}_gallery_{name}"]])
        for name in ("id", "camera", "clothes")
    }
    query, gallery = (torch.from_numpy(arrays[f"{case}_{role}"]) for role in ("query", "gallery"))
    index = make_index(
        column["id"], column["camera"], ["query"] * len(query) + ["gallery"] * len(gallery), column["clothes"]
    )
    trial, protocol = as_distributed(index), PROTOCOLS[ORACLES[oracle]]
    if oracle.endswith("query_1_on"):
        trial = trial._replace(query=trial.query[1:], group_query=trial.group_query[1:])
        query = query[1:]
    result = score_trial(trial, index, protocol, query, gallery, metric="l2", truncate=RELEASED.get(oracle))
    expected = EXPECTED[case][oracle]
    assert result.mAP == pytest.approx(expected["mAP"], abs=1e-7 if "t2i" in oracle else 1e-12, rel=0)
    np.testing.assert_allclose(result.cmc[: len(expected["cmc"])], expected["cmc"], atol=1e-7, rtol=0)
    if "mINP" in expected:
        assert result.mINP == pytest.approx(expected["mINP"], abs=1e-7, rel=0)


# By hand.


def test_ties_go_to_the_lower_gallery_position():
    index = query_gallery([(1, 1, 0)], [(2, 2, 0), (1, 2, 0), (3, 2, 0), (1, 3, 0), (2, 4, 0), (1, 2, 0)])
    row = np.array([[0.5, 0.5, 0.7, 0.5, 0.5, 0.1]], np.float32)  # order 2, 0, [1], [3], 4, [5]
    result = score_similarities(as_distributed(index), index, PROTOCOLS["market1501"], row)
    assert result.mAP == pytest.approx((1 / 3 + 2 / 4 + 3 / 6) / 3, abs=1e-15)
    assert result.mINP == 3 / 6
    assert result.cmc.tolist() == [0, 0] + [1] * 48
    assert (result.queries, result.gallery, result.identities) == (1, 6, 1)


def test_junk_is_neither_hit_nor_miss():
    gallery = [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 5), (1, 2, 5), (3, 2, 0)]
    index = query_gallery([(1, 1, 0), (9, 1, 0)], gallery)  # nobody is the second query
    scores = -np.tile(np.arange(6.0), (2, 1))
    results = {
        name: score_similarities(as_distributed(index), index, PROTOCOLS[name], scores)
        for name in ("market1501", "ltcc:cc", "ltcc:sc", "real2", "real2:pid_clothes", "llcm:vis2ir")
    }
    assert results["market1501"].mAP == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert results["llcm:vis2ir"].mAP == results["market1501"].mAP
    assert results["ltcc:cc"].mAP == results["ltcc:sc"].mAP == 1 / 2  # after the one miss, at 2
    assert results["real2"].mAP == pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 5) / 4)
    assert all(result.queries == 1 for result in results.values())
    trial = PROTOCOLS["real2:pid_clothes"].trial(index, 0)  # here the same person in outfit 5 is a negative
    assert score_similarities(trial, index, PROTOCOLS["real2:pid_clothes"], scores).mAP == 1 / 2
    scores[:, 3] = 1.0
    assert score_similarities(trial, index, PROTOCOLS["real2:pid_clothes"], scores).mAP == 1 / 3


def test_llcm_curve_counts_identities():
    index = query_gallery([(1, 1, 0)], [(2, 2, 0), (2, 3, 0), (3, 2, 0), (2, 4, 0), (1, 2, 0), (1, 1, 0)])
    scores = -np.arange(6.0)[None]
    result = score_similarities(as_distributed(index), index, PROTOCOLS["llcm:vis2ir"], scores)
    assert result.cmc[:5].tolist() == [0, 0, 1, 1, 1]
    assert (result.mAP, result.mINP) == (1 / 5, 1 / 5)
    assert score_similarities(as_distributed(index), index, PROTOCOLS["market1501"], scores).cmc[:5].tolist() == [
        0,
        0,
        0,
        0,
        1,
    ]


def test_released_evaluator_cuts_before_removing_junk():
    gallery = [(2, 1, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0), (3, 2, 0), (1, 4, 0)]
    index = query_gallery([(1, 1, 0), (3, 3, 0)], gallery)
    trial, protocol = as_distributed(index), PROTOCOLS["market1501"]
    scores = np.tile(-np.arange(6.0), (2, 1))
    result = score_similarities(
        trial, index, protocol, scores, truncate=3
    )  # the junk at 2 takes one of the three places
    assert result.mAP == pytest.approx(((1 / 2) / 1 + 0) / 2)
    assert result.queries == 2
    assert result.cmc[:3].tolist() == [0, 0.5, 0.5]
    assert result.cmc[-1] == 0.5


def test_errors_say_what_is_wrong():
    index = query_gallery([(1, 1, 0)], [(1, 2, 0), (2, 2, 0)])
    trial, protocol = as_distributed(index), PROTOCOLS["market1501"]
    features = [torch.zeros(1, 3), torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"queries: expected shape \[Q, D\] = \(any, 3\), got \(1, 4\)"):
        score_trial(trial, index, protocol, torch.zeros(1, 4), features[1])
    with pytest.raises(ValueError, match=r"queries: expected .*float64"):
        score_trial(trial, index, protocol, features[0].double(), features[1])
    with pytest.raises(ValueError, match=r"gallery: .*in 1 rows: 1$"):
        score_trial(trial, index, protocol, features[0], torch.tensor([[0, 0, 0], [0, 0, np.nan]]))
    with pytest.raises(InputError, match="no query image in hand"):
        PROTOCOLS["llcm:vis2ir"].trials(index)
    alone = query_gallery([(1, 1, 0)], [(1, 1, 0), (2, 2, 0)])
    with pytest.raises(InputError, match="no query has a positive"):
        score_similarities(as_distributed(alone), alone, protocol, np.zeros((1, 2)))
    with pytest.raises(InputError, match="no query has a positive"):
        expected_random(as_distributed(alone), alone, protocol)


def test_mean_over_trials():
    trials = [Metrics(value, value / 2, np.full(50, value), 10, 4, 3) for value in (0.2, 0.6)]
    assert mean_metrics(trials) == pytest.approx(
        {"mAP": 0.4, "mINP": 0.2, "rank1": 0.4, "rank5": 0.4, "rank10": 0.4, "mAP_std": 0.2}
        | {"queries": 10, "gallery": 4, "identities": 3}
    )
    assert mean_metrics(trials[:1])["mAP_std"] == 0


# Loops over a full sort, every rule spelled out.


def verdict(name: str, q: dict, g: dict) -> str:
    """hit, miss or junk, from what the data set's authors say."""
    person, camera, clothes = (q[key] == g[key] for key in ("pid", "camera", "clothes"))
    if name == "real2:pid_clothes":
        return "miss" if not (person and clothes) else "junk" if camera else "hit"
    if not person:
        return "miss"
    if name.startswith(("prcc", "cuhk_pedes")) or name == "real2":
        return "hit"
    if name == "ltcc:cc":
        return "junk" if camera or clothes else "hit"
    if name == "ltcc:sc":
        return "junk" if camera or not clothes else "hit"
    return "junk" if camera else "hit"


def in_order(scores) -> list[int]:
    """Positions by descending score, equal ones as they stand."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def brute_force(name, queries, gallery, rankings, truncate=None):
    """mAP, mINP, CMC of rankings (gallery positions, best first); None where no query has a positive."""
    precisions, penalties, firsts = [], [], []
    for q, ranking in zip(queries, rankings, strict=True):
        verdicts = [(verdict(name, q, gallery[i]), gallery[i]["pid"]) for i in ranking]
        kept = [pair for pair in verdicts if pair[0] != "junk"]
        if not any(kind == "hit" for kind, _ in kept):
            continue
        ranks = [rank for rank, (kind, _) in enumerate(kept, 1) if kind == "hit"]
        penalties.append(len(ranks) / ranks[-1])
        if truncate is not None:
            kept = [pair for pair in verdicts[:truncate] if pair[0] != "junk"]
            ranks = [rank for rank, (kind, _) in enumerate(kept, 1) if kind == "hit"]
        precisions.append(math.fsum(hits / rank for hits, rank in enumerate(ranks, 1)) / max(1, len(ranks)))
        first = ranks[0] if ranks else 10**9
        if PROTOCOLS[name].deduplicate:
            people = list(dict.fromkeys(pid for _, pid in kept))
            first = people.index(q["pid"]) + 1
        firsts.append(first)
    if not firsts:
        return None
    cmc = [sum(first <= rank for first in firsts) / len(firsts) for rank in range(1, 51)]
    return math.fsum(precisions) / len(firsts), math.fsum(penalties) / len(firsts), cmc


@st.composite
def small_data(draw):
    seed, rows = draw(st.integers(0, 2**32 - 1)), draw(st.integers(8, 60))
    rng = np.random.default_rng(seed)
    index = make_index(
        rng.integers(0, draw(st.integers(1, 6)), rows),
        rng.integers(0, 5, rows),
        rng.choice(["query", "gallery", "test", "train"], rows),
        rng.integers(-1, 3, rows),
        rng.choice(MODALITIES, rows),
        [f"{name:03d}.jpg" for name in rng.permutation(rows)],
        [["a person"] * count for count in rng.integers(0, 3, rows)],
    )
    return index, rng, draw(st.sampled_from([2, 4, 1000])), draw(st.sampled_from([np.float32, np.float64]))


@pytest.mark.parametrize("name", PROTOCOLS)
@given(data=small_data())
@settings(max_examples=25, deadline=None)
def test_agrees_with_loops_over_a_full_sort(name, data):
    index, rng, levels, dtype = data
    protocol = PROTOCOLS[name]
    try:
        trial = protocol.trials(index, quick=True)[0]
    except InputError:
        return
    scores = (rng.integers(0, levels, (len(trial.query), len(trial.gallery))) / 7).astype(dtype)
    facts = [
        {"pid": index.pid[row], "camera": index.camera[row], "clothes": index.clothes[row]} for row in range(len(index))
    ]
    queries, gallery = ([facts[row] for row in rows] for rows in (trial.query, trial.gallery))

    members = group_members(trial, index, protocol)
    for query, q in enumerate(queries):  # the contract: junk and positives lie inside the group
        part = slice(*members.offsets[query : query + 2])
        judged = dict(zip(members.positions[part].tolist(), members.junk[part].tolist(), strict=True))
        for position, g in enumerate(gallery):
            kind = {None: "miss", True: "junk", False: "hit"}[judged.get(position)]
            assert kind == verdict(name, q, g)

    for truncate in (None, 5) if not protocol.deduplicate else (None,):
        expected = brute_force(name, queries, gallery, [in_order(row) for row in scores], truncate)
        if expected is None:
            with pytest.raises(InputError):
                score_similarities(trial, index, protocol, scores)
            return
        result = score_similarities(trial, index, protocol, scores, truncate=truncate)
        assert result.mAP == pytest.approx(expected[0], abs=1e-13)
        assert result.mINP == pytest.approx(expected[1], abs=1e-13)
        np.testing.assert_allclose(result.cmc, expected[2], atol=1e-13)
    result = score_similarities(trial, index, protocol, scores)

    # The same from counts and from a given ranking.
    offsets, positions = members.positives()
    ahead = [
        sum(
            verdict(name, q, g) == "miss" and (scores[query, i], -i) > (scores[query, at], -at)
            for i, g in enumerate(gallery)
        )
        for query, q in enumerate(queries)
        for at in positions[offsets[query] : offsets[query + 1]]
    ]
    counted = metrics_from_counts(offsets, np.array(ahead))
    order = np.argsort(-scores, axis=1, kind="stable")
    kinds = np.array([[verdict(name, q, g) for g in gallery] for q in queries])
    given_order = metrics_from_ranking(order, kinds == "hit", kinds == "junk")
    for other in (counted, given_order):
        assert other[:2] == pytest.approx(result[:2], abs=1e-15)
        assert protocol.deduplicate or other.cmc.tolist() == result.cmc.tolist()
    for cut in (1, 3, 7):
        cut_here = score_similarities(trial, index, protocol, scores, truncate=cut)
        cut_list = metrics_from_ranking(order, kinds == "hit", kinds == "junk", truncate=cut)
        assert cut_list[:2] == pytest.approx(cut_here[:2], abs=1e-15)
        assert cut_list.cmc.tolist() == cut_here.cmc.tolist()


# The drawn data, divided by what its authors say of file names and lists: no parser, no index, no protocol.

ON_DISK = {  # data set: folder, what the path of a test image says
    "market1501": (
        "Market-1501-v15.09.15",
        r"(?P<split>query|bounding_box_test)/(?P<pid>\d{4})_c(?P<camera>\d)s\d_\d{6}_\d\d\.jpg",
    ),
    "msmt17": ("MSMT17_V1", r"test/(?P<pid>\d{4})/\d{4}_\d+_(?P<camera>\d\d)_.*\.jpg"),
    "cuhk03": ("cuhk03", r"images_detected/\d+_\d+_(?P<camera>\d)_\d+\.png"),
    "prcc": ("prcc", r"rgb/test/(?P<camera>[ABC])/(?P<pid>\d+)/.*\.jpg"),
    "vc_clothes": ("VC-Clothes", r"(?P<split>query|gallery)/(?P<pid>\d+)-(?P<camera>\d+)-(?P<clothes>\d+)-\d+\.jpg"),
    "ltcc": ("LTCC_ReID", r"(?P<split>query|test)/(?P<pid>\d+)_(?P<clothes>\d+)_c(?P<camera>\d+)_\d+\.png"),
    "llcm": ("LLCM", r"test_(?P<modality>vis|nir)/cam(?P<camera>\d)/(?P<pid>\d+)/.*\.jpg"),
    "cuhk_pedes": ("CUHK-PEDES", r"imgs/.*"),
    "cocas": ("COCAS+", r"real2/images/.*"),
}
LETTERS = {"prcc:single": "CA", "prcc:single:sc": "BA", "prcc:single_ac": "AC", "prcc:multi": "CA"}
CAMERAS = {"vc_clothes:sc": (2, 3), "vc_clothes:cc": (3, 4)}


def on_disk(mini: Path, dataset: str) -> list[dict]:
    """Facts of the images that a test may use: path, and as far as known split, pid, camera, clothes, captions."""
    folder, pattern = ON_DISK[dataset]
    paths = [path.relative_to(mini / folder).as_posix() for path in sorted((mini / folder).rglob("*.*"))]
    images = {
        path: {"path": path, "clothes": None, **hit.groupdict()}
        for path in paths
        if (hit := re.fullmatch(pattern, path))
    }

    def listed(path: str, **facts) -> None:
        images[path].update(facts)

    if dataset == "msmt17":
        for split in ("query", "gallery"):
            for line in (mini / folder / f"list_{split}.txt").read_text().splitlines():
                listed(f"test/{line.split()[0]}", split=split, pid=line.split()[1])
    if dataset == "cuhk03":
        (splits,) = json.loads((mini / folder / "splits_new_detected.json").read_text())
        for split in ("query", "gallery"):
            for path, pid, camera in splits[split]:
                assert int(images[path]["camera"]) == camera + 1
                listed(path, split=split, pid=pid)
    if dataset == "cuhk_pedes":
        for entry in json.loads((mini / folder / "reid_raw.json").read_text()):
            listed(
                f"imgs/{entry['file_path']}",
                split=entry["split"],
                pid=entry["id"],
                camera=0,
                captions=entry["captions"],
            )
    if dataset == "cocas":
        for split in ("query", "gallery"):
            for line in (mini / folder / f"real2/{split}.txt").read_text().splitlines():
                path, *_, pid, clothes, camera = line.split()
                listed(f"real2/{path}", split=split, pid=pid, clothes=clothes, camera=camera)
    images = [image for image in images.values() if "pid" in image]
    for image in images:
        image["pid"] = int(image["pid"])
        image["camera"] = image["camera"] if str(image["camera"]) in "ABC" else int(image["camera"])
    return images


def divided(name: str, images: list[dict], number: int) -> tuple[list[dict], list[dict]]:
    """Queries and gallery of one draw, the gallery in the order that breaks ties."""
    by_path = sorted(images, key=lambda image: image["path"])
    by_person = sorted(images, key=lambda image: (image["pid"], image["camera"], image["path"]))
    if name in LETTERS:
        query, gallery = ([image for image in by_person if image["camera"] == letter] for letter in LETTERS[name])
        if name != "prcc:multi":
            people = sorted({image["pid"] for image in gallery})
            words = np.random.Philox(key=number).random_raw(len(people)).tolist()
            each = [[image for image in gallery if image["pid"] == pid] for pid in people]
            gallery = [own[word * len(own) // 2**64] for own, word in zip(each, words, strict=True)]
        return query, gallery
    if name.startswith("llcm"):
        visible, infrared = ([image for image in by_person if image["modality"] == m] for m in ("vis", "nir"))
        random.seed(number)
        shots = defaultdict(list)
        for image in infrared if "vis2ir" in name else visible:
            shots[image["pid"], image["camera"]].append(image)
        drawn = [random.choice(own) for own in shots.values()]
        return {"llcm:vis2ir": (visible, drawn), "llcm:vis2ir:2023-06": (drawn, visible)}.get(name, (infrared, drawn))
    if name.startswith("cuhk_pedes"):
        gallery = [image for image in by_path if image["split"] == "test"]
        return [image for image in gallery for _ in image["captions"]], gallery
    query = [image for image in by_path if image["split"] == "query"]
    gallery = [image for image in by_path if image["split"] in ("gallery", "bounding_box_test", "test")]
    if name in CAMERAS:
        query, gallery = ([image for image in part if image["camera"] in CAMERAS[name]] for part in (query, gallery))
    return query, gallery


@pytest.fixture(scope="module")
def drawn(mini) -> dict[str, Index]:
    return {index.name: index for index in find_indexes(mini)}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_agrees_with_files_and_loops_on_the_drawn_data(name, mini, drawn):
    protocol = PROTOCOLS[name]
    index, images = drawn[protocol.dataset], on_disk(mini, protocol.dataset)
    trials = protocol.trials(index)
    assert len(trials) == (10 if name.startswith(("llcm", "prcc:single")) else 1)
    rng, measured, expected = np.random.default_rng(0), [], []
    for number, trial in enumerate(trials):
        queries, gallery = divided(name, images, number)
        paths = index.table["path"].to_pylist()
        assert sorted(paths[row] for row in trial.query) == sorted(image["path"] for image in queries)
        assert [paths[row] for row in trial.gallery] == [image["path"] for image in gallery]
        queries = [next(image for image in queries if image["path"] == paths[row]) for row in trial.query]
        features = [rng.integers(-1, 2, (len(part), 3)).astype(np.float64) for part in (queries, gallery)]
        scores = features[0] @ features[1].T  # whole numbers: exact, and many ties
        rankings = [in_order(row) for row in scores]
        if name == "cuhk_pedes":  # re-scored: more than there are, and the five best
            for best in (128, 5):
                matching = rng.integers(0, 4, scores.shape) / 3
                heads = [ranking[:best] for ranking in rankings]
                again = [
                    [head[i] for i in in_order([row[at] for at in head])] + ranking[len(head) :]
                    for head, ranking, row in zip(heads, rankings, matching, strict=True)
                ]
                matches = np.equal.outer(index.pid[trial.query], index.pid[trial.gallery])
                new = np.take_along_axis(matching, np.array(heads), 1)
                head = np.array(heads), new
                measured.append(score_rescored(trial, index, protocol, *one_hot(scores), *head, metric="ip"))
                measured.append(metrics_from_ranking(np.array(again), matches))
                expected += [brute_force(name, queries, gallery, again)] * 2
        measured.append(score_similarities(trial, index, protocol, scores))
        expected.append(brute_force(name, queries, gallery, rankings))
        assert (measured[-1].gallery, measured[-1].identities) == (len(gallery), len({q["pid"] for q in queries}))
    for ours, (mAP, mINP, cmc) in zip(measured, expected, strict=True):
        assert (ours.mAP, ours.mINP) == pytest.approx((mAP, mINP), abs=1e-12)
        np.testing.assert_allclose(ours.cmc, cmc, atol=1e-12)
    mean = mean_metrics(measured)
    every = [mAP for mAP, _, _ in expected]
    assert mean["mAP"] == pytest.approx(math.fsum(every) / len(every), abs=1e-12)
    spread = math.sqrt(math.fsum((mAP - mean["mAP"]) ** 2 for mAP in every) / len(every))
    assert mean["mAP_std"] == pytest.approx(spread, abs=1e-9)


def test_sentences_are_evaluated_one_by_one(drawn):
    """Mean and spread over the task's 20 sentences; query and gallery are told the same one."""
    config = TrainConfig(feature="cls", tasks=("trad",))
    tokenizer = build_tokenizer(SENTENCES["trad"])
    torch.manual_seed(0)
    model = IRM(config.model, tokenizer.get_vocab_size(), {})
    torch.nn.init.normal_(model.edit.gates, std=3.0)  # a closed gate would make the sentences equal
    index, stored = drawn["market1501"], {}
    metrics = evaluate_model(
        model, [index], tokenizer, config, untrained=None, runtime=Runtime(torch.device("cpu")), arrays=stored
    )
    row = metrics["tasks"]["trad"]["market1501"]
    facts = [
        dict(zip(("pid", "camera", "clothes"), fact, strict=True))
        for fact in zip(*(stored[f"trad/market1501/{name}"] for name in ("pid", "camera", "clothes")), strict=True)
    ]
    query, gallery = stored["trad/market1501/0/query"], stored["trad/market1501/0/gallery"]
    every = []
    for features in stored["trad/market1501/features"]:
        similarities = torch.from_numpy(features[query]) @ torch.from_numpy(features[gallery]).T  # an untrained model's
        rankings = [in_order(similarity) for similarity in similarities.numpy()]  # differ in the last bits alone
        every.append(brute_force("market1501", [facts[i] for i in query], [facts[i] for i in gallery], rankings)[0])
    assert len(every) == 20
    assert row["mAP"] == pytest.approx(np.mean(every), abs=1e-6)
    assert row["mAP_std"] == pytest.approx(np.std(every), abs=1e-6)
    assert row["mAP_std"] > 0


# Trials.

LLCM_DRAWN = {  # pid.camera.frame of the images that the authors' code draws from the tree below
    "vis 0": "7.1.1 7.2.3 7.3.0 7.4.1 7.5.4 7.6.0 7.7.1 7.8.2 7.9.0 12.1.1 12.2.1 12.4.0 12.5.2 12.7.0 12.8.0 "
    "345.1.4 345.2.0 345.3.2 345.4.4 345.5.0 345.6.1 345.7.0 345.8.0 345.9.2",
    "vis 9": "7.1.1 7.2.4 7.3.0 7.4.1 7.5.1 7.6.0 7.7.2 7.8.0 7.9.0 12.1.1 12.2.0 12.4.1 12.5.0 12.7.1 12.8.1 "
    "345.1.3 345.2.0 345.3.0 345.4.1 345.5.0 345.6.0 345.7.0 345.8.0 345.9.2",
    "nir 0": "7.2.1 7.5.1 7.6.0 7.8.1 7.9.3 12.1.3 12.2.0 12.4.3 12.5.0 12.6.2 12.7.1 12.8.0 12.9.1 "
    "345.1.0 345.2.0 345.4.1 345.5.1 345.7.1 345.8.0",
    "nir 9": "7.2.1 7.5.1 7.6.2 7.8.0 7.9.1 12.1.0 12.2.0 12.4.4 12.5.0 12.6.2 12.7.0 12.8.0 12.9.2 "
    "345.1.0 345.2.3 345.4.0 345.5.3 345.7.1 345.8.1",
}


def llcm_tree() -> tuple[Index, list[str]]:
    """Three identities in LLCM's layout, rows in no order; with them "pid.camera.frame" of each row."""
    rows = [
        (pid, camera, modality, frame)
        for modality in MODALITIES
        for camera in range(1, 10)
        for pid in (7, 12, 345)
        for frame in range((pid + 2 * camera + 3 * (modality == "nir")) % 6)
        if (modality, camera) != ("nir", 3)
    ]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    path = [f"test_{m}/cam{c}/{p:04d}/{p:04d}_c{c:02d}_s000001_f{f:06d}_{m}.jpg" for p, c, m, f in rows]
    pid, camera, modality, _ = zip(*rows, strict=True)
    return make_index(pid, camera, ["test"] * len(rows), None, modality, path), [f"{p}.{c}.{f}" for p, c, _, f in rows]


@pytest.mark.parametrize(
    ("name", "role", "drawn"),
    [
        ("llcm:vis2ir", "gallery", "nir"),
        ("llcm:ir2vis", "gallery", "vis"),
        ("llcm:vis2ir:2023-06", "query", "nir"),
        ("llcm:ir2vis:2023-06", "gallery", "vis"),
    ],
)
def test_llcm_draws_what_the_authors_code_draws(name, role, drawn):
    index, label = llcm_tree()
    trials = PROTOCOLS[name].trials(index)
    assert len(trials) == 10
    for number in (0, 9):
        assert " ".join(label[row] for row in getattr(trials[number], role)) == LLCM_DRAWN[f"{drawn} {number}"]
    other = {"vis": "nir", "nir": "vis"}[drawn]
    for trial in trials:
        everyone = trial.query if role == "gallery" else trial.gallery
        assert sorted(everyone) == index.select("test", modality=other).tolist()
    assert len(PROTOCOLS[name].trials(index, quick=True)) == 1


PRCC_DRAWN = {  # frames of identities 1, 3, 8, 21 in draws 0 .. 9
    "A": "0102 1510 2262 4023 0260 3412 3101 4222 4361 1524",
    "C": "0003 2300 3133 6015 0131 5203 4101 6112 6132 1315",
}


@pytest.mark.parametrize(
    ("name", "query", "gallery"),
    [("prcc:single", "C", "A"), ("prcc:single:sc", "B", "A"), ("prcc:single_ac", "A", "C")],
)
def test_prcc_draws_one_image_per_identity(name, query, gallery):
    rows = [(p, c, f) for c in range(3) for p in (3, 1, 8, 21) for f in range(4 + (p + c) % 5)]
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    path = [f"rgb/test/{'ABC'[c]}/{p:03d}/cropped_rgb{f:03d}.jpg" for p, c, f in rows]
    pid, camera, frame = zip(*rows, strict=True)
    index = make_index(pid, camera, ["test"] * len(rows), None, None, path)
    trials = PROTOCOLS[name].trials(index)
    assert len(trials) == 10
    for trial in trials:
        assert set(index.camera[trial.query]) == {"ABC".index(query)}
        assert len(trial.query) == sum("ABC"[c] == query for c in camera)
        assert index.pid[trial.gallery].tolist() == [1, 3, 8, 21]
        assert set(index.camera[trial.gallery]) == {"ABC".index(gallery)}
    assert " ".join("".join(str(frame[row]) for row in trial.gallery) for trial in trials) == PRCC_DRAWN[gallery]
    (multi,) = PROTOCOLS["prcc:multi"].trials(index)
    assert len(multi.query) == sum(c == 2 for c in camera)
    assert len(multi.gallery) == sum(c == 0 for c in camera)


def test_vc_clothes_cameras_and_captions():
    index = make_index(
        [1] * 8, [1, 2, 3, 4] * 2, ["query"] * 4 + ["gallery"] * 4, captions=[["a", "b"], [], ["c"], []] * 2
    )
    for name, cameras in (("general", [1, 2, 3, 4]), ("sc", [2, 3]), ("cc", [3, 4])):
        (trial,) = PROTOCOLS[f"vc_clothes:{name}"].trials(index)
        assert index.camera[trial.query].tolist() == index.camera[trial.gallery].tolist() == cameras
        assert trial.query_caption is None
    index = make_index([5, 6, 5], [0, 0, 0], ["test"] * 3, captions=[["a", "b"], [], ["c"]])
    (trial,) = PROTOCOLS["cuhk_pedes"].trials(index)
    assert trial.query.tolist() == [0, 0, 2]
    assert trial.query_caption is not None
    assert trial.query_caption.tolist() == [0, 1, 0]
    assert trial.gallery.tolist() == [0, 1, 2]
    result = score_similarities(trial, index, PROTOCOLS["cuhk_pedes"], -np.tile(np.arange(3.0), (3, 1)))
    assert result.mAP == pytest.approx((1 + 2 / 3) / 2)  # the captioned image itself is a positive


def test_table():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert set(protocol.tasks) <= set(TASKS)
    listed = {(d.name, task, name) for d in DATASETS for task, names in d.protocols.items() for name in names}
    assert listed == {(p.dataset, task, p.name) for p in PROTOCOLS.values() for task in p.tasks}


# Chance.


def test_chance_is_the_mean_over_all_rankings():
    for gallery in ([(1, 2), (1, 3), (2, 1), (3, 1), (1, 1), (2, 2)], [(1, 2), (2, 1)], [(1, 2)], [(1, 2), (1, 3)]):
        index = query_gallery([(1, 1, 0), (2, 9, 0), (4, 1, 0)], [(*image, 0) for image in gallery])
        trial, protocol = as_distributed(index), PROTOCOLS["market1501"]
        every = [
            mean_metrics([score_similarities(trial, index, protocol, np.tile(np.array(ranking, float), (3, 1)))])
            for ranking in permutations(range(len(gallery)))
        ]
        expected = {name: np.mean([result[name] for result in every]) for name in every[0]}
        chance = expected_random(trial, index, protocol)
        assert chance == pytest.approx({name: expected[name] for name in chance}, abs=1e-12)


def test_chance_agrees_with_simulation():
    rng = np.random.default_rng(0)
    pid, camera = rng.integers(0, 40, 1000), rng.integers(0, 6, 1000)
    index = make_index(pid, camera, ["query"] * 200 + ["gallery"] * 800)
    trial = by_identity(index, np.arange(200), np.arange(200, 1000))
    for name in ("market1501", "llcm:vis2ir"):
        protocol = PROTOCOLS[name]
        drawn = [mean_metrics([score_similarities(trial, index, protocol, rng.random((200, 800)))]) for _ in range(20)]
        for key, value in expected_random(trial, index, protocol).items():
            values = [result[key] for result in drawn]
            assert abs(np.mean(values) - value) < 5 * np.std(values, ddof=1) / 20**0.5
    assert "rank5" not in expected_random(trial, index, PROTOCOLS["llcm:vis2ir"])
