"""Mini OmniReID: the same bytes every time, the real data sets' layouts, tasks that neither words nor clothes solve."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.mini import LAYOUTS, Options, Studio, contact_sheet, write_mini
from engine.errors import InputError
from engine.instructions import ATTRIBUTES, COLOR_PHRASES, PHRASES, describe

SMALL = {"train_ids": 6, "test_ids": 6, "images_per_id": 6, "workers": 1}


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(file: Path) -> list[list[str]]:
    return [line.split(" ") for line in file.read_text().splitlines()]


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "mini"
    write_mini(root, **SMALL)
    return root


def test_two_processes_write_what_one_writes(mini: Path, tmp_path: Path) -> None:
    write_mini(tmp_path / "again", **(SMALL | {"workers": 2}))
    assert _digests(tmp_path / "again") == _digests(mini)


def test_a_data_set_alone_is_the_same_and_another_seed_is_not(mini: Path, tmp_path: Path) -> None:
    write_mini(tmp_path / "alone", datasets=["market1501"], **SMALL)
    write_mini(tmp_path / "other", datasets=["market1501"], seed=1, **SMALL)
    alone = _digests(tmp_path / "alone")
    whole = _digests(mini)
    assert all(whole[file] == digest for file, digest in alone.items() if file != "mini.json")
    pictures = {digest for file, digest in _digests(tmp_path / "other").items() if file.endswith(".jpg")}
    assert not pictures & set(alone.values())


def test_a_finished_folder_is_kept_and_other_options_are_refused(mini: Path, tmp_path: Path) -> None:
    before = (mini / "mini.json").stat().st_mtime_ns
    write_mini(mini, **(SMALL | {"workers": 2}))
    assert (mini / "mini.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"seed 0 \(asked: 5\).*remove it"):
        write_mini(mini, seed=5, **SMALL)
    (tmp_path / "mine.txt").write_text("not mini data")
    with pytest.raises(InputError, match="is no mini data"):
        write_mini(tmp_path, **SMALL)
    with pytest.raises(InputError, match="test_ids must be at least 4, got 1"):
        write_mini(tmp_path / "new", test_ids=1)
    with pytest.raises(InputError, match="unknown data set markt"):
        write_mini(tmp_path / "new", datasets=["markt"])


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mini(tmp_path / "mini", datasets=["market1501"], progress=stop, **SMALL)
    assert not (tmp_path / "mini").exists()
    write_mini(tmp_path / "mini", datasets=["market1501"], **SMALL)
    assert (tmp_path / "mini/mini.json").is_file()
    assert not (tmp_path / ".mini.part").exists()


@pytest.mark.parametrize(
    ("folder", "pattern", "count"),
    [
        ("Market-1501-v15.09.15", "bounding_box_train/????_c?s?_??????_0?.jpg", 36),
        ("Market-1501-v15.09.15", "bounding_box_test/-1_c?s?_??????_0?.jpg", 5),
        ("Market-1501-v15.09.15", "bounding_box_test/0000_*.jpg", 4),
        ("Market-1501-v15.09.15", "bounding_box_train/Thumbs.db", 1),
        ("MSMT17_V1", "train/*/*.jpg", 36),
        ("MSMT17_V1", "test/*/*.jpg", 36),
        ("cuhk03", "images_detected/*.png", 48),
        ("prcc", "rgb/test/C/*/cropped_rgb*.jpg", 12),
        ("prcc", "rgb/val/*/?_cropped_rgb*.jpg", 12),
        ("VC-Clothes", "train/*.jpg", 36),
        ("LTCC_ReID", "train/*.png", 36),
        ("LTCC_ReID", "clothes/train/*.png", 36),
        ("LLCM", "nir/*/*_nir.jpg", 24),
        ("LLCM", "test_vis/cam*/*/*_vis.jpg", 24),
        ("LLCM", "test_nir/cam3/*", 0),
        ("SYNTH-PEDES", "Part1/*/*.jpg", 18),
        ("COCAS+", "real1/images/*.jpg", 36),
    ],
)
def test_layouts(mini: Path, folder: str, pattern: str, count: int) -> None:
    assert len(list((mini / folder).glob(pattern))) == count


def test_every_listed_file_exists_and_opens(mini: Path) -> None:
    for folder, name, column in (
        ("MSMT17_V1/train", "../list_train.txt", 0),
        ("MSMT17_V1/test", "../list_gallery.txt", 0),
        ("LLCM", "idx/test_nir.txt", 0),
        *(("COCAS+/real1", "train.txt", column) for column in (0, 1)),
        *(("COCAS+/real2", f"datalist/{name}.txt", column) for name in ("query", "gallery") for column in (0, 1)),
    ):
        for row in _rows(mini / folder / name):
            with Image.open(mini / folder / row[column]) as image:
                assert image.mode == "RGB"
                assert min(image.size) >= 8
    for entry in json.loads((mini / "CUHK-PEDES/reid_raw.json").read_text()):
        assert (mini / "CUHK-PEDES/imgs" / entry["file_path"]).is_file()
        assert len(entry["captions"]) == 2
    assert (mini / "LLCM/test_nir/cam3").is_dir()


def test_train_and_test_people_differ(mini: Path) -> None:
    def pids(pattern: str, start: int = 0, end: int | None = None) -> set[str]:
        return {path.name[start:end] for path in mini.glob(pattern)}

    market = "Market-1501-v15.09.15"
    assert not pids(f"{market}/bounding_box_train/*.jpg", 0, 4) & pids(f"{market}/query/*.jpg", 0, 4)
    assert not pids("prcc/rgb/train/*") & pids("prcc/rgb/test/A/*")
    assert not pids("VC-Clothes/train/*", 0, 4) & pids("VC-Clothes/gallery/*", 0, 4)
    assert not pids("LTCC_ReID/train/*", 0, 3) & pids("LTCC_ReID/test/*", 0, 3)
    assert not pids("LLCM/vis/*") & pids("LLCM/test_vis/*/*")
    assert pids("LLCM/test_nir/*/*") == pids("LLCM/test_vis/*/*")
    people: dict[str, set[int]] = {}
    for entry in json.loads((mini / "CUHK-PEDES/reid_raw.json").read_text()):
        people.setdefault(entry["split"], set()).add(entry["id"])
    assert not people["train"] & (people["val"] | people["test"])
    assert not people["val"] & people["test"]


def test_cuhk03_lists_agree(mini: Path) -> None:
    from scipy.io import loadmat

    config = loadmat(mini / "cuhk03/cuhk03_new_protocol_config_detected.mat")
    (splits,) = json.loads((mini / "cuhk03/splits_new_detected.json").read_text())
    for split in ("train", "query", "gallery"):
        rows = config[f"{split}_idx"].ravel() - 1
        names = [f"images_detected/{config['filelist'][row, 0][0]}" for row in rows]
        columns = zip(names, config["labels"].ravel()[rows], config["camId"].ravel()[rows] - 1, strict=True)
        assert sorted([name, int(pid), int(camera)] for name, pid, camera in columns) == sorted(splits[split])


def test_some_training_images_of_cuhk_pedes_are_test_images_of_others(mini: Path) -> None:
    tests = {
        "Market": (mini / "Market-1501-v15.09.15").glob("[qb]*[yt]/*.jpg"),  # query and bounding_box_test
        "CUHK03": (mini / "cuhk03/images_detected").glob("*.png"),
    }
    training = [e for e in json.loads((mini / "CUHK-PEDES/reid_raw.json").read_text()) if e["split"] == "train"]
    for folder, files in tests.items():
        known = {file.read_bytes() for file in files}
        copies = [e for e in training if (mini / "CUHK-PEDES/imgs" / e["file_path"]).read_bytes() in known]
        assert len(copies) == 6
        assert all(e["file_path"].startswith(f"{folder}/") for e in copies)


def test_people_share_outfits(mini: Path) -> None:
    for real, name in (("real1", "train.txt"), ("real2", "gallery.txt")):
        wearers: dict[str, set[str]] = {}
        for row in _rows(mini / "COCAS+" / real / name):
            wearers.setdefault(row[-2], set()).add(row[-3])
        assert sum(len(people) > 1 for people in wearers.values()) >= len(wearers) / 2


@pytest.mark.parametrize("sizes", [(6, 6), (4, 9), (5, 12)])
def test_every_real2_query_has_positives_and_both_kinds_of_distractors(tmp_path: Path, sizes: tuple[int, int]) -> None:
    write_mini(tmp_path / "mini", datasets=["cocas"], **(SMALL | {"test_ids": sizes[0], "images_per_id": sizes[1]}))
    root = tmp_path / "mini/COCAS+/real2"
    gallery = [tuple(row[-3:]) for row in _rows(root / "datalist/gallery.txt")]
    sentences = json.loads((root / "datalist/runner_real2_v1_gpt.json").read_text())
    queries = _rows(root / "datalist/query_attr.txt")
    assert queries
    own = {sentences[row[1]] for row in _rows(root / "datalist/gallery_attr.txt")}
    studio = Studio(LAYOUTS["cocas"], Options(0, SMALL["train_ids"], *sizes))
    told = []
    for (image, key, pid, wanted, camera), row in zip(queries, _rows(root / "query.txt"), strict=True):
        assert row == [image, f"templates/{int(wanted):04d}.jpg", pid, wanted, camera]
        assert f"_o{wanted}_" not in image
        assert key == Path(image).stem
        assert sentences[key] not in own  # in other words than the gallery's
        color = studio.outfit(int(wanted)).words["coat color"].split()[0]
        told.append(any(phrase in sentences[key].split() for phrase in COLOR_PHRASES[color]))
        assert any((p, c) == (pid, wanted) and cam != camera for p, c, cam in gallery)
        assert any(p == pid and c != wanted for p, c, _ in gallery)
        assert any(p != pid and c == wanted for p, c, _ in gallery)
    assert np.mean(told) > 0.7  # a sentence may leave a colour out


def test_near_infrared_has_no_colour(mini: Path) -> None:
    for pattern in ("nir", "test_nir"):
        for file in (mini / "LLCM" / pattern).rglob("*.jpg"):
            pixels = np.asarray(Image.open(file).convert("RGB"), np.int16)
            assert (pixels.max(-1) == pixels.min(-1)).all()
    visible = np.asarray(Image.open(next((mini / "LLCM/vis").rglob("*.jpg"))).convert("RGB"), np.int16)
    assert (visible.max(-1) != visible.min(-1)).any()


def test_contact_sheet_is_deterministic(mini: Path, tmp_path: Path) -> None:
    contact_sheet(mini, tmp_path / "a.jpg")
    contact_sheet(mini, tmp_path / "b.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "a.jpg") as sheet:
        assert sheet.width <= 1200
        assert sheet.height >= 160 * len(LAYOUTS)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_phrase_of_every_word_is_said(attribute: str) -> None:
    generator = _generator(3)
    for word in ATTRIBUTES[attribute]:
        phrases = PHRASES.get(word) or COLOR_PHRASES[word.rsplit(" ", 1)[0]]
        said = [describe({attribute: word}, generator) for _ in range(120)]
        assert [phrase for phrase in phrases if not any(phrase in text for text in said)] == []


def test_describe() -> None:
    assert sum(len(words) for words in ATTRIBUTES.values()) == 92
    words = {attribute: words[0] for attribute, words in ATTRIBUTES.items()}
    texts = [describe(words, _generator(seed)) for seed in range(40)]
    assert texts == [describe(words, _generator(seed)) for seed in range(40)]
    assert len(set(texts)) == 40
    for text in texts:
        assert 1 <= text.count(".") <= 4
        assert text.endswith(".")
        assert text[0].isupper()
    assert describe({}, _generator(0)).startswith("This is a ")
    with pytest.raises(ValueError, match="'pink coat' is not a word"):
        describe({"coat color": "pink coat"}, _generator(0))
