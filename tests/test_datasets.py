"""Every parser on a tree of a few empty files (parsers open no image), and on trees that are damaged."""

import errno
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from engine.data.datasets import DATASETS, synth_pedes
from engine.data.datasets._matlab import read_matlab
from engine.data.datasets.datalist import records
from engine.data.index import find_root
from engine.data.record import SPLITS, Record
from engine.errors import InputError
from engine.tasks import TASKS

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def write(root: Path, tree: dict[str, object]) -> Path:
    """Files of a tree: text as it is, anything else as JSON."""
    for name, content in tree.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return root


def images(*names: str) -> dict[str, object]:
    return dict.fromkeys(names, "")


TRAIN = "0000/0000_001_15_0303morning_0016_1.jpg"
PEDES = {"split": "train", "captions": ["A man.", " In black. ", ""], "file_path": "Market/1 é_c1.jpg", "id": 7}
CUHK03 = {
    "train": [["/home/x/images_detected/1_001_1_01.png", 0, 0]],
    "query": [["C:\\x\\1_003_2_08.png", 5, 1]],
    "gallery": [["1_003_1_02.png", 5, 0]],
}
CUHK03_RECORDS = [
    Record("images_detected/1_001_1_01.png", 0, 1, "train"),
    Record("images_detected/1_003_2_08.png", 5, 2, "query"),
    Record("images_detected/1_003_1_02.png", 5, 1, "gallery"),
]
CUHK03_LIST = "splits_new_detected.json"
CUHK03_IMAGES = images(*(record.path for record in CUHK03_RECORDS))

