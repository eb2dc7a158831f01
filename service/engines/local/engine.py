"""The engine's heart: takes commands, runs steps, reports what came of them. One thread, plain data in and out.

A step is: schedule, run the forward pass, choose tokens, report. Whatever fails, fails one request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.engines.base_model import BaseModel
from service.engines.errors import RequestError
from service.engines.local.answers import Answer, Generation, Scoring
from service.engines.local.blocks import BlockPool, PromptCache
from service.engines.local.detokenizer import Detokenizer, TextDecoder
from service.engines.local.grammar import GrammarFactory
from service.engines.local.messages import (
    Failure,
    FailureKind,
    Logprob,
    Output,
    PromptScored,
    Register,
    Registered,
    Score,
    Scored,
    Stats,
    Step,
    Submit,
)
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.pacing import Pacer
from service.engines.local.passes import Computed, Failed, Passes, Skipped
from service.engines.local.sampler import Choice, RowSampling, choose, logprobs_of
from service.engines.local.scheduler import Chunk, Scheduler, Sequence
from service.engines.local.tensors import read_tensor

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's output is not finite for this prompt; check the version's tensor"


@dataclass(slots=True)
class _News:
    outputs: list[Output] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    prompts: list[PromptScored] = field(default_factory=list)
    registered: list[Registered] = field(default_factory=list)


class EngineCore:
    """Continuous batching over one model. Every request ends in an output with a finish reason, or a failure."""

    def __init__(
        self, runner: ModelRunner, options: EngineOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` tells the time in seconds, for deadlines and for what steps cost."""
        self._runner = runner
        self._clock = clock
        self._base = runner.base
        self._prompts = PromptCache(BlockPool(runner.blocks, runner.cache.shape.block_tokens))
        self._scheduler = Scheduler(
            self._prompts, max_sequences=options.max_sequences, max_batch_tokens=options.max_batch_tokens
        )
        self._passes = Passes(runner)
        self._decoder = TextDecoder(self._base.tokenizer)
        self._pacer = Pacer(options.max_batch_tokens)
        self._grammars = GrammarFactory(self._base.tokenizer, self._base.vocabulary_size, self._base.eos_token_ids)
        self._tensors: dict[str, Tensor] = {}
        self._requests: dict[str, Generation | Scoring] = {}
        self._answers: dict[Sequence, Answer] = {}
        self._deadlines: dict[str, float] = {}
        self._users: dict[str, int] = {}
        self._warming: dict[str, None] = {}
        self._releasing: set[str] = set()
        self._news = _News()
        self._tokens_generated = 0

    @classmethod
    def load(cls, base: BaseModel, options: EngineOptions) -> EngineCore:
        """Load the weights, prove that they can be served exactly, and make room for KV within the budget."""
        return cls(ModelRunner.load(base, options), options)

    @property
    def run_as(self) -> str:
        """How the base model's weights are run, such as "float32 on cpu"; not part of the base's fingerprint."""
        return self._runner.run_as

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        news = self._news.failures or self._news.registered
        return bool(self._requests or self._warming or self._scheduler.computing or news)

    def register(self, command: Register) -> Registered | None:
        """Know a prompt. Returns the answer, or None where a step brings it: a pinned prompt's KV is computed first.

        Raises ValueError when the model cannot take the tensor.
        """
        tensor = read_tensor(command)
        self._runner.check_prompt(tensor)
        self._tensors[command.digest] = tensor
        self._releasing.discard(command.digest)
        length = int(tensor.shape[0] if tensor.dim() == 2 else tensor.shape[3])
        prompt = self._prompts.register(command.digest, length, pinned=command.pinned)
        if command.pinned and not prompt.ready:
            self._warming[command.digest] = None
            return None
        return Registered(command.digest, None, self.stats())

    def release(self, digest: str) -> None:
        """Forget a prompt as soon as no request needs it."""
        self._releasing.add(digest)
        self._release_unused()

    def submit(self, command: Submit) -> None:
        """Queue a generation."""
        sequence = self._sequence(command)
        if sequence is None:
            return
        sequence.wants_all = command.prompt_logprobs is not None
        try:
            answers = [self._answer(command, sequence, index) for index in range(command.n)]
        except RequestError as error:
            self._news.failures.append(Failure(command.id, str(error), "invalid"))
            return
        self._accept(command, Generation(command, answers))
        self._answers[sequence] = answers[0]

    def _answer(self, command: Submit, sequence: Sequence, index: int) -> Answer:
        """An answer that has not begun. Raises RequestError for a grammar that cannot be followed."""
        choosing = command.choosing
        sampling = RowSampling(
            choosing,
            command.token_ids,
            self._base.eos_token_ids,
            index=index,
            grammar=self._grammars.start(command.grammar) if command.grammar is not None else None,
            logprobs=command.logprobs,
        )
        stop = tuple(command.stop)
        detokenizer = Detokenizer(self._decoder, stop, min_tokens=choosing.min_tokens, lazy=not command.stream)
        return Answer(index, sequence, sampling, detokenizer, command.stream)

    def score(self, command: Score) -> None:
        """Queue a score request."""
        sequence = self._sequence(command)
        if sequence is not None:
            self._accept(command, Scoring.of(sequence, command.continuations))

    def cancel(self, request_id: str) -> None:
        """End a request without news of it, and free what it held. Unknown ids are done already."""
        work = self._requests.pop(request_id, None)
        if work is None:
            return
        self._deadlines.pop(request_id, None)
        for sequence in work.sequences:
            self._scheduler.end(sequence)
            self._answers.pop(sequence, None)
        prompt = work.sequences[0].prompt
        if prompt is not None:
            self._users[prompt.digest] -= 1
            if not self._users[prompt.digest]:
                del self._users[prompt.digest]

    def step(self) -> Step:
        """Run one forward pass and report all that happened since the last step."""
        self._expire()
        self._warm()
        decoding = sum(sequence.phase == "decode" for sequence in self._scheduler.running)
        batch = self._scheduler.next_batch(min(self._pacer.prefill_tokens(decoding), self._passes.ceiling.tokens))
        if batch.chunks:
            decoding = sum(chunk.sequence.phase == "decode" for chunk in batch.chunks)
            prefilled = sum(chunk.count for chunk in batch.chunks) - decoding
            started_s = self._clock()
            for outcome in self._passes.run(batch, self._tensors):
                match outcome:
                    case Computed():
                        self._take(outcome)
                    case Failed(chunk, error):
                        self._blame(chunk, error)
                    case Skipped(chunk):
                        self._scheduler.abandon(chunk)
            self._pacer.learn(decoding, prefilled, self._clock() - started_s)
        self._release_unused()
        news, self._news = self._news, _News()
        return Step(news.outputs, news.scored, news.failures, self.stats(), news.prompts, news.registered)

    def stats(self) -> Stats:
        """The engine right now."""
        pool, block_bytes = self._prompts.pool, self._runner.cache.shape.block_bytes
        return Stats(
            waiting=self._scheduler.waiting,
            running=len(self._scheduler.running),
            max_running=self._scheduler.max_sequences,
            kv_bytes=pool.used * block_bytes,
            kv_budget_bytes=pool.blocks * block_bytes,
            prompts=len(self._prompts),
            prompt_bytes=self._prompts.held_blocks * block_bytes,
            tokens_generated=self._tokens_generated,
            preemptions=self._scheduler.preemptions,
        )

    def _sequence(self, command: Submit | Score) -> Sequence | None:
        prompt = None
        if command.soft_prompt is not None:
            prompt = self._prompts.get(command.soft_prompt)
            if prompt is None:
                message = f"soft prompt {command.soft_prompt[:12]} is not loaded; send the request again"
                self._news.failures.append(Failure(command.id, message))
                return None
        return Sequence(command.id, list(command.token_ids), command.task, prompt)

    def _accept(self, command: Submit | Score, work: Generation | Scoring) -> None:
        self._requests[command.id] = work
        if command.deadline_s is not None:
            self._deadlines[command.id] = self._clock() + command.deadline_s
        prompt = work.sequence.prompt
        if prompt is not None:
            self._users[prompt.digest] = self._users.get(prompt.digest, 0) + 1
        self._scheduler.add(work.sequence)

    def _expire(self) -> None:
        if self._deadlines:
            now = self._clock()
            for request_id in [name for name, deadline in self._deadlines.items() if deadline <= now]:
                self._fail(request_id, "the deadline passed before the answer was whole; allow more time", "deadline")

    def _warm(self) -> None:
        """Begin to compute the KV of pinned prompts; where there is no room for it, it is computed when it is used.

        A few at a time: those that are begun hold blocks that nothing can take back, and go before what requests need.
        """
        for digest in list(self._warming):
            if sum(sequence.remaining for sequence in self._scheduler.computing) >= self._pacer.most:
                return
            prompt = self._prompts.get(digest)
            if prompt is not None and not self._scheduler.compute(prompt):
                self._warmed(digest, None)

    def _warmed(self, digest: str, error: str | None) -> None:
        if digest in self._warming:
            del self._warming[digest]
            self._news.registered.append(Registered(digest, error, self.stats()))

    def _take(self, computed: Computed) -> None:
        """Make of a forward pass's logits what its chunks were computed for."""
        rows = computed.logits.rows
        generating: list[tuple[Answer, int]] = []
        for chunk, (begin, end) in zip(computed.chunks, computed.logits.spans, strict=True):
            sequence = chunk.sequence
            if sequence.phase == "ended":  # another chunk of the same request failed it
                self._scheduler.abandon(chunk)
                continue
            if end > begin and min(computed.highest[begin:end]) < 0:
                self._scheduler.abandon(chunk)
                self._fail(sequence.id, _NOT_FINITE)
                continue
            self._scheduler.advance(chunk)
            if sequence.computes is not None:
                if chunk.completes:
                    self._warmed(sequence.computes.digest, None)
                continue
            work = self._requests[sequence.id]
            try:
                if isinstance(work, Scoring):
                    self._take_scores(work, chunk, rows[begin:end])
                    continue
                if sequence.wants_all:
                    self._take_prompt_logprobs(work, chunk, rows[begin:end])
            except Exception as error:  # a token id that the vocabulary has not, memory: fails one request
                log.exception("the log-probabilities of %s could not be taken", sequence.id)
                self._fail(sequence.id, f"its log-probabilities could not be taken: {error}")
                continue
            if chunk.completes:
                generating += self._answers_at(work, sequence, end - 1)
        self._choose(generating, rows, computed.highest)
        for answer, _ in generating:  # the first answer's blocks, kept until the others had forked
            if answer.ended and answer.index == 0:
                self._scheduler.end(answer.sequence)

    def _blame(self, chunk: Chunk, error: Exception) -> None:
        """Fail whoever needs a chunk that cannot be computed."""
        sequence = chunk.sequence
        self._scheduler.abandon(chunk)
        log.error("forward pass failed for %s", sequence.id, exc_info=error)
        if sequence.computes is None:
            self._fail(sequence.id, f"the forward pass failed: {error}")
            return
        message = f"the soft prompt could not be computed: {error}"
        self._scheduler.end(sequence)
        if sequence.id in self._warming:  # whoever hears that this failed takes the prompt for unknown
            self._releasing.add(sequence.id)
        self._warmed(sequence.id, message)
        for request_id, work in list(self._requests.items()):
            if work.sequence.prompt is sequence.computes:
                self._fail(request_id, message)

    def _answers_at(self, work: Generation, sequence: Sequence, row: int) -> list[tuple[Answer, int]]:
        """The answers whose next token follows from a row of logits: all of them where the prompt has just ended."""
        if work.begun:
            return [(self._answers[sequence], row)]
        work.begun = True
        if work.command.max_tokens == 0:
            for answer in work.answers:
                self._finish(answer, "", [], [], "length")
            return []
        return [(answer, row) for answer in work.answers]

    def _choose(self, generating: list[tuple[Answer, int]], rows: Tensor, highest: list[int]) -> None:
        """The next token of each answer. Where choosing raises, each goes alone, so that only it fails."""
        plain = [(answer, row) for answer, row in generating if answer.sampling.plain]
        for answer, row in plain:
            self._append(answer, Choice(highest[row]))
        others = [(answer, row) for answer, row in generating if not answer.sampling.plain]
        if others:
            self._choose_among(others, rows)

    def _choose_among(self, generating: list[tuple[Answer, int]], rows: Tensor) -> None:
        try:
            choices = choose(rows[[row for _, row in generating]], [answer.sampling for answer, _ in generating])
        except Exception as error:  # as in Passes
            if len(generating) > 1:
                for one in generating:
                    self._choose_among([one], rows)
                return
            self._fail_choosing(generating[0][0].sequence.id, error)
            return
        for (answer, _), choice in zip(generating, choices, strict=True):
            self._append(answer, choice)

    def _append(self, answer: Answer, choice: Choice) -> None:
        if answer.ended or answer.sequence.id not in self._requests:  # failed with another answer of its request
            return
        try:
            self._take_token(answer, choice)
        except Exception as error:  # as in Passes: tokenizer and grammar are foreign code too
            self._fail_choosing(answer.sequence.id, error)

    def _fail_choosing(self, request_id: str, error: Exception) -> None:
        if isinstance(error, RequestError):  # a grammar that no text fits, or that grew too complex
            self._fail(request_id, str(error), "invalid")
            return
        log.error("no token could be chosen for %s", request_id, exc_info=error)
        self._fail(request_id, f"the next token could not be chosen or decoded: {error}")

    def _take_token(self, answer: Answer, choice: Choice) -> None:
        token = choice.token
        self._tokens_generated += 1
        answer.made += 1
        logprobs = [Logprob(token, choice.logprob, choice.top)] if choice.logprob is not None else []
        if answer.sampling.ends(token):
            self._finish(answer, answer.detokenizer.finish(), [token], logprobs, "stop")
            return
        answer.sampling.take(token)
        text = answer.detokenizer.add(token)
        if answer.detokenizer.stopped:
            self._finish(answer, text, [token], logprobs, "stop")
            return
        command = self._generation(answer).command
        sequence = answer.sequence
        full = sequence.before + len(command.token_ids) + answer.made >= self._base.context_length
        grammar = answer.sampling.grammar
        whole = grammar is not None and grammar.must_end
        if answer.made >= command.max_tokens or full or whole:
            text += answer.detokenizer.finish()
            reason = "stop" if answer.detokenizer.stopped or whole else "length"
            self._finish(answer, text, [token], logprobs, reason)
            return
        if answer.index > 0 and answer.made == 1:
            answer.sequence = self._scheduler.fork(sequence, [*command.token_ids, token])
            self._answers[answer.sequence] = answer
        else:
            sequence.token_ids.append(token)
        output = answer.report(text, [token], logprobs, None)
        if output is not None:
            self._news.outputs.append(output)

    def _generation(self, answer: Answer) -> Generation:
        work = self._requests[answer.sequence.id]
        assert isinstance(work, Generation)
        return work

    def _finish(self, answer: Answer, text: str, tokens: list[int], logprobs: list[Logprob], reason: str) -> None:
        output = answer.report(text, tokens, logprobs, reason)
        assert output is not None
        self._news.outputs.append(output)
        answer.ended = True
        work = self._generation(answer)
        if all(other.ended for other in work.answers):
            self.cancel(answer.sequence.id)
        elif answer.made > 1:
            self._scheduler.end(answer.sequence)

    def _take_prompt_logprobs(self, work: Generation, chunk: Chunk, rows: Tensor) -> None:
        """A position's logits speak of the next token; nothing speaks of the first."""
        command = work.command
        if work.prompt_logprobs is None:
            work.prompt_logprobs = [None] * len(command.token_ids)
        following = command.token_ids[chunk.start + 1 : chunk.start + 1 + chunk.count]
        found = logprobs_of(rows[: len(following)], following, command.prompt_logprobs or 0)
        work.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + len(found)] = found
        if chunk.completes:
            chunk.sequence.wants_all = False
            self._news.prompts.append(PromptScored(command.id, work.prompt_logprobs))

    def _take_scores(self, work: Scoring, chunk: Chunk, rows: Tensor) -> None:
        if chunk.branch is not None:
            place = work.places[id(chunk.branch)]
            targets = torch.tensor(work.continuations[place][1:], device=rows.device)
            work.totals[place] += float((rows.gather(1, targets[:, None])[:, 0] - rows.logsumexp(dim=-1)).sum())
            work.left -= 1
        elif chunk.completes and not work.begun:
            work.begun = True
            first = (rows[-1] - rows[-1].logsumexp(dim=-1)).tolist()
            for place, continuation in enumerate(work.continuations):
                work.totals[place] += first[continuation[0]]
        if work.begun and work.left == 0:
            if all(math.isfinite(total) for total in work.totals):
                self._news.scored.append(Scored(work.sequence.id, work.totals))
                self.cancel(work.sequence.id)
            else:
                self._fail(work.sequence.id, _NOT_FINITE)

    def _fail(self, request_id: str, message: str, kind: FailureKind = "failed") -> None:
        if request_id in self._requests:  # otherwise another of its answers failed it in the same step
            self._news.failures.append(Failure(request_id, message, kind))
            self.cancel(request_id)

    def _release_unused(self) -> None:
        for digest in [digest for digest in self._releasing if digest not in self._users]:
            self._releasing.discard(digest)
            prompt = self._prompts.get(digest)
            for sequence in list(self._scheduler.computing):
                if sequence.computes is prompt:
                    self._scheduler.end(sequence)
            self._warmed(digest, None)
            self._prompts.forget(digest)
            self._tensors.pop(digest, None)
