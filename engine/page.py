"""The HTML of retrieval.html: one file for reading from disk, without script and with nothing to load.

Whatever comes from outside (paths, sentences, names) passes through `tag`, which escapes all that is not `Markup`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.data import files
from engine.data.index import WHOLE, Box
from engine.tasks import TASKS

if TYPE_CHECKING:
    from engine.report import Example

HEIGHT = 128  # pixels of an embedded picture
POINTS = 160  # of a curve; a longer log is averaged
Section = tuple[str, str, "Markup"]  # anchor, title, content


class Markup(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """<name attributes>content</name>. class_ and aria_label stand for class and aria-label; None leaves one out."""
    named = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = name + "".join(f' {key}="{html.escape(str(value))}"' for key, value in named)
    return Markup(f"<{start}>" if name == "img" else f"<{start}>{join(*content)}</{name}>")


def join(*content: object) -> Markup:
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in content))


def render(metrics: dict[str, Any], examples: Mapping[tuple[str, str], list[Example]], log: Path | None) -> str:
    """The page. metrics: content of metrics.json; examples: (task, protocol) -> queries; log: log.jsonl, if any."""
    sections = [_results(metrics), *_rankings(metrics, examples), _training(log), _configuration(metrics)]
    sections = [section for section in sections if section[2]]
    links = [tag("a", title, href=f"#{key}") for key, title, _ in sections]
    name = f"Retrieval: {metrics.get('checkpoint', '')}"
    header = tag("header", tag("h1", "Retrieval"), _summary(metrics), tag("nav", *links, aria_label="Contents"))
    main = tag("main", *(tag("section", tag("h2", title), body, id=key) for key, title, body in sections))
    footer = tag("footer", "Holds pictures of the data sets: share it only as their licences allow.")
    page = tag("html", tag("head", Markup(HEAD), tag("title", name)), tag("body", header, main, footer), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _summary(metrics: dict[str, Any]) -> Markup:
    others = []
    for what in ("random", "untrained"):
        means = [[row.get(f"{what}_mAP") for row in rows.values()] for rows in metrics["tasks"].values()]
        if all(value is not None for part in means for value in part):
            others.append(f"{what} {_percent(sum(sum(part) / len(part) for part in means) / len(means))}")
    head = tag("p", tag("strong", _percent(metrics["mean_mAP"])), " mean mAP over tasks", class_="headline")
    return join(head, tag("p", " · ".join([*others, str(metrics.get("checkpoint", ""))]), class_="quiet"))


COLUMNS = {"mAP": "mAP", "mAP_std": "±", "rank1": "R1", "rank5": "R5", "rank10": "R10", "mINP": "mINP"}
COLUMNS |= {"random_mAP": "random", "untrained_mAP": "untrained"}


def _results(metrics: dict[str, Any]) -> Section:
    """The table; other fractions that metrics.json holds become columns of their own."""
    rows = [(task, name, row) for task, part in metrics["tasks"].items() for name, row in part.items()]
    more = {key: key.replace("_", " ") for _, _, row in rows for key, value in row.items() if isinstance(value, float)}
    columns = COLUMNS | {key: title for key, title in more.items() if key not in COLUMNS}
    head = tag("tr", *(tag("th", title, scope="col") for title in ("protocol", *columns.values())))
    body = []
    for task, name, row in rows:
        values = (row.get(key) for key in columns)
        cells = (tag("td", "–" if value is None else f"{100 * value:.2f}") for value in values)
        link = tag("a", name, href="#" + _key(task, name))
        body.append(tag("tr", tag("th", tag("span", task, class_="quiet"), " ", link, scope="row"), *cells))
    table = tag("table", tag("thead", head), tag("tbody", *body))
    strip = tag("div", table, class_="strip", role="region", tabindex=0, aria_label="Results of every protocol")
    note = "Percent. ± is the spread over sentences or drawn galleries."
    return "results", "Results", join(strip, tag("p", note, class_="quiet"))


def _rankings(metrics: dict[str, Any], examples: Mapping[tuple[str, str], list[Example]]) -> Iterable[Section]:
    """A section of each task, the first protocol unfolded."""
    legend = tag(
        "p",
        *(tag("span", "✓ match", class_="badge match"), " ", tag("span", "✗ other", class_="badge other"), " "),
        "with its score. Queries are drawn at random, found and missed in halves; the table says how often each is so.",
        class_="quiet",
    )
    for task, protocols in metrics["tasks"].items():
        blocks: list[Markup] = []
        for name, row in protocols.items():
            if not examples.get((task, name)):
                continue
            figures = f"mAP {_percent(row['mAP'])}, R1 {_percent(row['rank1'])}"
            summary = tag("summary", tag("strong", name), " ", tag("span", figures, class_="quiet"))
            rule = f"{row['relevance']}. {row['queries']:,} queries, {row['gallery']:,} gallery images."
            # the anchor lies inside: browsers unfold what a link points into
            about = tag("p", rule, class_="quiet", id=_key(task, name))
            articles = map(_example, examples[task, name])
            blocks.append(tag("details", summary, about, *articles, open=None if blocks else ""))
        if blocks:
            yield task, TASKS[task].title if task in TASKS else task, join(legend, *blocks)


def _example(example: Example) -> Markup:
    asked = []
    if example.picture:
        picture = _thumbnail(example.picture)
        asked.append(_img(picture, f"Query. {example.facts}", "query"))
        if example.attention is not None:
            seen = overlay(picture, example.attention)
            asked.append(_img(seen, "Orange: where the CLS of the last block looks more than evenly", "attention"))
    if example.clothes:
        asked.append(_img(_thumbnail(*example.clothes), "Instruction: the wanted clothes", "wanted clothes"))
    ranks = np.array(example.ranks)
    precision = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    within = np.count_nonzero(ranks <= len(example.results))
    note = f"First match at rank {ranks[0]:,}; {within} of {len(ranks):,} shown; AP {_percent(precision)}"
    words = tag("blockquote", example.sentence) if example.sentence else ""
    results = []
    for rank, result in enumerate(example.results, 1):
        kind, sign, what = ("match", "✓", "match") if result.relevant else ("other", "✗", "no match")
        shown = _img(_thumbnail(result.picture), f"Rank {rank}, {what}. {result.facts}")
        badge = tag("span", f"{sign} {result.score:.3f}", class_=f"badge {kind}")
        results.append(tag("li", shown, badge, class_=kind))
    ranking = tag("ol", *results, class_="strip", tabindex=0, aria_label="Ranked gallery, best first")
    query = tag("div", *asked, tag("div", words, tag("p", note, class_="quiet")), class_="query")
    return tag("article", query, ranking)


@lru_cache(maxsize=512)
def _thumbnail(item: files.Item, box: Box = WHOLE) -> Image.Image:
    """The boxed part of a picture, small."""
    image = files.picture(item)
    sides = np.array([*image.size, *image.size])
    part = image.crop(tuple(np.rint(sides * box).astype(int).tolist()))
    part.thumbnail((2 * HEIGHT, HEIGHT))
    return part


def overlay(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """The picture with its map [h, w] in orange: clear up to an even share of the attention, full at four times that.
    The scale is absolute: a model that looks everywhere alike leaves the picture as it is."""
    strength = np.clip((attention * attention.size - 1) / 3, 0, 1)
    heat = Image.fromarray(np.rint(200 * strength).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", picture.size, (255, 106, 0)), picture, heat)


def _img(image: Image.Image, text: str, caption: str = "") -> Markup:
    """An embedded JPEG with its alternative text, with a caption as a figure."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=72, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    picture = tag("img", src=source, alt=text, title=text, width=image.width, height=image.height)
    return tag("figure", picture, tag("figcaption", caption)) if caption else picture


