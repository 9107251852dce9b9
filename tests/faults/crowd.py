"""Many clients in one process, to be killed: ``python crowd.py ADDRESS NUM_STREAMS NUM_CONNECTIONS MAX_NEW_TOKENS``.

Opens all streams and reads them until it is killed.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from e2e.services import generate_request, inference_stub


async def read(stub: object, max_new_tokens: int) -> None:
    async for _ in stub.StreamGenerate(generate_request(max_new_tokens=max_new_tokens)):  # type: ignore[attr-defined]
        pass


async def main(address: str, num_streams: int, num_connections: int, max_new_tokens: int) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(num_connections)]
    stubs = [inference_stub(channel) for channel in channels]
    await asyncio.gather(*[read(stubs[i % num_connections], max_new_tokens) for i in range(num_streams)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
