"""The documented tracking server, called by the name of its node."""

import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import REPOSITORY, start
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.store import connect
from dan_dist.tracking.tracker import MlflowTracker, RunRecord

RECORD = RunRecord(experiment="e", name="n", params={}, config={})


def documented(port: int) -> list[str]:
    """The command of slurm/README.md, for this node."""
    text = (REPOSITORY / "slurm" / "README.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("mlflow server")]
    words = shlex.split(line.replace("NODE", socket.gethostname()).replace("5000", str(port)))
    return ["-m", *words, "--workers", "1"]  # by itself it starts four


@contextmanager
def served(command: list[str], cwd: Path, port: int) -> Iterator[str]:
    process = start(*command, cwd=cwd)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://{socket.gethostname()}:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_the_documented_server_is_reached_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # processes of its own
    port = free_port()
    command = documented(port)
    allowed = command.index("--allowed-hosts")
    with served([*command[:allowed], *command[allowed + 2 :]], tmp_path, port) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with MlflowTracker(tmp_path / "run", RECORD) as tracker:
            tracker.metrics({"a": 1.0}, 1)
        assert "403" in caplog.text and '--allowed-hosts "NODE:*,localhost:*"' in caplog.text
    port = free_port()
    with served(documented(port), tmp_path, port) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert tracking.replay(tmp_path / "run")[0] == 4
        run = connect(url).get_run(read_sent(tmp_path / "run").run_id)
        assert run.data.metrics == {"a": 1.0}
