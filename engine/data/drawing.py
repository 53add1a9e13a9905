"""Pedestrians drawn with Pillow: who (`Person`), dressed how (`Outfit`), where (`Camera`), at which moment (`Shot`).

A person is what clothes do not change: proportions, skin, hair, face, gait, all continuous, so that people never met
before can be told apart. An outfit is what many people may wear. A camera adds its place, light, colour and blur. The
body is a stick figure in three dimensions, turned by the yaw (0 = facing the camera, 90 = walking to the right of the
picture, 180 = seen from the back), dressed with polygons from the farthest part to the nearest, drawn at twice the
size and averaged down. Near infrared repaints every material with a reflectance of its own and drops the colour.

Lengths of the body are fractions of its height; x points to the person's left, y up from the ground, z forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Point = tuple[float, float]  # pixels of the large canvas
Size = tuple[int, int]  # width, height in pixels
Palette = dict[str, RGB]
SCALE = 2  # the figure is drawn this many times larger than the picture

COLORS: dict[str, RGB] = {
    "black": (34, 34, 40),
    "blue": (45, 85, 180),
    "gray": (132, 132, 134),
    "green": (48, 132, 72),
    "purple": (122, 62, 150),
    "red": (192, 44, 50),
    "white": (234, 234, 230),
    "yellow": (230, 190, 58),
}
_HAIR: tuple[RGB, ...] = ((22, 20, 24), (66, 40, 26), (132, 58, 26), (186, 108, 44), (226, 190, 108))
_SKIN: tuple[RGB, ...] = ((250, 220, 198), (226, 176, 136), (178, 120, 80), (98, 62, 44))


class Person(NamedTuple):
    """What clothes do not change. Lengths are fractions of the body height; the rest is in [0, 1] unless it says."""

    gender: str  # "female" | "male" | "agnostic gender"
    age: str  # "adult" | "child" | "old"
    height: float  # of the picture's height that an average camera gives the person
    legs: float
    head: float
    face: float  # width of the head / its height
    shoulders: float  # half widths
    hips: float
    girth: float  # thickness of limbs and depth of the trunk
    skin: RGB
    hair: RGB
    hair_length: float  # 0 = bald, < 0.5 short, 1 = to the middle of the back
    hair_volume: float
    fringe: float  # how far it covers the forehead
    tail: float  # > 0.6: long hair is tied
    beard: float
    brow: float
    glasses: bool
    stride: float  # swing of the legs, radians
    arms: float  # how far from the body the arms are carried
    stance: float  # distance between the feet
    stoop: float  # forward lean, radians


class Outfit(NamedTuple):
    """Words of the 20 attributes (engine/instructions.py) that clothes decide, and the shades the words leave open."""

    words: dict[str, str]
    coat: RGB
    coat2: RGB  # of the pattern
    pattern: str  # "plain" | "stripes" | "bars" | "checks" | "print" | "yoke"
    trousers: RGB
    shoes: RGB
    bag: RGB
    hat: RGB
    nir: tuple[float, ...]  # reflectance of coat, pattern, trousers, shoes, bag, hat in near infrared, [0, 1]


class Style(NamedTuple):
    """How one data set looks. size: mean picture; spread: relative variation of size; the rest scale the cameras'."""

    size: Size
    spread: float = 0.0
    tint: float = 1.0
    light: float = 1.0
    blur: float = 1.0
    noise: float = 1.0
    texture: float = 1.0


class Camera(NamedTuple):
    """A place and a lens."""

    seed: tuple[int, ...]  # of the scenery
    style: Style
    base: RGB  # of the scenery
    horizon: float  # fraction of the picture's height
    gain: tuple[float, float, float]
    gamma: float
    slope: tuple[float, float]  # light falling from the left / from above, relative
    blur: float  # radius, pixels
    noise: float  # standard deviation, grey levels
    yaw: tuple[float, ...]  # directions people walk in here, degrees
    zoom: float


class Shot(NamedTuple):
    """One moment of one person before one camera."""

    size: Size
    yaw: float  # degrees
    phase: float  # of the gait, radians
    effort: float  # of the person's stride
    place: tuple[float, float]  # of the feet, fractions of the picture
    height: float  # of the body, fraction of the picture's height
    stoop: float
    gain: float
    umbrella: bool
    smoking: bool
    hidden: str  # "" | "left" | "right" | "low": what stands before the person
    scenery: float  # where in the camera's scenery, [0, 1]


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def _path(stops: tuple[RGB, ...], t: float) -> RGB:
    at = min(t, 0.9999) * (len(stops) - 1)
    return _mix(stops[int(at)], stops[int(at) + 1], at % 1)


def _shade(color: RGB, factor: float) -> RGB:
    return (min(255, int(color[0] * factor)), min(255, int(color[1] * factor)), min(255, int(color[2] * factor)))


def _pick(generator: np.random.Generator, weights: dict[str, float]) -> str:
    edges = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))]


