"""The service's description: OpenAPI, and a page of it without scripts."""

import json
from typing import Any

from pydantic import BaseModel

from ctrkit import __version__
from ctrkit.page_templates import template

_ERRORS = {
    400: "Not JSON, a key twice, or a query that is none.",
    401: "The token is missing or wrong.",
    403: "Not to be asked for without a token.",
    408: "The body did not arrive in time.",
    409: "The new model cannot be used; the old one stays.",
    413: "The body is too long.",
    415: "The body is not announced as plain JSON.",
    422: "JSON, but not a request that this model takes: `details` says where and why.",
    503: "Busy or stopping: try again after Retry-After seconds.",
}


def openapi(request: type[BaseModel], *, with_token: bool) -> dict[str, Any]:
    """Return the service's OpenAPI 3.1 description. request: the class that bodies of /score are read by."""
    body = request.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = {**body.pop("$defs", {}), "Request": body, "Scores": _scores(), "Error": _error()}
    attention = {
        "name": "attention",
        "in": "query",
        "description": "Answer the weight of each behaviour for each ad too.",
        "schema": {"type": "boolean", "default": False},
    }
    closed = (401,) if with_token else (403,)
    swapped = _plain({"model": {"type": "string"}, "changed": {"type": "boolean"}})
    paths: dict[str, dict[str, Any]] = {
        "/score": {
            "post": {
                "summary": "The click probability of each candidate ad, for one user in one scene",
                "parameters": [attention],
                "requestBody": {"required": True, "content": _json("Request")},
                "responses": _responses(_json("Scores"), *closed, 400, 408, 413, 415, 422, 503),
            }
        },
        "/reload": {
            "post": {
                "summary": "Swap in the model that now lies where the model was read",
                "responses": _responses(swapped, *closed, 409),
            }
        },
        "/health": _get("Whether the process lives", _plain({"status": {"const": "ok"}}), 403, with_token=with_token),
        "/ready": _get(
            "Whether it has a model and takes requests; which model",
            _plain({"status": {"const": "ready"}, "model": {"type": "string"}, "loaded": {"type": "number"}}),
            403,
            503,
            with_token=with_token,
        ),
        "/metrics": _get("Counts in Prometheus' text format", {"text/plain": {"schema": {"type": "string"}}}, *closed),
        "/openapi.json": _get("This description", {"application/json": {"schema": {"type": "object"}}}, *closed),
        "/docs": _get("This description as a page", {"text/html": {"schema": {"type": "string"}}}, *closed),
    }
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "ctrkit serve", "version": __version__, "description": "Click probabilities of a model."},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_token:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            if path not in ("/health", "/ready"):
                for operation in methods.values():
                    operation["security"] = [{"token": []}]
    return description


def page(description: dict[str, Any]) -> str:
    """Return the description as HTML that loads nothing from anywhere."""
    schemas = description["components"]["schemas"]
    operations = [
        {"method": method.upper(), "path": path, "summary": one["summary"], "responses": one["responses"]}
        for path, methods in description["paths"].items()
        for method, one in methods.items()
    ]
    shown = [{"name": name, "text": json.dumps(schema, indent=2)} for name, schema in schemas.items()]
    return template("service.html.j2").render(info=description["info"], operations=operations, schemas=shown)


def _get(summary: str, content: dict[str, Any], *errors: int, with_token: bool = False) -> dict[str, Any]:
    kept = [status for status in errors if not (with_token and status == 403)]
    return {"get": {"summary": summary, "responses": _responses(content, *kept)}}


def _responses(content: dict[str, Any], *errors: int) -> dict[str, Any]:
    refused = {str(status): {"description": _ERRORS[status], "content": _json("Error")} for status in sorted(errors)}
    return {"200": {"description": "The answer", "content": content}, **refused}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _plain(properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"application/json": {"schema": schema}}


def _scores() -> dict[str, Any]:
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    by_feature = {"type": "object", "additionalProperties": counts}
    weights = {"type": ["array", "null"], "items": {"type": "array", "items": {"type": "number"}}}
    return {
        "title": "Scores",
        "type": "object",
        "properties": {
            "model": {"type": "string", "description": "Digest of the model."},
            "scores": {
                "type": "array",
                "items": {"type": "number", "minimum": 0, "maximum": 1},
                "description": "The click probability of each ad, in the order of the request.",
            },
            "attention": {
                **weights,
                "description": "Where asked for: of each ad, the weight of each behaviour that was used, oldest first; "
                "null where the model has none.",
            },
            "unknown": {
                **by_feature,
                "description": "By feature, how many values were `missing`, and how many `unknown` from training.",
            },
        },
        "required": ["model", "scores", "unknown"],
    }


def _error() -> dict[str, Any]:
    fault = {"type": "object", "properties": {"where": {"type": "string"}, "what": {"type": "string"}}}
    return {
        "title": "Error",
        "type": "object",
        "properties": {"error": {"type": "string"}, "details": {"type": "array", "items": fault}},
        "required": ["error"],
    }
