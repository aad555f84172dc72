"""Vocabulary of the testbed: about 400 words, each with one role.

A *family* groups the aspects that the same adjectives and verbs fit: bread can be soggy and melt, a plot can not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Family:
    """Aspects with their parts, and the adjectives and verbs of praise and of blame that fit them."""

    praise: tuple[str, ...]
    blame: tuple[str, ...]
    praise_verbs: tuple[str, ...]
    blame_verbs: tuple[str, ...]
    aspects: dict[str, tuple[str, ...]]

    @cached_property
    def nouns(self) -> frozenset[str]:
        """All aspects of the family and their parts."""
        return frozenset(self.aspects).union(*self.aspects.values())

    @cached_property
    def fitting(self) -> frozenset[str]:
        """All adjectives and verbs that fit the family's nouns."""
        return frozenset(self.praise + self.blame + self.praise_verbs + self.blame_verbs)


def _family(praise: str, blame: str, praise_verbs: str, blame_verbs: str, **aspects: str) -> Family:
    first, second, third, fourth = (tuple(text.split()) for text in (praise, blame, praise_verbs, blame_verbs))
    return Family(first, second, third, fourth, {aspect: tuple(parts.split()) for aspect, parts in aspects.items()})


FAMILIES = (
    _family(
        "fresh buttery fragrant golden silky generous juicy",
        "stale greasy burnt soggy sour watery bitter",
        "melted lingered sparkled",
        "curdled sagged crumbled",
        breakfast="eggs toast jam",
        soup="broth herbs noodles",
        bread="crust loaves dough",
        coffee="foam beans aroma",
        cake="icing cherries cream",
        wine="grapes cork bouquet",
    ),
    _family(
        "soaring tender crisp thunderous haunting mellow velvety",
        "shrill muffled tinny droning strained deafening hoarse",
        "soared shimmered danced",
        "screeched droned wheezed",
        music="strings drums melody",
        singing="voice harmonies chorus",
        sound="bass speakers echo",
    ),
    _family(
        "gripping witty daring moving clever surprising subtle",
        "predictable tangled hollow clumsy tedious rushed confused",
        "sparkled unfolded dazzled",
        "stumbled dragged fizzled",
        plot="twists pace secret",
        dialogue="jokes quarrels banter",
        ending="farewell reunion revelation",
    ),
    _family(
        "gracious patient attentive radiant sincere graceful lively",
        "rude careless wooden sullen impatient stiff bored",
        "shone charmed dazzled",
        "sulked stumbled grumbled",
        acting="gestures hero villain",
        service="waiters greeting host",
        staff="porters manager cleaners",
        guide="stories answers manners",
    ),
    _family(
        "sunlit airy spotless peaceful elegant spacious leafy",
        "damp gloomy dusty cramped noisy shabby drafty",
        "glowed bloomed gleamed",
        "crumbled peeled sagged",
        room="bed curtains windows",
        view="hills harbor sunset",
        garden="roses paths fountain",
        hall="seats balcony ceiling",
    ),
    _family(
        "sturdy sleek responsive sharp reliable nimble precise",
        "flimsy sluggish fragile glitchy dim bulky unstable",
        "hummed gleamed flew",
        "froze flickered failed",
        screen="colors glass pixels",
        battery="charger cable plug",
        keyboard="keys buttons hinge",
        lens="focus zoom shutter",
    ),
)

SUBJECTS = {
    "film": ("plot", "acting", "music", "ending"),
    "play": ("dialogue", "acting", "hall", "ending"),
    "novel": ("plot", "dialogue", "ending"),
    "opera": ("singing", "music", "hall", "acting"),
    "concert": ("singing", "sound", "music", "hall"),
    "hotel": ("breakfast", "room", "view", "staff"),
    "restaurant": ("soup", "bread", "wine", "service"),
    "bakery": ("bread", "cake", "coffee", "service"),
    "cafe": ("coffee", "cake", "garden", "service"),
    "museum": ("guide", "garden", "hall", "view"),
    "phone": ("screen", "battery", "lens", "sound"),
    "laptop": ("screen", "battery", "keyboard", "sound"),
}

PLURAL = frozenset(
    "eggs herbs noodles loaves beans cherries grapes strings drums harmonies speakers twists jokes quarrels gestures "
    "waiters porters cleaners stories answers manners curtains windows hills roses paths seats colors pixels keys "
    "buttons".split()
)

PLAIN_PRAISE = ("good", "nice", "fine", "pleasant", "great", "decent")
PLAIN_BLAME = ("bad", "poor", "weak", "dull", "awful", "wrong")
DEGREES = ("very", "really", "quite", "so", "rather", "truly")

LIKED = ("loved", "enjoyed", "admired", "adored", "praised")
DISLIKED = ("hated", "disliked", "regretted", "resented", "endured")
JOYS = ("joy", "treat", "delight", "triumph")
CHORES = ("chore", "mess", "letdown", "mistake")
SEEK = ("recommend", "revisit", "choose")
SHUN = ("avoid", "skip", "forget")

BRIGHT_FIRST = ("warm", "bright", "soft", "clear", "summer", "morning")
BRIGHT_SECOND = ("honey", "rain", "silk", "light", "water", "birdsong")
GREY_FIRST = ("wet", "cold", "old", "grey", "broken", "rusty")
GREY_SECOND = ("cardboard", "gravel", "socks", "mud", "smoke", "tin")

TONES = ("kind", "harsh", "fair")
REPUTATIONS = ("famous", "new", "troubled")
LENGTHS = ("one", "two", "three")

ASPECT_FAMILY = {aspect: family for family in FAMILIES for aspect in family.aspects}
NOUN_FAMILY = {noun: family for family in FAMILIES for noun in family.nouns}
PARTS = {aspect: parts for family in FAMILIES for aspect, parts in family.aspects.items()}

PRAISE = frozenset(word for f in FAMILIES for word in f.praise + f.praise_verbs).union(
    PLAIN_PRAISE, LIKED, JOYS, SEEK, BRIGHT_FIRST, BRIGHT_SECOND
)
BLAME = frozenset(word for f in FAMILIES for word in f.blame + f.blame_verbs).union(
    PLAIN_BLAME, DISLIKED, CHORES, SHUN, GREY_FIRST, GREY_SECOND
)
SIMILE = frozenset(BRIGHT_FIRST + BRIGHT_SECOND + GREY_FIRST + GREY_SECOND)
