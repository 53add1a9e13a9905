"""Mini OmniReID: ten small data sets of drawn pedestrians, each in the layout its authors distribute.

A data set is one row of `LAYOUTS`: its folder, its look, how its people are filmed (`Studio`) and how the pictures and
lists are called. Identities of different data sets are different people; within a data set several people wear the same
outfit, so that neither colours nor words name a person. Every random number comes from Philox, seeded by what it is for
(data set, person, outfit, camera or picture), so a picture is the same whichever process draws it.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from engine.data import drawing
from engine.data.drawing import Camera, Outfit, Person, Shot, Style
from engine.errors import InputError
from engine.instructions import describe

FORMAT = 3  # raise when what is drawn or written changes: older folders are then refused
TEMPLATE: drawing.Size = (96, 96)
KEPT = 0.7  # chance that an outfit is worn with the person's own shoes; the same for the bag
_PERSON, _OUTFIT, _CAMERA, _SCENERY, _SHOT, _DEAL, _TEXT, _HABIT = range(8)  # what a random stream is for


class Options(NamedTuple):
    """What decides every byte. images_per_id: of a train or test person of most data sets (LLCM: per modality, 2/3)."""

    seed: int
    train_ids: int
    test_ids: int
    images_per_id: int


class Take(NamedTuple):
    """One photograph, planned. person, outfit, camera: numbers in the data set; worn: which of the person's outfits."""

    person: int
    outfit: int
    worn: int
    camera: int
    order: int  # of the person's photographs in this split
    number: int  # of the data set's photographs: seeds the moment
    nir: bool = False


class Picture(NamedTuple):
    """One file to write: a take, or (take None) the template of an outfit."""

    file: str  # relative to the output folder
    layout: str  # of the take; not always that of the folder (CUHK-PEDES copies pictures of others)
    take: Take | None
    outfit: int = -1
    crop: str = ""  # the upper body's clothes are written here as well
    junk: bool = False


Plan = tuple[list[Picture], dict[str, bytes]]  # pictures; other files, relative to the output folder


class Layout(NamedTuple):
    """One data set. outfits: each person has between these many; plan: studio -> what to write."""

    name: str
    folder: str
    style: Style
    outfits: tuple[int, int]
    plan: Callable[[Studio], Plan]


