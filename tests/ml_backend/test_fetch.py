import base64
import contextlib
import gzip
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from ml_backend import fetch
from ml_backend.fetch import Deadline, Fetcher, LabelStudioAuth, TooLarge
from model.types import Refusal

TOKEN = "0123456789abcdef0123456789abcdef01234567"
PICTURE = b"\x89PNG pretend"
PUBLIC = "93.184.216.34"


class Server:
    """An HTTP server on 127.0.0.1 that keeps what it was asked; `routes` maps a path to what answers it."""

    def __init__(self, tls=None):
        self.routes = {}
        self.requests = []  # (method, target, headers, body)
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, self.path, dict(self.headers), body))
                answer = outer.routes.get(urlsplit(self.path).path, outer.routes.get("*"))
                with contextlib.suppress(OSError):
                    if callable(answer):
                        answer(self)
                    elif answer is None:
                        send(self, 404)
                    else:
                        send(self, 200, answer)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = False
            block_on_close = True

            def handle_error(self, request, client_address):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def targets(self):
        return [target for _, target, _, _ in self.requests]

    @property
    def tokens(self):
        return [headers.get("Authorization") for _, _, headers, _ in self.requests]


def send(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def redirect(to, status=302):
    return lambda handler: send(handler, status, Location=to)


@pytest.fixture
def servers():
    started = []

    def start(tls=None):
        started.append(Server(tls))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def studio(servers):
    return servers()


@pytest.fixture
def stranger(servers):
    return servers()


def fetcher(url, token=TOKEN, *, max_bytes=10_000, timeout_s=5, allow_hosts=()):
    return Fetcher(url, token, max_bytes=max_bytes, timeout_s=timeout_s, allow_hosts=allow_hosts)


def refusal(call, *args):
    with pytest.raises(Refusal) as caught:
        call(*args)
    return str(caught.value)


def names(monkeypatch, **hosts):
    """Answer host names from a table (dots written as two underscores); a list gives one answer after the other."""
    table = {name.replace("__", "."): addresses for name, addresses in hosts.items()}
    asked = []
    real = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        asked.append(host)
        if host not in table:
            return real(host, port, *args, **kwargs)
        address = table[host].pop(0) if isinstance(table[host], list) else table[host]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        place = (address, port, 0, 0) if ":" in address else (address, port)
        return [(family, socket.SOCK_STREAM, 6, "", place)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


# where things are


@pytest.mark.parametrize("uri", ["/data/upload/1/a%20b.png", "/data/upload/1/a b.png", "{url}/data/upload/1/a b.png"])
def test_an_upload_comes_with_the_token_however_it_is_written(studio, uri):
    studio.routes["/data/upload/1/a%20b.png"] = PICTURE
    assert fetcher(studio.url).fetch(uri.format(url=studio.url), 1) == PICTURE
    assert studio.tokens == [f"Token {TOKEN}"]


def test_a_local_file_keeps_its_query(studio):
    studio.routes["*"] = PICTURE
    for uri in ("/data/local-files/?d=m%C3%A4rz/1.png", f"{studio.url}/data/local-files/?d=märz/1.png"):
        assert fetcher(studio.url).fetch(uri, None) == PICTURE
    assert studio.targets == ["/data/local-files/?d=m%C3%A4rz/1.png"] * 2


def test_a_local_file_under_the_name_label_studio_gives_itself_comes_from_the_configured_address(studio):
    studio.routes["*"] = PICTURE
    fetcher(studio.url).fetch("http://localhost:8080/data/local-files/?d=1.png", None)
    assert studio.targets == ["/data/local-files/?d=1.png"]
    assert "loopback" in refusal(fetcher(studio.url).fetch, "http://localhost:8080/api/users", None)


@pytest.mark.parametrize("uri", ["/data/upload/x", "/label-studio/data/upload/x", "{site}/label-studio/data/upload/x"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_sub_path_is_neither_doubled_nor_lost(studio, uri, slash):
    studio.routes["*"] = PICTURE
    fetcher(f"{studio.url}/label-studio{slash}").fetch(uri.format(site=studio.url), 1)
    assert studio.targets == ["/label-studio/data/upload/x"]


def test_a_sub_path_called_data_is_not_taken_for_the_files(studio):
    studio.routes["*"] = PICTURE
    for uri in ("/data/upload/x", "/data/data/upload/x"):
        fetcher(f"{studio.url}/data").fetch(uri, 1)
    assert studio.targets == ["/data/data/upload/x"] * 2


def test_a_sub_path_that_is_not_configured_is_refused_with_advice(studio):
    text = refusal(fetcher(studio.url).fetch, "/label-studio/data/upload/x", 1)
    assert "LABEL_STUDIO_URL must end with it" in text
    assert not studio.requests


@pytest.mark.parametrize("uri", ["s3://b/ä k.png", "s3s://b/k", "gs://b/k.png", "azure-blob://c/k.png"])
def test_storage_addresses_are_resolved_by_label_studio(studio, stranger, uri):
    studio.routes["/tasks/7/resolve/"] = redirect(f"{stranger.url}/k?X-Amz-Signature=s3cret", 303)
    stranger.routes["/k"] = PICTURE
    assert fetcher(studio.url, allow_hosts=["127.0.0.1"]).fetch(uri, 7) == PICTURE
    asked = parse_qs(urlsplit(studio.targets[0]).query)["fileuri"][0]
    assert base64.urlsafe_b64decode(asked).decode() == uri
    assert studio.tokens == [f"Token {TOKEN}"]
    assert stranger.tokens == [None]
    assert stranger.targets == ["/k?X-Amz-Signature=s3cret"]


def test_a_storage_address_needs_a_task_and_a_label_studio(studio):
    assert "names no task" in refusal(fetcher(studio.url).fetch, "s3://b/k", None)
    assert "LABEL_STUDIO_URL is not set" in refusal(fetcher(None).fetch, "s3://b/k", 7)
    assert "LABEL_STUDIO_URL is not set" in refusal(fetcher(None, None).fetch, "/data/upload/x", 7)


def test_an_address_already_resolved_is_asked_for_as_it_is(studio):
    studio.routes["*"] = PICTURE
    fetcher(studio.url).fetch("/tasks/7/resolve/?fileuri=czM6Ly9iL2s%3D", 7)
    assert studio.targets == ["/tasks/7/resolve/?fileuri=czM6Ly9iL2s%3D"]


def test_elsewhere_there_is_no_token(studio, stranger):
    stranger.routes["/a.png"] = PICTURE
    allowed = fetcher(studio.url, allow_hosts=["127.0.0.1"])
    assert allowed.fetch(f"{stranger.url}/a.png?sig=1#part", 1) == PICTURE
    assert stranger.tokens == [None]
    assert stranger.targets == ["/a.png?sig=1"]
    assert not studio.requests


def test_another_port_or_scheme_is_another_host(studio, stranger):
    stranger.routes["*"] = PICTURE
    own = Fetcher(f"{studio.url}", TOKEN, max_bytes=99, timeout_s=5, allow_hosts=["127.0.0.1"])
    own.fetch(f"{stranger.url}/data/upload/x", 1)
    assert stranger.tokens == [None]
    assert "TLS" in refusal(own.fetch, studio.url.replace("http", "https") + "/data/upload/x", 1)


@pytest.mark.parametrize("spelling", ["HTTP://LS.test:{port}", "http://ls.test.:{port}", "http://LS.Test:{port}/"])
def test_the_origin_is_compared_after_normalisation(studio, monkeypatch, spelling):
    names(monkeypatch, ls__test="127.0.0.1")
    studio.routes["*"] = PICTURE
    own = fetcher(spelling.format(port=studio.port))
    assert own.fetch(f"http://ls.test:{studio.port}/data/upload/x", 1) == PICTURE
    assert studio.tokens == [f"Token {TOKEN}"]


def test_data_urls_are_decoded_without_a_request():
    data = base64.b64encode(PICTURE).decode()
    plain = fetcher(None, None)
    assert plain.fetch(f"data:image/png;base64,{data}", None) == PICTURE
    assert plain.fetch(f"DATA:image/svg+xml;charset=utf-8;base64,{data.replace('=', '%3D')}", 3) == PICTURE


def test_a_data_url_is_measured_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *a, **k: pytest.fail("decoded"))
    text = refusal(fetcher(None, max_bytes=1000).fetch, "data:image/png;base64," + "A" * 2000, None)
    assert "GRACO_IMAGE_MAX_MB" in text


@pytest.mark.parametrize(
    "uri", ["data:text/html;base64,PGI+", "data:image/png,raw", "data:", "data:image/png;base64,@@@@", "data:image/png"]
)
def test_other_data_urls_are_refused(uri):
    assert "data: URL" in refusal(fetcher(None).fetch, uri, None)


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "gopher://h/1",
        "ftp://h/x",
        "javascript:alert(1)",
        "blob:http://h/1",
        "C:\\x.png",
        "http:/h/x",
        "http:h",
        "//evil.example/x",
        "x.png",
        "",
        " ",
        "dict://h:1/",
        "jar:http://h!/x",
        "unix:///x",
    ],
)
def test_other_schemes_are_refused(studio, uri):
    assert "is not an address images come from" in refusal(fetcher(studio.url, allow_hosts=["0.0.0.0/0"]).fetch, uri, 1)
    assert not studio.requests


@pytest.mark.parametrize(
    "path",
    [
        "/data/../api/users",
        "/data/upload/%2e%2e/%2E%2e/api/users",
        "/data/upload/.%2e/x",
        "/data/%252e%252e/api",
        "/data/%25252e%25252e/api",
        "/data/%2525252525252e%2525252525252e/api",
        "/data/..\\..\\api",
        "/data/upload/%5c..%5cx",
        "/data\\upload\\x",
        "/data/upload/..",
        "/data/local-files/?d=../../etc/passwd",
        "/data/local-files/?d=%2e%2e/%2e%2e/etc/passwd",
        "/data/local-files/?d=a/..%5c..%5cetc",
        "/data/local-files/?d=..%252f..%252fetc",
        "/data/upload/x%00.png",
        "/api/users",
        "/tasks",
        "/user/account?next=/data/",
        "/",
        "/datax/1",
    ],
)
def test_steps_out_of_the_files_are_refused(studio, path):
    for uri in (path, studio.url + path):
        refusal(fetcher(studio.url).fetch, uri, 1)
        refusal(fetcher(f"{studio.url}/label-studio").fetch, uri, 1)
    assert not studio.requests


def test_dots_inside_a_name_are_no_step(studio):
    studio.routes["*"] = PICTURE
    assert fetcher(studio.url).fetch("/data/upload/1/a..b...png", 1) == PICTURE


@pytest.mark.parametrize(
    "uri", ["/data/upload/a\r\nX: y", "http://h/\n", "/data/\ud800", "/data/upload/" + "a" * 20_000]
)
def test_control_characters_halves_and_endless_addresses_are_refused(studio, uri):
    refusal(fetcher(studio.url).fetch, f"{uri}x", 1)
    assert not studio.requests


# the guard


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.0.0.5",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[2002:7f00:1::]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2001:0:1::1]",
        "[2001:db8::1]",
        "localhost",
        "LOCALHOST.",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "127.0.1",
        "0",
        "017700000001",
        "127.0.0.1.",
        "①②⑦.0.0.1",
        "1２7.0.0.1",
        "127。0。0。1",
    ],
)
def test_addresses_inside_are_refused_without_a_connection(monkeypatch, host):
    monkeypatch.setattr(fetch, "_dial", lambda *a: pytest.fail("connected"))
    text = refusal(fetcher(None).fetch, f"http://{host}/x?sig=s3cret", 1)
    assert "s3cret" not in text


