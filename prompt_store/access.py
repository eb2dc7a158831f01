"""Who asks. Every request and every written row carries a Principal, even while there are no keys yet.

API keys and their scopes will live here too; the audit trail is written by `changes.record`.
"""

import getpass
import os
from dataclasses import dataclass, field

ADMIN_SCOPE = "admin"
FORCE_ARM_SCOPE = "force_arm"


@dataclass(frozen=True, slots=True)
class Principal:
    """An owner of requests and rows: `name` is written down, `scopes` say what it may do."""

    name: str
    scopes: frozenset[str] = field(default_factory=frozenset)


ANONYMOUS = Principal("anonymous")


def command_line_principal() -> Principal:
    """The operating-system user at this terminal, as `cli:<user>`, with every scope."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no name.
        user = f"uid-{os.getuid()}"
    return Principal(f"cli:{user}", frozenset({ADMIN_SCOPE}))
