"""A run's folder: its checkpoints, the one to resume from, the lock of the one that trains."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dan_dist.run.checkpoint import BEST, FORMAT, RESUMED, ForeignError, load, save, to_cpu
from shards.command import words
from shards.files import locked, write_atomically

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)\.pt")
DAMAGE = "damaged-since-step"

# Keys of the configuration that may change when a run resumes: they set how long, where and how
# quickly it computes, not its result.
FREE_KEYS = (
    "data.shards", "data.cache", "data.synthetic", "data.threads", "data.max_bad_images",
    "data.classes", "data.decoded", "data.test_split", "data.protocol", "train.epochs",
    "train.max_steps", "train.patience", "train.device", "train.compile", "train.deterministic",
    "train.output", "train.resume", "train.keep_checkpoints", "train.checkpoint_",
    "train.log_every", "train.timeout_s", "train.profile", "tracking.", "engine.", "model.backbone",
    "model.weights",
)  # fmt: skip


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on.

    Each is copied to the CPU's memory first. A disk that is full, or gone, costs that checkpoint
    only: the former ones stay. `stop_on_error` makes it an error of the run instead. One that is
    not active, off rank 0, writes nothing.
    """

    def __init__(
        self, folder: Path, *, keep: int, stop_on_error: bool, is_active: bool = True
    ) -> None:
        self._folder, self._keep, self._stop_on_error = folder, keep, stop_on_error
        self._is_active = is_active
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._best: dict[str, Any] | None = None  # the best one, until it has been written
        self.saved: int | None = None  # the last step whose checkpoint is on the disk

    def write(self, step: int, content: Mapping[str, Any], *, is_best: bool) -> None:
        """Starts writing the checkpoint of a step, and the best one, which has no optimiser state.

        Raises:
            OSError: the one before could not be written, and `stop_on_error`.
        """
        if not self._is_active:
            return
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
            line = self._line_of(error)
            if self._stop_on_error:
                raise OSError(line) from error
            log.warning("%s; the one before stays, training goes on", line)

    @property
    def is_writing(self) -> bool:
        return self._running is not None and not self._running.done()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread when it has written the checkpoint under way; says if it could not."""
        self._pool.shutdown()
        if self._running is not None and (error := self._running.exception()) is not None:
            log.warning("%s", self._line_of(error))

    def _line_of(self, error: BaseException) -> str:
        return f"no checkpoint could be written into {self._folder}: {words(error)}"

    def _write(self, step: int, content: dict[str, Any], is_best: bool) -> None:
        if is_best:
            self._best = _without_optimizer(content)
        if self._best is not None:  # before any checkpoint that records it as the best
            save(self._folder / BEST, self._best)
            self._best = None
        save(step_path(self._folder, step), content)
        self.saved = step
        prune(self._folder, self._keep)


def _without_optimizer(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "optimizer"}


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


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
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


def checkpoint_to_resume(folder: Path, resume: str) -> str:
    """The path of the checkpoint that a run resumes from; "" where it starts anew.

    resume: the policy `train.resume`, "auto" or "never".

    Raises:
        ValueError: none can be read, or the policy is "never" and there is one.
    """
    if resume == "never" and (paths := steps_saved(folder)):
        raise ValueError(
            f"train.output {folder} holds {paths[0].name} of an earlier run; train.resume=auto "
            "resumes it, another train.output starts anew"
        )
    found = newest_checkpoint(folder)
    return str(found[0]) if found else ""


def mark_damage(folder: Path, since: int) -> None:
    """Marks that images were replaced from step `since` on, until they were too many."""
    write_atomically(folder / DAMAGE, f"{since}\n")


def set_aside_after(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`, from which a run resumes, and removes the damage mark.

    They are damaged, or hold what damaged images have taught; nobody has looked into all of them,
    so they are renamed, not removed. Files that a killed run was writing are removed.
    """
    for path in steps_saved(folder):
        if path > step_path(folder, step):
            path.rename(path.with_name(path.name + ".damaged"))
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)
    (folder / DAMAGE).unlink(missing_ok=True)


def restore_best(folder: Path, step: int, epoch: int) -> str:
    """Sees to the best checkpoint of a run that resumes from `step`.

    One of a later step is set aside, as what was learned after `step` is, and so is a damaged one.
    In place of it, or of one that is missing, comes the checkpoint of `step`, at the end of
    `epoch`, if that was evaluated.

    Returns:
        "": it is as the run knows it. "this": it is now that of `step`. "none": there is none.
    """
    path, resumed = folder / BEST, step_path(folder, step)
    try:
        if path.exists() and load(path, keys=("step",))["step"] <= step:
            return ""
    except ValueError as error:
        log.warning("%s; it is set aside", error)
    except OSError:  # it may be whole, and be read the next time
        return ""
    content = load(resumed, keys=RESUMED) if resumed.is_file() else {}
    if path.exists():
        aside = path.with_name(path.name + ".damaged")
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)  # so that it is there until another takes its place
        except OSError:  # a file system without hard links
            path.rename(aside)
    if content.get("best") and content.get("evaluated") == step:
        own = {**content["metrics"], "epoch": float(epoch)}
        save(path, _without_optimizer({**content, "best": own}))
        became = "this"
    else:
        path.unlink(missing_ok=True)
        became = "none" if content.get("best") else ""
    if became:
        place = f"that of step {step} takes its place" if became == "this" else "it is chosen anew"
        log.warning("%s is missing, damaged or of later than step %d: %s", path, step, place)
    return became


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Makes a run's folder, where need be, and holds its lock: one training at a time has it.

    Raises:
        OSError: another training has it, or it cannot be written.
    """
    check_writable(folder)
    with locked(folder, f"{folder} is in use by another process"):
        yield


def damaged_since(folder: Path) -> int | None:
    """The first step of a run that ended for damaged images at which one was replaced."""
    path = folder / DAMAGE
    if not path.is_file():
        return None
    text = path.read_bytes()[:40].strip()
    if not text:  # of a full disk, which earlier versions met halfway
        return None
    if not text.isdigit():
        raise ValueError(f"{path}: holds {ascii(text)[1:]}, expected a step; remove it to go on")
    return int(text)


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
    set_by_length = ("train.epochs",) if config.get("schedule.name") == "cosine" else ()
    for key in sorted({*saved, *config}):
        is_free = key.startswith(FREE_KEYS) and key not in set_by_length
        if not is_free and saved.get(key) != config.get(key):
            raise ValueError(
                f"{path} is of another configuration: {key} was {saved.get(key)!r}, "
                f"is {config.get(key)!r}; give another train.output"
            )


def check_writable(folder: Path, name: str = "train.output") -> None:
    """Creates `folder`, and a file in it that is removed at once. name: of the option, for errors.

    Raises:
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} {folder} cannot be written: {error.strerror}") from error


@contextmanager
def no_new_folders(folder: Path) -> Iterator[None]:
    """Removes what the block has made of a folder and of those that it lies in."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):  # another process may have put something there meanwhile
                path.rmdir()
