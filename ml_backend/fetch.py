"""Bytes of a task's image, fetched so that a task's data cannot turn this backend against its own network.

Four rules. The token goes to the configured Label Studio and nowhere else, whatever redirects say. Any other host must
lie at a public address, checked on the very address that is connected to, or be named by the operator. Time and bytes
are bounded in total, not per packet. Every failure is a `Refusal` that names host and path, never a query (it may be
signed) nor a token. One connection serves one request and is closed: a task's image is asked for about once an hour.

The protocol is spoken through h11 (sans-io), so that nothing but this file opens sockets, follows redirects or logs.
"""

from __future__ import annotations

import base64
import binascii
import functools
import ipaddress
import json
import logging
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urljoin, urlsplit

import certifi
import h11
import msgspec

from ml_backend.settings import Settings
from model.types import Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_REDIRECTS = 5
_MAX_URI = 16 * 1024  # characters, data: aside
_MAX_HEADERS = 64 * 1024  # bytes
_MAX_TOKEN_ANSWER = 64 * 1024  # bytes
_MAX_API_ANSWER = 100 * 2**20  # bytes; read as JSON it takes some times as much memory
_CHUNK = 64 * 1024  # bytes
_DIAL_LIMIT_S = 10.0  # one address; the next one may answer
_REFRESH_EARLY_S = 30.0
_SERVED = ("/data/", "/storage-data/", "/tasks/")  # what Label Studio serves task files from, below its sub-path
_UPLOADS = ("/data/upload/", "/data/local-files/")
_STORAGES = ("s3", "s3s", "gs", "azure-blob")
_REDIRECTS = (301, 302, 303, 307, 308)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.IGNORECASE)  # a last label like this makes a host an IPv4 address
_DATA_URL = re.compile(r"data:(image/[\w.+-]+)(;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # mapped IPv4, NAT64, ULA, link-local, multicast all lie outside
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")
_CLOUD_HOST = ipaddress.IPv4Address("168.63.129.16")  # Azure's own host, though its number looks public


class TooLarge(Refusal):
    """What a server sends has more bytes than we take."""


class Deadline:
    """The moment by which everything has to be done."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._end = clock() + limit_s

    def left_s(self) -> float:
        """Return the seconds left, more than none.

        Raises:
            TimeoutError: none are left.
        """
        left = self._end - self._clock()
        if left <= 0:
            raise TimeoutError
        return left


@dataclass(frozen=True, slots=True, kw_only=True)
class _Url:
    scheme: str  # http or https
    host: str  # lower case, ASCII; IPv6 without brackets
    port: int
    path: str  # percent-encoded
    query: str  # percent-encoded, without the question mark

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    @property
    def site(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _read_url(text: str) -> _Url:
    """Parse an absolute http(s) URL; what we print, check and connect to is the same reading."""
    try:
        parts = urlsplit(text)
        port = parts.port
        host = parts.hostname or ""
    except ValueError:
        raise Refusal("its address cannot be read; check host and port") from None
    if parts.username is not None or parts.password is not None:
        raise Refusal("its address holds a user name; browsers do not load such images either: remove it")
    return _Url(
        scheme=parts.scheme,
        host=_read_host(host, bracketed="[" in parts.netloc),
        port=_default_port(parts.scheme) if port is None else port,
        path=quote(parts.path or "/", safe="/:@!$&'()*+,;=~%"),
        query=quote(parts.query, safe="/:@!$&'()*+,;=~%?"),
    )


def _read_host(host: str, *, bracketed: bool) -> str:
    if bracketed:
        try:
            return str(ipaddress.IPv6Address(host)) if "%" not in host else _no_host(host)
        except ValueError:
            _no_host(host)
    try:
        host = host.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        _no_host(host)
    if not _HOST_NAME.fullmatch(host):
        _no_host(host)
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise Refusal(f"{host} is an unusual spelling of an address; write it as four decimal numbers") from None
    return host


def _no_host(host: str) -> str:
    raise Refusal(f"{_shorten(host)!r} is not a host name; check the address in the task")


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _name(uri: str) -> str:
    """Return what may be shown of an address: no user, no query, nothing unprintable."""
    head = re.split(r"[?#]", uri, maxsplit=1)[0]
    scheme, separator, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    head = f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}" if separator else head
    return _shorten("".join(c if c.isprintable() else "?" for c in head)) or "the empty address"


def _legible(text: str) -> bool:
    """Whether an address can be one: not endless, no control characters, no halves of characters."""
    return len(text) <= _MAX_URI and not re.search("[\x00-\x1f\x7f\ud800-\udfff]", text)


def _climbs(text: str) -> bool:
    """Whether a path steps upwards (or hides behind backslashes or many encodings) once everything is decoded."""
    for _ in range(4):
        plain = unquote(text)
        if plain == text:
            return ".." in re.split(r"[/\\]", text) or "\0" in text
        text = plain
    return True


class _Guard:
    """Which addresses may be connected to: public ones, and those the operator allowed."""

    def __init__(self, allow_hosts: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._networks: list[_Network] = []
        for entry in allow_hosts:
            try:
                self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                if not _HOST_NAME.fullmatch(entry.rstrip(".")):
                    raise Refusal(
                        f"GRACO_ALLOW_HOSTS holds {entry!r}, which is no host name, address or network; "
                        "write nas.local,10.0.0.5,10.0.0.0/8"
                    ) from None
                self._names.add(entry.rstrip(".").lower())

    def allows(self, host: str) -> bool:
        """Whether the operator named this host, or the address it is, or for localhost the address it means."""
        try:
            address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            return host in self._names
        return host in self._names or any(address in network for network in self._networks)

    def check(self, url: _Url, address: _Address) -> None:
        """Refuse an address that is not public, unless it or its host was allowed."""
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        if url.host in self._names or any(address in n or (mapped and mapped in n) for n in self._networks):
            return
        kind = _kind(address)
        if kind is None:
            return
        where = f"address {address} is {kind}"
        if url.host != str(address):
            where = f"{url.host} is at {address}, which is {kind}"
        raise Refusal(
            f"{where}; add {url.host} to GRACO_ALLOW_HOSTS if images shall come from there, "
            f"or set LABEL_STUDIO_URL to {url.site} if that is Label Studio"
        )


def _kind(address: _Address) -> str | None:
    """Return in a word why an address is not on the public internet, or None."""
    if address.is_unspecified:
        return "unspecified"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_private and address.ipv4_mapped is None:
            return "private"
        if address not in _GLOBAL_V6 or address in _SIX_TO_FOUR:
            return "reserved (or IPv4 in disguise)"
    elif address in _SHARED:
        return "shared by a carrier's network"
    elif address == _CLOUD_HOST:
        return "the cloud's own host"
    if address.is_reserved:
        return "reserved"
    return None if address.is_global else "private"


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's trusted certificates (SSL_CERT_FILE included) and certifi's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def _resolve(url: _Url, deadline: Deadline) -> list[tuple[socket.AddressFamily, tuple[str | int, ...]]]:
    """Return the socket addresses of a host; in a thread, since the system's resolver knows no deadline."""
    answers: queue.SimpleQueue[list[tuple[socket.AddressFamily, tuple[str | int, ...]]] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
            answers.put([(family, address) for family, _, _, _, address in found])  # type: ignore[misc]
        except OSError as error:
            answers.put(error)
        except Exception:  # a name the resolver cannot even encode
            answers.put(OSError("no such name"))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left_s())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError) or not answer:
        raise Refusal(f"host {url.host} is not known here; check its spelling and this machine's DNS")
    return answer


