"""Exit code 0 when the service in this container serves: asks the health-only port, HEALTH_PORT on this machine."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def main() -> int:
    """0 for SERVING, 1 for everything else."""
    try:
        with grpc.insecure_channel(f"localhost:{int(os.environ['HEALTH_PORT'])}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        sys.stderr.write(f"{error.code().name}\n")
        return 1
    sys.stderr.write(f"{health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}\n")
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
