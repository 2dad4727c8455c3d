"""The web page: files without a build step, and nothing from other servers."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent
FILES = {
    **dict.fromkeys(("api.js", "gallery.js", "live.js", "page.js", "player.js"), "text/javascript"),
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}


@router.get("/")
async def index() -> FileResponse:
    return FileResponse(FOLDER / "page.html", media_type="text/html; charset=utf-8", headers=HEADERS)


def _serve(name: str, media_type: str) -> None:
    @router.get(f"/{name}")
    async def file() -> FileResponse:
        return FileResponse(FOLDER / name, media_type=media_type, headers=HEADERS)


for _name, _media_type in FILES.items():
    _serve(_name, _media_type)
