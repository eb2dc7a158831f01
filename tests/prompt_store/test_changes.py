from prompt_store.changes import ChangeWatcher
from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, publish, task


def test_the_log_names_every_write_in_order(empty_registry: Registry) -> None:
    empty_registry.register_base(BASE, ANNA)
    revision = empty_registry.apply_task(task(), ANNA)
    version = publish(empty_registry, alias="production").version
    changes = empty_registry.changes_since(0)
    assert [(change.sequence, change.kind, change.task, change.subject) for change in changes] == [
        (1, "base", None, BASE.fingerprint),
        (2, "task", "support_intents", revision.digest),
        (3, "version", "support_intents", version.digest),
        (4, "alias", "support_intents", "production"),
    ]
    assert {change.principal for change in changes} == {"anna"}
    assert empty_registry.changes_since(3) == changes[3:]
    assert empty_registry.changes_since(4) == []


def test_every_change_has_an_audit_entry(registry: Registry) -> None:
    publish(registry, alias="production")
    with registry.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT sequence, action, reason FROM audit ORDER BY sequence").all()
    assert [tuple(row) for row in rows] == [
        (1, "base.register", ""),
        (2, "task.apply", ""),
        (3, "version.publish", "because"),
        (4, "alias.move", "because"),
    ]


def test_a_watcher_sees_what_another_store_handle_wrote_once(registry: Registry) -> None:
    watcher = registry.watch()
    assert watcher.sequence == 2
    assert not watcher.poll()
    with Database.open(registry.database.path) as other:
        publish(Registry(other))
    assert watcher.poll()
    assert watcher.sequence == 3
    assert not watcher.poll()


def test_a_watcher_sees_what_its_own_store_handle_wrote(registry: Registry) -> None:
    watcher = ChangeWatcher(registry.database)
    publish(registry)
    assert watcher.poll()


def test_a_write_that_is_no_change_wakes_nobody(registry: Registry) -> None:
    watcher = registry.watch()
    registry.database.signing_key()
    assert not watcher.poll()


def test_each_watcher_has_its_own_memory(registry: Registry) -> None:
    watchers = [registry.watch(), registry.watch()]
    publish(registry)
    assert [watcher.poll() for watcher in watchers] == [True, True]