def _dial(family: socket.AddressFamily, address: tuple[str | int, ...], limit_s: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(limit_s)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _open(url: _Url, guard: _Guard | None, deadline: Deadline) -> socket.socket:
    """Return a connection to `url`'s host, to an address that `guard` has seen; no guard, no check."""
    addresses = _resolve(url, deadline)
    trouble: Refusal | None = None
    for tried, (family, address) in enumerate(addresses):
        try:
            if guard is not None:
                guard.check(url, ipaddress.ip_address(str(address[0])))
            limit_s = min(_DIAL_LIMIT_S, deadline.left_s() / (len(addresses) - tried))
            sock = _dial(family, address, limit_s)
        except Refusal as refusal:
            trouble = refusal
        except TimeoutError:
            deadline.left_s()  # raises when all the time is gone
            trouble = trouble or Refusal(f"{url.site} does not answer; check the address and any firewall")
        except OSError as error:
            trouble = trouble or Refusal(
                f"{url.site} cannot be connected to ({error.strerror or 'no connection'}); check that it runs and "
                "is reachable from here (in a container, localhost is the container itself)"
            )
        else:
            return _secure(url, sock, deadline) if url.scheme == "https" else sock
    raise trouble or Refusal(f"{url.site} has no address")


def _secure(url: _Url, sock: socket.socket, deadline: Deadline) -> socket.socket:
    try:
        sock.settimeout(deadline.left_s())  # holds for the handshake as a whole
        return _tls().wrap_socket(sock, server_hostname=url.host)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Refusal(
            f"the certificate of {url.site} is not trusted ({error.verify_message}); "
            "point SSL_CERT_FILE to the authority that signed it"
        ) from None
    except TimeoutError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        why = getattr(error, "reason", None) or error.strerror or "no handshake"
        raise Refusal(f"{url.site} does not speak TLS with us ({why}); check scheme and port") from None
    except BaseException:
        sock.close()
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an HTTP server said."""

    status: int
    location: str | None  # where it redirects to
    date: str | None  # by the server's clock
    body: bytes  # of an image's server: empty unless the status is 200


def read_answer(body: bytes, path: str, kind: type[T]) -> T:
    """Return what Label Studio's API answered, of the shape we expect.

    Args:
        body: of the answer.
        path: that was asked for; its query stays out of the error.
        kind: a msgspec struct, or another type that msgspec reads.

    Raises:
        Refusal: it is of another shape.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(
            f"the answer to {path.partition('?')[0]} is not Label Studio's; check that LABEL_STUDIO_URL leads to it "
            "and not to a page of a proxy"
        ) from None


def _request(
    url: _Url,
    *,
    deadline: Deadline,
    guard: _Guard | None,
    max_bytes: int,
    authorization: str | None = None,
    content: bytes | None = None,
    method: str | None = None,
    every_body: bool = False,
) -> Answer:
    """Send one request and return its answer; unless `every_body`, the body is read only if the status is 200.

    Raises:
        Refusal: no connection, no HTTP, too many bytes, an encoded body.
        TimeoutError: the deadline has passed.
    """
    headers = [("Host", url.authority), ("User-Agent", "graco-label-studio"), ("Accept", "*/*")]
    headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
    if authorization is not None:
        headers.append(("Authorization", authorization))
    if content is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADERS)
    method = method or ("GET" if content is None else "POST")
    message = connection.send(h11.Request(method=method, target=url.target, headers=headers))
    message = (message or b"") + (connection.send(h11.Data(content)) or b"" if content else b"")
    message += connection.send(h11.EndOfMessage()) or b""
    with _open(url, guard, deadline) as sock:
        try:
            sock.settimeout(deadline.left_s())
            sock.sendall(message)
            return _read_answer(connection, sock, url, deadline, max_bytes, every_body=every_body)
        except TimeoutError:
            raise
        except OSError as error:
            raise Refusal(f"the connection to {url.site} broke ({error.strerror or 'closed'}); try again") from None
        except h11.RemoteProtocolError:
            raise Refusal(
                f"{url.site} broke off or does not speak HTTP; check scheme and port, then try again"
            ) from None


