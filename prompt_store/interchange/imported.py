"""What an import brings, whichever format it came in."""

from dataclasses import dataclass, field

from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.version import Provenance


@dataclass(frozen=True)
class Imported:
    """A prompt and what its file says about it; None or empty where it says nothing.

    `format` is for people, such as "PEFT P_TUNING". `note` says what was evaluated, folded or converted on the way in,
    for the version's notes; `notes` are those that the file already has. `base_name` is what the file calls its base.
    """

    prompt: SoftPrompt | Prefix
    format: str
    note: str = ""
    base_name: str | None = None
    task: str | None = None
    base_fingerprint: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    notes: str = ""
