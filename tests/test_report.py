"""retrieval.html: what it shows is what the protocol says; nothing in it can run, load or overflow."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import MODELS, TrainConfig
from engine.data.files import Item
from engine.data.index import WHOLE, Index, find_indexes
from engine.evaluation import evaluate_model, write_features
from engine.instructions import SENTENCES
from engine.model.editing import EditingTransformer
from engine.model.instruction import build_tokenizer
from engine.model.irm import IRM
from engine.page import overlay
from engine.report import Example, Report, Result, mixed
from engine.runtime import Runtime

GREEN, RED = (21, 128, 61), (198, 40, 40)
HOSTILE = "\"'></title></p><script>document.title='run'</script><img src=x onerror=alert(1)>&amp;" + "x" * 300


class Node(HTMLParser):
    """A page as a tree; fails where tags do not close in order."""

    def __init__(self, tag="", attributes=None):
        super().__init__()
        self.tag, self.attributes, self.children, self.words = tag, dict(attributes or {}), [], []
        self.open = [self]

    @classmethod
    def of(cls, text):
        page = cls()
        page.feed(text)
        page.close()
        assert page.open == [page]
        return page

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"{tag}: an attribute twice"
        node = Node(tag, attrs)
        self.open[-1].children.append(node)
        if tag not in ("meta", "img"):
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].words.append(data)

    def all(self, tag, kind=None):
        found = [self] if self.tag == tag and kind in (None, self.attributes.get("class")) else []
        return found + [node for child in self.children for node in child.all(tag, kind)]

    def text(self):
        return "".join(self.words) + "".join(child.text() for child in self.children)


@pytest.fixture(scope="module")
def written(mini, tmp_path_factory):
    """(folder of retrieval.html and features.npz, metrics, indexes) of an untrained model."""
    folder = tmp_path_factory.mktemp("report")
    indexes = find_indexes(mini, ("market1501", "ltcc", "cuhk_pedes", "cocas"))
    captions = [caption for index in indexes for row in range(len(index)) for caption in index.captions(row)]
    tokenizer = build_tokenizer([*(words for family in SENTENCES.values() for words in family), *captions])
    torch.manual_seed(0)
    model = IRM(MODELS["irm_tiny"], tokenizer.get_vocab_size(), {})
    report, config, arrays = Report(attention=True), TrainConfig(data=str(mini), quick=True), {}
    metrics = evaluate_model(
        model,
        indexes,
        tokenizer,
        config,
        untrained=None,
        runtime=Runtime(torch.device("cpu")),
        arrays=arrays,
        report=report,
    )
    report.write(folder / "retrieval.html", metrics)
    write_features(arrays, folder / "features.npz")
    return folder, metrics, {index.name: index for index in indexes}


@pytest.fixture(scope="module")
def page(written):
    return Node.of((written[0] / "retrieval.html").read_text())


def test_one_small_file_that_loads_and_runs_nothing(written, page):
    folder, metrics, _ = written
    assert sorted(file.name for file in folder.iterdir()) == ["features.npz", "retrieval.html"]
    assert (folder / "retrieval.html").stat().st_size < 3e6
    for tag in ("script", "link", "iframe", "object", "base", "use"):
        assert not page.all(tag)
    assert not re.search(r"https?:|@import|url\(|javascript:", (folder / "retrieval.html").read_text())
    images = page.all("img")
    assert all(image.attributes["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert all(image.attributes["alt"] for image in images)
    anchors = [node.attributes["id"] for tag in ("section", "p") for node in page.all(tag) if "id" in node.attributes]
    assert len(anchors) == len(set(anchors))
    links = [link.attributes["href"] for link in page.all("a")]
    assert {link.removeprefix("#") for link in links} == set(anchors)
    rows = page.all("table")[0].all("tr")[1:]
    assert len(rows) == len(page.all("details")) - 1 == sum(map(len, metrics["tasks"].values()))
    assert f"{100 * metrics['tasks']['trad']['market1501']['mAP']:.2f}" in rows[0].text()
    assert f"{100 * metrics['mean_mAP']:.2f}\N{NO-BREAK SPACE}%" in page.all("header")[0].text()
    assert "learning rate" not in page.text()  # no log, no curves


# protocol -> whether gallery row g is junk, and whether it is a match, for query row q: written out, not looked up
same = {
    "person": lambda i, q, g: i.pid[q] == i.pid[g],
    "camera": lambda i, q, g: i.camera[q] == i.camera[g],
    "outfit": lambda i, q, g: i.clothes[q] == i.clothes[g],
}
RULES = {
    "market1501": (lambda person, camera, outfit: person and camera, lambda person, outfit: person),
    "ltcc:general": (lambda person, camera, outfit: person and camera, lambda person, outfit: person),
    "ltcc:cc": (lambda person, camera, outfit: person and (camera or outfit), lambda person, outfit: person),
    "ltcc:sc": (lambda person, camera, outfit: person and (camera or not outfit), lambda person, outfit: person),
    "real2": (lambda person, camera, outfit: False, lambda person, outfit: person),
    "real2:pid_clothes": (
        lambda person, camera, outfit: person and outfit and camera,
        lambda person, outfit: person and outfit,
    ),
    "cuhk_pedes": (lambda person, camera, outfit: False, lambda person, outfit: person),
    "cuhk_pedes:cosine": (lambda person, camera, outfit: False, lambda person, outfit: person),
}


def ranking(article: Node, index: Index) -> tuple[int, list[tuple[int, bool, float]]]:
    """The query's row, and of each result its row, whether its frame is green, its score."""
    paths = {path: row for row, path in enumerate(index.table["path"].to_pylist())}

    def row(image: Node) -> int:
        return paths[re.search(r"\. (.+): identity \d+, camera", image.attributes["alt"])[1]]

    asked = [image for image in article.all("div", "query")[0].all("img") if image.attributes["alt"][:6] == "Query."]
    if asked:
        query = row(asked[0])
    else:  # the sentence is the query
        sentence = article.all("blockquote")[0].text()
        query = next(row for row in index.select("test") if sentence in index.captions(row))
    results = []
    for rank, item in enumerate(article.all("li"), 1):
        sign, score = item.text().split()
        green = item.attributes["class"] == "match"
        alt = item.all("img")[0].attributes["alt"]
        assert item.attributes["class"] in ("match", "other")
        assert sign == ("✓" if green else "✗")
        assert alt.startswith(f"Rank {rank}, {'match' if green else 'no match'}. ")
        results.append((row(item.all("img")[0]), green, float(score)))
    return query, results


