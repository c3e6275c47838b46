"""GET /: the playground, three files that come from the package and ask nobody else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
router = APIRouter()


def _serve(path: str) -> None:
    name, kind = FILES[path]
    content = files("aquiline.server").joinpath("page", name).read_bytes()

    @router.get(path, include_in_schema=False)
    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)


for _path in FILES:
    _serve(_path)
