"""A headless browser for pages that were written: Chromium as it is installed, asked through its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NO_BROWSER = "no Chromium is on the path"

_ANSWER = re.compile(r'<pre id="answer">(.*?)</pre>', re.DOTALL)
_BEFORE = """<script>
window.failures = [];
addEventListener("error", (event) => failures.push(event.message));
addEventListener("securitypolicyviolation", (event) => failures.push(event.blockedURI));
</script>"""
_AFTER = """<script>
addEventListener("load", async () => {
  const pre = document.createElement("pre");
  const answer = await (async () => { %s })().catch((error) => ({ thrown: String(error) }));
  pre.id = "answer";
  pre.textContent = JSON.stringify({ failures, answer });
  document.body.append(pre);
});
</script>"""


def ask_page(page: str, script: str, folder: Path, *, width: int = 1200, dark: bool = False) -> Any:
    """What a script returns that runs in a page once it is loaded.

    Args:
        page: its text.
        script: the body of an async function of JavaScript; what it returns must be plain data.
        folder: for the page and the browser's profile.
        width: of the window, in pixels; browsers have a least one of 500.
        dark: whether the reader prefers dark pages.

    Raises:
        AssertionError: the page has raised an error, or the script has.
    """
    assert CHROMIUM is not None, NO_BROWSER
    path = folder / "asked.html"
    head, body = page.split("<head>", 1)
    path.write_text(f"{head}<head>{_BEFORE}{body.replace('</body>', _AFTER % script + '</body>')}", encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--window-size={width},1000"),
        *(
            f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=5000",
        ),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", path.as_uri()),
    ]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    match = _ANSWER.search(done.stdout)
    assert match is not None, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(unescape(match[1]))
    assert found["failures"] == [], found
    assert not isinstance(found["answer"], dict) or "thrown" not in found["answer"], found
    return found["answer"]
