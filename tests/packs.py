"""The packer's command line, and the shards that it makes."""

import io
import logging
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import webdataset

from conftest import run
from shards import pack
from shards.format import MANIFEST, ShardSet, open_shardset


def samples(shards: ShardSet, split: str) -> list[dict]:
    """A split as WebDataset reads it."""
    urls = [str(shards.root / shard.name) for shard in shards.shards[split]]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def pack_command(source: Path, kind: str, *options: str | Path) -> tuple[ShardSet, str]:
    """The shards that the documented command makes of `source`, and its output."""
    out = source.parent / f"{source.name}-shards"
    done = run(sys.executable, "-m", "shards.pack", kind, "--source", source, "--out", out,
               "--overwrite", *options, cwd=source.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return open_shardset(out), done.stdout + done.stderr


def pack_here(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of the packer's command line, run in this process, which is quicker."""
    output = io.StringIO()
    log, handler = logging.getLogger("shards"), logging.StreamHandler(output)
    level, on_term = log.level, signal.getsignal(signal.SIGTERM)
    log.addHandler(handler)
    try:
        with redirect_stdout(output), redirect_stderr(output):
            code = pack.main([*map(os.fspath, arguments)])
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        signal.signal(signal.SIGTERM, on_term)
    return code, output.getvalue()


def refused(source: Path, kind: str, *options: str | Path) -> str:
    """The one line of error for a source that cannot be packed."""
    out = source.parent / "refused"
    code, output = pack_here(kind, "--source", source, "--out", out, "--workers", "1", *options)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, output
    assert not (out / MANIFEST).exists()
    return errors[0]
