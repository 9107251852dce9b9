"""Turns a prepared folder into a model in memory. Lives in workers and in training; imports torch.

Never reads anything but safetensors, never runs a model's own code, never touches the network. A model that would come
up with random weights where its checkpoint has none is a failure, not a warning. Blocks for as long as the weights
take; call it from the thread that will own the model.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slipstream_server.errors import (
    IncompatibleAdapter,
    InvalidField,
    MissingDependency,
    ModelLoadFailed,
    OutOfMemory,
    SlipstreamError,
    UnsupportedField,
)
from slipstream_server.models.facts import Family, ModelFacts, read_facts
from slipstream_server.models.folder import check_adapter_folder, check_model_folder, refuse_code
from slipstream_server.models.load_options import LoadOptions, Quantization
from slipstream_server.models.missing import missing_package
from slipstream_server.models.quantization import (
    check_stored,
    mend_quantized,
    quantization_config,
    require_package,
)
from slipstream_server.models.safetensors_header import read_header
from slipstream_server.models.task_classes import HEADS, head_for

logger = logging.getLogger(__name__)

# Task -> the transformers class that puts the right head on the model; a checkpoint's own class comes first.
AUTO_CLASSES: Mapping[str, str] = {
    **{task: head.auto_class for head in HEADS for task in head.tasks},
    "zero-shot-classification": "AutoModelForSequenceClassification",
    "image-feature-extraction": "AutoModel",
    # Any model that chats decides; those made for it have a class of their own.
    "decision": "AutoModelForCausalLM",
}
# Ending of the checkpoint's own architecture -> task, for loads that name none.
_TASK_BY_ENDING = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in eval mode. ``device`` is where its inputs go; ``model`` is a PeftModel where an adapter was asked
    for."""

    model: Any
    facts: ModelFacts
    task: str
    device: torch.device
    dtype: torch.dtype
    attn_implementation: str
    memory_bytes: int


def load_model(folder: Path, options: LoadOptions | None = None) -> LoadedModel:
    """Load a prepared folder.

    Raises UnsafeWeights, CorruptArtifact, InvalidField, UnsupportedField, MissingDependency, IncompatibleAdapter,
    OutOfMemory or ModelLoadFailed.
    """
    options = options or LoadOptions()
    facts = _checked_facts(folder, options)
    task = options.task or default_task(facts)
    with _load_errors(task):
        auto_class = _auto_class(facts, task)
        model, report = _from_pretrained(folder, auto_class, options)
        _require_complete(report, task, auto_class, options)
        if options.quantization is not Quantization.NONE or facts.is_quantized:
            mend_quantized(model)
        if options.adapter_folder is not None:
            model = _with_adapter(model, options.adapter_folder)
        model.eval()
    return _describe(model, facts, task)


def check_fit(folder: Path, options: LoadOptions) -> None:
    """Raise what ``load_model`` would, as far as the configuration and the headers of the weights tell it.

    Reads no weights and takes no memory. Of what is stored quantized, only whether it can be read here is judged.
    """
    facts = _checked_facts(folder, options)
    task = options.task or default_task(facts)
    if facts.is_quantized or importlib.util.find_spec("accelerate") is None:
        return
    with _load_errors(task):
        auto_class = _auto_class(facts, task)
        try:
            _, report = _read_into(folder, auto_class, {"device_map": {"": "meta"}})
        except NotImplementedError:  # its class computes with weights as it is built: only loading it tells
            return
        _require_complete(report, task, auto_class, options)


def _checked_facts(folder: Path, options: LoadOptions) -> ModelFacts:
    """What the folder holds, where this build can read it: no code, an architecture and a quantization it knows."""
    contents = check_model_folder(folder)
    refuse_code(contents)
    facts = read_facts(folder)
    if facts.model_type and facts.model_type not in CONFIG_MAPPING:
        raise ModelLoadFailed(
            f"config.json: model_type: {facts.model_type[:60]!a} is no architecture of transformers "
            f"{transformers.__version__}"
        )
    if facts.is_quantized and options.quantization is not Quantization.NONE:
        raise UnsupportedField.of("quantization", f"the checkpoint is quantized already ({facts.quantization_method})")
    if facts.quantization_method is not None:
        tensor_names = chain.from_iterable(read_header(folder / name) for name in contents.weight_files)
        check_stored(facts.quantization_method, contents.config["quantization_config"], tensor_names)
    return facts


def default_task(facts: ModelFacts) -> str:
    """The task that the checkpoint's own head is for."""
    for architecture in facts.architectures:
        for ending, task in _TASK_BY_ENDING.items():
            if architecture.endswith(ending):
                return task
    if facts.family is Family.ENCODER_DECODER:
        return "text2text-generation"
    return "text-generation" if facts.is_generative else "feature-extraction"


