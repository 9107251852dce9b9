"""``python -m slipstream_client.cli``: the same as ``slipstream``."""

from slipstream_client.cli.app import main

main()
