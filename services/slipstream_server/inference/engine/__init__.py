"""Engines: they turn token ids into token ids. No grpc, no protobuf, no asyncio, no text."""
