"""Which model serves: the family graco from imported weights, through the whole service, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import torch
from safetensors.torch import load_file, save_file

from ml_backend import doctor, families
from ml_backend.app import create_app
from ml_backend.label_config import make_config
from ml_backend.service import Service, serving_version
from ml_backend.weights_store import open_store
from model.graco import weights
from model.graco.weights import write_base
from model.segmenter import digest_of_file, load_segmenter
from model.types import Refusal
from tests.ml_backend.conftest import ask, box, click, settings_for
from tests.model.graco.synthetic import TINY, made_adapter, made_base

NOW = datetime(2026, 11, 25, tzinfo=UTC)
LEVELS = tuple(level / 10 for level in range(1, 11))


@pytest.fixture
def published(tmp_path):
    """The files of a tiny base and its adapter, as published."""
    base = made_base(TINY)
    base["head.conv_seg.bias"].fill_(-9.0)  # so that masks are neither all nor nothing
    torch.save({"state_dict": base, "config": _config()}, tmp_path / "sbd_vit_tiny.pth")
    adapter = made_adapter(TINY)
    adapter["backbone.gra_embed.weight"] *= 30  # so that masks, not only probabilities, tell the levels apart
    torch.save({"state_dict": adapter, "config": {}}, tmp_path / "GraCo_tiny_lora.pth")
    return tmp_path / "sbd_vit_tiny.pth", tmp_path / "GraCo_tiny_lora.pth"


@pytest.fixture
def settings(tmp_path, label_studio, monkeypatch):
    monkeypatch.setattr(families, "load_segmenter", load_segmenter)  # services of other tests share one model
    return settings_for(tmp_path / "data", label_studio, family="graco", cache_dir=tmp_path / "cache")


@pytest.fixture
def imported(settings, published):
    """The settings, with base and adapter imported."""
    store = open_store(settings)
    for file in published:
        store.import_(file, now=NOW)
    return settings


def test_imported_weights_answer_clicks_levels_and_all_levels_of_one_click(imported):
    service = Service(imported)
    try:
        client = create_app(service).test_client()
        config = make_config(["Object"], levels=LEVELS)
        version = client.post("/setup", json={"project": "3", "schema": config}).json["model_version"]
        assert version == serving_version(imported) == families.configured_version(imported)
        assert version.startswith("graco-")
        assert "tiny-lora" in version
        found = []
        for level in (None, "0.2", "0.9"):
            body = ask(click(31, 40, level=level), config=config)
            answer = client.post("/predict", json=body).json["results"][0]
            assert answer["model_version"] == version
            found.append(tuple(answer["result"][0]["value"]["rle"]))
        assert len(set(found)) == 3, "levels are obeyed"
        offered = client.post("/predict", json=ask(click(31, 40, level="all"), config=config)).json["results"]
        assert all(0 <= one["score"] <= 1 for one in offered)
        refused = client.post("/predict", json=ask(box(10, 10, 30, 30), config=config)).json["results"][0]
        assert not refused["result"]
    finally:
        service.close()


def test_without_imported_weights_the_sentence_says_what_to_import(settings):
    with pytest.raises(Refusal, match="weights import FILE"):
        families.base_of(settings)


def test_several_bases_need_a_name_and_an_adapter_is_none(imported, tmp_path):
    other = made_base(TINY)
    store = open_store(imported)
    other["head.conv_seg.bias"] += 1
    torch.save({"state_dict": other, "config": _config()}, tmp_path / "other.pth")
    store.import_(tmp_path / "other.pth", now=NOW)
    with pytest.raises(Refusal, match=r"GRACO_WEIGHTS has to name one.*other, sbd-vit-tiny"):
        families.base_of(imported)
    named = imported.model_copy(update={"weights": "other"})
    assert families.base_of(named).digest == digest_of_file(store.path("other"))
    assert families.adapter_file(named) is None, "the adapter is for the first base"
    with pytest.raises(Refusal, match="is an adapter; name its base"):
        families.base_of(imported.model_copy(update={"weights": "graco-tiny-lora"}))


def _config():
    return {"class": "any", "params": {"backbone_params": {"type": "builtin", "value": {"num_heads": TINY.heads}}}}


def test_weights_that_were_changed_after_the_import_do_not_serve(imported):
    path = families.base_of(imported).path
    tensors, architecture = weights.read_base(path)
    write_base(path, {name: value + 1 for name, value in tensors.items()}, architecture)
    with pytest.raises(Refusal, match="are not those that were imported"):
        families.load_model(imported, adapter=None, device="cpu")


def test_the_doctor_looks_at_the_family_that_is_chosen(imported):
    assert next(doctor._weights(imported)).status == "ok"
    assert next(doctor._adapter(imported)).status == "ok"
    phrases = next(doctor._phrases(imported))
    assert (phrases.status, "clip" in phrases.remedy) == ("warning", True)
    families.base_of(imported).path.write_bytes(b"")
    broken = next(doctor._weights(imported))
    assert (broken.status, "weights" in broken.remedy) == ("error", True)


def test_the_bundled_adapter_of_light_is_not_one_of_graco(imported, tmp_path):
    lame = imported.model_copy(update={"adapter": families.BUNDLED_ADAPTER})
    with pytest.raises(Refusal, match="was trained on base"):
        families.load_model(lame, adapter=families.adapter_file(lame), device="cpu")
    save_file(load_file(families.BUNDLED), tmp_path / "light.safetensors")
    with pytest.raises(Refusal):
        open_store(imported).import_(tmp_path / "light.safetensors", now=NOW)
