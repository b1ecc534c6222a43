"""Imported weights of the `graco` family: published checkpoints converted and kept by name, each with its card.

`DATA/weights/<name>/` holds `weights.safetensors` (a base) or `adapter.safetensors`, and `card.json`. A folder appears
whole or not at all: it is filled beside and renamed, and what a killed import left is cleared away by the next one.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from active_learning.folders import draft_folder, sync
from ml_backend.settings import Settings
from model.adapter import read_adapter, write_adapter
from model.graco import weights
from model.graco.inputs import Architecture
from model.graco.pickles import Checkpoint, read_checkpoint
from model.graco.weights import Kind
from model.segmenter import digest_of_file
from model.types import Refusal

CARD = "card.json"
FILES: dict[Kind, str] = {"base": "weights.safetensors", "adapter": "adapter.safetensors"}
Format = Literal["pth", "safetensors"]

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LONGEST = 64  # of a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of imported weights."""

    name: str
    kind: Kind
    origin: str  # name of the file they came from
    origin_sha256: str
    digest: str  # sha256 of our file; a base is known by it
    architecture: dict[str, Any]  # of an adapter: that of its base
    input_size: int  # pixels
    base: str | None  # digest of the base an adapter is for
    branches: tuple[str, ...]  # of an adapter
    tensors: int
    values: int
    not_used: tuple[str, ...]  # published tensors that the network does without
    config: dict[str, Any] | None  # the origin's, as far as it is plain data
    config_left_out: tuple[str, ...]
    imported: str  # UTC, ISO 8601


