"""The device that a rank computes on, and why a GPU that is there is not used."""

import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SMI_S = 20.0  # a broken driver can hang
DEVICE_NODE, DRIVER = Path("/dev/nvidia0"), Path("/proc/driver/nvidia")


def choose_device(choice: str, local_rank: int, local_size: int) -> torch.device:
    """The device of a rank: its GPU, or the CPU. choice: "auto" (a GPU where there is one), "cuda"
    or "cpu".

    Raises:
        ValueError: "cuda" without a usable GPU, or more ranks on this node than GPUs.
    """
    is_there = choice != "cpu" and torch.cuda.is_available()  # a driver that is too old counts too
    gpus = torch.cuda.device_count() if is_there else 0
    if gpus and local_size > gpus:
        raise ValueError(f"{local_size} ranks on a node of {gpus} GPUs; start one rank per GPU")
    if gpus:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    present = present_gpus() if choice != "cpu" else ""
    reason = f"; {present} cannot be used: {unusable_reason()}" if present else ""
    if choice == "cuda":
        raise ValueError(f"train.device is cuda, but torch finds no GPU on this machine{reason}")
    if reason and local_rank == 0:
        log.warning("computing on the CPU%s", reason)
    return torch.device("cpu")


def present_gpus() -> str:
    """The NVIDIA GPUs of this machine, whether torch can use them or not; empty where none is."""
    if (command := shutil.which("nvidia-smi")) is not None:
        try:
            done = subprocess.run(
                [command, "-L"], capture_output=True, text=True, check=False, timeout=SMI_S
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        lines = done.stdout.splitlines() if done is not None and done.returncode == 0 else []
        names = [line.split(" (UUID")[0].strip() for line in lines if line.startswith("GPU ")]
        if names:
            return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return "an NVIDIA GPU" if DEVICE_NODE.exists() and DRIVER.exists() else ""


def unusable_reason() -> str:
    """Why torch sees no GPU, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs alone"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is '{visible}', which hides them"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees none"


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")
