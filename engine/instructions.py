"""What a query may be told: the fixed sentences, the attribute words, and attributes -> sentences.

Source: the paper's Table 8 (20 sentences for each of three tasks) and Table 7 (20 attributes, 92 words), verbatim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.random import Generator

# Table 8. One of the 20 is drawn for each training batch; a test uses each in turn and reports mean and spread.
SENTENCES: dict[str, tuple[str, ...]] = {
    "trad": (
        "do not change clothes",
        "maintain consistent clothes",
        "keep original clothes",
        "preserve current clothes",
        "retain existing clothes",
        "wear the same clothes",
        "stick with your clothes",
        "don't alter your clothes",
        "no changes to clothes",
        "unchanged outfit",
        "clothes remain constant",
        "no clothing adjustments",
        "steady clothing choice",
        "clothing remains unchanged",
        "consistent clothing selection",
        "retain your clothing style",
        "clothing choice remains",
        "don't swap clothes",
        "maintain clothing selection",
        "clothes stay the same",
    ),
    "cc": (
        "change your clothes",
        "swap outfits",
        "switch attire",
        "get into a different outfit",
        "try on something new",
        "put on fresh clothing",
        "dress in alternative attire",
        "alter your outfit",
        "wear something else",
        "don a different ensemble",
        "trade your garments",
        "shift your wardrobe",
        "exchange your clothing",
        "update your attire",
        "replace your outfit",
        "clothe yourself differently",
        "switch your style",
        "update your look",
        "put on a new wardrobe",
        "ignore clothes",
    ),
    "vi": (
        "retrieve cross-modality images",
        "fetch images across different modalities",
        "collect images from various modalities",
        "obtain images spanning different modalities",
        "retrieve images from diverse modalities",
        "gather images across modalities",
        "access images across different modalities",
        "acquire images spanning various modalities",
        "extract images from different modalities",
        "retrieve images across multiple modalities",
        "fetch images from distinct modalities",
        "collect images across various modalities",
        "access images from different modalities",
        "obtain images from diverse modalities",
        "gather images spanning different modalities",
        "extract images from various modalities",
        "retrieve images across varied modalities",
        "obtain images from distinct modalities",
        "access images across multiple modalities",
        "collect images spanning diverse modalities",
    ),
}

# Table 7. Every word names its attribute, so a set of words is a description without further keys.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "coat color": (
        "black coat",
        "blue coat",
        "gray coat",
        "green coat",
        "purple coat",
        "red coat",
        "white coat",
        "yellow coat",
    ),
    "trousers color": (
        "black trousers",
        "blue trousers",
        "gray trousers",
        "green trousers",
        "purple trousers",
        "red trousers",
        "white trousers",
        "yellow trousers",
    ),
    "coat length": (
        "agnostic length coat",
        "long sleeve coat",
        "short sleeve coat",
        "bareback coat",
    ),
    "trousers length": (
        "shorts trousers",
        "skirt",
        "trousers",
    ),
    "gender code": (
        "female",
        "agnostic gender",
        "male",
    ),
    "glass style": (
        "without glasses",
        "with glasses",
        "with sunglasses",
    ),
    "hair color": (
        "black hair",
        "agnostic color hair",
        "white hair",
        "yellow hair",
    ),
    "hair style": (
        "bald hair",
        "agnostic style hair",
        "long hair",
        "short hair",
    ),
    "bag style": (
        "backpack",
        "hand bag",
        "shoulder bag",
        "waist pack",
        "trolley",
        "agnostic style bag",
        "without bag",
    ),
    "cap style": (
        "with hat",
        "without hat",
    ),
    "shoes color": (
        "black shoes",
        "blue shoes",
        "gray shoes",
        "green shoes",
        "purple shoes",
        "red shoes",
        "white shoes",
        "yellow shoes",
    ),
    "shoes style": (
        "boots",
        "leather shoes",
        "sandal",
        "walking shoes",
    ),
    "age": (
        "adult",
        "child",
        "old",
    ),
    "person angle": (
        "back",
        "front",
        "side",
    ),
    "pose": (
        "lie",
        "pose agnostic",
        "sit",
        "stand",
        "stoop",
    ),
    "coat style": (
        "business suit",
        "agnostic style coat",
        "dress",
        "jacket",
        "long coat",
        "shirt",
        "sweater",
        "t-shirt",
    ),
    "glove": (
        "with glove",
        "agnostic glove",
        "without glove",
    ),
    "smoking": (
        "smoking",
        "agnostic smoking",
        "without smoking",
    ),
    "umbrella": (
        "with umbrella",
        "without umbrella",
    ),
    "uniform": (
        "chef uniform",
        "common clothing",
        "firefighter uniform",
        "medical uniform",
        "office uniform",
        "agnostic uniform",
        "worker uniform",
    ),
}

# How a sentence may say each word of Table 7: fragments, one of which is drawn. The colour of the coat, trousers, shoes
# and hair is an adjective, so those words share the fragments of COLOR_PHRASES instead.
PHRASES: dict[str, tuple[str, ...]] = {
    "agnostic length coat": ("sleeves of unclear length",),
    "long sleeve coat": ("long sleeves", "sleeves down to the wrists"),
    "short sleeve coat": ("short sleeves", "sleeves that end above the elbow"),
    "bareback coat": ("no sleeves", "bare shoulders"),
    "shorts trousers": ("shorts", "short trousers"),
    "skirt": ("skirt",),
    "trousers": ("trousers", "pants"),
    "female": ("woman", "lady"),
    "agnostic gender": ("person", "pedestrian"),
    "male": ("man", "gentleman"),
    "without glasses": ("no glasses",),
    "with glasses": ("glasses", "a pair of glasses"),
    "with sunglasses": ("sunglasses", "dark sunglasses"),
    "bald hair": ("a bald head", "no hair"),
    "agnostic style hair": ("hair of unclear style",),
    "long hair": ("long hair", "hair that falls over the shoulders"),
    "short hair": ("short hair", "hair cut short"),
    "backpack": ("backpack", "rucksack"),
    "hand bag": ("handbag", "hand bag"),
    "shoulder bag": ("shoulder bag", "bag hanging from the shoulder"),
    "waist pack": ("waist pack", "pouch at the waist"),
    "trolley": ("trolley", "suitcase on wheels"),
    "agnostic style bag": ("bag of some kind",),
    "without bag": ("no bag",),
    "with hat": ("a hat", "a cap"),
    "without hat": ("no hat",),
    "boots": ("boots",),
    "leather shoes": ("leather shoes",),
    "sandal": ("sandals",),
    "walking shoes": ("walking shoes", "sneakers"),
    "adult": ("adult", "grown-up"),
    "child": ("child", "young"),
    "old": ("old", "elderly"),
    "back": ("from the back", "from behind"),
    "front": ("from the front", "facing the camera"),
    "side": ("from the side", "in profile"),
    "lie": ("lying down",),
    "pose agnostic": ("in an unclear pose",),
    "sit": ("sitting",),
    "stand": ("standing", "upright"),
    "stoop": ("stooping", "bending forward"),
    "business suit": ("business suit", "suit"),
    "agnostic style coat": ("top", "upper garment"),
    "dress": ("dress",),
    "jacket": ("jacket",),
    "long coat": ("long coat", "overcoat"),
    "shirt": ("shirt",),
    "sweater": ("sweater", "pullover"),
    "t-shirt": ("t-shirt", "tee shirt"),
    "with glove": ("gloves",),
    "agnostic glove": ("hands that may be gloved",),
    "without glove": ("bare hands", "no gloves"),
    "smoking": ("smoking", "holding a cigarette"),
    "agnostic smoking": ("perhaps smoking",),
    "without smoking": ("not smoking",),
    "with umbrella": ("an umbrella",),
    "without umbrella": ("no umbrella",),
    "chef uniform": ("chef uniform", "uniform of a cook"),
    "common clothing": ("everyday clothes", "common clothing"),
    "firefighter uniform": ("firefighter uniform", "uniform of a firefighter"),
    "medical uniform": ("medical uniform", "uniform of a nurse"),
    "office uniform": ("office uniform", "clothes for the office"),
    "agnostic uniform": ("uniform of some kind",),
    "worker uniform": ("worker uniform", "high-visibility workwear"),
}
COLOR_PHRASES: dict[str, tuple[str, ...]] = {
    "black": ("black", "dark"),
    "blue": ("blue",),
    "gray": ("gray", "grey"),
    "green": ("green",),
    "purple": ("purple", "violet"),
    "red": ("red",),
    "white": ("white",),
    "yellow": ("yellow",),
    "agnostic color": ("of unclear color",),
}
# Chance that a sentence mentions the attribute (for a word that says something is absent, unclear or usual: a fifth).
_TOLD = {
    **dict.fromkeys(("coat color", "coat style", "trousers color", "trousers length", "hair style"), 0.95),
    **dict.fromkeys(("gender code", "hair color", "bag style", "cap style", "umbrella", "smoking"), 0.9),
    **dict.fromkeys(("shoes color", "coat length", "glass style", "glove", "uniform", "age"), 0.75),
    **dict.fromkeys(("shoes style", "person angle", "pose"), 0.5),
}
_USUAL = ("agnostic", "without", "adult", "stand", "common clothing", "pose agnostic", "office uniform")


def describe(attributes: Mapping[str, str], generator: Generator) -> str:
    """English sentences (1-4) about a pedestrian from attribute words, as an annotator would write them.

    attributes  attribute -> word, both from ATTRIBUTES; any subset. Less telling words are left out at random.
    generator   draws the phrasing, the order and the omissions; the same state gives the same text

    Raises ValueError for an attribute or word that is not in ATTRIBUTES.
    """
    told: dict[str, str] = {}
    for attribute, word in attributes.items():
        if word not in ATTRIBUTES.get(attribute, ()):
            raise ValueError(f"describe: {attribute!r}: {word!r} is not a word of engine.instructions.ATTRIBUTES")
        if generator.random() < _TOLD[attribute] * (0.2 if word.startswith(_USUAL) else 1.0):
            told[attribute] = word

    def choose(*options: str) -> str:
        return options[int(generator.integers(len(options)))]

    def say(attribute: str) -> str:
        return choose(*PHRASES[told[attribute]]) if attribute in told else ""

    def color(attribute: str) -> str:
        return choose(*COLOR_PHRASES[told[attribute].rsplit(" ", 1)[0]]) if attribute in told else ""

    noun = say("gender code") or choose("person", "pedestrian")
    if told.get("age") == "child":
        noun = {"female": "girl", "male": "boy"}.get(told.get("gender code", ""), "child")
        noun = choose(noun, f"young {noun}", "child")
    elif "age" in told:
        noun = f"{say('age')} {noun}"
    pronoun = {"female": "she", "male": "he"}.get(told.get("gender code", ""), "the person")

    look, wear, carry, scene = ([] for _ in range(4))  # type: list[str], list[str], list[str], list[str]
    hair, shade = say("hair style"), color("hair color")
    if shade and "bald" not in told.get("hair style", ""):
        hair = hair or "hair"
        if shade.startswith("of"):
            hair += f" {shade}"
        else:
            shade = {"yellow": choose("blond", "yellow"), "white": choose("white", "grey")}.get(shade, shade)
            hair = hair.replace("hair", f"{shade} hair", 1)
    look += filter(None, (hair, say("glass style"), say("cap style"), say("glove")))

    coat = " ".join(filter(None, (color("coat color"), say("coat style") or choose("top", "coat"))))
    if {"coat color", "coat style", "coat length"} & told.keys():
        sleeves = say("coat length")
        wear.append(_article(coat) + (f" with {sleeves}" if sleeves else ""))
    if {"trousers color", "trousers length"} & told.keys() and told.get("coat style") != "dress":
        legs = " ".join(filter(None, (color("trousers color"), say("trousers length") or "trousers")))
        wear.append(_article(legs) if legs.endswith("skirt") else legs)
    elif told.get("trousers length") and "coat style" not in told:
        wear.append(_article(say("trousers length")))
    if {"shoes color", "shoes style"} & told.keys():
        wear.append(" ".join(filter(None, (color("shoes color"), say("shoes style") or "shoes"))))
    generator.shuffle(wear)  # type: ignore[arg-type]
    uniform = say("uniform")
    if uniform:
        wear.insert(0, uniform if uniform.startswith(("every", "common", "clothes", "high")) else _article(uniform))
    if "bag style" in told:
        carry.append(say("bag style") if told["bag style"] == "without bag" else _article(say("bag style")))
    carry += filter(None, (say("umbrella"),))
    scene += filter(
        None, (say("pose"), say("smoking"), f"seen {say('person angle')}" if "person angle" in told else "")
    )
    scene = [item.replace("seen facing", "facing") for item in scene]

    clauses = []
    if wear:
        clauses.append(f"{choose('wears', 'is wearing', 'is dressed in', 'has on')} {_list(wear)}")
    if look:
        clauses.append(f"has {_list(look)}")
    if carry:
        clauses.append(f"{choose('carries', 'has', 'is carrying')} {_list(carry)}")
    if scene:
        clauses.append(f"is {_list(scene)}")
    generator.shuffle(clauses)  # type: ignore[arg-type]
    subject = choose(_article(noun), f"the {noun}", f"this {noun}")
    if len(clauses) > 1 and look and generator.random() < 0.6:
        rest = [clause for clause in clauses if clause != f"has {_list(look)}"]
        subject, clauses = f"{subject} with {_list(look)}", rest
    if not clauses:
        return f"This is {_article(noun)}."
    sentences = [f"{subject} {clauses[0]}"]
    for clause in clauses[1:]:
        if len(clauses) > 2 and generator.random() < 0.35 and " and " not in sentences[-1]:
            sentences[-1] += f" and {clause}"
        else:
            sentences.append(f"{pronoun} {clause}")
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
