"""Routes that are made from other routes. Pure."""

from collections.abc import Callable, Iterator
from typing import assert_never

from prompt_store.errors import Place
from prompt_store.routing.routes import (
    CascadeRoute,
    DirectRoute,
    EnsembleRoute,
    FallbackRoute,
    Route,
    ShadowRoute,
    SplitRoute,
    inner_routes,
)

Change = Callable[[Route], Route | None]


def rewritten(route: Route, change: Change) -> Route:
    """The route with what `change` gives in the place of a part; where that is None, the parts of it are asked for.

    That is in the order of the document.
    """
    changed = change(route)
    if changed is not None:
        return changed
    match route:
        case DirectRoute():
            return route
        case SplitRoute():
            arms = tuple(arm.model_copy(update={"route": rewritten(arm.route, change)}) for arm in route.arms)
            return route.model_copy(update={"arms": arms})
        case FallbackRoute():
            routes = tuple(rewritten(each, change) for each in route.routes)
            return route.model_copy(update={"routes": routes})
        case CascadeRoute():
            first, second = rewritten(route.first, change), rewritten(route.second, change)
            return route.model_copy(update={"first": first, "second": second})
        case ShadowRoute():
            primary, shadow = rewritten(route.primary, change), rewritten(route.shadow, change)
            return route.model_copy(update={"primary": primary, "shadow": shadow})
        case EnsembleRoute():
            members = tuple(rewritten(each, change) for each in route.members)
            return route.model_copy(update={"members": members})
    assert_never(route)


def with_leaves(route: Route, rename: Callable[[DirectRoute], str]) -> Route:
    """The route with the version that `rename` gives for each leaf, in the order of the document."""

    def change(part: Route) -> Route | None:
        return part.model_copy(update={"version": rename(part)}) if isinstance(part, DirectRoute) else None

    return rewritten(route, change)


def without_split(route: Route, name: str, by: Route) -> Route:
    """The route with another in the place of the split of that name."""
    return rewritten(route, lambda part: by if isinstance(part, SplitRoute) and part.experiment == name else None)


def splits(route: Route, place: Place = ()) -> Iterator[tuple[Place, SplitRoute]]:
    """Every split at any depth with the way to it, in the order of the document."""
    if isinstance(route, SplitRoute):
        yield place, route
    for way, inner in inner_routes(route):
        yield from splits(inner, (*place, *way))
