"""Who may ask what: Label Studio by basic auth, its webhooks by a secret in a header, the admin by a login of its own.

Label Studio (1.23) sends the basic auth of a connection with everything but webhooks, which carry the headers they were
given (`python -m ml_backend connect` does that). `/health` is open, and so are the admin's login form and its style
sheet; what anybody asks for besides needs credentials, whether there is such a route or not.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import timedelta

import msgspec
from flask import Blueprint, Flask, Response, current_app, make_response, redirect, render_template, request, session
from flask.sessions import SecureCookieSessionInterface
from werkzeug.datastructures import Authorization
from werkzeug.middleware.proxy_fix import ProxyFix

from ml_backend.credentials import CONNECT, SECRET_HEADER, Secrets, open_secrets
from ml_backend.limits import Limits
from ml_backend.service import BoundedCache, Service
from ml_backend.sessions import EndedSessions, new_id
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

ADMIN = "admin"
"""User of the admin's basic auth."""
OPEN = frozenset({"health", "auth.form", "auth.log_in", "admin.static"})
"""Endpoints that need no credentials."""
SESSION_COOKIE = "graco_admin"
"""Carries the admin's session."""
ADMIN_BODY = 2**20
"""Bytes of a request below /admin at most."""
CSRF_HEADER = "X-CSRF-Token"
"""Carries the token of a form, where its field csrf_token does not."""

_SESSION = timedelta(hours=12)
_TRUSTED = 1000  # addresses remembered for having given what is right
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ADMIN_PATH = re.compile(r"/admin(/[\w./-]*)?(\?[\w.=&%+-]*)?")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"
_ADMIN_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def csrf_token() -> str:
    """Return the token of this browser's session, which each change below /admin has to bring."""
    if "csrf" not in session:
        session["csrf"] = secrets.token_urlsafe(24)
    token: str = session["csrf"]
    return token


class _Sessions(SecureCookieSessionInterface):
    def get_cookie_path(self, app: Flask) -> str:
        return f"{request.script_root}/admin"

    def get_cookie_secure(self, app: Flask) -> bool:
        return request.is_secure


def install(app: Flask, service: Service) -> None:
    """Put every route of an app, also those added later, behind its credentials; limit, and add security headers.

    Raises:
        Refusal: the secrets cannot be read.
        OSError: they cannot be written.
    """
    settings = service.settings
    found = open_secrets(settings)
    guard = _Guard(settings, found)
    app.secret_key = found.session_secret
    app.session_interface = _Sessions()
    app.config |= {
        "SESSION_COOKIE_NAME": SESSION_COOKIE,
        "SESSION_COOKIE_SAMESITE": "Strict",
        "SESSION_COOKIE_HTTPONLY": True,
        "PERMANENT_SESSION_LIFETIME": _SESSION,
    }
    if settings.proxies:
        hops = settings.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops, x_prefix=hops)  # type: ignore[method-assign]
    app.jinja_env.globals["csrf_token"] = csrf_token
    app.register_blueprint(_login_pages(guard))
    app.before_request(guard.check)
    app.after_request(_harden)
    if settings.auth == "off":
        log.warning("GRACO_AUTH=off: whoever reaches port %d may do everything", settings.port)


def _same(given: str | None, wanted: str) -> bool:
    return hmac.compare_digest((given or "").encode(errors="backslashreplace"), wanted.encode())


def is_admins(path: str) -> bool:
    """Whether a path is of the admin's pages."""
    return path == "/admin" or path.startswith("/admin/")


def _address() -> str:
    return request.remote_addr or "local"


def _basic() -> Authorization | None:
    try:
        given = request.authorization
    except ValueError:  # what werkzeug raises of letters that are not ASCII
        return None
    return given if given is not None and given.type == "basic" else None