def make_person(generator: np.random.Generator, gender: str) -> Person:
    """Draw the latents of a "female" or "male" person."""
    u = generator.random(24).tolist()
    woman = gender == "female"
    age = "child" if u[0] < 0.1 else "old" if u[0] < 0.24 else "adult"
    hair = _path(_HAIR, u[1])
    gray = u[2] if age == "old" else max(0.0, u[2] - 0.75)
    length = 0.0 if not woman and u[3] < 0.14 else (0.45 + 0.55 * u[4] if woman else 0.14 + 0.5 * u[4] ** 2)
    return Person(
        gender="agnostic gender" if u[5] < 0.06 else gender,
        age=age,
        height=(0.62 if age == "child" else 0.75) + 0.16 * u[6],
        legs=0.42 + 0.12 * u[7],
        head=0.155 + 0.055 * u[8] + (0.03 if age == "child" else 0.0),
        face=0.68 + 0.3 * u[9],
        shoulders=(0.088 if woman else 0.1) + 0.058 * u[10],
        hips=(0.07 if woman else 0.062) + 0.055 * u[11],
        girth=0.04 + 0.058 * u[12],
        skin=_path(_SKIN, u[13]),
        hair=_mix(hair, (205, 205, 208), min(1.0, 1.1 * gray)),
        hair_length=length,
        hair_volume=u[14],
        fringe=u[15],
        tail=u[16],
        beard=0.0 if woman or age == "child" else max(0.0, 1.8 * u[17] - 0.8),
        brow=u[18],
        glasses=u[19] < 0.24,
        stride=0.12 + 0.42 * u[20],
        arms=0.25 * u[21] ** 1.5,
        stance=0.015 + 0.06 * u[22],
        stoop=0.16 * (u[23] - 0.4) + (0.16 if age == "old" else 0.0),
    )


def make_outfit(generator: np.random.Generator, gender: str) -> Outfit:
    """Draw clothes, shoes, bag and hat that a "female" or "male" person may wear."""
    woman = gender == "female"
    pick = lambda **weights: _pick(generator, {key.replace("_", " "): w for key, w in weights.items()})  # noqa: E731
    style = _pick(
        generator,
        {"business suit": 1, "dress": 2.0 * woman, "jacket": 3, "long coat": 1.5, "shirt": 2, "sweater": 2}
        | {"t-shirt": 3, "agnostic style coat": 0.3},
    )
    sleeves = "long sleeve coat"
    if style == "t-shirt":
        sleeves = pick(short_sleeve_coat=5, bareback_coat=1)
    elif style in ("dress", "shirt"):
        sleeves = pick(long_sleeve_coat=1, short_sleeve_coat=1, bareback_coat=0.4 * woman)
    elif style == "agnostic style coat":
        sleeves = "agnostic length coat"
    uniform = "office uniform" if style == "business suit" else "common clothing"
    if style in ("jacket", "shirt") and sleeves == "long sleeve coat" and generator.random() < 0.24:
        uniform = pick(
            chef_uniform=1, firefighter_uniform=1, medical_uniform=1, worker_uniform=1.4, agnostic_uniform=0.3
        )
    fixed = {"chef uniform": "white", "medical uniform": "white", "worker uniform": "yellow"}
    color = {
        part: str(generator.choice(list(COLORS))) for part in ("coat", "trousers", "shoes", "bag", "hat", "second")
    }
    color["coat"] = fixed.get(uniform, color["coat"])
    legs = "skirt" if style == "dress" else pick(trousers=6, shorts_trousers=2, skirt=2.0 * woman)
    words = {
        "coat color": f"{color['coat']} coat",
        "trousers color": f"{color['coat' if style == 'dress' else 'trousers']} trousers",
        "coat length": sleeves,
        "trousers length": legs,
        "coat style": style,
        "shoes color": f"{color['shoes']} shoes",
        "shoes style": pick(boots=1, leather_shoes=1.2, sandal=0.8, walking_shoes=2),
        "bag style": pick(backpack=2, hand_bag=1.2, shoulder_bag=1.6, waist_pack=0.6, trolley=0.6, without_bag=2)
        if generator.random() > 0.04
        else "agnostic style bag",
        "cap style": "with hat" if uniform == "chef uniform" or generator.random() < 0.16 else "without hat",
        "glass style": "with sunglasses" if generator.random() < 0.1 else "without glasses",
        "glove": pick(with_glove=0.12, agnostic_glove=0.03, without_glove=0.85),
        "uniform": uniform,
    }
    shade = lambda part: _shade(COLORS[color[part]], generator.uniform(0.8, 1.12))  # noqa: E731
    plain = uniform != "common clothing"
    return Outfit(
        words=words,
        coat=shade("coat"),
        coat2=shade("second"),
        pattern="plain" if plain else pick(plain=4, stripes=1.5, bars=1, checks=1, print=1.5, yoke=1),
        trousers=shade("coat" if style == "dress" else "trousers"),
        shoes=shade("shoes"),
        bag=shade("bag"),
        hat=(236, 236, 232) if uniform == "chef uniform" else shade("hat"),
        nir=tuple(generator.uniform(0.25, 0.95, 6).tolist()),
    )


def with_own(outfit: Outfit, own: Outfit, shoes: bool, bag: bool) -> Outfit:
    """The outfit, but with the shoes or the bag of `own`."""
    words, nir = dict(outfit.words), list(outfit.nir)
    if shoes:
        words |= {key: own.words[key] for key in ("shoes color", "shoes style")}
        nir[3] = own.nir[3]
    if bag:
        words["bag style"] = own.words["bag style"]
        nir[4] = own.nir[4]
    return outfit._replace(
        words=words,
        shoes=own.shoes if shoes else outfit.shoes,
        bag=own.bag if bag else outfit.bag,
        nir=tuple(nir),
    )


def make_camera(generator: np.random.Generator, style: Style, seed: tuple[int, ...]) -> Camera:
    """Draw a camera of a data set of this style; `seed` is that of its scenery."""
    gray, warm = generator.uniform(95, 185), generator.normal(0, 7)
    gain = style.light * generator.uniform(0.86, 1.08) * (1 + style.tint * generator.normal(0, 0.035, 3))
    yaws = {"front": (0, 15, -20), "back": (180, 165, -160), "across": (90, -90, 75, -105), "mixed": (0, 180, 90, -90)}
    habit = _pick(generator, {"front": 1, "back": 1, "across": 1, "mixed": 2})
    return Camera(
        seed=seed,
        style=style,
        base=(int(gray + warm), int(gray), int(gray - warm)),
        horizon=generator.uniform(0.5, 0.86),
        gain=tuple(gain.tolist()),
        gamma=generator.uniform(0.85, 1.2),
        slope=tuple(generator.uniform(-0.12, 0.12, 2).tolist()),
        blur=style.blur * generator.uniform(0.0, 0.75),
        noise=style.noise * generator.uniform(1.0, 3.5),
        yaw=yaws[habit],
        zoom=generator.uniform(0.94, 1.05),
    )