TREES: dict[str, tuple[dict[str, object], list[Record]]] = {
    "market1501": (
        images(
            "bounding_box_train/0007_c3s3_077419_03.jpg",
            "bounding_box_train/0002_c1s1_000451_03.jpg",
            "bounding_box_train/Thumbs.db",
            "bounding_box_train/._0002_c1s1_000451_03.jpg",
            "query/0001_c1s1_001051_00.jpg",
            "bounding_box_test/-1_c1s1_000401_03.jpg",
            "bounding_box_test/0000_c6s1_000151_01.jpg",
            "bounding_box_test/0001_c2s1_000301_00.jpg",
            "gt_bbox/0001_c1s1_001051_00.jpg",
        ),
        [
            Record("bounding_box_train/0002_c1s1_000451_03.jpg", 2, 1, "train"),
            Record("bounding_box_train/0007_c3s3_077419_03.jpg", 7, 3, "train"),
            Record("query/0001_c1s1_001051_00.jpg", 1, 1, "query"),
            Record("bounding_box_test/0000_c6s1_000151_01.jpg", 0, 6, "gallery"),
            Record("bounding_box_test/0001_c2s1_000301_00.jpg", 1, 2, "gallery"),
        ],
    ),
    "msmt17": (
        {
            **images("train/0000/0000_001_15_0303morning_0016_1.jpg", "train/0000/0000_000_01_0303morning_0015_0.jpg"),
            **images("train/0001/0001_000_02_0303noon_0000_0.jpg", "test/0000/0000_000_05_0303noon_0001_0.jpg"),
            **images("test/0000/0000_001_06_0303noon_0001_0.jpg", "test/0000/0000_002_06_not_listed_0.jpg"),
            "list_train.txt": f"{TRAIN} 0\r\n\n0000/0000_000_01_0303morning_0015_0.jpg 0",
            "list_val.txt": "\ufeff0001/0001_000_02_0303noon_0000_0.jpg 1\n",
            "list_query.txt": "0000/0000_000_05_0303noon_0001_0.jpg 0\n",
            "list_gallery.txt": "./0000/0000_001_06_0303noon_0001_0.jpg\t0\n",
        },
        [
            Record("train/0000/0000_000_01_0303morning_0015_0.jpg", 0, 1, "train"),
            Record("train/0000/0000_001_15_0303morning_0016_1.jpg", 0, 15, "train"),
            Record("train/0001/0001_000_02_0303noon_0000_0.jpg", 1, 2, "val"),
            Record("test/0000/0000_000_05_0303noon_0001_0.jpg", 0, 5, "query"),
            Record("test/0000/0000_001_06_0303noon_0001_0.jpg", 0, 6, "gallery"),
        ],
    ),
    "cuhk03": ({**CUHK03_IMAGES, "splits_new_detected.json": [CUHK03]}, CUHK03_RECORDS),
    "prcc": (
        images(
            "rgb/train/001/A_cropped_rgb001.jpg",
            "rgb/train/001/C_cropped_rgb002.jpg",
            "rgb/train/.DS_Store",
            "rgb/train/__MACOSX/x.jpg",
            "rgb/val/001/B_cropped_rgb003.jpg",
            "rgb/test/A/005/cropped_rgb001.jpg",
            "rgb/test/A/005/Thumbs.db",
            "rgb/test/B/005/cropped_rgb010.jpg",
            "rgb/test/C/005/cropped_rgb002.jpg",
            "sketch/train/001/A.jpg",
        ),
        [
            Record("rgb/train/001/A_cropped_rgb001.jpg", 1, 0, "train", "1"),
            Record("rgb/train/001/C_cropped_rgb002.jpg", 1, 2, "train", "1C"),
            Record("rgb/val/001/B_cropped_rgb003.jpg", 1, 1, "val", "1"),
            Record("rgb/test/A/005/cropped_rgb001.jpg", 5, 0, "test", "5"),
            Record("rgb/test/B/005/cropped_rgb010.jpg", 5, 1, "test", "5"),
            Record("rgb/test/C/005/cropped_rgb002.jpg", 5, 2, "test", "5C"),
        ],
    ),
    "vc_clothes": (
        images("train/0001-04-03-01.jpg", "train/desktop.ini", "query/0227-02-01-05.jpg", "gallery/0227-03-02-11.jpg"),
        [
            Record("train/0001-04-03-01.jpg", 1, 4, "train", "1-3"),
            Record("query/0227-02-01-05.jpg", 227, 2, "query", "227-1"),
            Record("gallery/0227-03-02-11.jpg", 227, 3, "gallery", "227-2"),
        ],
    ),
    "ltcc": (
        images(
            "train/000_1_c10_015833.png",
            "train/000_2_c1_015834.png",
            "clothes/train/000_1_c10_015833.png",
            "query/094_1_c9_015897.png",
            "test/094_2_c12_000001.png",
            "info/cloth-change_id_test.txt",
        ),
        [
            Record(
                "train/000_1_c10_015833.png", 0, 10, "train", "0-1", "vis", (), "clothes/train/000_1_c10_015833.png"
            ),
            Record("train/000_2_c1_015834.png", 0, 1, "train", "0-2"),
            Record("query/094_1_c9_015897.png", 94, 9, "query", "94-1"),
            Record("test/094_2_c12_000001.png", 94, 12, "gallery", "94-2"),
        ],
    ),
    "llcm": (
        {
            **images("vis/0001/0001_c01_s1_f2_vis.jpg", "nir/0001/0001_c09_s1_f2_nir.jpg"),
            **images("test_vis/cam1/0004/0004_c01_s1_f2_vis.jpg", "test_vis/cam2/0002/0002_c02_s1_f9_vis.jpg"),
            **images("test_vis/cam2/0003/0003_c02_s1_f9_vis.jpg", "test_nir/cam1/0002/0002_c01_s1_f1_nir.jpg"),
            **images("test_nir/cam1/0002/Thumbs.db", "test_nir/cam3/.keep"),
            "idx/train_vis.txt": "vis/0001/0001_c01_s1_f2_vis.jpg 0\n",
            "idx/train_nir.txt": "nir/0001/0001_c09_s1_f2_nir.jpg 0\n",
            "idx/test_id.txt": "4, 2\n",
        },
        [
            Record("vis/0001/0001_c01_s1_f2_vis.jpg", 0, 1, "train"),
            Record("nir/0001/0001_c09_s1_f2_nir.jpg", 0, 9, "train", modality="nir"),
            Record("test_vis/cam1/0004/0004_c01_s1_f2_vis.jpg", 4, 1, "test"),
            Record("test_vis/cam2/0002/0002_c02_s1_f9_vis.jpg", 2, 2, "test"),
            Record("test_nir/cam1/0002/0002_c01_s1_f1_nir.jpg", 2, 1, "test", modality="nir"),
        ],
    ),
    "cuhk_pedes": (
        {
            **images("imgs/Market/1 é_c1.jpg", "imgs/test_query/p_2.png", "imgs/cam_a/000_01.bmp"),
            "reid_raw.json": [
                {**PEDES, "split": "test", "file_path": "cam_a/000_01.bmp", "captions": ["A woman."], "id": 9},
                {**PEDES, "split": "val", "file_path": "test_query/p_2.png", "id": 8},
                PEDES,
            ],
        },
        [
            Record("imgs/Market/1 é_c1.jpg", 7, 0, "train", captions=("A man.", "In black.")),
            Record("imgs/test_query/p_2.png", 8, 0, "val", captions=("A man.", "In black.")),
            Record("imgs/cam_a/000_01.bmp", 9, 0, "test", captions=("A woman.",)),
        ],
    ),
    "synth_pedes": (
        {
            **images("Part1/1/0.jpg", "Part11/312321/3.jpg"),
            "synthpedes_dataset.json": [
                {"id": 1, "file_path": "Part1/1/0.jpg", "attributes": [], "captions": ["One.", "Two."]},
                {"id": "312321", "file_path": "Part11/312321/3.jpg", "captions": ["Three."], "prompt_caption": ["x"]},
            ],
        },
        [
            Record("Part1/1/0.jpg", 1, 0, "train", captions=("One.", "Two.")),
            Record("Part11/312321/3.jpg", 312321, 0, "train", captions=("Three.",)),
        ],
    ),
    "cocas": (
        {
            **images("real1/images/b.jpg", "real1/images/a.jpg", "real1/templates/t1.jpg"),
            **images("Real2/images/q.jpg", "Real2/images/g.jpg", "Real2/templates/t 9.jpg", "Real2/crops/g.jpg"),
            "real1/train.txt": "images/b.jpg,templates/t1.jpg, 1,1,2\nimages/a.jpg templates/t1.jpg 1 1\n",
            "real1/datalist/train_attr.txt": "images/b.jpg k1 1 1\n",
            "real1/datalist/runner_real1_v1_gpt.json": {"k1": "a red coat"},
            "Real2/query.txt": "q.jpg\tt 9.jpg\t1\t9\t3\n",
            "Real2/gallery.txt": "images/g.jpg 1 8 4\n",
            "Real2/datalist/gallery.txt": "images/g.jpg crops/g.jpg 1 8 4\n",
            "Real2/datalist/query_attr.txt": "images/q.jpg k2 1 9 3\nimages/q.jpg k3 1 9 3\n",
            "Real2/datalist/runner_real2.json": {"k2": "black trousers", "k3": ["a hat"]},
        },
        [
            Record("real1/images/a.jpg", 1, 0, "train", "1-1", clothes_picture="real1/templates/t1.jpg"),
            Record("real1/images/b.jpg", 1, 2, "train", "1-1", "vis", ("a red coat",), "real1/templates/t1.jpg"),
            Record(
                "Real2/images/q.jpg",
                1,
                3,
                "query",
                "1-9",
                "vis",
                ("black trousers", "a hat"),
                "Real2/templates/t 9.jpg",
            ),
            Record("Real2/images/g.jpg", 1, 4, "gallery", "1-8", clothes_picture="Real2/crops/g.jpg"),
        ],
    ),
}

