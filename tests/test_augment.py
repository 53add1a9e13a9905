"""The one-pass augmentation against torch's operators and DALI's graph; its parameters, its errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data.pipeline import MEAN, STD, PicturePipeline, plain
from engine.data.sampler import Augmentation
from kernels.augment import WIDTH, Normalization, augment, augment_parameters, augment_reference

NORMALIZATION = Normalization(MEAN, STD)
LEVEL = 1 / 255 / min(STD)  # one grey level, normalised


def run(picture, how, size, **options) -> torch.Tensor:
    out = torch.full((3, *size), float("nan"))
    augment(picture, how, NORMALIZATION, out, **options)
    return out


@st.composite
def cases(draw):
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    height, width, h, w = (draw(st.integers(1, 70)) for _ in range(4))
    near = 1.0 if draw(st.booleans()) else 0.0  # sudden changes of colour, or none
    picture = (
        generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
        if near
        else np.full((height, width, 4), draw(st.integers(0, 255)), np.uint8)
    )
    steps = {
        "box": np.sort(generator.random((1, 2, 2)), axis=1).reshape(1, 4),
        "flip": generator.integers(0, 2, 1),
        "shift": generator.integers(-12, 13, (1, 2)),
        "erase": generator.random((1, 4)) * generator.integers(0, 2),
        "channels": generator.integers(0, 3, (1, 3)),
        "colours": np.concatenate([np.eye(3) + generator.normal(0, 0.4, (3, 3)), generator.normal(0, 40, (3, 1))], 1)[
            None
        ],
    }
    return picture, augment_parameters(1, **{name: steps[name] for name in steps if draw(st.booleans())})[0], (h, w)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_equals_torch_step_after_step(case):
    picture, how, size = case
    want = augment_reference(picture, how, MEAN, STD, size)
    assert (run(picture, how, size) - want).abs().max() < 0.01 * LEVEL


def test_same_bits_on_every_instruction_set():
    library = pytest.importorskip("kernels._C")
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (77, 45, 4), dtype=np.uint8)
    how = augment_parameters(1, shift=[[3, -5]], colours=generator.normal(0, 0.5, (1, 3, 4)))[0]
    try:
        results = []
        for level in range(3):
            library.limit_simd(level)
            results.append(run(picture, how, (50, 37)))
    finally:
        library.limit_simd(2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_the_extension_the_same_image():
    code = (
        "import sys; sys.modules['kernels._C'] = None\n"
        "import numpy as np, torch, warnings; warnings.simplefilter('ignore')\n"
        "from kernels.augment import *\n"
        "out = torch.empty(3, 9, 5)\n"
        "picture = np.arange(4 * 7 * 4, dtype=np.uint8).reshape(4, 7, 4)\n"
        "augment(picture, augment_parameters(1, flip=[1])[0], Normalization((0.5,) * 3, (0.2,) * 3), out)\n"
        "print(out.flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    picture = np.arange(4 * 7 * 4, dtype=np.uint8).reshape(4, 7, 4)
    out = torch.empty(3, 9, 5)
    augment(picture, augment_parameters(1, flip=[1])[0], Normalization((0.5,) * 3, (0.2,) * 3), out)
    assert torch.allclose(torch.tensor(eval(done.stdout)).view(3, 9, 5), out, atol=1e-4)


@pytest.mark.parametrize("size", [(128, 64), (61, 33), (200, 90)])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_equals_dali(size, jitter, tmp_path):
    """Both forms of the pipeline, all steps at once. DALI rounds to grey levels after resizing and after changing
    colours, which makes the first difference larger; where it shrinks a picture its weights are approximate."""
    generator = np.random.default_rng(7)
    count, files = 12, []
    for number in range(count):
        coarse = generator.integers(0, 255, (20, 10, 3), dtype=np.uint8)
        shape = [(64, 128), (50, 141), (133, 90)][number % 3]
        files.append(tmp_path / f"{number}.jpg")
        Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    boxes = np.sort(generator.random((count, 2, 2)) * 0.5 + [[[0.0], [0.5]]], axis=1).reshape(count, 4)
    drawn = Augmentation(
        generator.integers(0, 2, count).astype(np.float32),
        generator.uniform(-1, 1, (count, 2)).astype(np.float32),
        (generator.random((count, 4)) * 0.45).astype(np.float32),
        generator.uniform(-1, 1, (count, 4)).astype(np.float32),
        generator.integers(0, 3, (count, 3)).astype(np.float32),
    )
    pictures = plain(files, boxes.tolist())._replace(augmentation=drawn)
    made = [
        PicturePipeline(
            lambda _: pictures, size=size, batch=count, augment=True, device=torch.device("cpu"), colour_jitter=jitter,
            decoder=decoder,
        ).next()
        for decoder in ("threads", "dali")
    ]  # fmt: skip
    erased = [images.abs().max(1).values == 0 for images in made]
    assert torch.equal(*erased)
    assert any(erased[0].flatten(1).any(1))
    difference = (made[0] - made[1]).abs()
    assert difference.max() < (4 if jitter else 2.5) * LEVEL
    assert difference.mean() < (0.5 if jitter else 0.3) * LEVEL


def test_parameters():
    table = augment_parameters(2, shift=[[1.4, -1.6], [0, 0]])
    assert table.shape == (2, WIDTH)
    assert table.dtype == np.float32
    assert table[0, 5:7].tolist() == [1, -2]
    with pytest.raises(ValueError, match="flip: expected 1 numbers for each of 3"):
        augment_parameters(3, flip=[0, 1])
    with pytest.raises(ValueError, match="channels: expected 0, 1 or 2, got 3"):
        augment_parameters(1, channels=[[0, 3, 1]])


@pytest.mark.parametrize(
    ("picture", "how", "out", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.zeros(WIDTH, np.float32), torch.empty(3, 2, 2), "picture: expected"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(WIDTH, np.float32), torch.empty(3, 2, 2), "picture: expected"),
        (np.zeros((4, 4, 4)), np.zeros(WIDTH, np.float32), torch.empty(3, 2, 2), "picture: expected"),
        (np.zeros((4, 4, 4), np.uint8), np.zeros(WIDTH), torch.empty(3, 2, 2), "how: expected"),
        (np.zeros((4, 4, 4), np.uint8), np.zeros(WIDTH, np.float32), torch.empty(3, 2, 4)[..., ::2], "out: expected"),
        (np.zeros((4, 4, 4), np.uint8), np.zeros(WIDTH, np.float32), torch.empty(2, 2, 2), "out: expected"),
    ],
)
def test_wrong_arguments(picture, how, out, message):
    with pytest.raises(ValueError, match=message):
        augment(picture, how, NORMALIZATION, out)
