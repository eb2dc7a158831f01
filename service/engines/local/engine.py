"""The engine's heart: takes commands, runs steps, reports what came of them. One thread, plain data in and out.

A step is: admit, schedule, run the forward pass, choose tokens, report. Whatever fails, fails one generation.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.detokenizer import Detokenizer, TextDecoder
from service.engines.local.kv_cache import PrefixStore
from service.engines.local.messages import Failure, Output, Register, Score, Scored, Stats, Step, Submit
from service.engines.local.model_runner import ModelRunner, load_weights
from service.engines.local.options import EngineOptions
from service.engines.local.sampler import RowSampling, choose
from service.engines.local.scheduler import Chunk, Scheduler, Sequence

log = logging.getLogger(__name__)

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(eq=False, slots=True)
class _Generation:
    """What a running `Submit` needs beside its place in the scheduler."""

    sequence: Sequence
    max_tokens: int
    sampling: RowSampling
    detokenizer: Detokenizer


@dataclass(eq=False, slots=True)
class _Scoring:
    sequence: Sequence
    continuations: list[list[int]]


@dataclass(slots=True)
class _News:
    outputs: list[Output] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class EngineCore:
    """Continuous batching over one model. Every request ends in an output with a finish reason, or a failure."""

    def __init__(self, runner: ModelRunner, options: EngineOptions) -> None:
        self._runner = runner
        self._base = runner.base
        self._decoder = TextDecoder(runner.base.tokenizer)
        self._scheduler = Scheduler(slots=runner.cache.slots, max_batch_tokens=options.max_batch_tokens)
        self._prefixes = PrefixStore(runner.compute_prefix, options.prefix_memory_bytes)
        self._work: dict[str, _Generation | _Scoring] = {}
        self._releasing: set[str] = set()
        self._news = _News()
        self._tokens_generated = 0

    @classmethod
    def load(cls, base: BaseModel, options: EngineOptions) -> EngineCore:
        """Load the weights, prove that they can be served exactly, and make room for KV within the budget."""
        torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))
        model = load_weights(base, device=options.device, attention_implementation="eager")
        runner = ModelRunner(base, model, slots=slots_within(base, options, model.dtype.itemsize))
        runner.probe()
        return cls(runner, options)

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._work) or bool(self._news.failures)

    def register(self, command: Register) -> None:
        """Know a soft prompt. Raises ValueError or RuntimeError when the model cannot take it."""
        if len(command.shape) != 2:
            raise ValueError(f"prompt has shape {list(command.shape)}; only soft prompts [P, H] are served")
        prompt = SoftPrompt(command.dtype, (command.shape[0], command.shape[1]), command.data)
        flat = torch.frombuffer(bytearray(prompt.data), dtype=_TORCH_DTYPES[prompt.dtype])
        embeddings = flat.reshape(prompt.shape).float()
        if embeddings.shape[1] != self._base.hidden_size:
            raise ValueError(
                f"soft prompt has H={embeddings.shape[1]} but base model '{self._base.name}' has "
                f"H={self._base.hidden_size}; retrain it on this base"
            )
        self._releasing.discard(command.digest)
        self._prefixes.register(command.digest, embeddings, pinned=command.pinned)

    def release(self, digest: str) -> None:
        """Forget a soft prompt as soon as no request that waits needs it."""
        self._releasing.add(digest)
        self._release_unused()

    def submit(self, command: Submit) -> None:
        """Queue a generation."""
        sequence = self._enqueue(command)
        if sequence is not None:
            sampling = RowSampling(command.choosing, command.token_ids, self._base.eos_token_ids)
            detokenizer = Detokenizer(self._decoder, tuple(command.stop), min_tokens=command.choosing.min_tokens)
            self._work[command.id] = _Generation(sequence, command.max_tokens, sampling, detokenizer)

    def score(self, command: Score) -> None:
        """Queue a score request."""
        sequence = self._enqueue(command)
        if sequence is not None:
            self._work[command.id] = _Scoring(sequence, command.continuations)

    def cancel(self, request_id: str) -> None:
        """End a request without news of it, and free what it held. Unknown ids are done already."""
        work = self._work.pop(request_id, None)
        if work is not None:
            if work.sequence.phase == "prefill":  # nobody has seen yet whether what it computed is finite
                self._runner.cache.clear(work.sequence.slot)
            self._scheduler.end(work.sequence)

    def step(self) -> Step:
        """Run one forward pass and report all that happened since the last step."""
        for sequence in self._scheduler.admit():
            self._place_prefix(sequence)
        chunks = self._scheduler.next_batch()
        if chunks:
            self._run(chunks)
        self._release_unused()
        news, self._news = self._news, _News()
        return Step(news.outputs, news.scored, news.failures, self.stats())

    def stats(self) -> Stats:
        """The engine right now."""
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            kv_slots=self._scheduler.slots,
            kv_slots_used=self._scheduler.slots_used,
            prefixes=len(self._prefixes),
            prefix_bytes=self._prefixes.size_bytes,
            tokens_generated=self._tokens_generated,
        )

    def _enqueue(self, command: Submit | Score) -> Sequence | None:
        length = 0
        if command.soft_prompt is not None:
            if not self._prefixes.knows(command.soft_prompt):
                self._fail(command.id, f"soft prompt {command.soft_prompt[:12]} is not loaded; send the request again")
                return None
            length = self._prefixes.length(command.soft_prompt)
        sequence = Sequence(command.id, list(command.token_ids), len(command.token_ids), command.soft_prompt, length)
        self._scheduler.add(sequence)
        return sequence

    def _place_prefix(self, sequence: Sequence) -> None:
        if sequence.prefix_digest is None:
            return
        try:
            self._runner.cache.place_prefix(sequence.slot, self._prefixes.prefix(sequence.prefix_digest))
        except Exception as error:  # as in _run
            log.exception("soft prompt %s failed", sequence.prefix_digest[:12])
            self._fail(sequence.id, f"the soft prompt could not be computed: {error}")

    def _run(self, chunks: list[Chunk]) -> None:
        """One forward pass; where it raises, each chunk runs alone, so that only the ones at fault fail."""
        chunks = [chunk for chunk in chunks if chunk.sequence.phase != "ended"]
        if not chunks:
            return
        try:
            logits = self._runner.run(chunks)
        except Exception as error:  # foreign code: whatever it raises fails one generation, not the engine
            if len(chunks) > 1:
                for chunk in chunks:
                    self._run([chunk])
                return
            log.exception("forward pass failed for %s", chunks[0].sequence.id)
            self._fail(chunks[0].sequence.id, f"the forward pass failed: {error}")
            return
        completed = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            self._scheduler.advance(chunk)
        self._continue(completed, logits)

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose the next token of every generation, and answer every score request, whose logits [R, V] these are."""
        finite = logits.isfinite().all(dim=-1).tolist()
        rows: list[int] = []
        generations: list[_Generation] = []
        for row, sequence in enumerate(sequences):
            work = self._work[sequence.id]
            if not finite[row]:
                self._fail(sequence.id, "the model's output is not finite for this prompt; check the version's tensor")
            elif isinstance(work, _Scoring):
                self._answer_score(work, logits[row])
            else:
                rows.append(row)
                generations.append(work)
        if not generations:
            return
        self._choose(generations, logits[rows])

    def _choose(self, generations: list[_Generation], logits: Tensor) -> None:
        """Append each generation's next token; where that raises, each row goes alone, so that only it fails."""
        try:
            choices = choose(logits, [generation.sampling for generation in generations])
        except Exception as error:  # as in _run
            if len(generations) > 1:
                for row, generation in enumerate(generations):
                    self._choose([generation], logits[row : row + 1])
                return
            log.exception("no token could be chosen for %s", generations[0].sequence.id)
            self._fail(generations[0].sequence.id, f"no token could be chosen: {error}")
            return
        for generation, choice in zip(generations, choices, strict=True):
            try:
                self._append(generation, choice.token)
            except Exception as error:  # as in _run: the tokenizer is foreign code too
                log.exception("token %d of %s could not be taken", choice.token, generation.sequence.id)
                self._fail(generation.sequence.id, f"its text could not be decoded: {error}")

    def _append(self, generation: _Generation, token: int) -> None:
        sequence = generation.sequence
        self._tokens_generated += 1
        made = len(sequence.token_ids) - sequence.prompt_tokens + 1
        if generation.sampling.ends(token):
            self._finish(generation, generation.detokenizer.finish(), [token], "stop")
            return
        generation.sampling.take(token)
        text = generation.detokenizer.add(token)
        if generation.detokenizer.stopped:
            self._finish(generation, text, [token], "stop")
            return
        sequence.token_ids.append(token)
        full = sequence.prefix_length + len(sequence.token_ids) >= self._base.context_length
        if made >= generation.max_tokens or full:
            text += generation.detokenizer.finish()
            self._finish(generation, text, [token], "stop" if generation.detokenizer.stopped else "length")
            return
        self._news.outputs.append(Output(sequence.id, text, [token]))

    def _finish(self, generation: _Generation, text: str, token_ids: list[int], reason: str) -> None:
        self._news.outputs.append(Output(generation.sequence.id, text, token_ids, reason))
        self.cancel(generation.sequence.id)

    def _answer_score(self, work: _Scoring, last_logits: Tensor) -> None:
        try:
            totals = self._runner.score(work.sequence, last_logits, work.continuations)
        except Exception as error:  # as in _run
            log.exception("scoring failed for %s", work.sequence.id)
            self._fail(work.sequence.id, f"the forward pass failed: {error}")
            return
        if not all(math.isfinite(total) for total in totals):
            self._fail(work.sequence.id, "the model's output is not finite for this prompt; check the version's tensor")
            return
        self._news.scored.append(Scored(work.sequence.id, totals))
        self.cancel(work.sequence.id)

    def _fail(self, request_id: str, message: str) -> None:
        work = self._work.get(request_id)
        if work is not None and work.sequence.slot >= 0:
            self._runner.cache.clear(work.sequence.slot)
        self._news.failures.append(Failure(request_id, message))
        self.cancel(request_id)

    def _release_unused(self) -> None:
        if self._releasing:
            waiting = {sequence.prefix_digest for sequence in self._scheduler.waiting}
            for digest in self._releasing - waiting:
                self._prefixes.release(digest)
            self._releasing &= waiting


def slots_within(base: BaseModel, options: EngineOptions, item_size_bytes: int) -> int:
    """Sequences that can run at once: as many as asked for, unless their KV would exceed the budget.

    Raises BaseModelError when not even one fits.
    """
    config = base.text_config
    heads = int(config.get("num_attention_heads") or config["n_head"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or base.hidden_size // heads)
    slot_bytes = 2 * base.layers * kv_heads * head_dim * base.context_length * item_size_bytes
    slots = min(options.max_sequences, options.kv_memory_bytes // slot_bytes)
    if slots < 1:
        raise BaseModelError(
            f"one sequence of '{base.name}' needs {slot_bytes:,} bytes of KV but the budget is "
            f"{options.kv_memory_bytes:,}; raise kv_memory_bytes"
        )
    return slots
