"""Reading checkpoint files: what torch wrote comes out the same, and nothing a file says is carried out."""

from __future__ import annotations

import builtins
import functools
import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.graco.pickles import read_checkpoint
from model.types import Refusal
from tests.model.graco.synthetic import published_adapter

OLD = {"_use_new_zipfile_serialization": False}
LAYOUTS = pytest.mark.parametrize("layout", [{}, OLD], ids=["zip", "stream"])


def state():
    g = torch.Generator().manual_seed(3)
    large = torch.randn(20, 30, generator=g)
    return {
        "plain": torch.randn(4, 5, generator=g),
        "turned": torch.randn(6, 7, generator=g).T,
        "part": large[3:9, ::2],
        "again": large,
        "half": torch.randn(9, generator=g).half(),
        "brain": torch.randn(3, 3, generator=g).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "trained": torch.nn.Parameter(torch.randn(2, 2, generator=g)),
    }


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], value.detach())


@LAYOUTS
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "config": None}, lambda s: {"model": s}])
def test_what_torch_writes_comes_out_the_same(tmp_path, layout, wrap):
    torch.save(wrap(state()), tmp_path / "a.pth", **layout)
    same(read_checkpoint(tmp_path / "a.pth").tensors, state())


@LAYOUTS
def test_a_module_trained_on_several_gpus_loses_their_prefix(tmp_path, layout):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.save(torch.nn.DataParallel(network).state_dict(), tmp_path / "a.pth", **layout)
    same(read_checkpoint(tmp_path / "a.pth").tensors, network.state_dict())


def test_the_published_adapter_is_read_with_its_config_as_plain_data():
    path = published_adapter()
    found = read_checkpoint(path)
    same(found.tensors, {name: load_file(path.with_suffix(".safetensors"))[name] for name in found.tensors})
    assert len(found.tensors) == 51
    assert found.config["params"]["backbone_params"]["value"]["num_heads"] == 12
    assert found.left_out == ("params.head_params.value.loss_decode",)
    assert json.loads(json.dumps(found.config)) == found.config
    assert not [name for name in sys.modules if name.startswith("isegm")]


def test_safetensors_keep_tensors_and_config(tmp_path):
    tensors = {name: value.detach().clone().contiguous() for name, value in state().items()}
    save_file(tensors, tmp_path / "a.safetensors", {"config": '{"class": "isegm.Model"}'})
    found = read_checkpoint(tmp_path / "a.safetensors")
    same({name: found.tensors[name] for name in tensors}, tensors)
    assert found.config == {"class": "isegm.Model"}


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Stateful:
    """Made as an empty object, then handed what it is to run."""

    def __init__(self, **state):
        self.__dict__.update(state)

    def __setstate__(self, state):
        state["function"](state["argument"])


def in_array(evil):
    array = np.empty(1, dtype=object)
    array[0] = evil
    return array


CANARIES = {
    "os.system": lambda c: Calls(os.system, f"touch {c}"),
    "exec": lambda c: Calls(builtins.exec, f"open({str(c)!r}, 'w').close()"),
    "eval": lambda c: Calls(builtins.eval, f"open({str(c)!r}, 'w').close()"),
    "Popen": lambda c: Calls(subprocess.check_call, ["touch", str(c)]),
    "nested": lambda c: Calls(list, (Calls(tuple, (Calls(os.system, f"touch {c}"),)),)),
    "partial": lambda c: Calls(functools.partial(os.system, f"touch {c}")),
    "setstate": lambda c: Stateful(function=os.system, argument=f"touch {c}"),
    "items": lambda c: Calls(dict, [("a", Calls(os.system, f"touch {c}"))]),
    "numpy object": lambda c: in_array(Calls(os.system, f"touch {c}")),
    "torch.load": lambda c: Calls(
        functools.partial(torch.load, weights_only=False), io.BytesIO(saved(Calls(os.system, f"touch {c}")))
    ),
}


def saved(value, **layout):
    target = io.BytesIO()
    torch.save(value, target, **layout)
    return target.getvalue()


PLACES = {
    "config": lambda evil: {"state_dict": state(), "config": {"class": "a", "params": {"evil": evil}}},
    "beside": lambda evil: {"state_dict": state(), "optimizer": evil},
    "tensor": lambda evil: {"state_dict": state() | {"evil": evil}},
    "all": lambda evil: evil,
}


