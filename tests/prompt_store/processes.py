"""What other processes do in the tests of concurrency, kills and migrations; importable, because they are spawned."""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import event, update

from prompt_store.database import Database
from prompt_store.errors import Conflict
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.leadership import Leadership
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.tables import tasks
from tests.prompt_store.building import ANNA, BASE, prompt, publish


def publish_many(location: str, start: Barrier, first_seed: int, count: int) -> None:
    with Database.open(location) as database:
        registry = Registry(database)
        start.wait()
        for seed in range(first_seed, first_seed + count):
            new = NewVersion("support_intents", prompt(seed), BASE.fingerprint)
            registry.publish(new, "candidate", f"seed {seed}", ANNA)


def publish_and_move(location: str, start: Barrier, number: int, count: int) -> None:
    """Publishes under the alias, then points it back at the first version, each as often as told."""
    with Database.open(location) as database:
        registry = Registry(database)
        start.wait()
        for turn in range(count):
            new = NewVersion("support_intents", prompt(number * count + turn), BASE.fingerprint)
            registry.publish(new, "candidate", f"{number} {turn}", ANNA)
            registry.move_alias("support_intents", "candidate", "v1", reason="back", principal=ANNA)


def move_as_expected(location: str, start: Barrier, number: int, count: int, lost: Connection) -> None:
    """Moves the alias on from where it points, again until nobody was first; sends how often somebody was."""
    losses = 0
    with Database.open(location) as database:
        registry = Registry(database)
        start.wait()
        for _ in range(count):
            while True:
                (alias,) = registry.aliases("support_intents")
                target = f"v{1 + (alias.number + number) % (registry.versions('support_intents')[0].number)}"
                try:
                    registry.move_alias(
                        "support_intents",
                        "production",
                        target,
                        expected=alias.version,
                        reason=f"from {alias.version}",
                        principal=ANNA,
                    )
                except Conflict:
                    losses += 1
                else:
                    break
    lost.send(losses)


def hold_a_write(location: str, inside: Event, go: Event) -> None:
    """Stays within a writing transaction until it may go on to its commit."""
    with Database.open(location) as database, database.write() as connection:
        connection.execute(update(tasks).values(last_version=tasks.c.last_version + 1000))
        inside.set()
        go.wait()


def open_at_once(location: str, start: Barrier, answers: Connection) -> None:
    start.wait()
    with Database.open(location) as database:
        answers.send(database.signing_key())


def publish_large(location: str, go: Event, done: Event, count: int) -> None:
    with Database.open(location) as database:
        registry = Registry(database)
        go.wait()
        for seed in range(count):
            new = NewVersion("large", prompt(seed, length=256, hidden_size=1024), "c3" * 32)
            registry.publish(new, "candidate", "", ANNA)
    done.set()


def publish_until_statement(location: str, last: int) -> None:
    """Publishes one version under an alias, and kills itself once so many statements have been executed."""
    executed = 0

    def count(*_: Any) -> None:
        nonlocal executed
        executed += 1
        if executed == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with Database.open(location) as database:
        event.listen(database.storage.engine, "after_cursor_execute", count)
        publish(Registry(database), seed=1, alias="candidate")


def publish_until_killed(location: str, first_seed: int, acknowledged: Connection) -> None:
    with Database.open(location) as database:
        registry = Registry(database)
        seed = first_seed
        while True:
            # Quickly made, so that most of the time goes into publishing it.
            content = SoftPrompt.from_float32(np.full((256, 1024), seed, np.float32))
            new = NewVersion("large", content, "c3" * 32)
            acknowledged.send(registry.publish(new, "candidate", "", ANNA).version.digest)
            seed += 1


def open_with(location: str, migrations: Path, backups: Path) -> None:
    Database.open(location, migrations=migrations, backups=backups).close()


def publish_when_asked(location: str, asked: Connection, tell: Connection) -> None:
    """Publishes each seed that it receives and answers with the moment of the commit, until it receives None."""
    with Database.open(location) as database:
        registry = Registry(database)
        while (seed := asked.recv()) is not None:
            publish(registry, seed=seed)
            tell.send(time.monotonic())


def lead_when_asked(location: str, asked: Connection, tell: Connection) -> None:
    """Says whether it leads as often as it is asked, until it receives None."""
    with Database.open(location) as database, Leadership(database, "decisions") as leadership:
        while asked.recv() is not None:
            tell.send(leadership.held())


def finished(children: Sequence[BaseProcess], *, timeout_s: float = 60.0) -> None:
    """Waits for processes that are to end well, and ends those that do not."""
    until_s = time.monotonic() + timeout_s
    for child in children:
        child.join(max(0.0, until_s - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        if child.exitcode is None:
            child.kill()
            child.join()
    assert codes == [0] * len(codes)


def start_at_once(location: str, start: Barrier, document: dict[str, Any], answer: Connection) -> None:
    """Starts an experiment when all others do; answers whether it did."""
    with Database.open(location) as database:
        registry = Registry(database)
        start.wait()
        try:
            registry.start_experiment(parse_experiment(document), ANNA)
        except Conflict:
            answer.send(False)
        else:
            answer.send(True)
