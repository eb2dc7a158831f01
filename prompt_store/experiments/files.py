"""Experiments as TOML, read with the line of everything that is wrong.

name = "shorter_answers"
task = "support_intents"
control = "long"
metric = "accuracy"

[[arms]]
name = "long"                      # the task's route as it is
weight = 0.5

[[arms]]
name = "short"
weight = 0.5
version = "candidate"              # or route = "cheap", a part by its name, or a table

[parts.cheap]
backend = "local"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_store.errors import InvalidExperiment, Place, RouteProblem
from prompt_store.experiments.experiment import Experiment, parse_experiment
from prompt_store.routing.files import LARGEST_FILE_BYTES, Expansion
from prompt_store.routing.toml_lines import lines_of, located, read_toml


@dataclass(frozen=True)
class ExperimentFile:
    """The experiment that a file declares, and where in it what is declared."""

    path: Path
    experiment: Experiment
    _lines: Mapping[Place, int]
    _sources: Mapping[Place, Place]

    def located(self, error: InvalidExperiment) -> InvalidExperiment:
        """What is wrong with the experiment, as the store says it, with the file's lines."""
        return InvalidExperiment.of(located(self.path, error.problems, self._lines, self._sources))


def load_experiment(path: Path) -> ExperimentFile:
    """Raises InvalidExperiment with every problem, each with file and line."""
    document, text = read_toml(path, LARGEST_FILE_BYTES, InvalidExperiment)
    problems: list[RouteProblem] = []
    sources: dict[Place, Place] = {}
    whole = _expanded(document, problems, sources)
    try:
        experiment = parse_experiment(whole)
    except InvalidExperiment as error:
        problems += error.problems or [RouteProblem((), str(error))]
    lines = lines_of(text)
    if problems:
        raise InvalidExperiment.of(located(path, problems, lines, sources))
    return ExperimentFile(path, experiment, lines, sources)


def _expanded(document: dict[str, Any], problems: list[RouteProblem], sources: dict[Place, Place]) -> dict[str, Any]:
    """The document with its parts in the place of their names; what is wrong with them is added to `problems`."""
    whole = dict(document)
    parts = whole.pop("parts", {})
    if not isinstance(parts, dict):
        problems.append(RouteProblem(("parts",), "is no table; write [parts.NAME] for each part"))
        parts = {}
    expansion = Expansion(("parts",), parts, problems, sources)
    if isinstance(whole.get("arms"), list):
        places = [("arms", index, "route") for index in range(len(whole["arms"]))]
        whole["arms"] = [
            {**arm, "route": expansion.expand(arm["route"], place, place)}
            if isinstance(arm, dict) and "route" in arm
            else arm
            for place, arm in zip(places, whole["arms"], strict=True)
        ]
    if not problems:
        problems += [
            RouteProblem(("parts", name), "no arm uses this part; name it there, or remove it")
            for name in parts
            if name not in expansion.used
        ]
    return whole
