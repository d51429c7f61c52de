"""What an error of MLflow, of its HTTP stack or of a disk means for what was being sent.

A server that is away, overloaded or broken, a connection, a deadline, a full disk and rights that
can be given are waited for. What is refused as it is, and what a server lacks, is not.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from dan_dist.redaction import redact

# MLflow's words, and statuses of HTTP where there is none of MLflow's around them
REFUSALS = frozenset((
    "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "ENDPOINT_NOT_FOUND", "NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST", "NOT_IMPLEMENTED", "ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS",
))  # fmt: skip
REFUSED_STATUSES = frozenset((400, 404, 405, 406, 410, 411, 413, 414, 415, 422, 431, 501))
MISSING = (
    "Not Found",
    "Method Not Allowed",
)  # FastAPI's words, around which MLflow loses the status
_STATUS = re.compile(r"error code (\d{3})\b|too many (\d{3}) error responses")
_PAGE = re.compile(r"[.\s]*Response body: '\s*<.*")  # HTML, which explains nothing
_HINTS = {
    404: "this server lacks it; newer ones may have it",
    401: "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, log in",
    403: "a server that does not know the name it is called by is to be started with "
    '--allowed-hosts "NODE:*,localhost:*"; else this user may not write there',
}


T = TypeVar("T")


class RefusedError(Exception):
    """A record, or a part of it, that will not be taken as it is however often it is sent."""


class PartlyRefusedError(RefusedError):
    """Some entries of a record were refused; the others have arrived."""

    def __init__(self, refused: Mapping[str, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(refused.values())))
        self.refused = refused  # what it is → the reason


class PendingError(Exception):
    """A record names another run, whose own record has still to be sent; says how."""


class ClosedError(Exception):
    """Nothing of the run will be taken: its experiment was deleted, say. Names the way on."""


def is_refusal(error: Exception) -> bool:
    """Whether sending the same again, to the same server, is of no use."""
    from mlflow.exceptions import InvalidUrlException, MlflowException
    from sqlalchemy.exc import ArgumentError

    unfit = RefusedError | ImportError | UnicodeError | InvalidUrlException | ArgumentError
    if isinstance(error, unfit):
        return True
    status = status_of(error)
    if status is not None and status != 200:
        return status in REFUSED_STATUSES
    detail = (getattr(error, "json", None) or {}) if isinstance(error, MlflowException) else {}
    return detail.get("detail") in MISSING or getattr(error, "error_code", "") in REFUSALS


def status_of(error: Exception) -> int | None:
    """The status of HTTP that an error comes from, where it is known."""
    response = getattr(error, "response", None)
    if (status := getattr(response, "status_code", None)) is not None:
        return int(status)
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def reason_of(error: Exception) -> str:
    """An error in one line without secrets, with what helps where that is known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _PAGE.sub("", redact(lines[0] if lines else type(error).__name__))
    hint = _HINTS.get(status_of(error) or 0)
    return f"{text}; {hint}" if hint else text


def send_entries(
    kind: str, rows: Sequence[tuple[str, T]], send: Callable[[list[T]], object]
) -> None:
    """Sends named entries at once or, where that is refused, one by one.

    Raises:
        PartlyRefusedError: some are refused by themselves; the others have arrived.
    """
    if not rows:
        return
    try:
        send([entry for _, entry in rows])
        return
    except Exception as error:
        if not is_refusal(error):
            raise
    refused = {}
    for name, entry in rows:
        try:
            send([entry])
        except Exception as error:
            if not is_refusal(error):
                raise
            refused[f"{kind} {name}"] = reason_of(error)
    if refused:
        raise PartlyRefusedError(refused)


@contextmanager
def noted(refused: dict[str, str]) -> Iterator[None]:
    """Notes what is refused of what is sent inside: it holds nothing after it back."""
    try:
        yield
    except PartlyRefusedError as error:
        refused |= error.refused
