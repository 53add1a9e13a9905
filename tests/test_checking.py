"""Every image looked into: what the index says of it, what is damaged and why, killed and called again, overlaps;
packed data sets that hold the same."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AS_USER, SMALL, launch, start
from conftest import recipe as recipe_run
from PIL import Image
from test_pipeline import damaged

from engine.config import TrainConfig
from engine.data import checking, packing
from engine.data import index as module
from engine.data.checking import index_folder, overlap, without_damaged_tests
from engine.data.files import Damaged, Item, decode, picture, read
from engine.data.index import Index, find_indexes, find_root, stored_index
from engine.data.loader import TrainLoader
from engine.data.packing import pack, pack_folder
from engine.data.pipeline import DecodeError
from engine.data.sampler import Sampler, make_streams
from engine.errors import InputError
from engine.evaluation import measurable, usable
from engine.model.instruction import build_tokenizer
from recipes import data as recipe

MARKET = "Market-1501-v15.09.15"


def market(folder: Path, train: int = 12, size=(8, 16), seed: int = 0) -> Path:
    """A Market-1501 of small pictures: train // 3 identities with three images each, three test identities."""
    generator = np.random.default_rng(seed)
    names = [f"bounding_box_train/{i // 3 + 1:04d}_c{i % 3 + 1}s1_{i:06d}_01.jpg" for i in range(train)]
    names += [f"{part}/{900 + i:04d}_c{(part == 'query' and 1) or 2}s1_{i:06d}_01.jpg"
              for part in ("query", "bounding_box_test") for i in range(3)]  # fmt: skip
    for name in names:
        file = folder / MARKET / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, quality=90)
    return folder


def cuhk_pedes(folder: Path, images: dict[str, Path]) -> Path:
    """CUHK-PEDES with one training image of each name, copied from a file."""
    rows = []
    for number, (name, source) in enumerate(images.items()):
        file = folder / "CUHK-PEDES" / "imgs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == file.suffix:
            file.write_bytes(source.read_bytes())
        else:
            Image.open(source).save(file)
        rows.append({"split": "train", "captions": ["a man", "the man"], "file_path": name, "id": number + 1})
    (folder / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(rows))
    return folder


def index(data: Path, threads: int = 2) -> list[str]:
    said: list[str] = []
    index_folder(data, threads=threads, say=said.append)
    return said


