"""Model repositories of the Hugging Face hub, read as of one commit and written in one commit.

A token comes in by huggingface_hub's own ways only (HF_TOKEN, `hf auth login`) and goes into no message: of what the
hub answers, errors say the status alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from prompt_store.errors import Conflict, InvalidArtifact, InvalidName, StoreError, StoreUnavailable

SCHEME = "hf://"
MAX_REPOSITORY_FILES = 100_000

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_MOVED_ON = 412  # the status of a commit whose parent is not the newest any more


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository, `owner/repo`; `revision` is a branch, tag or commit, None for the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision is not None else "")


@dataclass(frozen=True)
class HubSnapshot:
    """A repository as of one commit. `sizes` are those of its files in bytes, `root` is where they are fetched to."""

    place: HubRepository
    commit: str
    sizes: dict[str, int]
    root: Path

    def fetch(self, wanted: Callable[[str], int | None]) -> None:
        """Downloads each file that `wanted` gives a limit in bytes for.

        Raises InvalidArtifact, before anything is downloaded, when one is larger.
        """
        names = []
        for name, size in self.sizes.items():
            limit = wanted(name)
            if limit is None:
                continue
            if size > limit:
                raise InvalidArtifact(
                    f"{self.place}: {name} is {size} bytes, more than the limit of {limit}; remove it there"
                )
            names.append(name)
        if names:
            with _explained(self.place):
                HfApi().snapshot_download(
                    self.place.repository, revision=self.commit, local_dir=self.root, allow_patterns=names
                )


def parse_repository(text: str) -> HubRepository:
    """Of `hf://owner/repo[@revision]`. Raises InvalidName."""
    repository, at, revision = text.removeprefix(SCHEME).partition("@")
    if not is_repository_id(repository) or (at and not revision):
        raise InvalidName(f"{text!r} names no model repository; write hf://owner/repo or hf://owner/repo@revision")
    return HubRepository(repository, revision if at else None)


def is_repository_id(text: str) -> bool:
    """Whether the hub could have a repository `owner/repo` of that name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def create_repository(place: HubRepository, *, public: bool) -> None:
    """Makes the repository where it is not there; one that is there stays as visible as it is."""
    with _explained(place):
        HfApi().create_repo(place.repository, private=not public, exist_ok=True)


def read_repository(place: HubRepository, root: Path) -> HubSnapshot:
    """The newest commit of the place's revision; `root` is made.

    Raises StoreError where it cannot be read, InvalidArtifact when it has too many files.
    """
    root.mkdir(parents=True)
    api = HfApi()
    sizes: dict[str, int] = {}
    with _explained(place):
        commit = api.repo_info(place.repository, revision=place.revision).sha
        assert commit is not None, "the hub names the commit of a revision"
        for entry in api.list_repo_tree(place.repository, revision=commit, recursive=True):
            if isinstance(entry, RepoFile):
                sizes[entry.path] = entry.size
            if len(sizes) > MAX_REPOSITORY_FILES:
                raise InvalidArtifact(f"{place}: has more than {MAX_REPOSITORY_FILES} files; split it up")
    return HubSnapshot(place, commit, sizes, root)


def commit(snapshot: HubSnapshot, names: Iterable[str], message: str) -> str:
    """Adds files that lie in the snapshot's root, all of them or none; returns the commit's address.

    Raises Conflict when somebody else committed since the snapshot was read.
    """
    operations = [CommitOperationAdd(name, snapshot.root / name) for name in sorted(names)]
    with _explained(snapshot.place):
        try:
            made = HfApi().create_commit(
                snapshot.place.repository,
                operations,
                commit_message=message,
                revision=snapshot.place.revision,
                parent_commit=snapshot.commit,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != _MOVED_ON:
                raise
            raise Conflict(
                f"{snapshot.place}: somebody else keeps committing to it; push again in a while", current=None
            ) from None
    return str(made.commit_url)


@contextmanager
def _explained(place: HubRepository) -> Iterator[None]:
    """What the hub and its client say becomes fact and remedy. Causes are dropped: they may quote what was sent."""
    try:
        yield
    except RevisionNotFoundError:
        raise StoreError(f"{place}: has no such revision; name a branch, tag or commit that it has") from None
    except GatedRepoError:
        raise StoreError(f"{place}: its owner grants access one by one; ask for it on the repository's page") from None
    except RepositoryNotFoundError:
        raise StoreError(
            f"{place}: is not there, or not for this account to see; check the name, and {_LOG_IN}"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise StoreError(
                f"{place}: the hub refuses this to this account (status {status}); {_LOG_IN} of an account and with a "
                "token that may do it"
            ) from None
        if status == 429 or status >= 500:
            raise StoreUnavailable(f"{place}: the hub is busy or failing (status {status}); try again later") from None
        raise StoreError(
            f"{place}: the hub refused the request (status {status}); check the name and try again"
        ) from None
    except (httpx2.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise StoreUnavailable(
            f"{place}: the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"{place}: a transfer failed ({type(error).__name__}); check free disk space, and try again"
        ) from None
