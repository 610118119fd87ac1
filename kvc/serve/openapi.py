"""The OpenAPI description, made from the classes that check requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kvc.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Model,
    ModelList,
)
from kvc.version import __version__

REF = "#/components/schemas/{model}"
WHAT = {
    400: "The request cannot be understood, or asks for what is not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is no JSON.",
    429: "Too many requests wait already; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The server ends.",
}


def describe(guarded: bool) -> dict[str, Any]:
    """The description of the server, in OpenAPI 3.1.

    Args:
        guarded: Whether an API key is asked for.
    """
    requests, answers = (
        (CompletionRequest, ChatRequest),
        (Completion, ChatCompletion, Model, ModelList, ErrorBody),
    )
    _, schemas = models_json_schema(
        [
            *((kind, "validation") for kind in requests),
            *((kind, "serialization") for kind in answers),
        ],
        ref_template=REF,
    )
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kvc serve", "version": __version__},
        "components": components,
        "paths": {
            "/v1/completions": {
                "post": _post("Continue a text", CompletionRequest, Completion, guarded)
            },
            "/v1/chat/completions": {
                "post": _post("Continue a conversation", ChatRequest, ChatCompletion, guarded)
            },
            "/v1/models": {"get": _get("The models", _json(ModelList), guarded)},
            "/v1/models/{name}": {
                "get": _get("One model", _json(Model), guarded, 404)
                | {
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ]
                }
            },
            "/health": {"get": _get("Whether the server can answer", _any(), False, 503)},
            "/metrics": {
                "get": _get(
                    "Counters for Prometheus",
                    {"text/plain": {"schema": {"type": "string"}}},
                    guarded,
                )
            },
            "/openapi.json": {"get": _get("This description", _any(), guarded)},
        },
    }
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return description


def _post(
    summary: str, request: type[BaseModel], answer: type[BaseModel], guarded: bool
) -> dict[str, Any]:
    content = _json(answer) | {"text/event-stream": {}}
    more = (400, 404, 408, 413, 415, 429, 500, 503)
    return _get(summary, content, guarded, *more) | {
        "requestBody": {"required": True, "content": _json(request)}
    }


def _get(summary: str, content: dict[str, Any], guarded: bool, *errors: int) -> dict[str, Any]:
    statuses = [401, *errors] if guarded else errors
    described: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status in statuses:
        described[str(status)] = {"description": WHAT[status], "content": _json(ErrorBody)}
    operation: dict[str, Any] = {"summary": summary, "responses": described}
    return operation | ({"security": [{"key": []}]} if guarded else {})


def _json(kind: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=kind.__name__)}}}


def _any() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}
