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
}
_QUERY: dict[str, Document] = {
    "/health": {"ready": {"type": "string", "enum": ["1", "model"]}},
    "/versions": {"project": {"type": "string"}},
}
_TEXT = {"/metrics": "text/plain"}
_CREATED = ("/webhook", "/train")
_OPEN = ("/health",)
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
            "securitySchemes": {"basic": {"type": "http", "scheme": "basic"}},
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
            "201" if rule.rule in _CREATED else "200": {"description": "done", "content": answer},
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
    if rule.rule in _OPEN:
        operation["security"] = []
        operation["responses"]["503"] = {"description": "not ready, with the reasons", "content": answer}
    return operation


def _media(rule: Rule) -> str:
    return _TEXT.get(rule.rule) or ("text/html" if rule.rule.startswith("/admin") else "application/json")