@pytest.mark.parametrize("host", [PUBLIC, "8.8.8.8", "[2606:4700:4700::1111]"])
def test_public_addresses_are_connected_to(monkeypatch, host):
    dialled = []

    def dial(family, address, limit_s):
        dialled.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(fetch, "_dial", dial)
    assert "Connection refused" in refusal(fetcher(None).fetch, f"http://{host}/x", 1)
    assert dialled == [host.strip("[]")]


@pytest.mark.parametrize("url", ["http://u:p@h/", "http://127.0.0.1@evil/", "http://a b/", "http://a%2eb/", "http://h:99999/",
                                 "http://[::1/", "http://h\\@evil/", "http:///x", "http://[fe80::1%25eth0]/", "http://-a/",
                                 "http://h:x/", "https://", "http://.../", "http://ho*st/"])  # fmt: skip
def test_hosts_that_read_two_ways_are_refused(monkeypatch, url):
    monkeypatch.setattr(fetch, "_resolve", lambda *a: pytest.fail("resolved"))
    refusal(fetcher(None, allow_hosts=["0.0.0.0/0"]).fetch, url, 1)


def test_a_name_that_leads_inside_is_refused_and_told_how_to_open(studio, monkeypatch):
    names(monkeypatch, nas__local="10.0.0.5")
    text = refusal(fetcher(studio.url).fetch, "http://nas.local/a.png?sig=s3cret", 1)
    assert "nas.local is at 10.0.0.5, which is private; add nas.local to GRACO_ALLOW_HOSTS" in text
    assert "s3cret" not in text


