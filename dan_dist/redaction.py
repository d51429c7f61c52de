"""Secrets in text: what is shown, logged, recorded or written for others goes through `redact`."""

import logging
import os
import re
import sys
from traceback import format_exception
from types import TracebackType
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

from dan_dist.values import variables

T = TypeVar("T")
HIDDEN = "***"
SHORTEST = 6  # characters: a shorter one stands by chance in texts that have nothing to do with it

_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]*@")
_USER_ALONE = re.compile(
    r"(?<![\w/.@:-])[\w.+-]+:[^\s/?#@:'\"<>]+@(?=[\w.-]+(?::\d|/))"
)  # no scheme
# A signed address may name its signature as it likes: every value of a query is hidden. What
# follows a '#' is no query: MLflow's pages have theirs there.
_QUERY = re.compile(r"#\S*|\?[^\s?#'\"<>=]+=[^\s#'\"<>]*")
_VALUE = re.compile(r"=[^&\s)\]},]*")
_KEYS = (
    "signature|credential|password|passwd|secret|token|(?:access|api|account|secret|storage)[_-]?key"
    "(?:[_-]?id)?"
)
# key=value, and as JSON and Python have it
_PAIR = re.compile(
    rf"\b((?:[\w-]*[_-])?(?:{_KEYS})(?:=|['\"]\s*:\s*)['\"]?)[^\s&,;'\")\]}}]+", re.IGNORECASE
)
_KEY = re.compile(rf"(?:^|[\W_])(?:{_KEYS})$", re.IGNORECASE)
_HEADER = re.compile(
    r"\b(authorization['\"]?\s*[:=]\s*['\"]?)[^'\"}\n]+|\b(Bearer\s+)[\w.~+/=-]{6,}",
    re.IGNORECASE,
)
_VARIABLES = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|TOKEN|SECRET|(?:ACCESS|ACCOUNT|API|SECRET|STORAGE)_KEY|SAS|SIGNATURE"
    r"|CONNECTION_STRING)$"
)
_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


def redact(text: str) -> str:
    """`text` with each secret replaced by ***: it reads as before, and gives nothing away.

    Secrets are the user and the values of the query in an address, the values of headers and of
    keys that are called password, token, signature and the like, and, wherever they stand, the
    passwords and tokens in this process's environment.
    """
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER_ALONE.sub(f"{HIDDEN}@", _USER.sub(f"{HIDDEN}@", text))
    text = _QUERY.sub(lambda m: m[0] if m[0][0] == "#" else _VALUE.sub(f"={HIDDEN}", m[0]), text)
    text = _HEADER.sub(lambda m: f"{m[1] or m[2]}{HIDDEN}", text)
    return _PAIR.sub(rf"\1{HIDDEN}", text)


def redact_tree(tree: T) -> T:
    """Plain values with each text in them redacted, a dict's keys left as they are.

    The text of a key that is called password, token and the like is hidden as a whole.
    """
    found: Any = tree
    if isinstance(tree, str):
        found = redact(tree)
    elif isinstance(tree, dict):
        found = {
            key: HIDDEN if isinstance(value, str) and _KEY.search(str(key)) else redact_tree(value)
            for key, value in tree.items()
        }
    elif isinstance(tree, list | tuple):
        found = type(tree)(redact_tree(value) for value in tree)
    return cast(T, found)


class RedactingFormatter(logging.Formatter):
    """Log lines without secrets, whichever library writes them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """From here on, an error that nobody expected is printed without secrets too."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = show


def _secrets() -> list[str]:
    """Those of the environment, also as an address would quote them; the longest first."""
    found = [value for name, value in variables().items() if _VARIABLES.search(name)]
    for name in _ADDRESSES:
        try:
            found.append(urlsplit(os.environ.get(name, "")).password or "")
        except ValueError:  # not an address
            continue
    spelt = {form for value in found for form in (value, quote(value, safe=""), unquote(value))}
    return sorted((s for s in spelt if len(s) >= SHORTEST), key=len, reverse=True)
