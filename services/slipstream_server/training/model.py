"""The base model, its tokenizer, and the adapter put on it.

The adapter is put on exactly once: freshly, seeded, or from a checkpoint with ``is_trainable=True``; wrapping a model
that has one loses weights without a word. Base weights are safetensors from a folder of this machine; nothing is
fetched and no code of a model is run. In the runner only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.pytorch_utils import Conv1D

from slipstream_server.errors import InvalidField, InvalidRequest, ModelLoadFailed
from slipstream_server.training.failures import ExitStatus, classify
from slipstream_server.training.recipe import ALL_LINEAR, LoraSettings, TrainingRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelTokenizer:
    """A transformers tokenizer as an ``ExampleTokenizer``, with the ids at which the model's generation stops."""

    tokenizer: Any
    generation_eos_token_ids: frozenset[int]

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        return self.generation_eos_token_ids.union(own)

    @property
    def pad_token_id(self) -> int:
        """Any id serves: padding is masked by length."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_token_id or 0)

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids  # type: ignore[no-any-return]

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvalidRequest(f"the model's template refuses the messages: {str(error)[:300]}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and in which numbers a job computes."""

    use_cpu: bool
    use_bfloat16: bool

    @property
    def device(self) -> str:
        return "cpu" if self.use_cpu else "cuda"

    @property
    def precision(self) -> str:
        return "bfloat16" if self.use_bfloat16 else "float32"


def choose_placement(recipe: TrainingRecipe) -> Placement:
    """``auto`` is a GPU where there is one, and bfloat16 where a GPU has it; a CPU computes in float32 unless told
    otherwise.
    """
    use_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    precision = recipe.hyperparameters.precision
    is_auto = precision == "auto" and not use_cpu and torch.cuda.is_bf16_supported()
    return Placement(use_cpu=use_cpu, use_bfloat16=precision == "bfloat16" or is_auto)


def load_base(recipe: TrainingRecipe, placement: Placement) -> tuple[Any, ModelTokenizer]:
    """The frozen base model, on the CPU, and its tokenizer; raises ModelLoadFailed."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    dtype = torch.bfloat16 if placement.use_bfloat16 else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.base_model_folder, **options)
        base = AutoModelForCausalLM.from_pretrained(
            recipe.base_model_folder, dtype=dtype, use_safetensors=True, **options
        )
    except Exception as error:  # the libraries raise whatever they like on a bad folder
        if classify(error).exit_status is ExitStatus.OUT_OF_MEMORY:
            raise
        logger.warning("the base model could not be loaded", exc_info=error)
        message = f"the base model {recipe.base_model_name} could not be loaded for training ({type(error).__name__})"
        raise ModelLoadFailed(message) from error
    eos = getattr(base.generation_config, "eos_token_id", None)
    stops = frozenset([eos] if isinstance(eos, int) else eos or [])
    return base, ModelTokenizer(tokenizer, stops)


def put_adapter_on(base: Any, recipe: TrainingRecipe, checkpoint: Path | None) -> PeftModel:
    """``base`` with the adapter of ``recipe``: that of a verified ``checkpoint``, or a fresh one that changes nothing
    yet.
    """
    if checkpoint is not None:
        return PeftModel.from_pretrained(base, str(checkpoint), is_trainable=True)
    set_seed(recipe.hyperparameters.seed)
    return get_peft_model(base, _lora_config(base, recipe.adapter))


def _lora_config(base: Any, adapter: LoraSettings) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.rank,
        lora_alpha=adapter.effective_alpha,
        lora_dropout=adapter.dropout,
        target_modules=_target_modules(base, adapter),
        modules_to_save=_modules_to_save(base, adapter),
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )


def _target_modules(base: Any, adapter: LoraSettings) -> list[str] | str | None:
    """The names to adapt. PEFT passes over a name that fits no module as long as another one fits; here each must fit.

    ``all-linear`` becomes the short names it stands for, as PEFT would write out the path of every single module.
    """
    head = base.get_output_embeddings()
    modules = dict(base.named_modules())
    linear = {path for path, module in modules.items() if isinstance(module, (torch.nn.Linear, Conv1D))}
    if adapter.target_modules == (ALL_LINEAR,):
        chosen = {path for path in linear if modules[path] is not head}
        names = sorted({path.rsplit(".", 1)[-1] for path in chosen})
        is_exact = all(path in chosen for path in modules if path.rsplit(".", 1)[-1] in names)
        return names if is_exact else ALL_LINEAR
    for name in adapter.target_modules:
        if not _fits(name, linear):
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linear}))[:500]
            message = f"the model has no linear module {name!r}; it has {known}"
            raise InvalidField.of("adapter.target_modules", message)
    return list(adapter.target_modules) or None


def _modules_to_save(base: Any, adapter: LoraSettings) -> list[str] | None:
    paths = {path for path, _ in base.named_modules()}
    for name in adapter.modules_to_save:
        if not _fits(name, paths):
            raise InvalidField.of("adapter.modules_to_save", f"the model has no module {name!r}")
    return list(adapter.modules_to_save) or None


def _fits(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)