def _training(log: Path | None) -> Section:
    """The curves of log.jsonl without numbers that are not finite (null there); a line that a kill has cut, or that is
    no step's, is passed over."""
    groups: list[dict[str, list[tuple[int, float]]]] = [{}, {}, {}]
    for line in log.read_text(errors="replace").splitlines() if log and log.is_file() else ():
        try:
            row = json.loads(line)
            whole = {"loss": row["loss"], "learning rate": row["lr"], "images/s": row["images_per_s"]}
            parts = (whole, dict(row["terms"]), dict(zip(row["streams"], row["stream_loss"], strict=True)))
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            continue
        for group, values in zip(groups, parts, strict=True):
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    group.setdefault(name, []).append((step, value))
    content = []
    for title, group in zip(("", "Terms of the loss", "Loss of each stream"), groups, strict=True):
        if group:
            charts = tag("div", *(_chart(name, points) for name, points in group.items()), class_="charts")
            content.append(join(tag("h3", title) if title else "", charts))
    return "training", "Training", join(*content)


def _chart(name: str, points: list[tuple[int, float]]) -> Markup:
    """One curve as SVG: at most POINTS means of neighbouring steps, lowest and highest on the left, steps below."""
    parts = np.array_split(np.array(points, float), min(POINTS, len(points)))
    xs, ys = np.array([part.mean(0) for part in parts]).T
    low, high, first, last = ys.min(), ys.max(), points[0][0], points[-1][0]
    across = 46 + 248 * (xs - xs[0]) / max(xs[-1] - xs[0], 1e-9)
    down = 12 + 76 * (high - ys) / max(high - low, 1e-30)
    said = f"{name}, steps {first} to {last}: from {ys[0]:.4g} to {ys[-1]:.4g}, lowest {low:.4g}, highest {high:.4g}"
    return tag(
        "figure",
        tag("figcaption", name, " ", tag("strong", f"{ys[-1]:.4g}")),
        tag(
            "svg",
            tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))),
            tag("circle", cx=f"{across[-1]:.1f}", cy=f"{down[-1]:.1f}", r=3),
            tag("text", f"{high:.3g}", x=40, y=16, text_anchor="end"),
            tag("text", f"{low:.3g}" if high > low else "", x=40, y=92, text_anchor="end"),
            tag("text", f"{first:,}", x=46, y=110),
            tag("text", f"{last:,}" if last > first else "", x=294, y=110, text_anchor="end"),
            viewBox="0 0 300 116",
            role="img",
            aria_label=said,
        ),
    )


