"""The frozen base model's weights: loaded once, in the dtype that the engine runs."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local import attention
from service.engines.local.options import EngineOptions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALF_AS_WIDE = (torch.bfloat16, torch.float16)


def load_weights(
    base: BaseModel,
    *,
    device: str = "cpu",
    attention_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load the frozen base model; safetensors only, nothing fetched, no parameter learns.

    Without an `attention_implementation` transformers takes the quickest that computes what the architecture asks for.
    Raises BaseModelError when transformers cannot load it, or there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(
            f"torch {torch.__version__} finds no CUDA device for device '{device}'; install a CUDA build of torch and "
            "its driver, or set engine.device to 'cpu'"
        )
    attention.register()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=dtype,
            attn_implementation=attention_implementation,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(f"transformers cannot load {base.folder}: {error}") from error
    model.requires_grad_(False)
    torch.nn.Module.to(model, torch.device(device))
    torch.nn.Module.eval(model)
    return model


def weights_dtype(base: BaseModel, options: EngineOptions) -> torch.dtype:
    """The dtype that weights and KV have under these options; see EngineOptions for `auto`."""
    if options.dtype != "auto":
        return _DTYPES[options.dtype]
    if torch.device(options.device).type == "cpu":
        return torch.float32
    named = map(_DTYPES.get, base.dtypes)
    return next((dtype for dtype in named if dtype in _HALF_AS_WIDE), torch.bfloat16)


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The model's token embeddings [V, H], detached."""
    weight: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    return weight
