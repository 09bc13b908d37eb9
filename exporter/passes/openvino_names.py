"""Node names without the process's counter, so that the same export writes the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

from cpm_edge.exporter.disk import disk_errors

# OpenVINO calls a node without a name of its own Type_N, N counting every node of the process.
# Lists of tensor names and converted nodes (Type_N.0) hold them too.
_AUTOMATIC = re.compile(rb'(?<=[",])([A-Z][A-Za-z0-9]*)_\d+(?=[",.])')


def renumber(xml: Path) -> None:
    """Count the automatic names of one IR from 0, in the order in which they appear.

    Raises:
        ExportError: a disk error.
    """
    names: dict[bytes, bytes] = {}

    def stable(match: re.Match[bytes]) -> bytes:
        return names.setdefault(match[0], b"%s_%d" % (match[1], len(names)))

    with disk_errors(xml):
        xml.write_bytes(_AUTOMATIC.sub(stable, xml.read_bytes()))
