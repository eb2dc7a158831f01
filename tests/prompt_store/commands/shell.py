"""The store's commands as somebody at a shell runs them, in this process."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from prompt_store.commands import app
from prompt_store.prompts.artifact import Artifact, write_artifact
from tests.prompt_store.building import BASE, prompt


class Shell:
    """`softcue prompts` on one store; files are made in `folder`. `context` is the object of the commands' context."""

    commands = app

    def __init__(self, folder: Path, store: str, context: object = None) -> None:
        self.folder = folder
        self.store = store
        self.context = context

    def invoke(self, *arguments: str) -> Result:
        return CliRunner().invoke(self.commands, [*arguments, "--store", self.store], obj=self.context)

    def run(self, *arguments: str) -> str:
        """What a command that succeeds prints, which is all on stdout."""
        result = self.invoke(*arguments)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def fail(self, *arguments: str) -> str:
        """The one line on stderr of a command that is refused, with --json or without."""
        lines = set()
        for more in ([], ["--json"]):
            result = self.invoke(*arguments, *more)
            assert result.exit_code == 1, result.output
            assert result.stdout == ""
            lines.add(result.stderr)
        (text,) = lines
        (line,) = text.splitlines()
        return str(line)

    def misuse(self, *arguments: str) -> str:
        """What a command says whose arguments contradict each other, without the frame around it."""
        result = self.invoke(*arguments)
        assert result.exit_code == 2, result.output
        return " ".join(result.stderr.replace("│", " ").split())

    def artifact(self, seed: int, **fields: Any) -> str:
        path = self.folder / f"{seed}.safetensors"
        write_artifact(path, Artifact(prompt(seed), **fields))
        return str(path)

    def publish(self, *seeds: int) -> None:
        """Publishes soft prompts for the first base, one version a seed."""
        for seed in seeds:
            self.run("publish", "support_intents", self.artifact(seed, base_fingerprint=BASE.fingerprint))
