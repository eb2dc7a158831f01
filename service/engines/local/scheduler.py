"""Who runs in the next forward pass. Pure Python: knows sequences, KV blocks and a token budget, no tensors.

A sequence waits, gets KV blocks, prefills in chunks, then decodes a token a step until it ends. Decoding sequences go
first, so that a long prompt never stalls the streams of others. Tasks share by virtual token counters: whoever was
served least comes next (Sheng et al. 2024, arXiv:2401.00588). Where blocks run out, the sequence that was admitted last
gives its own back and waits again; what it has made so far is kept and its KV computed anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from service.engines.local.blocks import BlockPool, CachedPrompt, PromptCache

Phase = Literal["waiting", "prefill", "decode", "score", "ended"]
Wanted = Literal["nothing", "last", "all"]


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer, score request, or prompt whose KV is computed (`computes`).

    `token_ids` holds the prompt's text and grows with what is generated; `computed` counts those of them whose KV is
    in `blocks`, which begin with the blocks that the soft prompt before them fills. `branches` are continuations that
    are still to be scored, each on its own after the text.
    """

    id: str
    token_ids: list[int]
    task: str = ""
    prompt: CachedPrompt | None = None
    computes: CachedPrompt | None = None
    wants_all: bool = False
    branches: list[list[int]] = field(default_factory=list)
    phase: Phase = "waiting"
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    shared: bool = False  # whether `prompt.users` counts this sequence

    @property
    def length(self) -> int:
        """Tokens that must have been computed before the next one can be chosen."""
        return self.computes.length if self.computes is not None else len(self.token_ids)

    @property
    def before(self) -> int:
        """Positions of the soft prompt that stands before the tokens."""
        return self.prompt.length if self.prompt is not None else 0

    @property
    def remaining(self) -> int:
        return self.length - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence from `start` on, to be computed in the next forward pass over `blocks`.

    A `branch` stands in for the sequence's own tokens: its KV goes to blocks that are given back after the pass.
    """

    sequence: Sequence
    start: int
    count: int
    blocks: list[int]
    branch: list[int] | None = None

    @property
    def past(self) -> int:
        """The position of the first token."""
        return self.sequence.before + self.start

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after this chunk."""
        return self.branch is None and self.start + self.count == self.sequence.length

    @property
    def wanted(self) -> Wanted:
        """Whose logits are needed."""
        if self.sequence.computes is not None:
            return "nothing"
        if self.branch is not None or self.sequence.wants_all:
            return "all"
        return "last" if self.completes else "nothing"