def _auto_class(facts: ModelFacts, task: str) -> str:
    """The name of the class for ``task``; of several the one that the checkpoint was made for."""
    head = head_for(facts, task)
    if head is not None:
        return head.auto_class
    if task not in AUTO_CLASSES:
        raise InvalidField.of("task", f"{task!r} is not one of {', '.join(sorted(AUTO_CLASSES))}")
    return AUTO_CLASSES[task]


def _from_pretrained(folder: Path, class_name: str, options: LoadOptions) -> tuple[Any, Any]:
    device = choose_device(options.device)
    arguments: dict[str, Any] = {"dtype": "auto" if options.dtype == "auto" else getattr(torch, options.dtype)}
    placement = _placement(options, device)
    if placement is not None:
        arguments["device_map"] = placement
    if options.quantization is not Quantization.NONE:
        arguments["quantization_config"] = quantization_config(options)
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    model, report = _read_into(folder, class_name, arguments)
    return (model if placement is not None else model.to(device)), report


def _read_into(folder: Path, class_name: str, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model and what the report says; weights of another shape stand in it, instead of being an exception."""
    read: tuple[Any, Any] = getattr(transformers, class_name).from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **arguments,
    )
    return read


def choose_device(name: str) -> torch.device:
    """The device a name means here; raises InvalidField where this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidField.of("device", f"{name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _placement(options: LoadOptions, device: torch.device) -> str | dict[str, Any] | None:
    """What to pass as device_map: straight to the device where accelerate can do that, sparing a copy of the weights in
    main memory.
    """
    needs_accelerate = options.device_map is not None or options.quantization is not Quantization.NONE
    if needs_accelerate:
        require_package("accelerate", "device_map and quantization")
    if options.device_map is not None:
        return options.device_map
    is_direct = needs_accelerate or (device.type == "cuda" and importlib.util.find_spec("accelerate") is not None)
    return {"": device} if is_direct else None


def _require_complete(report: Any, task: str, auto_class: str, options: LoadOptions) -> None:
    """``report`` is what output_loading_info gives: an object in some versions of transformers, a dict in others."""
    values = report if isinstance(report, dict) else vars(report)
    problems = [str(item) for item in values.get("error_msgs") or ()]
    problems += [
        f"{key} has another shape" for key in sorted(str(item[0]) for item in values.get("mismatched_keys") or ())
    ]
    # An encoder's pooler is often not trained and not stored; what takes a model without a head does not read it.
    missing = [
        key for key in sorted(values.get("missing_keys") or ()) if auto_class != "AutoModel" or "pooler" not in key
    ]
    if not options.allow_new_weights:
        problems += [f"{key} is missing" for key in missing]
    if problems:
        raise ModelLoadFailed(
            f"the checkpoint does not fit {task}: {'; '.join(problems[:3])} ({len(problems)} problems)"
        )


def _with_adapter(model: Any, folder: Path) -> Any:
    check_adapter_folder(folder)
    require_package("peft", "adapters")
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=False, local_files_only=True, use_safetensors=True
            )
        except (ValueError, RuntimeError, KeyError) as error:
            if _is_out_of_memory(error):
                raise
            raise IncompatibleAdapter(f"the adapter does not fit the model ({type(error).__name__})") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise IncompatibleAdapter("the adapter lacks weights for modules that its configuration targets")
    return adapted


def _describe(model: Any, facts: ModelFacts, task: str) -> LoadedModel:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return LoadedModel(
        model=model,
        facts=facts,
        task=task,
        device=_input_device(inner),
        dtype=inner.dtype,
        attn_implementation=str(getattr(inner.config, "_attn_implementation", None) or "eager"),
        memory_bytes=int(inner.get_memory_footprint()),
    )


def _input_device(model: Any) -> torch.device:
    """Where inputs go: to the embeddings, and to the first weights where there are none."""
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        weight = next(model.parameters())
    device: torch.device = weight.device
    return device


@contextmanager
def _load_errors(task: str) -> Iterator[None]:
    """Whatever goes wrong in transformers, as one of ours; its own words may hold paths and stay in the log."""
    try:
        yield
    except SlipstreamError:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"loading needs a package that is not installed on this server ({missing_package(error) or 'see the log'})"
        ) from error
    except Exception as error:
        if _is_out_of_memory(error):
            raise OutOfMemory("the device has not enough memory for this model") from error
        logger.exception("loading a model for %s failed", task)
        raise ModelLoadFailed(
            f"transformers {transformers.__version__} could not load the model for {task} ({type(error).__name__})"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
