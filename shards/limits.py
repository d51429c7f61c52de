"""What this process may use of the machine: cores and memory, by its affinity and its cgroups.

A container or a batch system often gives less than the machine has, by a quota that neither the
affinity nor the size of the memory shows.
"""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def core_count() -> int:
    """The cores that this process may use: those of its affinity, or fewer by a quota."""
    quota = core_quota()
    count = len(os.sched_getaffinity(0))
    return count if quota is None else min(count, quota)


def core_quota() -> int | None:
    """The cores' time that the cgroups of this process allow, rounded up; None: all."""
    quotas = []
    for folder in _folders("cpu"):
        found = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"),
        ]  # fmt: skip
        quota, period = (_number(text) for text in (*found, "")[:2])
        if quota and period:
            quotas.append(max(1, math.ceil(quota / period)))
    return min(quotas, default=None)


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, its cgroups' or its limit's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits += [own] if own != resource.RLIM_INFINITY else []
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [limit] if (limit := _number(_read(folder / name))) else []
    return min(limits)


def left_bytes() -> int | None:
    """The memory that the cgroups of this process leave to it; None: they do not limit it.

    What a group holds of files can be dropped, where it is not in use: that is left too.
    """
    names = (("memory.max", "memory.current", "inactive_file"),
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
    left = []
    for folder in _folders("memory"):
        for most, used, idle in names:
            if not (limit := _number(_read(folder / most))):
                continue
            found = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
            left.append(limit - _number(_read(folder / used)) + _number(found.get(idle, "")))
    return max(0, min(left)) if left else None


def _folders(controller: str) -> Iterator[Path]:
    """This process's group in each hierarchy, version 1 or 2, and all those that hold it.

    In a container the paths may be the host's, of which only the top is there.
    """
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = CGROUPS / (controller if controllers else "")
        group = top / path.lstrip("/")
        yield from (p for p in (group, *group.parents) if p == top or top in p.parents)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    """A limit; 0 where there is none: "max", -1, or nothing."""
    return int(text) if text.isdecimal() else 0
