"""Which package an exception of Transformers says is missing. Its classes name it in words, its loaders wrap it into
errors of other kinds. Pure functions; any thread.
"""

from __future__ import annotations

import importlib.util

# What classes of Transformers ask for beyond what this service installs.
_ASKED_FOR = ("torchvision", "detectron2", "pytesseract", "timm", "natten", "phonemizer", "uroman", "sacremoses")


def missing_package(error: BaseException) -> str | None:
    """The package that ``error`` asks for and that is not installed; None where it is about something else."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    said = str(error).lower()
    return next((name for name in _ASKED_FOR if name in said and importlib.util.find_spec(name) is None), None)