class WeightsStore:
    """The imported weights below one folder; several processes may use it."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; it is made when the first weights are kept."""
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of what is kept, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())

    def card(self, name: str) -> Card:
        """Return what is known of weights.

        Raises:
            Refusal: there are none of that name, or their card is damaged.
        """
        if name not in self.names():
            raise Refusal(
                f"there are no weights {_printable(name)}; there are: {', '.join(self.names()) or 'none yet'}"
            )
        try:
            told = json.loads((self.folder / name / CARD).read_text())
            values = ((field.name, told[field.name]) for field in fields(Card))
            known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values}
            return Card(**known)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"the card of weights {name} is damaged ({error!r}); remove and import them again: "
                f"python -m ml_backend weights remove {name}"
            ) from error

    def path(self, name: str) -> Path:
        """Return the weights file of a name; see `card` for what it raises."""
        return self.folder / name / FILES[self.card(name).kind]

    def import_(
        self,
        source: Path,
        *,
        now: datetime,
        name: str | None = None,
        base: str | None = None,
        part: Kind | None = None,
    ) -> Card:
        """Convert and keep a published checkpoint, and return its card; the same file twice is kept once.

        Args:
            source: a `.pth` or safetensors file.
            now: the time, UTC.
            name: to keep it by; None: made from the file's name.
            base: name of the base that an adapter is for; None: the only one it fits.
            part: which of the two to take where the file holds a base and an adapter.

        Raises:
            Refusal: the file is no checkpoint of this family, or what it needs is not here, or the name is taken.
        """
        checkpoint = read_checkpoint(source)
        kind = _kind(source, checkpoint, part)
        name = _name_for(source, part) if name is None else name
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise Refusal(
                f"{_printable(name)} is no name for weights; use up to {_LONGEST} of a-z, 0-9 and -, as in sbd-vit-b"
            )
        origin = digest_of_file(source)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._writing():
            if name in self.names():
                kept = self.card(name)
                if (kept.origin_sha256, kept.kind) == (origin, kind):
                    return kept
                raise Refusal(f"there are weights {name} already, from {kept.origin}; choose another one with --name")
            with draft_folder(self.folder) as draft:
                target = draft / FILES[kind]
                tensors = weights.part(checkpoint.tensors, kind)
                try:
                    told = (
                        _keep_base(target, tensors, checkpoint.config)
                        if kind == "base"
                        else self._keep_adapter(target, tensors, base)
                    )
                except Refusal as refusal:
                    raise Refusal(f"{source}: {refusal}") from refusal
                except SafetensorError as error:  # a full disk, which safetensors reports in its own way
                    raise OSError(f"{name} cannot be written ({error})") from error
                card = Card(
                    name=name,
                    kind=kind,
                    origin=source.name,
                    origin_sha256=origin,
                    digest=digest_of_file(target),
                    tensors=len(tensors),
                    values=sum(value.numel() for value in tensors.values()),
                    config=checkpoint.config,
                    config_left_out=checkpoint.left_out,
                    imported=now.isoformat(timespec="seconds"),
                    **told,
                )
                (draft / CARD).write_text(json.dumps(asdict(card), indent=1, sort_keys=True))
                for path in (*draft.iterdir(), draft):
                    sync(path)
                draft.rename(self.folder / name)
                sync(self.folder)
        return card

    def verify(self, name: str) -> Card:
        """Read weights through and compare them with their card, which is returned.

        Raises:
            Refusal: they are damaged, or an adapter's base is not here.
        """
        card = self.card(name)
        path = self.path(name)
        again = f"remove and import them again: python -m ml_backend weights remove {name}"
        if not path.is_file():
            raise Refusal(f"the file of weights {name} is gone; {again}")
        if digest_of_file(path) != card.digest:
            raise Refusal(f"the file of weights {name} is not the one that was imported; {again}")
        if card.kind == "base":
            own, architecture = weights.read_base(path)
            weights.check(weights.published(own), architecture)
        else:
            weights.adapter_from_published(
                weights.adapter_to_published(read_adapter(path, base=card.base)), _architecture(card), card.base or ""
            )
            self._base_of(card.base)
        return card

    def export(self, name: str, target: Path, form: Format) -> Path:
        """Write weights in the published format, as the published code loads it, and return the path.

        Args:
            name: of weights kept here, or the path of an adapter file that was trained on one of them.
            target: the file to write; there must be none yet.
            form: pth, with tensors and config in plain data, or safetensors with the config as JSON in its metadata.

        Raises:
            Refusal: there are no such weights, or there is such a file, or no such folder.
            OSError: it cannot be written.
        """
        if target.exists():
            raise Refusal(f"there is {target} already; choose another file, or remove it first")
        if not target.parent.is_dir():
            raise Refusal(f"there is no folder {target.parent}; make it, or choose another file")
        if name in self.names():
            card = self.card(name)
            if card.kind == "base":
                own, architecture = weights.read_base(self.path(name))
                _write(target, weights.published(own), card.config or weights.make_config(architecture), form)
                return target
            adapter, architecture = read_adapter(self.path(name), base=card.base), _architecture(card)
            config = card.config
        elif Path(name).is_file():
            adapter = read_adapter(Path(name))
            architecture, config = _architecture(self._base_of(adapter.card["base"])), None
        else:
            self.card(name)  # says what there is
            raise AssertionError(name)
        tensors = weights.adapter_to_published(adapter)
        _write(target, tensors, config or weights.make_config(architecture, branches=adapter.lora), form)
        return target

    def remove(self, name: str) -> None:
        """Remove weights.

        Raises:
            Refusal: there are none of that name, or they are the base of an adapter kept here.
        """
        if name not in self.names():
            self.card(name)  # says what there is
        with self._writing():
            cards = list(self._cards())
            lost = {c.digest for c in cards if c.name == name} - {c.digest for c in cards if c.name != name}
            if needed := [c.name for c in cards if c.base in lost]:
                raise Refusal(f"weights {name} are the base of {', '.join(needed)}; remove these first")
            gone = self.folder / f".gone-{name}"
            (self.folder / name).rename(gone)
            shutil.rmtree(gone)

    def _cards(self) -> Iterator[Card]:
        for name in self.names():
            try:
                yield self.card(name)
            except Refusal:  # a damaged card, which `show` tells of
                continue

    def _base_of(self, digest: str | None) -> Card:
        """Return the card of the base with a digest."""
        for card in self._cards():
            if card.kind == "base" and card.digest == digest:
                return card
        raise Refusal(f"the base {str(digest)[:12]} of this adapter is not here; import the checkpoint it came from")

    def _keep_adapter(self, target: Path, tensors: dict[str, Tensor], base: str | None) -> dict[str, Any]:
        """Write an adapter, and return what its card says of it."""
        found = self._choose_base(tensors, base)
        architecture = _architecture(found)
        adapter = weights.adapter_from_published(tensors, architecture, found.digest)
        write_adapter(target, card=adapter.card, plain=adapter.plain, lora=adapter.lora, exact=True)
        return {
            **{"architecture": found.architecture, "input_size": found.input_size},
            **{"base": found.digest, "branches": tuple(sorted(adapter.lora)), "not_used": ()},
        }

    def _choose_base(self, tensors: dict[str, Tensor], name: str | None) -> Card:
        if name is not None:
            card = self.card(name)
            if card.kind != "base":
                raise Refusal(f"{name} is an adapter; name the base it is for with --base")
            return card
        bases = [card for card in self._cards() if card.kind == "base"]
        width, depth = weights.adapter_size(tensors)
        fitting = [c for c in bases if (c.architecture["width"], c.architecture["depth"]) == (width, depth)]
        if len({c.digest for c in fitting}) == 1:
            return fitting[0]
        if fitting:
            raise Refusal(f"this adapter fits {', '.join(c.name for c in fitting)}; name the one with --base")
        here = ", ".join(f"{c.name} ({c.architecture['width']} x {c.architecture['depth']})" for c in bases) or "none"
        raise Refusal(
            f"this is an adapter for a base of width {width} with {depth} blocks, and there is no such base here "
            f"(there are: {here}); import the base first, such as sbd_vit_base.pth for GraCo_base_lora.pth"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other writers out, and clear away what a killed one left."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in (*self.folder.glob(".draft-*"), *self.folder.glob(".gone-*")):
                shutil.rmtree(left, ignore_errors=True)
            yield


def open_store(settings: Settings) -> WeightsStore:
    """Return the store below the data directory."""
    return WeightsStore(settings.data_dir / "weights")


def _kind(source: Path, checkpoint: Checkpoint, part: Kind | None) -> Kind:
    """Return which kind of weights to take from a checkpoint."""
    held: set[Kind] = weights.kinds_of(checkpoint.tensors)
    if part is None and len(held) > 1:
        raise Refusal(f"{source} holds a base and an adapter; import each by itself: --part base, then --part adapter")
    if part is not None and part not in held:
        raise Refusal(f"{source} holds no {part}; leave --part out")
    return part if part is not None else next(iter(held), "base")


def _keep_base(target: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> dict[str, Any]:
    """Write a base, and return what its card says of it."""
    architecture = weights.architecture_of(tensors, config)
    not_used = weights.check(tensors, architecture)
    weights.write_base(target, weights.ours(tensors), architecture)
    return {
        **{"architecture": asdict(architecture), "input_size": architecture.size},
        **{"base": None, "branches": (), "not_used": not_used},
    }


def _architecture(card: Card) -> Architecture:
    return Architecture(**card.architecture | {"neck": tuple(card.architecture["neck"])})


def _name_for(source: Path, part: Kind | None) -> str:
    """Return a name made from a file's: sbd_vit_base.pth gives sbd-vit-base.

    >>> _name_for(Path("weights/GraCo_base_lora.pth"), None)
    'graco-base-lora'
    """
    stem = re.sub(r"[^a-z0-9]+", "-", source.stem.lower()).strip("-")[:48].strip("-") or "weights"
    return stem if part is None else f"{stem}-{part}"


def _write(target: Path, tensors: dict[str, Tensor], config: dict[str, Any], form: Format) -> None:
    draft = target.with_name(f".{target.name}.draft")
    whole = {  # a view would be written with all that is around it
        name: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for name, v in tensors.items()
    }
    try:
        if form == "pth":
            torch.save({"state_dict": whole, "config": config}, draft)
        else:
            save_file(whole, draft, {"config": json.dumps(config)})
        draft.chmod(0o644)
        draft.replace(target)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f"{target} cannot be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


def _printable(name: str) -> str:
    return repr(name)[1:-1][:80]
