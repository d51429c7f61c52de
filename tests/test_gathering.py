"""Ranks that wait for each other: named after a while, ended by a deadline or a signal."""

import socket
import threading
import time
from pathlib import Path

import pytest
from ranks import free_port
from torch.distributed import HashStore

from dan_dist.distributed import rendezvous
from dan_dist.distributed.rendezvous import Patience, meet, open_store
from dan_dist.run.environment import read_address
from dan_dist.run.signals import Stopped

HOST = "127.0.0.1"


def patience(port: int, signal: list[str] | None = None) -> Patience:
    return Patience((HOST, port), lambda: signal[0] if signal else None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.1)
    monkeypatch.setattr(rendezvous, "MEET_S", 0.5)


def test_rank_0_names_the_ranks_that_nobody_started(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    store = open_store(0, 4, patience(port))
    store.set("meeting", "an earlier one")
    with pytest.raises(OSError, match=f"rank 1, 2, 3 of 4 did not come to {HOST}:{port} within"):
        meet(store, 0, 4, patience(port))
    (line,) = caplog.messages
    assert line.startswith(f"waiting for rank 1, 2, 3 of 4 at {HOST}:{port}, ")


def test_a_rank_names_the_address_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with pytest.raises(OSError, match=r"rank 0 \(Connection refused\) did not come to"):
        open_store(3, 4, patience(port))
    assert f"rank 0 (Connection refused) at {HOST}:{port}" in caplog.text
    with pytest.raises(OSError, match=r"rank 0 \(.+\) did not come to nowhere\.invalid:80"):
        open_store(1, 2, Patience(("nowhere.invalid", 80), lambda: None))


def test_a_signal_ends_the_wait_at_once() -> None:
    began_s = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM"):
        open_store(1, 2, patience(free_port(), ["SIGTERM"]))
    with pytest.raises(Stopped, match="SIGUSR1"):
        meet(HashStore(), 0, 2, patience(1, ["SIGUSR1"]))
    assert time.monotonic() - began_s < 0.3


def test_a_signal_to_one_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEET_S", 20.0)
    store, signal, ended = HashStore(), list[str](), dict[int, str]()

    def wait(rank: int) -> None:
        try:
            meet(store, rank, 3, patience(1, signal if rank == 1 else None))
        except Stopped as stopped:
            ended[rank] = str(stopped)

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 1)]
    for thread in threads:  # rank 2 never comes
        thread.start()
    time.sleep(0.3)
    signal.append("SIGINT")
    for thread in threads:
        thread.join(5)
    assert ended == {0: "SIGINT", 1: "SIGINT"}


def test_an_occupied_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"rank 0 cannot listen at {HOST}:{port}") as caught:
            open_store(0, 2, patience(port))
    line = str(caught.value)
    assert "in use" in line and "deepspeed's --master_port" in line and "\n" not in line


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "MASTER_ADDR is not there"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not there"),
        ({"MASTER_ADDR": "a"}, "MASTER_PORT is not there"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x' in the environment"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000 in the environment"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "-1"}, "MASTER_PORT is -1 in the environment"),
    ],
)
def test_an_address_that_is_none(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], line: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=line):
        read_address()