MARKET = {
    "train": "Market-1501/a/0002_c1s1_000451_03.jpg none 2 0 9",
    "query": "Market-1501/a/0001_c1s1_001051_00.jpg none 1 0 9",
    "gallery": "Market-1501/a/0001_c2s1_000301_00.jpg none 1 0 9\nMarket-1501/a/-1_c1s1_000401_03.jpg none -1 0 9",
}
MARKET_IMAGES = images(*(line.split()[0] for lines in MARKET.values() for line in lines.split("\n")))
PLAIN = {"train": "a/1.jpg x 2 0", "query": "a/2.jpg x 1 0\na/2.jpg x 1 0", "gallery": "a/3.jpg\tx\t1\t0"}
PLAIN_IMAGES = images("a/1.jpg", "a/2.jpg", "a/3.jpg")
PEDES_KEYS = {"k1": "a man", "k2": "in black", "k3": "a woman"}

DATALISTS: dict[str, tuple[dict[str, object], list[Record]]] = {  # data set/what is special
    "market1501/cameras in names": (
        MARKET_IMAGES | {f"datalist/{split}.txt": text for split, text in MARKET.items()},
        [
            Record("Market-1501/a/0002_c1s1_000451_03.jpg", 2, 1, "train"),
            Record("Market-1501/a/0001_c1s1_001051_00.jpg", 1, 1, "query"),
            Record("Market-1501/a/0001_c2s1_000301_00.jpg", 1, 2, "gallery"),
        ],
    ),
    "msmt17/four columns": (
        PLAIN_IMAGES | {f"Datalist/{split.upper()}.txt": text for split, text in PLAIN.items()},
        [
            Record("a/1.jpg", 2, 0, "train"),
            Record("a/2.jpg", 1, -1, "query"),
            Record("a/3.jpg", 1, -2, "gallery"),
        ],
    ),
    "cuhk03/five columns": (
        PLAIN_IMAGES
        | {f"datalist/{split}.txt": text.split("\n")[0] + " 7" for split, text in PLAIN.items()}
        | {"datalist/gallery.txt": "a/3.jpg,x,1,0,-1"},
        [
            Record("a/1.jpg", 2, 7, "train"),
            Record("a/2.jpg", 1, 7, "query"),
            Record("a/3.jpg", 1, -2, "gallery"),
        ],
    ),
    "prcc/one test split": (
        {
            **images("images/rgb_/train/001/A_cropped_rgb001.jpg", "images/rgb_/test/A/005/cropped_rgb001.jpg"),
            **images("images/rgb_/test/C/005/cropped_rgb002.jpg"),
            "datalist/train.txt": "images/rgb_/train/001/A_cropped_rgb001.jpg white.jpg 1 3",
            "datalist/query.txt": "images/rgb_/test/C/005/cropped_rgb002.jpg white.jpg 5 1",
            "datalist/gallery.txt": "images/rgb_/test/A/005/cropped_rgb001.jpg white.jpg 5 0",
        },
        [
            Record("images/rgb_/train/001/A_cropped_rgb001.jpg", 1, 0, "train", "1-3"),
            Record("images/rgb_/test/A/005/cropped_rgb001.jpg", 5, 0, "test", "5-0"),
            Record("images/rgb_/test/C/005/cropped_rgb002.jpg", 5, 2, "test", "5-1"),
        ],
    ),
    "vc_clothes/suffix": (
        {
            **images("x/0001-04-03-01.jpg", "x/0227-02-01-05.jpg", "x/0227-03-02-11.jpg"),
            "datalist/train_cc_clo.txt": "x/0001-04-03-01.jpg white.jpg 1 3 0",
            "datalist/query.txt": "x/0227-02-01-05.jpg white.jpg 227 1 0",
            "datalist/gallery.txt": "x/0227-03-02-11.jpg white.jpg 227 -1 0",
        },
        [
            Record("x/0001-04-03-01.jpg", 1, 4, "train", "1-3"),
            Record("x/0227-02-01-05.jpg", 227, 2, "query", "227-1"),
            Record("x/0227-03-02-11.jpg", 227, 3, "gallery"),
        ],
    ),
    "ltcc/clothes pictures": (
        {
            **images("x/000_1_c10_015833.png", "x/000_2_c1_015834.png", "croped_clothes/1.png", "templates/2.png"),
            **images("x/094_1_c9_015897.png", "x/094_2_c12_000001.png"),
            "datalist/train.txt": "x/000_1_c10_015833.png croped_clothes/1.png 0 1 2\n"
            "x/000_2_c1_015834.png templates/2.png 0 2 2",
            "datalist/query_sc.txt": "x/missing.png white.jpg 94 1",
            "datalist/query_general.txt": "x/094_1_c9_015897.png white.jpg 94 1",
            "datalist/gallery_sc.txt": "x/094_2_c12_000001.png white.jpg 94 2",
            "datalist/gallery_cc.txt": "x/094_2_c12_000001.png white.jpg 94 2",
        },
        [
            Record("x/000_1_c10_015833.png", 0, 10, "train", "0-1", clothes_picture="croped_clothes/1.png"),
            Record("x/000_2_c1_015834.png", 0, 1, "train", "0-2", clothes_picture="templates/2.png"),
            Record("x/094_1_c9_015897.png", 94, 9, "query", "94-1"),
            Record("x/094_2_c12_000001.png", 94, 12, "gallery", "94-2"),
        ],
    ),
    "llcm/no folder datalist": (
        {
            **images(
                "vis/0001_c01_s1_f2_vis.jpg", "test_vis/0002_c02_s1_f9_vis.jpg", "test_nir/0002_c01_s1_f1_nir.jpg"
            ),
            "train.txt": "vis/0001_c01_s1_f2_vis.jpg none 0 0 0",
            "query.txt": "test_nir/0002_c01_s1_f1_nir.jpg none 2 0 0",
            "gallery.txt": "test_vis/0002_c02_s1_f9_vis.jpg none 2 0 0",
        },
        [
            Record("vis/0001_c01_s1_f2_vis.jpg", 0, 1, "train"),
            Record("test_nir/0002_c01_s1_f1_nir.jpg", 2, 1, "test", modality="nir"),
            Record("test_vis/0002_c02_s1_f9_vis.jpg", 2, 2, "test"),
        ],
    ),
    "cuhk_pedes/sentences": (
        {
            **PLAIN_IMAGES,
            "train_t2i_v2.txt": "a/1.jpg k1 1 0\na/1.jpg k2 1 0\n",
            "query_t2i_v2.txt": "a/2.jpg k2 9 0\na/3.jpg k3 8 0\n",
            "gallery_t2i_v2.txt": "a/2.jpg k2 9 0\na/3.jpg k1 8 0\n",
            "caption_t2i_v2.json": PEDES_KEYS,
        },
        [
            Record("a/1.jpg", 1, 0, "train", captions=("a man", "in black")),
            Record("a/2.jpg", 9, 0, "test", captions=("in black",)),
            Record("a/3.jpg", 8, 0, "test", captions=("a woman",)),
        ],
    ),
    "synth_pedes/trains only": (
        {**PLAIN_IMAGES, "train_t2i.txt": "a/1.jpg k1 1 0", "caption_t2i.json": PEDES_KEYS},
        [Record("a/1.jpg", 1, 0, "train", captions=("a man",))],
    ),
}


