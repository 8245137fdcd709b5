"""The page at `/`: what is served, how well, how busy it is, and a box to talk to it.

One file without a framework, which asks this server alone: `/sparse-serve/info` for what it shows, and the OpenAI API
for the conversation. It holds nothing about the model itself, so it needs no key; where there are keys, the page asks
for one and keeps it for as long as it is open. The header of the answer forbids browsers to run or load anything else.
"""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from sparse_serve.server.context import ServerContext

_PAGE = Path(__file__).with_name("landing.html")


def create(context: ServerContext) -> "LandingPage":
    """The page, mounted on the HTTP listener."""
    return LandingPage(context)


class LandingPage:
    """Implements `Api`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._page = _PAGE.read_bytes()
        self._headers = {
            "content-security-policy": policy(self._page.decode()),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def start(self) -> str:
        """Mount: the page shows every phase, a model that loads too."""
        self._context.listener.mount("/", self._show, needs_key=False)
        return ""

    async def serve(self) -> None:
        """Nothing to do: the page asks."""

    async def drain(self) -> None:
        """Nothing to do: the page asks."""

    async def stop(self, grace_s: float) -> None:
        """Nothing to do: the route goes with the listener."""

    async def _show(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response
        if scope["method"] in ("GET", "HEAD"):
            response = Response(self._page, media_type="text/html", headers=self._headers)
        else:
            response = PlainTextResponse("this is a page to GET\n", 405, {"allow": "GET, HEAD"})
        await response(scope, receive, send)


def policy(page: str) -> str:
    """A Content-Security-Policy that lets a page run the scripts and styles that are in it, and talk to its server."""
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
