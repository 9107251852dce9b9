"""What a model's card (README.md) says of its licence. Reads a bounded piece of one file; any thread."""

from __future__ import annotations

import re
from pathlib import Path

CARD = "README.md"
_MAX_CARD_BYTES = 64 * 1024
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_FIELD = re.compile(r"^(license|license_name):[ \t]*[\"']?([\w.+ -]{1,100}?)[\"']?[ \t]*\r?$", re.MULTILINE)
# Cards spell licences in lower case; SPDX does not.
_SPDX = {
    name.lower(): name
    for name in (
        "AGPL-3.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-NC-4.0",
        "CC-BY-SA-4.0", "GPL-3.0", "ISC", "LGPL-3.0", "MIT", "MPL-2.0", "Unlicense",
    )
}  # fmt: skip


def licence_of(folder: Path) -> str:
    """The licence by the card in ``folder``, an SPDX identifier where it is a common one; empty where none is told."""
    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    front_matter = _FRONT_MATTER.match(text)
    if front_matter is None:
        return ""
    fields = {found[1]: found[2] for found in _FIELD.finditer(front_matter[1])}
    licence = fields.get("license", "")
    if licence == "other":
        licence = fields.get("license_name", licence)
    return _SPDX.get(licence.lower(), licence)