def parse(name: str, root: Path) -> list[Record]:
    return list(records(BY_NAME[name.split("/")[0]], root))


def test_table_order_and_names():
    order = "market1501 msmt17 cuhk03 prcc vc_clothes ltcc llcm cuhk_pedes synth_pedes cocas"
    assert [dataset.name for dataset in DATASETS] == order.split()
    assert list(TREES) == order.split()
    for dataset in DATASETS:
        assert set(dataset.trains) | set(dataset.protocols) <= set(TASKS)
        assert set(dataset.images) <= set(SPLITS)


def test_published_training_images_sum_to_table_9():
    left_out = (9_576 - 9_423) + (34_054 - 28_566)  # LTCC and CUHK-PEDES images the paper does not train on
    assert sum(dataset.images["train"] for dataset in DATASETS) - left_out == 4_973_044


@pytest.mark.parametrize("name", TREES | DATALISTS)
def test_exact_records(name, tmp_path):
    tree, expected = (TREES | DATALISTS)[name]
    assert parse(name, write(tmp_path, tree)) == expected


@pytest.mark.parametrize("name", TREES)
def test_empty_folder(name, tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        parse(name, tmp_path)


def rejects(name: str, tmp_path: Path, change: dict[str, object | None], message: str) -> None:
    """The tree of `name` with files changed (None: removed) is refused with this message."""
    root = write(tmp_path, {**TREES[name][0], **{file: text for file, text in change.items() if text is not None}})
    for file in (file for file, text in change.items() if text is None):
        (root / file).unlink()
    with pytest.raises(InputError) as caught:
        parse(name, root)
    assert message in str(caught.value).replace(f"{root}/", "")
    assert "\n" not in str(caught.value)


DAMAGE = [
    ("market1501", {"query/0001_c1s1_001051_00.jpg": None}, "query: no images named like 0002_c1s1_000451_03.jpg"),
    ("msmt17", {"list_val.txt": None}, "list_val.txt: no such file; unpack"),
    ("msmt17", {f"train/{TRAIN}": None}, f"list_train.txt:1: lists train/{TRAIN}, which is not in"),
    ("msmt17", {"list_train.txt": f"\n{TRAIN} x"}, "list_train.txt:2: expected a whole number, got 'x'"),
    ("msmt17", {"list_train.txt": f"{TRAIN}"}, "list_train.txt:1: expected 'path number'"),
    ("msmt17", {"list_train.txt": f"{TRAIN} -1"}, "list_train.txt:1: expected a whole number, got '-1'"),
    ("cuhk03", {"splits_new_detected.json": None}, "neither splits_new_detected.json nor cuhk03_new_protocol"),
    ("cuhk03", {"splits_new_detected.json": "[{\n]"}, "splits_new_detected.json:2: not JSON"),
    ("cuhk03", {"splits_new_detected.json": [{}]}, "splits_new_detected.json: expected [{'train': [[path, pid"),
    (
        "cuhk03",
        {CUHK03_RECORDS[1].path: None},
        "splits_new_detected.json: query[0]: lists images_detected/1_003_2_08.png",
    ),
    ("prcc", {"rgb/test/C/005/cropped_rgb002.jpg": None}, "rgb/test/C/005: no images named like cropped_rgb001.jpg"),
    ("cuhk03", {CUHK03_LIST: [{**CUHK03, "query": [["1_001_1_01.png", -5, 1]]}]}, "query[0]: expected a whole number"),
    (
        "cuhk03",
        {CUHK03_LIST: [{**CUHK03, "query": [["1_001_1_01.png", 5, True]]}]},
        "query[0]: expected a whole number",
    ),
    ("cuhk03", {CUHK03_LIST: "[" * 9999}, "detected.json: not JSON (a number too long, or brackets too deep)"),
    ("cuhk03", {CUHK03_LIST: "9" * 9999}, "detected.json: not JSON (a number too long, or brackets too deep)"),
    (
        "cuhk_pedes",
        {"reid_raw.json": [{**PEDES, "id": 3.0}]},
        "entry 0: expected a whole number, got 3.0",
    ),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "id": None}]}, "entry 0: expected a whole number, got None"),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "id": 2**31}]}, "entry 0: expected a whole number, got 2147483648"),
    (
        "cuhk_pedes",
        {"reid_raw.json": [{**PEDES, "split": ["train"]}]},
        "entry 0: split is one of",
    ),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "captions": ["\ud800"]}]}, "entry 0: expected a sentence or a list"),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "file_path": "a\x00"}]}, "entry 0: lists imgs/a\x00, which is not in"),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "file_path": "../../x"}]}, "entry 0: lists '../x', which is not below"),
    (
        "cuhk_pedes",
        {"reid_raw.json": [PEDES, {**PEDES, "id": 8}]},
        "entry 1: lists imgs/Market/1 é_c1.jpg again",
    ),
    ("synth_pedes", {"synthpedes_dataset.json": "[" + "[" * 9999}, "dataset.json: damaged after entry 0 (a number too"),
    ("llcm", {"idx/test_id.txt": "4,two"}, "idx/test_id.txt:1: expected a whole number, got 'two'"),
    ("llcm", {"idx/test_id.txt": "\n"}, "idx/test_id.txt: empty"),
    ("llcm", {"idx/test_id.txt": "2,4,7,9"}, "idx/test_id.txt: lists identity 7, of whom there is no image"),
    ("llcm", {"idx/test_id.txt": "8"}, "test_vis: no image of the identities in idx/test_id.txt"),
    ("llcm", {"idx/train_nir.txt": "nir/9.jpg 0"}, "idx/train_nir.txt:1: lists nir/9.jpg"),
    ("cuhk_pedes", {"reid_raw.json": None}, "reid_raw.json: no such file"),
    ("cuhk_pedes", {"reid_raw.json": [PEDES, {"split": "val"}]}, "reid_raw.json: entry 1: no 'file_path'"),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "split": "all"}]}, "reid_raw.json: entry 0: split is one of"),
    ("cuhk_pedes", {"reid_raw.json": [{**PEDES, "captions": 3}]}, "reid_raw.json: entry 0: expected a sentence"),
    ("cuhk_pedes", {"reid_raw.json": [{"id": 1}]}, "reid_raw.json: no 'split', and 1 entries instead of the 40,206"),
    ("synth_pedes", {"Part1/1/0.jpg": None}, "synthpedes_dataset.json: entry 0: lists Part1/1/0.jpg"),
    ("synth_pedes", {"synthpedes_dataset.json": "[{}]"}, "synthpedes_dataset.json: entry 0: expected {id, file_path"),
    (
        "cocas",
        {"real1/train.txt": "images/a.jpg templates/t1.jpg 1"},
        "real1/train.txt:1: expected 'image template pid",
    ),
    (
        "cocas",
        {"real1/train.txt": "images/a.jpg t1.jpg 1 x"},
        "real1/train.txt:1: expected a whole number, got 'x'; put tabs between the fields",
    ),
    (
        "cocas",
        {"Real2/gallery.txt": "images/g.jpg 1 8 4\nimages/g.jpg 2 8 4"},
        "gallery.txt:2: lists Real2/images/g.jpg again, as another identity or camera",
    ),
    ("cocas", {"real1/templates/t1.jpg": None}, "real1/train.txt:1: lists real1/templates/t1.jpg"),
    ("cocas", {"real1/datalist/train_attr.txt": "images/b.jpg zz 1 1"}, "train_attr.txt:1: no sentence for 'zz'"),
    ("cocas", {"real1/datalist/train_attr.txt": "images/b.jpg k1 1 7"}, "train_attr.txt:1: no line agrees with"),
    ("cocas", {"Real2/gallery.txt": None, "Real2/datalist/gallery.txt": None}, "Real2: no list of gallery images"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), DAMAGE, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(DAMAGE)]
)
def test_damaged_tree_names_place_and_mend(name, change, message, tmp_path):
    rejects(name, tmp_path, change, message)


