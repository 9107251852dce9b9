"""Bearer tokens from a file: who may call, and under which name.

One token a line, with an optional name after it (``s3cret alice``); blank lines and lines that begin with ``#`` do not
count. The file is read again when it changes, at most once a second; a file that has gone or become unreadable leaves
the last tokens in force, because a secret is often rewritten by removing it first. Lives on the event loop; reading a
few lines is the only file access.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from slipstream_server import errors

logger = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 1.0
_MAX_FILE_BYTES = 1 << 20
_MAX_TOKEN_BYTES = 4096


class TokenFileError(ValueError):
    """The token file cannot be used; the message names the line, never the token."""


class TokenFile:
    """The tokens of one file. Raises ``TokenFileError`` when it cannot be read at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._names_by_digest = _read(path)
        self._checked_at_s = time.monotonic()

    def caller_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The caller's name by its ``authorization: Bearer ...`` header; raises ``Unauthenticated``."""
        header = next((value for key, value in metadata if key == "authorization"), None)
        if header is None:
            raise errors.Unauthenticated("a bearer token is needed: metadata `authorization: Bearer TOKEN`")
        scheme, _, token = (header if isinstance(header, str) else header.decode("latin-1")).partition(" ")
        name = self.name_of(token.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise errors.Unauthenticated("the bearer token is not one this server knows")
        return name

    def name_of(self, token: str) -> str | None:
        """The token's name; takes the same time whichever token it is, or none."""
        self._reload_if_changed()
        digest = _digest(token[:_MAX_TOKEN_BYTES])
        found = None
        for known, name in self._names_by_digest.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if now - self._checked_at_s < _CHECK_INTERVAL_S:
            return
        self._checked_at_s = now
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            self._names_by_digest = _read(self._path)
            self._stamp = stamp
            logger.info("token file read again: %d tokens", len(self._names_by_digest))
        except TokenFileError as error:
            logger.warning("token file not read again, the former tokens stay in force: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise TokenFileError(f"token file cannot be read: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino


def first_token(path: Path) -> str:
    """The first token of the file: what a service shows to another one."""
    return _entries(path)[0][0]


def _read(path: Path) -> dict[bytes, str]:
    return {_digest(token): name for token, name in _entries(path)}


def _entries(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise TokenFileError(f"token file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenFileError("token file is not UTF-8 text") from None
    if len(text) > _MAX_FILE_BYTES:
        raise TokenFileError(f"token file is larger than {_MAX_FILE_BYTES} bytes")
    entries = [
        _entry(number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not entries:
        raise TokenFileError("token file holds no token")
    return entries


def _entry(number: int, line: str) -> tuple[str, str]:
    token, *rest = line.split()
    if len(rest) > 1:
        raise TokenFileError(f"token file, line {number}: expected TOKEN or TOKEN NAME")
    if len(token) > _MAX_TOKEN_BYTES or not token.isascii():
        raise TokenFileError(f"token file, line {number}: a token is at most {_MAX_TOKEN_BYTES} ASCII characters")
    return token, rest[0] if rest else f"token-{_digest(token).hex()[:8]}"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
