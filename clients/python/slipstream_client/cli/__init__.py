"""The command line, ``slipstream``: one file for each noun.

Verbs that start servers import the server only when they run.
"""

import os

# gRPC's core reads it when it is first imported, and by default tells a terminal of every connection that ends.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from slipstream_client.cli.app import main

__all__ = ["main"]
