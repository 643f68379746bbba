"""/: a page to talk to the model and to see it work; one document, which asks no other server for anything."""

from __future__ import annotations

import base64
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from labinfer.service.call import Call, Reply

_FOLDER = Path(__file__).parent.parent / "page"
_SCRIPTS = ("api.js", "chat.js", "engine.js")


@cache
def page_reply() -> Reply:
    """The page, with a policy that lets nothing run but its own script, known by its digest."""
    style = (_FOLDER / "style.css").read_text("utf-8")
    script = "".join((_FOLDER / name).read_text("utf-8") for name in _SCRIPTS)
    text = (_FOLDER / "page.html").read_text("utf-8").replace("{STYLE}", style).replace("{SCRIPT}", script)
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Reply(text.encode(), "text/html; charset=utf-8", headers={"content-security-policy": policy})


def digest(text: str) -> str:
    """A script or style as policies name it."""
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"


async def page(call: Call) -> Any:
    """The page; without a key the guard sends it too, with status 401, since a browser cannot know one yet."""
    return page_reply()