def test_lists_with_other_separators_and_line_ends(tmp_path):
    tree, expected = TREES["msmt17"]
    for separator, end in ((",", "\r\n"), (", ", "\n"), ("\t", "\r"), ("  ", "\n\n")):
        root = write(tmp_path / repr(separator + end), tree)
        for split in ("train", "val", "query", "gallery"):
            text = str(tree[f"list_{split}.txt"]).replace("\ufeff", "").replace("\r\n\n", "\n").replace("\t", " ")
            rows = [row.replace(" ", separator) + end for row in text.splitlines()]
            (root / f"list_{split}.txt").write_bytes(b"\xef\xbb\xbf" + "".join(rows).encode())
        assert parse("msmt17", root) == expected


@pytest.mark.parametrize("name", TREES)
def test_other_case_of_folders_and_suffixes(name, tmp_path):
    def spelt(file: str) -> str:
        path = Path(file)
        return str(Path(str(path.parent).upper()) / (path.stem + path.suffix.upper()))

    tree, expected = TREES[name]
    changed = {"path": spelt, "clothes_picture": lambda file: file and spelt(file)}
    expected = [r._replace(**{field: change(getattr(r, field)) for field, change in changed.items()}) for r in expected]
    assert parse(name, write(tmp_path, {spelt(file): text for file, text in tree.items()})) == expected


