"""A server of the pages of `saecore.report.pages` for a whole run; it makes a page when a browser asks for it.

    GET /index.html  /latents.html?from=200  /images.html?from=120  /search.html
        /latents/53.html  /targets/0.html  /images/4294967342.html  /pictures/4294967342.webp  /search.json?q=red  /static/..

Addresses are those of a written report, so that pages need not know whether a server or a disk holds them. The server is for
one person on their own machine. It writes nothing and has no log-in. Other pages in the person's browser cannot read its
answers: hosts are checked, and pages load nothing from elsewhere.
"""

import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from saecore.query.results import Results, number
from saecore.report.pages import FOLDER, LISTED_IMAGES, LISTED_LATENTS, Site
from saecore.report.views import Views

FOUND = 60
"""Latents, and images, of one answer of the search, at most; search.js has the same number."""

LONGEST = 60
"""Characters that a message repeats of what was asked for."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits at this address; port 0 takes any free one. ValueError if the address cannot be used."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"{host}:{port}: {error.strerror or error}; choose another port, or 0 for any free one"
        ) from error


def serve(run: Results, waiting: socket.socket, strongest: int, hints: Mapping[str, str] | None = None) -> None:
    """Answer until Ctrl-C. `hints`: command lines that the pages name, see `Site.hints`."""
    host = waiting.getsockname()[0]
    # Another site could send its visitors' browsers here under a host name of its own, and would then read the answers.
    hosts = ["*"] if host in ("0.0.0.0", "::") else [host, "localhost"]
    config = uvicorn.Config(application(run, hosts, strongest, hints), log_level="warning", server_header=False)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends in good order and then raises it again
        uvicorn.Server(config).run(sockets=[waiting])


def application(
    run: Results, hosts: Sequence[str], strongest: int = 12, hints: Mapping[str, str] | None = None
) -> Starlette:
    """The explorer, for requests to these hosts."""
    answers = Answers(Site(Views(run), live=True, strongest=strongest, hints=hints))
    routes = [
        Route("/", lambda request: RedirectResponse("index.html")),
        Route("/favicon.ico", lambda request: RedirectResponse("static/icon.svg")),
        Route("/index.html", answers.overview),
        Route("/latents.html", answers.latents),
        Route("/latents/{number}.html", answers.latent),
        Route("/targets/{number}.html", answers.target),
        Route("/images.html", answers.images),
        Route("/images/{number}.html", answers.image),
        Route("/pictures/{number}.webp", answers.picture),
        Route("/search.html", answers.search),
        Route("/evaluation.html", answers.judgement),
        Route("/search.json", answers.finds),
        Mount("/static", StaticFiles(directory=FOLDER / "static")),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={404: answers.not_found},
    )


class Answers:
    """One method for each address. Starlette calls them in its own threads."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._alone = threading.Lock()  # tables and the opening of pictures allow one thread at a time

    def overview(self, request: Request) -> Response:
        with self._alone:
            return _html(self.site.overview())

    def latents(self, request: Request) -> Response:
        with self._alone:
            first = _first(request, len(self.site.views.by_rate))
            rows = self.site.views.by_rate[first : first + LISTED_LATENTS]
            return _html(self.site.latent_list(rows, {}, first))

    def latent(self, request: Request) -> Response:
        latent = _number(request)
        if latent is None or not self.site.has_latent(latent):
            raise HTTPException(404, f"{_no('latent', request)}: they are 0 to {self.site.run.n_latents - 1}")
        with self._alone:
            return _html(self.site.latent(latent))

    def target(self, request: Request) -> Response:
        place, held = _number(request), len(self.site.targets)
        if place is None or place >= held:
            raise HTTPException(404, f"{_no('target', request)}: it has {held} texts and concepts")
        with self._alone:
            return _html(self.site.target(place))

    def images(self, request: Request) -> Response:
        total = self.site.run.record.images
        first = _first(request, total)
        with self._alone:
            image_ids = self.site.run.tables.numbering.image_ids(np.arange(first, min(first + LISTED_IMAGES, total)))
            return _html(self.site.image_list(list(self.site.views.images(image_ids)), first))

    def image(self, request: Request) -> Response:
        image_id = _number(request)
        with self._alone:
            view = None if image_id is None else next(self.site.views.images(np.array([image_id])), None)
            if view is None:
                raise HTTPException(404, _no("image", request))
            return _html(self.site.image(view))

    def picture(self, request: Request) -> Response:
        image_id = _number(request)
        with self._alone:
            picture = None if image_id is None else self.site.pictures.get(image_id)
        if picture is None:
            return FileResponse(FOLDER / "static" / "no-picture.svg")
        return Response(picture, media_type="image/webp", headers={"Cache-Control": "max-age=3600"})

    def search(self, request: Request) -> Response:
        return _html(self.site.search())

    def judgement(self, request: Request) -> Response:
        if self.site.verdict is None:
            raise HTTPException(404, "nobody has judged the maps of this run")
        return _html(self.site.judgement())

    def finds(self, request: Request) -> Response:
        with self._alone:
            return JSONResponse(self.site.search_results(request.query_params.get("q", "").strip(), FOUND))

    def not_found(self, request: Request, error: Exception) -> Response:
        words = error.detail if isinstance(error, HTTPException) else str(error)
        return _html(self.site.not_found(words, "../" * (request.url.path.count("/") - 1)), 404)


def _html(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, HEADERS)


def _number(request: Request) -> int | None:
    """The number in an address; None if no run can have it. Python's own `int` refuses 4,301 digits."""
    return number(request.path_params["number"])


def _no(what: str, request: Request) -> str:
    return f"this run has no {what} {_cut(request.path_params['number'])}"


def _first(request: Request, total: int) -> int:
    """Where a page of a list begins."""
    text = request.query_params.get("from", "0")
    first = number(text)
    if first is None or first >= max(total, 1):
        raise HTTPException(404, f"from={_cut(text)}: the list has {total} entries, the first is 0")
    return first


def _cut(text: str) -> str:
    """What somebody asked for, cut to fit into a sentence."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
