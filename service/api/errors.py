"""What HTTP alone refuses; `answers.STATUS` says how.

ApiError
├── BodyTooLarge            over the limit of its kind of body
├── InvalidBody             not what its content type promises; .parameter names the field
├── UnknownParameter        a query parameter that the handler does not take; .parameter names it
├── InvalidCondition        If-Match or If-None-Match that nothing here can have
├── PreconditionRequired    an alias, a route or an experiment changed by somebody who does not say what he expects
├── PreconditionFailed      an alias, a route or an experiment that is not what was expected
├── Forbidden               what the caller's key does not allow
├── InvalidOutcomes         outcomes of which none was taken, as something is wrong; .parameter is the first place
├── UnknownBackend          a backend that this service does not have
└── UnknownReplica          an address that a backend does not have
"""

from __future__ import annotations


class ApiError(Exception):
    """`str(error)` gives fact and remedy, fit to show."""


class BodyTooLarge(ApiError):
    pass


class InvalidBody(ApiError):
    def __init__(self, message: str, parameter: str | None) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnknownParameter(ApiError):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class InvalidCondition(ApiError):
    pass


class PreconditionRequired(ApiError):
    pass


class PreconditionFailed(ApiError):
    pass


class Forbidden(ApiError):
    pass


class InvalidOutcomes(ApiError):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnknownBackend(ApiError):
    pass


class UnknownReplica(ApiError):
    pass
