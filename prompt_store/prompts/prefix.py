"""A Prefix: keys and values that stand before every token in each layer, as prefix tuning learns them."""

from dataclasses import dataclass

from prompt_store.prompts.tensor_file import MAX_FILE_BYTES, Tensor, check_tensor

PREFIX_TENSOR_NAME = "prefix"
MAX_PREFIX_BYTES = MAX_FILE_BYTES


@dataclass(frozen=True)
class Prefix(Tensor):
    """A prefix [L, 2, KV heads, P, D]: the keys (0) and values (1) of every layer, as attention reads them.

    No rotary position is applied to the keys any more: what is stored has what training gave it.
    """

    shape: tuple[int, int, int, int, int]

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.shape[3]

    def check(self) -> None:
        """Raises InvalidArtifact for an unknown dtype, a wrong shape or size, or a value that is NaN or infinite."""
        check_tensor(self, "prefix", "L, 2, KV heads, P, D", "layer", MAX_PREFIX_BYTES)
