"""What became of a request, by the id that its answer had."""

from __future__ import annotations

from typing import Any

from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from service.api.answers import errors
from service.generation_ids import plain_id, verify
from service.routing.router import Router


class GenerationController(Controller):
    """`/v1/generations`."""

    path = "/v1/generations"
    tags = ("Tasks",)

    @get("/{generation:str}", responses=errors(404))
    async def show(self, generation: FromPath[str], router: NamedDependency[Router]) -> dict[str, Any]:
        """The path that a request took and what it cost; no text.

        The replica that answered it knows that for a while. Of others, and of old ones, it is told what the id itself
        says; `route` is null then.
        """
        identity = plain_id(generation)
        known = router.recent.get(identity)
        if known is not None:
            return known
        tag = verify(identity, router.signing_key)
        return {
            "id": identity,
            "object": "generation",
            "created": tag.at_ms // 1000,
            "task": tag.task,
            "version_digest": tag.version,
            "arm": tag.arm,
            "outcome": None,
            "route": None,
            "cost": None,
        }