def make_shot(generator: np.random.Generator, person: Person, camera: Camera, box: float = 1.0) -> Shot:
    """Draw a moment. `box` scales the detector's error, whose deviation at 1 is 5 % of the width, 2 % of the height and
    6 % of the size; 5 is a junk detection."""
    u, n = generator.random(10), generator.normal(size=6)
    grow = 1 + camera.style.spread * generator.uniform(-1, 1, 2)
    width, height = (round(side * factor) for side, factor in zip(camera.style.size, grow, strict=True))
    yaw = camera.yaw[int(u[0] * len(camera.yaw))] if u[1] < 0.7 else u[2] * 360
    return Shot(
        size=(width, height),
        yaw=(yaw + 14 * n[0]) % 360,
        phase=2 * pi * u[3],
        effort=0.35 + 0.65 * u[4],
        place=(0.5 + 0.05 * box * n[1], 0.95 + 0.02 * box * n[2]),
        height=person.height * camera.zoom * (1 + 0.06 * n[3]),
        stoop=0.55 if u[5] < 0.02 else 0.0,
        gain=1 + 0.06 * n[4],
        umbrella=bool(u[6] < 0.03),
        smoking=bool(u[7] < 0.03),
        hidden=("left", "right", "low")[int(u[8] * 50)] if u[8] < 0.06 else "",
        scenery=float(u[9]),
    )


def attributes(person: Person, outfit: Outfit, shot: Shot) -> dict[str, str]:
    """The word of each of the 20 attributes that holds for this picture."""
    facing = cos(radians(shot.yaw))
    angle = "front" if facing > 0.6 else "back" if facing < -0.6 else "side"
    brightness, warmth = sum(person.hair) / 3, person.hair[0] - person.hair[2]
    color = (
        "black" if brightness < 75 else "yellow" if warmth > 60 else "white" if brightness > 125 else "agnostic color"
    )
    length = person.hair_length
    style = "bald" if length == 0 else "long" if length > 0.55 else "short" if length < 0.5 else "agnostic style"
    sunglasses = outfit.words["glass style"] == "with sunglasses"
    words = {
        "gender code": person.gender,
        "age": person.age,
        "hair color": f"{color} hair" if length else "agnostic color hair",
        "hair style": f"{style} hair",
        "person angle": angle,
        "pose": "stoop" if shot.stoop + person.stoop > 0.35 else "pose agnostic" if shot.hidden == "low" else "stand",
        "smoking": "smoking" if shot.smoking else "agnostic smoking" if angle == "back" else "without smoking",
        "umbrella": "with umbrella" if shot.umbrella else "without umbrella",
    }
    glasses = "with sunglasses" if sunglasses else "with glasses" if person.glasses else "without glasses"
    return outfit.words | words | {"glass style": glasses}


def _visible(person: Person, outfit: Outfit) -> Palette:
    return {
        "skin": person.skin,
        "hair": person.hair,
        "coat": outfit.coat,
        "coat2": outfit.coat2,
        "trousers": outfit.trousers,
        "shoes": outfit.shoes,
        "bag": outfit.bag,
        "hat": outfit.hat,
        "inner": (238, 238, 236),
        "dark": (28, 24, 26),
        "band": (250, 250, 190),
        "badge": (200, 40, 40),
        "lips": _mix(person.skin, (150, 30, 45), 0.5),
    }


def _infrared(palette: Palette, outfit: Outfit) -> Palette:
    """Most dyes hardly absorb near infrared, pigments do: half of a cloth's brightness follows from its colour, half is
    its own. Skin is bright, hair lighter."""
    luma = {key: (3 * r + 6 * g + b) / 10 for key, (r, g, b) in palette.items()}
    gray = {key: 0.35 * value + 75 for key, value in luma.items()}
    gray |= {"skin": 150 + 0.35 * luma["skin"], "hair": 45 + 0.75 * luma["hair"], "dark": 40, "band": 255}
    cloth = ("coat", "coat2", "trousers", "shoes", "bag", "hat")
    gray |= {key: 40 + 100 * own + 0.4 * luma[key] for key, own in zip(cloth, outfit.nir, strict=True)}
    return {key: (int(value), int(value), int(value)) for key, value in gray.items()}


# fraction of the legs at which the coat ends; else 0.96
_HEM = {"dress": 0.56, "long coat": 0.52, "business suit": 0.9}
_SLEEVE = {"long sleeve coat": 2, "agnostic length coat": 2, "short sleeve coat": 1, "bareback coat": 0}


