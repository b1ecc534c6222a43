"""Taking in published checkpoints by command: what is kept, what is refused, and what a killed import leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ml_backend.weights_store as weights_store
from ml_backend.__main__ import app
from ml_backend.weights_store import WeightsStore
from model.adapter import read_adapter, write_adapter
from model.graco import weights
from model.graco.pickles import read_checkpoint
from model.segmenter import digest_of, digest_of_file
from tests.conftest import ROOT
from tests.model.graco.synthetic import TINY, made_adapter, made_base, published_adapter, synthetic_base

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
CONFIG = weights.make_config(TINY)


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setenv("GRACO_DATA_DIR", str(folder))
    return folder


def run(*words):
    done = CliRunner().invoke(app, ["weights", *map(str, words)], terminal_width=200)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def refused(*words):
    done = run(*words)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    return line


def saved(path, tensors, config=CONFIG):
    torch.save({"state_dict": tensors, "config": config}, path)
    return path


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "sbd_vit_tiny.pth", made_base(TINY))


@pytest.fixture
def adapter(tmp_path):
    config = weights.make_config(TINY, branches=("level", "phrase"))
    return saved(tmp_path / "GraCo_tiny_lora.pth", made_adapter(TINY), config)


def tree(folder):
    return {str(p.relative_to(folder)): digest_of(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_base_and_adapter_are_kept_shown_verified_written_back_and_removed(data, base, adapter, tmp_path):
    assert "no weights are imported yet" in run("list").stdout
    assert run("import", base).stdout.startswith("sbd-vit-tiny: base for vit_32x4 at 224 px")
    assert run("import", adapter).stdout.startswith("graco-tiny-lora: adapter for vit_32x4")
    kept = data / "weights" / "sbd-vit-tiny" / "weights.safetensors"
    card = json.loads(run("show", "sbd-vit-tiny").stdout)
    assert card["digest"] == digest_of_file(kept), "as a base is known everywhere"
    assert card["origin"] == base.name
    assert card["origin_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert (card["kind"], card["input_size"], card["tensors"]) == ("base", 224, len(made_base(TINY)))
    assert "backbone.cls_token" in card["not_used"]
    assert json.loads(run("show", "graco-tiny-lora").stdout)["base"] == card["digest"]
    read_adapter(data / "weights" / "graco-tiny-lora" / "adapter.safetensors", base=card["digest"])
    listed = run("list").stdout
    assert "sbd-vit-tiny" in listed
    assert "graco-tiny-lora" in listed
    for name, source in (("sbd-vit-tiny", base), ("graco-tiny-lora", adapter)):
        assert run("verify", name).exit_code == 0
        for suffix in ("pth", "safetensors"):
            out = tmp_path / f"{name}.{suffix}"
            assert run("export", name, out).exit_code == 0
            found = read_checkpoint(out)
            given = torch.load(source, weights_only=True)
            same(found.tensors, given["state_dict"])
            assert found.config == given["config"]
        whole = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert whole.keys() == {"state_dict", "config"}, "as the published code reads it"
        assert "already; choose another file" in refused("export", name, out)
        assert "there is no folder" in refused("export", name, tmp_path / "none" / "a.pth")
    assert "are the base of graco-tiny-lora" in refused("remove", "sbd-vit-tiny")
    assert run("remove", "graco-tiny-lora").stdout.strip() == "removed graco-tiny-lora"
    assert run("remove", "sbd-vit-tiny").exit_code == 0
    assert sorted(os.listdir(data / "weights")) == [".lock"]


def test_the_same_file_twice_is_kept_once_and_another_needs_another_name(data, base, tmp_path):
    assert run("import", base).exit_code == 0
    before = tree(data)
    assert run("import", base).exit_code == 0
    assert tree(data) == before
    other = made_base(TINY) | {"head.conv_seg.bias": torch.tensor([2.0])}
    (tmp_path / "again").mkdir()
    another = saved(tmp_path / "again" / base.name, other)
    assert "choose another one with --name" in refused("import", another)
    assert run("import", another, "--name", "second").exit_code == 0
    assert WeightsStore(data / "weights").names() == ["sbd-vit-tiny", "second"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", "Upper", ".hidden", "a" * 65, "a--b", "nul\0", "-a"])
def test_names_are_plain_tokens(data, base, name):
    before = tree(data.parent)
    assert "is no name for weights" in refused("import", base, f"--name={name}")
    assert tree(data.parent) == before
    assert "there are no weights" in refused("show", "--", name)
    assert "there are no weights" in refused("remove", "--", name)


def test_an_adapter_before_its_base_or_for_another_one_is_refused_with_what_to_do(data, base, adapter, tmp_path):
    assert "import the base first" in refused("import", adapter)
    assert not (data / "weights").exists() or sorted(os.listdir(data / "weights")) == [".lock"]
    run("import", base)
    wide = replace(TINY, width=64, name="vit_64x4")
    for_wide = saved(tmp_path / "wide_lora.pth", made_adapter(wide), None)
    assert "there are: sbd-vit-tiny (32 x 4)" in refused("import", for_wide)
    assert "width 64 with 4 blocks, and this base, vit_32x4" in refused("import", for_wide, "--base", "sbd-vit-tiny")
    run("import", saved(tmp_path / "wide.pth", made_base(wide), weights.make_config(wide)))
    assert run("import", for_wide).exit_code == 0
    assert "is an adapter; name the base it is for" in refused("import", adapter, "--base", "wide-lora")
    twin = made_base(TINY) | {"head.conv_seg.bias": torch.tensor([2.0])}
    run("import", saved(tmp_path / "twin.pth", twin))
    assert "fits sbd-vit-tiny, twin; name the one with --base" in refused("import", adapter)
    assert run("import", adapter, "--base", "twin").exit_code == 0
    assert "holds no base; leave --part out" in refused("import", adapter, "--part", "base", "--name", "x")


def test_a_training_that_saved_base_and_adapter_in_one_file_is_taken_in_two_parts(data, tmp_path):
    tower = {"phrase_encoder.model.ln_final.weight": torch.ones(3)}
    both = saved(tmp_path / "last_checkpoint.pth", made_base(TINY) | made_adapter(TINY) | tower)
    assert "import each by itself: --part base" in refused("import", both)
    assert run("import", both, "--part", "base").stdout.startswith("last-checkpoint-base: base")
    assert run("import", both, "--part", "adapter").stdout.startswith("last-checkpoint-adapter: adapter")


def test_an_adapter_trained_here_is_written_for_the_published_code(data, base, tmp_path):
    run("import", base)
    store = WeightsStore(data / "weights")
    made = weights.adapter_from_published(made_adapter(TINY), TINY, store.card("sbd-vit-tiny").digest)
    write_adapter(tmp_path / "mine.safetensors", card=made.card, plain=made.plain, lora=made.lora)
    assert run("export", tmp_path / "mine.safetensors", tmp_path / "mine.pth").exit_code == 0
    found = torch.load(tmp_path / "mine.pth", weights_only=True)
    assert found["state_dict"].keys() == made_adapter(TINY).keys()
    assert found["config"] == weights.make_config(TINY, branches=("level", "phrase"))
    write_adapter(tmp_path / "other.safetensors", card=made.card | {"base": "c" * 64}, plain=made.plain, lora=made.lora)
    assert "the base cccccccccccc of this adapter is not here" in refused(
        "export", tmp_path / "other.safetensors", tmp_path / "other.pth"
    )


def test_verify_notices_a_changed_file_a_lost_one_and_a_damaged_card(data, base):
    run("import", base)
    folder = data / "weights" / "sbd-vit-tiny"
    file = folder / "weights.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    assert "is not the one that was imported" in refused("verify", "sbd-vit-tiny")
    file.unlink()
    assert "is gone" in refused("verify", "sbd-vit-tiny")
    (folder / "card.json").write_text("{")
    assert "remove and import them again" in refused("verify", "sbd-vit-tiny")
    assert run("remove", "sbd-vit-tiny").exit_code == 0


class Runs:
    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch {self.sign}",)


def _nan(folder):
    tensors = made_base(TINY)
    tensors["backbone.blocks.1.norm1.weight"][3] = float("nan")
    return saved(folder / "nan.pth", tensors)


def _cut(folder):
    whole = saved(folder / "whole.pth", made_base(TINY)).read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    return folder / "cut.pth"


def _page(folder):
    (folder / "page.pth").write_text("<html>Sign in</html>")
    return folder / "page.pth"


def _bomb(folder):
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (50 << 20))
    return folder / "bomb.pth"


def _evil(folder):
    return saved(folder / "evil.pth", made_base(TINY) | {"x": Runs(folder / "ran")})


def _header(folder):
    save_file({"a": torch.ones(3)}, folder / "lies.safetensors")
    data = bytearray((folder / "lies.safetensors").read_bytes())
    data[:8] = (1 << 50).to_bytes(8, "little")
    (folder / "lies.safetensors").write_bytes(data)
    return folder / "lies.safetensors"


BAD = {
    "missing": (lambda f: f / "none.pth", "cannot be read"),
    "folder": (lambda f: f, "is a folder"),
    "page": (_page, "download"),
    "cut off": (_cut, "damaged"),
    "bomb": (_bomb, "compressed archive"),
    "header": (_header, "claims a header"),
    "os.system": (_evil, "where a state dict has named tensors"),
    "nan": (_nan, r"not finite (backbone.blocks.1.norm1.weight)"),
    "other network": (lambda f: saved(f / "r.pth", {"fc.weight": torch.ones(2)}), "not the tensors of a SimpleClick"),
    "wrong shape": (
        lambda f: saved(f / "s.pth", made_base(TINY) | {"head.conv_seg.bias": torch.ones(5)}),
        "head.conv_seg.bias [5] instead of [1]",
    ),
    "adapter of another base": (lambda f: saved(f / "t.pth", made_adapter(replace(TINY, width=48))), "width 48"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_with_a_sentence_and_nothing_kept_changes(data, base, tmp_path, bad):
    run("import", base)
    before = tree(data)
    make, sentence = BAD[bad]
    assert sentence in refused("import", make(tmp_path), "--name", "bad")
    assert tree(data) == before
    assert sorted(os.listdir(data / "weights")) == [".lock", "sbd-vit-tiny"]
    assert not (tmp_path / "ran").exists()


IMPORTER = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from ml_backend.weights_store import WeightsStore
store = WeightsStore(Path(sys.argv[1]))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        store.import_(Path(sys.argv[2]), now=datetime.now(UTC), name="killed")
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_an_import_that_is_killed_at_any_moment_leaves_nothing_behind(tmp_path):
    larger = replace(TINY, width=384, heads=6, depth=8, name="vit_384x8")
    source = saved(tmp_path / "larger.pth", made_base(larger), weights.make_config(larger))
    folder, dice, killed = tmp_path / "weights", random.Random(8), 0
    store = WeightsStore(folder)
    command = [sys.executable, "-c", IMPORTER, str(folder), str(source)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as importer:
        watchdog = threading.Timer(120, importer.kill)
        watchdog.start()

        def import_and_kill_after(seconds=None):
            importer.stdin.write("\n")
            child = int(importer.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with suppress(ProcessLookupError):  # it was done
                    os.kill(child, signal.SIGKILL)
            return int(importer.stdout.readline())

        began = time.monotonic()
        assert import_and_kill_after() == 0
        took = time.monotonic() - began
        assert store.verify("killed").kind == "base"
        store.remove("killed")
        for _ in range(10):
            killed += import_and_kill_after(dice.uniform(0, took)) == signal.SIGKILL
            if "killed" in store.names():
                store.verify("killed")
                store.remove("killed")
        watchdog.cancel()
        importer.stdin.close()
    assert killed, "at least one import must have been caught at work"
    last = store.import_(source, now=NOW, name="last")
    assert sorted(os.listdir(folder)) == [".lock", "last"]
    assert last.digest == digest_of_file(store.path("last"))


def test_what_a_killed_import_left_is_not_shown_and_the_next_import_clears_it(data, base):
    left = data / "weights" / ".draft-abc"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    assert "no weights are imported yet" in run("list").stdout
    run("import", base)
    assert sorted(os.listdir(data / "weights")) == [".lock", "sbd-vit-tiny"]


def test_the_published_adapter_and_a_base_of_its_size_are_imported_in_little_memory(tmp_path):
    source = saved(tmp_path / "sbd_vit_base.pth", synthetic_base(), None)
    code = (
        "import re, sys; from datetime import UTC, datetime; from pathlib import Path;"
        "from ml_backend.weights_store import WeightsStore;"
        "store = WeightsStore(Path(sys.argv[1]));"
        "[store.import_(Path(file), now=datetime.now(UTC)) for file in sys.argv[2:]];"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "weights"), str(source), str(published_adapter())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * (1 << 20), "kB for a file of 374 MiB"
    store = WeightsStore(tmp_path / "weights")
    store.verify("graco-base-lora")
    store.export("graco-base-lora", tmp_path / "out.pth", "pth")
    expected = load_file(published_adapter().with_suffix(".safetensors"))
    same(torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"], expected)
    architecture = weights.read_base(store.path("sbd-vit-base"))[1]
    assert asdict(architecture)["name"] == "vit_b"


def test_a_file_that_may_not_grow_ends_import_and_export_with_a_sentence(data, base, tmp_path):
    run("import", base)
    before, limits = tree(data), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        said = [refused("import", base, "--name", "second")]
        said += [refused("export", "sbd-vit-tiny", tmp_path / f"out.{suffix}") for suffix in ("pth", "safetensors")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all("cannot be written" in sentence and "free some space" in sentence for sentence in said)
    assert tree(data) == before
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_ends_the_command_with_a_sentence_and_leaves_nothing(data, base, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    (data / "weights").mkdir(parents=True)
    monkeypatch.setattr(weights_store, "sync", full)
    assert "No space left on device" in refused("import", base)
    assert sorted(os.listdir(data / "weights")) == [".lock"]