@LAYOUTS
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("canary", CANARIES)
def test_nothing_that_a_pickle_calls_is_called(tmp_path, layout, place, canary):
    sign = tmp_path / "ran"
    data = saved(PLACES[place](CANARIES[canary](sign)), **layout)
    torch.load(io.BytesIO(data), weights_only=False)
    assert sign.exists(), "the canary must be one that sings"
    sign.unlink()
    (tmp_path / "a.pth").write_bytes(data)
    if place in ("config", "beside"):
        found = read_checkpoint(tmp_path / "a.pth")
        same(found.tensors, state())
        assert found.config == (None if place == "beside" else {"class": "a", "params": {"evil": None}})
    else:
        with pytest.raises(Refusal):
            read_checkpoint(tmp_path / "a.pth")
    assert not sign.exists()


def test_no_module_that_a_pickle_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "canary_module.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import canary_module

    torch.save({"state_dict": state(), "config": {"thing": canary_module.Thing()}}, tmp_path / "a.pth")
    monkeypatch.delitem(sys.modules, "canary_module")
    assert read_checkpoint(tmp_path / "a.pth").left_out == ("thing",)
    assert "canary_module" not in sys.modules


class Described(pickle.Pickler):
    """Writes storages as torch names them, of any length we claim."""

    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, value.key, "cpu", value.count) if isinstance(value, Claim) else None


class Claim:
    def __init__(self, key, count):
        self.key, self.count = key, count


def described(path, count, shape, stride=None, offset=0, data=b"\0" * 64):
    stride = stride or tuple(1 for _ in shape)
    tensor = Calls(torch._utils._rebuild_tensor_v2, Claim("0", count), offset, shape, stride, False, {})
    text = io.BytesIO()
    Described(text, 2).dump({"state_dict": {"a": tensor}})
    return packed(path, text.getvalue(), {"0": data})


def packed(path, text, storages=None, **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", text)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


@pytest.mark.parametrize(
    ("claim", "sentence"),
    [
        ({"count": 1 << 33, "shape": (1 << 33,)}, "claims tensors of"),
        ({"count": 1 << 33, "shape": (4,)}, "a tensor claims 34359738368 bytes and has 64"),
        ({"count": 16, "shape": (1 << 40,), "stride": (0,)}, "impossible shape"),
        ({"count": 16, "shape": (1 << 20, 1 << 10), "stride": (0, 0)}, "claims tensors of"),
        ({"count": 16, "shape": (4, 4), "stride": (8, 1)}, "reaches beyond its storage"),
        ({"count": 16, "shape": (16,), "offset": 1}, "reaches beyond its storage"),
        ({"count": 16, "shape": (-4,)}, "not described as one"),
        ({"count": 16, "shape": (4,), "stride": (1, 1)}, "impossible shape"),
        ({"count": -1, "shape": (4,)}, "not described as one"),
    ],
)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, claim, sentence):
    with pytest.raises(Refusal, match=sentence):
        read_checkpoint(described(tmp_path / "a.pth", **claim))


def test_the_same_description_with_true_claims_is_read(tmp_path):
    data = np.arange(16, dtype=np.float32).tobytes()
    found = read_checkpoint(described(tmp_path / "a.pth", 16, (2, 4), (8, 1), 2, data))
    assert found.tensors["a"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]


def laughs():
    layer = ["ha"] * 10
    for _ in range(40):
        layer = [layer] * 10
    return layer


def nested():
    inner = []
    for _ in range(100):
        inner = [inner]
    return inner


def circle():
    ring = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize("config", [laughs, nested, circle])
def test_a_config_that_multiplies_or_never_ends_is_refused_at_once(tmp_path, config):
    began = time.monotonic()
    torch.save({"state_dict": state(), "config": {"a": config()}}, tmp_path / "a.pth")
    with pytest.raises(Refusal, match="impossible size or depth"):
        read_checkpoint(tmp_path / "a.pth")
    assert time.monotonic() - began < 5


LAUGH = b"(K\x01t" + b"".join(b"q%c0(h%ch%ch%ch%ct" % (i, i, i, i, i) for i in range(40)) + b"q\x28"
"""A tuple of four tuples of four, 40 times over: quick to describe, never done being looked through."""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"\x80\x02]r\xf0\xff\xff\xffj\xf0\xff\xff\xff.", "several checkpoints"),  # a memo of 4 billion places
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),  # a text of 2 GB
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"a.", "damaged"),  # bytes of 1 TB
        (b"\x80\x02" + b"(" * 100_000 + b".", "damaged"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "several checkpoints"),
        (b"\x80\x02" + b"N0" * 600_000 + b".", "more than 1000000 instructions"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02" + LAUGH + b"h\x28h\x28\x93.", "damaged"),  # as the name of a class
        (b"\x80\x02" + LAUGH + b"}h\x28Ns.", "damaged"),  # as a key
        (b"\x80\x02ccollections\nOrderedDict\n(" + LAUGH + b"t\x85R.", "damaged"),  # as pairs
        (b"cos\nsystem\n(S'touch ran'\ntR.", "no state dict"),
        (b"(S'touch ran'\nios\nsystem\n.", "no state dict"),
    ],
)
def test_a_crafted_pickle_takes_neither_memory_nor_time(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=sentence):
        read_checkpoint(packed(tmp_path / "a.pth", text))
    assert not (tmp_path / "ran").exists()