def stored(data: Path, name: str = "market1501") -> Index:
    [found] = find_indexes(data, [name])
    assert found.checked
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_what_the_index_says_of_an_image(tmp_path):
    data = market(tmp_path)
    (data / ".index").mkdir()
    (data / ".index" / "market1501.arrow.part1").write_bytes(b"of a process that was killed")
    index(data)
    found = stored(data)
    row = int(found.select("query")[0])
    file = found.path(row)
    facts = {name: found.table[name][row].as_py() for name in module.CHECKED}
    assert (facts["bytes"], facts["modified"]) == (file.stat().st_size, file.stat().st_mtime_ns)
    assert (facts["height"], facts["width"], facts["damaged"], facts["reason"]) == (16, 8, 0, "")
    item = found.item(row)
    assert item.crc == facts["crc"] >= 0
    assert read(item) == file.read_bytes()
    assert np.array_equal(np.asarray(picture(item)), np.asarray(Image.open(file)))
    assert contents(data / ".index").keys() == {".lock", "market1501.arrow", "quarantine.jsonl"}
    assert not (data / ".index" / "market1501.journal").exists()
    assert (data / ".index" / "quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("how", ["truncated", "half", "empty", "text", "data missing", "no size", "huge", "code table"])
def test_a_damaged_image_is_named_with_its_reason(how, tmp_path):
    data = market(tmp_path, size=(64, 128))
    bad = sorted((data / MARKET / "bounding_box_train").iterdir())[4]
    bad.write_bytes(damaged(bad.read_bytes(), how))
    said = index(data)
    found = stored(data)
    assert list(found.reasons()) == [bad]
    assert found.reasons("query") == {}
    [row] = [json.loads(line) for line in (data / ".index" / "quarantine.jsonl").read_text().splitlines()]
    assert row == {"path": str(bad), "reason": found.reasons()[bad]}
    assert row["reason"].startswith(("is ", "cannot be decoded (", "claims to have"))
    assert any(str(bad) in line and row["reason"] in line for line in said)
    assert bad not in [found.path(r) for r in found.select("train")]
    assert len(found.select("train")) == 11


def test_mended_files_are_taken_back_and_changed_ones_are_looked_into_again(tmp_path, monkeypatch):
    data = market(tmp_path)
    files = sorted((data / MARKET / "bounding_box_train").iterdir())
    whole = files[0].read_bytes()
    files[0].write_bytes(b"no picture")
    index(data)
    looked = []
    monkeypatch.setattr(checking, "read", lambda item: looked.append(item.path) or read(item))
    index(data)
    assert looked == [files[0]]  # what was damaged, and nothing else
    looked.clear()
    files[0].write_bytes(whole)
    files[1].write_bytes(files[2].read_bytes())
    new = files[5].with_name("0009_c1s1_000001_01.jpg")
    new.write_bytes(whole)
    index(data)
    assert sorted(looked) == sorted([files[0], files[1], new])
    assert stored(data).reasons() == {}
    monkeypatch.undo()
    fresh = tmp_path / "fresh"
    (data / MARKET).rename(fresh.mkdir() or fresh / MARKET)
    index(fresh)
    assert stored(fresh).table.drop(["path"]) == _reopened(data, fresh).table.drop(["path"])


def _reopened(data: Path, moved: Path) -> Index:
    """An index whose folder was moved away."""
    dataset = stored(moved).dataset
    found = Index.mapped(dataset, moved / MARKET, stored_index(data, dataset))
    assert found is not None
    return found


def test_a_bit_flipped_after_indexing_is_noticed(tmp_path):
    data = market(tmp_path)
    index(data)
    found = stored(data)
    file = found.path(0)
    content = bytearray(file.read_bytes())
    content[-20] ^= 4
    file.write_bytes(content)
    decode(bytes(content))  # it still can be decoded
    with pytest.raises(Damaged, match="not the file that was indexed"):
        read(found.item(0))
    file.unlink()
    with pytest.raises(Damaged, match="cannot be read"):
        read(found.item(0))
    assert read(Item(found.path(1)))


@pytest.mark.parametrize("name", ["a.gif", "a.txt"])
def test_other_kinds_of_file(name, tmp_path):
    file = tmp_path / name
    if name == "a.gif":
        Image.new("P", (4, 4)).save(file)
    else:
        file.write_text("a picture, or not")
    with pytest.raises(Damaged, match="is no picture"):
        decode(file.read_bytes())


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "progressive.jpg"])
def test_colours_as_pillow_decodes_them(mode, kind, tmp_path):
    if mode == "CMYK" and kind in ("png", "bmp"):
        pytest.skip("there are none")
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    file = tmp_path / f"a.{kind}"
    coarse.resize((35, 50)).convert(mode).save(file, **({"progressive": True} if "progressive" in kind else {}))
    pixels = decode(file.read_bytes())[..., :3].astype(int)
    want = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert pixels.shape == want.shape
    assert np.abs(pixels - want).max() <= 1


def test_overlap_by_content_and_by_name(tmp_path):
    data = market(tmp_path)
    query, gallery = ((data / MARKET / part) for part in ("query", "bounding_box_test"))
    train = sorted((data / MARKET / "bounding_box_train").iterdir())
    name = sorted(gallery.iterdir())[0].name
    images = {
        "cam_a/other_name.png": sorted(query.iterdir())[0],  # the same pixels in another format
        f"Market/{name}": train[0],  # other pixels, but the folder and the name tell
        f"cam_b/{name}": train[1],  # the name alone does not
        "Market/0001_c1.jpg": train[2],
        "train_query/x.jpg": train[3],
    }
    said = index(cuhk_pedes(data, images))
    found = stored(data, "cuhk_pedes")
    assert any("2 put aside as test images of Market-1501" in line for line in said)
    assert any("which are test images of cuhk03 is not known" in line for line in said)
    aside = {found.path(row).relative_to(data / "CUHK-PEDES" / "imgs").as_posix() for row in found.select("overlap")}
    assert aside == {"cam_a/other_name.png", f"Market/{name}"}
    assert len(found.select("train")) == 3
    assert list(overlap(found, [])) == []
    index(data)  # again: the same
    assert len(stored(data, "cuhk_pedes").select("overlap")) == 2


