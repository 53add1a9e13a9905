"""The column store: what is built, saved, mapped and found; describe and the data recipe on top of it."""

import errno
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import score_similarities
from test_datasets import DATALISTS, TREES, images, write

from engine.data import index as module
from engine.data.datasets import DATASETS
from engine.data.describe import describe, format_table
from engine.data.files import Item
from engine.data.index import (
    UPPER_BODY,
    WHOLE,
    Index,
    build_index,
    find_indexes,
    find_root,
    find_roots,
    fingerprint,
    stored_index,
)
from engine.errors import InputError
from engine.protocols import PROTOCOLS, group_members
from recipes import data as recipe

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def data_folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        write(tmp_path / BY_NAME[name].folders[0], TREES[name][0])
    return tmp_path


def same(a: Index, b: Index) -> bool:
    return a.table.replace_schema_metadata() == b.table.replace_schema_metadata()


@pytest.mark.parametrize("name", TREES)
def test_columns(name, tmp_path):
    expected = TREES[name][1]
    index = build_index(BY_NAME[name], write(tmp_path, TREES[name][0]))
    pictures = {record.clothes_picture for record in expected} - {"", *(record.path for record in expected)}
    assert len(index) == len(expected) + len(pictures)
    assert {index.path(row).relative_to(tmp_path).as_posix() for row in range(len(expected), len(index))} == pictures
    outfits = sorted({record.clothes for record in expected} - {""})
    for row, record in enumerate(expected):
        assert index.path(row) == tmp_path / record.path
        assert (index.pid[row], index.camera[row]) == (record.pid, record.camera)
        assert module.SPLITS[index.split[row]] == record.split
        assert module.MODALITIES[index.modality[row]] == record.modality
        assert index.captions(row) == list(record.captions)
        assert index.clothes[row] == (outfits.index(record.clothes) if record.clothes else -1)
        assert index.item(row) == Item(index.path(row))
        item, box = index.clothes_picture(row)
        assert box == (WHOLE if record.clothes_picture else UPPER_BODY)
        assert item == Item(tmp_path / (record.clothes_picture or record.path))


def test_column_types_and_batches(tmp_path, monkeypatch):
    root = write(tmp_path, TREES["ltcc"][0])
    whole = build_index(BY_NAME["ltcc"], root)
    monkeypatch.setattr(module, "BATCH", 1)
    assert same(build_index(BY_NAME["ltcc"], root), whole)
    kinds = [whole.pid.dtype, whole.camera.dtype, whole.clothes.dtype, whole.split.dtype, whole.modality.dtype]
    assert kinds == [np.int64, np.int32, np.int32, np.int8, np.int8]


def test_select(tmp_path):
    index = build_index(BY_NAME["llcm"], write(tmp_path, TREES["llcm"][0]))
    assert index.select("train").tolist() == [0, 1]
    assert index.select("test", modality="vis").tolist() == [2, 3]
    assert index.select("train", "test", modality="nir").tolist() == [1, 4]
    assert index.select("val").tolist() == []
    assert index.select("train").dtype == np.int64


def test_saved_index_is_mapped_and_the_same(tmp_path):
    root, file = write(tmp_path / "set", TREES["cocas"][0]), tmp_path / "deep" / "cocas.arrow"
    built = build_index(BY_NAME["cocas"], root)
    built.save(file)
    before = pa.total_allocated_bytes()
    opened = Index.open(BY_NAME["cocas"], root, file)
    assert pa.total_allocated_bytes() == before  # columns lie in the mapped file
    assert opened is not None
    assert same(opened, built)
    assert opened.captions(2) == built.captions(2)
    assert os.listdir(file.parent) == [file.name]


def test_a_folder_whose_name_is_not_utf8_works_without_mapping(tmp_path):
    data = tmp_path / os.fsdecode(b"d\xff")
    root, file = write(data / "prcc", TREES["prcc"][0]), data / ".index" / "prcc.arrow"
    built = build_index(BY_NAME["prcc"], root)
    built.save(file)
    assert file.is_file()
    assert same(find_indexes(data)[0], built)