@pytest.mark.parametrize("entry", ["nas.test", "NAS.test.", "127.0.0.1", "127.0.0.0/8", "127.0.0.1/8"])
def test_allowed_hosts_addresses_and_networks_are_open(stranger, monkeypatch, entry):
    names(monkeypatch, nas__test="127.0.0.1")
    stranger.routes["*"] = PICTURE
    url = f"http://nas.test:{stranger.port}/a"
    assert fetcher(None, allow_hosts=[entry]).fetch(url, 1) == PICTURE
    assert "loopback" in refusal(fetcher(None, allow_hosts=["10.0.0.0/8", "other.test"]).fetch, url, 1)


def test_an_allow_list_that_cannot_be_read_stops_the_start():
    assert "GRACO_ALLOW_HOSTS" in refusal(lambda: fetcher(None, allow_hosts=["http://nas/"]))


def test_a_name_that_changes_its_address_is_not_followed_inside(stranger, monkeypatch):
    """The first answer is public, any later one is not: what was checked is what is connected to."""
    asked = names(monkeypatch, rebind__test=[PUBLIC, "127.0.0.1", "127.0.0.1"])
    dialled = []
    real = fetch._dial

    def dial(family, address, limit_s):
        dialled.append(address[0])
        return real(family, ("127.0.0.1", *address[1:]) if address[0] == PUBLIC else address, limit_s)

    monkeypatch.setattr(fetch, "_dial", dial)
    stranger.routes["/a"] = PICTURE
    stranger.routes["/again"] = redirect("/a")
    own = fetcher(None)
    assert own.fetch(f"http://rebind.test:{stranger.port}/a", 1) == PICTURE
    assert (asked, dialled) == (["rebind.test"], [PUBLIC])
    assert "loopback" in refusal(own.fetch, f"http://rebind.test:{stranger.port}/a", 1)
    names(monkeypatch, rebind__test=[PUBLIC, "127.0.0.1"])
    assert "loopback" in refusal(own.fetch, f"http://rebind.test:{stranger.port}/again", 1)
    assert stranger.targets == ["/a", "/again"]