def test_sentences_and_pictures_are_stored_once(tmp_path):
    data = market(tmp_path)
    files = sorted((data / MARKET / "bounding_box_train").iterdir())
    index(cuhk_pedes(data, {f"cam_a/{i}.jpg": file for i, file in enumerate(files)}))
    found = stored(data, "cuhk_pedes")
    column = found.table["captions"].combine_chunks()
    assert column.flatten().dictionary.to_pylist() == ["a man", "the man"]
    assert found.captions(3) == ["a man", "the man"]


def test_evaluation_without_damaged_test_images(tmp_path):
    data = market(tmp_path)
    [light] = find_indexes(data)
    bad = light.path(light.select("gallery")[1])
    bad.write_bytes(b"")
    marked = without_damaged_tests(light, threads=2)
    assert bad not in [marked.path(row) for row in marked.select("gallery")]
    assert light.test_damage(True) == {}
    index(data)
    assert list(stored(data).test_damage(False)) == [bad]


def test_errors_are_one_line(tmp_path, capsys):
    data = market(tmp_path / "data")
    assert recipe.main(["pack", "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "not indexed since it was changed; run python recipes/data.py index" in capsys.readouterr().err
    assert recipe.main(["index", "--data", str(data), "--workers", "0"]) == 2
    assert "--workers 0: expected at least 1" in capsys.readouterr().err
    assert recipe.main(["index", "--data", str(data)]) == 0
    assert recipe.main(["pack", "--data", str(data), "--output", str(tmp_path / "out"), "--shard-mb", "0"]) == 2
    assert "--shard-mb 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert recipe.main(["pack", "--data", str(data), "--output", str(tmp_path / "file")]) == 2
    assert f"--output {tmp_path / 'file'}: cannot write " in capsys.readouterr().err
    changed = sorted((data / MARKET / "query").iterdir())[0]
    changed.write_bytes(changed.read_bytes() + b"x")
    assert recipe.main(["pack", "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert f"{changed}: is not the file that was indexed" in capsys.readouterr().err


def packed(tmp_path: Path, shard_bytes: int = 1 << 20, **kind) -> tuple[Index, Index]:
    data = market(tmp_path / "data", **kind)
    index(data)
    loose = stored(data)
    pack(loose, tmp_path / "packed", shard_bytes=shard_bytes)
    return loose, stored(tmp_path / "packed")


def test_a_packed_data_set_holds_the_same(tmp_path):
    loose, tight = packed(tmp_path, shard_bytes=9000)
    assert len(tight.shards) == 3
    assert tight.table.drop(["shard", "offset"]) == loose.table.drop(["shard", "offset"])
    for row in range(len(loose)):
        assert read(tight.item(row)) == read(loose.item(row))
    names = []
    for shard in tight.shards:  # ordinary tar files
        with tarfile.open(shard) as tar:
            for member in tar:
                names.append(member.name)
                assert tar.extractfile(member).read() == (loose.root / member.name).read_bytes()
    assert names == loose.table["path"].to_pylist()
    assert all(shard.stat().st_size <= 9000 + tarfile.RECORDSIZE for shard in tight.shards)


def test_packing_again_changes_nothing_and_other_content_is_packed_anew(tmp_path):
    loose, tight = packed(tmp_path, shard_bytes=9000)
    before = contents(tight.root)
    times = {file.name: file.stat().st_mtime_ns for file in tight.root.glob("*.tar")}
    (tight.root / "00099-0123456789abcdef.part1").write_bytes(b"of a process that was killed")
    pack(loose, tmp_path / "packed", shard_bytes=9000)
    assert contents(tight.root) == before
    assert {file.name: file.stat().st_mtime_ns for file in tight.root.glob("*.tar")} == times
    loose.path(0).write_bytes(loose.path(1).read_bytes())
    index(loose.root.parent)
    pack(stored(loose.root.parent), tmp_path / "packed", shard_bytes=9000)
    after = contents(tight.root)
    assert len(set(before) ^ set(after)) == 2  # one shard
    assert read(stored(tmp_path / "packed").item(0)) == loose.path(0).read_bytes()


def test_a_damaged_image_is_left_out_and_remembered(tmp_path):
    data = market(tmp_path / "data")
    bad = sorted((data / MARKET / "bounding_box_train").iterdir())[4]
    bad.write_bytes(b"no picture")
    index(data)
    pack_folder(data, tmp_path / "packed", shard_bytes=1 << 20, say=lambda line: None)
    tight = stored(tmp_path / "packed")
    assert [path.name for path in tight.reasons()] == [bad.name]
    assert len(tight.select("train")) == 11


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_packed_data_set_that_was_damaged_is_an_error(damage, tmp_path):
    _, tight = packed(tmp_path)
    file = tight.root / "index.arrow" if damage == "index" else tight.shards[0]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(InputError, match=f"{file}.*pack the data set again"):
        find_indexes(tmp_path / "packed")


def test_a_bit_flipped_in_a_shard_costs_one_image(tmp_path):
    _, tight = packed(tmp_path)
    item = tight.item(5)
    with item.shard.open("r+b") as tar:
        tar.seek(item.offset + 10)
        [byte] = tar.read(1)
        tar.seek(item.offset + 10)
        tar.write(bytes([byte ^ 1]))
    with pytest.raises(Damaged, match="not the file that was indexed"):
        read(item)
    assert read(tight.item(4))
    assert read(tight.item(6))


# A writer of small blocks, so that there is much to interrupt; it says when it begins.
WRITER = """
import sys, pathlib
from engine.config import TrainConfig
from engine.data import checking, packing
from engine.data.index import find_indexes
checking.BLOCK = 7
data, output, began = map(pathlib.Path, sys.argv[2:])
began.touch()
if sys.argv[1] == "index":
    checking.index_folder(data, threads=2, say=lambda line: None)
else:
    packing.pack(find_indexes(data)[0], output, shard_bytes=9000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["index", "pack"])
def test_killed_at_twenty_moments(what, tmp_path):
    """Kill -9 at random moments between the beginning and the end of the work; then once to the end: the same files as
    without any kill."""
    random.seed(1)
    whole, data = (market(tmp_path / name / "data", train=240) for name in ("whole", "killed"))
    for file in (whole / MARKET).rglob("*.jpg"):  # the same times, too
        twin = data / file.relative_to(whole)
        os.utime(twin, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    if what == "pack":
        index(whole)
        index(data)

    def command(folder: Path) -> list[str]:
        (folder.parent / "began").unlink(missing_ok=True)
        return [
            sys.executable,
            "-c",
            WRITER,
            what,
            str(folder),
            str(folder.parent / "out"),
            str(folder.parent / "began"),
        ]

    def begin(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (folder.parent / "began").exists() and process.poll() is None:
            time.sleep(0.001)
        return process

    process, started = begin(whole), time.monotonic()
    assert process.wait() == 0, process.stderr.read().decode()
    took = time.monotonic() - started
    interrupted = 0
    for _ in range(20):
        process = begin(data)
        time.sleep(random.uniform(0, 0.6 * took))
        interrupted += process.poll() is None
        process.kill()
        process.wait()
        if what == "index" and random.random() < 0.2:  # what is finished must be interrupted, too
            stored_index(data, find_indexes(data)[0].dataset).unlink(missing_ok=True)
    assert interrupted >= 10
    process = begin(data)
    assert process.wait() == 0, process.stderr.read().decode()
    if what == "index":
        table, other = (stored(folder).table.replace_schema_metadata() for folder in (data, whole))
        assert table == other
        assert contents(data / ".index").keys() == contents(whole / ".index").keys()
        assert not list((data / ".index").glob("*.journal"))
    else:
        assert contents(tmp_path / "killed" / "out" / "market1501.packed") == contents(
            tmp_path / "whole" / "out" / "market1501.packed"
        )


def test_what_was_not_written_as_it_should_be_is_noticed(tmp_path, monkeypatch):
    data = market(tmp_path)
    index(data)
    found = stored(data)
    monkeypatch.setattr(packing, "read", lambda item: read(item)[::-1])  # as a disk may change it
    with pytest.raises(InputError, match="does not hold what was written"):
        pack(found, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed" / "market1501.packed").iterdir()] == [".lock"]


def test_a_test_image_whose_picture_of_clothes_is_damaged_is_damaged(mini, tmp_path):
    shutil.copytree(mini / "COCAS+", tmp_path / "COCAS+")
    [found] = find_indexes(tmp_path)
    query = int(found.select("query")[0])
    found.clothes_picture(query)[0].path.write_bytes(b"")
    config = TrainConfig(model=SMALL, data=str(tmp_path), tasks=("ctcc", "li"), allow_missing=True)
    [marked], missing = usable([found], config)
    assert missing["cocas"] >= 1
    rows = {task.name: index.select("query") for task, index, _ in measurable([marked], config)[0]}
    assert query in rows["li"]  # words ask there
    assert query not in rows["ctcc"]
    assert usable([found], config.but(tasks=("li",)))[1] == {}
    index(tmp_path)
    with pytest.raises(InputError, match="test image is empty"):
        measurable([stored(tmp_path, "cocas")], config.but(allow_missing=False, tasks=("ctcc",)))
    assert measurable([stored(tmp_path, "cocas")], config.but(allow_missing=False, tasks=("li",)))[0]


def test_what_was_looked_into_before_a_kill_is_not_looked_into_again(tmp_path, monkeypatch):
    data = market(tmp_path)
    monkeypatch.setattr(checking, "BLOCK", 5)
    looked: list[Path] = []

    def killed(item: Item) -> bytes:
        if len(looked) == 12:
            raise KeyboardInterrupt
        looked.append(item.path)
        return read(item)

    monkeypatch.setattr(checking, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        index(data, threads=1)
    first = looked[:10]  # two blocks are in the journal
    looked.clear()
    monkeypatch.setattr(checking, "read", lambda item: looked.append(item.path) or read(item))
    index(data, threads=1)
    assert len(looked) == len(stored(data)) - 10
    assert not set(first) & set(looked)
    looked.clear()
    index_folder(data, threads=1, say=lambda line: None, anew=True)
    assert len(looked) == len(stored(data))


def test_what_changes_while_it_is_indexed_has_changed_since(tmp_path, monkeypatch):
    data = market(tmp_path)
    other = sorted((data / MARKET / "bounding_box_train").iterdir())[0]

    def reading(item: Item) -> bytes:
        other.with_name("0099_c1s1_000001_01.jpg").write_bytes(other.read_bytes())
        return read(item)

    monkeypatch.setattr(checking, "read", reading)
    index(data)
    [found] = find_indexes(data)
    assert not found.checked  # parsed anew
    assert len(found.select("train")) == 13


def test_one_at_a_time(tmp_path):
    data = market(tmp_path / "data")
    index(data)
    with checking.alone(data / ".index"), pytest.raises(InputError, match="another process writes there"):
        index(data)
    (tmp_path / "out" / "market1501.packed").mkdir(parents=True)
    locked = checking.alone(tmp_path / "out" / "market1501.packed")
    with locked, pytest.raises(InputError, match="another process writes there"):
        pack(stored(data), tmp_path / "out")
    (tmp_path / "out" / "market1501.packed" / "README.txt").write_text("mine")
    pack(stored(data), tmp_path / "out")
    assert (tmp_path / "out" / "market1501.packed" / "README.txt").read_text() == "mine"
    assert recipe.main(["pack", "--data", str(data), "--output", str(data)]) == 2


def test_overlap_that_comes_to_light_later(tmp_path, capsys):
    data = market(tmp_path / "market")
    query = sorted((data / MARKET / "query").iterdir())[0]
    train = sorted((data / MARKET / "bounding_box_train").iterdir())[:3]
    both = cuhk_pedes(tmp_path / "both", {"cam_a/x.jpg": query, **{f"cam_a/{i}.jpg": p for i, p in enumerate(train)}})
    index(both)
    index(data)
    for folder in (both, data):
        pack_folder(folder, tmp_path / "packed", shard_bytes=1 << 20, say=lambda line: None)
    said: list[str] = []
    assert len(find_indexes(tmp_path / "packed", say=said.append)[1].select("overlap")) == 0
    assert "indexed without market1501, whose test images it may train on" in said[0]
    assert "1 put aside" in " ".join(index(tmp_path / "packed"))
    said.clear()
    assert len(find_indexes(tmp_path / "packed", say=said.append)[1].select("overlap")) == 1
    assert said == []
    found = stored(tmp_path / "packed", "cuhk_pedes")
    assert read(found.item(found.select("overlap")[0])) == query.read_bytes()


def test_an_identity_without_an_image_left_gives_its_place_to_another(tmp_path):
    data = market(tmp_path, train=36)
    [light] = find_indexes(data)
    broken = {light.path(row) for row in light.select("train") if light.pid[row] == 3}
    for file in broken:
        file.write_bytes(b"no picture")
    sampler = Sampler(make_streams([light], ("trad",)), seed=0, ids=4, images_per_id=2)
    met: list[Path] = []
    loader = TrainLoader(
        sampler,
        TrainConfig(model=SMALL, data=str(data)),
        build_tokenizer(iter(["a person"])),
        torch.device("cpu"),
        rank=0,
        start=0,
        quarantine=lambda path, reason, step: met.append(path),
    )
    drawn = 0
    for step in range(30):
        batch, sample = loader.next()
        drawn += 2 in sampler.sample(step).labels
        assert not broken & {light.path(row) for row in sample.rows}
        assert (light.pid[sample.rows] == sample.labels + 1).all()
        assert torch.equal(batch.labels, torch.from_numpy(sample.labels))
        assert len(set(sample.labels.tolist())) == 4
    assert drawn > 3
    assert set(met) == broken
    assert len(met) == 3


def test_reasons_reach_whoever_trains(tmp_path):
    data = market(tmp_path)
    index(data)
    found = stored(data)
    assert find_root(found.dataset, data) == data / MARKET
    error = DecodeError({found.path(0): "is empty"})
    assert error.reasons == {found.path(0): "is empty"}
    assert str(error) == f"{found.path(0)} is empty"


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    times = file.parent.stat()
    if how in ("vanished", "a link to nothing"):
        file.unlink()
        if how == "a link to nothing":
            file.symlink_to("nothing")
        os.utime(file.parent, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it happened after the start
    elif how == "a bit":
        at = random.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :])
    elif how == "forbidden":
        file.chmod(0)
    elif how == "another picture":
        Image.new("RGB", (9, 9)).save(file, "png")
    elif how == "gif":
        Image.new("P", (9, 9)).save(file, "gif")
    else:
        file.write_bytes({"cut": content[: random.randrange(1, len(content))], "empty": b"", "text": b"text"}[how])


BEFORE = ("cut", "empty", "text", "gif", "forbidden")  # what an index finds
AFTER = (*BEFORE, "a bit", "vanished", "a link to nothing", "another picture")


@pytest.mark.slow
def test_training_on_a_folder_with_damaged_files(mini, tmp_path):
    """2 % of the training images and 2 % of the pictures of clothes, half of them damaged after indexing."""
    random.seed(0)
    ranks = 2
    data = shutil.copytree(mini, tmp_path / "data")
    indexes = find_indexes(data)
    files = [index.path(row) for index in indexes for row in index.select("train").tolist()]
    tested = set()
    for index in indexes:
        tested |= {index.clothes_picture(row)[0].path for row in index.select("query", "gallery").tolist()}
    pictures = [index.path(row) for index in indexes for row in index.select("picture").tolist()]
    pictures = [path for path in pictures if path not in tested]
    count = max(len(files) // 50, 2 * len(AFTER))
    chosen = random.sample(files, count) + random.sample(pictures, 2)
    early, late = set(chosen[::2]), set(chosen[1::2])
    for number, file in enumerate(early):
        damage(file, BEFORE[number % len(BEFORE)])
    assert start("recipes/data.py", "index", "--data", data, prefix=AS_USER).returncode == 0
    for number, file in enumerate(sorted(late)):
        damage(file, AFTER[number % len(AFTER)])
    model = tmp_path / "small.json"
    model.write_text(json.dumps(asdict(SMALL)))
    output, steps = tmp_path / "run", 12
    options = ["--data", data, "--config", model, "--ids", "4", "--no-eval", "--steps", str(steps), "--output", output]
    done = launch("recipes/mtl.py", *options, ranks=ranks, prefix=AS_USER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parsed" not in done.stdout
    config = TrainConfig.from_json((output / "config.json").read_text())
    streams = make_streams(find_indexes(data), config.tasks)
    sampler = Sampler(
        streams, seed=0, ids=4, images_per_id=4, world=ranks, shares=config.shares, leaders=config.leaders,
        ahead=config.ahead,
    )  # fmt: skip
    asked = set()
    for step in range(steps * (config.window or sampler.window)):
        for sample in (sampler.sample(step, rank) for rank in range(ranks)):
            index = sample.stream.index
            asked |= {index.path(row) for row in sample.rows.tolist()}
            if sample.stream.task.instruction == "clothes":
                asked |= {index.clothes_picture(row)[0].path for row in sample.instruction_rows.tolist()}
    rows = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert len({row["path"] for row in rows}) == len(rows)
    assert all(row["reason"] for row in rows)
    assert "cannot be read (Permission denied)" in {row["reason"] for row in rows if row["step"] == 0}
    assert "cannot be read (Permission denied)" in {row["reason"] for row in rows if row["step"] > 0}
    known, met = ({Path(row["path"]) for row in rows if (row["step"] == 0) == indexed} for indexed in (True, False))
    assert known == early
    assert late & asked <= met <= late  # a substitute may be damaged as well
    assert len(met) > len(late) // 2
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(1, steps + 1))


@pytest.mark.slow
def test_too_many_damaged_files_end_a_training(mini, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(mini / MARKET, data / MARKET)
    index_folder(data, threads=2, say=lambda line: None)
    for number, file in enumerate(sorted((data / MARKET / "bounding_box_train").iterdir())):
        if number % 4 == 0:
            file.write_bytes(b"")
    model = tmp_path / "small.json"
    model.write_text(json.dumps(asdict(SMALL)))
    options = ["--data", data, "--config", model, "--ids", "4", "--no-eval", "--steps", "50"]
    options += ["--output", tmp_path / "run"]
    done = recipe_run("recipes/stl.py", "--dataset", "market1501", *options)
    assert done.returncode == 2
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "damaged files among" in error
    assert "repair the data set" in error


@pytest.mark.slow
def test_damaged_test_images_in_an_evaluation(mini, tmp_path):
    """Named by the index: an error before anything is computed. Left out on request, and counted."""
    data = tmp_path / "data"
    shutil.copytree(mini / MARKET, data / MARKET)
    bad = sorted((data / MARKET / "query").glob("*.jpg"))[:3]
    for file in bad:
        file.write_bytes(b"")
    index_folder(data, threads=2, say=lambda line: None)
    model = tmp_path / "small.json"
    model.write_text(json.dumps(asdict(SMALL)))
    options = ["--data", data, "--config", model, "--ids", "4", "--steps", "1", "--quick"]
    done = recipe_run("recipes/stl.py", "--dataset", "market1501", *options, "--output", tmp_path / "refused")
    assert done.returncode == 2
    assert f"error: {bad[0]}: test image is empty (one of 3); replace the file, or measure without it" in done.stderr
    done = recipe_run(
        "recipes/stl.py", "--dataset", "market1501", *options, "--allow-missing", "--output", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "market1501: measured without 3 damaged test images" in done.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["missing"] == {"market1501": 3}
    whole = len(list((data / MARKET / "query").glob("*.jpg")))
    assert metrics["tasks"]["trad"]["market1501"]["queries"] == whole - 3
