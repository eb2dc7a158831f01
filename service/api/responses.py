"""OpenAI's `/v1/responses`: text in and text out, streamed or not. Nothing is stored: a request brings all of it."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from service.api.answers import ERRORS, EventStream, while_connected
from service.api.callers import caller_of
from service.api.responses_answers import ResponseShape
from service.api.responses_shapes import ResponseBody
from service.catalog import Catalog
from service.engines.base import GenerationRequest
from service.routing.questions import Question
from service.routing.router import Router


@post("/v1/responses", status_code=200, tags=["OpenAI"], responses=ERRORS)
async def create_response(
    request: Request[Any, Any, Any],
    data: JSONBody[ResponseBody],
    catalog: NamedDependency[Catalog],
    router: NamedDependency[Router],
) -> Response[Any]:
    """Answer a text or a conversation with the soft prompt that `model` names (`task`, `task@alias`, `task@v7`)."""
    data.check()
    plan = catalog.resolve(data.model)
    asked = GenerationRequest(
        id="",
        prompt=data.messages(),
        logprobs=data.alternatives,
        response_format=data.format(),
        tools=data.nested_tools(),
        tool_choice=data.nested_tool_choice(),
        parallel_tool_calls=data.parallel_tool_calls if data.tools else None,
        provider_options=data.provider_options(),
        deadline_s=data.timeout_s,
        stream=bool(data.stream),
    )
    caller, question = caller_of(request, data.unit_key, data.attributes), Question(asked, data.sampling())
    async with while_connected(request):
        batch = await router.generate_each(plan, caller, [question])
        answers = None if data.stream else await batch.whole()
    shape = ResponseShape(batch, data)
    if answers is None:
        return EventStream(shape.stream(), shape.headers, batch.aclose)
    return Response(shape.whole(*answers), headers=shape.headers)
