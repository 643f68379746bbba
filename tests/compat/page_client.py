"""axe-core on the page in Chromium, after a chat, wide and narrow, light and dark: nothing that bars anybody."""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))

from browser import Browser, find_browser  # noqa: E402

AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
FOUND = """axe.run(document, {resultTypes: ["violations"]}).then(found => found.violations.map(each =>
    `${each.impact}: ${each.help}: ${each.nodes.map(node => node.target.join(" ")).join(", ")}`))"""


def violations(browser: Browser, width: int, dark: bool) -> list[str]:
    """What axe finds in both views of the page."""
    url, key = os.environ["OPENAI_BASE_URL"].removesuffix("/v1"), os.environ["OPENAI_API_KEY"]
    browser.open("about:blank")  # or else the address differs in its key alone, and nothing is loaded
    browser.open(f"{url}/#key={key}", width, 900, dark)
    browser.until("document.getElementById('model').textContent !== ''")
    browser.run("document.getElementsByName('max_tokens')[0].value = '12'")
    browser.run("document.getElementById('prompt').value = 'Name a `city`.'")
    browser.run("document.getElementById('composer').requestSubmit()")
    browser.until("running === null && conversation.length === 2", seconds=120)
    browser.run(AXE.read_text("utf-8") + "\n;0")
    found = []
    for tab in ("tab-chat", "tab-engine"):
        browser.run(f"document.getElementById('{tab}').click()")
        browser.settle()
        found += [f"{width} px, {'dark' if dark else 'light'}, {tab}: {each}" for each in browser.run(FOUND)]
        if folder := os.environ.get("SCREENSHOTS"):
            name = f"{width}-{'dark' if dark else 'light'}-{tab}.png"
            (Path(folder) / name).write_bytes(browser.screenshot())
    return found


path = find_browser()
assert path is not None, "there is no Chromium here"
with Browser(path) as browser:
    told = [each for width in (1400, 390) for dark in (False, True) for each in violations(browser, width, dark)]
assert not told, "\n".join(dict.fromkeys(told))