def test_a_redirect_to_an_address_inside_is_refused(stranger, servers, monkeypatch):
    inside = servers()
    inside.routes["*"] = PICTURE
    names(monkeypatch, open__test="127.0.0.1")
    stranger.routes["/a"] = redirect(f"{inside.url}/secret?k=s3cret")
    text = refusal(fetcher(None, allow_hosts=["open.test"]).fetch, f"http://open.test:{stranger.port}/a", 1)
    assert "address 127.0.0.1 is loopback" in text
    assert "s3cret" not in text
    assert not inside.requests


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "gopher://h/", "http://2130706433/", "http://u@h/", "http://[", "\x01"]
)
def test_a_redirect_to_an_odd_address_is_refused(stranger, to):
    stranger.routes["/a"] = redirect(to)
    refusal(fetcher(None, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/a", 1)
    assert len(stranger.requests) == 1


def test_redirects_are_counted(stranger):
    for n in range(9):
        stranger.routes[f"/{n}"] = redirect(f"/{n + 1}", (301, 302, 303, 307, 308)[n % 5])
    stranger.routes["/9"] = PICTURE
    own = fetcher(None, allow_hosts=["127.0.0.1"])
    assert own.fetch(f"{stranger.url}/4", 1) == PICTURE
    assert "redirected more than 5 times" in refusal(own.fetch, f"{stranger.url}/3", 1)


def test_the_proxy_of_the_environment_is_ignored(studio, stranger, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, stranger.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    studio.routes["*"] = PICTURE
    assert fetcher(studio.url).fetch("/data/upload/x", 1) == PICTURE
    assert not stranger.requests


# the token


def test_the_token_does_not_follow_a_redirect(studio, stranger):
    studio.routes["/data/upload/x"] = redirect(f"{stranger.url}/data/upload/x?sig=1")
    stranger.routes["*"] = PICTURE
    assert fetcher(studio.url, allow_hosts=["127.0.0.1"]).fetch("/data/upload/x", 1) == PICTURE
    assert studio.tokens == [f"Token {TOKEN}"]
    assert stranger.tokens == [None]


def test_a_redirect_within_label_studio_keeps_the_token(studio):
    studio.routes["/data/upload/x"] = redirect("/storage-data/uploaded/?filepath=x")
    studio.routes["/storage-data/uploaded/"] = PICTURE
    assert fetcher(studio.url).fetch("/data/upload/x", 1) == PICTURE
    assert studio.tokens == [f"Token {TOKEN}"] * 2


def test_a_redirect_within_label_studio_does_not_leave_the_files(studio):
    studio.routes["/data/upload/x"] = redirect("/api/users")
    refusal(fetcher(studio.url).fetch, "/data/upload/x", 1)
    assert studio.targets == ["/data/upload/x"]


def test_a_strangers_redirect_to_label_studio_gains_nothing(studio, stranger, monkeypatch):
    names(monkeypatch, open__test="127.0.0.1")
    studio.routes["*"] = PICTURE
    stranger.routes["/a"] = redirect(f"{studio.url}/data/upload/x")
    url = f"http://open.test:{stranger.port}/a"
    assert "loopback" in refusal(fetcher(studio.url, allow_hosts=["open.test"]).fetch, url, 1)
    assert not studio.requests
    fetcher(studio.url, allow_hosts=["127.0.0.1"]).fetch(url, 1)
    assert studio.tokens == [None]


def test_a_way_out_and_back_loses_the_token(studio, stranger):
    studio.routes["/data/upload/x"] = redirect(f"{stranger.url}/back")
    studio.routes["/data/upload/y"] = PICTURE
    stranger.routes["/back"] = redirect(f"{studio.url}/data/upload/y")
    fetcher(studio.url, allow_hosts=["127.0.0.1"]).fetch("/data/upload/x", 1)
    assert studio.tokens == [f"Token {TOKEN}", None]
    assert stranger.tokens == [None]


def test_label_studio_moving_to_https_is_named(studio):
    there = studio.url.replace("http:", "https:")
    studio.routes["*"] = redirect(f"{there}/data/upload/x", 301)
    text = refusal(fetcher(studio.url).fetch, "/data/upload/x", 1)
    assert f"set LABEL_STUDIO_URL to {there}" in text


def test_being_sent_to_log_in_is_a_401(studio):
    studio.routes["*"] = redirect("/user/login/?next=/data/upload/x")
    assert "401 to a legacy token" in refusal(fetcher(studio.url).fetch, "/data/upload/x", 1)


@pytest.mark.parametrize(
    ("status", "path", "says"),
    [
        (401, "/data/upload/x", "401 to a legacy token; .*legacy tokens are off for the organisation"),
        (403, "/data/upload/x", "may not see it"),
        (404, "/data/upload/x", "not there"),
        (404, "/tasks/1/resolve/?fileuri=x", "no storage of the task's project"),
        (424, "/tasks/1/resolve/?fileuri=x", "storage's credentials"),
        (500, "/data/upload/x", "deleted"),
        (502, "/data/upload/x", "502; try again"),
        (304, "/data/upload/x", "304"),
        (206, "/data/upload/x", "206"),
    ],
)
def test_what_label_studio_answers_is_explained(studio, status, path, says):
    studio.routes["*"] = lambda handler: send(handler, status)
    with pytest.raises(Refusal, match=says):
        fetcher(studio.url).fetch(path, 1)


def test_a_missing_token_is_named(studio):
    studio.routes["*"] = lambda handler: send(handler, 401)
    for token in (None, "", " "):
        assert "LABEL_STUDIO_API_KEY is not set" in refusal(fetcher(studio.url, token).fetch, "/data/upload/x", 1)
    assert studio.tokens == [None] * 3


def test_a_label_studio_under_another_name_is_recognised_by_its_401(studio, stranger):
    stranger.routes["*"] = lambda handler: send(handler, 401)
    text = refusal(fetcher(studio.url, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/data/x", 1)
    assert f"set LABEL_STUDIO_URL to {stranger.url}" in text


def test_a_token_with_odd_characters_is_refused_without_being_shown(studio):
    text = refusal(lambda: fetcher(studio.url, "s3cret\nX-Evil: 1"))
    assert "LABEL_STUDIO_API_KEY" in text
    assert "s3cret" not in text


def jwt(**claims):
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{body}.c2lnbmF0dXJl"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class TokenStudio:
    """A Label Studio that exchanges one personal access token; its own clock is far from ours."""

    def __init__(self, server, lifetime_s=300, delay_s=0.0):
        self.pat = jwt(token_type="refresh", exp=9e9)
        self.server = server
        self.given = []

        def refresh(handler):
            time.sleep(delay_s)
            if json.loads(server.requests[-1][3]) != {"refresh": self.pat}:
                return send(handler, 401, b'{"detail": "Token is invalid"}')
            self.given.append(jwt(token_type="access", iat=5, exp=5 + lifetime_s, n=len(self.given)))
            return send(handler, 200, json.dumps({"access": self.given[-1]}).encode())

        def upload(handler):
            known = self.given and handler.headers.get("Authorization") == f"Bearer {self.given[-1]}"
            return send(handler, 200 if known else 401, PICTURE if known else b"")

        server.routes["/ls/api/token/refresh"] = refresh
        server.routes["/ls/data/upload/x"] = upload
        self.url = f"{server.url}/ls"


def test_a_personal_access_token_is_exchanged_and_renewed_before_its_end(studio):
    tokens, clock = TokenStudio(studio), Clock()
    own = fetcher(tokens.url, tokens.pat)
    own.auth = LabelStudioAuth(tokens.url, tokens.pat, clock=clock)
    assert own.auth.kind == "personal access"
    for now, exchanged in ((1000, 1), (1200, 1), (1269, 1), (1270.5, 2), (1540, 2), (1541, 3)):
        clock.now = now
        assert own.fetch("/data/upload/x", 1) == PICTURE
        assert len(tokens.given) == exchanged
    assert all(tokens.pat not in str(headers) for _, _, headers, _ in studio.requests)


def test_many_threads_exchange_once(studio):
    tokens = TokenStudio(studio, delay_s=0.1)
    auth = LabelStudioAuth(tokens.url, tokens.pat)
    headers = []
    threads = [threading.Thread(target=lambda: headers.append(auth.header(Deadline(5)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert headers == [f"Bearer {tokens.given[0]}"] * 8
    assert len(tokens.given) == 1


def test_waiting_for_anothers_exchange_ends_at_the_deadline(studio):
    tokens = TokenStudio(studio, delay_s=0.6)
    auth = LabelStudioAuth(tokens.url, tokens.pat)
    thread = threading.Thread(target=lambda: auth.header(Deadline(5)))
    thread.start()
    time.sleep(0.1)
    with pytest.raises(TimeoutError):
        auth.header(Deadline(0.1))
    thread.join()


def test_a_revoked_personal_access_token_is_named(studio):
    tokens = TokenStudio(studio)
    text = refusal(fetcher(tokens.url, jwt(other=1)).fetch, "/data/upload/x", 1)
    assert "does not exchange the personal access token" in text


def test_a_401_after_the_exchange_forgets_what_was_exchanged(studio):
    tokens = TokenStudio(studio)
    own = fetcher(tokens.url, tokens.pat)
    own.fetch("/data/upload/x", 1)
    tokens.given.append("all others are void")
    assert "401 to a personal access token" in refusal(own.fetch, "/data/upload/x", 1)
    assert own.fetch("/data/upload/x", 1) == PICTURE


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"access": 1}', b'{"access": "a\\nb"}', b"<html>"])
def test_an_exchange_that_gives_no_token_is_refused(studio, answer):
    studio.routes["/api/token/refresh"] = answer
    assert "no access token" in refusal(fetcher(studio.url, jwt()).fetch, "/data/upload/x", 1)


def test_an_access_token_that_says_nothing_of_its_end_is_used_for_a_while(studio):
    studio.routes["/api/token/refresh"] = b'{"access": "opaque"}'
    auth, clock = LabelStudioAuth(studio.url, jwt(), clock=(clock := Clock())), clock
    for now in (1000, 1029, 1031):
        clock.now = now
        assert auth.header(Deadline(5)) == "Bearer opaque"
    assert len(studio.requests) == 2


def test_nothing_secret_is_logged_or_said(studio, stranger, caplog):
    caplog.set_level(logging.DEBUG)
    tokens = TokenStudio(studio)
    own = fetcher(tokens.url, tokens.pat, allow_hosts=["127.0.0.1"])
    own.fetch("/data/upload/x", 1)
    stranger.routes["/a"] = PICTURE
    own.fetch(f"{stranger.url}/a?sig=s3cret", 1)
    said = [refusal(own.fetch, f"{stranger.url}/missing?sig=s3cret", 1)]
    said += [refusal(own.fetch, f"http://user:s3cret@127.0.0.1:{stranger.port}/missing", 1)]
    said += [refusal(fetcher(studio.url, TOKEN).fetch, "/data/upload/x?sig=s3cret", 1)]
    for secret in ("s3cret", TOKEN, tokens.pat, *tokens.given):
        assert secret not in caplog.text
        assert not any(secret in text for text in said)
    assert "/data/upload/x" in caplog.text


# time and bytes


def elapsed(call):
    start = time.perf_counter()
    text = refusal(call)
    return time.perf_counter() - start, text


def test_a_body_that_drips_is_cut_off(stranger):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not stranger.stop.wait(0.05):
            handler.wfile.write(b"x")

    stranger.routes["*"] = drip
    own = fetcher(None, timeout_s=0.5, allow_hosts=["127.0.0.1"])
    took, text = elapsed(lambda: own.fetch(f"{stranger.url}/a", 1))
    assert 0.4 < took < 1.5
    assert "longer than 0.5 s in all" in text
    assert "GRACO_IMAGE_TIMEOUT_S" in text


def test_headers_that_drip_are_cut_off(stranger):
    def drip(handler):
        while not stranger.stop.wait(0.05):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" if not handler.__dict__.setdefault("n", 0) else b"X: y\r\n")
            handler.n = 1

    stranger.routes["*"] = drip
    own = fetcher(None, timeout_s=0.5, allow_hosts=["127.0.0.1"])
    took, text = elapsed(lambda: own.fetch(f"{stranger.url}/a", 1))
    assert took < 1.5
    assert "longer than" in text


def test_all_redirects_share_one_deadline(stranger):
    def slow(handler):
        time.sleep(0.2)
        send(handler, 302, Location="/more")

    stranger.routes["*"] = slow
    own = fetcher(None, timeout_s=0.5, allow_hosts=["127.0.0.1"])
    took, text = elapsed(lambda: own.fetch(f"{stranger.url}/a", 1))
    assert took < 1.5
    assert "longer than" in text


def test_names_that_never_resolve_are_cut_off(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: done.wait(5) and [])
    took, text = elapsed(lambda: fetcher(None, timeout_s=0.3).fetch("http://slow.test/a", 1))
    done.set()
    assert took < 1.5
    assert "longer than" in text


def test_a_server_that_accepts_and_says_nothing_is_cut_off():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        took, text = elapsed(lambda: fetcher(url, timeout_s=0.3).fetch("/data/upload/x", 1))
        secure = url.replace("http", "https")
        took_tls, _ = elapsed(lambda: fetcher(secure, timeout_s=0.3).fetch("/data/upload/x", 1))
    assert max(took, took_tls) < 1.5
    assert "longer than" in text


def test_an_endless_body_is_cut_off(stranger):
    sent = []

    def pour(handler):
        handler.send_response(200)
        handler.end_headers()
        while not stranger.stop.is_set():
            sent.append(handler.wfile.write(bytes(65536)))

    stranger.routes["*"] = pour
    own = fetcher(None, max_bytes=1_000_000, allow_hosts=["127.0.0.1"])
    assert "more than 1000000 bytes" in refusal(own.fetch, f"{stranger.url}/a", 1)


def test_an_endless_chunked_body_is_cut_off(stranger):
    def pour(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not stranger.stop.is_set():
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")

    stranger.routes["*"] = pour
    assert "bytes" in refusal(fetcher(None, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/a", 1)


def test_endless_headers_are_cut_off(stranger):
    def pour(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not stranger.stop.is_set():
            handler.wfile.write(b"X: " + b"y" * 4096 + b"\r\n")

    stranger.routes["*"] = pour
    assert "HTTP" in refusal(fetcher(None, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/a", 1)


def test_a_length_that_is_too_large_is_refused_before_the_body(stranger):
    waiting = []

    def promise(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "999999999")
        handler.end_headers()
        waiting.append(stranger.stop.wait(2))

    stranger.routes["*"] = promise
    took, text = elapsed(lambda: fetcher(None, allow_hosts=["127.0.0.1"]).fetch(f"{stranger.url}/a", 1))
    assert took < 1
    assert "999999999 bytes, more than 10000; make it smaller or raise GRACO_IMAGE_MAX_MB" in text


@pytest.mark.parametrize("body", [b"x" * 10_000, b"", b"x"])
def test_a_body_up_to_the_limit_is_whole(stranger, body):
    stranger.routes["*"] = body
    assert fetcher(None, allow_hosts=["127.0.0.1"]).fetch(f"{stranger.url}/a", 1) == body


def test_a_body_that_breaks_off_is_refused(stranger):
    stranger.routes["*"] = lambda handler: send(handler, 200, b"half", Content_Length="100")
    assert "broke off" in refusal(fetcher(None, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/a", 1)


def test_compressed_bodies_are_neither_asked_for_nor_taken(stranger):
    stranger.routes["/gzip"] = lambda h: send(h, 200, gzip.compress(bytes(10**6)), Content_Encoding="gzip")
    stranger.routes["/plain"] = lambda h: send(h, 200, PICTURE, Content_Encoding="aws-chunked")
    own = fetcher(None, allow_hosts=["127.0.0.1"])
    assert "compressed" in refusal(own.fetch, f"{stranger.url}/gzip", 1)
    assert own.fetch(f"{stranger.url}/plain", 1) == PICTURE
    assert {headers["Accept-Encoding"] for _, _, headers, _ in stranger.requests} == {"identity"}


@pytest.mark.parametrize(
    "answer", [b"", b"\x16\x03\x01", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"]
)
def test_what_is_no_http_is_refused(stranger, answer):
    stranger.routes["*"] = lambda handler: handler.wfile.write(answer)
    refusal(fetcher(None, allow_hosts=["127.0.0.1"]).fetch, f"{stranger.url}/a", 1)


def test_a_server_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    text = refusal(fetcher(url).fetch, "/data/upload/x", 1)
    assert f"{url} cannot be connected to" in text
    assert "container" in text


def test_the_second_address_of_a_name_is_tried(studio, monkeypatch):
    studio.routes["*"] = PICTURE
    places = [(socket.AF_INET6, ("::1", 1, 0, 0)), (socket.AF_INET, ("127.0.0.1", studio.port))]
    found = [(family, socket.SOCK_STREAM, 6, "", place) for family, place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    assert fetcher(f"http://ls.test:{studio.port}").fetch("/data/upload/x", 1) == PICTURE


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://h", "http://u:s3cret@h", "http://2130706433"])
def test_a_label_studio_url_that_cannot_be_read_stops_the_start(url):
    text = refusal(lambda: fetcher(url))
    assert "LABEL_STUDIO_URL" in text
    assert "s3cret" not in text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    try:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2", "-subj", "/CN=img.test"),
                *("-addext", "subjectAltName=DNS:img.test"),
            ],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return folder


def test_tls_checks_the_name_that_was_asked_for(servers, monkeypatch, certificate):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server = servers(tls)
    server.routes["*"] = PICTURE
    names(monkeypatch, img__test="127.0.0.1", other__test="127.0.0.1")
    own = fetcher(None, allow_hosts=["127.0.0.1"])
    good, bad = (f"https://{name}.test:{server.port}/a" for name in ("img", "other"))
    assert "is not trusted" in refusal(own.fetch, good, 1)
    trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
    monkeypatch.setattr(fetch, "_tls", lambda: trusting)
    assert own.fetch(good, 1) == PICTURE
    assert "is not trusted" in refusal(own.fetch, bad, 1)


def test_what_the_api_says_has_a_limit_of_its_own_and_a_sentence_about_no_image(studio, monkeypatch):
    studio.routes["*"] = b"x" * 5000
    asked = fetcher(studio.url, max_bytes=99)
    assert len(asked.ask("/api/tasks").body) == 5000
    monkeypatch.setattr("ml_backend.fetch._MAX_API_ANSWER", 4000)
    with pytest.raises(TooLarge, match="answer to /api/tasks has more than"):
        asked.ask("/api/tasks?page=1")
