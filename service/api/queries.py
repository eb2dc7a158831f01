"""Query parameters: one that a handler does not take is refused; a mistyped filter would let everything through."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.params import QueryParameter

from prompt_store.errors import nearest_name
from service.api.bodies import require_content_type
from service.api.errors import UnknownParameter


async def require_known_query(request: Request[Any, Any, Any]) -> None:
    """Before each request of a handler, in place of the application's own check, which it makes too."""
    await require_content_type(request)
    parameters = request.route_handler.parsed_fn_signature.parameters
    known = [name for name, field in parameters.items() if isinstance(field.kwarg_definition, QueryParameter)]
    for name in request.query_params:
        if name not in known:
            nearest = nearest_name(name, known)
            hint = f"did you mean {nearest!r}? " if nearest is not None else ""
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UnknownParameter(f"there is no query parameter {name!r} here; {hint}{takes}", name)
