"""The cores that a rank works on, of machines that are not here."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dan_dist.distributed import cores
from dan_dist.distributed.world import World


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, lists: list[str]) -> set[int]:
    """GPUs beside these lists of cores; returns the set that keeps the cores a process stays on."""
    own = set(range(16))
    monkeypatch.setattr(cores, "PCI", folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(own))
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda _, wanted: (own.clear(), own.update(wanted))
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda gpu: SimpleNamespace(pci_domain_id=0, pci_bus_id=16 + gpu, pci_device_id=0),
    )  # fmt: skip
    for gpu, text in enumerate(lists):
        (folder / f"0000:{16 + gpu:02x}:00.0").mkdir()
        (folder / f"0000:{16 + gpu:02x}:00.0" / "local_cpulist").write_text(text + "\n")
    return own


def test_a_rank_stays_beside_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two GPUs on the first node, one on the second; hyperthreads are numbered behind."""
    own = machine(monkeypatch, tmp_path, ["0-3,8-11", "0-3,8-11", "4-7,12-15"])
    assert cores.stay_beside(torch.device("cuda", 1), 3) == 2
    assert own == {0, 1, 2, 3, 8, 9, 10, 11}
    world = World(1, 1, 3, 3, torch.device("cuda", 1), neighbours=2)
    assert world.cores == 4
    own |= set(range(16))
    assert cores.stay_beside(torch.device("cuda", 2), 3) == 1 and own == {
        4,
        5,
        6,
        7,
        *range(12, 16),
    }


@pytest.mark.parametrize("lists", [[], ["0-3", "99"], ["", "4-7"]])
def test_a_rank_keeps_its_cores_where_the_machine_gives_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lists: list[str]
) -> None:
    own = machine(monkeypatch, tmp_path, lists)
    assert cores.stay_beside(torch.device("cuda", 0), 2) == 2 and own == set(range(16))
    assert cores.stay_beside(torch.device("cpu"), 2) == 2 and own == set(range(16))