def test_spelling_goes_before_case(tmp_path):
    root = write(tmp_path, TREES["vc_clothes"][0] | images("Train/0009-01-01-01.jpg", "QUERY/0009-01-01-01.jpg"))
    assert parse("vc_clothes", root) == TREES["vc_clothes"][1]


def test_links(tmp_path):
    tree, expected = TREES["market1501"]
    write(tmp_path / "elsewhere", tree)
    root = tmp_path / "set"
    root.mkdir()
    (root / "bounding_box_train").symlink_to(tmp_path / "elsewhere/bounding_box_train")
    (root / "query").symlink_to("../elsewhere/query")
    (root / "bounding_box_test").mkdir()
    for file in (tmp_path / "elsewhere/bounding_box_test").iterdir():
        (root / "bounding_box_test" / file.name).symlink_to(file)
    (root / "loop").symlink_to("loop")
    (root / "query" / "up").symlink_to("..")
    (root / "query" / "notes.txt").symlink_to("nothing")
    assert parse("market1501", root) == expected
    (root / "query" / "0001_c2s1_001051_00.jpg").symlink_to("nothing")
    with pytest.raises(InputError, match=r"query/0001_c2s1_001051_00\.jpg: a link to nothing; mend"):
        parse("market1501", root)


@pytest.mark.parametrize("name", TREES)
def test_folder_that_cannot_be_read(name, tmp_path, monkeypatch):
    root, scandir = write(tmp_path, TREES[name][0]), os.scandir

    def refuse(path):
        if Path(path) != root and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=rf"{tmp_path}/.*: cannot be read \(Permission denied\)") as caught:
        parse(name, root)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_list_that_cannot_be_read(tmp_path):
    root = write(tmp_path, TREES["msmt17"][0])
    (root / "list_val.txt").chmod(0)
    with pytest.raises(InputError, match=r"list_val\.txt: cannot be read \(Permission denied\)"):
        parse("msmt17", root)


@pytest.mark.parametrize("line", ["../../etc/passwd 0", "/etc/passwd 0", "..\\..\\..\\etc\\passwd 0"])
def test_lists_do_not_lead_out_of_the_folder(line, tmp_path):
    outside = write(tmp_path, TREES["llcm"][0] | {"etc/passwd": ""}) / "idx"
    rejects("llcm", tmp_path / "a", {"idx/train_vis.txt": line}, "idx/train_vis.txt:1: lists")
    assert outside.is_dir()


def test_lists_made_on_windows(tmp_path):
    change = {"idx/train_vis.txt": "VIS\\0001\\0001_c01_s1_f2_vis.JPG 0\r\n"}
    assert parse("llcm", write(tmp_path, TREES["llcm"][0] | change)) == TREES["llcm"][1]


def test_llcm_test_people_one_on_each_line(tmp_path):
    assert parse("llcm", write(tmp_path, TREES["llcm"][0] | {"idx/test_id.txt": "4\n2\n"})) == TREES["llcm"][1]


