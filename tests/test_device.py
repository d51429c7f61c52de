"""A GPU that is there but cannot be used is said, never passed over for the CPU in silence."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, run
from dan_dist.distributed import device as devices
from dan_dist.distributed.device import choose_device, device_name, present_gpus
from dan_dist.distributed.world import init_world

H100 = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5a2b)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-9)"
FOUND = "GPU 0: NVIDIA H100 80GB HBM3 and 1 more cannot be used: "


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where torch sees no GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("DEVICE_NODE", "DRIVER"):
        monkeypatch.setattr(devices, name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def false_smi(folder: Path, text: str, code: int = 0) -> None:
    """A command `nvidia-smi` that prints `text`."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\necho '{text}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("no_cuda")
def test_a_gpu_that_torch_cannot_use_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    false_smi(tmp_path, H100)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert init_world("auto").device.type == "cpu"
    build = f"torch {torch.__version__} is a build for CPUs alone"
    assert caplog.messages == [f"computing on the CPU; {FOUND}{build}"]
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(ValueError, match=r"train\.device is cuda, but torch finds") as caught:
        init_world("cuda")
    assert str(caught.value).endswith(f"on this machine; {FOUND}{build}")
    caplog.clear()
    choose_device("auto", 1, 2)  # one rank of a node has said it
    init_world("cpu")  # nobody asked for a GPU
    assert not caplog.messages


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    false_smi(tmp_path, H100)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES is '{hidden}', which hides them$"):
        init_world("cuda")


@pytest.mark.usefixtures("no_cuda")
def test_the_driver_s_own_words_are_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    false_smi(tmp_path, H100)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(ValueError, match=r"driver on your system is too old \(found version 11040"):
        init_world("cuda")


@pytest.mark.usefixtures("no_cuda")
def test_a_machine_without_gpus_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert init_world("auto").device.type == "cpu"
    for text, code in (("No devices found.", 0), (H100, 9)):  # a driver that does not answer
        false_smi(tmp_path, text, code)
        assert present_gpus() == "" and init_world("auto").device.type == "cpu"
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"torch finds no GPU on this machine$"):
        init_world("cuda")
    devices.DEVICE_NODE.touch()
    assert present_gpus() == ""
    devices.DRIVER.mkdir()
    assert present_gpus() == "an NVIDIA GPU"


@pytest.mark.usefixtures("no_cuda")
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 ranks on a node of 2 GPUs; start one rank per GPU"):
        choose_device("auto", 0, 3)


def test_a_cpu_has_a_name() -> None:
    assert device_name(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_predict_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its lines of JSON, not among them."""
    false_smi(tmp_path, H100)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script = REPOSITORY / "launch" / "predict.py"
    done = run(sys.executable, script, "no.pt", "no.jpg", "--json", cwd=tmp_path)
    *_, warning, error = done.stderr.splitlines()
    assert warning.startswith(f"computing on the CPU; {FOUND}")
    assert error == "error: no.pt: no such checkpoint"
    assert done.returncode == 2 and not done.stdout
