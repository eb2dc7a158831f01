"""What a request needs beside its place in the scheduler: the answers that are being made, the labels being scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engines.local.detokenizer import Detokenizer
from service.engines.local.messages import Logprob, Output, Submit
from service.engines.local.sampler import RowSampling
from service.engines.local.scheduler import Sequence


@dataclass(eq=False, slots=True)
class Answer:
    """One choice of a generation. What is not streamed is kept here until the end."""

    index: int
    sequence: Sequence
    sampling: RowSampling
    detokenizer: Detokenizer
    stream: bool
    made: int = 0
    ended: bool = False
    _text: list[str] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[Logprob] = field(default_factory=list)

    def report(self, text: str, tokens: list[int], logprobs: list[Logprob], reason: str | None) -> Output | None:
        """News of this answer, if it is time for any."""
        self._text.append(text)
        self._tokens += tokens
        self._logprobs += logprobs
        if reason is None and not self.stream:
            return None
        output = Output(self.sequence.id, "".join(self._text), self._tokens, reason, self.index, self._logprobs)
        self._text, self._tokens, self._logprobs = [], [], []
        return output


@dataclass(eq=False, slots=True)
class Generation:
    """A `Submit` at work. The first answer's sequence computes the prompt; the others fork from it."""

    command: Submit
    answers: list[Answer]
    begun: bool = False
    prompt_logprobs: list[Logprob | None] | None = None

    @property
    def sequence(self) -> Sequence:
        return self.answers[0].sequence

    @property
    def sequences(self) -> list[Sequence]:
        return [answer.sequence for answer in self.answers]


@dataclass(eq=False, slots=True)
class Scoring:
    """A `Score` at work. `totals[i]` grows to continuation i's log-probability; `left` counts what is missing."""

    sequence: Sequence
    continuations: list[list[int]]
    totals: list[float]
    places: dict[int, int]  # id of a branch to its continuation
    begun: bool = False
    left: int = 0

    @classmethod
    def of(cls, sequence: Sequence, continuations: list[list[int]]) -> Scoring:
        """The first token of a continuation follows from the prompt; all but its last are fed to learn of the rest."""
        branches = [continuation[:-1] for continuation in continuations]
        sequence.branches = [branch for branch in branches if branch]
        places = {id(branch): index for index, branch in enumerate(branches) if branch}
        return cls(sequence, continuations, [0.0] * len(continuations), places, left=len(places))

    @property
    def sequences(self) -> list[Sequence]:
        return [self.sequence]