def _read_answer(
    connection: h11.Connection, sock: socket.socket, url: _Url, deadline: Deadline, max_bytes: int, *, every_body: bool
) -> Answer:
    body = bytearray()
    status, location, date = 0, None, None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            sock.settimeout(deadline.left_s())
            connection.receive_data(sock.recv(_CHUNK))
        elif isinstance(event, h11.Response):
            headers = {name.decode("ascii").lower(): value for name, value in event.headers}
            date = headers["date"].decode("latin-1") if "date" in headers else None
            status = event.status_code
            if status != 200:
                location = headers["location"].decode("utf-8", "replace") if "location" in headers else None
                if not every_body:
                    return Answer(status=status, location=location, date=date, body=b"")
            _check_headers(headers, url, max_bytes)
        elif isinstance(event, h11.Data):
            if len(body) + len(event.data) > max_bytes:
                raise _too_many(f"more than {max_bytes} bytes")
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return Answer(status=status, location=location, date=date, body=bytes(body))
        elif not isinstance(event, h11.InformationalResponse):  # closed before any answer
            raise Refusal(f"{url.site} closed the connection without an answer; try again")


def _check_headers(headers: dict[str, bytes], url: _Url, max_bytes: int) -> None:
    # aws-chunked names how an object was once uploaded; some storages repeat it although the body is plain
    codings = {c.strip().lower() for c in headers.get("content-encoding", b"").split(b",")}
    if codings - {b"", b"identity", b"aws-chunked"}:
        raise Refusal(f"{url.site} sent a compressed body though none was asked for; serve images as they are")
    length = headers.get("content-length", b"0")
    if len(length) > 18 or int(length) > max_bytes:
        raise _too_many(f"{_shorten(length.decode('ascii'), 24)} bytes, more than {max_bytes}")


