"""Why a training run stops.

TrainingError
├── RecipeError           the recipe file cannot be used
├── DatasetError          examples that cannot be used, each named by file, line and reason
├── ConditionError        a condition on captured traffic that cannot be read, or that asks for what is not known
├── InitialisationError   the prompt cannot start as asked
├── CheckpointError       a checkpoint that cannot be resumed
├── CalibrationError      no threshold can be found, or the service that is asked does not answer
└── Diverged              the loss stopped being a number
"""

from __future__ import annotations


class TrainingError(Exception):
    """Base of training errors; the message gives the fact and the remedy."""


class RecipeError(TrainingError):
    """The recipe cannot be used."""


class DatasetError(TrainingError):
    """Examples that cannot be used."""


class ConditionError(TrainingError):
    """A condition on captured traffic cannot be used."""


class InitialisationError(TrainingError):
    """The soft prompt cannot start as the recipe asks."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be resumed."""


class CalibrationError(TrainingError):
    """A cascade's threshold cannot be found."""


class Diverged(TrainingError):
    """The loss is not a finite number any more."""
