"""How ranks find each other, also where their launcher has restarted some of them.

All that waits here waits in Python, in short requests: torch's own ways wait in C++, for half an
hour, without a word and deaf to signals.
"""

import json
import logging
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from dan_dist.run.environment import has_store
from dan_dist.run.signals import Stopped
from shards.command import words

log = logging.getLogger(__name__)

POLL_S = 0.025
NOTICE_S = 10.0  # after which a line names those that are waited for
MEET_S = 600.0  # within which all ranks must have started
ANSWER_S = 60.0  # within which a store that listens must answer
REQUEST_S = 1800.0  # of any later request to the store

Signalled = Callable[[], str | None]  # the stop signal that this rank got, if any


class Patience:
    """A wait for other ranks, with its notice, its deadline, and its end by a stop signal.

    address: host and port where they meet.
    """

    def __init__(self, address: tuple[str, int], signalled: Signalled) -> None:
        self.address, self.place = address, "{}:{}".format(*address)
        self._signalled, self._began_s = signalled, time.monotonic()
        self._is_named = False

    def pause(self, awaited: Callable[[], str], *, names: bool) -> None:
        """Waits a moment. awaited: for whom. names: this rank's log names them.

        Raises:
            Stopped: a signal has come. OSError: the time is over.
        """
        if signal := self._signalled():
            raise Stopped(signal)
        waited_s = time.monotonic() - self._began_s
        if waited_s > MEET_S:
            raise OSError(f"{awaited()} did not come to {self.place} within {MEET_S:.0f} s")
        if names and waited_s > NOTICE_S and not self._is_named:
            self._is_named = True
            log.warning("waiting for %s at %s, %.0f s at most", awaited(), self.place, MEET_S)
        time.sleep(POLL_S)


def open_store(rank: int, size: int, patience: Patience) -> Store:
    """The store in which ranks meet: rank 0's, unless torchrun holds it.

    Raises:
        OSError: rank 0 cannot listen at the address, or nobody listens. Stopped: a signal has come.
    """
    is_host = rank == 0 and not has_store()
    if not is_host:
        _wait_for_listener(patience)
    try:
        store = TCPStore(
            *patience.address, size, is_host, timedelta(seconds=ANSWER_S), wait_for_workers=False,
            multi_tenant=is_host,
        )  # fmt: skip
    except RuntimeError as error:  # torch's DistError is one
        reason = str(error).split("\n")[0].rpartition("message: ")[2]
        does = "cannot listen at" if is_host else "has no answer of a store at"
        raise OSError(
            f"rank {rank} {does} {patience.place} (MASTER_ADDR, MASTER_PORT): {reason}; torchrun's "
            "--master-port and deepspeed's --master_port set another port"
        ) from error
    store.set_timeout(timedelta(seconds=REQUEST_S))
    return store


def _wait_for_listener(patience: Patience) -> None:
    """Waits until somebody listens at an address; each try ends within a second."""
    while reason := _try(patience.address):
        patience.pause(partial(str, f"rank 0 ({reason})"), names=True)


def _try(address: tuple[str, int]) -> str:
    """Why nobody can be reached at an address; "": somebody listens."""
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError as error:
        return words(error)
    return ""


def meet(store: Store, rank: int, size: int, patience: Patience) -> str:
    """A name for this gathering of ranks that no earlier one had.

    torchrun keeps its store when it restarts workers, and with it the addresses of those that have
    died. Rank 0 opens a meeting, each rank signs in with a number of its own, and is in once rank 0
    has read that number back: what an earlier gathering left cannot do that. A rank that a signal
    stops leaves word of it.

    Raises:
        OSError: ranks have not appeared within MEET_S; names them.
        Stopped: this rank, or another one that waits here, got a stop signal.
    """
    own, joined = uuid.uuid4().hex, ""
    signed: dict[str, str] = {"0": own}
    if rank == 0:
        joined = own
        store.set("meeting", own)

    def awaited() -> str:
        others = [r for r in range(1, size) if r != rank] if joined else [0]
        missing = [str(r) for r in others if not joined or not store.check([f"{joined}/{r}"])]
        return f"rank {', '.join(missing)} of {size}"

    try:
        while True:
            if rank == 0:
                for other in map(str, range(1, size)):
                    if other not in signed and store.check([f"{own}/{other}"]):
                        signed[other] = store.get(f"{own}/{other}").decode()
                if len(signed) == size:
                    store.set(f"{own}/welcome", json.dumps(signed))
                    return own
            elif store.check(["meeting"]):
                if (meeting := store.get("meeting").decode()) != joined:
                    store.set(f"{meeting}/{rank}", own)
                    joined = meeting
                welcome = f"{joined}/welcome"
                if store.check([welcome]) and json.loads(store.get(welcome)).get(str(rank)) == own:
                    return joined
            if joined and store.check([f"{joined}/stopped"]):
                raise Stopped(store.get(f"{joined}/stopped").decode())
            patience.pause(awaited, names=rank == 0 or not joined)
    except Stopped as stopped:
        with suppress(RuntimeError):  # of a store that has gone
            if joined:
                store.set(f"{joined}/stopped", str(stopped))
        raise
