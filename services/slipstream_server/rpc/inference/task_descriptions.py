"""What a task is, as ListTasks and DescribeTask show it. Pure functions."""

from __future__ import annotations

from google.protobuf import json_format

from slipstream.inference.v1 import tasks_pb2
from slipstream_server.rpc.inference.model_convert import family_number
from slipstream_server.tasks.parameters import described_parameters
from slipstream_server.tasks.specs import Parameter, TaskSpec


def task_message(spec: TaskSpec, *, default_model: str, missing_packages: tuple[str, ...]) -> tasks_pb2.Task:
    """A task as DescribeTask shows it. ``default_model`` is a resource name, or empty."""
    return tasks_pb2.Task(
        name=f"tasks/{spec.id}",
        description=spec.description,
        aliases=spec.aliases,
        input_kinds=spec.input_kinds,
        result_kinds=spec.result_kinds,
        parameters=[_parameter(parameter) for parameter in described_parameters(spec)],
        default_model=default_model,
        auto_classes=spec.auto_classes,
        families=map(family_number, spec.families),
        adapters_supported=spec.adapters_supported,
        missing_packages=missing_packages,
        removed_in_transformers_version=spec.removed_in_transformers,
    )


def _parameter(parameter: Parameter) -> tasks_pb2.TaskParameter:
    message = tasks_pb2.TaskParameter(
        name=parameter.name,
        description=parameter.description,
        type=tasks_pb2.TaskParameterType.Value(f"TASK_PARAMETER_TYPE_{parameter.type.value.upper()}"),
        min_value=parameter.min_value,
        max_value=parameter.max_value,
        allowed_values=parameter.allowed_values,
        required=parameter.required,
    )
    if parameter.default is not None:
        json_format.ParseDict(parameter.default, message.default_value)
    return message
