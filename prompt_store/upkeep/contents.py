"""Checking content: tensors, task revisions and versions against their digests and against each other.

And what is said of versions and of the backends that answer with them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row, select

from prompt_store.errors import SchemaMismatch
from prompt_store.prompts.lookup import to_version
from prompt_store.prompts.soft_prompt import tensor_digest
from prompt_store.prompts.task import Task
from prompt_store.prompts.version import EnsemblePayload, PromptVersion, payload_base, payload_tensors, version_digest
from prompt_store.routing.backends import to_backend
from prompt_store.routing.calibrations import Calibration
from prompt_store.tables import backends, bases, calibrations, task_revisions, tasks, tensors, versions
from prompt_store.upkeep.problems import RESTORE, Checked, Damage, Problem, Reader, refused_document


def check_tensors(reader: Reader, checked: Checked) -> Iterator[Problem]:
    """Hashes every tensor, one in memory at a time."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for version, held in reader.tensors.items():
        for tensor in held.values():
            owners[tensor].add(version)
    digests = [row.digest for row in reader.rows(select(tensors.c.digest).order_by(tensors.c.digest))]
    for digest in digests:
        fault = _tensor_fault(reader, digest, checked)
        if fault is not None:
            having = reader.labels(owners[digest])
            remedy = _republish(having) if having else "`softcue prompts gc` removes it"
            yield Problem("damaged", f"tensor {digest[:12]}", fault, remedy, having)
    for digest in sorted(owners.keys() - set(digests)):
        having = reader.labels(owners[digest])
        text = f"it is gone, and {', '.join(having)} need it"
        yield Problem("missing", f"tensor {digest[:12]}", text, _republish(having), having)


def check_tasks(reader: Reader, checked: Checked) -> Iterator[Problem]:
    """Every revision against its digest, and every task's current one."""
    known = {row.name: row.current_revision for row in reader.rows(select(tasks.c.name, tasks.c.current_revision))}
    checked.tasks += len(known)
    numbers: set[tuple[str, int]] = set()
    for digest in [
        row.digest for row in reader.rows(select(task_revisions.c.digest).order_by(task_revisions.c.digest))
    ]:
        task = reader.revisions.get(digest)
        where = f"revision {digest[:12]}" + (f" of task {task!r}" if task is not None else "")
        checked.revisions += 1
        try:
            row = reader.row(select(task_revisions).where(task_revisions.c.digest == digest))
            if row is None:
                raise Damage("its row is not found by its digest")
            document = Task.model_validate_json(row.document)
        except Damage as error:
            yield Problem("damaged", where, f"the database cannot read it ({error})", RESTORE)
            continue
        except ValidationError as error:
            yield refused_document(where, "its document", error)
            continue
        if row.task not in known:
            yield Problem("missing", where, "there is no such task", RESTORE)
        if document.digest != digest:
            yield Problem("damaged", where, "its document no longer has its digest", RESTORE)
        elif document.name != row.task:
            yield Problem("contradictory", where, f"its document is of task {document.name!r}", RESTORE)
        if (row.task, row.number) in numbers:
            yield Problem("contradictory", where, f"another revision has its number {row.number} too", RESTORE)
        numbers.add((row.task, row.number))
    for name, current in sorted(known.items()):
        if reader.revisions.get(current) != name:
            message = f"its current revision {current[:12]} is not there"
            yield Problem("missing", f"task {name!r}", message, f"{RESTORE}, or apply the task again")


def check_versions(reader: Reader, checked: Checked) -> Iterator[Problem]:
    """Every version against its digest, its columns, and what it refers to."""
    last = {row.name: row.last_version for row in reader.rows(select(tasks.c.name, tasks.c.last_version))}
    fingerprints = {row.fingerprint for row in reader.rows(select(bases.c.fingerprint))}
    digests = [row.digest for row in reader.rows(select(versions.c.digest).order_by(versions.c.digest))]
    numbers: set[tuple[str, int]] = set()
    for digest in digests:
        checked.versions += 1
        try:
            row = reader.row(select(versions).where(versions.c.digest == digest))
            if row is None:
                raise Damage("its row is not found by its digest")
        except Damage as error:
            yield Problem("damaged", f"version {digest[:12]}", f"the database cannot read it ({error})", RESTORE)
            continue
        where = f"{row.task}@v{row.number}"
        faults = [*_version_faults(reader, row, fingerprints)]
        if row.number > last.get(row.task, 0):
            text = f"its number is above {last.get(row.task, 0)}, the last that the task gave"
            faults.append(Problem("contradictory", where, text, RESTORE))
        if (row.task, row.number) in numbers:
            faults.append(Problem("contradictory", where, "another version has its number too", RESTORE))
        numbers.add((row.task, row.number))
        yield from faults


