"""A tiny model through everything: a real worker, the front, the server, the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream_client import SlipstreamClient
from slipstream_server.config import ListenConfig
from slipstream_server.inference.engines import engine_for
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.task_calls import served_tasks
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server
from unit.models.tokenizer_folders import save_folder, wordpiece

TEXTS = ["hello world", "the quick brown fox jumps over the lazy dog", "hello hello hello"]


@pytest.mark.slow
async def test_an_encoder_is_served_without_being_told_how(
    tmp_path: Path, assert_eventually: Callable[..., Awaitable[None]]
) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = save_folder(tmp_path / "judge", wordpiece(), template=None, pad_token="<unk>")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    facts = read_facts(folder)
    worker = WorkerConfig(
        model_folder=folder, threads=1, engine=engine_for(facts, "", "auto"), tasks=served_tasks(facts, LoadOptions())
    )
    front = InferenceFront(FrontConfig())
    await front.start()
    try:
        front.add_model(ModelPlan(name="judge", folder=folder, facts=facts, worker=worker))
        await assert_eventually(lambda: front.status("judge").state in ("ready", "failed"), timeout_s=90)
        mount = Mount(inference_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(front))
        async with (
            open_server([mount], ListenConfig()) as server,
            SlipstreamClient(f"127.0.0.1:{server.port}") as client,
        ):
            answer = await client.run_task("sentiment-analysis", TEXTS, parameters={"top_k": 3})
    finally:
        await front.close()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, found in zip(TEXTS, answer.values(), strict=True):
        with torch.inference_mode():
            scores = model(tokenizer(text, return_tensors="pt").input_ids).logits.softmax(-1)[0].tolist()
        expected = sorted(zip(scores, config.id2label.values(), strict=True), reverse=True)
        assert [label.label for label in found.labels] == [label for _, label in expected]
        assert [label.score for label in found.labels] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert answer.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in TEXTS)