def test_repeated_lines(tmp_path):
    tree, expected = TREES["msmt17"]
    assert parse("msmt17", write(tmp_path, {**tree, "list_query.txt": f"{tree['list_query.txt']}" * 2})) == expected
    twice = [{**PEDES, "captions": ["A man."]}, {**PEDES, "captions": ["A coat.", "A man."]}]
    root = write(tmp_path / "pedes", {**TREES["cuhk_pedes"][0], "reid_raw.json": twice})
    assert parse("cuhk_pedes", root) == [TREES["cuhk_pedes"][1][0]._replace(captions=("A man.", "A coat."))]


@pytest.mark.parametrize("folder", ["datalist", ""])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query.txt": None},
            "no line in a list of query images (looked for query.txt, query_general.txt",
        ),
        ({"gallery.txt": "\n"}, "no line in a list of gallery images"),
        ({"train.txt": "", "query.txt": "", "gallery.txt": ""}, "no line in a list of gallery images"),
        ({"train.txt": "a/1.jpg 2 0"}, "train.txt:1: expected 'image instruction pid clothes camera', got 3 fields"),
        ({"train.txt": "a/1.jpg x y 0"}, "train.txt:1: expected a whole number, got 'y'"),
        ({"train.txt": "\na/4.jpg x 2 0"}, "train.txt:2: lists a/4.jpg, which is not in"),
        ({"train.txt": "../../1.jpg x 2 0"}, "train.txt:1: lists '../../1.jpg', which is not below"),
        ({"train.txt": "/1.jpg x 2 0"}, "train.txt:1: lists '/1.jpg', which is not below"),
        ({"query.txt": "a/2.jpg x 1 0\na/2.jpg x 2 0"}, "query.txt:2: lists a/2.jpg again, as another identity"),
    ],
)
def test_damaged_datalist(folder, change, message, tmp_path):
    lists = {f"{split}.txt": text for split, text in PLAIN.items()} | change
    write(tmp_path / folder, {name: text for name, text in lists.items() if text is not None})
    root = write(tmp_path, PLAIN_IMAGES)
    with pytest.raises(InputError) as caught:
        parse("msmt17", root)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(root / folder))


def test_datalist_needs_cameras_where_the_protocol_does(tmp_path):
    tree, _ = DATALISTS["prcc/one test split"]
    change = {**images("images/rgb_/x.jpg"), "datalist/query.txt": "images/rgb_/x.jpg white.jpg 5 1"}
    with pytest.raises(InputError, match=r"query\.txt:1: the name does not tell the camera as in PRCC"):
        parse("prcc", write(tmp_path, {**tree, **change}))


def test_datalist_without_the_sentence(tmp_path):
    tree, _ = DATALISTS["cuhk_pedes/sentences"]
    with pytest.raises(InputError, match=r"train_t2i_v2\.txt:2: no sentence for 'k2' in .*\*\.json"):
        parse("cuhk_pedes", write(tmp_path, {**tree, "caption_t2i_v2.json": {"k1": "a man"}}))


def test_one_clothes_picture_for_all_is_none(tmp_path):
    tree, expected = DATALISTS["ltcc/clothes pictures"]
    train = "x/000_1_c10_015833.png white.jpg 0 1 2\nx/000_2_c1_015834.png white.jpg 0 2 2"
    found = parse("ltcc", write(tmp_path, {**tree, "datalist/train.txt": train}))
    assert found == [record._replace(clothes_picture="") for record in expected]


@pytest.mark.parametrize("name", DATALISTS)
def test_authors_layout_goes_before_datalists(name, tmp_path):
    authors = name.split("/")[0]
    tree = {f"authors/{file}": text for file, text in TREES[authors][0].items()} | DATALISTS[name][0]
    assert find_root(BY_NAME[authors], write(tmp_path / authors, tree).parent) == tmp_path / authors / "authors"
    write(tmp_path / authors, TREES[authors][0])
    assert find_root(BY_NAME[authors], tmp_path) == tmp_path / authors
    assert parse(authors, tmp_path / authors) == TREES[authors][1]


def test_list_that_is_not_utf8(tmp_path):
    root = write(tmp_path, TREES["msmt17"][0])
    (root / "list_train.txt").write_bytes(b"caf\xe9.jpg 0")
    with pytest.raises(InputError, match=r"list_train\.txt: not UTF-8"):
        parse("msmt17", root)


def test_msmt17_paths_may_hold_spaces(tmp_path):
    odd = "0000/0000_001_15_0303 früh_0016_1.jpg"
    change = {**images(f"train/{odd}"), "list_train.txt": f"{odd} 0\n"}
    records = parse("msmt17", write(tmp_path, {**TREES["msmt17"][0], **change}))
    assert records[0] == Record(f"train/{odd}", 0, 15, "train")


def test_msmt17_v2_is_refused(tmp_path):
    (tmp_path / "mask_train_v2").mkdir()
    with pytest.raises(InputError, match="MSMT17_V2"):
        parse("msmt17", tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64, np.float64])
