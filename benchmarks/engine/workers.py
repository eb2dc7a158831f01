"""Peers that are libraries, each in a process of its own: `python -m benchmarks.engine.workers NAME BASE`.

Reads lines of questions, `[[text, prompt], ...]`, and answers each with a line of tokens and seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.engine.workload import NEW_TOKENS, PROMPT_LENGTH, PROMPTS, TEXT_TOKENS, soft_prompts

Asked = list[tuple[list[int], int]]
Answer = Callable[[Asked], int]
Worker = tuple[Answer, PreTrainedModel]
_CUDA_ATTENTIONS = ("flash_attention_3", "flash_attention_2", "sdpa")  # the best first
_GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def peft(base: Path) -> Worker:
    """`PeftModel.generate`, one question after another, switching to its adapter."""
    from peft import PromptTuningConfig, get_peft_model

    model = _load(base, "sdpa")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_LENGTH)
    tuned = get_peft_model(model, config, adapter_name="0")
    for index, prompt in enumerate(soft_prompts(PROMPTS, model.config.hidden_size)):
        if index:
            tuned.add_adapter(str(index), config)
        tuned.prompt_encoder[str(index)].embedding.weight.data = prompt

    def answer(asked: Asked) -> int:
        made = 0
        for text, prompt in asked:
            tuned.set_adapter(str(prompt))
            ids = torch.tensor([text])
            output = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=_GREEDY)
            made += output.shape[1] - len(text)
        return made

    return answer, model


def transformers(base: Path) -> Worker:
    """Continuous batching of transformers, see `_batching`."""
    model = _load(base, "sdpa")
    return _batching(model), model


def transformers_cuda(base: Path) -> Worker:
    """The same on a CUDA device in bfloat16, with the first of its attentions that works on this machine."""
    failed = []
    for attention in _CUDA_ATTENTIONS:
        try:
            return _tried(base, attention)
        except Exception as error:  # whatever a package raises that is not there, or not for this device
            failed.append(f"{attention}: {error}")
            print(f"transformers does not run with {attention}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()
    raise SystemExit("; ".join(failed))


def _tried(base: Path, attention: str) -> Worker:
    model = _load(base, attention, dtype=torch.bfloat16, device="cuda")
    answer = _batching(model, auto_switch_to_flash=False)
    if answer([([5] * TEXT_TOKENS, 0)]) != NEW_TOKENS:
        raise RuntimeError("it did not make what it was asked for")
    return answer, model


def _batching(model: PreTrainedModel, **settings: bool) -> Answer:
    """It takes token ids alone, so P of them stand for the soft prompt.

    Its manager is kept from call to call, because making one takes a second, within a quarter of the machine's memory.
    """
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(max_memory_percent=0.25, **settings)

    def answer(asked: Asked) -> int:
        inputs = [[len(text) + prompt] * PROMPT_LENGTH + text for text, prompt in asked]
        results = model.generate_batch(
            inputs, generation_config=config, continuous_batching_config=memory, persistent_manager=True
        )
        return sum(len(result.generated_tokens) for result in results.values())

    return answer


WORKERS: dict[str, Callable[[Path], Worker]] = {
    "peft": peft,
    "transformers": transformers,
    "transformers_cuda": transformers_cuda,
}


def main() -> None:
    results = os.fdopen(os.dup(1), "w")  # libraries that print shall not print among the results
    os.dup2(2, 1)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answer, model = WORKERS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"attention": model.config._attn_implementation}), file=results, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        made = answer(asked)
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": made, "seconds": seconds}), file=results, flush=True)


def _load(base: Path, attention: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False).eval().to(device)


if __name__ == "__main__":
    main()
