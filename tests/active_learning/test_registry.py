"""Versions of adapters: whole or not there, one serving, the way back, and nothing damaged ever made to serve."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from active_learning.lines import line_of
from active_learning.registry import AdapterRegistry
from model.adapter import read_adapter, write_adapter
from model.types import Refusal

BASE = "ab" * 32


def adapter(folder, seed, *, base=BASE):
    """A small adapter file; another seed, another digest."""
    values = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
    lora = {"level": {"q_proj.lora_A.weight": values[:4].clone(), "q_proj.lora_B.weight": values[:, :4].clone()}}
    card = {"base": base, "rank": 4, "alpha": 8}
    write_adapter(folder / f"trained-{seed}.safetensors", card=card, plain={"levels.weight": values}, lora=lora)
    return folder / f"trained-{seed}.safetensors"


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry(tmp_path / "adapters", base=BASE)


@pytest.fixture
def publish(registry, tmp_path):
    """Publish one adapter a seed in line `shared`, active from then on."""

    def make(seed, *, line="shared", activate=True, **card):
        told = {"recipe": "quick", "seed": seed, "scores": {"noc90": 3.5}, "accepted": True} | card
        return registry.publish(line, adapter(tmp_path, seed), card=told, activate=activate)

    return make


def went_back(registry):
    way = registry.roll_back("shared")
    assert way.passed_over == ()
    return registry.get("shared", way.was), way.now


def test_a_published_version_is_kept_with_its_card_and_pictures_and_serves(registry, tmp_path):
    assert (registry.lines(), registry.versions("shared"), registry.active("shared")) == ([], [], None)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "worst.png").write_bytes(b"png")
    (pictures / "notes.exe").write_bytes(b"no picture")
    file = adapter(tmp_path, 1)
    card = {"parent": None, "snapshot": "5na9", "recipe": "quick", "seed": 4, "accepted": True, "reasons": ["better"]}
    version = registry.publish("project-3", file, card=card, activate=True, folder_of_pictures=pictures)
    assert version.id == f"v0001-{version.digest[:8]}"
    assert (version.line, version.snapshot, version.seed, version.base) == ("project-3", "5na9", 4, BASE)
    assert registry.active("project-3") == version == registry.get("project-3", version.id)
    assert registry.card("project-3", version.id)["reasons"] == ["better"]
    assert registry.path(version).read_bytes() == file.read_bytes()
    kept = {path.name for path in registry.path(version).parent.iterdir()}
    assert kept == {"adapter.safetensors", "card.json", "worst.png"}
    assert registry.lines() == ["project-3"]


def test_publishing_the_same_file_with_the_same_verdict_twice_keeps_it_once(registry, publish):
    first = publish(1, activate=False, snapshot="a")
    assert publish(1, snapshot="a") == first == registry.active("shared")
    assert publish(1, snapshot="b").id != first.id
    assert [version.id[:5] for version in registry.versions("shared")] == ["v0001", "v0002"]


def test_lines_do_not_see_each_other(registry, publish):
    mine, shared = publish(1, line=line_of(3)), publish(2)
    assert registry.active("project-3") == mine
    assert registry.active("shared") == shared
    assert registry.active("project-4") is None


def test_going_back_serves_what_was_active_before_and_then_what_was_before_that(registry, publish):
    first, second, third = publish(1), publish(2, parent="v0001"), publish(3)
    registry.activate("shared", first.id)
    assert went_back(registry) == (first, third)
    assert went_back(registry) == (third, second)
    assert went_back(registry) == (second, first)
    assert went_back(registry) == (first, None)
    assert registry.active("shared") is None
    with pytest.raises(Refusal, match="nothing to go back from"):
        registry.roll_back("shared")


def test_activating_nothing_leaves_the_line_to_the_shared_or_configured_one_and_can_be_undone(registry, publish):
    first = publish(1)
    assert registry.activate("shared", None) is None
    assert registry.active("shared") is None
    second = publish(2)
    assert went_back(registry) == (second, None)
    assert registry.activate("shared", first.id) == first


def test_the_history_says_what_was_activated_when_and_by_whom(registry, publish, tmp_path):
    first = publish(1)
    registry.activate("shared", None, by="ann")
    entries = [json.loads(line) for line in (tmp_path / "adapters/shared/history.jsonl").read_text().splitlines()]
    assert [(entry["by"], entry["version"]) for entry in entries] == [("training", first.id), ("ann", None)]
    assert all(entry["at"].endswith("+00:00") for entry in entries)


def test_pruning_keeps_the_newest_what_serves_its_parent_and_the_version_to_go_back_to(registry, publish):
    parent, oldest, before = publish(1), publish(2, activate=False), publish(3)
    serving = publish(4, parent=parent.id)
    newer = [publish(seed, activate=False) for seed in (5, 6)]
    assert registry.prune("shared", keep=1) == [oldest.id, newer[0].id]
    assert registry.versions("shared") == [parent, before, serving, newer[1]]
    assert went_back(registry) == (serving, before)
    assert registry.prune("shared", keep=0) == [serving.id, newer[1].id]


def test_the_parent_of_what_another_line_serves_is_not_pruned(registry, publish):
    shared = publish(1)
    publish(2, line="project-3", parent=shared.id)
    registry.activate("shared", None)
    publish(3)
    publish(4)
    assert shared.id not in registry.prune("shared", keep=0)


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit flipped":
        data[-3] ^= 1
        path.write_bytes(data)
    elif how == "gone":
        path.unlink()
    elif how == "not a number":
        tensors = load_file(path)
        tensors["plain.levels.weight"][0, 0] = float("nan")
        card = json.dumps(read_adapter(path).card)
        save_file(tensors, path, {"card": card})


SPOILT = ["truncated", "empty", "bit flipped", "gone", "not a number"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_version_is_not_activated_and_what_serves_goes_on(registry, publish, how):
    bad, good = publish(1), publish(2)
    spoil(registry.path(bad), how)
    with pytest.raises(Refusal, match=r"damaged|cannot be read"):
        registry.activate("shared", bad.id)
    with pytest.raises(Refusal):
        registry.export("shared", bad.id, registry.path(good).parent.parent / "out.zip")
    assert registry.active("shared") == good
    again = publish(1)
    assert again.id.startswith("v0003"), "a damaged one is not taken for the same"


@pytest.mark.parametrize("how", SPOILT)
def test_going_back_passes_over_what_is_damaged_and_says_so(registry, publish, how):
    good, bad, serving = publish(1), publish(2), publish(3)
    spoil(registry.path(bad), how)
    way = registry.roll_back("shared")
    assert (way.was, way.now) == (serving.id, good)
    (why,) = way.passed_over
    assert bad.id in why
    assert went_back(registry) == (good, None)


@pytest.mark.parametrize("how", ["without a card", "with half a card", "gone", "torn"])
def test_one_goes_back_from_a_version_that_cannot_be_read(registry, publish, how):
    good, bad = publish(1), publish(2)
    if how == "gone":
        shutil.rmtree(registry.path(bad).parent)
    elif how == "torn":
        registry.path(bad).parents[1].joinpath("ACTIVE").write_text("v000")
        registry.path(bad).unlink()
    else:
        registry.path(bad).with_name("card.json").write_text("{" * (how == "with half a card"))
    way = registry.roll_back("shared")
    assert (way.was, way.now) == ("v000" if how == "torn" else bad.id, good)
    assert registry.active("shared") == good
    assert publish(3) == registry.active("shared")
    assert registry.roll_back("shared").now == good


@pytest.mark.parametrize("how", [*SPOILT[:2], *SPOILT[3:], "other base"])
def test_what_cannot_serve_is_not_published_nor_imported_and_leaves_nothing(registry, publish, tmp_path, how):
    good = publish(1)
    file = adapter(tmp_path, 2, base="cd" * 32 if how == "other base" else BASE)
    spoil(file, how)
    for keep in (lambda: registry.publish("shared", file, card={}, activate=True),) * (how != "gone") + (
        lambda: registry.import_("shared", file),
    ):
        with pytest.raises(Refusal):
            keep()
    assert registry.versions("shared") == [good] == [registry.active("shared")]
    assert not [name for name in os.listdir(tmp_path / "adapters/shared") if name.startswith(".draft")]


def test_a_version_of_another_base_is_refused_with_both_bases_named(publish, registry, tmp_path):
    version = publish(1)
    other = AdapterRegistry(tmp_path / "adapters", base="cd" * 32)
    with pytest.raises(Refusal, match=r"trained on base abababababab, but base cdcdcdcdcdcd is loaded"):
        other.activate("shared", version.id)


def test_a_version_goes_from_one_registry_to_another_as_one_file(registry, publish, tmp_path):
    version = publish(1, reasons=["better"])
    registry.path(version).with_name("worst.png").write_bytes(b"png")
    archive = registry.export("shared", version.id, tmp_path)
    assert archive == tmp_path / f"shared-{version.id}.zip"
    elsewhere = AdapterRegistry(tmp_path / "elsewhere", base=BASE)
    found = elsewhere.import_("project-9", archive)
    assert (found.digest, found.accepted, found.scores) == (version.digest, None, version.scores)
    assert found.note == f"imported, was shared {version.id}"
    assert elsewhere.active("project-9") is None
    assert elsewhere.path(found).with_name("worst.png").read_bytes() == b"png"
    assert elsewhere.import_("project-9", archive) == found
    assert elsewhere.activate("project-9", found.id) == found


def test_a_bare_adapter_file_can_be_imported(registry, tmp_path):
    found = registry.import_("shared", adapter(tmp_path, 1))
    assert (found.note, found.accepted) == ("from trained-1.safetensors", None)


def test_a_damaged_archive_is_refused(registry, publish, tmp_path):
    archive = registry.export("shared", publish(1).id, tmp_path)
    whole = archive.read_bytes()
    for place in range(5, len(whole), len(whole) // 60):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        elsewhere = AdapterRegistry(tmp_path / "elsewhere", base=BASE)
        try:
            found = elsewhere.import_("shared", archive)
        except Refusal:
            continue
        assert elsewhere.path(found).read_bytes() == registry.path(registry.versions("shared")[0]).read_bytes()
    archive.write_bytes(whole[:-30])
    with pytest.raises(Refusal):
        elsewhere.import_("project-1", archive)


def test_an_archive_writes_nowhere_else_and_what_claims_to_be_huge_is_not_read(registry, publish, tmp_path):
    archive = registry.export("shared", publish(1).id, tmp_path)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../../outside.png", b"x")
        file.writestr("/tmp/outside.png", b"x")
    elsewhere = AdapterRegistry(tmp_path / "elsewhere", base=BASE)
    found = elsewhere.import_("shared", archive)
    kept = {path.name for path in elsewhere.path(found).parent.iterdir()}
    assert kept == {"adapter.safetensors", "card.json"}
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("huge.png", bytes(33 * 2**20))
    with pytest.raises(Refusal, match="too large"):
        elsewhere.import_("project-1", archive)


def test_a_link_that_leads_out_of_a_version_is_neither_exported_nor_made_by_an_import(registry, publish, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary-1f3c")
    version = publish(1)
    registry.path(version).with_name("worst.png").symlink_to(secret)
    archive = registry.export("shared", version.id, tmp_path)
    with zipfile.ZipFile(archive, "a") as file:
        assert sorted(file.namelist()) == ["adapter.safetensors", "card.json"]
        link = zipfile.ZipInfo("curves.png")
        link.external_attr = 0o120777 << 16  # how zip says that it is a symbolic link
        file.writestr(link, str(secret))
    elsewhere = AdapterRegistry(tmp_path / "elsewhere", base=BASE)
    found = elsewhere.path(elsewhere.import_("shared", archive)).parent
    assert not any(path.is_symlink() for path in found.iterdir())
    assert all(b"canary-1f3c" not in path.read_bytes() for path in found.iterdir())


@pytest.mark.parametrize("line", ["", "project-", "project-x", "../shared", "project-3/..", "shared\n", "Shared"])
def test_what_is_no_line_is_refused(registry, line):
    with pytest.raises(Refusal, match="is no line"):
        registry.versions(line)


@pytest.mark.parametrize("version", ["", "..", "ACTIVE", "v1-1a2b3c4d", "v0001-1a2b3c4d/..", "../project-3"])
def test_what_is_no_version_is_refused(registry, publish, version):
    good = publish(1)
    with pytest.raises(Refusal, match="is no version's id"):
        registry.activate("shared", version)
    with pytest.raises(Refusal, match=f"it has: {good.id}"):
        registry.activate("shared", "v0007-1a2b3c4d")


@pytest.mark.parametrize("card", ["", "{", "[]", "{}", '{"id": 1}'])
def test_a_version_whose_card_is_spoilt_is_left_out_and_the_others_stay(registry, publish, card, caplog):
    bad, good = publish(1), publish(2)
    registry.path(bad).with_name("card.json").write_text(card)
    assert registry.versions("shared") == [good]
    assert f"the card of shared {bad.id}" in caplog.text
    with pytest.raises(Refusal, match="card"):
        registry.activate("shared", bad.id)
    assert publish(3).id.startswith("v0003"), "its number stays taken"


def test_a_torn_line_of_history_and_a_stray_file_are_passed_over(registry, publish, tmp_path):
    first, second = publish(1), publish(2)
    line = tmp_path / "adapters/shared"
    (line / "v0009-notes.txt").write_text("x")
    with (line / "history.jsonl").open("a") as file:
        file.write('{"at": "2026-')
    third = publish(3)
    assert went_back(registry) == (third, second)
    assert went_back(registry) == (second, first)


@pytest.fixture(scope="module")
def processes():
    """Real processes, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.active_learning.test_registry"])
    return context


