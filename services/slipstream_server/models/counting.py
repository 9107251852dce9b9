"""The parameters of any configuration: by arithmetic where the family is known, otherwise by building the model on
torch's meta device in a subprocess. Event loop; remembers what it has built.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from slipstream_server.models.parameters import ParameterCount, count_parameters_of
from slipstream_server.models.tool_process import run_tool

_TIMEOUT_S = 180.0
_MAX_KEPT = 256
_built: OrderedDict[str, ParameterCount] = OrderedDict()


async def count_parameters_anywhere(config: Mapping[str, Any]) -> ParameterCount:
    """Exact. ``config`` is examined, or a stored one; its class is the first of its ``architectures``.

    Raises InvalidField, ModelLoadFailed or DeadlineExceeded where the class cannot be built.
    """
    counted = count_parameters_of(config)
    if counted is not None:
        return counted
    key = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    if key not in _built:
        names = config.get("architectures") or [""]
        answer = await run_tool(
            "make", {"verb": "count", "config": dict(config), "architecture": str(names[0])}, timeout_s=_TIMEOUT_S
        )
        _built[key] = ParameterCount(linear=int(answer["linear"]), other=int(answer["other"]))
        if len(_built) > _MAX_KEPT:
            _built.popitem(last=False)
    return _built[key]
