"""Checkpoints: whole or absent, and refused by name where they belong to something else."""

import fcntl
import logging
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = "dan_dist checkpoint, version 1"
BEST = "best.pt"
DAMAGE = "damaged-since-step"
_STEP = re.compile(r"step-(\d+)\.pt")
KEYS = ("step", "config", "fingerprint", "class_names", "objective", "best", "metrics")
RESUMED = (*KEYS, "optimizer", "run_id", "evaluated", "replaced", "replaced_since",
           "figures")  # fmt: skip

# Keys of the configuration that may change when a run goes on: they say how long, where and how
# quickly it computes, not what.
FREE_KEYS = (
    "data.shards", "data.cache", "data.synthetic", "data.threads", "data.max_bad_images",
    "data.classes", "train.epochs", "train.max_steps", "train.device", "train.compile",
    "train.output", "train.resume", "train.keep_checkpoints", "train.checkpoint_",
    "train.log_every", "train.timeout_s", "tracking.", "engine.", "model.backbone",
    "model.weights",
)  # fmt: skip


class ForeignError(ValueError):
    """A whole file, but not one of our checkpoints."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of torch's under a temporary name, flushes it to disk, renames it.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's writer makes one of ENOSPC
                raise OSError(f"{path} cannot be written: {error}") from error
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, is to survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """What torch has saved in a file, onto the CPU; only tensors and plain values, no code is run.

    Raises:
        ValueError: damaged, or not a dict of such. OSError: it cannot be read.
    """
    try:
        # torch writes a checksum of every part, but does not look at them.
        if zipfile.is_zipfile(path):  # files of torch before 1.6, which others may hold, are none
            with zipfile.ZipFile(path) as parts:
                if (damaged := parts.testzip()) is not None:
                    raise ValueError(f"{damaged} does not have its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0] or "it is empty or cut off"
        if isinstance(error, pickle.UnpicklingError):  # torch's text is on how to run it after all
            reason = "it is cut off, or holds more than tensors and plain values"
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return content


def load(path: Path, *, keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    """Reads a checkpoint of ours.

    Raises:
        ValueError, OSError: as `read`, or it lacks one of `keys`. ForeignError: not one of ours.
    """
    content = read(path)
    if content.get("format") != FORMAT:
        raise ForeignError(f"{path}: not a checkpoint of this project, expected '{FORMAT}'")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path}: not a readable checkpoint (it lacks {', '.join(missing)})")
    return content


def to_cpu(value: Any) -> Any:
    """A copy in the CPU's memory of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


class Writer:
    """Writes checkpoints in a thread while training goes on.

    Each is copied to the CPU's memory first. A disk that is full, or gone, costs that checkpoint
    only: the former ones stay. `stop_on_error` makes it an error of the run instead.
    """

    def __init__(self, folder: Path, *, keep: int, stop_on_error: bool) -> None:
        self._folder, self._keep, self._stop_on_error = folder, keep, stop_on_error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._best: dict[str, Any] | None = None  # the best one, until it has been written
        self.saved: int | None = None  # the last step whose checkpoint is on the disk

    def write(self, step: int, content: Mapping[str, Any], *, is_best: bool) -> None:
        """Starts writing the checkpoint of a step, and the best one, which has no optimiser state.

        Raises:
            OSError: the one before could not be written, and `stop_on_error`.
        """
        self.wait()
        copied = {"format": FORMAT, **to_cpu(content)}
        self._running = self._pool.submit(self._write, step, copied, is_best)

    def wait(self) -> None:
        """Waits for the checkpoint under way; raises as `write` does."""
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            running.result()
        except OSError as error:
            line = f"no checkpoint could be written into {self._folder}: {error}"
            if self._stop_on_error:
                raise OSError(line) from error
            log.warning("%s; the one before stays, training goes on", line)

    @property
    def is_writing(self) -> bool:
        return self._running is not None and not self._running.done()

    def close(self) -> None:
        """Ends the thread when it has written what it was given."""
        self._pool.shutdown()

    def _write(self, step: int, content: dict[str, Any], is_best: bool) -> None:
        if is_best:
            self._best = {k: v for k, v in content.items() if k != "optimizer"}
        if self._best is not None:  # before any checkpoint that says that there was a best one
            save(self._folder / BEST, self._best)
            self._best = None
        save(step_path(self._folder, step), content)
        self.saved = step
        prune(self._folder, self._keep)


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies."""
    return folder / f"step-{step:08d}.pt"


def steps_saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    names = [p for p in folder.glob("step-*.pt") if _STEP.fullmatch(p.name)]
    return sorted(names, reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; the best one is another file and stays."""
    for path in filter(Path.is_file, steps_saved(folder)[keep:]):
        path.unlink()


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read; damaged ones are named and passed over.

    After a run that ended for damaged images, one from before the first of them is preferred.

    Raises:
        ForeignError: it is not one of our checkpoints. ValueError: there are some, but none that
            can be read.
    """
    paths = steps_saved(folder)
    if (since := damaged_since(folder)) is not None:
        paths.sort(key=lambda path: path >= step_path(folder, since))  # keeps the order otherwise
    for path in paths:
        try:
            return path, load(path, keys=RESUMED)
        except ForeignError:
            raise
        except (ValueError, OSError) as error:
            log.warning("%s; trying the one before", error)
    if paths:
        names = ", ".join(path.name for path in paths)
        raise ValueError(
            f"{folder}: none of its checkpoints can be read ({names}); give another train.output "
            "to start anew"
        )
    return None


def note_damage(folder: Path, since: int) -> None:
    """Leaves word that training images were replaced from step `since` on, and then too many."""
    (folder / DAMAGE).write_text(f"{since}\n")


def forget_later(folder: Path, step: int) -> None:
    """Sets aside the checkpoints after `step`, from which a run goes on, and the word on damage.

    They are damaged, or hold what damaged images have taught; nobody has looked into all of them,
    so they are renamed, not removed. What a killed run was about to write is removed.
    """
    for path in steps_saved(folder):
        if path > step_path(folder, step):
            path.rename(path.with_name(path.name + ".damaged"))
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)
    (folder / DAMAGE).unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One training at a time has `folder`, which is made if need be.

    Raises:
        OSError: another has it, or it cannot be written.
    """
    check_writable(folder)
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is in use by another process") from error
        except OSError:
            pass  # this file system has no locks for folders
        yield
    finally:
        os.close(file)


def damaged_since(folder: Path) -> int | None:
    """The first step of a run that ended for damaged images at which one was replaced."""
    path = folder / DAMAGE
    return int(path.read_text()) if path.is_file() else None


def check_continues(
    path: Path, saved: Mapping[str, Any], config: Mapping[str, Any], *, same_data: bool
) -> None:
    """Refuses a checkpoint of another data set or another (flattened) configuration.

    Raises:
        ValueError: names the first difference and the way on.
    """
    if not same_data:
        raise ValueError(
            f"{path} was trained on other images than data.shards holds; give another train.output"
        )
    for key in sorted({*saved, *config}):
        if not key.startswith(FREE_KEYS) and saved.get(key) != config.get(key):
            raise ValueError(
                f"{path} is of another configuration: {key} was {saved.get(key)!r}, "
                f"is {config.get(key)!r}; give another train.output"
            )


def check_writable(folder: Path, name: str = "train.output") -> None:
    """Creates `folder`, and a file in it that goes at once; `name`: what says which it is.

    Raises:
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} {folder} cannot be written: {error.strerror}") from error