@dataclass(slots=True)
class Batch:
    """The chunks of a forward pass, and the blocks to copy before it, (from, to) each."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Queue:
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0
    served: int = 0


class Scheduler:
    """Admission, blocks and the token budget of a step."""

    def __init__(self, prompts: PromptCache, *, max_sequences: int, max_batch_tokens: int) -> None:
        self.prompts = prompts
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.running: list[Sequence] = []
        self.computing: list[Sequence] = []
        self.preemptions = 0
        self._queues: dict[str, _Queue] = {}
        self._copies: list[tuple[int, int]] = []

    @property
    def waiting(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    @property
    def _pool(self) -> BlockPool:
        return self.prompts.pool

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Let a sequence wait, behind the others of its task or before them."""
        queue = self._queues.get(sequence.task)
        if queue is None:
            # Whoever comes anew starts level with the least served: absence saves nothing up.
            served = min((other.served for other in self._queues.values()), default=0)
            queue = self._queues[sequence.task] = _Queue(served=served)
        if first:
            queue.waiting.appendleft(sequence)
        else:
            queue.waiting.append(sequence)

    def compute(self, prompt: CachedPrompt) -> bool:
        """Begin to compute a prompt's KV unless it is there or under way. False where there is no room for it."""
        if prompt.ready or prompt.blocks:
            return True
        if not self.prompts.begin(prompt):
            return False
        self.computing.append(Sequence(prompt.digest, [], computes=prompt, blocks=prompt.blocks, phase="prefill"))
        return True

    def fork(self, sequence: Sequence, token_ids: list[int]) -> Sequence:
        """Another answer to a prompt that is computed: it shares the full blocks, and copies the one in use.

        Where there is no room for it, it waits and computes the prompt anew.
        """
        child = Sequence(sequence.id, token_ids, sequence.task, sequence.prompt)
        positions = sequence.before + sequence.computed
        full, rest = positions // self._pool.block_tokens, positions % self._pool.block_tokens
        if len(self.running) >= self.max_sequences or not self.prompts.make_room(1):
            self.add(child, first=True)
            return child
        self._stand_behind(child)
        child.blocks = sequence.blocks[:full]
        self._pool.share(child.blocks)
        if rest:
            own = self._pool.take(1)
            self._copies.append((sequence.blocks[full], own[0]))
            child.blocks = child.blocks + own
        child.computed, child.phase = sequence.computed, "decode"
        self._run(child)
        return child

    def next_batch(self, prefill_tokens: int) -> Batch:
        """The next forward pass: every decoding sequence, then so many tokens of prefill in whoever's turn it is."""
        self._secure_decoding()
        self._admit()
        decoding = [sequence for sequence in self.running if sequence.phase == "decode"]
        chunks = [Chunk(sequence, sequence.computed, 1, sequence.blocks) for sequence in decoding]
        budget = max(min(prefill_tokens, self.max_batch_tokens - len(decoding)), 1)
        others = [sequence for sequence in self.running if sequence.phase != "decode"]
        others.sort(key=lambda sequence: self._queues[sequence.task].served)  # stable: first come within a task
        for sequence in [*self.computing, *others]:
            if budget <= 0:
                break
            if sequence.phase == "waiting":  # it was preempted for the branches of one before it
                continue
            if sequence.phase == "score":
                budget = self._add_branches(chunks, sequence, budget)
                continue
            count = min(sequence.remaining, budget)
            chunks.append(Chunk(sequence, sequence.computed, count, sequence.blocks))
            budget -= count
        copies, self._copies = self._copies, []
        return Batch(chunks, copies)

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk was computed."""
        sequence = chunk.sequence
        queue = self._queues.get(sequence.task)
        if queue is not None and sequence.computes is None:
            queue.served += chunk.count
        if chunk.branch is not None:
            self._pool.give_back(chunk.blocks)
            return
        sequence.computed += chunk.count
        if not chunk.completes:
            return
        if sequence.computes is not None:
            self.prompts.complete(sequence.computes)
            sequence.phase = "ended"
            self.computing.remove(sequence)
        else:
            sequence.phase = "score" if sequence.branches else "decode"

    def abandon(self, chunk: Chunk) -> None:
        """Record that a chunk was not computed after all."""
        if chunk.branch is not None:
            chunk.sequence.branches.insert(0, chunk.branch)
            self._pool.give_back(chunk.blocks)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks. Ending twice changes nothing."""
        if sequence.phase == "ended":
            return
        if sequence.computes is not None:
            self.computing.remove(sequence)
            self.prompts.drop(sequence.computes)
        elif sequence.phase == "waiting":
            self._queues[sequence.task].waiting.remove(sequence)
            self._leave(sequence)
        else:
            self._stop(sequence)
        sequence.phase = "ended"
        self._forget_idle(sequence.task)

    def preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks and let it wait as the first of its task."""
        self.preemptions += 1
        self._stop(sequence)
        sequence.computed, sequence.phase = 0, "waiting"
        self.add(sequence, first=True)

    def _secure_decoding(self) -> None:
        """Give every decoding sequence the block for its next token, the earliest first; the latest make room."""
        for sequence in list(self.running):
            while (
                sequence.phase == "decode"
                and len(sequence.blocks) * self._pool.block_tokens < sequence.before + sequence.length
            ):
                if self._make_room(1, sequence):
                    sequence.blocks = sequence.blocks + self._pool.take(1)
                else:
                    self.preempt(self.running[-1])

    def _admit(self) -> None:
        """Let waiting sequences run: the first of the task that was served least, as long as there is room."""
        passed: set[str] = set()
        while len(self.running) < self.max_sequences:
            heads = [
                (queue.served + queue.running, task)  # those that run count: their tokens are not made yet
                for task, queue in self._queues.items()
                if queue.waiting and task not in passed
            ]
            if not heads:
                return
            _, task = min(heads)
            sequence = self._queues[task].waiting[0]
            ready = self._make_ready(sequence)
            if ready is None:
                return
            if not ready:
                passed.add(task)
                continue
            self._queues[task].waiting.popleft()
            sequence.phase = "prefill"
            self._run(sequence)

    def _make_ready(self, sequence: Sequence) -> bool | None:
        """Take the blocks for a sequence's tokens. False while its prompt is computed, None where there is no room."""
        prompt = sequence.prompt
        own = self._pool.blocks_for(sequence.before + sequence.length) - sequence.before // self._pool.block_tokens
        self._stand_behind(sequence)
        if prompt is not None and not prompt.ready:
            if prompt.blocks or self._make_room(self._pool.blocks_for(prompt.length), sequence):
                return False if self.compute(prompt) else None
            return None
        if not self._make_room(own, sequence):
            return None
        taken = self._pool.take(own)
        sequence.blocks = taken
        if prompt is not None:
            full = prompt.blocks[: prompt.length // self._pool.block_tokens]
            self._pool.share(full)
            sequence.blocks = full + taken
            if len(full) < len(prompt.blocks):
                self._copies.append((prompt.blocks[-1], taken[0]))
        return True

    def _make_room(self, blocks: int, sequence: Sequence) -> bool:
        """Make room for a sequence. Where no other runs, those that wait must let go of their prompts too."""
        if self.prompts.make_room(blocks):
            return True
        if self.computing or any(other is not sequence for other in self.running):
            return False
        for queue in self._queues.values():
            for other in queue.waiting:
                if other is not sequence:
                    self._leave(other)
        return self.prompts.make_room(blocks)

    def _add_branches(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Add as many of a sequence's branches as budget and room allow, at least one where there is room for it."""
        positions = sequence.before + sequence.computed
        full, rest = positions // self._pool.block_tokens, positions % self._pool.block_tokens
        while sequence.branches and budget > 0:
            branch = sequence.branches[0]
            wanted = self._pool.blocks_for(positions + len(branch)) - full
            if not self._make_room(wanted, sequence):
                if not chunks and self.running[-1] is not sequence:
                    self.preempt(self.running[-1])
                    continue
                break
            own = self._pool.take(wanted)
            shared = sequence.blocks[:full]
            self._pool.share(shared)
            if rest:
                self._copies.append((sequence.blocks[full], own[0]))
            chunks.append(Chunk(sequence, sequence.computed, len(branch), shared + own, branch))
            sequence.branches.pop(0)
            budget -= len(branch)
        return budget

    def _stand_behind(self, sequence: Sequence) -> None:
        if sequence.prompt is not None and not sequence.shared:
            self.prompts.use(sequence.prompt)
            sequence.shared = True

    def _leave(self, sequence: Sequence) -> None:
        if sequence.prompt is not None and sequence.shared:
            self.prompts.leave(sequence.prompt)
            sequence.shared = False

    def _run(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        self._queues.setdefault(sequence.task, _Queue()).running += 1

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._queues[sequence.task].running -= 1
        self._copies = [pair for pair in self._copies if pair[1] not in sequence.blocks]
        self._pool.give_back(sequence.blocks)
        sequence.blocks = []
        self._leave(sequence)

    def _forget_idle(self, task: str) -> None:
        queue = self._queues.get(task)
        if queue is not None and not queue.waiting and not queue.running:
            del self._queues[task]
