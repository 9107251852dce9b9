"""Where the services are and how to speak with them: arguments, then the environment, then this machine's defaults.

Variables: SLIPSTREAM_ADDRESS (host, or host:port of the inference service; the others follow on the next ports),
SLIPSTREAM_INFERENCE_ADDRESS, SLIPSTREAM_CHAT_ADDRESS, SLIPSTREAM_TRAINING_ADDRESS, SLIPSTREAM_ADAPTERS_ADDRESS,
SLIPSTREAM_TOKEN or SLIPSTREAM_TOKEN_FILE, SLIPSTREAM_CA_CERT, SLIPSTREAM_CLIENT_CERT with SLIPSTREAM_CLIENT_KEY,
SLIPSTREAM_TLS, SLIPSTREAM_TIMEOUT_S. Knows nothing of gRPC; read once, when a client is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slipstream_client.errors import InvalidRequestError
from slipstream_client.retries import RetryPolicy

SERVICES = ("inference", "chat", "training", "adapters")
DEFAULT_HOST = "127.0.0.1"
DEFAULT_BASE_PORT = 50051
DEFAULT_TIMEOUT_S = 600.0
MAX_TOKEN_BYTES = 4096
MAX_TOKEN_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Everything a client needs to know before its first call. ``addresses`` has one entry for each of ``SERVICES``."""

    addresses: Mapping[str, str]
    token: str = field(default="", repr=False)
    tls: bool = False
    ca_cert: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    retries: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def resolve(
        cls,
        *,
        address: str | None = None,
        inference_address: str | None = None,
        chat_address: str | None = None,
        training_address: str | None = None,
        adapters_address: str | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: bool | None = None,
        ca_cert: str | Path | None = None,
        client_cert: str | Path | None = None,
        client_key: str | Path | None = None,
        timeout_s: float | None = None,
        retries: RetryPolicy | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> ClientSettings:
        """Settings from arguments, where given, then from ``environ`` (default: the process's), then the defaults.

        An ``address`` given as an argument beats the environment's address of a single service. Raises
        InvalidRequestError naming what is bad.
        """
        env = os.environ if environ is None else environ
        given = {
            "inference": inference_address,
            "chat": chat_address,
            "training": training_address,
            "adapters": adapters_address,
        }
        ca_path = _path(ca_cert, env, "SLIPSTREAM_CA_CERT")
        return cls(
            addresses=_addresses(address, given, env),
            token=_token(token, token_file, env),
            tls=_flag(tls, env, "SLIPSTREAM_TLS") or ca_path is not None,
            ca_cert=ca_path,
            client_cert=_path(client_cert, env, "SLIPSTREAM_CLIENT_CERT"),
            client_key=_path(client_key, env, "SLIPSTREAM_CLIENT_KEY"),
            timeout_s=_timeout_s(timeout_s, env),
            retries=retries or RetryPolicy(),
        )


def _addresses(base: str | None, given: Mapping[str, str | None], env: Mapping[str, str]) -> dict[str, str]:
    from_base = addresses_from(base or env.get("SLIPSTREAM_ADDRESS") or DEFAULT_HOST)
    from_env = {} if base else {s: env[key] for s in SERVICES if env.get(key := f"SLIPSTREAM_{s.upper()}_ADDRESS")}
    return {service: given.get(service) or from_env.get(service) or from_base[service] for service in SERVICES}


def addresses_from(base: str) -> dict[str, str]:
    """The four addresses when inference is at ``base`` (``host``, ``host:port``, ``[v6]:port``) and the others on the
    ports after it.
    """
    host, port = _split(base)
    return {service: f"{host}:{port + offset}" for offset, service in enumerate(SERVICES)}


def _split(base: str) -> tuple[str, int]:
    host, colon, port_text = base.rpartition(":")
    if not colon or base.endswith("]"):  # no port: a name, an IPv4 address, or a bracketed IPv6 one
        host, port_text = base, str(DEFAULT_BASE_PORT)
    highest = 65535 - (len(SERVICES) - 1)
    if (
        not host
        or "/" in host
        or not port_text.isascii()
        or not port_text.isdigit()
        or not 1 <= int(port_text) <= highest
    ):
        raise InvalidRequestError.of("address", f"{base!r} is not host or host:port with a port of 1 to {highest}")
    if ":" in host and not host.startswith("["):
        raise InvalidRequestError.of("address", f"{base!r}: write an IPv6 address in brackets, as [::1]:50051")
    return host, int(port_text)


def _token(token: str | None, token_file: str | Path | None, env: Mapping[str, str]) -> str:
    if token is not None and token_file is not None:
        raise InvalidRequestError.of("token", "give token or token_file, not both")
    if token is not None:
        return _checked_token(token, "token")
    if token_file is not None:
        return _checked_token(_read(token_file, "token_file"), "token_file")
    if value := env.get("SLIPSTREAM_TOKEN"):
        return _checked_token(value, "SLIPSTREAM_TOKEN")
    if value := env.get("SLIPSTREAM_TOKEN_FILE"):
        return _checked_token(_read(value, "SLIPSTREAM_TOKEN_FILE"), "SLIPSTREAM_TOKEN_FILE")
    return ""


def _read(path: str | Path, name: str) -> str:
    """The first token of a token file as the services read it: one a line, a name after it, ``#`` before comments."""
    try:
        with Path(path).open(encoding="ascii") as file:
            lines = file.read(MAX_TOKEN_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise InvalidRequestError.of(name, f"cannot read {str(path)!r}: {why}") from error
    words = (line.split() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    token = next((word[0] for word in words), "")
    if not token:
        raise InvalidRequestError.of(name, f"{str(path)!r} holds no token")
    return token


def _checked_token(text: str, name: str) -> str:
    token = text.strip()
    if len(token) > MAX_TOKEN_BYTES or not token.isascii() or not token.isprintable() or " " in token:
        # The value itself stays out of the message: it is a secret.
        raise InvalidRequestError.of(
            name, f"a token is one printable ASCII word of at most {MAX_TOKEN_BYTES} characters"
        )
    return token


def _path(value: str | Path | None, env: Mapping[str, str], variable: str) -> Path | None:
    chosen = value if value is not None else env.get(variable) or None
    return None if chosen is None else Path(chosen)


def _flag(value: bool | None, env: Mapping[str, str], variable: str) -> bool:
    if value is not None:
        return value
    text = env.get(variable, "").lower()
    if text not in {"", "0", "1", "true", "false"}:
        raise InvalidRequestError.of(variable, f"{text!r} is not one of 1, 0, true, false")
    return text in {"1", "true"}


def _timeout_s(value: float | None, env: Mapping[str, str]) -> float:
    text = env.get("SLIPSTREAM_TIMEOUT_S")
    name = "timeout_s" if value is not None else "SLIPSTREAM_TIMEOUT_S"
    try:
        seconds = value if value is not None else float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= 86_400:
        raise InvalidRequestError.of(
            name, f"{text if value is None else value} is not a number of seconds above 0 and at most 86400"
        )
    return seconds