def _too_many(what: str) -> TooLarge:
    return TooLarge(f"the file has {what}; make it smaller or raise GRACO_IMAGE_MAX_MB")


def _late(deadline: Deadline) -> Refusal:
    return Refusal(
        f"it took longer than {deadline.limit_s:g} s in all; check that its server answers, "
        "or raise GRACO_IMAGE_TIMEOUT_S"
    )


class LabelStudioAuth:
    """The Authorization header for one Label Studio: a legacy token as it is, a personal access token exchanged.

    A personal access token is a refresh token (JWT); what it is exchanged for lives five minutes and is renewed 30 s
    before its end, by one thread while others wait.
    """

    def __init__(self, url: str, token: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take Label Studio's address (with its sub-path) and a token of either kind.

        Raises:
            Refusal: the token cannot be one.
        """
        self._token = token.strip()
        if not re.fullmatch(r"[!-~]+", self._token):
            raise Refusal("LABEL_STUDIO_API_KEY holds spaces or other characters no token has; copy the token again")
        self._refresh_url = _read_url(f"{url.rstrip('/')}/api/token/refresh")
        self._clock = clock
        self._lock = threading.Lock()
        self._access: str | None = None
        self._fresh_until = 0.0

    @property
    def kind(self) -> str:
        """'legacy' or 'personal access'."""
        return "personal access" if self._token.count(".") == 2 else "legacy"

    def header(self, deadline: Deadline) -> str:
        """Return the value of the Authorization header.

        Raises:
            Refusal: Label Studio does not exchange the token.
            TimeoutError: the deadline has passed.
        """
        if self.kind == "legacy":
            return f"Token {self._token}"
        if not self._lock.acquire(timeout=deadline.left_s()):
            raise TimeoutError
        try:
            if self._access is None or self._clock() >= self._fresh_until:
                asked = self._clock()
                self._access = self._refresh(deadline)
                self._fresh_until = asked + _lifetime_s(self._access) - _REFRESH_EARLY_S
            return f"Bearer {self._access}"
        finally:
            self._lock.release()

    def refused(self) -> Refusal:
        """Return what to say after a 401, and forget what the token was exchanged for."""
        self._access = None  # no lock: at worst it is exchanged once more
        advice = (
            "it may be wrong, or legacy tokens are off for the organisation (Organization > API Tokens Settings): "
            "switch them on, or put a personal access token into LABEL_STUDIO_API_KEY"
            if self.kind == "legacy"
            else "it may be revoked or expired, or personal access tokens are off for the organisation: make a new one "
            "(Account & Settings > Personal Access Token) and put it into LABEL_STUDIO_API_KEY"
        )
        return Refusal(f"Label Studio answered 401 to a {self.kind} token; {advice}")

    def _refresh(self, deadline: Deadline) -> str:
        answer = _request(
            self._refresh_url,
            deadline=deadline,
            guard=None,
            max_bytes=_MAX_TOKEN_ANSWER,
            content=json.dumps({"refresh": self._token}).encode(),
        )
        if answer.status in (401, 403):
            self._access = None
            raise Refusal(
                "Label Studio does not exchange the personal access token (it is revoked, expired or not its own); "
                "make a new one (Account & Settings > Personal Access Token) and put it into LABEL_STUDIO_API_KEY"
            )
        try:
            access = json.loads(answer.body)["access"] if answer.status == 200 else None
        except (ValueError, KeyError, TypeError):
            access = None
        if not isinstance(access, str) or not re.fullmatch(r"[!-~]+", access):
            raise Refusal(
                f"Label Studio answered {answer.status} and no access token when asked to exchange the personal access "
                "token; check LABEL_STUDIO_URL (scheme and sub-path included)"
            )
        return access


def _lifetime_s(access: str) -> float:
    """Return how long an access token lives, by its own account; 60 s if it gives none.

    Both ends come from Label Studio's clock, so that ours may differ.
    """
    try:
        body = access.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return float(claims["exp"]) - float(claims["iat"] if "iat" in claims else time.time())
    except (ValueError, KeyError, TypeError, IndexError):
        return 60.0


class Fetcher:
    """Fetches images for tasks; used from many threads, keeps nothing but an access token."""

    def __init__(
        self,
        label_studio_url: str | None,
        token: str | None,
        *,
        max_bytes: int,
        timeout_s: float,
        allow_hosts: Iterable[str] = (),
    ) -> None:
        """Take Label Studio's address with its sub-path, a token of either kind, and the limits of one fetch.

        Args:
            label_studio_url: None: only images elsewhere, and those inside the task, can be had.
            token: sent to that address only; None: Label Studio is asked without one.
            max_bytes: largest file; what Label Studio's API says has a limit of its own.
            timeout_s: longest time in all: names, connections, redirects, body.
            allow_hosts: host names, addresses and networks that images may come from although not public.

        Raises:
            Refusal: one of these cannot be read.
        """
        self._own: _Url | None = None
        self.auth: LabelStudioAuth | None = None
        if label_studio_url:
            try:
                if not re.match(r"https?://", label_studio_url, re.IGNORECASE):
                    raise Refusal("it must begin with http:// or https://")
                self._own = _read_url(label_studio_url.rstrip("/"))
            except Refusal as why:
                raise Refusal(f"LABEL_STUDIO_URL {_name(label_studio_url)}: {why}") from None
            if token and token.strip():
                self.auth = LabelStudioAuth(label_studio_url, token)
        self._prefix = "" if self._own is None or self._own.path == "/" else self._own.path.rstrip("/")
        self._guard = _Guard(allow_hosts)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    def fetch(self, uri: str, task_id: int | None) -> bytes:
        """Return the bytes behind the address that a task's data gives for its image.

        Args:
            uri: a path of Label Studio's, an http(s) URL, a storage URI (s3://, gs://, azure-blob://) or a data: URL.
            task_id: whose project knows the storage; needed for storage URIs only.

        Raises:
            Refusal: they cannot or must not be had.
        """
        uri = uri.strip()
        if uri[:5].lower() == "data:":
            return self._decode(uri)
        start = time.perf_counter()
        deadline = Deadline(self._timeout_s)
        try:
            body = self._follow(self._locate(uri, task_id), deadline)
        except Refusal as why:
            raise Refusal(f"{_name(uri)} was not fetched: {why}") from None
        except TimeoutError:
            raise Refusal(f"{_name(uri)} was not fetched: {_late(deadline)}") from None
        log.debug("fetched %s: %d bytes in %.0f ms", _name(uri), len(body), (time.perf_counter() - start) * 1e3)
        return body

    def ask(
        self, path: str, *, timeout_s: float = 5, method: str | None = None, content: bytes | None = None
    ) -> Answer:
        """Return Label Studio's answer to a request; redirects are its answer.

        Args:
            path: below its address, such as /api/version.
            timeout_s: for all of it.
            method: GET if none is given, or with content POST.
            content: JSON to send.

        Raises:
            Refusal: no address is known, or there is no answer in time.
            TooLarge: the answer has more bytes than we take, whatever is taken for an image.
        """
        if self._own is None:
            raise Refusal("LABEL_STUDIO_URL is not set; set it to Label Studio's address as seen from here")
        deadline = Deadline(timeout_s)
        try:
            return _request(
                _read_url(f"{self._own.site}{self._prefix}{path}"),
                deadline=deadline,
                guard=None,
                max_bytes=_MAX_API_ANSWER,
                authorization=self.auth.header(deadline) if self.auth else None,
                content=content,
                method=method,
                every_body=True,
            )
        except TooLarge:
            raise TooLarge(
                f"Label Studio's answer to {path.partition('?')[0]} has more than {_MAX_API_ANSWER // 2**20} MB, "
                "which is more than is taken at once"
            ) from None
        except TimeoutError:
            raise Refusal(
                f"{self._own.site} did not answer within {timeout_s:g} s; check the address, and that it is not busy"
            ) from None

    def _decode(self, uri: str) -> bytes:
        head = _DATA_URL.match(uri, 0, 512)
        if head is None:
            raise Refusal("the task's data: URL is not data:image/...;base64,...; store the image as a file instead")
        if (len(uri) - head.end()) * 3 // 4 > self._max_bytes + 3:
            raise Refusal(f"the task's data: URL: {_too_many(f'more than {self._max_bytes} bytes')}")
        text = "".join(uri[head.end() :].split())
        try:
            body = base64.b64decode(unquote(text) if "%" in text else text, validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(f"the task's {head[1]} data: URL is not base64; import the task again") from None
        if len(body) > self._max_bytes:
            raise Refusal(f"the task's data: URL: {_too_many(f'more than {self._max_bytes} bytes')}")
        return body

    def _locate(self, uri: str, task_id: int | None) -> _Url:
        if not _legible(uri):
            raise Refusal("its address is too long or holds control characters; import the task again")
        if uri.startswith("/") and not uri.startswith("//"):
            path, _, query = uri.partition("#")[0].partition("?")
            return self._at_home(path, query)
        scheme = _SCHEME.match(uri)
        name = scheme[1].lower() if scheme else ""
        if name in _STORAGES:
            if task_id is None:
                raise Refusal("Label Studio resolves storage addresses for a task only, and the request names no task")
            fileuri = base64.urlsafe_b64encode(uri.encode()).decode("ascii")
            return self._at_home(f"/tasks/{int(task_id)}/resolve/", f"fileuri={quote(fileuri)}")
        if name in ("http", "https") and uri[len(name) :].startswith("://"):
            return self._at_host(_read_url(uri), uri)
        raise Refusal(
            f"{_shorten(name, 20) + ':' if name else 'a relative address'} is not an address images come from; use an "
            "upload, a storage of the project (s3, gs, azure-blob), or http(s)"
        )

    def _at_host(self, url: _Url, uri: str) -> _Url:
        if self._own is not None and self._is_own_file(url):
            raw = urlsplit(uri)  # as written, so that what a client would tidy away is seen
            return self._at_home(raw.path or "/", raw.query)
        return url

    def _is_own_file(self, url: _Url) -> bool:
        """Whether this is Label Studio's: its origin, or its files under the name it has on its own machine.

        Label Studio writes its own idea of its host (often localhost) in front of local files. From a container that
        leads nowhere; the path at the configured address is the same file.
        """
        if self._own is None:
            return False
        if url.origin == self._own.origin:
            return True
        at_home = url.host in ("localhost", "127.0.0.1", "::1") and not self._guard.allows(url.host)
        return at_home and url.path.removeprefix(self._prefix).startswith(_UPLOADS)

    def _at_home(self, path: str, query: str) -> _Url:
        """Return a file's address at Label Studio: its path with the sub-path once, however it was written."""
        if self._own is None:
            raise Refusal("LABEL_STUDIO_URL is not set; set it (and LABEL_STUDIO_API_KEY) to read Label Studio's files")
        if _climbs(path) or "\\" in unquote(unquote(path)) or any(_climbs(v) for _, v in parse_qsl(query)):
            raise Refusal("its path steps out of its folder; correct the address in the task")
        inside = path[len(self._prefix) :] if path.startswith(self._prefix + "/") else path
        if not inside.startswith(_SERVED):
            inside = path
        if not inside.startswith(_SERVED):
            raise Refusal(
                f"Label Studio serves task files from {', '.join(_SERVED)} only; "
                "if it is hosted under a sub-path, LABEL_STUDIO_URL must end with it"
            )
        return _read_url(f"{self._own.site}{self._prefix}{inside}" + (f"?{query}" if query else ""))

    def _follow(self, url: _Url, deadline: Deadline) -> bytes:
        """Ask, following redirects; once the way has left Label Studio it is a stranger's to the end."""
        trusted = self._own is not None and url.origin == self._own.origin
        for _ in range(MAX_REDIRECTS + 1):
            answer = _request(
                url,
                deadline=deadline,
                guard=None if trusted else self._guard,
                max_bytes=self._max_bytes,
                authorization=self.auth.header(deadline) if trusted and self.auth else None,
            )
            if answer.status == 200:
                return answer.body
            if answer.status not in _REDIRECTS or not answer.location:
                raise self._explain(answer.status, url, trusted=trusted)
            url, trusted = self._redirected(url, answer.location, trusted=trusted)
        raise Refusal(f"it was redirected more than {MAX_REDIRECTS} times, last to {url.site}; correct the address")

    def _redirected(self, url: _Url, location: str, *, trusted: bool) -> tuple[_Url, bool]:
        if not _legible(location):
            raise Refusal(f"{url.site} redirects to an address that cannot be read; correct the address")
        try:
            there = urljoin(f"{url.site}{url.target}", location)
        except ValueError:
            raise Refusal(f"{url.site} redirects to an address that cannot be read; correct the address") from None
        if not there.lower().startswith(("http://", "https://")):
            raise Refusal(f"{url.site} redirects to something that is not http(s); correct the address")
        target = _read_url(there)
        if not trusted or self._own is None:
            return target, False
        if target.origin == self._own.origin:
            if "/user/login" in target.path:
                raise self._explain(401, url, trusted=True)
            raw = urlsplit(there)
            return self._at_home(raw.path, raw.query), True
        if (target.host, target.path) == (url.host, url.path) and target.scheme != url.scheme:  # the token must not go
            raise Refusal(
                f"Label Studio has moved to {target.scheme}; set LABEL_STUDIO_URL to {target.site}{self._prefix}"
            )
        return target, False

    def _explain(self, status: int, url: _Url, *, trusted: bool) -> Refusal:
        if not trusted:
            hint = "check that the address opens in a browser without logging in"
            if status in (401, 403):
                hint = f"no token is sent to it; if this is Label Studio, set LABEL_STUDIO_URL to {url.site}"
            return Refusal(f"{url.site} answered {status}; {hint}")
        if status == 401:
            if self.auth is not None:
                return self.auth.refused()
            return Refusal("Label Studio answered 401 and LABEL_STUDIO_API_KEY is not set; set it to a token of a user")
        if status in (403, 404):
            what = "the file is not there"
            if "/resolve/" in url.path:
                what = "no storage of the task's project holds it"
            return Refusal(f"Label Studio answered {status}: {what}, or the token's user may not see it; check both")
        if status == 424:
            return Refusal(
                "Label Studio cannot read the file from its storage; check the key and the storage's credentials"
            )
        if status == 500 and "/data/upload/" in url.path:  # 1.23 fails so when it does not know the file
            return Refusal(
                "Label Studio answered 500, as it does for an upload that was deleted; import the file again"
            )
        return Refusal(f"Label Studio answered {status}; try again, and look into its log if that stays")


def make_fetcher(settings: Settings) -> Fetcher:
    """Return the fetcher that the settings describe.

    Raises:
        Refusal: address, token or allow-list cannot be read.
    """
    token = settings.label_studio_api_key
    return Fetcher(
        settings.label_studio_url,
        token.get_secret_value() if token else None,
        max_bytes=settings.image_max_mb * 2**20,
        timeout_s=settings.image_timeout_s,
        allow_hosts=settings.allow_hosts,
    )
