"""The base models that are measured: Llama shapes with random weights, made once under build/bench/."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig

CONTEXT_LENGTH = 1024
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
BUILD_FOLDER = Path(__file__).parents[2] / "build" / "bench"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocabulary_size: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    tied: bool = True

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of every linear that a decode step runs, in order, the output head last."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = hidden // self.heads * self.kv_heads
        layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
        return [*layer * self.layers, (self.vocabulary_size, hidden)]


SHAPES = {
    "8m": Shape("8m", 288, 6, 6, 6, 768, 4096),
    "115m": Shape("115m", 576, 30, 9, 3, 1536, 16384),
}


def make_base(shape: Shape, device: str = "cpu") -> Path:
    """The folder of a base model of this shape; made on a CPU, the weights are the same on every machine.

    Its tokenizer gives every token id a word of its own, so that each token of a stream is seen.
    """
    folder = BUILD_FOLDER / f"base-{shape.name}"
    made = folder / "shape.json"
    described = json.dumps(asdict(shape))
    if made.is_file() and made.read_text("utf-8") == described:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocabulary_size,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    words = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), shape.vocabulary_size))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(names, SPECIAL_TOKENS, strict=True))}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    made.write_text(described, "utf-8")
    return folder