def _configuration(metrics: dict[str, Any]) -> Section:
    values = dict(metrics.get("config", {}))
    model = values.pop("model", None) or {}
    values |= {f"model.{name}": value for name, value in model.items()}
    rows = []
    for name, value in values.items():
        rows.append(tag("div", tag("dt", name), tag("dd", value if isinstance(value, str) else json.dumps(value))))
    shown = tag("details", tag("summary", f"{len(rows)} settings"), tag("dl", *rows)) if rows else Markup()
    return "configuration", "Configuration", shown


def _key(task: str, protocol: str) -> str:
    """An anchor without spaces."""
    return "-".join(f"{task}/{protocol}".split())


def _percent(value: float) -> str:
    return f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root{--ink:#1b1e21;--quiet:#596068;--paper:#fff;--panel:#f5f6f7;--line:#dfe2e5;--link:#1d4ed8;
  --match:#15803d;--other:#c62828}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--quiet:#a3aab1;--paper:#131517;--panel:#1c1f22;--line:#30353a;
  --link:#8ab4f8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:76rem;background:var(--paper);color:var(--ink);
  font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.1rem;font-weight:600;margin:0}
h2{font-size:1.4rem;font-weight:600;margin:3rem 0 .75rem}
h3{font-size:1rem;font-weight:600;margin:1.5rem 0 .5rem}
p{margin:.25rem 0 .75rem}
a{color:var(--link)}
.quiet,figcaption,footer{color:var(--quiet);font-size:.875rem}
.headline{margin:.5rem 0 0}.headline strong{font-size:2.25rem;font-weight:600;letter-spacing:-.02em}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:.75rem 0;border-bottom:1px solid var(--line)}
nav a,th a{text-decoration:none}nav a:hover,th a:hover{text-decoration:underline}
.strip{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
thead th{font-weight:600;font-size:.875rem}
th:first-child{position:sticky;left:0;background:var(--paper);text-align:left;font-weight:400;padding-left:0}
details{border:1px solid var(--line);border-radius:.5rem;margin:.75rem 0;padding:0 1rem}
summary{cursor:pointer;padding:.75rem 0}
article{display:grid;grid-template-columns:19rem minmax(0,1fr);gap:.75rem 1.5rem;padding:1rem 0;
  border-top:1px solid var(--line)}
.query{display:flex;flex-wrap:wrap;gap:.75rem;align-content:start}.query>div{flex:1 1 8rem}
figure{margin:0}
img{display:block;height:8rem;width:auto;max-width:9rem;object-fit:contain;background:var(--panel)}
blockquote{margin:0 0 .5rem;padding-left:.75rem;border-left:3px solid var(--line)}
ol{display:flex;align-items:start;gap:.5rem;list-style:none;margin:0;padding:0 0 .5rem}
li{flex:none;padding:4px 4px 0}
li img{margin:0 auto}
.badge{display:inline-block;padding:0 .4rem;color:#fff;font-size:.8rem;font-variant-numeric:tabular-nums}
li .badge{display:block;padding:0;text-align:center;white-space:nowrap}
.match{background:var(--match)}.other{background:var(--other)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.charts figcaption{display:flex;justify-content:space-between}
svg{display:block;width:100%;background:var(--panel);border-radius:.25rem}
polyline{fill:none;stroke:var(--link);stroke-width:1.5;stroke-linejoin:round}
circle{fill:var(--link)}
text{fill:var(--quiet);font-size:11px}
dl{columns:18rem;margin:0 0 1rem;font-size:.875rem}
dl div{display:flex;justify-content:space-between;gap:1rem;break-inside:avoid}
dt{color:var(--quiet)}dd{margin:0;text-align:right}
footer{margin-top:3rem}
@media (max-width:48rem){article{grid-template-columns:minmax(0,1fr)}details{padding:0 .75rem}}
</style>
"""
