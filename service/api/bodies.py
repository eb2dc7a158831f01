"""Bodies in: which content types are taken, how much is read, and JSON that a handler reads itself."""

from __future__ import annotations

from typing import Any, TypeVar

from litestar import Request
from litestar.exceptions import HTTPException
from pydantic import BaseModel, ValidationError

from service.api.errors import BodyTooLarge, InvalidBody

JSON = "application/json"
SAFETENSORS = ("application/vnd.safetensors", "application/octet-stream")

B = TypeVar("B", bound=BaseModel)


def content_type(request: Request[Any, Any, Any]) -> str:
    """Without parameters, in lower case; empty where there is none."""
    return str(request.headers.get("content-type", "")).partition(";")[0].strip().lower()


async def require_content_type(request: Request[Any, Any, Any]) -> None:
    """Before each request: a body must say what it is, so that no web page can send one without being asked.

    It is JSON, or of the `content_types` in the handler's options; none may be a type that forms can send.
    """
    taken = request.route_handler.opt.get("content_types", (JSON,))
    if request.method in ("POST", "PUT", "PATCH") and content_type(request) not in taken:
        given = request.headers.get("content-type", "")
        others = f", or {' or '.join(taken[1:])}" if taken[1:] else ""
        raise HTTPException(
            status_code=415,
            detail=f"the content type is '{given}'; send JSON and -H 'content-type: application/json'{others}",
        )


async def bounded_body(request: Request[Any, Any, Any], limit_bytes: int, setting: str) -> bytes:
    """The whole body of a handler without a limit of its own; `setting` is what sets this one.

    Raises BodyTooLarge: by the announced length before anything is read, and by what is read.
    """
    announced_bytes = request.content_length
    parts: list[bytes] = []
    read_bytes = 0
    if announced_bytes is None or announced_bytes <= limit_bytes:
        async for part in request.stream():
            parts.append(part)
            read_bytes += len(part)
            if read_bytes > limit_bytes:
                break
        else:
            return b"".join(parts)
    raise BodyTooLarge(f"the body is larger than the limit of {limit_bytes} bytes; send less, or raise {setting}")


def parse_body(model: type[B], body: bytes) -> B:
    """Raises InvalidBody naming the first field that is wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        parameter = ".".join(str(part) for part in problem["loc"]) or None
        told = problem["msg"].removeprefix("Value error, ")
        raise InvalidBody(f"{parameter or 'the body'}: {told}", parameter) from error
