"""A password, token or signature is nowhere to be seen; what it opens stays open."""

import functools
import http.server
import json
import logging
import shutil
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from conftest import run
from dan_dist.data import cache
from dan_dist.data.cache import localise
from dan_dist.redaction import RedactingFormatter, redact, redact_tree
from dan_dist.run.outcome import write_outcome
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.parent import compare_page
from shards.format import MANIFEST, ShardSet, open_shardset

Write = Callable[[str], Path]
SECRET = "pa+ss/wo=rd"  # as a signature may look
QUOTED = "pa%2Bss%2Fwo%3Drd"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at http://ann:s3cr3t@h:5/x?a=1 not", "at http://***@h:5/x?a=*** not"),
        ("mysql+pymysql://u:p@ss@h/db?ssl=1", "mysql+pymysql://***@h/db?ssl=***"),
        ("https://TOKEN@host/repository", "https://***@host/repository"),
        ("url: /set/m.json?X-Amz-Signature=ab%2F&e=1 (Caused", "url: /set/m.json?X-Amz-Signature"
         "=***&e=*** (Caused"),
        ("403, url='https://h/s?sv=1&sig=a/b+c=='", "403, url='https://h/s?sv=***&sig=***'"),
        ("{'Authorization': 'Basic YWxpY2U6cHc='}", "{'Authorization': '***'}"),
        ("Authorization: AWS4-HMAC Credential=AK/1, Signature=ab\nx", "Authorization: ***\nx"),
        ("tried Bearer abc.def-123", "tried Bearer ***"),
        ("aws_secret_access_key=abc; x=1", "aws_secret_access_key=***; x=1"),
        ("data.token=abc data.size=8", "data.token=*** data.size=8"),
        ('{"wandb": {"api_key": "ab-12", "size": 3}}', '{"wandb": {"api_key": "***", "size": 3}}'),
        ("no answer: ann:pw-1@db.example.org:5432/x", "no answer: ***@db.example.org:5432/x"),
        ("Endpoint=h;AccountKey=ab12==;x=1", "Endpoint=h;AccountKey=***;x=1"),
        ("client(api_key='sk-1')", "client(api_key='***')"),
        # and what is no secret stays as it is
        ("models:/faces@champion at 10:30, 2:1 @ home, dan:v1@faces", None),
        ("max_tokens=7 of {'tokens': 5}", None),
        ("http://h/#/compare-runs?runs=%5B%5D&experiments=1", None),
        ("sqlite:////tmp/a b/mlflow.db", None),
        ("s3://bucket/sets/small: 3 of 5 files", None),
        ("Basic expressions: 7; token: the first one?", None),
        ("mail a@b.org, user@host", None),
    ],
)  # fmt: skip
def test_secrets_are_hidden_and_nothing_else(text: str, expected: str | None) -> None:
    assert redact(text) == (text if expected is None else expected)
    assert redact(redact(text)) == redact(text)


