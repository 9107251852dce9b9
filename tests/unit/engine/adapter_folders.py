"""Random adapters as PEFT itself saves them, and what PeftModel alone answers with one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.engine.driving import generate_alone

from slipstream_server.inference.generation import AdapterPin

WEIGHTS = "adapter_model.safetensors"
ATTENTION = ("q_proj", "v_proj")


def save_adapter(
    model: Any, folder: Path, *, seed: int, targets: Sequence[str] | str = ATTENTION, rank: int = 4, **config: Any
) -> AdapterPin:
    """A seeded random adapter for ``model``, large enough to change its answers."""
    chosen = list(targets) if not isinstance(targets, str) else targets
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, target_modules=chosen, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return pin(folder, seed)


def pin(folder: Path, number: int) -> AdapterPin:
    return AdapterPin(version=f"adapters/a/versions/v{number}", digest=f"{number:064x}", folder=str(folder))


def change_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors: Mapping[str, torch.Tensor] = load_file(folder / WEIGHTS)
    save_file({name: change(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def peft_alone(model: Any, adapter: AdapterPin | None, prompt: Sequence[int], **settings: Any) -> list[int]:
    """What plain ``generate`` answers with that adapter, or the base, and nothing else on the model."""
    settings = {"forced_eos_token_id": None, **settings}
    if adapter is None:
        return generate_alone(model, prompt, **settings)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), adapter.folder).eval()
    return generate_alone(adapted, prompt, **settings)
