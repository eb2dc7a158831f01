"""From the journal to the store: in batches, behind everyone's back, until the store has each entry at least once.

A segment is deleted once the store has all of it. A process that dies in between leaves it, and it is shipped again
from its beginning: the store deduplicates.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from prompt_store.errors import SchemaMismatch, StoreError, StoreUnavailable
from prompt_store.ledger.entries import Entry
from service.ledger.journal import Journal, Segment
from service.ledger.records import Damage, Unknown, read_records

log = logging.getLogger(__name__)

# A batch takes the interpreter's lock, and where there is one processor that too, from requests for about half a
# millisecond: few notice a small one. Where small ones do not keep up, they grow.
_SMALLEST, _LARGEST = 64, 1024
_PAUSE_S = 0.005
_LONGEST_WAIT_S = 30.0
_ADOPT_EVERY_S = 60.0


class Shipper:
    """Ships a journal. `write` puts entries into the store, all of them or none, and blocks.

    While it raises StoreUnavailable or SchemaMismatch everything is kept, and tried again with growing patience. What
    else it raises is about an entry: the batch is halved until that one is alone, and set aside.

    Batches are small while that is enough, with a pause after each, because this thread takes time from requests;
    `largest` is how many entries one may have.
    """

    def __init__(
        self,
        journal: Journal,
        write: Callable[[Sequence[Entry]], object],
        *,
        every_s: float = 1.0,
        pause_s: float = _PAUSE_S,
        largest: int = _LARGEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._write = write
        self._every_s = every_s
        self._smallest, self._largest = min(_SMALLEST, largest), largest
        self._batch = self._smallest
        self._pause_s = pause_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="softcue-journal")
        self._closing = threading.Event()
        self._reading: tuple[Segment, Iterator[Entry | Unknown]] | None = None
        self._batches: list[list[Entry] | Unknown] = []  # what was read and not written, the next one last
        self._adopt_at = clock()
        self._again_at = clock()
        self._wait_s = 0.0
        self._ailing = False

    async def follow(self) -> None:
        """Ship what is appended until cancelled; a pass that is under way then ends in its thread."""
        while True:
            more = await asyncio.get_running_loop().run_in_executor(self._thread, self.ship)
            await asyncio.sleep(self._pause_s if more else self._every_s)

    def ship(self) -> bool:
        """One pass. Blocks for about as long as the time between two; returns whether more waits and can be shipped."""
        until = self._clock() + self._every_s
        more = False
        self._keep()
        try:
            if self._clock() >= self._again_at:
                more = self._ship(until)
                self._batch = min(2 * self._batch, self._largest) if more else self._smallest
                if self._wait_s:
                    log.warning("the journal can be shipped to the store again")
                self._wait_s = 0.0
        except Exception as error:  # whatever it is, the journal keeps all until it is over
            if not self._wait_s:
                expected = isinstance(error, StoreUnavailable | SchemaMismatch | OSError)
                log.warning(
                    "the journal cannot be shipped to the store, it is kept until it can: %s",
                    *(error,),
                    exc_info=None if expected else error,
                )
            self._wait_s = min(max(self._every_s, 2.0 * self._wait_s), _LONGEST_WAIT_S)
            self._again_at = self._clock() + self._wait_s
        return more

    def close(self, within_s: float) -> None:
        """Ship what is left, and close the journal. Blocks; what cannot be shipped in that time stays on the disk.

        Only after the last append. A write that is under way then holds the process up as long as the store lets it.
        """
        self._closing.set()
        until = self._clock() + within_s
        last = self._thread.submit(self._ship_last, until)
        self._thread.shutdown(wait=False)
        try:
            last.result(within_s)
        except TimeoutError:
            log.warning("the store does not answer: what the journal holds is shipped after the next start")
        except Exception as error:
            log.warning("the store does not take it, so the journal is shipped after the next start: %s", error)

    def _ship_last(self, until: float) -> None:
        try:
            self._journal.sync(seal=True)
            self._batch = self._largest  # no request waits any more
            if self._ship(until):
                log.warning("time is up: what the journal still holds is shipped after the next start")
        finally:
            self._journal.close()

    def _keep(self) -> None:
        """What the journal needs done, whether or not the store can be reached."""
        try:
            self._journal.mend()
            self._journal.sync()
            if self._clock() >= self._adopt_at:
                self._adopt_at = self._clock() + _ADOPT_EVERY_S
                self._journal.adopt()
        except OSError as error:
            if not self._ailing:
                log.error("the journal's disk is at fault, see that it has space and may be written: %s", error)
            self._ailing = True
        else:
            self._ailing = False

    def _ship(self, until: float) -> bool:
        """Write batches until none is left, or time is up: returns whether it was."""
        while self._batches or self._read():
            if self._batches:
                self._write_next()
                if self._clock() >= until:
                    return True
                self._closing.wait(self._pause_s)
        return False

    def _read(self) -> bool:
        """Read a batch, or be done with a segment. False where there is none."""
        if self._reading is None:
            segment = self._journal.oldest()
            if segment is None:
                return False
            self._reading = segment, self._readable(segment, _data(segment))
        segment, readable = self._reading
        parts = list(islice(readable, self._batch))
        entries = [part for part in parts if not isinstance(part, Unknown)]
        self._batches = [part for part in parts if isinstance(part, Unknown)]
        if entries:
            self._batches.append(entries)
        if not parts:
            self._reading = None
            self._journal.discard(segment)
        return True

    def _readable(self, segment: Segment, data: bytes) -> Iterator[Entry | Unknown]:
        for part in read_records(data):
            if isinstance(part, Damage):
                self._journal.damaged += 1
                log.warning("%s: %d bytes from %d hold no whole record", segment.path, part.size_bytes, part.offset)
            else:
                yield part

    def _write_next(self) -> None:
        batch = self._batches[-1]
        if isinstance(batch, Unknown):
            self._set_aside(batch, "this release does not know its kind")
        else:
            try:
                self._write(batch)
            except (StoreUnavailable, SchemaMismatch):
                raise
            except Exception as error:
                if len(batch) > 1:
                    half = len(batch) // 2
                    self._batches[-1:] = [batch[half:], batch[:half]]
                    return
                # What is not the store's own may quote the entry.
                self._set_aside(batch[0], str(error) if isinstance(error, StoreError) else type(error).__name__)
        self._batches.pop()

    def _set_aside(self, entry: Entry | Unknown, reason: str) -> None:
        self._journal.set_aside(entry, reason)
        log.error("an entry of the journal was set aside, in refused.jsonl beside it: %s", reason)


def _data(segment: Segment) -> bytes:
    try:
        return segment.path.read_bytes()
    except FileNotFoundError:
        log.error("%d bytes are lost: %s was deleted before the store had them", segment.size_bytes, segment.path)
        return b""
