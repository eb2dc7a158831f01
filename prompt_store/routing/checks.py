"""Holding a route against what there is to answer: versions, backends, calibrations, shutdown dates.

Everything here is of one moment. A version may be deleted or a backend taken away later; aliases and versions that a
route in force names are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from prompt_store.errors import InvalidName, InvalidRoute, Place, RouteProblem, dotted, nearest_name
from prompt_store.names import AliasSelector, parse_selector
from prompt_store.prompts.snapshot import TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import (
    SHUTDOWN_WARNING_DAYS,
    EnsemblePayload,
    PromptVersion,
    RemoteModelPayload,
    TextPayload,
)
from prompt_store.routing.backends import BackendDescription, choose_backend
from prompt_store.routing.rewriting import splits
from prompt_store.routing.routes import (
    CascadeRoute,
    DirectRoute,
    EnsembleRoute,
    Route,
    TaskRoute,
    endings,
    inner_routes,
    leaves,
)

_SHOWN_DIGEST = 12


def check_route(
    task: TaskSnapshot, route: TaskRoute, backends: Sequence[BackendDescription], today: date
) -> tuple[str, ...]:
    """What will not last of a route that can be applied: remote models that go away, or went.

    Where no backend is known, only a direct route that names none is let through, as nothing of it could be wrong.
    Raises InvalidRoute with every problem, at places that begin with the task; SchemaMismatch for a task whose current
    revision cannot be read.
    """
    if not backends and not (isinstance(route.route, DirectRoute) and route.route.backend is None):
        raise InvalidRoute.of(
            [
                RouteProblem(
                    (task.name, "route"),
                    "no backend is known, so the route cannot be checked; start `softcue serve` once on this store, or "
                    "name its settings with --config",
                )
            ]
        )
    checks = _Checks(task, backends, today, readable(task.revision).task.kind)
    checks.check((task.name, "route"), route.route, {})
    checks.check_split_names(route.route)
    checks.warn_of_shutdowns(route.route)
    if checks.problems:
        raise InvalidRoute.of(checks.problems)
    return tuple(checks.warnings)


@dataclass(slots=True)
class _Checks:
    """One walk over a route; `needs` are features that its leaves need, each with the reason."""

    task: TaskSnapshot
    backends: Sequence[BackendDescription]
    today: date
    kind: str
    problems: list[RouteProblem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def check(self, place: Place, route: Route, needs: Mapping[str, str]) -> None:
        match route:
            case DirectRoute():
                self._check_leaf(place, route, needs)
                return
            case EnsembleRoute(vote="mean_logprob"):
                needs = {**needs, "logprobs": "an ensemble that votes by mean_logprob"}
            case CascadeRoute():
                self._check_cascade(place, route)
        for way, inner in inner_routes(route):
            wanted = needs
            if isinstance(route, CascadeRoute) and way == ("first",) and "logprob" in route.measure:
                wanted = {**needs, "logprobs": f"a cascade that measures {route.measure}"}
            self.check((*place, *way), inner, wanted)

    def check_split_names(self, route: Route) -> None:
        """Splits of one name share an allocation, so they must divide traffic alike."""
        first: dict[str, dict[str, float]] = {}
        for way, split in splits(route):
            weights = {arm.name: arm.weight for arm in split.arms}
            if first.setdefault(split.experiment, weights) != weights:
                self._refuse(
                    (self.task.name, "route", *way, "experiment"),
                    f"another split of the route is called {split.experiment!r} too and has other arms or weights; "
                    "give each a name of its own",
                )

    def _check_cascade(self, place: Place, route: CascadeRoute) -> None:
        if route.measure.startswith("quantile_logprob") and self.kind == "classify":
            self._refuse(
                (*place, "measure"),
                f"{route.measure} is of an answer's tokens, and task {self.task.name!r} answers with labels; measure "
                "margin or mean_logprob instead",
            )
        if route.measure == "margin" and self.kind != "classify":
            self._refuse(
                (*place, "measure"),
                f"margin lies between labels, and task {self.task.name!r} has none; measure mean_logprob instead",
            )
        for way, leaf in leaves(route.first):
            version = self._find(leaf)
            if not isinstance(version, PromptVersion):
                continue  # which is said at the leaf
            ensemble = isinstance(route.first, EnsembleRoute) or isinstance(version.payload, EnsemblePayload)
            if route.measure == "agreement" and not ensemble:
                self._refuse(
                    (*place, "measure"),
                    f"agreement is among the members of an ensemble, and {version.label} is of kind "
                    f"{version.payload.kind!r}; let an ensemble answer first, or use another measure",
                )
            if (version.digest, route.measure) not in self.task.calibrations:
                self._refuse(
                    (*place, "first", *way, "version"),
                    f"{self.task.name}@{version.label} has no calibration for {route.measure}, so none of its answers "
                    f"would be accepted; `softcue routes calibrate {self.task.name} --version {version.label} "
                    f"--measure {route.measure} --data ROWS --target 0.95` measures one",
                )

    def _check_leaf(self, place: Place, leaf: DirectRoute, needs: Mapping[str, str]) -> None:
        version = self._find(leaf)
        if isinstance(version, str):
            self._refuse((*place, "version"), version)
        named = self._named(leaf)
        if isinstance(named, str):
            self._refuse((*place, "backend"), named)
        if isinstance(version, str) or isinstance(named, str):
            return
        backend = named or choose_backend(self.backends, version.payload)
        if backend is None:
            if self.backends:
                self._refuse(place, f"no backend serves {_kind(version)}; name one that does in the service's settings")
            return
        place = (*place, "backend") if named is not None else place
        for fault in self._mismatches(backend, version, needs):
            self._refuse(place, fault)

    def _mismatches(
        self, backend: BackendDescription, version: PromptVersion, needs: Mapping[str, str]
    ) -> Iterator[str]:
        if not backend.serves(version.payload):
            able = [other.name for other in self.backends if other.serves(version.payload)]
            remedy = f"use {' or '.join(able)}" if able else "no known backend does; use another version"
            yield f"backend {backend.name!r} does not serve {_kind(version)}; {remedy}"
            return
        if isinstance(version.payload, TextPayload) and backend.provider is not None and backend.default_model is None:
            yield (
                f"backend {backend.name!r} has no default model to answer {_kind(version)}; give it one in the "
                "service's settings"
            )
        wanted = dict(needs)
        if self.kind == "classify":
            wanted["scores"] = "a task that classifies"
        if self.kind == "extract":
            wanted["structured_output"] = "a task that extracts"
        if isinstance(version.payload, EnsemblePayload) and version.payload.vote == "mean_logprob":
            wanted.setdefault("logprobs", f"{version.label}, an ensemble that votes by mean_logprob,")
        for feature, reason in wanted.items():
            if feature not in backend.features:
                able = [other.name for other in self.backends if feature in other.features]
                remedy = f"; {' or '.join(able)} has them" if able else "; no known backend has them"
                yield f"{reason} needs {feature}, which backend {backend.name!r} does not give{remedy}"

    def _find(self, leaf: DirectRoute) -> PromptVersion | str:
        """The version that a leaf names, or what is wrong with that."""
        selector = parse_selector(leaf.version)
        try:
            found = self.task.find(selector)
        except InvalidName as error:
            return str(error)
        if isinstance(found, Unreadable):
            return found.reason
        if found is not None:
            return found
        labels = [f"v{number}" for number in self.task.numbers]
        alias = isinstance(selector, AliasSelector)
        nearest = nearest_name(leaf.version, [*self.task.aliases, *labels] if alias else [*labels, *self.task.versions])
        hint = f"did you mean {nearest!r}? Otherwise " if nearest is not None else ""
        what = "alias" if alias else "version"
        return (
            f"task {self.task.name!r} has no {what} {leaf.version!r}; {hint}list them with `softcue prompts list "
            f"{self.task.name}`"
        )

    def _named(self, leaf: DirectRoute) -> BackendDescription | str | None:
        """The backend that a leaf names, None where it names none, or what is wrong with that."""
        if leaf.backend is None:
            return None
        known = {backend.name: backend for backend in self.backends}
        if leaf.backend in known:
            return known[leaf.backend]
        nearest = nearest_name(leaf.backend, known)
        hint = f"did you mean {nearest!r}? " if nearest is not None else ""
        return f"no backend {leaf.backend!r}; {hint}There are {', '.join(known)}"

    def warn_of_shutdowns(self, route: Route) -> None:
        """Of each leaf whose model goes away soon, and whether the route answers without all that are gone then."""
        versions: dict[Place, PromptVersion] = {}
        days: dict[Place, date] = {}
        for way, leaf in leaves(route):
            version = self._find(leaf)
            if isinstance(version, PromptVersion) and version.shutdown_date is not None:
                versions[way], days[way] = version, version.shutdown_date
        for way, day, backed in endings(route, days):
            said = _shutdown(day, self.today)
            if said is None:
                continue
            version = versions[way]
            model = version.payload.model if isinstance(version.payload, RemoteModelPayload) else version.label
            instead = (
                "what the route has beside it answers then"
                if backed
                else "nothing stands behind it, so put it in a fallback"
            )
            where = dotted((self.task.name, "route", *way))
            self.warnings.append(f"{where}: the model {model} of {self.task.name}@{version.label} {said}; {instead}")

    def _refuse(self, place: Place, message: str) -> None:
        self.problems.append(RouteProblem(place, message))


def _kind(version: PromptVersion) -> str:
    if isinstance(version.payload, RemoteModelPayload):
        return f"{version.label}, a model at provider {version.payload.provider!r}"
    return f"{version.label}, which is of kind {version.payload.kind!r}"


def _shutdown(day: date, today: date) -> str | None:
    """What there is to say of a model that is gone from `day` on, None where it is long to go."""
    days = (day - today).days
    if days <= 0:
        return f"was shut down on {day}"
    if days > SHUTDOWN_WARNING_DAYS:
        return None
    return f"is shut down on {day}, in {days} {'day' if days == 1 else 'days'}"