def test_cuhk03_from_matlab_file(kind, compressed, tmp_path):
    names = np.array([["1_001_1_01.png"], ["1_003_2_08.png"], ["1_003_1_02.png"]], dtype=object)
    table = {"filelist": names, "labels": np.array([[0], [5], [5]], kind), "camId": np.array([[1], [2], [1]], kind)}
    indices = {"train_idx": np.array([[1]]), "query_idx": np.array([[2]], kind), "gallery_idx": np.array([[3]])}
    root = write(tmp_path, CUHK03_IMAGES)
    file = root / "cuhk03_new_protocol_config_detected.mat"
    savemat(file, {"other": {"a": 1}, **table, **indices}, do_compression=compressed)
    assert parse("cuhk03", root) == CUHK03_RECORDS


def test_matlab_lists_in_their_order():
    stream, names = io.BytesIO(), np.array([["a", "b"], ["é", ""]], dtype=object)
    savemat(stream, {"names": names, "numbers": np.arange(6).reshape(2, 3) - 2.5, "text": "x y", "none": np.zeros(0)})
    found = read_matlab(stream.getvalue())
    assert found == {
        "names": ["a", "é", "b", ""],
        "numbers": [-2.5, 0.5, -1.5, 1.5, -0.5, 2.5],
        "text": ["x y"],
        "none": [],
    }


def test_cuhk03_raw_file_says_extract_first(tmp_path):
    write(tmp_path, {"cuhk03_release/cuhk-03.mat": ""})
    with pytest.raises(InputError, match=r"extract .*cuhk-03\.mat first \(expected images_detected"):
        parse("cuhk03", tmp_path)


def test_cuhk_pedes_without_splits_goes_by_order(tmp_path):
    entries = [{"file_path": f"Market/{i:05d}.jpg", "captions": ["A man."], "id": i} for i in range(40_206)]
    (tmp_path / "imgs/Market").mkdir(parents=True)
    for entry in entries:
        (tmp_path / "imgs" / str(entry["file_path"])).touch()
    records = parse("cuhk_pedes", write(tmp_path, {"caption_all.json": entries}))
    firsts = {
        split: next(record.pid for record in records if record.split == split) for split in ("train", "val", "test")
    }
    assert firsts == {"train": 0, "val": 34_054, "test": 37_132}


def test_cuhk_pedes_takes_the_list_that_has_splits(tmp_path):
    tree, expected = TREES["cuhk_pedes"]
    entries = json.loads(content) if isinstance(content := tree["reid_raw.json"], str) else content
    bare = [{key: value for key, value in entry.items() if key != "split"} for entry in entries]
    assert (
        parse("cuhk_pedes", write(tmp_path, {**tree, "reid_raw.json": bare, "caption_all.json": entries})) == expected
    )


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_stream_at_any_chunk(indent, chunk, tmp_path, monkeypatch):
    entries = [{"id": i, "captions": ["[}, é" * i]} for i in range(40)]
    monkeypatch.setattr(synth_pedes, "CHUNK", max(chunk, 400))
    monkeypatch.setattr(synth_pedes, "ENTRY", 400)
    file = tmp_path / "list.json"
    file.write_text(json.dumps(entries, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(synth_pedes.stream(file)) == entries


@pytest.mark.parametrize("text", ["", "{}", "[", "[1", "[1,", "[1 2]", "[1,2", ",1]", "[]"])
def test_json_stream_damaged(text, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match=r"list\.json: damaged after entry \d"):
        list(synth_pedes.stream(tmp_path / "list.json"))


def test_cocas_from_datalists_alone(tmp_path):
    tree = {file: text for file, text in TREES["cocas"][0].items() if Path(file).name not in ("train.txt", "query.txt")}
    del tree["Real2/gallery.txt"]
    tree["Real2/datalist/gallery_attr.txt"] = "images/g.jpg k2 1 8\n"
    assert parse("cocas", write(tmp_path, tree)) == [
        Record("real1/images/b.jpg", 1, 0, "train", "1-1", captions=("a red coat",)),
        Record("Real2/images/q.jpg", 1, 3, "query", "1-9", captions=("black trousers", "a hat")),
        Record("Real2/images/g.jpg", 1, 4, "gallery", "1-8", "vis", ("black trousers",), "Real2/crops/g.jpg"),
    ]


def test_cocas_note_beside_datalists(tmp_path):
    """A text file that is no list does not stand for one where OmniReID's lists are there."""
    tree = {name: text for name, text in TREES["cocas"][0].items() if name != "real1/train.txt"}
    plain, noted = (write(tmp_path / name, tree) for name in ("plain", "noted"))
    (noted / "real1/notes.txt").write_text("copied on Monday\n")
    assert parse("cocas", noted) == parse("cocas", plain)


def test_cocas_without_cameras_shares_none(tmp_path):
    tree = images("real2/q.jpg", "real2/g.jpg", "real2/t.jpg")
    lists = {"real2/datalist/query.txt": "q.jpg t.jpg 1 1\n", "real2/datalist/gallery.txt": "g.jpg t.jpg 1 1\n"}
    assert [record.camera for record in parse("cocas", write(tmp_path, tree | lists))] == [-1, -2]


def test_cuhk03_damaged_matlab_file(tmp_path):
    file = write(tmp_path, CUHK03_IMAGES) / "cuhk03_new_protocol_config_detected.mat"
    for content in (b"", b"no matlab file" * 20):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"config_detected\.mat: cannot read filelist.*\(not a MATLAB 5 file\)"):
            parse("cuhk03", tmp_path)