def test_compressed_doubled_and_overlapping_entries_are_refused(tmp_path):
    with pytest.raises(Refusal, match="compressed archive"):
        read_checkpoint(packed(tmp_path / "bomb.pth", b"\0" * 10_000_000, compression=zipfile.ZIP_DEFLATED))
    torch.save(state(), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "two.pth", "w") as two:
        for entry in good.infolist():
            two.writestr(entry.filename, good.read(entry))
        with pytest.warns(UserWarning, match="Duplicate name"):
            two.writestr("good/data.pkl", b"\x80\x02}.")
    with pytest.raises(Refusal, match="entries twice or one over another"):
        read_checkpoint(tmp_path / "two.pth")
    archive = zipfile.ZipFile(tmp_path / "over.pth", "w")
    archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 100)
    archive.writestr("archive/data/0", b"\0" * 100)
    archive.infolist()[1].header_offset = archive.infolist()[0].header_offset + 8
    archive.close()
    with pytest.raises(Refusal, match="entries twice or one over another"):
        read_checkpoint(tmp_path / "over.pth")


@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / "whole"
    tensors = {name: value.detach().clone().contiguous() for name, value in state().items()}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, **(OLD if kind == "stream" else {}))
    data = path.read_bytes()
    cuts = sorted({0, 1, 4, 8, 9, len(data) - 1, *random.Random(5).sample(range(len(data)), 60)})
    for cut in cuts:
        (tmp_path / "cut.pth").write_bytes(data[:cut])
        with pytest.raises(Refusal):
            read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
def test_a_file_with_bytes_changed_is_read_or_refused_and_nothing_else(tmp_path, kind):
    path = tmp_path / "whole"
    tensors = {name: value.detach().clone().contiguous() for name, value in state().items()}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "config": {"a": [1, 2.5, "b"]}}, path, **(OLD if kind == "stream" else {}))
    data = path.read_bytes()
    dice, refused = random.Random(6), 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            changed[dice.randrange(min(len(data), 2500))] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
        except Refusal:
            refused += 1
    assert refused > 50


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(struct.pack("<f", 1.0) * 8) + 400] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(Refusal, match=r"damaged.*CRC"):
        read_checkpoint(tmp_path / "a.pth")


def tarred():
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return target.getvalue()


def zipped():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("sbd_vit_base.pth", b"x")
    return target.getvalue()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "failed download"),
        (b'{"error": "not found"}', "failed download"),
        (b"Not Found\n", "failed download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (gzip.compress(b"x"), "unpack it first"),
        (tarred(), "tar archive"),
        (zipped(), "without a checkpoint; unpack it"),
        (pickle.dumps({"a": 1}), "no torch checkpoint"),
        (saved([{"state_dict": {}}, {"state_dict": {}}]), "several checkpoints"),
        (saved({"state_dict": {}}), "no tensors"),
        (saved({"epoch": 3}), "where a state dict has named tensors"),
        (saved(torch.ones(3)), "no state dict"),
        (os.urandom(4000).replace(b"\x80", b"\0"), "neither a torch checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_to_do(tmp_path, data, sentence):
    (tmp_path / "a.pth").write_bytes(b"\xfe" + data[1:] if "neither" in sentence else data)
    with pytest.raises(Refusal, match=sentence):
        read_checkpoint(tmp_path / "a.pth")


def test_a_folder_a_pipe_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refusal, match="is not a file"):
        read_checkpoint(tmp_path / "pipe")
    with pytest.raises(Refusal, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(Refusal, match="No such file"):
        read_checkpoint(tmp_path / "none.pth")


def header(text: str, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        header("{}", 1 << 60),
        header("{}", 90 << 20),
        header('{"a":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}', data=b"\0" * 8),
        header('{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,8]}}', data=b"\0" * 8),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', data=b"\0" * 8),
        header('{"a":{"dtype":"X","shape":[2],"data_offsets":[0,8]}}', data=b"\0" * 8),
        header(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            data=b"\0" * 8,
        ),
        header("{" * 5000),
    ],
)
def test_a_safetensors_header_that_lies_about_sizes_is_refused(tmp_path: Path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(Refusal, match="damaged"):
        read_checkpoint(tmp_path / "a.safetensors")