class _Figure:
    """A dressed person on a canvas SCALE times the picture; `garment`: the coat alone, spread out.

    Body coordinates (x, y, z) become pixels (x, y) in `at`; sizes are in body heights everywhere.
    """

    def __init__(
        self, canvas: Image.Image, person: Person, outfit: Outfit, shot: Shot, paint: Palette, garment: bool = False
    ):
        self.pen, self.paint, self.garment = ImageDraw.Draw(canvas), paint, garment
        self.person, self.outfit, self.words, self.shot = person, outfit, outfit.words, shot
        self.origin = (shot.place[0] * canvas.width, shot.place[1] * canvas.height)
        self.unit = shot.height * canvas.height
        self.cos, self.sin = cos(radians(shot.yaw)), sin(radians(shot.yaw))
        self.lean = 0.0 if garment else shot.stoop + person.stoop
        self.swing = person.stride * shot.effort
        self.hip, self.girth = person.legs, person.girth
        self.neck = 1 - person.head
        self.shoulder = self.neck - 0.025
        self.style = self.words["coat style"]
        self.hem = self.hip * _HEM.get(self.style, 0.96)
        self.band = self.words["uniform"] in ("firefighter uniform", "worker uniform")
        waist = (self.hip + self.shoulder) / 2 + 0.01
        wide = self.width(person.hips + 0.012, self.girth * 1.35)
        self.halves = {  # height -> half width of the clothed trunk, from the top
            self.shoulder: self.width(person.shoulders, self.girth * 1.05),
            waist: self.width(0.5 * person.shoulders + 0.42 * person.hips + 0.15 * self.girth, self.girth * 1.25),
            self.hip: wide,
            self.hem: wide * {"dress": 1.5, "long coat": 1.2}.get(self.style, 1.0),
        }
        self.levels = np.array(sorted(self.halves.items())).T
        self.tall, self.wide = person.head / 2, person.head * person.face / 2
        self.volume = 1.0 + 0.38 * person.hair_volume if person.hair_length else 1.0
        self.face = self.at(0, self.neck + self.tall * 0.92, 0.012)  # centre of the head
        self.outline: list[Point] = []  # of the coat, for the clothes crop

    def draw(self) -> None:
        """Every part from the farthest to the nearest."""
        parts: list[tuple[float, Callable[[], None]]] = [(0.0, self.trunk)]
        for side in (-1, 1):
            parts.append((self.depth(side * self.person.shoulders, 0) + 0.02, partial(self.arm, side)))
        if not self.garment:
            parts += [(self.depth(side * 0.1, 0) - 10, partial(self.leg, side)) for side in (-1, 1)]
            parts += [(0.0301, self.head), (-0.06 * self.cos + (0.04 if self.cos < 0.1 else 0), self.mane)]
            if self.words["bag style"] == "backpack":
                parts.append((self.depth(0, -0.1) + (0.05 if self.cos < 0 else 0), self.backpack))
            if self.shot.umbrella:
                parts.append((1.0, self.umbrella))
        for _, part in sorted(parts, key=lambda part: part[0]):
            part()

    # Geometry and strokes

    def depth(self, x: float, z: float) -> float:
        """Towards the camera."""
        return z * self.cos - x * self.sin

    def width(self, half: float, depth: float) -> float:
        """Half width of an upright elliptic cylinder as seen."""
        return ((half * self.cos) ** 2 + (depth * self.sin) ** 2) ** 0.5

    def at(self, x: float, y: float, z: float) -> Point:
        above = max(0.0, y - self.hip) * self.lean
        z, y = z + above, y - above * self.lean / 2
        return self.origin[0] + self.unit * (x * self.cos + z * self.sin), self.origin[1] - self.unit * y

    def move(self, point: Point, right: float, down: float) -> Point:
        return point[0] + right * self.unit, point[1] + down * self.unit

    def edge(self, f: float, y: float) -> Point:
        """Point of the trunk at height y; f from -1 (left in the picture) to 1."""
        return self.move(self.at(0, y, 0), f * float(np.interp(y, *self.levels)), 0)

    def tint(self, key: str, factor: float = 1.0) -> RGB:
        return _shade(self.paint[key], factor)

    def limb(self, points: Sequence[Point], widths: Sequence[float], color: RGB) -> None:
        for (a, b), ends in zip(pairwise(points), pairwise(widths), strict=True):
            wa, wb = (self.unit * w / 2 for w in ends)
            dx, dy = b[0] - a[0], b[1] - a[1]
            norm = (dx * dx + dy * dy) ** 0.5 or 1.0
            dx, dy = dx / norm, dy / norm
            corners = [(a[0] - dy * wa, a[1] + dx * wa), (a[0] + dy * wa, a[1] - dx * wa)]
            corners += [(b[0] + dy * wb, b[1] - dx * wb), (b[0] - dy * wb, b[1] + dx * wb)]
            self.pen.polygon(corners, fill=color)
            for (x, y), w in ((a, wa), (b, wb)):
                self.pen.ellipse((x - w, y - w, x + w, y + w), fill=color)

    def oval(self, at: Point, rx: float, ry: float, color: RGB, span: tuple[int, int] = (0, 360)) -> None:
        (left, top), (right, bottom) = self.move(at, -max(rx, 0), -max(ry, 0)), self.move(at, max(rx, 0), max(ry, 0))
        if span == (0, 360):
            self.pen.ellipse((left, top, right, bottom), fill=color)
        else:
            self.pen.pieslice((left, top, right, bottom), *span, fill=color)

    def block(self, at: Point, rx: float, ry: float, color: RGB, rounding: float = 0.3) -> None:
        box = (*self.move(at, -rx, -ry), *self.move(at, rx, ry))
        self.pen.rounded_rectangle(box, radius=rounding * min(rx, ry) * self.unit, fill=color)

    def line(self, a: Point, b: Point, width: float, color: RGB) -> None:
        self.pen.line([a, b], fill=color, width=max(1, round(width * self.unit)))

    def strip(self, left: float, right: float, y0: float, y1: float, color: RGB) -> None:
        """Part of the trunk between the heights y0 > y1, bent as the trunk is."""
        rows = [y0, *(y for y in self.halves if y1 < y < y0), y1]
        points = [self.edge(left, y) for y in rows] + [self.edge(right, y) for y in reversed(rows)]
        self.pen.polygon(points, fill=color)

    # Parts of the body and what they wear

    def leg(self, side: int) -> None:
        person, girth, hip = self.person, self.girth, self.hip
        theta = side * self.swing * sin(self.shot.phase)
        step = max(0.0, side * cos(self.shot.phase))
        bend = 0.08 + max(0.0, -theta) * 1.3 + 0.5 * self.swing * step
        thigh, shin = 0.5 * hip, 0.46 * hip
        x0, x2 = side * person.hips * 0.52, side * (person.hips * 0.5 + person.stance)
        y1, z1 = hip - thigh * cos(theta), thigh * sin(theta)
        y2, z2 = max(y1 - shin * cos(theta - bend), 0.03), z1 + shin * sin(theta - bend)
        top, knee, ankle = self.at(x0, hip, 0), self.at((x0 + x2) / 2, y1, z1), self.at(x2, y2, z2)
        toe = self.at(x2 * 1.15, max(y2 - 0.025, 0.008), z2 + 0.075)
        tone = 1.0 if self.depth(side, 0) >= 0 else 0.8
        skin, cloth, shoe = (self.tint(key, tone) for key in ("skin", "trousers", "shoes"))
        length = self.words["trousers length"]
        below = girth * (1.1 if length == "trousers" else 0.85)
        self.limb([top, knee, ankle], (girth * 1.75, girth * 1.3, below), cloth if length == "trousers" else skin)
        if length == "shorts trousers":
            low = self.at((x0 + x2) / 2, hip - 0.85 * (hip - y1), 0.85 * z1)
            self.limb([top, low], (girth * 1.9, girth * 1.75), cloth)
        kind = self.words["shoes style"]
        if kind == "boots":
            self.limb([((knee[0] + 2 * ankle[0]) / 3, (knee[1] + 2 * ankle[1]) / 3), ankle], [girth * 1.3] * 2, shoe)
        thick = {"sandal": 0.65, "leather shoes": 0.7}.get(kind, 0.9)
        self.limb([ankle, toe], (girth * (thick + 0.15), girth * thick), skin if kind == "sandal" else shoe)
        if kind == "sandal":
            self.line(ankle, toe, girth * 0.4, shoe)
        if kind in ("walking shoes", "sandal"):
            sole = self.tint("inner") if kind == "walking shoes" else shoe
            self.line(self.move(ankle, 0, 0.38 * girth), self.move(toe, 0, 0.32 * girth), girth * 0.3, sole)

    def arm(self, side: int) -> None:
        person, girth = self.person, self.girth
        theta = -side * self.swing * 0.9 * sin(self.shot.phase)
        upper, fore = 0.17, 0.16
        x0, y0 = side * (person.shoulders - girth * 0.35), self.shoulder - 0.02
        x1 = x0 + side * (0.02 + 0.5 * person.arms * upper)
        x2 = x1 + side * (person.arms * fore - 0.005)
        if self.garment:
            theta, x1, x2 = 0.0, x0 + side * 0.075, x0 + side * 0.14
        y1, z1 = y0 - upper * cos(theta), upper * sin(theta)
        y2, z2 = y1 - fore * cos(theta + 0.25), z1 + fore * sin(theta + 0.25)
        a, b, c = self.at(x0, y0, 0), self.at(x1, y1, z1), self.at(x2, y2, z2)
        tone = 0.9 if self.depth(side, 0) >= -0.2 else 0.74
        if not self.garment:
            skin = self.tint("skin", tone + 0.06)
            self.limb([a, b, c], (girth * 1.05, girth * 0.85, girth * 0.68), skin)
            glove = self.words["glove"] == "with glove"
            self.oval(self.move(c, 0, 0.012), girth * 0.48, girth * 0.55, self.tint("dark") if glove else skin)
        sleeve = _SLEEVE[self.words["coat length"]]
        widths = (girth * 1.28, girth * 1.15, girth * 0.98)
        if sleeve == 2:
            self.limb([a, b, c], widths, self.tint("coat", tone))
        elif sleeve == 1:
            self.limb([a, (0.2 * a[0] + 0.8 * b[0], 0.2 * a[1] + 0.8 * b[1])], widths[:2], self.tint("coat", tone))
        if self.band and sleeve == 2:
            self.line(self.move(b, -0.6 * girth, 0), self.move(b, 0.6 * girth, 0), 0.018, self.tint("band"))
        if side > 0 and not self.garment:
            self.held_bag(c)

    def held_bag(self, hand: Point) -> None:
        bag, dark = self.words["bag style"], self.tint("dark")
        if bag == "hand bag":
            self.line(hand, self.move(hand, 0, 0.04), 0.014, dark)
            self.block(self.move(hand, 0, 0.07), 0.055, 0.042, self.tint("bag"))
        elif bag == "trolley":
            ground = (hand[0] - 0.07 * self.sin * self.unit, self.origin[1])
            self.line(hand, self.move(ground, 0, -0.2), 0.014, dark)
            self.block(self.move(ground, 0, -0.12), 0.068, 0.1, self.tint("bag"), 0.2)
            self.line(self.move(ground, 0, -0.2), self.move(ground, 0, -0.04), 0.01, self.tint("bag", 0.6))
            self.oval(self.move(ground, 0, -0.012), 0.016, 0.016, dark)

    def trunk(self) -> None:
        girth, hip, half = self.girth, self.hip, self.halves[self.hip]
        if not self.garment:
            if self.words["trousers length"] == "skirt" and self.style != "dress":
                corners = ((-half, hip), (half, hip), (half * 1.3, hip * 0.5), (-half * 1.3, hip * 0.5))
                skirt = [self.move(self.at(0, y, 0), x, 0) for x, y in corners]
                self.pen.polygon(skirt, fill=self.tint("trousers"))
            else:
                self.block(self.at(0, hip - 0.01, 0), half * 0.98, 0.05, self.tint("trousers"), 0.6)
            nape = [self.at(0, self.shoulder - 0.02, 0), self.at(0, self.neck + 0.03, 0)]
            self.limb(nape, (girth * 1.3, girth * 1.15), self.tint("skin", 0.85))
        rows = list(self.halves)
        self.outline = [self.edge(-1, y) for y in rows] + [self.edge(1, y) for y in reversed(rows)]
        self.outline += [self.edge(0.4, self.neck - 0.004), self.edge(-0.4, self.neck - 0.004)]
        self.pen.polygon(self.outline, fill=self.tint("coat"))
        for side in (-1, 1):
            at = self.move(self.edge(side, self.shoulder - 0.012), -side * 0.36 * girth, 0)
            self.oval(at, girth * 0.42, girth * 0.46, self.tint("coat"))
        self.pattern()
        if self.cos > 0.15:
            self.front()
        if self.style == "sweater":
            self.strip(-1, 1, self.hem + 0.03, self.hem, self.tint("coat", 0.66))
            self.strip(-0.42, 0.42, self.neck, self.shoulder - 0.012, self.tint("coat", 0.66))
        if not self.garment:
            self.worn_bag()

    def pattern(self) -> None:
        pattern, second, top = self.outfit.pattern, self.tint("coat2"), self.shoulder
        drop = (top - self.hem) / 8
        if pattern in ("stripes", "checks"):
            first, thick = (0, 1.0) if pattern == "stripes" else (1, 0.45)
            for i in range(first, 8, 2):
                self.strip(-1, 1, top - i * drop, top - (i + thick) * drop, second)
        if pattern in ("bars", "checks"):
            for f in (-0.7, -0.25, 0.2, 0.65):
                self.strip(f, f + 0.17, top, self.hem, second)
        if pattern == "yoke":
            self.strip(-1, 1, top, top - 2.6 * drop, second)
        if pattern == "print" and self.cos > 0.15:
            self.oval(self.edge(self.sin * 0.6, top - 2.6 * drop), 0.042 * self.cos + 0.01, 0.042, second)
        elif pattern == "print":
            self.strip(-0.5, 0.5, top - 1.5 * drop, top - 2.4 * drop, second)
        mixed = self.tint("coat") if pattern == "plain" else _mix(self.tint("coat"), second, 0.3)
        self.strip(0.66, 1, top, self.hem, _shade(mixed, 0.82))  # the side away from the light
        if self.band:
            for level in (3.0, 5.4):
                self.strip(-1, 1, top - level * drop, top - (level + 0.6) * drop, self.tint("band"))

    def front(self) -> None:
        """Opening, collar and badge, seen from before; `middle` is where the centre line of the chest lies."""
        middle, opening, top = self.sin * 0.75, 0.16 * self.cos, self.shoulder
        drop = (top - self.hem) / 8
        if self.style == "business suit":
            lapels = [self.edge(middle + f * opening, top + 0.02) for f in (-1.8, 1.8)]
            self.pen.polygon([*lapels, self.edge(middle, top - 4.3 * drop)], fill=self.tint("inner"))
            self.line(self.edge(middle, top), self.edge(middle, top - 3.6 * drop), 0.022, self.tint("coat2", 0.7))
        elif self.style in ("jacket", "long coat"):
            inside = self.tint("coat2" if self.band else "inner")
            self.strip(middle - opening, middle + opening, top + 0.01, self.hem, inside)
        elif self.style == "shirt":
            self.line(self.edge(middle, top), self.edge(middle, self.hem), 0.01, self.tint("coat", 0.6))
            for f in (-0.3, 0.3):
                collar = self.edge(middle, top - 0.02), self.edge(middle + f, top + 0.02)
                self.line(*collar, 0.018, self.tint("coat", 0.62))
        elif self.words["coat length"] != "long sleeve coat":
            color = self.tint("coat", 0.7) if self.garment else self.tint("skin")
            self.oval(self.edge(middle * 0.6, top + 0.03), self.girth * 0.75, 0.032, color)
        if self.words["uniform"] == "medical uniform":
            self.block(self.edge(0.45, top - 2.2 * drop), 0.014, 0.014, self.tint("badge"))

    def worn_bag(self) -> None:
        bag, front, middle = self.words["bag style"], self.cos > 0, self.sin * 0.75
        if bag == "backpack" and self.cos > 0.1:
            for f in (-0.6, 0.6):
                top, low = (
                    self.edge(middle * 0.5 + f, self.shoulder + 0.01),
                    self.edge(middle * 0.5 + f, self.hip + 0.12),
                )
                self.line(top, low, 0.026, self.tint("bag"))
        elif bag in ("shoulder bag", "agnostic style bag"):
            end = 0.95 if front else -0.95
            strap = self.edge(-end * 0.6, self.shoulder + 0.015), self.edge(end, self.hip + 0.01)
            self.line(*strap, 0.018, self.tint("bag", 0.7))
            self.block(
                self.edge(end, self.hip - 0.03), 0.05, 0.055 if bag == "shoulder bag" else 0.035, self.tint("bag")
            )
        elif bag == "waist pack":
            self.strip(-1, 1, self.hip + 0.035, self.hip + 0.01, self.tint("bag", 0.75))
            self.block(self.edge(middle * 0.8 if front else 0.9, self.hip + 0.012), 0.05, 0.028, self.tint("bag"))

    def backpack(self) -> None:
        at, half = self.at(0, self.shoulder - 0.12, -self.girth * 1.35 - 0.03), self.person.shoulders
        self.block(at, self.width(half * 0.8, 0.05), 0.115, self.tint("bag"), 0.5)
        if self.cos < 0.3:
            self.block(self.move(at, 0, 0.045), self.width(half * 0.55, 0.03), 0.045, self.tint("bag", 0.75), 0.4)

    def mane(self) -> None:
        """Hair below the head, loose or tied."""
        length, tall, wide = self.person.hair_length, self.tall, self.wide
        reach, y = (length - 0.3) * 0.36, self.neck + self.tall * 0.92
        if length > 0.5 and self.person.tail > 0.6:
            top = self.at(0, y + tall * 0.2, -wide * 1.15)
            self.limb([top, self.move(top, 0, reach + 0.03)], (0.05, 0.028), self.tint("hair", 0.85))
        elif length > 0.4:
            half = self.width(wide * (self.volume + 0.12), wide * 0.8)
            high = (tall * 0.9 + reach) / 2
            at = self.move(self.at(0, y, -wide * 0.3), 0, high - tall * 0.3)
            self.block(at, half, high, self.tint("hair", 0.85), 0.6)

    def head(self) -> None:
        person, tall, wide, face = self.person, self.tall, self.wide, self.face
        length, volume, skin = person.hair_length, self.volume, self.tint("skin")
        hair = self.tint("hair") if length else skin
        crown = self.move(face, -self.sin * wide * 0.12, -0.08 * tall)
        self.oval(face, self.width(wide, wide * 1.08), tall, skin)
        if self.cos < -0.35:
            self.oval(crown, wide * volume, tall * volume, hair)
            if length < 0.4:
                self.oval(self.move(face, 0, tall * 0.85), wide * 0.66, tall * (0.45 if length > 0.25 else 0.23), skin)
        else:
            half = self.width(wide * volume, wide * volume * 1.1)
            self.oval(crown, half, tall * volume, hair, (0, 360) if length > 0.25 else (165, 375))
            drop = (0.12 + 0.34 * person.fringe) * tall if length else 0.0
            at = self.move(face, self.sin * wide * 0.42, drop * 0.75)
            self.oval(at, wide * (0.62 + 0.3 * max(0.0, self.cos)), tall - drop * 0.62, skin)
        for angle, y, feature in (
            (0, 0.2, self.nose),
            (0, 0.5, self.mouth),
            (-27, -0.02, self.eye),
            (27, -0.02, self.eye),
        ):
            turn = radians(self.shot.yaw + angle)
            if cos(turn) > 0.12:
                feature(self.move(face, sin(turn) * wide, y * tall), cos(turn))
        if self.words["cap style"] == "with hat":
            half = self.width(wide * volume, wide * volume * 1.1) * 1.04
            top = self.move(face, 0, -0.3 * tall)
            if self.words["uniform"] == "chef uniform":
                self.block(self.move(top, 0, -0.055), half * 1.05, 0.06, self.tint("hat"), 0.6)
            self.oval(top, half, tall * 0.86, self.tint("hat"), (180, 360))
            if self.cos > -0.5:
                brim = self.move(top, self.sin * half * 0.9, 0)
                self.block(brim, half * (0.55 + 0.4 * abs(self.cos)), 0.011, self.tint("hat", 0.7), 0.9)

    def nose(self, at: Point, facing: float) -> None:
        self.oval(at, self.wide * 0.13 + 0.004 * (1 - facing), self.tall * 0.14, self.tint("skin", 0.84))

    def mouth(self, at: Point, facing: float) -> None:
        if (beard := self.person.beard) > 0.05:
            color = _mix(self.tint("skin"), self.tint("hair", 0.9), min(1.0, 0.35 + beard))
            rx = self.wide * (0.45 + 0.45 * facing * beard)
            self.oval(
                self.move(at, -0.1 * self.sin * self.wide, 0.12 * self.tall),
                rx,
                self.tall * (0.34 + 0.3 * beard),
                color,
            )
        self.oval(at, self.wide * 0.28 * facing, self.tall * 0.065, self.tint("lips"))
        if self.shot.smoking:
            self.line(at, self.move(at, 0.05 + 0.03 * self.sin, 0.012), 0.012, self.tint("inner"))
            self.oval(self.move(at, 0.07, -0.01), 0.014, 0.018, self.tint("inner", 0.9))

    def eye(self, at: Point, facing: float) -> None:
        brow, sunglasses = self.person.brow, self.words["glass style"] == "with sunglasses"
        if brow > 0.15:
            above = self.move(at, 0, -0.2 * self.tall)
            self.block(above, self.wide * 0.26 * facing + 0.004, 0.003 + 0.007 * brow, self.tint("hair", 0.6))
        if sunglasses or self.person.glasses:
            self.oval(at, self.wide * 0.4 * facing + 0.004, self.tall * 0.25, self.tint("dark"))
        if not sunglasses:
            if self.person.glasses:
                self.oval(
                    at, self.wide * 0.27 * facing, self.tall * 0.15, _mix(self.tint("skin"), (255, 255, 255), 0.35)
                )
            self.oval(at, self.wide * 0.13 * facing + 0.003, self.tall * 0.11, self.tint("dark"))

    def umbrella(self) -> None:
        hand = self.move(self.at(self.person.shoulders, self.shoulder, 0.08), 0, 0.05)
        top = self.move(self.face, 0, -0.75 * self.tall)
        self.line(hand, (hand[0], top[1]), 0.012, self.tint("dark"))
        self.oval(top, 0.24, 0.15, self.tint("coat2"), (180, 360))
        self.line(self.move(top, -0.24, 0), self.move(top, 0.24, 0), 0.012, self.tint("coat2", 0.6))

    def box(self, size: Size) -> tuple[int, int, int, int]:
        """The coat's box in the picture with a margin for the arms, at most half the picture high."""
        xs, ys = (np.array(values) / SCALE for values in zip(*self.outline, strict=True))
        margin = 0.06 * self.unit / SCALE
        left, right = max(0, int(xs.min() - margin)), min(size[0], int(xs.max() + margin))
        top = max(0, int(ys.min() - 2))
        bottom = min(size[1], int(min(ys.max() + 2, top + 0.5 * size[1])))
        if right - left < 8 or bottom - top < 8:  # the coat lies outside the picture: keep all of it
            return 0, 0, size[0], size[1]
        return left, top, right, bottom


