"""Sends a journal's records to MLflow, a thread a lane, each record until it has arrived."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from dan_dist.redaction import redact
from dan_dist.tracking.delivery import Delivery
from dan_dist.tracking.faults import (
    ClosedError,
    PartlyRefusedError,
    PendingError,
    is_refusal,
    reason_of,
    status_of,
)
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import LANES, Lane, LeftOut, lanes_of
from dan_dist.tracking.store import import_mlflow

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
TRIES = 6  # in half a minute, of a record that a server fails at
_FAILED: dict[Lane, str] = {
    "records": "failed, its journal grows",
    "artifacts": "does not take the run's artifacts, which wait",
    "models": "does not take the run's model, which waits",
}


def ask(look: Callable[[], object], within_s: float) -> None:
    """Looks for so long whether MLflow will take a run; a store that is away is no error.

    Raises:
        ValueError: it will not, now or later.
    """
    closed: list[ClosedError] = []

    def run() -> None:
        try:
            look()
        except ClosedError as error:
            closed.append(error)
        except Exception as error:  # as MLflow's errors are; the lanes will try again
            log.debug("MLflow: %s", error)

    thread = threading.Thread(target=run, name="tracking check", daemon=True)
    thread.start()
    thread.join(within_s)
    if closed:
        raise ValueError(str(closed[0])) from closed[0]


class Sender:
    """Sends a journal's records while others are appended, each lane in its order.

    What MLflow refuses for good is left out, once named in the log, and kept in the journal.

    experiment: where the run is made if it is not there yet; by default the journal's.
    """

    def __init__(self, journal: Journal, uri: str, *, experiment: str | None = None) -> None:
        import_mlflow()
        self.delivery = Delivery(journal, uri, experiment=experiment)
        self.closed: str | None = None  # why nothing of the run is taken
        self._journal, self._shown = journal, redact(uri)
        self._ending, self._give_up_s = threading.Event(), 0.0
        self._ended: set[Lane] = set()
        self._named: set[str] = set()  # what the log has named as left out
        self._failed: list[tuple[int, Lane]] = []  # left out, as the server fails at them
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"tracking {lane}", daemon=True)
            for lane in LANES
        ]

    def check(self, experiment: str, adopted: str | None, *, within_s: float) -> None:
        """Looks for so long whether MLflow will take the run; a store that is away is no error.

        Raises:
            ValueError: it will not, now or later.
        """
        ask(lambda: self.delivery.check(experiment, adopted), within_s)

    def start(self) -> None:
        """Starts the lanes."""
        for thread in self._threads:
            thread.start()

    def drain(self, timeout_s: float, *, retry_s: float) -> None:
        """Ends the lanes once all is sent, at a failure after `retry_s`, or after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        self._give_up_s = time.monotonic() + retry_s
        self._ending.set()
        with self._journal.changed:
            self._journal.changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def send_all(self) -> int:
        """Sends what is left, and tries again what was left out; returns how many have arrived.

        Raises:
            ClosedError: MLflow takes nothing of the run. Others: it is away.
        """
        journal = self._journal
        before = {*journal.pending_numbers(), *(item.number for item in journal.left_out)}
        left_out = sorted({(item.number, item.lane) for item in journal.left_out})
        failure: Exception | None = None
        for lane in LANES:
            try:
                for number, _ in [pair for pair in left_out if pair[1] == lane]:
                    record = journal.record(number)
                    journal.retry(number, lane, *self._deliver(number, record, lane))
                while found := journal.first(lane):
                    journal.settle(lane, *self._deliver(*found, lane))
            except Exception as error:
                if isinstance(error, ClosedError) or lane == "records":
                    raise
                failure = failure or error  # the next lane does not wait for this one
        if failure:
            raise failure
        after = {*journal.pending_numbers(), *(item.number for item in journal.left_out)}
        return len(before - after)

    def _run(self, lane: Lane) -> None:
        try:
            self._send(lane)
            self._retry_failed(lane)
        finally:
            with self._journal.changed:
                self._ended.add(lane)
                self._journal.changed.notify_all()

    def _send(self, lane: Lane) -> None:
        delay_s, is_failing, tries = FIRST_RETRY_S, False, 0
        while found := self._next(lane):
            try:
                self._journal.settle(lane, *self._deliver(*found, lane))
            except ClosedError as error:
                self._close(error)
                return
            except Exception as error:  # whatever mlflow and its HTTP stack raise
                if isinstance(error, PendingError) and not is_failing:
                    log.warning("the run's record waits: %s", error)
                elif not is_failing:
                    log.warning("MLflow at %s %s: %s", self._shown, _FAILED[lane], reason_of(error))
                is_failing, tries = True, tries + 1
                if self._is_poison(found[1], error, tries):
                    self._set_aside(*found, lane, error)
                    is_failing, delay_s, tries = False, FIRST_RETRY_S, 0
                    continue
                if self._ending.wait(delay_s):
                    if time.monotonic() > self._give_up_s:
                        return
                    time.sleep(FIRST_RETRY_S)
                delay_s = min(2 * delay_s, LAST_RETRY_S)
                continue
            if is_failing:
                log.warning("MLflow at %s is back", self._shown)
            is_failing, delay_s, tries = False, FIRST_RETRY_S, 0

    def _is_poison(self, record: Mapping[str, Any], error: Exception, tries: int) -> bool:
        """Whether a server that fails at a record, time after time, takes others of its run."""
        if tries < TRIES or status_of(error) != 500 or self._journal.run_id is None:
            return False
        try:
            self.delivery.check_refusal(record, error)
        except Exception:  # it fails at all that it is asked
            return False
        return True

    def _set_aside(
        self, number: int, record: Mapping[str, Any], lane: Lane, error: Exception
    ) -> None:
        """Leaves out a record that a server always fails at; it is tried once more at the end."""
        what, reason = describe(record, lane), reason_of(error)
        log.warning("MLflow at %s fails at %s: %s; going on", self._shown, what, reason)
        self._failed.append((number, lane))
        self._journal.settle(lane, LeftOut(number, lane, what, reason))

    def _retry_failed(self, lane: Lane) -> None:
        """Once more what the server failed at: it may have been mended meanwhile."""
        for number, own in [pair for pair in self._failed if pair[1] == lane]:
            record = self._journal.record(number)
            with suppress(Exception):  # it stays left out, for `replay`
                self._journal.retry(number, own, *self._deliver(number, record, own))

    def _next(self, lane: Lane) -> tuple[int, dict[str, Any]] | None:
        """The record to be sent next in a lane; None once none can come."""
        with self._journal.changed:
            while self.closed is None:
                if found := self._journal.first(lane):
                    return found
                waits = lane != "records" and self._journal.pending_numbers(lane)
                if self._ending.is_set() and not (waits and "records" not in self._ended):
                    return None
                self._journal.changed.wait()
            return None

    def _close(self, error: ClosedError) -> None:
        """Stops all lanes: nothing of the run is taken. What there is waits in the journal."""
        with self._journal.changed:
            if self.closed is None:
                log.warning("MLflow at %s takes nothing of this run: %s", self._shown, error)
            self.closed = str(error)
            self._journal.changed.notify_all()

    def _deliver(self, number: int, record: Mapping[str, Any], lane: Lane) -> list[LeftOut]:
        """Sends a record; returns what is left out of it, as MLflow refuses it for good."""
        try:
            self.delivery.deliver(record, lane)
        except ClosedError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            self.delivery.check_refusal(record, error)
            refused = {describe(record, lane): reason_of(error)}
            if isinstance(error, PartlyRefusedError):
                refused = dict(error.refused)
        else:
            return []
        for what, reason in refused.items():
            if what not in self._named:
                log.warning("left out of MLflow: %s: %s", what, reason)
            self._named.add(what)
        return [LeftOut(number, lane, what, reason) for what, reason in refused.items()]


def describe(record: Mapping[str, Any], lane: Lane) -> str:
    """What a record is, in a few words."""
    match record["kind"]:
        case "run" | "config":
            return "the run" if lane == "records" else "artifact config.yaml"
        case "artifact" | "model":
            return f"{record['kind']} {record['path']}"
        case "metrics":
            return f"metrics {', '.join(record['values'])}"
        case kind:
            return str(kind)


def waiting(journal: Journal) -> str:
    """The lanes in which records wait, for people."""
    kinds = {lane for record in journal.pending for lane in lanes_of(record)}
    return ", ".join(lane for lane in LANES if lane in kinds and journal.pending_numbers(lane))
