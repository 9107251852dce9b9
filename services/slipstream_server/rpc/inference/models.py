"""ModelService: the models of this service as resources. Lives on the event loop; no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from slipstream.inference.v1 import architecture_pb2, model_service_pb2
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream.type.v1 import precision_pb2
from slipstream_server.inference.front import InferenceFront, ModelPlan
from slipstream_server.inference.supervisor import ModelState, ModelStatus
from slipstream_server.models.facts import Family, ModelFacts
from slipstream_server.models.load_options import FourBitKind, LoadOptions, Quantization
from slipstream_server.resource_names import ModelName
from slipstream_server.rpc.inference.convert import model_id
from slipstream_server.rpc.status import status_of
from slipstream_server.storage.pages import PageRequest, decode_token, encode_token

Context = grpc.aio.ServicerContext[Any, Any]
Model = model_service_pb2.Model

_STATES = {
    ModelState.LOADING: Model.STATE_LOADING,
    ModelState.READY: Model.STATE_READY,
    ModelState.RESTARTING: Model.STATE_RESTARTING,
    ModelState.FAILED: Model.STATE_FAILED,
    ModelState.UNLOADING: Model.STATE_UNLOADING,
}
_FAMILIES = {
    Family.DECODER: architecture_pb2.ARCHITECTURE_FAMILY_DECODER,
    Family.ENCODER: architecture_pb2.ARCHITECTURE_FAMILY_ENCODER,
    Family.ENCODER_DECODER: architecture_pb2.ARCHITECTURE_FAMILY_ENCODER_DECODER,
}
_DATA_TYPES = {
    "float32": precision_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": precision_pb2.DATA_TYPE_BFLOAT16,
    "float16": precision_pb2.DATA_TYPE_FLOAT16,
    "float64": precision_pb2.DATA_TYPE_FLOAT64,
}


class ModelServicer(model_grpc.ModelServiceServicer):
    """Shows the models that were given at start; what it does not override answers UNIMPLEMENTED."""

    def __init__(self, front: InferenceFront) -> None:
        self._front = front

    async def GetModel(self, request: model_service_pb2.GetModelRequest, context: Context) -> Model:
        status = self._front.status(model_id(request.name, "name"))
        return self._model(status)

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        query = ("models", ",".join(map(str, sorted(request.states))), request.task)
        page = PageRequest(query=query, page_size=request.page_size, page_token=request.page_token)
        num_rows = page.num_rows()
        after = decode_token(query, request.page_token)[0] if request.page_token else ""
        models = [self._model(status) for status in self._front.models() if status.model > after]
        wanted = [model for model in models if _is_wanted(model, request)]
        response = model_service_pb2.ListModelsResponse(models=wanted[:num_rows])
        if len(wanted) > num_rows:
            last = ModelName.parse(wanted[num_rows - 1].name, "name").model
            response.next_page_token = encode_token(query, (last,))
        return response

    async def WatchModels(
        self, request: model_service_pb2.WatchModelsRequest, context: Context
    ) -> AsyncIterator[model_service_pb2.WatchModelsResponse]:
        names = {model_id(name, f"names[{i}]") for i, name in enumerate(request.names)}
        shown: dict[str, Model] | None = None
        async for statuses in self._front.subscribe():
            models = {s.model: self._model(s) for s in statuses if not names or s.model in names}
            for name, model in models.items():
                if shown is None or shown.get(name) != model:
                    yield model_service_pb2.WatchModelsResponse(model=model)
            if shown is None:
                end = model_service_pb2.ModelsSnapshotEnd(model_count=len(models))
                yield model_service_pb2.WatchModelsResponse(snapshot_end=end)
            for name in (shown or {}).keys() - models.keys():
                yield model_service_pb2.WatchModelsResponse(deleted_model=str(ModelName(name)))
            shown = models

    def _model(self, status: ModelStatus) -> Model:
        model = Model(
            name=str(ModelName(status.model)),
            state=_STATES[status.state],
            state_message=status.stage if status.state is not ModelState.READY else "",
        )
        plan = self._front.plan(status.model)
        if plan is not None:
            _describe_plan(model, plan)
        if status.state is ModelState.LOADING:
            if plan is None:
                model.state = Model.STATE_DOWNLOADING
            model.progress.stage = status.stage
            model.progress.completed_count = round(100 * status.progress)
            model.progress.total_count = 100
            model.progress.unit = "percent"
        if status.error is not None:
            model.error.CopyFrom(status_of(status.error))
        if status.ready is not None:
            model.data_type = _DATA_TYPES.get(status.ready.dtype, precision_pb2.DATA_TYPE_UNSPECIFIED)
            model.devices.append(status.ready.device)
            model.attention_implementation = status.ready.attention
            model.batching = model_service_pb2.BATCHING_PADDED
            model.memory_bytes = status.ready.memory_bytes
        return model


def _is_wanted(model: Model, request: model_service_pb2.ListModelsRequest) -> bool:
    return (not request.states or model.state in request.states) and (not request.task or request.task in model.tasks)


def _describe_plan(model: Model, plan: ModelPlan) -> None:
    facts = plan.facts
    model.source = plan.source
    model.revision = plan.revision
    model.context_tokens = plan.max_context_tokens or facts.context_tokens or 0
    model.vocabulary_size = facts.vocab_size or 0
    model.parameter_count = facts.num_parameters
    model.architecture = facts.architectures[0] if facts.architectures else ""
    model.family = _FAMILIES[facts.family]
    model.labels.extend(facts.labels)
    model.has_chat_template = facts.has_chat_template
    model.tasks.extend(_tasks(facts))
    model.disk_bytes = facts.weight_bytes
    model.quantization = _quantization(plan.worker.load)
    model.pinned = True


def _tasks(facts: ModelFacts) -> list[str]:
    if not facts.is_generative:
        return []
    return ["text2text-generation" if facts.family is Family.ENCODER_DECODER else "text-generation"]


def _quantization(load: LoadOptions) -> precision_pb2.Quantization.ValueType:
    if load.quantization is Quantization.EIGHT_BIT:
        return precision_pb2.QUANTIZATION_INT8
    if load.quantization is Quantization.FOUR_BIT:
        is_nf4 = load.four_bit_kind is FourBitKind.NF4
        return precision_pb2.QUANTIZATION_NF4 if is_nf4 else precision_pb2.QUANTIZATION_FP4
    return precision_pb2.QUANTIZATION_NONE
