"""Generations at the leaves of a route: begun, held, repaired, put to the vote."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from prompt_store.access import Principal
from prompt_store.prompts.task import Message
from prompt_store.prompts.version import Vote
from service.engines import ensemble
from service.engines.base import Delta, Finish, GenerationEvent, GenerationRequest, Messages
from service.engines.collecting import Answer, Answers, assemble, total
from service.engines.errors import UnsupportedFeature
from service.routing.confidence import confidence
from service.routing.extracting import extract
from service.routing.leaves import Leaf, Leaves
from service.routing.plan import Target
from service.routing.questions import Question, extract_task
from service.routing.run import Failure, Run, Step, Turn, for_an_engine, within


@dataclasses.dataclass(slots=True)
class Begun:
    """A generation whose first event is there. Iterate `events` once; `aclose` ends the engine's work.

    `step` is what it cost and how it ended, once it has; `whole` is there where it was held. `source` is what an engine
    gives, of which `events` are made.
    """

    target: Target
    step: Step
    events: AsyncGenerator[GenerationEvent]
    whole: Answers | None = None
    source: AsyncGenerator[GenerationEvent] | None = None

    async def aclose(self) -> None:
        """End it, wherever it stands. Closing twice changes nothing."""
        await self.events.aclose()
        if self.source is not None:  # which nobody closes where `events` never began
            await self.source.aclose()
        self.step.end("cancelled")


class GenerateWork:
    """Asks leaves to generate. `with_logprobs` asks for log-probabilities that the caller did not ask for."""

    def __init__(
        self, leaves: Leaves, question: Question, principal: Principal, *, with_logprobs: bool = False
    ) -> None:
        self._leaves = leaves
        self.question = question
        self._principal = principal
        self._with_logprobs = with_logprobs

    async def ask(self, run: Run, target: Target, step: Step, turn: Turn) -> Begun:
        """The generation of a leaf once its first event has come; whole, where its answer must be checked first."""
        leaf = self._leaves.open(run, target)
        capabilities = leaf.backend.engine.capabilities()
        logprobs = self.question.request.logprobs
        if self._with_logprobs and logprobs is None and "logprobs" in capabilities.features:
            logprobs = 0
        request = self.question.request_for(
            target,
            capabilities,
            id=f"{run.id}/{len(run.steps)}",
            soft_prompt=leaf.soft_prompts[0],  # an ensemble gives each of its members its own
            principal=self._principal,
            task=run.plan.name,
            logprobs=logprobs,
            deadline_s=for_an_engine(run.ends_at),
            begin_s=for_an_engine(turn.until) if turn.until != run.ends_at else None,
            another_follows=turn.another_follows,
        )
        checked = self.question.constrained and "follow_up" in capabilities.features
        if checked and extract_task(target) is not None and request.n == 1:
            run.held_back = True
            return await self._checked(run, leaf, request, step, turn.until)
        return await self._begun(run, leaf, request, step, turn.until)

    async def hold(self, answer: Begun) -> Begun:
        if answer.whole is not None:
            return answer
        async with aclosing(answer):
            seen = [event async for event in answer.events]
        return self._held(answer.target, answer.step, seen)

    def measured(self) -> GenerateWork:
        return GenerateWork(self._leaves, self.question, self._principal, with_logprobs=True)

    def voting(self) -> GenerateWork:
        """Raises UnsupportedFeature for more than one choice: the members' answers are what is chosen from."""
        if self.question.request.n != 1:
            raise UnsupportedFeature(
                f"n is {self.question.request.n}, but an ensemble gives one answer; leave n out", parameter="n"
            )
        return self.measured()

    def confidence(self, measure: str, answer: Begun) -> float | None:
        """Of several choices, that of the least sure; None where the task's answers are labels, in text or not."""
        assert answer.whole is not None
        if _answers_with_labels(answer.target):
            return None
        known = [confidence(measure, choice) for choice in answer.whole.answers]
        sure = [value for value in known if value is not None]
        return min(sure) if len(sure) == len(known) else None

    def no_confidence(self, measure: str, answer: Begun) -> str:
        if _answers_with_labels(answer.target):
            return f"its threshold of {measure} is one of labels, and this is an answer in text: /classify tells labels"
        return f"its backend does not tell {measure}"

    def vote(self, answers: Sequence[Begun], vote: Vote) -> Begun:
        given = [answer.whole for answer in answers if answer.whole is not None]
        winner, agreement = ensemble.elect([whole.answers[0] for whole in given], vote)
        for place, answer in enumerate(answers):
            if place != winner:
                answer.step.pass_over("another member's answer was elected")
        chosen = given[winner]
        events: list[GenerationEvent] = [] if chosen.prompted is None else [chosen.prompted]
        events.append(_as_delta(dataclasses.replace(chosen.answers[0], agreement=agreement)))
        usage = total(whole.usage for whole in given)
        events.append(Finish(chosen.answers[0].finish_reason, usage, chosen.provider_request_id))
        return self._held(answers[winner].target, answers[winner].step, events)

    async def _begun(self, run: Run, leaf: Leaf, request: GenerationRequest, step: Step, until: float | None) -> Begun:
        if leaf.vote is not None:
            stream = ensemble.generate(leaf.backend.engine, request, leaf.soft_prompts, leaf.vote)
        else:
            stream = leaf.backend.engine.generate(request)
        events = cast(AsyncGenerator[GenerationEvent], stream)
        first = await within(until, anext(events), f"backend '{leaf.backend.name}' had not begun to answer")
        return Begun(leaf.target, step, self._followed(run, leaf, step, first, events), source=events)

    async def _followed(
        self, run: Run, leaf: Leaf, step: Step, first: GenerationEvent, rest: AsyncGenerator[GenerationEvent]
    ) -> AsyncGenerator[GenerationEvent]:
        """The events of a generation, its step kept up with them."""
        try:
            async with aclosing(rest):
                event = first
                while True:
                    if isinstance(event, Finish):
                        self._leaves.paid(run, step, leaf, event.usage)
                        step.answer(event.provider_request_id)
                    yield event
                    if isinstance(event, Finish):
                        return
                    event = await anext(rest)
        except BaseException as error:
            step.fail(error)
            raise
        finally:
            step.end("cancelled")

    async def _checked(
        self, run: Run, leaf: Leaf, request: GenerationRequest, step: Step, until: float | None
    ) -> Begun:
        """An extract task's answer, asked for once more where it is not valid; where that fails, the first."""
        task = extract_task(leaf.target)
        assert task is not None
        first = await within(until, self.hold(await self._begun(run, leaf, request, step, until)))
        assert first.whole is not None
        answer = first.whole.answers[0]
        problem = extract(task, answer.text).invalid
        if problem is None or answer.finish_reason == "length" or not isinstance(request.prompt, Messages):
            return first
        turns = (
            Message(role="assistant", content=answer.text),
            Message(role="user", content=f"That is not valid: {problem}. Answer again, with the JSON alone."),
        )
        again = run.begin(f"{step.place}.repair", leaf.target)
        prompt = Messages((*request.prompt.messages, *turns))
        try:
            repair = dataclasses.replace(
                request,
                id=f"{request.id}/repair",
                prompt=prompt,
                deadline_s=for_an_engine(run.ends_at),
                begin_s=for_an_engine(until) if until != run.ends_at else None,
            )
            second = await within(until, self.hold(await self._begun(run, leaf, repair, again, until)))
        except Failure as error:
            again.fail(error)
            return first
        except BaseException as error:
            again.fail(error)
            raise
        step.pass_over("it was not valid for the task's schema")
        return second

    def _held(self, target: Target, step: Step, events: Sequence[GenerationEvent]) -> Begun:
        """Whole, with the log-probabilities that it was measured by; the caller sees those that he asked for."""
        asked = self.question.request
        replay = _replay(events, with_logprobs=asked.logprobs is not None)
        return Begun(target, step, replay, assemble(events, asked.n))


def _answers_with_labels(target: Target) -> bool:
    return target.task is not None and target.task.task.kind == "classify"


async def _replay(events: Sequence[GenerationEvent], *, with_logprobs: bool) -> AsyncGenerator[GenerationEvent]:
    for event in events:
        yield event if with_logprobs or not isinstance(event, Delta) else dataclasses.replace(event, logprobs=())


def _as_delta(answer: Answer) -> Delta:
    return Delta(
        answer.text,
        answer.token_ids,
        logprobs=answer.logprobs,
        finish_reason=answer.finish_reason,
        agreement=answer.agreement,
        tool_calls=answer.tool_calls,
        refusal=answer.refusal,
    )
