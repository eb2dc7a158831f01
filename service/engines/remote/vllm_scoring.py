"""Labels' exact log-probabilities from vLLM, by asking at each place of their trie what may come next.

One call brings the `max_logprobs` most probable tokens at many places. A token that is not among them is asked for in a
call that allows no other: its log-probability is reported as it was before the others were masked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from service.engines.collecting import all_or_none
from service.engines.errors import ProviderMisbehaved
from service.engines.remote.connection import Reply
from service.engines.remote.label_trie import LabelTrie, Path
from service.engines.remote.vllm_wire import Input, next_logprobs, scoring_fields

Post = Callable[[Callable[[], dict[str, Any]], int], Awaitable[Reply]]
"""Sends the fields that a function makes, which take about so many bytes."""

_MOST_BYTES_A_CALL = 32 * 2**20
_MOST_PROMPTS_A_CALL = 256
_CALLS_AT_ONCE = 4

Known = dict[Path, dict[int, float]]


class LabelScorer:
    """For one prompt, whose token ids stand before each label's. At most a few calls run at once."""

    def __init__(self, post: Post, asked: Input, token_ids: Sequence[int], max_logprobs: int) -> None:
        self._post = post
        self._input = asked
        self._token_ids = token_ids
        self._max_logprobs = max_logprobs
        self._turns = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def score(self, labels: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """The natural logarithm of each label's probability, a label being all of its tokens. Raises EngineErrors."""
        trie = LabelTrie(labels)
        root, *others = trie.inner()
        known = await self._ask([root])  # alone, so that vLLM has the prompt's KV when it is asked for the others
        for found in await all_or_none(map(self._ask, self._calls(others))):
            known |= found
        missing = (
            (token, paths) for token, all_paths in trie.missing(known).items() for paths in self._calls(all_paths)
        )
        for found in await all_or_none(self._ask(paths, only=token) for token, paths in missing):
            for path, logprobs in found.items():
                known[path] |= logprobs
        return trie.totals(known)

    async def _ask(self, paths: Sequence[Path], only: int | None = None) -> Known:
        """What may come behind each of these, one call for all of them."""
        prompts = [[*self._token_ids, *path] for path in paths]
        size_bytes = sum(self._input.size_bytes(len(prompt)) for prompt in prompts)
        async with self._turns:
            reply = await self._post(
                lambda: self._input.fields(prompts) | scoring_fields(self._max_logprobs, only), size_bytes
            )
        found = next_logprobs(reply.document, len(paths), reply.request_id)
        if only is not None and any(only not in logprobs for logprobs in found):
            raise ProviderMisbehaved(
                "vLLM left out the log-probability of a token that it was asked for", request_id=reply.request_id
            )
        return dict(zip(paths, found, strict=True))

    def _calls(self, paths: Iterable[Path]) -> list[list[Path]]:
        """Paths by the calls that ask about them, none of which is too large."""
        calls: list[list[Path]] = []
        size_bytes = 0
        for path in paths:
            more = self._input.size_bytes(len(self._token_ids) + len(path))
            if not calls or size_bytes + more > _MOST_BYTES_A_CALL or len(calls[-1]) >= _MOST_PROMPTS_A_CALL:
                calls.append([])
                size_bytes = 0
            calls[-1].append(path)
            size_bytes += more
        return calls
