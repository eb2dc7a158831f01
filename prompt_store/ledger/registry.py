"""The registry's half that the ledger uses: taking entries in, adding up, exporting, erasing.

Each method but `forget` is one transaction. Every method may raise StoreUnavailable.
"""

from collections.abc import Iterator, Sequence

from sqlalchemy.exc import ProgrammingError

from prompt_store.access import Principal
from prompt_store.errors import StoreUnavailable
from prompt_store.experiments.registry import ExperimentRegistry
from prompt_store.ledger import analysis, erasing, writing
from prompt_store.ledger.analysis import Missing
from prompt_store.ledger.captured import CapturedRow, read_captured
from prompt_store.ledger.entries import Entry
from prompt_store.ledger.erasing import Erased, Forgotten
from prompt_store.ledger.health import health
from prompt_store.ledger.sums import ExperimentSums, MinuteHealth
from prompt_store.prompts.revisions import require_task


class LedgerRegistry(ExperimentRegistry):
    """Threads may share one."""

    def add_entries(self, entries: Sequence[Entry]) -> None:
        """Takes entries in, all of them or none; those that are there already change nothing.

        What is at fault in an entry itself is raised as it is.
        """
        try:
            with self.database.write(announced=False) as connection:
                writing.add_entries(connection, entries)
        except ProgrammingError as error:
            raise StoreUnavailable(
                f"the store cannot take the ledger in: {error.orig}; see that its tables are as migrations left them"
            ) from error

    def experiment_sums(
        self, name: str, task: str, metrics: Sequence[str], *, missing: Missing, started_ms: int
    ) -> ExperimentSums:
        """All that a report needs of an experiment; see `analysis.experiment_sums`."""
        with self.database.read() as connection:
            return analysis.experiment_sums(connection, name, task, metrics, missing=missing, started_ms=started_ms)

    def health(self, name: str, since_ms: int) -> list[MinuteHealth]:
        """An experiment's arms by minute, since then."""
        with self.database.read() as connection:
            return health(connection, name, since_ms)

    def captured(self, task: str) -> Iterator[CapturedRow]:
        """A task's captured requests whose time is not over, oldest first, as of one moment. Raises UnknownTask."""
        with self.database.read() as connection:
            require_task(connection, task)
            yield from read_captured(connection, task, self._now_ms())

    def erase_unit(self, unit_hash: str, principal: Principal) -> Erased:
        """Removes what a unit left, now and where a journal still holds it."""
        with self.database.write() as connection:
            return erasing.erase_unit(connection, unit_hash, principal, self._now())

    def forget(self, before_ms: int) -> Forgotten:
        """Removes exposures, answers and outcomes from before then, and captures whose time is over, in slices."""
        return erasing.forget(self.database, before_ms, self._now_ms())

    def _now_ms(self) -> int:
        return round(self._now().timestamp() * 1000)
