"""How ranks find each other, also where their launcher has restarted some of them."""

import json
import time
import uuid

from torch.distributed.distributed_c10d import Store

POLL_S = 0.025
MEET_S = 600.0  # within which all ranks must have started


def meet(store: Store, rank: int, size: int) -> str:
    """A name for this gathering of ranks that no earlier one had.

    torchrun keeps its store when it restarts workers, and with it the addresses of those that have
    died. Rank 0 opens a meeting, each rank signs in with a number of its own, and is in once rank 0
    has read that number back: what an earlier gathering left cannot do that.

    Raises:
        OSError: ranks have not appeared within MEET_S; names them.
    """
    own, joined = uuid.uuid4().hex, ""
    signed: dict[str, str] = {"0": own}
    if rank == 0:
        joined = own
        store.set("meeting", own)
    deadline_s = time.monotonic() + MEET_S
    while time.monotonic() < deadline_s:
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
        time.sleep(POLL_S)
    missing = [str(r) for r in range(size) if str(r) not in signed] if rank == 0 else ["0"]
    raise OSError(f"rank {', '.join(missing)} did not start within {MEET_S:.0f} s")
