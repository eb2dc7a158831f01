"""Classifications at the leaves of a route: labels with their probabilities, and their votes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakValueDictionary

from prompt_store.access import Principal
from prompt_store.prompts.version import Vote
from service.engines import ensemble
from service.engines.base import ScoreRequest, Scores, Usage
from service.engines.collecting import total
from service.engines.scoring import CONTENT_FREE, Normalise, label_log_probabilities
from service.routing.confidence import label_confidence
from service.routing.errors import WrongTaskKind
from service.routing.leaves import Leaf, Leaves
from service.routing.plan import Target
from service.routing.questions import remote_model, task_prompt
from service.routing.run import Run, Step, Turn, for_an_engine, within

_KEPT_PRIORS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class LabelProbability:
    """How probable a label is among the task's labels; None where the backend tells its choice alone."""

    label: str
    probability: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Classified:
    """What a leaf makes of the labels in `names`, by their places: the order of preference, and probabilities.

    With `choice_only` the latter only say what was chosen, and are not shown. `agreement` is an ensemble's.
    """

    target: Target
    step: Step
    usage: Usage
    names: tuple[str, ...]
    order: tuple[int, ...]
    probabilities: tuple[float, ...]
    choice_only: bool
    agreement: float | None = None

    @property
    def label(self) -> str:
        """The chosen one."""
        return self.names[self.order[0]]

    @property
    def labels(self) -> tuple[LabelProbability, ...]:
        """The chosen one first."""
        return tuple(
            LabelProbability(self.names[place], None if self.choice_only else self.probabilities[place])
            for place in self.order
        )

    def confidence(self, measure: str) -> float | None:
        """How sure the choice is; see `label_confidence`."""
        known = () if self.choice_only else self.probabilities
        return label_confidence(measure, sorted(known, reverse=True), self.agreement)


@dataclasses.dataclass(frozen=True, slots=True)
class LabelQuestion:
    """What a caller asks of a classify task; see `scoring` for `normalise` and `calibrate`."""

    inputs: Mapping[str, str]
    normalise: Normalise = "none"
    calibrate: bool = False


class Priors:
    """The scores of the labels after an input that says nothing; asked once a version and backend."""

    def __init__(self) -> None:
        self._scores: OrderedDict[tuple[str, str, str], tuple[Scores, ...]] = OrderedDict()
        self._asking: WeakValueDictionary[tuple[str, str, str], asyncio.Lock] = WeakValueDictionary()

    async def of(self, leaf: Leaf, request: ScoreRequest, paid: Callable[[Usage], object]) -> tuple[Scores, ...]:
        """Of each member of a leaf; `request` is the one that they are wanted for.

        `paid` is told what they took where they had to be asked for.
        """
        target = leaf.target
        assert target.task is not None
        assert target.version is not None
        key = (target.version.digest, target.task.digest, target.backend)
        if key not in self._scores:
            async with self._asking.setdefault(key, asyncio.Lock()):
                if key not in self._scores:
                    nothing = dict.fromkeys(target.task.task.inputs, CONTENT_FREE)
                    asked = dataclasses.replace(request, id=f"{request.id}/prior", prompt=task_prompt(target, nothing))
                    scores = await ensemble.score(leaf.backend.engine, asked, leaf.soft_prompts)
                    paid(total(member.usage for member in scores))
                    self._scores[key] = scores
                    while len(self._scores) > _KEPT_PRIORS:
                        self._scores.popitem(last=False)
        self._scores.move_to_end(key)
        return self._scores[key]


class ClassifyWork:
    """Asks leaves for their labels."""

    def __init__(self, leaves: Leaves, priors: Priors, question: LabelQuestion, principal: Principal) -> None:
        self._leaves = leaves
        self._priors = priors
        self.question = question
        self._principal = principal

    async def ask(self, run: Run, target: Target, step: Step, turn: Turn) -> Classified:
        return await within(turn.until, self._ask(run, target, step, turn))

    async def hold(self, answer: Classified) -> Classified:
        return answer

    def measured(self) -> ClassifyWork:
        return self

    def voting(self) -> ClassifyWork:
        return self

    def confidence(self, measure: str, answer: Classified) -> float | None:
        return answer.confidence(measure)

    def no_confidence(self, measure: str, answer: Classified) -> str:
        return f"its backend does not tell {measure}"

    def vote(self, answers: Sequence[Classified], vote: Vote) -> Classified:
        """Versions may be of revisions with other labels: those of all are voted on.

        Where not every member says how probable its labels are, or none is possible by all, the majority decides.
        """
        names = tuple(dict.fromkeys(name for answer in answers for name in answer.names))
        known = [dict(zip(answer.names, map(_log, answer.probabilities), strict=True)) for answer in answers]
        values = [[each.get(name, -math.inf) for name in names] for each in known]
        comparable = any(min(column) > -math.inf for column in zip(*values, strict=True))
        if not comparable or any(answer.choice_only for answer in answers):
            vote = "majority"
        elected = ensemble.elect_label(values, vote)
        label = names[elected.order[0]]
        winner = next((answer for answer in answers if answer.label == label), answers[0])
        for answer in answers:
            if answer is not winner:
                answer.step.pass_over("another member's answer was elected")
        return dataclasses.replace(
            winner,
            usage=total(answer.usage for answer in answers),
            names=names,
            order=elected.order,
            probabilities=elected.probabilities,
            choice_only=False,
            agreement=elected.agreement,
        )

    async def _ask(self, run: Run, target: Target, step: Step, turn: Turn) -> Classified:
        assert target.task is not None
        task = target.task.task
        if task.kind != "classify":
            raise WrongTaskKind(
                f"task '{task.name}' is of kind '{task.kind}'; POST /v1/tasks/{task.name}/generate answers it"
            )
        leaf = self._leaves.open(run, target)
        request = ScoreRequest(
            f"{run.id}/{len(run.steps)}",
            task_prompt(target, self.question.inputs),
            task.labels,
            remote_model=remote_model(target),
            principal=self._principal,
            deadline_s=for_an_engine(turn.until),
            another_follows=turn.another_follows,
            task=task.name,
        )
        members = await ensemble.score(leaf.backend.engine, request, leaf.soft_prompts)
        usage = total(member.usage for member in members)

        def paid(taken: Usage) -> None:
            self._leaves.paid(run, step, leaf, taken)

        paid(usage)
        choice_only = any(member.choice_only for member in members)
        priors: Sequence[Scores | None] = [None] * len(members)
        if self.question.calibrate and not choice_only:
            free = await self._priors.of(leaf, request, paid)
            # A provider that told its choice alone there has said nothing to divide by.
            priors = priors if any(prior.choice_only for prior in free) else free
        values = [
            label_log_probabilities(member, self.question.normalise, prior)
            for member, prior in zip(members, priors, strict=True)
        ]
        elected = ensemble.elect_label(values, leaf.vote or "mean_logprob")
        step.answer(members[0].provider_request_id)
        return Classified(
            target,
            step,
            usage,
            task.labels,
            elected.order,
            elected.probabilities,
            choice_only,
            elected.agreement if leaf.vote is not None else None,
        )


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0.0 else -math.inf
