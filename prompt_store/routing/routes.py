"""Routes: a task's tree of decisions with its limits, as validated documents.

`revisions` keeps them with their history, `checks` holds them against what there is to answer, and `files` reads them
from TOML. Executing a route is the service's business.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import partial
from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from prompt_store.errors import InvalidArtifact, InvalidName, InvalidRoute, Place, RouteProblem, dotted
from prompt_store.names import check_text, parse_selector
from prompt_store.prompts.version import Vote
from prompt_store.routing.backends import check_backend_name

DEFAULT_BACKEND = "local"
DEFAULT_ALIAS = "production"
MAX_BRANCHES = 16
MAX_DEPTH = 8
MAX_LEAVES = 64

SINGLE_FIELDS = ("first", "second", "primary", "shadow")
"""Fields of routes that hold a route; an arm's is called route."""
LIST_FIELDS = ("routes", "members")
"""Fields of routes that hold a list of routes."""

_MEASURE = re.compile(r"mean_logprob|margin|agreement|quantile_logprob:0?\.[0-9]{1,4}")

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _validated(check: Callable[[str], object]) -> AfterValidator:
    """Has pydantic refuse what `check` refuses, in the same words."""

    def validate(text: str) -> str:
        try:
            check(text)
        except (InvalidName, InvalidArtifact) as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(validate)


_Name = Annotated[str, Field(min_length=1, max_length=64), _validated(partial(check_text, "name"))]


def check_measure(text: str) -> str:
    """Returns `text`. Raises ValueError when it is no measure of confidence."""
    if not _MEASURE.fullmatch(text):
        raise ValueError(
            f"{text!r} is no measure of confidence; use mean_logprob, quantile_logprob:0.1, margin or agreement"
        )
    return text


class DirectRoute(BaseModel):
    """A leaf: one backend answers with one version, named by alias, number or digest.

    Without a backend it is the one that serves the version's kind: a remote model's own provider, else the first.
    """

    model_config = _FROZEN

    kind: Literal["direct"] = "direct"
    backend: Annotated[str, _validated(check_backend_name)] | None = None
    version: Annotated[str, _validated(parse_selector)] = DEFAULT_ALIAS


class Arm(BaseModel):
    """One side of a split, and its share of the traffic."""

    model_config = _FROZEN

    name: _Name
    weight: float = Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)
    route: "Route"


class SplitRoute(BaseModel):
    """Traffic divided between arms by salted hash of the unit; weights sum to 1."""

    model_config = _FROZEN

    kind: Literal["split"] = "split"
    experiment: _Name
    arms: tuple[Arm, ...] = Field(min_length=2, max_length=MAX_BRANCHES)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise ValueError("two arms have the same name; name each arm once")
        if abs((whole := math.fsum(arm.weight for arm in self.arms)) - 1.0) > 1e-6:
            raise ValueError(f"the arms' weights sum to {whole:.6g}; they must sum to 1")
        return self


class FallbackRoute(BaseModel):
    """Each route in turn until one answers; never after the first delta of one was sent."""

    model_config = _FROZEN

    kind: Literal["fallback"] = "fallback"
    routes: tuple["Route", ...] = Field(min_length=2, max_length=MAX_BRANCHES)


class CascadeRoute(BaseModel):
    """The first route's answer where its confidence reaches the threshold, else the second's.

    `measure` is what confidence means: `mean_logprob` and `quantile_logprob:Q` of the answer's tokens, `margin` between
    the two best labels, `agreement` of an ensemble. The threshold is the one that was calibrated for the version that
    gave the first answer; an answer of a version without one is never accepted.
    """

    model_config = _FROZEN

    kind: Literal["cascade"] = "cascade"
    first: "Route"
    second: "Route"
    measure: Annotated[str, AfterValidator(check_measure)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not isinstance(self.first, DirectRoute | EnsembleRoute):
            raise ValueError(
                f"the first of a cascade is a {self.first.kind} route, whose answer no threshold is calibrated for; "
                "put a direct or an ensemble route there"
            )
        return self


class ShadowRoute(BaseModel):
    """`primary` answers; a sample of requests also runs on `shadow`, whose answers are only recorded."""

    model_config = _FROZEN

    kind: Literal["shadow"] = "shadow"
    primary: "Route"
    shadow: "Route"
    sample: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False, strict=True)


class EnsembleRoute(BaseModel):
    """Members answer together and vote, as the members of an ensemble version do."""

    model_config = _FROZEN

    kind: Literal["ensemble"] = "ensemble"
    members: tuple["Route", ...] = Field(min_length=2, max_length=MAX_BRANCHES)
    vote: Vote = "majority"


Route = Annotated[
    DirectRoute | SplitRoute | FallbackRoute | CascadeRoute | ShadowRoute | EnsembleRoute, Field(discriminator="kind")
]
for _model in (Arm, SplitRoute, FallbackRoute, CascadeRoute, ShadowRoute, EnsembleRoute):
    _model.model_rebuild()
ROUTE: TypeAdapter[Route] = TypeAdapter(Route)


