"""Why a request cannot be routed.

RoutingError
├── NotServed         the name is legal but nothing here serves it
├── WrongTaskKind     the task is of another kind than the endpoint needs
└── UnknownGeneration a generation id that this service did not sign
"""

from __future__ import annotations


class RoutingError(Exception):
    """Base of routing errors; the message gives the fact and the remedy."""


class NotServed(RoutingError):
    """A legal name that no backend here serves."""


class WrongTaskKind(RoutingError):
    """The task's kind does not fit the endpoint."""


class UnknownGeneration(RoutingError):
    """A generation id whose signature does not verify."""
