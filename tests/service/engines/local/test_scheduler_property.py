"""The scheduler driven at random over a memory that remembers what was written where.

Each cell of each block holds the prompt or token whose KV would be there, so a block that is lost, shared with a writer
or copied wrongly shows as a sequence that would see another's past.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engines.local.blocks import BLOCK_TOKENS, BlockPool, PromptCache, blocks_for
from service.engines.local.scheduler import Batch, Chunk, Scheduler, Sequence

CONTEXT = 64
FEWEST_BLOCKS = blocks_for(CONTEXT) + 2  # as `model_runner.blocks_within` demands
PROMPTS = {"p": 5, "q": 16, "r": 30}
TASKS = ("", "a", "b")


@dataclass(eq=False)
class Work:
    """A request: `answers` are its sequences, each with the tokens it is still to make."""

    answers: dict[Sequence, int]
    forks: list[int] = field(default_factory=list)
    branches: int = 0
    digest: str | None = None


class Driven(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(FEWEST_BLOCKS, 16),
        sequences=st.integers(1, 5),
        budget=st.sampled_from([1, 3, 17, 40, 200]),
    )
    def start(self, blocks: int, sequences: int, budget: int) -> None:
        self.pool = BlockPool(blocks)
        self.prompts = PromptCache(self.pool)
        for digest, length in PROMPTS.items():
            self.prompts.register(digest, length, pinned=digest == "q")
        self.scheduler = Scheduler(self.prompts, max_sequences=sequences, max_batch_tokens=budget)
        self.memory: list[list[Any]] = [[None] * BLOCK_TOKENS for _ in range(blocks)]
        self.requests: list[Work] = []
        self.fresh = 0

    def tokens(self, count: int) -> list[int]:
        """Tokens that no other sequence has."""
        self.fresh += count
        return list(range(self.fresh - count, self.fresh))

    @rule(
        digest=st.sampled_from([None, *PROMPTS]),
        length=st.integers(1, 24),
        new=st.lists(st.integers(1, 20), min_size=1, max_size=4),
        task=st.sampled_from(TASKS),
    )
    def generate(self, digest: str | None, length: int, new: list[int], task: str) -> None:
        if len(self.requests) < 12:
            prompt = self.prompts.get(digest) if digest is not None else None
            sequence = Sequence(f"g{self.fresh}", self.tokens(length), task, prompt)
            most = CONTEXT - sequence.before - length
            first, *others = (min(count, most) for count in new)
            self.requests.append(Work({sequence: first}, others, digest=digest))
            self.scheduler.add(sequence)

    @rule(
        digest=st.sampled_from([None, *PROMPTS]),
        length=st.integers(1, 20),
        branches=st.lists(st.integers(1, 14), max_size=5),
        task=st.sampled_from(TASKS),
    )
    def score(self, digest: str | None, length: int, branches: list[int], task: str) -> None:
        if len(self.requests) < 12:
            prompt = self.prompts.get(digest) if digest is not None else None
            sequence = Sequence(f"s{self.fresh}", self.tokens(length), task, prompt)
            sequence.branches = [self.tokens(count) for count in branches]
            self.requests.append(Work({sequence: 0}, branches=len(branches), digest=digest))
            self.scheduler.add(sequence)

    @rule(prefill=st.sampled_from([1, 8, 1000]), failing=st.integers(0, 12))
    def step(self, prefill: int, failing: int = 12) -> None:
        """A step in which the chunk at `failing` cannot be computed, if there is one."""
        work = bool(self.scheduler.waiting or self.scheduler.running or self.scheduler.computing)
        batch = self.scheduler.next_batch(prefill)
        assert bool(batch.chunks) == work, "no progress"
        self.write(batch)
        for place, chunk in enumerate(batch.chunks):
            if place == failing or chunk.sequence.phase == "ended":
                self.scheduler.abandon(chunk)
                self.fail(chunk.sequence)
            else:
                self.scheduler.advance(chunk)
                self.take(chunk)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.scheduler.preempt(data.draw(st.sampled_from(self.scheduler.running)))

    @rule(digest=st.sampled_from(list(PROMPTS)))
    def warm(self, digest: str) -> None:
        prompt = self.prompts.get(digest)
        assert prompt is not None
        self.scheduler.compute(prompt)

    @rule(digest=st.sampled_from(list(PROMPTS)))
    def forget(self, digest: str) -> None:
        """As the engine does: where no request needs it, and after whoever computes it has ended."""
        if all(work.digest != digest for work in self.requests):
            for sequence in list(self.scheduler.computing):
                if sequence.id == digest:
                    self.scheduler.end(sequence)
            self.prompts.forget(digest)
            self.prompts.register(digest, PROMPTS[digest], pinned=digest == "q")

    @invariant()
    def every_block_is_counted(self) -> None:
        held = {block for sequence in self.scheduler.running for block in sequence.blocks}
        for digest in PROMPTS:
            prompt = self.prompts.get(digest)
            assert prompt is not None
            held.update(prompt.blocks)
        assert self.pool.used == len(held) <= self.pool.blocks
        assert len(self.scheduler.running) <= self.scheduler.max_sequences

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for _ in range(4000):
            if not (self.requests or self.scheduler.computing):
                break
            self.step(1000)
        assert not self.requests, "the work never came to an end"
        assert (self.scheduler.waiting, self.scheduler.running) == (0, [])
        assert self.pool.used == self.prompts.held_blocks
        for digest in PROMPTS:
            self.prompts.forget(digest)
        assert self.pool.used == 0

    def write(self, batch: Batch) -> None:
        """The forward pass: copies, then all writes, then what each chunk sees."""
        copied = [list(self.memory[source]) for source, _ in batch.copies]
        for (_, target), cells in zip(batch.copies, copied, strict=True):
            self.memory[target] = cells
        writers: dict[int, Chunk] = {}
        for chunk in batch.chunks:
            history = self.history(chunk)
            for position in range(chunk.past, chunk.past + chunk.count):
                block = chunk.blocks[position // BLOCK_TOKENS]
                assert writers.setdefault(block, chunk) is chunk, "two sequences write into one block"
                self.memory[block][position % BLOCK_TOKENS] = history[position]
        for chunk in batch.chunks:
            seen = [
                self.memory[chunk.blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]
                for position in range(chunk.past + chunk.count)
            ]
            assert seen == self.history(chunk), f"{chunk.sequence.id} sees another's past"

    def history(self, chunk: Chunk) -> list[Any]:
        """What a chunk's last token must see."""
        sequence = chunk.sequence
        if sequence.computes is not None:
            return [(sequence.id, position) for position in range(chunk.start + chunk.count)]
        prompt = sequence.prompt
        before = [(prompt.digest, position) for position in range(prompt.length)] if prompt is not None else []
        if chunk.branch is not None:
            return [*before, *sequence.token_ids[: chunk.start], *chunk.branch]
        return [*before, *sequence.token_ids[: chunk.start + chunk.count]]

    def take(self, chunk: Chunk) -> None:
        """What the engine does with a chunk that was computed."""
        sequence = chunk.sequence
        if sequence.computes is not None:
            return
        work = next(work for work in self.requests if sequence in work.answers)
        if sequence.id.startswith("s"):
            work.branches -= chunk.branch is not None
            if work.branches == 0 and sequence.phase in ("score", "decode"):
                self.end(work)
            return
        if not chunk.completes:
            return
        forks, work.forks = work.forks, []
        for count in forks:
            if count > 1:
                child = self.scheduler.fork(sequence, [*sequence.token_ids, *self.tokens(1)])
                work.answers[child] = count - 1
        work.answers[sequence] -= 1
        sequence.token_ids += self.tokens(1)
        if work.answers[sequence] == 0:
            self.scheduler.end(sequence)
            del work.answers[sequence]
        if not work.answers:
            self.requests.remove(work)

    def fail(self, sequence: Sequence) -> None:
        if sequence.computes is not None:
            self.scheduler.end(sequence)
            for work in [work for work in self.requests if work.digest == sequence.id]:
                if all(answer.phase == "waiting" for answer in work.answers):
                    self.end(work)
            return
        for work in [work for work in self.requests if sequence in work.answers]:
            self.end(work)

    def end(self, work: Work) -> None:
        for sequence in work.answers:
            self.scheduler.end(sequence)
        self.requests.remove(work)


TestDriven = Driven.TestCase
TestDriven.settings = settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True)
