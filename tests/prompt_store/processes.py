"""What other processes do in the tests of concurrency, kills and migrations; importable, because they are spawned."""

from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from tests.prompt_store.building import ANNA, BASE, prompt


def publish_many(path: Path, start: Barrier, first_seed: int, count: int) -> None:
    with Database.open(path) as database:
        registry = Registry(database)
        start.wait()
        for seed in range(first_seed, first_seed + count):
            new = NewVersion("support_intents", prompt(seed), BASE.fingerprint)
            registry.publish(new, "candidate", f"seed {seed}", ANNA)


def open_at_once(path: Path, start: Barrier, answers: Connection) -> None:
    start.wait()
    with Database.open(path) as database:
        answers.send(database.signing_key())


def publish_large(path: Path, go: Event, done: Event, count: int) -> None:
    with Database.open(path) as database:
        registry = Registry(database)
        go.wait()
        for seed in range(count):
            new = NewVersion("large", prompt(seed, length=256, hidden_size=1024), "c3" * 32)
            registry.publish(new, "candidate", "", ANNA)
    done.set()


def publish_until_killed(path: Path, first_seed: int, acknowledged: Connection) -> None:
    with Database.open(path) as database:
        registry = Registry(database)
        seed = first_seed
        while True:
            new = NewVersion("support_intents", prompt(seed, length=60), BASE.fingerprint)
            acknowledged.send(registry.publish(new, "candidate", "", ANNA).version.digest)
            seed += 1


def open_with(path: Path, migrations: Path) -> None:
    Database.open(path, migrations=migrations).close()
