"""VC-Clothes: 19,060 images of 512 rendered people (a video game's), four cameras, one to three outfits each.

    VC-Clothes/{train,query,gallery}/0227-02-01-05.jpg

A name is identity, camera 1-4, outfit of that identity, image; the outfit key is "<pid>-<outfit>".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.datasets._base import DataSet, Files
from engine.data.record import Record

NAME = re.compile(r"([0-9]{1,9})-([0-9]{1,9})-([0-9]{1,9})-[0-9]+(?i:\.jpg)")


def parse(root: Path) -> Iterator[Record]:
    files = Files(root)
    for split in ("train", "query", "gallery"):
        for path, name in files.match(split, NAME, "0227-02-01-05.jpg"):
            pid, camera, clothes = map(int, name.groups())
            yield Record(path, pid, camera, split, clothes=f"{pid}-{clothes}")


DATASET = DataSet(
    name="vc_clothes",
    title="VC-Clothes",
    folders=("VC-Clothes", "VC_Clothes", "vc_clothes", "vcclothes"),
    holds=("query", "gallery"),
    parse=parse,
    trains=("cc",),
    protocols={"cc": ("vc_clothes:general", "vc_clothes:sc", "vc_clothes:cc")},
    images={"train": 9_449, "query": 1_020, "gallery": 8_591},
    told=re.compile(r"[0-9]+-(?P<camera>[0-9]{1,9})-[0-9]+-[^/]*$"),
)
