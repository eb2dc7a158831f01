"""What a process of remote engines alone loads, and how much memory of its own it takes.

Pages of files that it has mapped are the system's cache, and count for nobody.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BASE_FOLDER, ROOT

HIDDEN, VOCABULARY = 1024, 153_600
MATRIX_BYTES = 4 * HIDDEN * VOCABULARY
SCRIPT = """
import json, random, sys
from pathlib import Path
from service.engines.base_model import open_base_model
from service.engines.build import build_backends
from service.engines.remote.backend_settings import OpenAICompatibleSettings, VllmSettings
from service.engines.remote.embeddings import EmbeddingMatrix

base = open_base_model(sys.argv[1])
settings = {
    "vllm": VllmSettings(kind="vllm", urls=("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")),
    "openai": OpenAICompatibleSettings(kind="openai_compatible", url="http://127.0.0.1:3/v1", default_model="m"),
}
engines = build_backends(settings, {}, base=base)
matrix = EmbeddingMatrix.open(base)
draw = random.Random(1)
sent = [matrix.encode([draw.randrange(base.vocabulary_size) for _ in range(100)]) for _ in range(5)]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "engines": sorted(engines),
    "heavy": sorted({"torch", "transformers"} & set(sys.modules)),
    "own_bytes": int(status["RssAnon"].split()[0]) * 1024,
}))
"""


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose embeddings have 629 MB, of which the disk holds next to nothing."""
    folder = tmp_path_factory.mktemp("large")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE_FOLDER / file, folder)
    config = json.loads((BASE_FOLDER / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": HIDDEN, "vocab_size": VOCABULARY}))
    tensor = {"dtype": "F32", "shape": [VOCABULARY, HIDDEN], "data_offsets": [0, MATRIX_BYTES]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + MATRIX_BYTES)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: /proc/self/status is Linux's")
def test_remote_engines_load_no_torch_and_read_a_large_matrix_by_rows(large_base: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(large_base)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(result.stdout)
    assert found["engines"] == ["openai", "vllm"]
    assert found["heavy"] == []
    assert found["own_bytes"] < 400 * 10**6
