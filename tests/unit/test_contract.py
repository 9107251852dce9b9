"""The contract is what it promises to be: stubs that fit the protos, every method there, every reason with its class.

The tables of methods and fields are written by hand from the published description of the services, not read from the
protos.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, MethodDescriptor

import slipstream
from slipstream.training.v1 import dataset_service_pb2
from slipstream.type.v1 import error_reason_pb2
from slipstream_server import errors
from slipstream_server.training.rows import RowErrorReason

PROTOS = Path(__file__).resolve().parents[2] / "protos"

UNARY, SERVER_STREAM, CLIENT_STREAM, BOTH_STREAM = "unary", "server stream", "client stream", "both stream"

SERVICES: dict[str, dict[str, tuple[str, str, str]]] = {
    "slipstream.inference.v1.InferenceService": {
        "Generate": ("GenerateRequest", "GenerateResponse", UNARY),
        "StreamGenerate": ("GenerateRequest", "StreamGenerateResponse", SERVER_STREAM),
        "RunTask": ("RunTaskRequest", "RunTaskResponse", UNARY),
        "StreamTask": ("StreamTaskRequest", "StreamTaskResponse", BOTH_STREAM),
        "ListTasks": ("ListTasksRequest", "ListTasksResponse", UNARY),
        "DescribeTask": ("DescribeTaskRequest", "Task", UNARY),
        "Tokenize": ("TokenizeRequest", "TokenizeResponse", UNARY),
        "Detokenize": ("DetokenizeRequest", "DetokenizeResponse", UNARY),
        "CountTokens": ("CountTokensRequest", "CountTokensResponse", UNARY),
    },
    "slipstream.inference.v1.ModelService": {
        "ListModels": ("ListModelsRequest", "ListModelsResponse", UNARY),
        "GetModel": ("GetModelRequest", "Model", UNARY),
        "LoadModel": ("LoadModelRequest", "Model", UNARY),
        "UnloadModel": ("UnloadModelRequest", "Model", UNARY),
        "DeleteModel": ("DeleteModelRequest", "Empty", UNARY),
        "WatchModels": ("WatchModelsRequest", "WatchModelsResponse", SERVER_STREAM),
        "CreateModel": ("CreateModelRequest", "Model", UNARY),
        "ExportModel": ("ExportModelRequest", "ExportModelResponse", SERVER_STREAM),
        "EstimateModelMemory": ("EstimateModelMemoryRequest", "EstimateModelMemoryResponse", UNARY),
        "RecommendModels": ("RecommendModelsRequest", "RecommendModelsResponse", UNARY),
    },
    "slipstream.chat.v1.ChatService": {
        "CreateConversation": ("CreateConversationRequest", "Conversation", UNARY),
        "GetConversation": ("GetConversationRequest", "Conversation", UNARY),
        "ListConversations": ("ListConversationsRequest", "ListConversationsResponse", UNARY),
        "UpdateConversation": ("UpdateConversationRequest", "Conversation", UNARY),
        "DeleteConversation": ("DeleteConversationRequest", "Empty", UNARY),
        "ListMessages": ("ListMessagesRequest", "ListMessagesResponse", UNARY),
        "GetMessage": ("GetMessageRequest", "Message", UNARY),
        "SendMessage": ("SendMessageRequest", "SendMessageResponse", UNARY),
        "StreamMessage": ("SendMessageRequest", "StreamMessageResponse", SERVER_STREAM),
        "Complete": ("CompleteRequest", "CompleteResponse", UNARY),
        "StreamComplete": ("CompleteRequest", "StreamCompleteResponse", SERVER_STREAM),
    },
    "slipstream.training.v1.DatasetService": {
        "UploadDataset": ("UploadDatasetRequest", "Dataset", CLIENT_STREAM),
        "ImportDataset": ("ImportDatasetRequest", "Dataset", UNARY),
        "GetDataset": ("GetDatasetRequest", "Dataset", UNARY),
        "ListDatasets": ("ListDatasetsRequest", "ListDatasetsResponse", UNARY),
        "DeleteDataset": ("DeleteDatasetRequest", "Empty", UNARY),
        "PreviewDataset": ("PreviewDatasetRequest", "PreviewDatasetResponse", UNARY),
    },
    "slipstream.training.v1.TrainingService": {
        "CreateTrainingJob": ("CreateTrainingJobRequest", "TrainingJob", UNARY),
        "GetTrainingJob": ("GetTrainingJobRequest", "TrainingJob", UNARY),
        "ListTrainingJobs": ("ListTrainingJobsRequest", "ListTrainingJobsResponse", UNARY),
        "DeleteTrainingJob": ("DeleteTrainingJobRequest", "Empty", UNARY),
        "CancelTrainingJob": ("CancelTrainingJobRequest", "TrainingJob", UNARY),
        "PauseTrainingJob": ("PauseTrainingJobRequest", "TrainingJob", UNARY),
        "ResumeTrainingJob": ("ResumeTrainingJobRequest", "TrainingJob", UNARY),
        "WatchTrainingJob": ("WatchTrainingJobRequest", "WatchTrainingJobResponse", SERVER_STREAM),
        "ListCheckpoints": ("ListCheckpointsRequest", "ListCheckpointsResponse", UNARY),
        "EstimateTrainingJob": ("EstimateTrainingJobRequest", "EstimateTrainingJobResponse", UNARY),
        "EvaluateModel": ("EvaluateModelRequest", "TrainingJob", UNARY),
    },
    "slipstream.adapters.v1.AdapterService": {
        "CreateAdapter": ("CreateAdapterRequest", "Adapter", UNARY),
        "UploadAdapter": ("UploadAdapterRequest", "AdapterVersion", CLIENT_STREAM),
        "ImportAdapter": ("ImportAdapterRequest", "AdapterVersion", UNARY),
        "DownloadAdapter": ("DownloadAdapterRequest", "DownloadAdapterResponse", SERVER_STREAM),
        "GetAdapter": ("GetAdapterRequest", "Adapter", UNARY),
        "ListAdapters": ("ListAdaptersRequest", "ListAdaptersResponse", UNARY),
        "UpdateAdapter": ("UpdateAdapterRequest", "Adapter", UNARY),
        "DeleteAdapter": ("DeleteAdapterRequest", "Empty", UNARY),
        "GetAdapterVersion": ("GetAdapterVersionRequest", "AdapterVersion", UNARY),
        "ListAdapterVersions": ("ListAdapterVersionsRequest", "ListAdapterVersionsResponse", UNARY),
        "DeleteAdapterVersion": ("DeleteAdapterVersionRequest", "Empty", UNARY),
        "GetAdapterAlias": ("GetAdapterAliasRequest", "AdapterAlias", UNARY),
        "ListAdapterAliases": ("ListAdapterAliasesRequest", "ListAdapterAliasesResponse", UNARY),
        "SetAdapterAlias": ("SetAdapterAliasRequest", "SetAdapterAliasResponse", UNARY),
        "RollBackAdapterAlias": ("RollBackAdapterAliasRequest", "RollBackAdapterAliasResponse", UNARY),
        "DeleteAdapterAlias": ("DeleteAdapterAliasRequest", "Empty", UNARY),
        "WatchAdapters": ("WatchAdaptersRequest", "WatchAdaptersResponse", SERVER_STREAM),
        "AcknowledgeAdapterEvents": ("AcknowledgeAdapterEventsRequest", "AcknowledgeAdapterEventsResponse", UNARY),
        "SetActiveAdapter": ("SetActiveAdapterRequest", "SetActiveAdapterResponse", UNARY),
        "DisableAdapters": ("DisableAdaptersRequest", "DisableAdaptersResponse", UNARY),
        "EnableAdapters": ("EnableAdaptersRequest", "EnableAdaptersResponse", UNARY),
        "MergeAdapters": ("MergeAdaptersRequest", "AdapterVersion", UNARY),
    },
}

# Spellings that clients use by reflection.
FIELDS = {
    "slipstream.inference.v1.GenerateRequest": "model text token_ids chat adapter sampling stopping response num_beams "
    "priority constraint",
    "slipstream.inference.v1.TokenIds": "ids",
    "slipstream.inference.v1.ChatPrompt": "messages",
    "slipstream.type.v1.SamplingOptions": "do_sample temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty seed",
    "slipstream.type.v1.StoppingOptions": "max_new_tokens min_new_tokens stop stop_token_ids ignore_eos",
    "slipstream.type.v1.ResponseOptions": "num_return_sequences logprobs echo",
    "slipstream.inference.v1.GenerateResponse": "completions usage model adapter_version",
    "slipstream.inference.v1.Completion": "index text token_ids finish_reason logprobs",
    "slipstream.type.v1.Usage": "prompt_tokens completion_tokens cached_prompt_tokens",
    "slipstream.inference.v1.StreamGenerateResponse": "started delta finished",
    "slipstream.inference.v1.GenerationStarted": "model adapter_version",
    "slipstream.inference.v1.GenerationDelta": "index text token_ids finish_reason",
    "slipstream.inference.v1.GenerationFinished": "usage completions",
    "slipstream.type.v1.ChatMessage": "role content parts",
    "slipstream.inference.v1.RunTaskRequest": "model adapter task inputs parameters",
    "slipstream.inference.v1.RunTaskResponse": "results",
    "slipstream.training.v1.TrainingJob": "name state spec error progress result",
    "slipstream.training.v1.WatchTrainingJobRequest": "name after_sequence",
    "slipstream.training.v1.WatchTrainingJobResponse": "events",
    "slipstream.training.v1.TrainingJobEvent": "sequence attempt time",
    "slipstream.adapters.v1.AdapterAlias": "version generation",
    "slipstream.adapters.v1.SetAdapterAliasResponse": "unconfirmed_replicas",
    "slipstream.adapters.v1.RollBackAdapterAliasResponse": "unconfirmed_replicas",
}

STATES = {
    "slipstream.training.v1.TrainingJob": "VALIDATING QUEUED STARTING RUNNING PAUSED EVALUATING PUBLISHING SUCCEEDED "
    "FAILED CANCELLED",
    "slipstream.adapters.v1.AdapterVersion": "IMPORTING REGISTERED VERIFIED FAILED RETIRED",
}

ROLES = ["ROLE_UNSPECIFIED", "ROLE_SYSTEM", "ROLE_USER", "ROLE_ASSISTANT", "ROLE_TOOL"]

# Raised as it is where nothing more particular is known to be missing; every other inner class only groups its leaves.
RAISED_INNER_CLASSES = {"NOT_FOUND": errors.NotFound}


def files() -> list[FileDescriptor]:
    """Every file of the contract, as the stubs register it."""
    modules = [module.name for module in pkgutil.walk_packages(slipstream.__path__, "slipstream.")]
    return [importlib.import_module(name).DESCRIPTOR for name in modules if name.endswith("_pb2")]


def messages() -> list[Descriptor]:
    """Every message of the contract, nested ones too, entries of maps not."""
    found: list[Descriptor] = []
    waiting = [message for file in files() for message in file.message_types_by_name.values()]
    while waiting:
        message = waiting.pop()
        if not message.GetOptions().map_entry:
            found.append(message)
            waiting.extend(message.nested_types)
    return found


def enums() -> list[EnumDescriptor]:
    """Every enum of the contract."""
    outer = [enum for file in files() for enum in file.enum_types_by_name.values()]
    return outer + [enum for message in messages() for enum in message.enum_types]


def streaming(method: MethodDescriptor) -> str:
    kinds = {
        (False, False): UNARY,
        (False, True): SERVER_STREAM,
        (True, False): CLIENT_STREAM,
        (True, True): BOTH_STREAM,
    }
    return kinds[method.client_streaming, method.server_streaming]


def generator() -> ModuleType:
    """protos/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_generator(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROTOS / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_stubs_are_those_of_the_protos() -> None:
    lock = (PROTOS / "stubs.lock").read_text()
    assert lock == generator().lock_text(), "the protos or the stubs have changed: run protos/generate.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pinned_toolchain_generates_the_committed_stubs() -> None:
    result = run_generator("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_buf_lint_finds_nothing_and_every_element_has_a_comment() -> None:
    result = run_generator("--lint")
    assert result.returncode == 0, result.stdout + result.stderr


def test_exactly_the_promised_services_exist() -> None:
    assert {service.full_name for file in files() for service in file.services_by_name.values()} == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_service_has_exactly_its_methods_with_their_types_and_streams(service: str) -> None:
    methods = descriptor_pool.Default().FindServiceByName(service).methods
    found = {method.name: (method.input_type.name, method.output_type.name, streaming(method)) for method in methods}
    assert found == SERVICES[service]


@pytest.mark.parametrize("message", FIELDS)
def test_message_has_its_promised_fields(message: str) -> None:
    fields = descriptor_pool.Default().FindMessageTypeByName(message).fields_by_name
    assert set(FIELDS[message].split()) <= set(fields)


@pytest.mark.parametrize("resource", STATES)
def test_resource_has_exactly_its_states(resource: str) -> None:
    state = descriptor_pool.Default().FindMessageTypeByName(resource).fields_by_name["state"].enum_type
    assert state is not None
    assert [value.name.removeprefix("STATE_") for value in state.values[1:]] == STATES[resource].split()


def test_roles_are_spelled_as_promised() -> None:
    role = descriptor_pool.Default().FindEnumTypeByName("slipstream.type.v1.Role")
    assert [value.name for value in role.values] == ROLES


def test_every_enum_starts_unspecified() -> None:
    assert [enum.full_name for enum in enums() if not enum.values_by_number[0].name.endswith("_UNSPECIFIED")] == []


def test_every_count_is_a_signed_64_bit_number() -> None:
    named = (f for message in messages() for f in message.fields if f.name.endswith(("_count", "_bytes", "_tokens")))
    counts = [field for field in named if field.type != FieldDescriptor.TYPE_BOOL]
    assert len(counts) > 50
    assert [field.full_name for field in counts if field.type != FieldDescriptor.TYPE_INT64] == []


def test_every_timestamp_is_named_as_one() -> None:
    fields = [(field, field.message_type) for message in messages() for field in message.fields]
    stamps = [field for field, type_ in fields if type_ and type_.full_name == "google.protobuf.Timestamp"]
    assert len(stamps) > 20
    assert [field.full_name for field in stamps if not (field.name == "time" or field.name.endswith("_time"))] == []


def test_every_list_request_and_response_can_be_paged() -> None:
    named = {message.name: set(message.fields_by_name) for message in messages()}
    requests = {name: fields for name, fields in named.items() if name.startswith("List") and name.endswith("Request")}
    responses = {
        name: fields for name, fields in named.items() if name.startswith("List") and name.endswith("Response")
    }
    assert len(requests) == len(responses) == 10
    assert [name for name, fields in requests.items() if not {"page_size", "page_token"} <= fields] == []
    assert [name for name, fields in responses.items() if "next_page_token" not in fields] == []


def leaves(error: type[errors.SlipstreamError]) -> list[type[errors.SlipstreamError]]:
    """The classes below ``error`` that nothing is derived from."""
    below = error.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [error]


def reason_classes() -> list[type[errors.SlipstreamError]]:
    ours = [leaf for leaf in leaves(errors.SlipstreamError) if leaf.__module__ == errors.__name__]
    return [*ours, *RAISED_INNER_CLASSES.values()]


def test_every_error_reason_has_exactly_one_class_and_every_class_its_reason() -> None:
    classes = Counter(error.reason for error in reason_classes())
    values = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert classes == Counter(dict.fromkeys(values, 1))


def test_inner_error_classes_reuse_reasons_of_the_enum() -> None:
    names = {f"ERROR_REASON_{error.reason}" for error in errors.SlipstreamError.__subclasses__()}
    assert names <= set(error_reason_pb2.ErrorReason.keys())


def test_a_leaf_error_states_its_own_reason() -> None:
    assert [leaf.__name__ for leaf in reason_classes() if "reason" not in vars(leaf)] == []


def test_every_reason_a_row_can_be_refused_for_is_in_the_contract() -> None:
    names = set(dataset_service_pb2.RowErrorReason.keys())
    assert {f"ROW_ERROR_REASON_{reason}" for reason in RowErrorReason} <= names
