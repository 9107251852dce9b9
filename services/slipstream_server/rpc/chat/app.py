"""Puts the chat service together: database, inference behind a channel, servicer."""

from __future__ import annotations

from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream_server.chat.conversations import Conversations
from slipstream_server.chat.tables import SCHEMA
from slipstream_server.chat.turns import Turns
from slipstream_server.config import Settings
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.chat.servicer import ChatServicer
from slipstream_server.rpc.chat.upstream import InferenceUpstream
from slipstream_server.rpc.server import Mount
from slipstream_server.rpc.service_runner import Service, announce, run_service
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate


async def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code."""
    database = Database(database_config(settings.chat.database_url, settings, "chat"))
    await migrate(database, SCHEMA)
    conversations = Conversations(database)
    turns = Turns(database, conversations)
    await turns.recover()
    try:
        async with open_channel(_inference(settings)) as channel:
            servicer = ChatServicer(InferenceUpstream(channel), conversations, turns)
            service = Service(name="chat", mounts=[Mount(chat_grpc.add_ChatServiceServicer_to_server, servicer)])
            return await run_service(
                service,
                settings.listen("chat"),
                on_serving=lambda server: announce("chat", settings.common.host, server),
            )
    finally:
        await database.close()


def database_config(url: str | None, settings: Settings, service: str) -> DatabaseConfig:
    """The database of a service: by URL, or an SQLite file in the data directory."""
    if url is not None:
        return DatabaseConfig(dsn=url)
    return DatabaseConfig.sqlite(settings.common.data_dir / service / f"{service}.db")


def _inference(settings: Settings) -> Peer:
    return Peer(
        address=settings.chat.inference_address or settings.address_of("inference"),
        tls_ca=settings.chat.inference_tls_ca or settings.common.tls_cert,
        token_file=settings.chat.inference_token_file or settings.common.token_file,
    )
