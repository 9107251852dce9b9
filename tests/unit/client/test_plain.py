"""Dataclasses and options against the contract: nothing misspelt, nothing left out by accident."""

import dataclasses

import pytest

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import training_service_pb2 as training_pb2
from slipstream.type.v1 import lora_pb2
from slipstream_client import adapter_results, conversations, datasets, job_events, jobs, training_options
from slipstream_client.plain import plain
from slipstream_client.spelling import message_of

KINDS = [
    (datasets.Dataset, dataset_pb2.Dataset),
    (datasets.DatasetPreview, dataset_pb2.PreviewDatasetResponse),
    (datasets.PreviewRow, dataset_pb2.PreviewRow),
    (jobs.TrainingJob, training_pb2.TrainingJob),
    (jobs.TrainingResult, training_pb2.TrainingResult),
    (job_events.TrainingProgress, training_pb2.TrainingProgress),
    (job_events.StateChanged, training_pb2.StateChanged),
    (job_events.MetricsLogged, training_pb2.MetricsLogged),
    (job_events.EvaluationStarted, training_pb2.EvaluationStarted),
    (job_events.EvaluationCompleted, training_pb2.EvaluationCompleted),
    (job_events.Checkpoint, training_pb2.Checkpoint),
    (job_events.CheckpointSaved, training_pb2.CheckpointSaved),
    (job_events.LogLine, training_pb2.LogLine),
    (job_events.ResultPublished, training_pb2.ResultPublished),
    (job_events.AliasOutcome, training_pb2.AliasOutcome),
    (job_events.AttemptStarted, training_pb2.AttemptStarted),
    (job_events.AttemptFailed, training_pb2.AttemptFailed),
    (adapter_results.Adapter, adapter_pb2.Adapter),
    (adapter_results.AdapterVersion, adapter_pb2.AdapterVersion),
    (adapter_results.AdapterAlias, adapter_pb2.AdapterAlias),
    (adapter_results.AliasMove, adapter_pb2.SetAdapterAliasResponse),
    (adapter_results.AliasMove, adapter_pb2.RollBackAdapterAliasResponse),
    (adapter_results.ActiveChange, adapter_pb2.SetActiveAdapterResponse),
    (adapter_results.LoraConfig, lora_pb2.LoraConfig),
    (conversations.Conversation, chat_pb2.Conversation),
]


@pytest.mark.parametrize(("kind", "message"), KINDS, ids=lambda value: value.__name__)
def test_every_field_of_the_contract_is_there(kind, message):
    names = {field.name for field in dataclasses.fields(kind)}
    known = message.DESCRIPTOR.fields_by_name
    spelled = {
        f"{name}_s"
        if known[name].message_type is not None and known[name].message_type.full_name == "google.protobuf.Duration"
        else name
        for name in known
    }
    assert names == spelled
    plain(kind, message())


def test_every_event_of_the_contract_is_known():
    oneof = training_pb2.TrainingJobEvent.DESCRIPTOR.oneofs_by_name["event"]
    assert set(job_events.PAYLOADS) == {field.name for field in oneof.fields}


@pytest.mark.parametrize(
    ("names", "message", "beside"),
    [
        (training_options.LoraOptions, lora_pb2.LoraConfig, set()),
        (training_options.QloraOptions, training_pb2.QloraConfig, set()),
        (training_options.FullOptions, training_pb2.FullConfig, set()),
        (training_options.SelectionOptions, training_pb2.DatasetSelection, {"dataset"}),
        (training_options.HyperparameterOptions, training_pb2.Hyperparameters, set()),
        (training_options.EvaluationOptions, training_pb2.EvaluationOptions, set()),
        (training_options.CheckpointOptions, training_pb2.CheckpointOptions, set()),
        (training_options.PublishOptions, training_pb2.PublishOptions, set()),
        (training_options.RetryOptions, training_pb2.RetryPolicy, set()),
        (training_options.ResourceOptions, training_pb2.TrainingResources, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_option_of_the_contract_has_its_argument(names, message, beside):
    assert set(names.__annotations__) | beside == set(message.DESCRIPTOR.fields_by_name)


def test_every_part_of_a_specification_has_its_argument():
    given = set(training_options.SpecOptions.__annotations__) - {"selection"}
    assert given | {"base_model", "dataset"} == set(training_pb2.TrainingJobSpec.DESCRIPTOR.fields_by_name)


def test_there_and_back():
    values = {
        "gate": {"conditions": [{"metric": "eval_loss", "threshold": 1.5}], "verified_only": True},
        "name": "support@live",
        "expected_generation": 0,
    }
    request = message_of(adapter_pb2.SetAdapterAliasRequest, "", values)
    assert request.HasField("expected_generation")
    assert request.gate.conditions[0].threshold == 1.5
    alias = plain(adapter_results.AdapterAlias, adapter_pb2.AdapterAlias(gate=request.gate))
    assert alias.gate == values["gate"]
    assert alias.create_time is None


def test_an_enum_value_newer_than_the_client_is_empty():
    assert plain(datasets.Dataset, dataset_pb2.Dataset(state=99)).state == ""
