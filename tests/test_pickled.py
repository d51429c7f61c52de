"""Files of torch.save that would take more than they hold: refused before they are loaded."""

import pickle
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.weights import load_trained
from dan_dist.run import checkpoint, pickled

ONE, TUPLE1, CALL = b"K\1", b"\x85", b"R"
MANY = (10**9).to_bytes(4, "little")


def named(name: str) -> bytes:
    """A global, as `torch FloatStorage`."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def doubled(start: bytes, times: int = 40) -> bytes:
    """A tuple that holds one tuple twice, which holds one twice, and so on."""
    return start + b"q\0h\0\x86" * times


REBUILD, NUMPY = named("torch._utils _rebuild_tensor_v2"), "numpy.core.multiarray"
ARRAY = named(f"{NUMPY} _reconstruct") + named("numpy ndarray") + b"K\0\x85" + text("b")
OBJECTS = named("numpy dtype") + text("O8") + b"\x89\x88\x87R"
FEW = b"(" + text("storage") + named("torch FloatStorage") + text("0") + text("cpu") + b"K\1"
# A pickle, and what is said of it
HOSTILE: dict[str, tuple[bytes, str]] = {
    "room": (named("builtins bytearray") + b"J" + MANY + TUPLE1 + CALL, "calls bytearray"),
    "Python 2's": (named("__builtin__ bytearray") + b"J" + MANY + TUPLE1 + CALL, "calls bytearray"),
    "a tensor's room": (named("torch DoubleTensor") + b"J" + MANY + TUPLE1 + b"\x81",
                        "calls DoubleTensor"),
    "an array's room": (named("numpy ndarray") + b"J" + MANY + TUPLE1 + TUPLE1 + CALL,
                        "calls ndarray"),
    "a storage's room": (named("torch.storage UntypedStorage") + b"J" + MANY + TUPLE1 + CALL,
                         "calls UntypedStorage"),
    "by another": (named("torch._tensor _rebuild_from_type_v2") + b"(" + named("numpy ndarray")
                   + named("torch Tensor") + b"J" + MANY + TUPLE1 + TUPLE1 + b"NtR",
                   "made by something else"),
    "a scalar's room": (named(f"{NUMPY} scalar") + named("numpy dtype") + text("V1000000000")
                        + TUPLE1 + CALL + TUPLE1 + CALL, "calls scalar"),
    "an array of objects": (ARRAY + b"\x87R(K\1J" + MANY + TUPLE1 + OBJECTS + b"\x89]tb",
                            "over and over"),
    "an array of no shape": (ARRAY + b"\x87R(K\1" + text("9") + TUPLE1 + OBJECTS + b"\x89]tb",
                             "over and over"),
    "a key": (b"}" + doubled(ONE) + b"K\1s", "hashed over and over"),
    "keys": (b"}(" + doubled(ONE) + b"K\1" + b"K\2K\2u", "hashed over and over"),
    "a set": (named("builtins set") + b"](" + doubled(ONE) + b"e" + TUPLE1 + CALL, "hashed over"),
    "a size": (named("torch Size") + doubled(ONE) + TUPLE1 + CALL, "copied or hashed over"),
    "a storage's key": (b"(" + text("storage") + named("torch FloatStorage") + doubled(ONE)
                        + text("cpu") + b"K\1tQ", "not more than tensors|cut off, or holds more"),
    "hexadecimal": (named("_codecs encode") + text("ab") + text("hex") + b"\x86R", "calls encode"),
    "copies of a text": (text("x" * 50_000) + b"q\1" + (
        named("_codecs encode") + b"h\1" + text("latin1") + b"\x86R") * 200, "copied or hashed"),
    "copies of a list": (b"](" + b"K\1" * 20_000 + b"eq\1" + (
        named("builtins set") + b"h\1" + TUPLE1 + CALL) * 300, "copied or hashed"),
    "lists of a list": (named("builtins list") + b"]" + TUPLE1 + CALL, "calls list"),
    "another device": (named("torch._utils _rebuild_device_tensor_from_cpu_tensor") + b"("
                       + REBUILD + b"(" + FEW + b"tQK\0J" + MANY + TUPLE1 + b"K\0" + TUPLE1
                       + b"\x89NtR", "copied or hashed over and over"),
    "values": (b"](" + b"\x8f" * 3000 + b"e", "more than 2,000 values"),
    "names of a value": (b"N" + b"".join(b"r" + k.to_bytes(4, "little") for k in range(3000)),
                         "more than 2,000 values"),
    "marks": (b"(" * 3000, "more than 2,000 values"),
    "protocol 5": (b"\x96" + (3).to_bytes(8, "little") + b"abc", "cut off, or holds more"),
    "nothing to call": (CALL, "cut off, or holds more"),
}  # fmt: skip


def as_zip(content: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as parts:
        for name, own in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little"),
                          ("data/0", bytes(4))):  # fmt: skip
            parts.writestr(f"x/{name}", own)


def as_legacy(content: bytes, path: Path) -> None:
    """In the format of before torch 1.6."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content
                     + pickle.dumps([], 2) + bytes(16))  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, line = HOSTILE[name]
    if "2,000" in line:
        monkeypatch.setattr(pickled, "MOST_VALUES", 2000)
    for form in (as_zip, as_legacy):
        form(b"\x80\2" + content + b".", tmp_path / "x.pt")
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was loaded"))
        began_s = time.monotonic()
        with pytest.raises(ValueError, match=rf"x\.pt: not a readable .*{line}"):
            checkpoint.read(tmp_path / "x.pt")
        assert time.monotonic() - began_s < 5


