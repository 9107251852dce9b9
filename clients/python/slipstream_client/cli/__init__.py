"""The command line, ``slipstream``: one file for each noun.

Verbs that start servers import the server only when they run.
"""

from slipstream_client.cli.app import main

__all__ = ["main"]