def test_stale_or_damaged_index_is_not_opened(tmp_path, monkeypatch):
    dataset, file = BY_NAME["prcc"], tmp_path / "prcc.arrow"
    root = write(tmp_path / "set", TREES["prcc"][0])
    assert Index.open(dataset, root, file) is None
    build_index(dataset, root).save(file)
    assert Index.open(dataset, root, file) is not None
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 0)
        assert Index.open(dataset, root, file) is None
    write(root, images("rgb/train/001/A_cropped_rgb009.jpg"))  # four folders deep
    assert Index.open(dataset, root, file) is None
    build_index(dataset, root).save(file)
    file.write_bytes(file.read_bytes()[:-20])
    assert Index.open(dataset, root, file) is None
    file.write_bytes(b"")
    assert Index.open(dataset, root, file) is None


def test_fingerprint_ends_where_links_lead_to_each_other(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        (tmp_path / one / "link").symlink_to(tmp_path / other)
    (tmp_path / "a" / "self").symlink_to("self")
    before = fingerprint(tmp_path)
    write(tmp_path, {"b/new.txt": ""})
    assert fingerprint(tmp_path) != before


def test_fingerprint_sees_rewritten_lists_and_ends_on_link_loops(tmp_path):
    root = write(tmp_path / "set", TREES["llcm"][0])
    first = fingerprint(root)
    assert fingerprint(root) == first
    write(root, {"idx/test_id.txt": "2"})
    second = fingerprint(root)
    assert second != first
    (root / "idx" / "loop").symlink_to(root)
    assert fingerprint(root) != second


def test_find_indexes_uses_stored_until_stale(tmp_path):
    data = data_folder(tmp_path, "vc_clothes")
    [built] = find_indexes(data)
    built.save(stored_index(data, built.dataset))
    [stored] = find_indexes(data)
    assert stored.table.schema.metadata
    write(stored.root, images("train/0009-01-01-01.jpg"))
    [rebuilt] = find_indexes(data)
    assert not rebuilt.table.schema.metadata
    assert len(rebuilt) == len(built) + 1


def test_find_indexes_order_and_names(tmp_path):
    data = data_folder(tmp_path, *reversed(TREES))
    assert [index.name for index in find_indexes(data)] == list(TREES)
    assert [index.name for index in find_indexes(data, ["llcm", "prcc"])] == ["prcc", "llcm"]


@pytest.mark.parametrize("nested", ["market1501/Market-1501-v15.09.15", "MARKET/ärger 1", "market-1501"])
def test_nested_and_differently_spelt_folders(nested, tmp_path):
    write(tmp_path / nested, TREES["market1501"][0])
    write(tmp_path / Path(nested).parts[0] / ".cache", images("x"))
    [index] = find_indexes(tmp_path)
    assert index.root == tmp_path / nested
    assert all(index.path(row).is_file() for row in range(len(index)))


def test_first_folder_name_wins(tmp_path):
    for folder in ("prcc", "PRCC"):
        (tmp_path / folder).mkdir()
    assert find_root(BY_NAME["prcc"], tmp_path) == tmp_path / "prcc"


def test_first_copy_that_can_be_read_wins(tmp_path):
    dataset = BY_NAME["market1501"]
    for folder in (*dataset.folders, "MARKET1501"):
        (tmp_path / folder).mkdir()
    assert find_root(dataset, tmp_path) == tmp_path / dataset.folders[0]
    write(tmp_path / "market", DATALISTS["market1501/cameras in names"][0])
    assert find_root(dataset, tmp_path) == tmp_path / "market"
    write(tmp_path / "MARKET1501" / "copy", TREES["market1501"][0])
    assert find_root(dataset, tmp_path) == tmp_path / "MARKET1501" / "copy"
    [index] = find_indexes(tmp_path)
    assert len(index) == len(TREES["market1501"][1])


def test_real1_and_real2_without_a_folder_around_them(tmp_path):
    data = write(data_folder(tmp_path, "prcc"), TREES["cocas"][0])
    indexes = find_indexes(data)
    assert [index.name for index in indexes] == ["prcc", "cocas"]
    assert indexes[1].root == data
    assert same(indexes[1], build_index(BY_NAME["cocas"], write(tmp_path / "other", TREES["cocas"][0])))
    indexes[1].save(stored_index(data, indexes[1].dataset))
    write(data, images("LLCM/vis/x.jpg"))  # what lies beside them makes no difference
    assert find_indexes(data, ["cocas"])[0].table.schema.metadata
    write(data, images("real1/images/c.jpg"))
    assert not find_indexes(data, ["cocas"])[0].table.schema.metadata


@pytest.mark.parametrize("name", DATALISTS)
def test_datalists_are_found_and_indexed(name, tmp_path):
    tree, expected = DATALISTS[name]
    dataset = BY_NAME[name.split("/")[0]]
    write(tmp_path / dataset.folders[-1] / "deeper", tree)
    [index] = find_indexes(tmp_path)
    paths = [index.path(row).relative_to(index.root).as_posix() for row in range(len(index))]
    assert paths[: len(expected)] == [record.path for record in expected]
    assert set(paths[len(expected) :]) <= {record.clothes_picture for record in expected}
    index.save(stored_index(tmp_path, dataset))
    assert find_indexes(tmp_path)[0].table.schema.metadata
    assert {row["split"] for row in describe(tmp_path)} == {record.split for record in expected}


def test_without_cameras_no_positive_is_junk(tmp_path):
    lists = {
        "datalist/query.txt": "a.jpg x 1 0\nb.jpg x 2 0",
        "datalist/gallery.txt": "c.jpg x 1 0\nd.jpg x 2 0\ne.jpg x 2 0\na.jpg x 1 0",
    }
    tree = images("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    similarity = np.array([[0.2, 0.9, 0.1, 0.8], [0.1, 0.7, 0.2, 0.3]])  # gallery: a c d e
    for name in ("market1501", "msmt17", "cuhk03"):
        [index] = find_indexes(write(tmp_path / name / BY_NAME[name].folders[0], tree | lists).parent)
        protocol = PROTOCOLS[name]
        [trial] = protocol.trials(index)
        assert not group_members(trial, index, protocol).junk.any()
        metrics = score_similarities(trial, index, protocol, similarity)
        assert metrics.queries == 2
        # query a: c, e, a, d -> positives at 1 and 3; query b: c, e, d, a -> at 2 and 3
        assert metrics.mAP == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)


def test_cameras_in_names_make_junk_as_in_the_authors_layout(tmp_path):
    files = ["query/0001_c1s1_000001_00.jpg", "bounding_box_train/0002_c1s1_000001_00.jpg"]
    files += [f"bounding_box_test/0001_c{camera}s1_000002_00.jpg" for camera in (1, 2, 3)]
    files += [f"bounding_box_test/{pid}_c1s1_000003_00.jpg" for pid in ("0000", "-1", "0005")]
    rows = {split: [] for split in ("query", "train", "gallery")}
    for file in files:
        split = file.split("/")[0].removeprefix("bounding_box_").replace("test", "gallery")
        pid = int(Path(file).name.split("_")[0])
        rows[split].append(f"x/{file} none {pid} {pid}")
    lists = {f"datalist/{split}.txt": "\n".join(lines) for split, lines in rows.items()}
    write(tmp_path / "authors" / "market", images(*files))
    write(tmp_path / "lists" / "market", images(*(f"x/{file}" for file in files)) | lists)
    protocol, metrics = PROTOCOLS["market1501"], []
    for folder in ("authors", "lists"):
        [index] = find_indexes(tmp_path / folder)
        [trial] = protocol.trials(index)
        assert group_members(trial, index, protocol).junk.tolist() == [True, False, False]
        metrics.append(score_similarities(trial, index, protocol, np.linspace(0, 1, len(trial.gallery))[None]))
    assert metrics[0].mAP == metrics[1].mAP


@pytest.mark.parametrize("name", ["prcc/one test split", "vc_clothes/suffix", "llcm/no folder datalist"])
def test_protocols_on_datalists(name, tmp_path):
    """Those that ask for cameras by number or for modalities find them."""
    dataset = BY_NAME[name.split("/")[0]]
    [index] = find_indexes(write(tmp_path / dataset.folders[0], DATALISTS[name][0]).parent)
    protocol = {"prcc": "prcc:single", "vc_clothes": "vc_clothes:sc", "llcm": "llcm:ir2vis"}[dataset.name]
    trials = PROTOCOLS[protocol].trials(index)
    assert all(len(trial.query) == len(trial.gallery) == 1 for trial in trials)


def test_data_folders_that_are_none(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for path, message in (("file", "a folder is expected"), ("loop", "no such folder"), ("dangling", "no such folder")):
        with pytest.raises(InputError, match=f"--data {tmp_path / path}: {message}"):
            find_roots(tmp_path / path)
    (tmp_path / "prcc").touch()  # a file of a data set's name is none
    (tmp_path / "real1").touch()  # nor is a file of the name of COCAS+'s parts, which may lie in the data folder
    with pytest.raises(InputError, match="no known data set in it"):
        find_roots(tmp_path)


def test_data_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match=rf"{tmp_path}: cannot be read \(Permission denied\)"):
        find_roots(tmp_path)


def test_data_folder_that_is_a_data_set_itself(tmp_path):
    root = write(tmp_path / "Market-1501", TREES["market1501"][0])
    with pytest.raises(InputError, match="it looks like Market-1501 itself: give the folder that holds it"):
        find_roots(root)


def test_find_indexes_errors(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_indexes(tmp_path / "none")
    with pytest.raises(InputError, match=r"no known data set in it \(looked for Market-1501-v15.09.15, MSMT17_V1"):
        find_indexes(tmp_path)
    with pytest.raises(InputError, match=r"--dataset prcc: not found in .* \(looked for the folders prcc, PRCC\)"):
        find_indexes(tmp_path, ["prcc"])
    with pytest.raises(InputError, match="--dataset mars: unknown; choose from market1501, "):
        find_roots(tmp_path, ["mars"])
    (tmp_path / "LLCM").mkdir()
    with pytest.raises(InputError, match=r"LLCM/idx/train_vis\.txt: no such file"):
        find_indexes(tmp_path)


def test_describe(tmp_path):
    rows = describe(data_folder(tmp_path, "ltcc", "cocas", "synth_pedes"))
    assert [(row["dataset"], row["split"]) for row in rows] == [
        ("ltcc", "train"),
        ("ltcc", "query"),
        ("ltcc", "gallery"),
        ("synth_pedes", "train"),
        ("cocas", "train"),
        ("cocas", "query"),
        ("cocas", "gallery"),
        ("cocas", "query+gallery"),
    ]
    counts = ("images", "published", "identities", "cameras", "outfits", "captions")
    assert [rows[0][key] for key in counts] == [2, 9_576, 1, 2, 2, 0]
    assert [rows[3][key] for key in counts] == [2, 4_791_771, 2, 1, 0, 3]
    assert [rows[7][key] for key in counts] == [2, 14_449, 1, 2, 2, 2]
    assert rows[0]["trains"] == ("cc", "ctcc")
    table = format_table(rows)
    assert "9,576*" in table
    assert "* not the published number" in table
    rows = [{**row, "published": row["images"]} for row in rows]
    assert "*" not in format_table(rows)


def test_recipe_index_and_describe(tmp_path, capsys):
    data = data_folder(tmp_path, "market1501", "cuhk_pedes")
    assert recipe.main(["index", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "market1501: 5 images, 5 damaged, " in said  # their content is none
    assert f"{data}/Market-1501-v15.09.15/bounding_box_test/" in said
    assert sorted(os.listdir(data / ".index")) == [".lock", "cuhk_pedes.arrow", "market1501.arrow", "quarantine.jsonl"]
    assert recipe.main(["describe", "--data", str(data)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["market1501", "gallery", "2", "15,913*", "2", "2", "2", "-", "-"] in table


def test_recipe_errors_are_one_line(tmp_path, capsys):
    assert recipe.main(["describe", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data ")
    assert error.count("\n") == 1
    data = data_folder(tmp_path, "market1501")
    (data / ".index").write_text("in the way")
    assert recipe.main(["index", "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data / '.index'}")
    assert error.count("\n") == 1


def test_recipe_help_states_the_defaults_of_write_mini(capsys):
    from engine.data.mini import write_mini

    with pytest.raises(SystemExit):
        recipe.main(["mini", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("seed", "train_ids", "test_ids", "images_per_id"):
        default = inspect.signature(write_mini).parameters[name].default
        assert f"(default: {default})" in text.split(f"--{name.replace('_', '-')} N ")[-1].split("--")[0]


def test_recipe_runs_as_a_script_from_anywhere(tmp_path):
    script = Path(recipe.__file__)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = [
        "--output",
        "mini",
        "--train-ids",
        "4",
        "--test-ids",
        "4",
        "--images-per-id",
        "12",
        "--sheet",
        "sheet.jpg",
    ]
    command = [sys.executable, str(script), "mini", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.jpg").is_file()
    # the drawn data: every parser finds every task's splits, and every picture it names exists
    indexes = find_indexes(tmp_path / "mini")
    assert [index.name for index in indexes] == list(TREES)
    for index in indexes:
        assert len(index.select("train"))
        assert all(
            index.clothes_picture(row)[0].path.is_file() and index.path(row).is_file() for row in range(len(index))
        )
