"""Routes: a task's tree of decisions, as validated documents, kept with their history.

Only `direct` is served today. The other kinds have their shape already, so that documents can be written and checked,
and are refused with NotYetSupported when applied. Executing a route is the service's business.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, assert_never

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from sqlalchemy import Connection, Row, func, insert, select, tuple_

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.changes import record
from prompt_store.errors import InvalidName, InvalidRoute, NotYetSupported, SchemaMismatch
from prompt_store.names import check_task_name, parse_selector
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.tables import route_revisions

DEFAULT_BACKEND = "local"
DEFAULT_ALIAS = "production"

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _selector(text: str) -> str:
    try:
        parse_selector(text)
    except InvalidName as error:
        raise ValueError(str(error)) from error
    return text


def _backend(name: str) -> str:
    try:
        return check_task_name(name)
    except InvalidName as error:
        raise ValueError(
            f"{name!r} is not a backend name; use a-z, 0-9, '_' and '-', starting with a letter"
        ) from error


class DirectRoute(BaseModel):
    """A leaf: one backend answers with one version, named by alias, number or digest."""

    model_config = _FROZEN

    kind: Literal["direct"] = "direct"
    backend: Annotated[str, AfterValidator(_backend)] = DEFAULT_BACKEND
    version: Annotated[str, AfterValidator(_selector)] = DEFAULT_ALIAS


class Arm(BaseModel):
    """One side of a split; weights are relative to their sum."""

    model_config = _FROZEN

    name: str = Field(min_length=1, max_length=64)
    weight: float = Field(gt=0.0, allow_inf_nan=False)
    route: "Route"


class SplitRoute(BaseModel):
    """Reserved: traffic divided between arms by salted hash of the unit."""

    model_config = _FROZEN

    kind: Literal["split"] = "split"
    experiment: str = Field(min_length=1, max_length=64)
    arms: tuple[Arm, ...] = Field(min_length=2)


class FallbackRoute(BaseModel):
    """Reserved: each route in turn until one answers."""

    model_config = _FROZEN

    kind: Literal["fallback"] = "fallback"
    routes: tuple["Route", ...] = Field(min_length=2)


class CascadeRoute(BaseModel):
    """Reserved: the first route's answer where its confidence reaches the threshold, else the second's."""

    model_config = _FROZEN

    kind: Literal["cascade"] = "cascade"
    first: "Route"
    second: "Route"
    threshold: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)


class ShadowRoute(BaseModel):
    """Reserved: `primary` answers; a sample of requests also runs on `shadow`, whose answers are only recorded."""

    model_config = _FROZEN

    kind: Literal["shadow"] = "shadow"
    primary: "Route"
    shadow: "Route"
    sample: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)


class EnsembleRoute(BaseModel):
    """Reserved: members answer together."""

    model_config = _FROZEN

    kind: Literal["ensemble"] = "ensemble"
    members: tuple["Route", ...] = Field(min_length=2)


Route = Annotated[
    DirectRoute | SplitRoute | FallbackRoute | CascadeRoute | ShadowRoute | EnsembleRoute, Field(discriminator="kind")
]
for _model in (Arm, SplitRoute, FallbackRoute, CascadeRoute, ShadowRoute, EnsembleRoute):
    _model.model_rebuild()
ROUTE: TypeAdapter[Route] = TypeAdapter(Route)


@dataclass(frozen=True, slots=True)
class RouteRevision:
    """One state of a task's route; the newest number is in force."""

    number: int
    route: Route
    created_at: datetime
    principal: str


def parse_route(document: Mapping[str, Any]) -> Route:
    """Raises InvalidRoute giving the place and the reason."""
    try:
        return ROUTE.validate_python(dict(document))
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise InvalidRoute("the route is nested too deeply; flatten it") from error
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in problem["loc"])
        raise InvalidRoute(f"route{f' at {place}' if place else ''}: {problem['msg']}; correct it there") from error


def route_selectors(route: Route) -> frozenset[str]:
    """Every version that a route names at any depth, as it names it: by alias, number or digest."""
    match route:
        case DirectRoute():
            return frozenset({route.version})
        case SplitRoute():
            inner: tuple[Route, ...] = tuple(arm.route for arm in route.arms)
        case FallbackRoute():
            inner = route.routes
        case CascadeRoute():
            inner = (route.first, route.second)
        case ShadowRoute():
            inner = (route.primary, route.shadow)
        case EnsembleRoute():
            inner = route.members
        case _:
            assert_never(route)
    return frozenset().union(*(route_selectors(each) for each in inner))


def check_servable(route: Route) -> None:
    """Raises NotYetSupported for a kind of route that nothing serves yet."""
    if not isinstance(route, DirectRoute):
        raise NotYetSupported(f"a {route.kind} route is not served yet; apply a direct route")


def apply_route(connection: Connection, task: str, route: Route, principal: Principal, at: datetime) -> RouteRevision:
    """Puts a route in force for an existing task; the route in force already is not written again."""
    check_servable(route)
    current = read_route(connection, task)
    if current is not None and current.route == route:
        return current
    number = current.number + 1 if current is not None else 1
    document = canonical_json(route.model_dump(mode="json")).decode()
    connection.execute(
        insert(route_revisions).values(
            task=task, number=number, document=document, created_at=at, principal=principal.name
        )
    )
    record(
        connection,
        "route",
        action="route.apply",
        task=task,
        subject=str(number),
        principal=principal,
        at=at,
        details={"kind": route.kind},
    )
    return RouteRevision(number, route, at, principal.name)


def read_route(connection: Connection, task: str) -> RouteRevision | None:
    """The route in force, None where none was ever applied."""
    history = read_route_history(connection, task, newest_only=True)
    return history[0] if history else None


def read_route_history(connection: Connection, task: str, *, newest_only: bool = False) -> list[RouteRevision]:
    """Every route a task had, newest first."""
    query = select(route_revisions).where(route_revisions.c.task == task).order_by(route_revisions.c.number.desc())
    return [_to_revision(row) for row in connection.execute(query.limit(1) if newest_only else query)]


def read_routes(connection: Connection, tasks: Collection[str] | None = None) -> dict[str, Route | Unreadable]:
    """The route in force of every task that has one, or of those among `tasks`."""
    newest = select(route_revisions.c.task, func.max(route_revisions.c.number)).group_by(route_revisions.c.task)
    if tasks is not None:
        newest = newest.where(route_revisions.c.task.in_(tasks))
    key = tuple_(route_revisions.c.task, route_revisions.c.number)
    found: dict[str, Route | Unreadable] = {}
    for row in connection.execute(select(route_revisions).where(key.in_(newest))):
        try:
            found[row.task] = _to_revision(row).route
        except SchemaMismatch as error:
            found[row.task] = Unreadable(str(error))
    return found


def _to_revision(row: Row[tuple[object, ...]]) -> RouteRevision:
    try:
        route = ROUTE.validate_json(row.document)
    except ValidationError as error:
        raise SchemaMismatch(
            f"the route of task {row.task!r} was written by another release of Softcue and cannot be read by this one; "
            "upgrade Softcue, or apply the route again"
        ) from error
    return RouteRevision(row.number, route, row.created_at, row.principal)
