"""The body of a submission, as JSON or as a form, and the picture that comes with it."""

import base64
import binascii
import io
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from wanforge.errors import RequestError
from wanforge.runtime.service.settings import MEGABYTE, ClientLimits
from wanforge.runtime.service.web.document import without_null
from wanforge.runtime.service.web.forms.errors import ApiError, about, invalid, validation_error
from wanforge.runtime.service.web.forms.schema import VideoRequest
from wanforge.runtime.service.web.state import Service

Form = TypeVar("Form", bound=BaseModel)
JSON, FORMS = "application/json", ("multipart/form-data", "application/x-www-form-urlencoded")
MOST_FIELDS = 32
PICTURE = "input_reference"
"""The field of the first frame."""

LIST = "times"
"""The field that may be given several times in a form, once for each number."""

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats of pictures. Pillow reads others, for one of which it starts another program."""


def described() -> dict[str, Any]:
    """The body in the OpenAPI document."""
    as_json = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: without_null(field) for name, field in as_json["properties"].items()}
    picture = {"type": "string", "format": "binary", "description": "The first frame, for image-to-video models."}
    as_form = {**as_json, "properties": {**fields, PICTURE: picture}}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": as_json}, FORMS[0]: {"schema": as_form}}}}


async def video_request(request: Request, service: Service) -> tuple[VideoRequest, bytes | None]:
    """What a client asks for, and the bytes of the picture that it sends as a file.

    Raises:
        ApiError: The body is too large, no JSON object and no form, or a field of it is unknown or wrong.
    """
    kind = content_type(request)
    if kind in FORMS:
        return await _of_form(request, service.settings.limits)
    if kind != JSON:
        raise ApiError(415, "unknown_content_type", f"send {JSON} or {FORMS[0]}, not {kind or 'a body without a type'}")
    data = await request.body()
    return await service.by_size(len(data), of_json, data), None


async def json_object(request: Request, service: Service, kind: type[Form]) -> Form:
    """The JSON object that a request has as its body.

    Raises:
        ApiError: The body is no JSON object, or a field of it is unknown or wrong.
    """
    said = content_type(request)
    if said != JSON:
        raise ApiError(415, "unknown_content_type", f"send {JSON}, not {said or 'a body without a type'}")
    data = await request.body()
    try:
        return await service.by_size(len(data), kind.model_validate_json, data, strict=True)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from None


def content_type(request: Request) -> str:
    """The type of a body, without its parameters.

    Raises:
        ApiError: The body claims another encoding than UTF-8; some of Python's encodings fail in ways of their own.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise ApiError(415, "unknown_content_type", "send the body in UTF-8")
    return kind.decode("latin-1").strip().lower()


def of_json(body: bytes) -> VideoRequest:
    """What a JSON object asks for."""
    return _validated(body, None)


async def _of_form(request: Request, limits: ClientLimits) -> tuple[VideoRequest, bytes | None]:
    most = int(limits.body_megabytes * MEGABYTE)
    fields: dict[str, Any] = {}
    picture: bytes | None = None
    async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=most) as form:
        for name, value in form.multi_items():
            if name == LIST and name in fields and isinstance(value, str):
                fields[name] += f",{value}"
            elif name in fields or (name == PICTURE and picture is not None):
                raise invalid(name, f"{name} is given twice", "duplicate_field")
            elif isinstance(value, UploadFile):
                if name != PICTURE:
                    raise invalid(name, f"{name} is no file; only {PICTURE} is", "unknown_field")
                picture = await value.read()
            else:
                fields[name] = value
    return _validated(None, fields), picture


def _validated(body: bytes | None, fields: dict[str, Any] | None) -> VideoRequest:
    try:
        if body is not None:
            return VideoRequest.model_validate_json(body, strict=True)
        return VideoRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from None


async def picture_of(service: Service, text: str) -> bytes:
    """The picture that a field names, as a data URL, or by the URL of an allowed host.

    Raises:
        ApiError: There is none.
    """
    if service.fetcher is None or not text.startswith("https:"):
        return await service.by_size(len(text), of_data_url, text)
    with about(PICTURE):
        async with service.fetching:
            return await service.fetcher.fetch(text)


def of_data_url(text: str) -> bytes:
    """The bytes of a data URL.

    Raises:
        ApiError: It is another URL, or damaged.
    """
    head, comma, data = text.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise invalid(
            PICTURE, "give a picture as a file of a form, or as data:image/png;base64,…; no URL is fetched here"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(PICTURE, "the data URL is no valid base64") from None


def redrawn(picture: bytes, limits: ClientLimits) -> bytes:
    """A picture decoded and encoded again as PNG, so that nothing but its pixels is kept.

    Raises:
        ApiError: It is no picture, damaged or too large.
    """
    from PIL import Image

    from wanforge.runtime.inputs.image import open_image

    most = int(limits.image_megapixels * MEGABYTE)
    try:
        with Image.open(io.BytesIO(picture), formats=PICTURES) as opened:
            if opened.width * opened.height > most:
                raise invalid(PICTURE, f"the picture has {opened.width}x{opened.height} pixels, more than {most:,}")
            pixels = open_image(opened)
    except ApiError:
        raise
    except RequestError as error:
        raise invalid(PICTURE, str(error)) from None
    except Exception as error:  # decoders raise exceptions of many types
        raise invalid(PICTURE, f"not a picture in {', '.join(PICTURES)} ({error})") from None
    encoded = io.BytesIO()
    pixels.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