class _Guard:
    def __init__(self, settings: Settings, known: Secrets) -> None:
        self._on = settings.auth == "on"
        self._secrets = known
        self._limits = Limits(settings)
        self._trusted: BoundedCache[bool] = BoundedCache(_TRUSTED)  # (address, kind) that gave what is right before
        mark = hmac.digest(known.session_secret.encode(), known.admin_password.encode(), hashlib.sha256)
        self._mark = mark.hex()  # of a session opened with today's password
        self._ended = EndedSessions(settings.shared / "sessions", _SESSION.total_seconds())

    def check(self) -> Response | None:
        """Return what to say instead of answering the request; None: it may be answered."""
        if request.endpoint == "health":
            return None
        if wait_s := self._limits.count_request(_address()):
            return _later(wait_s, "too many requests from this address; see GRACO_REQUESTS_PER_MINUTE")
        admins = is_admins(request.path)
        if admins:
            request.max_content_length = ADMIN_BODY
        if self._on and request.endpoint not in OPEN:
            refused = self._refuse_admins() if admins else self._refuse_others()
            if refused is not None:
                return refused
        if admins and request.method not in _SAFE_METHODS:
            given = request.headers.get(CSRF_HEADER) or request.form.get("csrf_token")
            if not ("csrf" in session and _same(given, csrf_token())):
                return say(403, "this form is out of date; go back, reload the page and try again")
        return None

    def log_in(self, password: str) -> Response | None:
        """Open a session, or return why not."""
        kind = ADMIN
        if wait_s := self._limits.locked_s(_address(), kind):
            return _later(wait_s, "too many wrong passwords from this address")
        if self._on and not _same(password, self._secrets.admin_password):
            self._limits.count_failure(_address(), kind)
            log.warning("a login to the admin page from %s failed", _address())
            return _form(401, "That is not the admin's password.")
        session.clear()
        session.permanent = True
        session["admin"] = self._mark
        session["since"] = time.time()
        session["id"] = new_id()
        return None

    def log_out(self) -> None:
        """End the session for whoever has a copy of its cookie, too.

        Raises:
            OSError: that could not be written down; this browser is logged out, copies of the cookie are not.
        """
        try:
            if "id" in session:
                self._ended.end(session["id"])
        finally:
            session.clear()

    def _refuse_admins(self) -> Response | None:
        lasts_s = _SESSION.total_seconds() - (time.time() - session.get("since", 0.0))  # a cookie is renewed
        opened = lasts_s > 0 and "id" in session and _same(session.get("admin"), self._mark)
        if opened and session["id"] not in self._ended:
            return None
        basic = _basic()
        if basic is not None:
            return self._judge(
                ADMIN,
                right=_same(basic.username, ADMIN) & _same(basic.password, self._secrets.admin_password),
                refuse=lambda: _challenge("this needs the admin's password, with the user admin", "GraCo admin"),
            )
        if "text/html" in request.headers.get("Accept", ""):
            answer = _form(401, "")
            answer.headers["WWW-Authenticate"] = 'Form realm="GraCo admin"'  # Basic would bring the browser's own form
            return answer
        return _challenge("this needs the admin's password: log in at /admin/login, or basic auth", "GraCo admin")

    def _refuse_others(self) -> Response | None:
        known, basic, secret = self._secrets, _basic(), request.headers.get(SECRET_HEADER)
        webhook = request.path == "/webhook"
        sentence = (
            "this webhook brings neither our secret nor Label Studio's user and password, so it is not listened to; "
            f"to mend it: {CONNECT} (what was missed: python -m ml_backend reconcile)"
            if webhook
            else f"this needs the user and password of Label Studio's connection; to have them entered: {CONNECT}"
        )
        if webhook and secret is not None:
            right = _same(secret, known.webhook_secret)
            return self._judge("webhook", right=right, refuse=lambda: _challenge(sentence))
        if basic is None:
            return _challenge(sentence)
        if not webhook and basic.username == ADMIN:
            right = _same(basic.password, known.admin_password)
            return self._judge(ADMIN, right=right, refuse=lambda: _challenge(sentence))
        right = _same(basic.username, known.username) & _same(basic.password, known.password)
        return self._judge("label-studio", right=right, refuse=lambda: _challenge(sentence))

    def _judge(self, kind: str, *, right: bool, refuse: Callable[[], Response]) -> Response | None:
        """Count what is wrong, and after many of those refuse what is right too, where nobody gave it before.

        One project with an old password must not shut out the others, which ask from the same address. The admin's
        password has no such exception.
        """
        place = _address(), kind
        trusted = kind != ADMIN and self._trusted.get(place) is not None
        if not trusted and (wait_s := self._limits.locked_s(*place)):
            return _later(wait_s, "too many wrong credentials from this address")
        if right:
            if not trusted:
                self._trusted.put(place, True)
            return None
        self._limits.count_failure(*place)
        return refuse()


def say(status: int, sentence: str) -> Response:
    """Log why a request is declined, and return the answer: a page for a browser on the admin's pages, else JSON."""
    rule = request.url_rule.rule if request.url_rule else "unknown"  # a path may hold anything
    log.warning("%s refused: %s", rule, sentence)
    if is_admins(request.path) and "text/html" in request.headers.get("Accept", ""):
        return Response(render_template("admin/error.html", title="That was not done", said=sentence), status)
    return Response(msgspec.json.encode({"error": sentence}), status, content_type="application/json")


def _challenge(sentence: str, realm: str = "GraCo") -> Response:
    answer = say(401, sentence)
    answer.headers["WWW-Authenticate"] = f'Basic realm="{realm}", charset="UTF-8"'
    return answer


def _later(wait_s: int, sentence: str) -> Response:
    answer = say(429, sentence)
    answer.headers["Retry-After"] = str(wait_s)
    return answer


def _harden(response: Response) -> Response:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Content-Security-Policy", _ADMIN_PAGE if is_admins(request.path) else _NOTHING)
    if request.endpoint != "admin.static":
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _login_pages(guard: _Guard) -> Blueprint:
    pages = Blueprint("auth", __name__, url_prefix="/admin", template_folder="templates")

    @pages.get("/login")
    def form() -> Response:
        return _form(200, "")

    @pages.post("/login")
    def log_in() -> Response:
        refused = guard.log_in(request.form.get("password", ""))
        return refused or _to(_next())

    @pages.post("/logout")
    def log_out() -> Response:
        try:
            guard.log_out()
        except OSError as error:
            log.error("a session of the admin page could not be ended: %s", error)
            return say(
                503,
                "this browser is logged out, but the session could not be ended, since the disk cannot be written: "
                "copies of its cookie stay valid for up to twelve hours; a new admin's password ends them",
            )
        return _to("/admin/login")

    return pages


def _next() -> str:
    """Return the admin's page to go to after the login, never anything elsewhere."""
    wanted = request.form.get("next", "")
    return wanted if _ADMIN_PATH.fullmatch(wanted) else "/admin"


def _to(path: str) -> Response:
    return make_response(redirect(f"{request.script_root}{path}", 303))


def _form(status: int, error: str) -> Response:
    if request.endpoint in ("auth.form", "auth.log_in"):
        wanted = _next()
    else:
        wanted = request.full_path.rstrip("?") if request.method == "GET" else "/admin"
    styled = "admin.static" in current_app.view_functions
    return make_response(render_template("admin/login.html", error=error, next=wanted, styled=styled), status)
