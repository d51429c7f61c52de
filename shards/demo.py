"""The demo's shards: drawn faces, packed where they are not yet."""

import logging
from pathlib import Path

from shards.format import MANIFEST, open_shardset
from shards.packing.writer import pack
from shards.release import Release
from shards.show import draw_overview

log = logging.getLogger(__name__)


def ensure(folder: str | Path, wanted: Release, *, size: int) -> None:
    """Packs these faces into `folder`, with a contact sheet, unless they are there."""
    folder, listed = Path(folder), {name: len(items) for name, items in wanted.splits.items()}
    if not (folder / MANIFEST).exists():
        log.info("drawing %d faces into %s", sum(listed.values()), folder)
        pack(wanted, folder, size=size)
        draw_overview(open_shardset(folder))
    found = open_shardset(folder)
    counts = {name: sum(per_class) for name, per_class in found.counts.items()}
    if found.release != wanted.release or counts != listed:
        raise ValueError(
            f"{folder} holds {found.dataset} ({found.release}) {counts}, not the faces asked for "
            f"({wanted.release}) {listed}; name another folder"
        )
