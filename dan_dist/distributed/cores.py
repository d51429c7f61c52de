"""The cores that a rank works on: its part of those beside its GPU."""

import os
from pathlib import Path
from typing import Any

import torch

PCI = Path("/sys/bus/pci/devices")


def stay_beside(device: torch.device, local_size: int) -> int:
    """Keeps this process on the cores of its GPU's NUMA node; how many ranks share these.

    Memory of another node is slower to fill and to copy from. Where the machine does not give the
    cores, or none of them is this process's, it stays on those it has.

    local_size: the ranks of this machine; rank k has GPU k.
    """
    if device.type != "cuda":
        return local_size
    beside = [cores_beside(gpu) & os.sched_getaffinity(0) for gpu in range(local_size)]
    own = beside[device.index]
    if not own or not all(beside):
        return local_size
    os.sched_setaffinity(0, own)
    return beside.count(own)


def cores_beside(gpu: int) -> set[int]:
    """The cores of a GPU's NUMA node; none where that is not known."""
    properties: Any = torch.cuda.get_device_properties(gpu)
    try:
        place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        text = (PCI / "{:04x}:{:02x}:{:02x}.0".format(*place) / "local_cpulist").read_text()
        return parse_cores(text)
    except (AttributeError, OSError, ValueError):
        return set()


def parse_cores(text: str) -> set[int]:
    """The numbers of a kernel's list of cores, as in 0-3,8."""
    cores = set[int]()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