class Studio:
    """People, outfits, cameras and moments of one data set, all pure functions of (seed, number)."""

    def __init__(self, layout: Layout, options: Options):
        self.layout, self.options = layout, options
        self._code = sum(ord(letter) * 131**i for i, letter in enumerate(layout.name)) % 2**32
        self._takes = 0
        self._shared_outfits = 0

    def key(self, *what: int) -> tuple[int, ...]:
        return (self.options.seed, self._code, *what)

    def generator(self, *what: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.key(*what))))

    @lru_cache(maxsize=1024)  # noqa: B019 - studios live as long as the process draws
    def person(self, number: int) -> Person:
        return drawing.make_person(self.generator(_PERSON, number), _gender(number))

    @lru_cache(maxsize=1024)  # noqa: B019
    def outfit(self, number: int) -> Outfit:
        return drawing.make_outfit(self.generator(_OUTFIT, number), _gender(number))

    @lru_cache(maxsize=1024)  # noqa: B019
    def worn(self, take: Take) -> Outfit:
        """The outfit as this person wears it: who changes coat and trousers mostly keeps the shoes and the bag."""
        outfit = self.outfit(take.outfit)
        if self.layout.outfits[1] == 1:
            return outfit
        own = drawing.make_outfit(self.generator(_HABIT, take.person), _gender(take.person))
        shoes, bag = self.generator(_HABIT, take.person, take.outfit).random(2) < KEPT
        return drawing.with_own(outfit, own, shoes, bag)

    @lru_cache(maxsize=64)  # noqa: B019
    def camera(self, number: int) -> Camera:
        return drawing.make_camera(self.generator(_CAMERA, number), self.layout.style, self.key(_SCENERY, number))

    def shot(self, take: Take, junk: bool = False) -> tuple[Shot, np.random.Generator]:
        """The moment of a take and the generator of its noise."""
        generator = self.generator(_SHOT, take.number)
        person, camera = self.person(take.person), self.camera(take.camera)
        return drawing.make_shot(generator, person, camera, 5.0 if junk else 1.0), generator

    def words(self, take: Take) -> dict[str, str]:
        """The 20 attributes of a take."""
        return drawing.attributes(self.person(take.person), self.worn(take), self.shot(take)[0])

    def sentences(self, take: Take, count: int) -> list[str]:
        generator, words = self.generator(_TEXT, take.number), self.words(take)
        return [describe(words, generator) for _ in range(count)]

    def film(
        self,
        people: range,
        images: int,
        schedule: Callable[[np.random.Generator, int], Sequence[tuple[int, int]]],
        nir: bool = False,
        hands: list[list[int]] | None = None,
    ) -> Iterator[Take]:
        """`images` takes of each person, round and round the schedule [(camera, worn), ...] for its outfits."""
        hands = hands or self.deal(people)
        for person, hand in zip(people, hands, strict=True):
            plan = schedule(self.generator(_DEAL, person), len(hand))
            for index in range(images):
                camera, worn = plan[index % len(plan)]
                yield Take(person, hand[worn], worn, camera, index, self._takes, nir)
                self._takes += 1

    def deal(self, people: range) -> list[list[int]]:
        """Each person's outfits: different ones for a person, each worn by about three people of the same gender."""
        generator = self.generator(_DEAL, people.start, 1)
        low, high = self.layout.outfits
        counts = {person: int(generator.integers(low, high + 1)) for person in people}
        hands: dict[int, list[int]] = {}
        for gender in (0, 1):
            cast = [person for person in people if person % 2 == gender]
            pool = max([counts[person] for person in cast] + [sum(counts[person] for person in cast) // 3, 1])
            deck: list[int] = []
            for person in cast:
                hand: list[int] = []
                while len(hand) < counts[person]:
                    free = [card for card in deck if card not in hand]
                    if not free:
                        deck += generator.permutation(pool).tolist()
                        continue
                    deck.remove(free[0])
                    hand.append(free[0])
                hands[person] = [2 * (card + self._shared_outfits) + gender for card in hand]
        self._shared_outfits += len(people) * high
        return [hands[person] for person in people]

    @property
    def train(self) -> range:
        return range(self.options.train_ids)

    @property
    def test(self) -> range:
        return range(self.options.train_ids, self.options.train_ids + self.options.test_ids)

    def labels(self, first: int) -> list[int]:
        """Identity numbers with gaps, train and test people interleaved, as data sets with one numbering have them."""
        people = self.options.train_ids + self.options.test_ids
        return (self.generator(_DEAL).permutation(people + people // 3)[:people] + first).tolist()


def _gender(number: int) -> str:
    return "male" if number % 2 else "female"


def _anywhere(cameras: Sequence[int], most: int) -> Callable[[np.random.Generator, int], list[tuple[int, int]]]:
    """Schedule: every outfit before each of `most` of the cameras; the first takes show every outfit once."""

    def schedule(generator: np.random.Generator, outfits: int) -> list[tuple[int, int]]:
        seen = sorted(generator.permutation(np.array(cameras))[:most].tolist())
        shift = int(generator.integers(len(seen)))
        return [(seen[(i + worn + shift) % len(seen)], worn) for i in range(len(seen)) for worn in range(outfits)]

    return schedule


def _fixed(*pairs: tuple[int, int]) -> Callable[[np.random.Generator, int], list[tuple[int, int]]]:
    return lambda generator, outfits: [(camera, worn % outfits) for camera, worn in pairs]


def _firsts(takes: Iterable[Take], key: Callable[[Take], object]) -> tuple[list[Take], list[Take]]:
    """Queries and gallery: the first take of each (person, key) asks, unless it is the only one."""
    takes = list(takes)
    groups: dict[object, list[Take]] = {}
    for take in takes:
        groups.setdefault((take.person, key(take)), []).append(take)
    first = {group[0].number for group in groups.values() if len(group) > 1}
    return [take for take in takes if take.number in first], [take for take in takes if take.number not in first]


def _lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def _flat(sentence: str) -> str:
    """As OmniReID's caption files have them: lower case, no punctuation, 50 words at most."""
    return " ".join(re.sub(r"[^a-z\- ]", "", sentence.lower()).split()[:50])


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _market(studio: Studio) -> Plan:
    labels, see = studio.labels(1), _anywhere(range(1, 7), min(6, studio.options.images_per_id // 2))
    query, gallery = _firsts(studio.film(studio.test, studio.options.images_per_id, see), lambda take: take.camera)
    train = list(studio.film(studio.train, studio.options.images_per_id, see))
    few = max(1, studio.options.test_ids // 8)
    start = studio.options.train_ids + studio.options.test_ids
    strangers = list(studio.film(range(start, start + few), 4, see))

    def file(folder: str, take: Take, pid: str) -> str:
        frame = (151 + 25 * take.number) % 1_000_000
        tail = f"c{take.camera}s{1 + take.number % 3}_{frame:06d}_{1 + take.order % 4:02d}.jpg"
        return f"Market-1501-v15.09.15/{folder}/{pid}_{tail}"

    pictures = [
        Picture(file(folder, take, f"{labels[take.person]:04d}"), "market1501", take)
        for folder, takes in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery))
        for take in takes
    ]
    pictures += [Picture(file("bounding_box_test", take, "0000"), "market1501", take) for take in strangers]
    for take in gallery[:: max(1, len(gallery) // (4 * few))]:
        junk = take._replace(number=take.number + 20_000)
        pictures.append(Picture(file("bounding_box_test", junk, "-1"), "market1501", junk, junk=True))
    stray = {f"Market-1501-v15.09.15/{folder}/Thumbs.db": b"\0" for folder in ("bounding_box_train", "query")}
    return pictures, stray


def _msmt17(studio: Studio) -> Plan:
    see = _anywhere(range(1, 16), min(6, studio.options.images_per_id // 2))
    train = list(studio.film(studio.train, studio.options.images_per_id, see))
    query, gallery = _firsts(studio.film(studio.test, studio.options.images_per_id, see), lambda take: take.camera)
    val = [take for take in train if take.order == studio.options.images_per_id - 1]
    train = [take for take in train if take.order < studio.options.images_per_id - 1]
    pictures, texts = [], {}
    lists = {"train": train, "val": val, "query": query, "gallery": gallery}
    for name, takes in lists.items():
        folder = "train" if name in ("train", "val") else "test"
        rows = []
        for take in takes:
            pid = take.person - (studio.options.train_ids if folder == "test" else 0)
            slot = ("morning", "noon", "afternoon")[take.number % 3]
            when = f"{301 + take.number % 29:04d}{slot}_{take.number % 9000:04d}_{take.order % 3}"
            path = f"{pid:04d}/{pid:04d}_{take.order:03d}_{take.camera:02d}_{when}.jpg"
            rows.append(f"{path} {pid}")
            pictures.append(Picture(f"MSMT17_V1/{folder}/{path}", "msmt17", take))
        texts[f"MSMT17_V1/list_{name}.txt"] = _lines(rows)
    return pictures, texts


def _cuhk03(studio: Studio) -> Plan:
    labels = studio.labels(1)
    see = _anywhere((1, 2), 2)
    images = max(4, studio.options.images_per_id - 2)
    train = list(studio.film(studio.train, images, see))
    query, gallery = _firsts(studio.film(studio.test, images, see), lambda take: take.camera)
    pictures: list[Picture] = []
    rows: dict[str, list[tuple[str, int, int]]] = {}
    for split, takes in (("train", train), ("query", query), ("gallery", gallery)):
        for take in takes:
            box = take.order // 2 + 1 + (5 if take.camera == 2 else 0)  # boxes 1-5 are of view 1, 6-10 of view 2
            name = f"{1 + take.person % 5}_{labels[take.person]:03d}_{take.camera}_{box:02d}.png"
            pictures.append(Picture(f"cuhk03/images_detected/{name}", "cuhk03", take))
            rows.setdefault(split, []).append((name, labels[take.person], take.camera))
    folder = "images_detected"
    splits = {split: [[f"{folder}/{name}", pid, cam - 1] for name, pid, cam in rows[split]] for split in rows}
    order = sorted(row for split in rows.values() for row in split)
    number = {row: i + 1 for i, row in enumerate(order)}  # MATLAB counts from 1
    config = {
        "filelist": np.array([row[0] for row in order], object)[:, None],
        "labels": np.array([[row[1]] for row in order], np.uint16),
        "camId": np.array([[row[2]] for row in order], np.uint8),
    } | {f"{split}_idx": np.array([[number[row]] for row in rows[split]], np.uint16) for split in rows}
    return pictures, {
        "cuhk03/splits_new_detected.json": _json([splits]),
        "cuhk03/cuhk03_new_protocol_config_detected.mat": _mat(config),
    }


def _mat(variables: Mapping[str, np.ndarray]) -> bytes:
    """A MATLAB 5 file whose header names no date."""
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, dict(variables))
    data = stream.getvalue()
    return b"MATLAB 5.0 MAT-file".ljust(116) + data[116:]


def _prcc(studio: Studio) -> Plan:
    labels = studio.labels(1)
    pictures = []
    for people in (studio.train, studio.test):
        count: dict[tuple[int, int], int] = {}
        for take in studio.film(people, studio.options.images_per_id, _fixed((0, 0), (1, 0), (2, 1))):
            n = count[take.person, take.camera] = count.get((take.person, take.camera), 0) + 1
            letter, pid = "ABC"[take.camera], f"{labels[take.person]:03d}"
            if people == studio.test:
                file = f"test/{letter}/{pid}/cropped_rgb{n:03d}.jpg"
            else:
                held = take.order >= studio.options.images_per_id - 2
                file = f"{'val' if held else 'train'}/{pid}/{letter}_cropped_rgb{n:03d}.jpg"
            pictures.append(Picture(f"prcc/rgb/{file}", "prcc", take))
    return pictures, {}


def _vc_clothes(studio: Studio) -> Plan:
    labels = studio.labels(1)
    see = _fixed((1, 2), (2, 0), (3, 0), (4, 1))  # same clothes before cameras 2 and 3, others before 4
    query, gallery = _firsts(studio.film(studio.test, studio.options.images_per_id, see), lambda take: take.camera)
    train = list(studio.film(studio.train, studio.options.images_per_id, see))
    pictures = []
    for split, takes in (("train", train), ("query", query), ("gallery", gallery)):
        for take in takes:
            name = f"{labels[take.person]:04d}-{take.camera:02d}-{take.worn + 1:02d}-{take.order + 1:02d}.jpg"
            pictures.append(Picture(f"VC-Clothes/{split}/{name}", "vc_clothes", take))
    return pictures, {}


def _ltcc(studio: Studio) -> Plan:
    labels, see = studio.labels(0), _anywhere(range(1, 13), 4)
    train = list(studio.film(studio.train, studio.options.images_per_id, see))
    test = list(studio.film(studio.test, studio.options.images_per_id, see))
    query, gallery = _firsts(test, lambda take: take.worn)
    pictures = []
    for split, takes in (("train", train), ("query", query), ("test", gallery)):
        for take in takes:
            name = f"{labels[take.person]:03d}_{take.worn + 1}_c{take.camera}_{1000 + 7 * take.number:06d}.png"
            crop = f"LTCC_ReID/clothes/{split}/{name}"
            pictures.append(Picture(f"LTCC_ReID/{split}/{name}", "ltcc", take, crop=crop))
    texts = {}
    for split, takes in (("train", train), ("test", test)):
        changing = {labels[take.person] for take in takes if take.worn > 0}
        for kind, pids in (("change", changing), ("unchange", {labels[take.person] for take in takes} - changing)):
            texts[f"LTCC_ReID/info/cloth-{kind}_id_{split}.txt"] = _lines(str(pid) for pid in sorted(pids))
    return pictures, texts


def _llcm(studio: Studio) -> Plan:
    labels = studio.labels(1)
    cameras = {"vis": range(1, 10), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}  # no NIR picture of camera 3 in the test set
    images = max(4, studio.options.images_per_id * 2 // 3)
    pictures, texts = [], {}
    for people, head in ((studio.train, ""), (studio.test, "test_")):
        hands = studio.deal(people)
        order = sorted(labels[person] for person in people)
        for modality, numbers in cameras.items():
            rows = []
            for take in studio.film(people, images, _anywhere(numbers, 5), modality == "nir", hands):
                pid = labels[take.person]
                name = f"{pid:04d}_c{take.camera:02d}_s{180000 + take.number}_f{100 + 20 * take.order}_{modality}.jpg"
                path = f"{head}{modality}/" + (f"cam{take.camera}/" if head else "") + f"{pid:04d}/{name}"
                rows.append(f"{path} {pid if head else order.index(pid)}")
                pictures.append(Picture(f"LLCM/{path}", "llcm", take))
            texts[f"LLCM/idx/{head}{modality}.txt" if head else f"LLCM/idx/train_{modality}.txt"] = _lines(rows)
        if head:
            texts["LLCM/idx/test_id.txt"] = _lines([",".join(str(pid) for pid in order)])
    return pictures, texts


def _cuhk_pedes(studio: Studio) -> Plan:
    """Twice the people with a third of the pictures each: sentences need many different people."""
    options = studio.options
    sizes = {"train": 2 * options.train_ids, "val": max(2, options.test_ids // 4), "test": options.test_ids}
    images, see = max(3, options.images_per_id // 3), _anywhere(range(1, 9), 4)
    # Pictures of the Market-1501 and CUHK03 test sets that CUHK-PEDES holds as well, as training images.
    copies = []
    for layout, sub in (("market1501", "Market"), ("cuhk03", "CUHK03")):
        source = [p for p in _plan(layout, options)[0] if "train" not in p.file and not p.junk and p.take]
        source = [p for p in source if p.take and p.take.person in Studio(LAYOUTS[layout], options).test]
        copies += [(sub, picture) for picture in source[:: max(1, len(source) // 6)][:6]]
    pictures, entries, start = [], [], 0
    for split, size in sizes.items():
        takes = list(studio.film(range(start, start + size), images, see))
        # (sub-folder, base name) in turn: the folders are sources and say nothing about the split.
        for take in takes:
            sub, name = (
                ("cam_a", f"{take.person:03d}_{take.order:02d}.bmp"),
                ("CUHK01", f"{take.person:04d}{take.order:03d}.png"),
                ("train_query", f"p{take.person}_s{take.number}.jpg"),
                ("test_query", f"p{take.person}_s{take.number}.jpg"),
                ("Market", f"{take.person:04d}_c{take.camera}s1_{take.number:06d}_00.jpg"),
                ("cam_b", f"{take.person:03d}_{take.order:02d}.jpg"),
                ("CUHK03", f"{take.person:04d}{take.order:03d}.jpg"),
            )[take.number % 7 if take.number % 7 or take.number % 21 == 0 else 2]
            pictures.append(Picture(f"CUHK-PEDES/imgs/{sub}/{name}", "cuhk_pedes", take))
            entries.append((split, f"{sub}/{name}", take.person + 1, studio.sentences(take, 2)))
        start += size
        if split == "train":
            for sub, picture in copies:
                assert picture.take is not None
                # 900 + : a name that no picture of this data set has; ids run on behind the training people's
                other = Studio(LAYOUTS[picture.layout], options)
                name = f"9{picture.take.number:05d}" + Path(picture.file).suffix
                pictures.append(picture._replace(file=f"CUHK-PEDES/imgs/{sub}/{name}"))
                entries.append((split, f"{sub}/{name}", start + 1, other.sentences(picture.take, 2)))
                start += 1
    raw = [
        {
            "split": split,
            "captions": captions,
            "file_path": path,
            "processed_tokens": [re.findall(r"[a-z\-]+", caption.lower()) for caption in captions],
            "id": pid,
        }
        for split, path, pid, captions in entries
    ]
    return pictures, {"CUHK-PEDES/reid_raw.json": _json(raw)}


def _synth_pedes(studio: Studio) -> Plan:
    """Twice the people with half of the pictures each, train only, in two of the eleven parts."""
    pictures, entries = [], []
    images = max(2, studio.options.images_per_id // 2)
    for take in studio.film(range(2 * studio.options.train_ids), images, _anywhere(range(1, 13), 6)):
        part = 1 if take.person < studio.options.train_ids else 2
        path = f"Part{part}/{take.person + 1}/{take.order}.jpg"
        pictures.append(Picture(f"SYNTH-PEDES/{path}", "synth_pedes", take))
        words = studio.words(take)
        prompt = f"A {words['gender code']} person with {words['hair style']} and a {words['coat color']}."
        entry = {"id": take.person + 1, "file_path": path, "attributes": list(words.values())}
        entry |= {"captions": studio.sentences(take, 2 + take.number % 2), "prompt_caption": [prompt]}
        entries.append(entry)
    return pictures, {"SYNTH-PEDES/synthpedes_dataset.json": _json(entries)}


def _cocas(studio: Studio) -> Plan:
    """Real1 trains, Real2 tests: a query shows a person and, as a template, the other outfit it shall be found in."""
    options, see = studio.options, _anywhere(range(1, 7), 4)
    pictures: list[Picture] = []
    texts: dict[str, bytes] = {}

    def shoot(real: str, takes: list[Take], kind: str) -> tuple[dict[int, str], dict[str, str]]:
        files, sentences = {}, {}
        for take in takes:
            stem = f"{take.person + 1:04d}_o{take.outfit}_c{take.camera}_{kind}{take.order:02d}"
            files[take.number] = f"images/{stem}.jpg"
            crop = f"COCAS+/real2/crops/{stem}.jpg" if kind == "g" else ""
            pictures.append(Picture(f"COCAS+/{real}/images/{stem}.jpg", "cocas", take, crop=crop))
            sentences[stem] = _flat(studio.sentences(take, 1)[0])
        return files, sentences

    def template(outfit: int) -> str:
        return f"templates/{outfit:04d}.jpg"

    def stem(file: str) -> str:
        return Path(file).stem

    train = list(studio.film(studio.train, options.images_per_id, see))
    files, sentences = shoot("real1", train, "t")
    tails = {take.number: f"{take.person + 1} {take.outfit} {take.camera}" for take in train}
    row = [(files[take.number], template(take.outfit), tails[take.number]) for take in train]
    texts["real1/train.txt"] = _lines(f"{file} {clothes} {tail}" for file, clothes, tail in row)
    texts["real1/datalist/train_ctcc.txt"] = texts["real1/train.txt"]
    texts["real1/datalist/train_attr.txt"] = _lines(f"{file} {stem(file)} {tail}" for file, _, tail in row)
    texts["real1/datalist/runner_real1_v1_gpt.json"] = _json(sentences)

    gallery = list(studio.film(studio.test, options.images_per_id, see))
    files, sentences = shoot("real2", gallery, "g")
    wardrobe: dict[tuple[int, int], list[Take]] = {}
    wearers: dict[int, set[int]] = {}
    for take in gallery:
        wardrobe.setdefault((take.person, take.worn), []).append(take)
        wearers.setdefault(take.outfit, set()).add(take.person)
    shared = sorted(key for key, takes in wardrobe.items() if len(wearers[takes[0].outfit]) > 1)
    queries, wanted = [], []
    for (person, worn), takes in wardrobe.items():
        others = [key[1] for key in shared if key[0] == person and key[1] != worn]
        if not others:
            continue
        target = wardrobe[person, others[worn % len(others)]]
        seen = {take.camera for take in target}
        camera = next((take.camera for take in takes if seen != {take.camera}), 1 + min(seen) % 6)
        number = 500_000 + 8 * person + worn
        choice = int(studio.generator(_TEXT, number).integers(len(target)))
        queries.append(takes[0]._replace(camera=camera, order=worn, number=number))
        wanted.append(target[choice])
    asked, _ = shoot("real2", queries, "q")
    asks = []
    for query, target_take in zip(queries, wanted, strict=True):
        file = asked[query.number]  # what is wanted, in other words than the gallery's
        sentences[stem(file)] = _flat(describe(studio.words(target_take), studio.generator(_TEXT, query.number, 1)))
        tail = f"{query.person + 1} {target_take.outfit} {query.camera}"
        asks.append((file, template(target_take.outfit), stem(file), tail))
    texts["real2/query.txt"] = _lines(f"{file} {clothes} {tail}" for file, clothes, _, tail in asks)
    texts["real2/datalist/query.txt"] = texts["real2/query.txt"]
    texts["real2/datalist/query_attr.txt"] = _lines(f"{file} {key} {tail}" for file, _, key, tail in asks)
    own = [(files[take.number], f"{take.person + 1} {take.outfit} {take.camera}") for take in gallery]
    texts["real2/gallery.txt"] = _lines(f"{file} {tail}" for file, tail in own)
    texts["real2/datalist/gallery.txt"] = _lines(f"{file} crops/{stem(file)}.jpg {tail}" for file, tail in own)
    texts["real2/datalist/gallery_attr.txt"] = _lines(f"{file} {stem(file)} {tail}" for file, tail in own)
    texts["real2/datalist/runner_real2_v1_gpt.json"] = _json(sentences)
    for real, takes in (("real1", train), ("real2", gallery)):
        for outfit in sorted({take.outfit for take in takes}):
            pictures.append(Picture(f"COCAS+/{real}/{template(outfit)}", "cocas", None, outfit))
    return pictures, {f"COCAS+/{name}": text for name, text in texts.items()}


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("market1501", "Market-1501-v15.09.15", Style((64, 128)), (1, 1), _market),
        Layout("msmt17", "MSMT17_V1", Style((64, 136), 0.2, light=0.95, texture=1.3), (1, 1), _msmt17),
        Layout("cuhk03", "cuhk03", Style((60, 144), 0.1, tint=0.7, blur=1.2, noise=0.0, texture=0.7), (1, 1), _cuhk03),
        Layout("prcc", "prcc", Style((64, 136), 0.08, light=1.05, texture=0.6), (2, 3), _prcc),
        Layout(
            "vc_clothes",
            "VC-Clothes",
            Style((64, 128), tint=0.6, blur=0.2, noise=0.0, texture=0.5),
            (2, 3),
            _vc_clothes,
        ),
        Layout("ltcc", "LTCC_ReID", Style((64, 136), 0.12, light=0.95, noise=0.0, texture=0.8), (1, 4), _ltcc),
        Layout("llcm", "LLCM", Style((64, 128), light=0.72, noise=1.5), (1, 1), _llcm),
        Layout("cuhk_pedes", "CUHK-PEDES", Style((62, 136), 0.15), (1, 1), _cuhk_pedes),
        Layout("synth_pedes", "SYNTH-PEDES", Style((64, 128), 0.05, tint=1.2, blur=0.7), (1, 1), _synth_pedes),
        Layout("cocas", "COCAS+", Style((64, 128), 0.05, tint=0.8), (2, 4), _cocas),
    )
}


def _plan(name: str, options: Options) -> Plan:
    layout = LAYOUTS[name]
    return layout.plan(Studio(layout, options))


@lru_cache(maxsize=16)
def _studio(name: str, options: Options) -> Studio:
    return Studio(LAYOUTS[name], options)


def _write_pictures(root: Path, options: Options, pictures: Sequence[Picture]) -> int:
    """Draw and save; returns how many. Runs in a worker process."""
    for picture in pictures:
        studio = _studio(picture.layout, options)
        file = root / picture.file
        if picture.take is None:
            _save(drawing.draw_template(studio.outfit(picture.outfit), TEMPLATE), file)
            continue
        take = picture.take
        shot, noise = studio.shot(take, picture.junk)
        person, outfit, camera = studio.person(take.person), studio.worn(take), studio.camera(take.camera)
        image, box = drawing.draw(person, outfit, camera, shot, noise, take.nir)
        _save(image, file)
        if picture.crop:
            _save(image.crop(box), root / picture.crop)
    return len(pictures)


def _save(image: Image.Image, file: Path) -> None:
    if file.suffix == ".jpg":
        image.save(file, quality=90)
    elif file.suffix == ".png":
        image.save(file, compress_level=6)
    else:
        image.save(file)


def write_mini(
    output: Path,
    *,
    seed: int = 0,
    train_ids: int = 100,
    test_ids: int = 32,
    images_per_id: int = 12,
    workers: int | None = None,
    datasets: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the mini data sets below `output`, or do nothing where they lie there already with these options.

    seed           decides every byte, together with the four sizes; the number of workers does not
    train_ids      people who train, per data set (twice as many in CUHK-PEDES and SYNTH-PEDES); at least 4
    test_ids       people who are tested, per data set, others than those who train; at least 4
    images_per_id  pictures of each, about (the layouts differ); at least 6
    workers        processes; None = one per core, at most 16
    datasets       names of LAYOUTS to write; None = all ten
    progress       called with (pictures written, pictures in all)

    Several processes may call this at once: a lock beside `output` lets one write, into a temporary folder that is
    renamed when complete. Raises InputError where `output` holds something else or was made with other options.
    """
    names = list(LAYOUTS) if datasets is None else [name for name in LAYOUTS if name in datasets]
    if unknown := sorted(set(datasets or ()) - set(LAYOUTS)):
        raise InputError(f"mini: unknown data set {', '.join(unknown)}; known: {', '.join(LAYOUTS)}")
    for name, value, least in (
        ("train_ids", train_ids, 4),
        ("test_ids", test_ids, 4),
        ("images_per_id", images_per_id, 6),
    ):
        if value < least:
            raise InputError(f"mini: {name} must be at least {least}, got {value}")
    if seed < 0:
        raise InputError(f"mini: seed must be at least 0, got {seed}")
    options = Options(seed, train_ids, test_ids, images_per_id)
    stamp = {"format": FORMAT, **options._asdict(), "datasets": names}
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name(f".{output.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _finished(output, stamp):
            return
        part = output.with_name(f".{output.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
        part.mkdir()
        _write(part, options, names, workers or min(16, len(os.sched_getaffinity(0))), progress)
        (part / "mini.json").write_text(json.dumps(stamp) + "\n")
        os.replace(part, output)


def _finished(output: Path, stamp: Mapping[str, object]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    file = output / "mini.json"
    if not file.is_file():
        raise InputError(f"{output}: exists and is no mini data; name another folder")
    try:
        found = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{file}: damaged; remove {output} to draw it again") from None
    if found != stamp:
        differ = ", ".join(
            f"{key} {found.get(key)} (asked: {value})" for key, value in stamp.items() if found.get(key) != value
        )
        raise InputError(
            f"{output}: holds mini data made with other options: {differ}; remove it or name another folder"
        )
    return True


def _write(
    root: Path, options: Options, names: Sequence[str], workers: int, progress: Callable[[int, int], None] | None
) -> None:
    pictures: list[Picture] = []
    for name in names:
        drawn, texts = _plan(name, options)
        pictures += drawn
        for folder in {os.path.dirname(file) for picture in drawn for file in (picture.file, picture.crop) if file}:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for file, data in texts.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(data)
    if "llcm" in names:
        (root / "LLCM/test_nir/cam3").mkdir()
    chunks = [pictures[i : i + 128] for i in range(0, len(pictures), 128)]
    done = 0

    def count(written: Iterable[int]) -> None:
        nonlocal done
        for number in written:
            done += number
            if progress is not None:
                progress(done, len(pictures))

    if workers == 1 or len(chunks) == 1:
        count(_write_pictures(root, options, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(min(workers, len(chunks)), multiprocessing.get_context("spawn")) as pool:
        count(pool.map(_write_pictures, [root] * len(chunks), [options] * len(chunks), chunks))


def contact_sheet(data: Path, file: Path) -> None:
    """Write a labelled overview of mini data as one picture: a row per data set, the same people side by side.

    Three test people (train people of SYNTH-PEDES) in four pictures each; COCAS+ adds its templates and crops, LTCC its
    clothes pictures and LLCM its near-infrared half. The same data give the same picture.
    """
    stamp = json.loads((data / "mini.json").read_text())
    options = Options(*(stamp[key] for key in Options._fields))
    rows: list[tuple[str, list[str]]] = []
    for name in stamp["datasets"]:
        pictures, _ = _plan(name, options)
        groups: dict[tuple[int, bool], list[Picture]] = {}
        for picture in pictures:
            take = picture.take
            if (
                take
                and picture.layout == name
                and not picture.junk
                and (name == "synth_pedes" or take.person >= options.train_ids)
            ):
                groups.setdefault((take.person, take.nir), []).append(picture)
        for nir in (False, True):
            people = [group for (_, infrared), group in groups.items() if infrared == nir][:3]
            shown = [picture for group in people for picture in _spread(group, 4)]
            if shown:
                title = LAYOUTS[name].folder.replace("-v15.09.15", "") + (" near infrared" if nir else "")
                rows.append((title, [picture.file for picture in shown]))
            if crops := [picture.crop for picture in shown if picture.crop]:
                rows.append((f"{LAYOUTS[name].folder} clothes", crops))
        if templates := [picture.file for picture in pictures if picture.take is None]:
            rows.append((f"{LAYOUTS[name].folder} templates", templates[:12]))
    cell, high, margin = (80, 160), {True: 80, False: 160}, 110
    small = [title.endswith(("clothes", "templates")) for title, _ in rows]
    sheet = Image.new("RGB", (margin + 12 * cell[0] + 2 * 12, sum(high[flag] + 4 for flag in small)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (title, files), flag in zip(rows, small, strict=True):
        pen.multiline_text((4, top + 6), title.replace(" ", "\n"), fill="black")
        for i, path in enumerate(files):
            with Image.open(data / path) as image:
                size = (cell[0] - 2, high[flag] - 2)
                sheet.paste(
                    image.convert("RGB").resize(size, Image.Resampling.BICUBIC),
                    (margin + i * cell[0] + i // 4 * 12, top),
                )
        top += high[flag] + 4
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, quality=75, optimize=True)


def _spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """`count` of one person's pictures (those with a crop, if any), spread over outfits and cameras."""
    shown = [picture for picture in pictures if picture.crop] or list(pictures)
    shown.sort(
        key=lambda picture: (picture.outfit, picture.take.worn, picture.take.camera) if picture.take else (0, 0, 0)
    )
    return [shown[i * len(shown) // count] for i in range(min(count, len(shown)))]
