"""The faults that tests/chaos.py injects into a running training."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
from chaos_disks import fill
from chaos_runs import Attempt, Campaign, Launched

from dan_dist.run.folder import steps_saved
from shards.command import FAILED, INTERRUPTED, PREEMPTED, USAGE


def sigkill_rank(campaign: Campaign, attempt: Attempt) -> None:
    for worker in campaign.dice.sample(attempt.family, 1):
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    assert attempt.end() != 0 or '"finished"' in campaign.outcome(), attempt.text


def sigkill_all(campaign: Campaign, attempt: Attempt) -> None:
    time.sleep(campaign.dice.uniform(0, 0.2))  # in the middle of a step, a checkpoint …
    attempt.send(signal.SIGKILL)  # torchrun's workers end with it
    attempt.end()


def sigterm(campaign: Campaign, attempt: Attempt) -> None:
    attempt.send(signal.SIGTERM)
    attempt.end()
    assert '"preempted"' in campaign.outcome() or '"finished"' in campaign.outcome(), attempt.text


def sigusr1(campaign: Campaign, attempt: Attempt) -> None:
    for worker in campaign.dice.sample(attempt.family, 1):  # to any rank
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGUSR1)
    assert attempt.end() in (0, PREEMPTED, *_after_training(campaign)), attempt.text
    assert '"preempted"' in campaign.outcome() or '"finished"' in campaign.outcome(), attempt.text


def corrupt_checkpoint(campaign: Campaign, attempt: Attempt) -> None:
    attempt.reach(15)  # two are written by then: where none can be read, a run refuses to go on
    sigkill_all(campaign, attempt)
    for path in steps_saved(campaign.output)[:1]:
        at = campaign.dice.randrange(path.stat().st_size)
        if campaign.dice.random() < 0.3:
            os.truncate(path, at)
        else:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(campaign.dice.randbytes(2000))


def truncate_shard(campaign: Campaign, attempt: Attempt) -> None:
    shards = campaign.folder / "shards"
    # the largest class; persons are mixed in all shards
    tars = sorted(shards.glob("train-01-*.tar")) or sorted(shards.glob("train-*.tar"))
    originals = {path: path.read_bytes() for path in tars}
    for path in tars:
        os.truncate(path, 1024)
    code = attempt.end()
    text = attempt.text
    for path, content in originals.items():
        path.write_bytes(content)
    if '"finished"' not in campaign.outcome():  # the last steps were read in advance
        assert code != 0 and "are damaged" in text, text
        assert any(path.name in text for path in tars), text


def tracker_outage(campaign: Campaign, attempt: Attempt) -> None:
    server = campaign.server
    assert server is not None
    hangs = campaign.dice.random() < 0.5
    if hangs:
        os.killpg(server.process.pid, signal.SIGSTOP)
    else:
        server.stop()
    go_on = attempt.reach(min(attempt.step + 8, campaign.total - 1))
    if hangs:
        os.killpg(server.process.pid, signal.SIGCONT)
    else:
        server.start()
    if go_on:
        sigkill_all(campaign, attempt)
    else:
        attempt.end()


def full_disk(campaign: Campaign, attempt: Attempt) -> None:
    """The disk of the run's folder has little room for some steps, or until the run has ended."""
    assert campaign.disk is not None
    filler = fill(campaign.disk, campaign.dice.choice((0, campaign.dice.randrange(2**26))))
    goes_on = attempt.reach(min(attempt.step + 9, campaign.total - 1))
    is_for_good = campaign.dice.random() < 0.5
    if not is_for_good:
        filler.unlink()
    if goes_on and not is_for_good:
        goes_on = attempt.reach(min(attempt.step + 5, campaign.total - 1))
    if goes_on and campaign.dice.random() < 0.5:
        attempt.send(signal.SIGTERM)
    code = attempt.end()
    filler.unlink(missing_ok=True)
    failed = FAILED if isinstance(attempt, Launched) else USAGE  # of torchrun, whatever failed
    assert code in (0, failed, PREEMPTED, *_after_training(campaign)), attempt.text
    said = '"preempted"' in campaign.outcome() or '"finished"' in campaign.outcome()
    assert code == 0 or "error: " in attempt.text or said, attempt.text


def _after_training(campaign: Campaign) -> tuple[int, ...]:
    """The code of a signal that comes when the run has finished."""
    return (INTERRUPTED,) if '"finished"' in campaign.outcome() else ()


def resize(campaign: Campaign, attempt: Attempt) -> None:
    """The attempt had one, two or three ranks; the next one has another number."""
    campaign.dice.choice([sigterm, sigkill_rank, sigkill_all])(campaign, attempt)


KINDS: dict[str, Callable[[Campaign, Attempt], None]] = {
    f.__name__: f
    for f in (sigkill_rank, sigkill_all, sigterm, sigusr1, corrupt_checkpoint, truncate_shard,
              tracker_outage, full_disk, resize)
}  # fmt: skip