def test_green_is_what_the_protocol_says_and_junk_is_left_out(written, page):
    seen = {}
    for details in page.all("details")[:-1]:
        name = details.all("strong")[0].text()
        dataset = {"real2": "cocas"}.get(name.split(":")[0], name.split(":")[0])
        index, (junk, match) = written[2][dataset], RULES[name]
        articles = details.all("article")
        assert 1 <= len(articles) <= 6
        assert details.all("p")[0].attributes["id"].endswith(name)
        for article in articles:
            query, results = ranking(article, index)
            assert len({row for row, _, _ in results}) == len(results) == 10
            for row, green, _ in results:
                person, camera, outfit = (rule(index, query, row) for rule in same.values())
                assert not junk(person, camera, outfit)
                assert green == match(person, outfit)
            scores = [score for _, _, score in results]
            assert scores == sorted(scores, reverse=True)
            first = int(re.search(r"First match at rank ([\d,]+);", article.text())[1].replace(",", ""))
            greens = [rank for rank, (_, green, _) in enumerate(results, 1) if green]
            assert greens[0] == first if greens else first > 10
            seen.setdefault(name, []).append(query)
    assert set(seen) == set(RULES)
    assert len(seen["market1501"]) == 6
    assert seen["cuhk_pedes"] == seen["cuhk_pedes:cosine"]  # one query in both orders


def test_rankings_are_those_of_the_stored_features(written, page):
    folder, _, indexes = written
    stored, index = np.load(folder / "features.npz"), indexes["market1501"]
    features, pid, camera = (stored[f"trad/market1501/{name}"] for name in ("features", "pid", "camera"))
    paths, gallery = stored["trad/market1501/path"].tolist(), stored["trad/market1501/0/gallery"]
    articles = page.all("section")[1].all("article")
    assert len(articles) == 6
    for article in articles:
        query, results = ranking(article, index)
        at = paths.index(index.table["path"][query].as_py())
        kept = gallery[(pid[gallery] != pid[at]) | (camera[gallery] != camera[at])]
        scores = features[0][kept] @ features[0][at]
        best = kept[np.argsort(-scores, kind="stable")]
        assert [index.table["path"][row].as_py() for row, _, _ in results] == [paths[i] for i in best[:10]]
        assert [score for _, _, score in results] == pytest.approx(np.sort(scores)[::-1][:10], abs=6e-4)
        places = np.flatnonzero(pid[best] == pid[at]) + 1
        precision = np.mean(np.arange(1, len(places) + 1) / places)
        assert f"AP {100 * precision:.2f}\N{NO-BREAK SPACE}%" in article.text()