class TaskRoute(BaseModel):
    """A task's route and its limits: seconds that an answer may take, and what a day of answers may cost."""

    model_config = _FROZEN

    route: Route = DirectRoute()
    deadline_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False, strict=True)
    daily_cost_ceiling: float | None = Field(default=None, gt=0.0, allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        leaves = 0
        for place, route, depth in _walk(self.route):
            if depth > MAX_DEPTH:
                raise ValueError(f"{dotted(place)} lies {depth} routes deep; nest at most {MAX_DEPTH} in each other")
            leaves += isinstance(route, DirectRoute)
        if leaves > MAX_LEAVES:
            raise ValueError(f"the route has more than {MAX_LEAVES} leaves; use fewer")
        return self

    def document(self) -> dict[str, Any]:
        """As JSON values: the bare route where it has no limits."""
        whole = self.model_dump(mode="json", exclude_none=True)
        bare: dict[str, Any] = whole["route"]
        return whole if len(whole) > 1 else bare


def parse_task_route(document: Mapping[str, Any]) -> TaskRoute:
    """A route with its limits, or a bare route. Raises InvalidRoute with every problem and its place."""
    bare = "kind" in document
    try:
        return TaskRoute.model_validate({"route": dict(document)} if bare else dict(document))
    except RecursionError as error:
        raise InvalidRoute("the route is nested too deeply; flatten it") from error
    except ValidationError as error:
        problems = problems_of(error)
        if bare:
            problems = [RouteProblem(problem.place[1:], problem.message) for problem in problems]
        raise InvalidRoute.of(problems) from error


def in_words(_: Place, kind: str, message: str) -> str:
    """What a problem of pydantic's kind says of a route's field, with the remedy."""
    match kind:
        case "model_attributes_type" | "dict_type" | "model_type":
            return "this is no route; write a table (an object in JSON), or in a file the name of a part"
        case "tuple_type":
            return "this is no list; write [ and ] around what belongs to it"
        case "value_error":
            return message.removeprefix("Value error, ")
        case "extra_forbidden":
            return "there is no such field here; remove it, or correct its name"
        case "missing":
            return "this field is missing; add it"
        case "union_tag_not_found":
            return "the kind is missing; give kind = direct, split, fallback, cascade, shadow or ensemble"
        case "union_tag_invalid":
            return f"{message[0].lower()}{message[1:]}; use one of these"
    return f"{message[0].lower()}{message[1:]}; correct it"


def problems_of(error: ValidationError, words: Callable[[Place, str, str], str] = in_words) -> list[RouteProblem]:
    """What pydantic found wrong with a document that has routes in it, at its places.

    `words` are given a place, pydantic's kind of problem and its message.
    """
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    found = [(_place(each["loc"]), each["type"], each["msg"]) for each in errors]
    return [
        RouteProblem(place, words(place, kind, message))
        for place, kind, message in found
        # A list is called too short also where entries of it are wrong, which is said of them.
        if kind != "too_short" or not any(other[: len(place)] == place for other, *_ in found if other != place)
    ]


def leaves(route: Route) -> Iterator[tuple[Place, DirectRoute]]:
    """Every leaf with the way to it, in the order of the document."""
    for place, each, _ in _walk(route):
        if isinstance(each, DirectRoute):
            yield place, each


def answers_without(route: Route, gone: frozenset[Place], place: Place = ()) -> bool:
    """Whether a route still answers every request without the leaves at these places.

    A cascade answers by whichever of its two is left, by the first then however unsure that is.
    """
    parts = [answers_without(inner, gone, (*place, *way)) for way, inner in inner_routes(route)]
    match route:
        case DirectRoute():
            return place not in gone
        case SplitRoute() | EnsembleRoute():
            return all(parts)
        case FallbackRoute() | CascadeRoute():
            return any(parts)
        case ShadowRoute():
            return parts[0]
    assert_never(route)


def endings(route: Route, days: Mapping[Place, date]) -> Iterator[tuple[Place, date, bool]]:
    """Each leaf that goes away on a day, that day, and whether the route still answers every request then.

    What goes before the leaf, or with it, is no replacement.
    """
    for place, day in days.items():
        gone = frozenset(other for other, when in days.items() if when <= day)
        yield place, day, answers_without(route, gone)


def route_selectors(route: Route) -> frozenset[str]:
    """Every version that a route names at any depth, as it names it: by alias, number or digest."""
    return frozenset(leaf.version for _, leaf in leaves(route))


def inner_routes(route: Route) -> list[tuple[Place, Route]]:
    """The routes that a route is made of, each with the way to it."""
    match route:
        case DirectRoute():
            return []
        case SplitRoute():
            return [(("arms", index, "route"), arm.route) for index, arm in enumerate(route.arms)]
        case FallbackRoute():
            return [(("routes", index), each) for index, each in enumerate(route.routes)]
        case CascadeRoute():
            return [(("first",), route.first), (("second",), route.second)]
        case ShadowRoute():
            return [(("primary",), route.primary), (("shadow",), route.shadow)]
        case EnsembleRoute():
            return [(("members", index), each) for index, each in enumerate(route.members)]
        case _:
            assert_never(route)


def _walk(route: Route) -> Iterator[tuple[Place, Route, int]]:
    """A route and all within it, each with the way to it and how many routes that way has."""
    pending: list[tuple[Place, Route, int]] = [((), route, 1)]
    while pending:
        place, each, depth = pending.pop()
        yield place, each, depth
        pending += [((*place, *way), inner, depth + 1) for way, inner in reversed(inner_routes(each))]


def _place(steps: tuple[int | str, ...]) -> Place:
    """pydantic's way to a problem without the tags of the union that it goes through."""
    place: list[int | str] = []
    tag_follows = False
    for step in steps:
        if tag_follows:
            tag_follows = False
            continue
        in_list = isinstance(step, int) and bool(place) and place[-1] in LIST_FIELDS
        tag_follows = in_list or step in ("route", *SINGLE_FIELDS)
        place.append(step)
    return tuple(place)
