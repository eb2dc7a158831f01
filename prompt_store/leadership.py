"""One leader among all processes that share a store, for what only one of them should do at a time.

A leader that was cut off may believe for a moment that it still leads. So whoever leads asks again before each step,
and takes each step by compare-and-set.
"""

from types import TracebackType
from typing import Self

from prompt_store.database import Database


class Leadership:
    """The role of that name; nobody has it until they ask. Close it before the database.

    It ends with its process, however that ends, and with its connection where the store is a server: then whoever asks
    next has it.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._lead = database.lead(name)

    def held(self) -> bool:
        """Whether this process leads now. Blocks for the moment that asking takes.

        Raises StoreUnavailable where the store cannot say: then it does not lead.
        """
        with self._database.checked():
            return self._lead.held()

    def close(self) -> None:
        """Lets another lead; safe to call twice."""
        self._lead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
