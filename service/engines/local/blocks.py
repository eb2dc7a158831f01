"""Which KV block belongs to whom: a pool of counted blocks, and the prompts whose KV is kept in it. Pure Python.

A block holds BLOCK_TOKENS positions of every layer, or as many as the attention in use wants. Sequences that stand
behind the same prompt share the blocks that it fills; the block that it fills in part is copied. Prompts are keyed by
their tensor's digest, never by a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK_TOKENS = 16


def blocks_for(positions: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks that so many positions take."""
    return -(-positions // block_tokens)


class BlockPool:
    """Counts who uses each block; a block that nobody uses is free. The last freed is taken first: it is still warm."""

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(reversed(range(blocks)))
        self._users = [0] * blocks

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.blocks - len(self._free)

    def blocks_for(self, positions: int) -> int:
        """Blocks that so many positions take."""
        return blocks_for(positions, self.block_tokens)

    def take(self, count: int) -> list[int]:
        """Take free blocks; there must be as many."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """Count one more user of each block."""
        for block in blocks:
            assert self._users[block] > 0, f"block {block} is free"
            self._users[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        """Count one user less of each block; without any it is free."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was given back twice"
            if self._users[block] == 0:
                self._free.append(block)


@dataclass(eq=False, slots=True)
class CachedPrompt:
    """A prompt of `length` positions: it has blocks from when its KV is begun, and is `ready` when it is whole."""

    digest: str
    length: int
    blocks: list[int] = field(default_factory=list)
    ready: bool = False
    pinned: bool = False
    users: int = 0


@dataclass(slots=True)
class PromptCache:
    """Known prompts, and the KV of those in use: kept until room is needed, pinned ones longest.

    `held_blocks` are those of all prompts, the length is how many are whole: counted, because every step asks.
    Whatever goes is computed again when it is asked for. A prompt that a running sequence uses never goes.
    """

    pool: BlockPool
    _prompts: dict[str, CachedPrompt] = field(default_factory=dict)
    held_blocks: int = 0
    _held: OrderedDict[str, CachedPrompt] = field(default_factory=OrderedDict)
    _whole: int = 0

    def register(self, digest: str, length: int, *, pinned: bool) -> CachedPrompt:
        """Know a prompt. Registering again may pin it."""
        prompt = self._prompts.setdefault(digest, CachedPrompt(digest, length))
        prompt.pinned |= pinned
        return prompt

    def forget(self, digest: str) -> None:
        """Forget a prompt that no sequence uses. Unknown ones are forgotten already."""
        prompt = self._prompts.pop(digest, None)
        if prompt is not None:
            assert prompt.users == 0, f"prompt {digest[:12]} is in use"
            self.drop(prompt)

    def get(self, digest: str) -> CachedPrompt | None:
        return self._prompts.get(digest)

    def begin(self, prompt: CachedPrompt) -> bool:
        """Take the blocks for a prompt's KV. False where there is no room."""
        assert not prompt.blocks
        wanted = self.pool.blocks_for(prompt.length)
        if not self.make_room(wanted):
            return False
        prompt.blocks = self.pool.take(wanted)
        self._held[prompt.digest] = prompt
        self.held_blocks += wanted
        return True

    def complete(self, prompt: CachedPrompt) -> None:
        """Note that a prompt's KV is whole."""
        assert prompt.blocks, f"prompt {prompt.digest[:12]} was not begun"
        prompt.ready = True
        self._whole += 1

    def use(self, prompt: CachedPrompt) -> None:
        """Count one more sequence that stands behind a prompt, and remember when."""
        prompt.users += 1
        if prompt.digest in self._held:
            self._held.move_to_end(prompt.digest)

    def leave(self, prompt: CachedPrompt) -> None:
        """Count one sequence less."""
        prompt.users -= 1
        assert prompt.users >= 0, f"prompt {prompt.digest[:12]} was left twice"

    def drop(self, prompt: CachedPrompt) -> None:
        """Let a prompt's KV go."""
        self._held.pop(prompt.digest, None)
        self.held_blocks -= len(prompt.blocks)
        self._whole -= prompt.ready
        self.pool.give_back(prompt.blocks)
        prompt.blocks, prompt.ready = [], False

    def make_room(self, blocks: int) -> bool:
        """Drop prompts that nobody uses until so many blocks are free. Else False, and nothing dropped."""
        if self.pool.free >= blocks:
            return True
        idle = [prompt for prompt in self._held.values() if prompt.users == 0 and prompt.ready]
        if self.pool.free + sum(len(prompt.blocks) for prompt in idle) < blocks:
            return False
        for prompt in sorted(idle, key=lambda prompt: prompt.pinned):  # stable: the least recently used first
            if self.pool.free >= blocks:
                break
            self.drop(prompt)
        return True

    def cached(self) -> Iterator[CachedPrompt]:
        """The prompts whose KV is in memory."""
        return (prompt for prompt in self._held.values() if prompt.ready)

    def __len__(self) -> int:
        return self._whole
