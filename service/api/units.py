"""Units over HTTP: all that one has left is erased."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal
from urllib.parse import unquote

from litestar import Controller, Request, delete
from litestar.di import NamedDependency
from litestar.params import FromPath
from pydantic import BaseModel

from prompt_store.prompts.registry import Registry
from service.api.answers import errors
from service.api.callers import principal_of
from service.api.queries import require_known_query
from service.generation_ids import unit_hash
from service.routing.router import Router

_PATH = "/v1/units"


class ErasedBody(BaseModel):
    """How many rows went, by where they were. The unit itself is nowhere: what it left had a salted hash of it."""

    object: Literal["unit.erased"] = "unit.erased"
    erased: dict[str, int]


class UnitController(Controller):
    """`/v1/units`."""

    path = _PATH
    tags = ("Outcomes",)
    before_request = staticmethod(require_known_query)

    @delete("/{unit:path}", status_code=200, sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def erase_unit(
        self,
        request: Request[Any, Any, Any],
        unit: FromPath[str],
        registry: NamedDependency[Registry],
        router: NamedDependency[Router],
    ) -> ErasedBody:
        """Erase what a unit left: exposures, answers, outcomes, captures and shadow answers.

        The unit is what requests gave, percent-encoded. What journals of services still have of it from before now is
        not taken in later. Erasing again erases what came since.
        """
        erased = registry.erase_unit(unit_hash(_as_given(request), router.signing_key), principal_of(request))
        return ErasedBody(erased=asdict(erased))


def _as_given(request: Request[Any, Any, Any]) -> str:
    """The unit to the letter: as a path, "a//b" would have become "/a/b", another unit."""
    raw: bytes = request.scope["raw_path"]
    return unquote(raw.partition(b"?")[0].decode("ascii").partition(f"{_PATH}/")[2])