@lru_cache(maxsize=256)
def _scenery(camera: Camera) -> Image.Image:
    """What the camera sees without people, about four pictures wide: wall, floor, pillars, boxes, in greyish tones."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(camera.seed)))
    width, height = 288, 160
    base, texture = np.array(camera.base), camera.style.texture
    horizon = int(camera.horizon * height)
    scene = Image.new("RGB", (width, height), tuple(camera.base))
    draw = ImageDraw.Draw(scene)

    def tone(spread: float) -> RGB:
        color = base * (1 + generator.uniform(-spread, spread)) + generator.normal(0, 9, 3)
        return tuple(int(value) for value in np.clip(color, 30, 225))  # type: ignore[return-value]

    draw.rectangle((0, horizon, width, height), fill=tone(0.28))
    for _ in range(int(generator.integers(3, 8) * texture)):
        x, w = generator.uniform(0, width), generator.uniform(5, 42)
        top, bottom = generator.uniform(-0.2, 0.7) * horizon, horizon + generator.uniform(-4, 14)
        draw.rectangle((x, top, x + w, max(bottom, top + 2)), fill=tone(0.35))
        if generator.random() < 0.4:
            draw.rectangle(
                (x + w * 0.2, top + 4, x + w * 0.8, max(top + 6, top + 0.4 * (bottom - top))), fill=tone(0.35)
            )
    step = generator.uniform(14, 40)
    for i in range(-8, 18):  # joints of the floor
        draw.line((i * step, height, i * step * 0.6 + 60, horizon), fill=tone(0.2))
    pixels: np.ndarray = np.asarray(scene, np.float32)
    coarse = Image.fromarray((generator.random((12, 20)) * 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = pixels * (1 + 0.16 * texture * (np.asarray(coarse, np.float32)[..., None] / 255 - 0.5))
    pixels += 5 * texture * generator.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(
    person: Person, outfit: Outfit, camera: Camera, shot: Shot, generator: np.random.Generator, nir: bool = False
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Draw one picture: an RGB image of `shot.size`, and the box (left, top, right, bottom) of the coat in it."""
    width, height = shot.size
    scene = _scenery(camera)
    window = min(scene.width, int(scene.height * width / height))
    left = int(shot.scenery * (scene.width - window))
    picture = scene.resize(shot.size, Image.Resampling.BILINEAR, (left, 0, left + window, scene.height))
    paint = _visible(person, outfit)
    canvas = Image.new("RGBA", (SCALE * width, SCALE * height))
    figure = _Figure(canvas, person, outfit, shot, _infrared(paint, outfit) if nir else paint)
    figure.draw()
    if nir:
        picture = picture.convert("L").point(lambda level: 0.75 * level).convert("RGB")  # its lamp fades with distance
    foot = (shot.place[0] * width, shot.place[1] * height)
    shadow = 0.16 * shot.height * height
    ImageDraw.Draw(picture).ellipse(
        (foot[0] - shadow, foot[1] - shadow * 0.16, foot[0] + shadow, foot[1] + shadow * 0.2),
        fill=_shade(camera.base if not nir else (camera.base[1],) * 3, 0.5),
    )
    layer = canvas.reduce(SCALE)
    picture.paste(layer, (0, 0), layer)
    if shot.hidden:
        color = _shade(camera.base if not nir else (camera.base[1],) * 3, 0.62)
        w, h = 0.27 * width, 0.22 * height
        box = {"left": (0, 0.3 * height, w, height), "right": (width - w, 0.3 * height, width, height)}
        ImageDraw.Draw(picture).rectangle(box.get(shot.hidden, (0, height - h, width, height)), fill=color)
    if camera.blur > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(camera.blur))
    light = np.add.outer(np.linspace(-1, 1, height) * camera.slope[1], np.linspace(-1, 1, width) * camera.slope[0])
    gain = np.array(camera.gain if not nir else (1.0,) * 3, np.float32) * shot.gain
    lut = 255 * np.linspace(0, 1, 256, dtype=np.float32) ** camera.gamma
    pixels = lut[np.asarray(picture)] * (gain * (1 + light[..., None])).astype(np.float32)
    noise = camera.noise
    if noise:
        pixels += noise * generator.standard_normal((height, width, 1), np.float32)
    if noise and not nir:
        pixels += 0.4 * noise * generator.standard_normal((height, width, 3), np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image, figure.box(shot.size)


def draw_template(outfit: Outfit, size: Size) -> Image.Image:
    """Draw the coat alone, spread out on a light ground: an RGB image of `size`, as a shop shows it."""
    width, height = size
    long = outfit.words["coat style"] in ("dress", "long coat")
    unit, middle = (1.25, 0.55) if long else (1.75, 0.67)  # body height / picture width; what lies in the middle
    unit *= width / height
    place = (0.5, 0.5 + middle * unit)
    shot = Shot(size, 0.0, 0.0, 0.0, place, unit, 0.0, 1.0, False, False, "", 0.0)
    canvas = Image.new("RGBA", (SCALE * width, SCALE * height))
    _Figure(canvas, _MANNEQUIN, outfit, shot, _visible(_MANNEQUIN, outfit), garment=True).draw()
    layer = canvas.reduce(SCALE)
    picture = Image.new("RGB", size, (244, 244, 242))
    picture.paste(layer, (0, 0), layer)
    return picture


_MANNEQUIN = make_person(np.random.Generator(np.random.Philox(0)), "male")._replace(
    legs=0.48, head=0.15, shoulders=0.12, hips=0.09, girth=0.065
)
