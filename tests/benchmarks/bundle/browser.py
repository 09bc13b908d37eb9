"""A page in headless Chromium: what it draws, asks for and complains about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
PROBE = """<script>
const errors = []; addEventListener('error', event => errors.push(event.message));
addEventListener('load', () => { const page = document.documentElement;
  const sizes = [...document.querySelectorAll('svg')].map(svg => svg.getBBox().width);
  page.setAttribute('data-probe', JSON.stringify({ width: page.scrollWidth, window: innerWidth, sizes,
    requests: performance.getEntriesByType('resource').length, errors })); });
</script></head>"""


def looked_at(folder: Path, page: str, width: int) -> dict[str, Any]:
    """What a browser says of a page in a window of this width."""
    file = folder / "page.html"
    file.write_text(page.replace("</head>", PROBE, 1))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    command.append(file.as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert match is not None, done.stderr
    probe: dict[str, Any] = json.loads(match.group(1).replace("&quot;", '"'))
    probe["errors"] += [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return probe