def publish_within(folder, file, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        AdapterRegistry(folder, base=BASE).publish("shared", file, card={"why": ["long"] * 2000}, activate=True)
    except OSError:
        sys.exit(7)


def test_a_full_disk_leaves_what_serves_and_no_half_version(registry, publish, tmp_path, processes):
    """A limit on the size of files stands in for the disk: both fail in the middle of a write."""
    good, file = publish(1), adapter(tmp_path, 2)
    size = file.stat().st_size
    for limit in (size // 2, size + 100, 100):
        child = processes.Process(target=publish_within, args=(tmp_path / "adapters", file, limit))
        child.start()
        child.join(60)
        assert child.exitcode == 7
        assert registry.versions("shared") == [good] == [registry.active("shared")]
        assert not list((tmp_path / "adapters/shared").glob(".draft-*"))


def change_all_the_time(folder, files, ready):
    registry = AdapterRegistry(folder, base=BASE)
    ready.set()
    for turn in itertools.count():
        card = {"snapshot": f"s{turn} {os.getpid()}", "accepted": True}
        version = registry.publish("shared", files[turn % len(files)], card=card, activate=turn % 2 == 0)
        registry.activate("shared", version.id)
        if turn % 3 == 2:
            registry.roll_back("shared")
        registry.prune("shared", keep=3)


def publish_five(folder, file):
    registry = AdapterRegistry(folder, base=BASE)
    for turn in range(5):
        registry.publish("shared", file, card={"snapshot": f"{file} {turn}"}, activate=True)


def test_killed_at_any_moment_a_writer_leaves_a_registry_that_reads_and_a_whole_version_active(
    registry, tmp_path, processes
):
    files = [adapter(tmp_path, seed) for seed in range(4)]
    first = registry.publish("shared", files[0], card={"snapshot": "first"}, activate=True)
    chance = random.Random(4)
    seen = set()
    for turn in range(20):
        ready = processes.Event()
        child = processes.Process(target=change_all_the_time, args=(tmp_path / "adapters", files, ready))
        child.start()
        assert ready.wait(60)
        time.sleep(chance.random() * 0.2)
        child.kill()
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
        active = registry.active("shared")
        assert active is not None
        read_adapter(registry.intact(active), base=BASE)
        versions = registry.versions("shared")
        assert all(registry.intact(version) for version in versions)
        assert len(versions) == len([n for n in os.listdir(tmp_path / "adapters/shared") if n.startswith("v")])
        seen.add(active.id)
        published = registry.publish("shared", files[1], card={"snapshot": f"kill {turn}"}, activate=True)
        assert registry.active("shared") == published
        assert went_back(registry) == (published, active)
    assert len(seen) > 5, "the kills fell at different moments"
    left = [n for n in os.listdir(tmp_path / "adapters/shared") if n.startswith((".draft", ".gone"))]
    assert left == []
    assert first.id not in {version.id for version in registry.versions("shared")}


def test_writers_side_by_side_lose_no_version(registry, tmp_path, processes):
    files = [adapter(tmp_path, seed) for seed in range(3)]
    children = [processes.Process(target=publish_five, args=(tmp_path / "adapters", file)) for file in files]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    versions = registry.versions("shared")
    assert [int(version.id[1:5]) for version in versions] == list(range(1, 16))
    assert len({version.snapshot for version in versions}) == 15


def test_reading_what_serves_takes_a_tenth_of_a_millisecond(registry, publish):
    publish(1)
    start = time.perf_counter()
    for _ in range(1000):
        registry.active_id("shared")
    assert time.perf_counter() - start < 0.1 * 5, "five times that on a busy machine"


def test_an_active_file_that_names_no_version_is_a_sentence(registry, publish, tmp_path):
    publish(1)
    (tmp_path / "adapters/shared/ACTIVE").write_text("../../etc\n")
    with pytest.raises(Refusal, match="adapters activate"):
        registry.active("shared")
    shutil.rmtree(tmp_path / "adapters/shared")
    assert registry.active("shared") is None
