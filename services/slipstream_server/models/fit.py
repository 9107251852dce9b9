"""Says whether a prepared folder could be loaded: ``python -m slipstream_server.models.fit``.

A subprocess (see ``tool_side``), because it imports torch. Builds the model as it would be loaded, on no device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import check_fit
from slipstream_server.models.tool_side import answer


def work(request: Mapping[str, Any]) -> dict[str, Any]:
    """``folder``; ``task`` as in LoadOptions."""
    check_fit(Path(request["folder"]), LoadOptions(task=request["task"]))
    return {}


if __name__ == "__main__":
    sys.exit(answer(work))