def test_secrets_of_the_environment_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://ann:{QUOTED}@h")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-12345")
    monkeypatch.setenv("HF_TOKEN", "short")  # stands by chance in many a word
    for name in ("AZURE_STORAGE_KEY", "MY_ACCOUNT_KEY", "BUCKET_SAS", "RCLONE_SECRET_KEY"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
    text = redact(f"got {SECRET}, {QUOTED} and tok-12345, in short")
    assert text == "got ***, *** and ***, in short"
    keys = "value-of-azure_storage_key value-of-my_account_key value-of-bucket_sas"
    assert redact(f"{keys}/value-of-rclone_secret_key") == "*** *** ***/***"
    tree = {"a": [f"x {SECRET}", 1, None], "b": ("tok-12345", 2.5), SECRET: True}
    assert redact_tree(tree) == {"a": ["x ***", 1, None], "b": ("***", 2.5), SECRET: True}
    tags = {"note": "a", "db-password": "x", "hf_token": "y", "tokens": "z", "token": 5}
    assert redact_tree({"tags": tags}) == {
        "tags": {**tags, "db-password": "***", "hf_token": "***"}
    }


def test_the_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log lines of any library, the outcome, the journal, MLflow's page."""
    uri = f"https://ann:{QUOTED}@mlflow.example.org"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    line = logging.LogRecord("urllib3", 30, "", 1, "retrying %s", (uri,), None)
    assert RedactingFormatter("%(message)s").format(line).endswith("https://***@mlflow.example.org")
    write_outcome(tmp_path, "failed", step=None, reason=f"no answer from {uri}")
    journal = Journal(tmp_path)
    journal.append("run", uri=uri, params={"data.shards": f"https://h/s?sig={SECRET}"})
    journal.close()
    found = "".join(path.read_text() for path in tmp_path.iterdir()) + compare_page(["r"], "1")
    assert "***@mlflow.example.org" in found
    assert QUOTED not in found and SECRET not in found


class SigningHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files to those who sign for them."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if parse_qs(urlsplit(self.path).query).get("sig") == [SECRET]:
            self.path = urlsplit(self.path).path
            super().do_GET()
        else:
            self.send_error(403)


@pytest.fixture
def signed(faces: ShardSet, tmp_path: Path) -> Iterator[str]:
    """The address of a copy of the faces behind a server that wants a signature."""
    shutil.copytree(faces.root, tmp_path / "served" / "sets" / "small")
    handler = functools.partial(SigningHandler, directory=str(tmp_path / "served"))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/sets/small"
        server.shutdown()


def test_signed_addresses_work(signed: str, faces: ShardSet, tmp_path: Path) -> None:
    for address_of in (f"{signed}?sig={QUOTED}&se=2030", f"{signed}/?se=2030&sig={QUOTED}#x"):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        copy = localise(address_of, str(tmp_path / "cache"))
        assert open_shardset(copy).fingerprint == faces.fingerprint


def test_a_refused_signature_is_not_told(
    signed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RETRY_S", 0.01)
    for make in (
        lambda: localise(f"{signed}?sig=wr0ngsecret", str(tmp_path / "cache")),
        lambda: localise(f"{signed}?sig=wr0ngsecret", None),
        lambda: localise("ftp://ann:wr0ngsecret@h/x", str(tmp_path / "cache")),
        lambda: localise("http://ann:wr0ngsecret@127.0.0.1:1/x", str(tmp_path / "cache")),
    ):
        with pytest.raises((OSError, ValueError)) as refused:
            make()
        assert "wr0ngsecret" not in str(refused.value) and "***" in str(refused.value)
    with pytest.raises(OSError, match=rf"{signed}/{MANIFEST}\?sig=\*\*\*"):
        localise(f"{signed}?sig=wr0ngsecret", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_training_gives_no_secret_away(
    signed: str, tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the screen, in any file of it, in its checkpoint, or in MLflow's store."""
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}?timeout=7531902")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "an0ther-one")
    done = run(
        sys.executable, "-m", "dan_dist", "train", tiny("run"), "tracking.enabled=true",
        "train.max_steps=2", f"data.shards={signed}?sig={QUOTED}", "data.cache=cache",
        "tracking.tags.note=an0ther-one", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sig=***" in done.stdout and json.loads((tmp_path / "run/outcome.json").read_text())
    content = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert content["config"]["data"]["shards"] == f"{signed}?sig=***"
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    written += [database, *(p for p in (tmp_path / "mlruns").rglob("*") if p.is_file())]
    for secret in (SECRET, QUOTED, "7531902", "an0ther-one"):
        assert secret not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), f"{secret} in {path}"


def test_an_unexpected_error_gives_no_secret_away(tmp_path: Path) -> None:
    code = (
        "from dan_dist.redaction import redact_tracebacks; redact_tracebacks(); "
        "open('http://ann:s3cr3tpw@h'); "
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr
    assert "s3cr3tpw" not in done.stderr
