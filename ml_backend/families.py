"""Which model serves, as the settings say: its family, base weights and configured adapter, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml_backend.settings import Settings
from model.segmenter import (
    BUNDLED,
    BUNDLED_ADAPTER,
    Device,
    Segmenter,
    digest_of_file,
    load_segmenter,
)
from model.types import Refusal

if TYPE_CHECKING:
    from ml_backend.weights_store import WeightsStore

LIGHT, GRACO = "light", "graco"
_CLIP = "clip"  # folder for the text encoder of phrases, below the data directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base weights that are chosen."""

    family: str
    path: Path
    digest: str  # SHA-256 of the file

    @property
    def version(self) -> str:
        """Family and digest, as the loaded segmenter says it."""
        return f"{self.family}-{self.digest[:8]}"


def base_of(settings: Settings) -> Base:
    """Return the base weights that the settings name; nothing is loaded.

    Raises:
        Refusal: there are none, or several and no name, or they cannot be read.
    """
    if settings.family == LIGHT:
        return Base(family=LIGHT, path=BUNDLED, digest=digest_of_file(BUNDLED))
    store = _store(settings)
    name = settings.weights
    if name is None:
        bases = [card.name for card in map(store.card, store.names()) if card.kind == "base"]
        if len(bases) != 1:
            raise Refusal(
                f"GRACO_WEIGHTS has to name one of several imported bases: {', '.join(bases)}"
                if bases
                else "GRACO_FAMILY=graco needs a published checkpoint: python -m ml_backend weights import FILE"
            )
        name = bases[0]
    card = store.card(name)
    if card.kind != "base":
        raise Refusal(f"GRACO_WEIGHTS={name} is an adapter; name its base, and give the adapter by GRACO_ADAPTER")
    return Base(family=GRACO, path=store.path(name), digest=card.digest)


def adapter_file(settings: Settings) -> Path | None:
    """Return the adapter to serve with where no version is active; None: the base weights alone.

    `bundled` is the one in the repository, or of `graco` the imported one for this base.

    Raises:
        Refusal: several imported adapters fit, and none is named.
    """
    if isinstance(settings.adapter, Path):
        return settings.adapter
    if settings.adapter == "none":
        return None
    if settings.family == LIGHT:
        return BUNDLED_ADAPTER
    store, digest = _store(settings), base_of(settings).digest
    cards = map(store.card, store.names())
    fitting = [card.name for card in cards if card.kind == "adapter" and card.base == digest]
    if len(fitting) > 1:
        raise Refusal(
            f"several imported adapters fit the base: {', '.join(fitting)}; choose: "
            f"GRACO_ADAPTER={store.path(fitting[0])}, or none"
        )
    return store.path(fitting[0]) if fitting else None


def configured_version(settings: Settings) -> str:
    """Return the version of base and configured adapter, which serve where no line has a version.

    Raises:
        Refusal: one of the files cannot be read.
    """
    base, adapter = base_of(settings), adapter_file(settings)
    if adapter is None:
        return base.version
    name = adapter.stem if adapter.stem != "adapter" else adapter.parent.name  # an imported one is known by its folder
    return f"{base.version}+{name.removeprefix(f'{base.family}-')}-{digest_of_file(adapter)[:8]}"


def load_model(
    settings: Settings, *, adapter: Path | None, device: Device | None = None, threads: int | None = None
) -> Segmenter:
    """Return the chosen base with an adapter, loaded.

    Args:
        settings: say which, and how it runs.
        adapter: its file, `adapter_file(settings)` for the configured one; None: none.
        device: another than the settings name.
        threads: of the CPU, other than the settings say; 0: one per core.

    Raises:
        Refusal: a file is missing, damaged, or does not fit.
    """
    base = base_of(settings)
    clip = None
    if base.family == GRACO:
        from model.graco.text import find_clip

        clip = find_clip(clip_folder(settings))
    segmenter = load_segmenter(
        base.family,
        base.path,
        adapter=adapter,
        device=device or settings.device,
        encoder=settings.encoder,
        speed=settings.speed,
        size=settings.input_size,
        threads=settings.compute_threads if threads is None else threads,
        compiled=settings.cache_dir,
        clip=clip,
    )
    if base.family == GRACO and segmenter.version != base.version:
        raise Refusal(f"weights {base.path} are not those that were imported; import them again")
    return segmenter


def clip_folder(settings: Settings) -> Path:
    """Return the folder that CLIP's weights are put into, for phrases of `graco`."""
    return settings.data_dir / _CLIP


def _store(settings: Settings) -> WeightsStore:
    from ml_backend.weights_store import open_store

    return open_store(settings)