def test_a_legacy_file_holds_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes room for what the pickle names, and fills what there is."""
    small = REBUILD + b"(" + FEW[:-2] + b"J" + MANY + b"NtQK\0K\1\x85K\1\x85\x89}tR"
    as_legacy(b"\x80\2" + small + b".", tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ValueError, match="its tensors take 4,000,000,000 bytes, more than the"):
        checkpoint.read(tmp_path / "x.pt")


def test_a_file_that_fails_spoils_no_other(tmp_path: Path) -> None:
    """torch keeps the sparse tensors of a file that it could not read for the next one."""
    torch.save([torch.eye(3).to_sparse(), DAN], tmp_path / "a.pt")
    torch.save({"x": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"dan_dist\.model\.dan\.DAN; save"):
        checkpoint.read(tmp_path / "a.pt")
    assert checkpoint.read(tmp_path / "b.pt") == {"x": 1}
    assert not torch._utils._get_sparse_tensors_to_validate()


def test_tensors_are_no_larger_than_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_bytes(bytes(100))
    shared = torch.zeros(20)
    monkeypatch.setattr(pickled, "load", lambda _: {"a": shared, "b": [shared[:7], shared]})
    assert checkpoint.read(tmp_path / "x.pt")["a"].shape == (20,)
    monkeypatch.setattr(pickled, "load", lambda _: {"a": shared, "b": shared.clone()})
    with pytest.raises(ValueError, match=r"its tensors take 160 bytes, more than the file"):
        checkpoint.read(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_honest_files_hold_is_read(tmp_path: Path, zipped: bool) -> None:
    """And no more is left of it than plain values and tensors."""
    weight = torch.nn.Parameter(torch.randn(30, 30))
    weight.label, quantised = "w", torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.quint8)
    content = {
        "state": OrderedDict(a=weight, tied=weight, b=torch.ones(300).bool(), c=torch.zeros(0)),
        "others": [torch.eye(3).to_sparse(), quantised, torch.ones(1).expand(1000), weight.shape],
        "moments": {0: {"step": 3, "betas": (0.9, 0.99)}},
        "seen": {("a", 1): 2, 7: {1, 2}},
        "random": np.random.RandomState(0).get_state(), "score": np.float64(0.5),
        "words": np.array(["a", None], object), "table": np.ones((700, 9)),
        "counts": Counter("aab"), "raw": bytes(range(256)), "kind": torch.float32, "z": 1 + 2j,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = checkpoint.read(tmp_path / "x.pt")
    assert torch.equal(found["state"]["tied"], weight) and type(found["state"]) is dict
    assert found["state"]["a"].data_ptr() == found["state"]["tied"].data_ptr()
    assert type(found["state"]["a"]) is Tensor and not vars(found["state"]["a"])
    assert found["moments"] == content["moments"] and found["counts"] == {"a": 2, "b": 1}
    assert found["others"][3] == (30, 30) and found["others"][2].shape == (1000,)
    assert list(found["seen"]) == [7] and repr(found["seen"][7]) == "a set"
    assert type(found["score"]) is float and found["raw"] == content["raw"]
    assert [repr(found[key]) for key in ("words", "kind", "z")] == [
        "a ndarray", "a dtype", "a complex"
    ]  # fmt: skip


def test_attributes_of_a_file_stand_before_no_method(tmp_path: Path) -> None:
    state = b"}(" + text("items") + b"K\7" + text("get") + b"K\5" + text("keys") + b"Nub"
    inner = REBUILD + b"(" + FEW + b"tQK\0K\1\x85K\1\x85\x89}t"
    attributes = b"}(" + text("numel") + b"K\3" + text("detach") + b"Nut"
    tensor = named("torch._tensor _rebuild_from_type_v2") + b"(" + inner.replace(
        REBUILD, REBUILD + named("torch Tensor"), 1) + attributes + b"R"  # fmt: skip
    odd = named("collections OrderedDict") + b")R" + state + b"(" + text("step") + b"K\2"
    as_zip(b"\x80\2" + odd + text("w") + tensor + b"u.", tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded.get == 5 and loaded["w"].numel == 3
    found = checkpoint.read(tmp_path / "x.pt")
    assert found.get("step") == 2 and found["w"].detach().numel() == 1


@pytest.mark.parametrize(
    "value", [np.array([checkpoint.FORMAT] * 2), torch.ones(2), np.str_("x"), [1]]
)
def test_a_format_of_another_kind_is_another_file(tmp_path: Path, value: Any) -> None:
    torch.save({"format": value, "objective": np.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(checkpoint.ForeignError, match=r"x\.pt: not a checkpoint of this project"):
        checkpoint.load(tmp_path / "x.pt")
    for read in (load_trained, lambda path: load_backbone(DAN(2, 0), str(path))):
        with pytest.raises(ValueError, match=r"x\.pt"):
            read(tmp_path / "x.pt")