def check_calibrations(reader: Reader, _: Checked) -> Iterator[Problem]:
    """Every calibration can be read, and is of the version and measure that its row names."""
    for row in reader.rows(select(calibrations).order_by(calibrations.c.version, calibrations.c.measure)):
        having = reader.labels([row.version])
        where = f"calibration of {', '.join(having)} for {row.measure}"
        try:
            found = Calibration.model_validate_json(row.document)
        except ValidationError as error:
            yield refused_document(where, "its document", error)
            continue
        if (found.version, found.measure) != (row.version, row.measure):
            text = f"its document is of version {found.version[:12]} and {found.measure}"
            yield Problem("contradictory", where, text, f"{RESTORE}, or calibrate it again")


def check_backends(reader: Reader, _: Checked) -> Iterator[Problem]:
    """Every backend's description can be read, and is of the name that its row gives."""
    for row in reader.rows(select(backends).order_by(backends.c.name)):
        where = f"backend {row.name!r}"
        try:
            found = to_backend(row.name, row.document)
        except SchemaMismatch as error:
            yield refused_document(where, "its description", error.__cause__)
            continue
        if (found.name, found.kind) != (row.name, row.kind):
            text = f"its description is of {found.name!r}, of kind {found.kind!r}"
            yield Problem("contradictory", where, text, "start the service that runs it again")


def _republish(versions: Sequence[str]) -> str:
    # They have the tensor in common, so one publication puts it right for all of them.
    return f"{RESTORE}, or publish the prompt of {' or '.join(versions)} again, which puts it right"


def _tensor_fault(reader: Reader, digest: str, checked: Checked) -> str | None:
    """What is wrong with a tensor, None when it is whole."""
    try:
        row = reader.row(select(tensors).where(tensors.c.digest == digest))
        if row is None:
            raise Damage("its row is not found by its digest")
    except Damage as error:
        return f"the database cannot read it ({error})"
    checked.tensors += 1
    checked.size_bytes += len(row.data)
    try:
        found = tensor_digest(row.dtype, tuple(json.loads(row.shape)), bytes(row.data))
    except (ValueError, TypeError):
        return f"its shape {row.shape!r} cannot be read"
    if found != digest:
        return "its dtype, shape and bytes no longer have its digest"
    if row.size_bytes != len(row.data):
        return f"it has {len(row.data)} bytes, and its row says {row.size_bytes}"
    return None


def _version_faults(reader: Reader, row: Row[Any], fingerprints: set[str]) -> Iterator[Problem]:
    where = f"{row.task}@v{row.number}"
    if reader.revisions.get(row.task_revision) != row.task:
        text = f"the revision {row.task_revision[:12]} of its task that it answers is not there"
        yield Problem("missing", where, text, RESTORE, (where,))
    try:
        version = to_version(row)
    except (SchemaMismatch, TypeError) as error:
        yield refused_document(where, "its payload or what is written beside it", error.__cause__, (where,))
        return
    if version_digest(row.task_revision, version.payload) != row.digest:
        text = f"its payload and task revision no longer have its digest {row.digest[:12]}"
        yield Problem("damaged", where, text, RESTORE, (where,))
        return
    if row.kind != version.payload.kind:
        text = f"its row says it is of kind {row.kind!r}, its payload {version.payload.kind!r}"
        yield Problem("contradictory", where, text, RESTORE, (where,))
    base = payload_base(version.payload)
    if row.base_fingerprint != base:
        text = f"its row names base {_short(row.base_fingerprint)}, its payload {_short(base)}"
        yield Problem("contradictory", where, text, RESTORE, (where,))
    if base is not None and base not in fingerprints:
        yield Problem("missing", where, f"its base {_short(base)} is not registered", RESTORE, (where,))
    if reader.tensors.get(row.digest, {}) != payload_tensors(version.payload):
        text = "the tensors that are stored for it are not those of its payload"
        yield Problem("contradictory", where, text, RESTORE, (where,))
    yield from _member_faults(reader, version)


def _member_faults(reader: Reader, version: PromptVersion) -> Iterator[Problem]:
    if not isinstance(version.payload, EnsemblePayload):
        return
    where = f"{version.task}@{version.label}"
    for member in version.payload.members:
        if reader.numbers.get(member, ("", 0))[0] != version.task:
            text = f"its member {member[:12]} is not there"
            yield Problem("missing", where, text, f"{RESTORE}, or publish that member again", (where,))


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
