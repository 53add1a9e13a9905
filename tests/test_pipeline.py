"""Real files through the real decoder: equal to Pillow, augmented as stated, a damaged file costs one batch at most."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.pipeline import MEAN, STD, DecodeError, PicturePipeline, Pictures, plain
from engine.data.sampler import Augmentation

CPU = torch.device("cpu")
SIZE = (128, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(8):
        coarse = generator.integers(0, 255, (16, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((64, 128), Image.Resampling.BICUBIC)
        path = folder / f"{number} ünï.{'png' if number % 4 == 3 else 'jpg'}"
        image.save(path, **({} if path.suffix == ".png" else {"quality": 90}))
        paths.append(path)
    return paths


def by_pillow(path: Path, size=SIZE, box=(0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    image = image.crop([round(v) for v in (box[0] * width, box[1] * height, box[2] * width, box[3] * height)])
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def run(pictures: Pictures, size=SIZE, **options) -> torch.Tensor:
    pipeline = PicturePipeline(lambda _: pictures, size=size, batch=len(pictures.items), device=CPU, **options)
    return pipeline.next()


def augmentation(
    count: int, flip=0.0, shift=(0.0, 0.0), erase=(0.0,) * 4, jitter=(0.0,) * 4, channels=(0, 1, 2)
) -> Augmentation:
    return Augmentation(*(np.float32([value] * count) for value in (flip, shift, erase, jitter, channels)))


def test_decoding_equals_pillow(files):
    got = run(plain(files), augment=False)
    want = torch.stack([by_pillow(path) for path in files])
    assert got.shape == (8, 3, *SIZE)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1.01 / 255 / min(STD)  # one grey level


def test_resizing_and_boxes_are_near_pillow(files):
    box = (0.125, 0.25, 0.875, 0.5)
    got = run(plain(files, [box] * len(files)), size=(32, 32), augment=False)
    want = torch.stack([by_pillow(path, (32, 32), box) for path in files])
    assert (got - want).abs().max() < 3 / 255 / min(STD)


def test_nothing_drawn_means_nothing_done(files):
    pictures = plain(files)
    assert torch.allclose(run(pictures, augment=True), run(pictures, augment=False), atol=1e-6)


def test_flip_shift_and_erase(files):
    base = run(plain(files), augment=False)
    flipped = run(Pictures(plain(files).items, plain(files).boxes, augmentation(8, flip=1.0)), augment=True)
    assert torch.allclose(flipped, base.flip(3), atol=1e-6)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    shifted = run(Pictures(plain(files).items, plain(files).boxes, augmentation(8, shift=(1.0, -1.0))), augment=True)
    assert torch.allclose(shifted[:, :, :-10, 10:], base[:, :, 10:, :-10], atol=1e-6)
    assert torch.allclose(shifted[:, :, -10:], black.view(1, 3, 1, 1).expand(8, 3, 10, 64), atol=1e-6)
    erased = run(
        Pictures(plain(files).items, plain(files).boxes, augmentation(8, erase=(0.25, 0.5, 0.5, 0.25))), augment=True
    )
    assert (erased[:, :, 32:96, 32:48] == 0).all()
    erased[:, :, 32:96, 32:48] = base[:, :, 32:96, 32:48]
    assert torch.allclose(erased, base, atol=1e-6)


def test_a_channel_stands_for_others(files):
    plain_images = run(plain(files), augment=False)
    moved = run(plain(files)._replace(augmentation=augmentation(len(files), channels=(2, 2, 0))), augment=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    grey_levels = (plain_images * std + mean)[:, [2, 2, 0]]
    assert (moved - (grey_levels - mean) / std).abs().max() < 1e-4


def test_colour_jitter_changes_colours_only_when_asked(files):
    pictures = Pictures(plain(files).items, plain(files).boxes, augmentation(8, jitter=(1.0, 0.5, -1.0, 0.2)))
    assert torch.allclose(run(pictures, augment=True), run(plain(files), augment=False), atol=1e-6)
    assert (run(pictures, augment=True, colour_jitter=0.3) - run(plain(files), augment=False)).abs().mean() > 0.1


def test_batches_keep_their_own_memory_and_order(files):
    pipeline = PicturePipeline(
        lambda number: plain([files[number % 8]]), size=SIZE, batch=1, augment=False, device=CPU, start=3
    )
    got = [pipeline.next() for _ in range(6)]
    want = run(plain(files), augment=False)
    for number, image in enumerate(got, 3):
        assert torch.equal(image[0], want[number % 8])


@pytest.mark.parametrize("decoder", ["threads", "dali"])
def test_nothing_is_asked_for_past_the_end(files, decoder):
    asked = []
    pipeline = PicturePipeline(
        lambda number: asked.append(number) or plain([files[number]]), size=SIZE, batch=1, augment=False, device=CPU,
        start=1, batches=4, decoder=decoder,
    )  # fmt: skip
    got = [pipeline.next() for _ in range(3)]
    assert torch.equal(torch.cat(got), run(plain(files[1:4]), augment=False, decoder=decoder))
    assert set(asked) == {1, 2, 3}
    if decoder == "threads":
        assert len(asked) == 3


def damaged(picture: bytes, how: str) -> bytes:
    """What a disk or a broken download makes of a JPEG file."""
    size, table, data = (picture.index(bytes([255, marker])) for marker in (0xC0, 0xC4, 0xDA))
    return {
        "truncated": picture[:200],
        "empty": b"",
        "text": b"not a picture",
        "half": picture[: len(picture) // 2],
        "data missing": picture[: data + 20],
        "cut within a marker": picture[: data + 1],
        "no size": picture[: size + 5] + bytes(4) + picture[size + 9 :],
        "huge": picture[: size + 5] + b"\xff" * 4 + picture[size + 9 :],
        "code table": picture[: table + 5] + b"\xff" * 7 + picture[table + 12 :],
    }[how]


@pytest.mark.parametrize("decoder", ["threads", "dali"])
def test_damaged_files_never_harm_the_batches_after_them(files, tmp_path, decoder):
    """The decoder's threads are at work when they are met: 100 batches of 24 pictures, a damaged one in every third."""
    how = ["truncated", "empty", "text", "half", "data missing", "cut within a marker", "no size", "huge", "code table"]
    for number, name in enumerate(how):
        (tmp_path / f"{number}.jpg").write_bytes(damaged(files[0].read_bytes(), name))

    def batch(number: int) -> list[Path]:
        paths = [files[(number + i) % 8] for i in range(24)]
        if number % 3 == 1:
            paths[number % 24] = tmp_path / f"{number // 3 % len(how)}.jpg"
        return paths

    pipeline = PicturePipeline(
        lambda number: plain(batch(number)), size=SIZE, batch=24, augment=False, device=CPU, decoder=decoder
    )
    for number in range(100):
        if number % 3 == 1:
            with pytest.raises(DecodeError) as caught:
                pipeline.next()
            assert list(caught.value.reasons) == [batch(number)[number % 24]]
        else:
            assert torch.equal(pipeline.next(), run(plain(batch(number)), augment=False, decoder=decoder))


@pytest.mark.parametrize("decoder", ["threads", "dali"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "half", "missing"])
def test_a_damaged_file_is_named_and_costs_its_batch_only(files, tmp_path, damage, decoder):
    bad = tmp_path / "bad.jpg"
    if damage != "missing":
        bad.write_bytes(damaged(files[0].read_bytes(), damage))
    batches = [files[:4], [files[0], bad, files[2], files[3]], files[4:], files[:4], files[:4]]
    pipeline = PicturePipeline(
        lambda number: plain(batches[min(number, 4)]), size=SIZE, batch=4, augment=False, device=CPU, decoder=decoder
    )
    first = pipeline.next()
    with pytest.raises(DecodeError) as caught:
        pipeline.next()
    assert list(caught.value.reasons) == [bad]
    assert torch.equal(pipeline.next(), run(plain(files[4:]), augment=False, decoder=decoder))
    assert torch.equal(pipeline.next(), first)
    assert torch.equal(pipeline.again(plain(files[:4])), first)
