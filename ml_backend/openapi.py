"""An OpenAPI 3.1 description of our routes, made from the app: its rules, and the Structs that bodies are read by.

So a route cannot be missing from it, and a body is described as it is read. What a route is for stands in `_ABOUT`,
else in the first line of its function's docstring, else its name has to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from werkzeug.routing import Map, Rule

from ml_backend.auth import CSRF_HEADER, SESSION_COOKIE
from ml_backend.credentials import SECRET_HEADER

Document = dict[str, Any]

_ABOUT = {
    "/": "What this is, the version that answers, and its routes",
    "/health": "Whether it lives; with ready=1, whether it is ready for clicks and corrections",
    "/setup": "Label Studio connects: take a project's labelling configuration, return the version that answers",
    "/predict": "Answer clicks (params.context), or a batch of tasks",
    "/webhook": "Take an event of Label Studio, and keep it until it is acted on",
    "/train": "Ask for a training, as servers before 1.8 do",
    "/versions": "The versions that may answer a project",
    "/metrics": "Figures for Prometheus",
    "/openapi.json": "This description",
    "/admin/login": "The admin's login form; with the right password it opens a session",
    "/admin/logout": "End the admin's session, for whoever has a copy of its cookie, too",
}
_QUERY: dict[str, Document] = {
    "/health": {"ready": {"type": "string", "enum": ["1", "model"]}},
    "/versions": {"project": {"type": "string"}},
}
_TEXT = {"/metrics": "text/plain"}
_CREATED = ("/webhook", "/train")
_OPEN = ("/health", "/admin/login")
_SCHEMES: Document = {
    "basic": {"type": "http", "scheme": "basic", "description": "Label Studio's user and password, or the admin's"},
    "webhook": {"type": "apiKey", "in": "header", "name": SECRET_HEADER, "description": "of Label Studio's webhooks"},
    "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIE, "description": "begun by the login form"},
    "form": {"type": "apiKey", "in": "header", "name": CSRF_HEADER, "description": "or the field csrf_token of a form"},
}
_LOGIN: Document = {
    "type": "object",
    "properties": {
        "password": {"type": "string", "format": "password"},
        "csrf_token": {"type": "string", "description": "as the form has it"},
        "next": {"type": "string", "description": "the admin's page to go to"},
    },
    "required": ["password"],
}
_PLACE = re.compile(r"<(?:(?P<kind>[a-z]+)(?:\([^)]*\))?:)?(?P<name>\w+)>")
_KINDS = {"int": {"type": "integer", "minimum": 0}, "float": {"type": "number"}}
_PROBLEM = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "a sentence for a person"}},
    "required": ["error"],
}


def describe(rules: Map, views: Mapping[str, Callable[..., Any]], bodies: Mapping[str, type]) -> Document:
    """Return the description as JSON.

    Args:
        rules: the app's routes.
        views: its functions, by endpoint.
        bodies: what the body of a POST is read as, by route.
    """
    schemas, components = msgspec.json.schema_components(
        list(bodies.values()), ref_template="#/components/schemas/{name}"
    )
    read_as = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, Document] = {}
    for rule in rules.iter_rules():
        if rule.endpoint.endswith("static"):
            continue
        path = _PLACE.sub(r"{\g<name>}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            operation = _operation(rule, method, views[rule.endpoint], read_as.get(rule.rule))
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "GraCo for Label Studio",
            "version": "1",
            "description": "Clicks and a level in, a mask out; and what Label Studio reports",
        },
        "security": [{"basic": []}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Problem": _PROBLEM},
            "securitySchemes": _SCHEMES,
        },
    }


def _operation(rule: Rule, method: str, view: Callable[..., Any], body: Document | None) -> Document:
    docstring = (view.__doc__ or "").strip()
    said = _ABOUT.get(rule.rule) or docstring.split("\n")[0] or re.sub(r"[._]", " ", rule.endpoint)
    answer: Document = {_media(rule): {"schema": {}}}
    problem = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    operation: Document = {
        "operationId": f"{method.lower()}_{re.sub(r'[^A-Za-z0-9]+', '_', rule.endpoint)}",
        "summary": said,
        "responses": {
            _status(rule.rule, method): {"description": "done", "content": answer},
            "4XX": {"description": "declined, with a sentence on what to do", **problem},
            "5XX": {"description": "an error of our own, with the id under which the log has it", **problem},
        },
    }
    parameters = [
        {"name": place["name"], "in": "path", "required": True, "schema": _KINDS.get(place["kind"], {"type": "string"})}
        for place in _PLACE.finditer(rule.rule)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in _QUERY.get(rule.rule, {}).items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if body is not None and method == "POST":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if rule.rule == "/admin/login" and method == "POST":
        form = {"application/x-www-form-urlencoded": {"schema": _LOGIN}}
        operation["requestBody"] = {"required": True, "content": form}
    if rule.rule == "/health":
        operation["responses"]["503"] = {"description": "not ready, with the reasons", "content": answer}
    if (needs := _needs(rule.rule, method)) is not None:
        operation["security"] = needs
    return operation


def _needs(route: str, method: str) -> list[dict[str, list[str]]] | None:
    """Return what opens a route, each of the list by itself; None: what opens all that are not named here."""
    of_form: dict[str, list[str]] = {"form": []} if method != "GET" else {}
    if route in _OPEN:
        return [{"session": [], **of_form}] if of_form else []
    if route == "/webhook":
        return [{"webhook": []}, {"basic": []}]
    if route.startswith("/admin"):
        return [{"session": [], **of_form}, {"basic": [], **of_form}]
    return None


def _status(route: str, method: str) -> str:
    if method != "GET" and route.startswith("/admin"):
        return "303"
    return "201" if route in _CREATED else "200"


def _media(rule: Rule) -> str:
    return _TEXT.get(rule.rule) or ("text/html" if rule.rule.startswith("/admin") else "application/json")
