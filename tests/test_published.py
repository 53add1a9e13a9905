"""Trees with the published numbers of images and identities: `describe` finds them to the image."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.datasets import cuhk03, market1501, msmt17
from engine.data.describe import describe, format_table

LINKS = 20_000  # to one file; file systems allow some 65,000


class Tree:
    """One tiny picture under many names."""

    def __init__(self, root: Path):
        self.root, self.made, self.folders = root, 0, set[Path]()

    def add(self, name: str) -> None:
        file = self.root / name
        if file.parent not in self.folders:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.folders.add(file.parent)
        if self.made % LINKS == 0:
            self.picture = file
            Image.new("RGB", (4, 8)).save(file, format="JPEG")  # a parser opens no image
        else:
            os.link(self.picture, file)
        self.made += 1


def spread(images: int, identities: int) -> np.ndarray:
    """[images] an identity for each, all of them used."""
    return np.arange(images) % identities


def write_market1501(root: Path) -> None:
    """751 people train, 750 others test; the gallery has 2,798 distractors (0000) and 3,819 junk boxes (-1), too."""
    tree = Tree(root / "Market-1501-v15.09.15")
    people, others = 1 + 2 * np.arange(751), 2 + 2 * np.arange(750)
    gallery = [*others[spread(19_732 - 3_819 - 2_798, 750)], *[0] * 2_798, *[-1] * 3_819]
    for folder, pids in (
        ("bounding_box_train", people[spread(12_936, 751)]),
        ("query", others[spread(3_368, 750)]),
        ("bounding_box_test", gallery),
    ):
        for i, pid in enumerate(pids):
            name = "-1" if pid < 0 else f"{pid:04}"
            tree.add(f"{folder}/{name}_c{1 + i % 6}s1_{i:06}_00.jpg")
        (tree.root / folder / "Thumbs.db").write_text("")


def write_msmt17(root: Path) -> None:
    """1,041 people in train and val, 3,060 others, numbered from 0 again, in query and gallery."""
    tree = Tree(root / "MSMT17_V1")
    for split, images, people in (
        ("train", 30_248, 1_041),
        ("val", 2_373, 1_041),
        ("query", 11_659, 3_060),
        ("gallery", 82_161, 3_060),
    ):
        lines = []
        for i, pid in enumerate(spread(images, people)):
            lines.append(f"{pid:04}/{pid:04}_{i:06}_{1 + i % 15:02}_0303morning_0015_{split}.jpg")
            tree.add(f"{'train' if split in ('train', 'val') else 'test'}/{lines[-1]}")
        text = "".join(f"{line} {int(line[:4])}\n" for line in lines)
        (tree.root / f"list_{split}.txt").write_text(text)


def write_cuhk03(root: Path) -> None:
    """767 people train, 700 others test."""
    tree = Tree(root / "cuhk03")
    lists: dict[str, list] = {}
    for split, images, first, people in (
        ("train", 7_365, 0, 767), ("query", 1_400, 767, 700), ("gallery", 5_332, 767, 700),
    ):  # fmt: skip
        rows = lists[split] = []
        for i, pid in enumerate(first + spread(images, people)):
            view = i // people % 2
            name = f"{1 + pid // 300}_{1 + pid % 300:03}_{1 + view}_{i:05}{split[0]}.png"
            rows.append([f"/home/x/images_detected/{name}", int(pid), view])
            tree.add(f"images_detected/{name}")
    (tree.root / "splits_new_detected.json").write_text(json.dumps([lists]))


@pytest.mark.slow
def test_published_counts(tmp_path):
    for write in (write_market1501, write_msmt17, write_cuhk03):
        write(tmp_path)
    rows = describe(tmp_path)
    found = {(row["dataset"], row["split"]): (row["images"], row["identities"], row["cameras"]) for row in rows}
    assert found == {
        ("market1501", "train"): (12_936, 751, 6),
        ("market1501", "query"): (3_368, 750, 6),
        ("market1501", "gallery"): (15_913, 751, 6),  # the distractors are one identity more
        ("msmt17", "train"): (30_248, 1_041, 15),
        ("msmt17", "val"): (2_373, 1_041, 15),
        ("msmt17", "query"): (11_659, 3_060, 15),
        ("msmt17", "gallery"): (82_161, 3_060, 15),
        ("cuhk03", "train"): (7_365, 767, 2),
        ("cuhk03", "query"): (1_400, 700, 2),
        ("cuhk03", "gallery"): (5_332, 700, 2),
    }
    assert all(row["published"] == row["images"] for row in rows)
    assert "not the published number" not in format_table(rows)
    for dataset in (market1501, msmt17, cuhk03):
        assert {name: found[dataset.DATASET.name, name][0] for name in dataset.DATASET.images} == dataset.DATASET.images
    assert sum(found[name, "train"][0] for name in ("market1501", "msmt17", "cuhk03")) == 50_549
    part = tmp_path / "part"
    part.mkdir()
    os.rename(tmp_path / "Market-1501-v15.09.15", part / "market")
    (part / "market" / "query" / "0002_c1s1_000000_00.jpg").unlink()
    rows = describe(part)
    assert [(row["images"], row["published"]) for row in rows if row["split"] == "query"] == [(3_367, 3_368)]
    assert "not the published number" in format_table(rows)
    shutil.rmtree(tmp_path)  # some 160,000 names that no one wants to keep