def test_every_kind_of_instruction_is_shown(page):
    tasks = [section for section in page.all("section") if section.all("article")]
    shown = {section.attributes["id"]: section.all("article")[0] for section in tasks}
    kinds = {task: [node.text() for node in shown[task].all("figcaption")] for task in ("trad", "ctcc", "t2i", "li")}
    assert kinds["trad"] == kinds["li"] == ["query", "attention"]
    assert kinds["ctcc"] == ["query", "attention", "wanted clothes"]
    assert kinds["t2i"] == []
    assert shown["trad"].all("blockquote")[0].text() == SENTENCES["trad"][0]
    assert not shown["ctcc"].all("blockquote")
    assert len(shown["li"].all("blockquote")[0].text().split()) > 5


@pytest.mark.parametrize(
    ("found", "want"),
    [([1, 0, 1, 0, 1, 0], [0, 2, 1, 3]), ([1, 1, 1, 0], [0, 1, 2, 3]), ([0] * 5, [0, 1, 2, 3]), ([1, 0], [0, 1])],
)
def test_found_and_missed_queries_are_mixed(found, want):
    assert mixed([bool(value) for value in found], 4) == want


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A page made by hand, every string of it hostile."""
    picture = tmp_path / "<b>&\"'.jpg"
    Image.new("RGB", (60, 140), "#88aacc").save(picture)
    results = [Result(Item(picture), HOSTILE, rank in (1, 4), 1 - rank / 10) for rank in range(1, 11)]
    example = Example(
        Item(picture), HOSTILE, HOSTILE, (Item(picture), WHOLE), results, [1, 4, 12], np.full((4, 2), 1 / 8)
    )
    row = {"mAP": 0.5, "mAP_std": 0.01, "rank1": 0.5, "rank5": 1.0, "rank10": 1.0, "mINP": 0.2, "random_mAP": 0.1}
    row |= {
        "untrained_mAP": None,
        "queries": 1200,
        "gallery": 20,
        "relevance": HOSTILE,
        "feature": HOSTILE,
        HOSTILE: 0.125,
    }
    steps = [{"step": step, "loss": 9 - step / 500, "lr": 1e-4, "images_per_s": 80.0} for step in range(1, 2001)]
    steps[7]["loss"] = None  # as engine.log writes what is not finite
    lines = [json.dumps(step | {"streams": [HOSTILE], "stream_loss": [1.0], "terms": {HOSTILE: 2.0}}) for step in steps]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0][:40]]))  # the last line cut by a kill
    report = Report()
    report.examples["trad", HOSTILE] = [example, example]
    metrics = {"tasks": {"trad": {HOSTILE: row}}, "mean_mAP": 0.5, "checkpoint": HOSTILE}
    report.write(tmp_path / "page.html", metrics | {"config": {HOSTILE: HOSTILE, "model": {}}}, tmp_path / "log.jsonl")
    return tmp_path / "page.html"


def test_hostile_strings_are_text(hostile):
    page = Node.of(hostile.read_text())
    assert not page.all("script")
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    assert not [name for node in page.all("img") for name in node.attributes if name.startswith("on")]
    for tag in ("title", "strong", "blockquote", "th", "dt", "dd", "figcaption"):
        assert any(HOSTILE.replace("_", " ") in node.text() for node in page.all(tag)), tag
    assert "12.50" in page.all("table")[0].text()  # a metric of another name has its column


def test_curves_hold_the_log(hostile):
    charts = Node.of(hostile.read_text()).all("svg")
    assert len(charts) == 5  # loss, rate, images/s, one term, one stream
    # the mean of steps 1 to 14 without the 8th, which is NaN, and of steps 1989 to 2000
    assert charts[0].attributes["aria-label"].startswith("loss, steps 1 to 2000: from 8.985 to 5.011,")
    points = [
        tuple(map(float, point.split(","))) for point in charts[0].all("polyline")[0].attributes["points"].split()
    ]
    assert len(points) == 160
    assert points == sorted(points)  # falling loss: x and downward y both rise
    assert points[0] == (46, 12)
    assert points[-1] == (294, 88)


def test_a_page_is_written_whole_or_not_at_all(hostile, tmp_path):
    before = hostile.read_bytes()
    with pytest.raises(KeyError):
        Report().write(hostile, {})
    assert hostile.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_the_attention_map_is_the_softmax_of_the_last_block():
    torch.manual_seed(0)
    model = EditingTransformer(
        size=(64, 32), patch=16, stem="patch", width=48, depth=3, heads=3, part_tokens=2, instruction_width=40
    ).eval()
    torch.nn.init.normal_(model.gates)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    images, words, lengths = torch.randn(4, 3, 64, 32), torch.randn(4, 7, 40), torch.tensor([7, 3, 0, 1])
    with torch.no_grad():
        maps = model.attention_map(images, words, lengths)
        entered = []
        hook = model.blocks[-1].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
        model(images, words, lengths)
        hook.remove()
        last = model.blocks[-1]
        qkv = torch.nn.functional.linear(last.norm1(entered[0]), last.attn.qkv.weight, last.attn.qkv.bias)
        want = torch.zeros(4, 8)
        for image in range(4):
            for head in range(3):
                q = qkv[image, 0, 16 * head : 16 * head + 16]
                k = qkv[image, :, 48 + 16 * head : 64 + 16 * head]
                want[image] += torch.softmax(k @ q / 4, 0)[3:] / 3
        want /= want.sum(1, keepdim=True)
        assert maps.shape == (4, 4, 2)
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
        torch.testing.assert_close(maps.flatten(1), want)
        assert (maps - model.attention_map(images)).abs().max() > 1e-3  # the instruction moves the eye
    assert not model.blocks[-1].attn._forward_hooks


def test_orange_lies_where_the_model_looks():
    grey = Image.new("RGB", (64, 128), (128, 128, 128))
    assert np.array_equal(overlay(grey, np.full((8, 4), 1 / 32)), grey)
    peak = np.full((8, 4), 0.5 / 31)
    peak[1, 2] = 0.5
    seen = np.array(overlay(grey, peak)).astype(int)
    assert np.array_equal(seen[100, 10], (128, 128, 128))
    red, green, blue = seen[1 * 16 + 8, 2 * 16 + 8]
    assert red > 200 > 128 > green > blue


def test_in_a_browser(hostile, tmp_path):
    """At the width of a desk and of a phone: every picture decodes, no script of the data runs, the page itself does
    not scroll sideways, frames are green and red."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} on PATH")
    probe = """<script>document.querySelectorAll("details").forEach(part => part.open = true);
        const root = document.documentElement, images = [...document.images];
        parent.postMessage({window: innerWidth, page: root.scrollWidth, room: root.clientWidth, title: document.title,
          scripts: document.scripts.length, labels: document.querySelectorAll("svg > text").length,
          pictures: images.filter(image => image.naturalWidth > 0).length,
          broken: images.filter(image => image.complete && !image.naturalWidth).length,
          frames: Math.max(...[...document.querySelectorAll("li")].map(item => item.offsetHeight)),
          strips: [...document.querySelectorAll("ol")].map(list => list.scrollWidth > list.clientWidth)}, "*")
        </script>"""
    text = re.sub("<meta http-equiv[^>]*>", "", hostile.read_text())  # the page's own policy lets no script run
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe + "</body>"))
    frames = "".join(f'<iframe src="probe.html" width="{width}" height="3600"></iframe>' for width in (1280, 375))
    (tmp_path / "both.html").write_text(
        "<style>*{margin:0;border:0;vertical-align:top}body{width:1655px;font-size:0}</style>"
        "<script>onmessage = event => document.body.append('SEEN' + JSON.stringify(event.data) + 'END')</script>"
        + frames
    )
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    switches += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1655,3600 --dump-dom"
    done = subprocess.run(
        [browser, *switches.split(), f"--user-data-dir={tmp_path / 'user'}", f"--screenshot={tmp_path / 'both.png'}"]
        + [(tmp_path / "both.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {
        part["window"]: part for part in map(json.loads, re.findall(r"SEEN(\{.*?\})END", html.unescape(done.stdout)))
    }
    assert set(said) == {1280, 375}
    for part in said.values():
        assert part["page"] <= part["room"]
        assert part["title"] == f"Retrieval: {HOSTILE}"
        assert (part["scripts"], part["labels"]) == (1, 20)
        assert (part["pictures"], part["broken"]) == (26, 0)
        assert 128 < part["frames"] < 170  # picture, frame and score, however long the query's words are
    assert said[375]["strips"] == [True, True]
    assert said[1280]["strips"] == [False, False]
    pixels = np.array(Image.open(tmp_path / "both.png").convert("RGB"))
    for part in (pixels[:, :1280], pixels[:, 1280:]):
        for colour in (GREEN, RED):
            assert np.count_nonzero((part == colour).all(-1)) > 1000
