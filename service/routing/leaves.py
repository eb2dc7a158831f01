"""What every leaf of a route goes by, whether it generates or classifies: may it be asked, and with what."""

from __future__ import annotations

import dataclasses

from prompt_store.prompts.version import EnsemblePayload, RemoteModelPayload, TextPayload, Vote
from service.catalog import Catalog
from service.engines.base import SoftPromptReference, Usage
from service.engines.errors import UnsupportedFeature
from service.routing.backends import Backend, Backends
from service.routing.errors import NotServed
from service.routing.plan import Target
from service.routing.prices import cost
from service.routing.questions import remote_model
from service.routing.retirement import Retirements
from service.routing.run import Run, Step
from service.routing.spending import Spending


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A target that may be asked: its backend, and the soft prompts it answers with; a single None without."""

    target: Target
    backend: Backend
    soft_prompts: tuple[SoftPromptReference | None, ...]

    @property
    def vote(self) -> Vote | None:
        """How the members of the target's ensemble vote; None where it is none."""
        payload = self.target.version.payload if self.target.version is not None else None
        return payload.vote if isinstance(payload, EnsemblePayload) else None


class Leaves:
    """From targets to leaves, and the account of what they cost."""

    def __init__(self, catalog: Catalog, backends: Backends, retirements: Retirements, spending: Spending) -> None:
        self._catalog = catalog
        self._backends = backends
        self._retirements = retirements
        self._spending = spending

    def open(self, run: Run, target: Target) -> Leaf:
        """What a target is asked with.

        Raises NotServed, UnsupportedFeature for a kind of version that the backend does not answer, ModelRetired past
        its model's last day, CostCeilingReached where the task has spent what it may today.
        """
        backend = self._backend(target)
        if target.version is not None:
            self._retirements.check(target.version)
        elif target.remote_model is not None:
            self._retirements.check_model(target.remote_model)
        if backend.prices:
            self._spending.check(run.plan.name, run.plan.daily_cost_ceiling)
        return Leaf(target, backend, self._soft_prompts(run, target, backend))

    def paid(self, run: Run, step: Step, leaf: Leaf, usage: Usage) -> None:
        """This is what a leaf took, whatever becomes of its answer.

        Of one that breaks off nobody says what it took, and it counts as nothing.
        """
        model = remote_model(leaf.target) or leaf.backend.default_model or ""
        amount = cost(leaf.backend.prices, model, usage)
        if amount:
            step.cost += amount
            self._spending.add(run.plan.name, leaf.backend.name, amount)

    def _backend(self, target: Target) -> Backend:
        if not target.backend:
            assert target.version is not None
            self._backends.refuse(target.version.payload)
        return self._backends.named(target.backend)

    def _soft_prompts(self, run: Run, target: Target, backend: Backend) -> tuple[SoftPromptReference | None, ...]:
        version = target.version
        if version is None:
            return (None,)
        payload, described = version.payload, self._backends.descriptions[backend.name]
        if not described.serves(payload):
            if isinstance(payload, RemoteModelPayload) and payload.kind in described.payload_kinds:
                raise NotServed(
                    f"{target.label} is a model at '{payload.provider}', but backend '{backend.name}' is at "
                    f"'{backend.provider}'; name a backend of its own provider"
                )
            raise UnsupportedFeature(
                f"{target.label} is of kind '{payload.kind}'; backend '{backend.name}' does not serve it",
                parameter="model",
            )
        if isinstance(payload, TextPayload | RemoteModelPayload):
            return (None,)
        assert run.plan.task is not None
        return self._catalog.references(run.plan.task, version)
