"""What a client says of a clip that goes on from another one, in the shape of OpenAI's API."""

from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from starlette.datastructures import UploadFile

from wanforge.configs.sampler import MOST_STEPS
from wanforge.runtime.request import SEEDS
from wanforge.runtime.service.job import HIGHEST_PRIORITY, LOWEST_PRIORITY
from wanforge.runtime.service.web.document import schema_of, without_null
from wanforge.runtime.service.web.forms.errors import invalid, validation_error
from wanforge.runtime.service.web.forms.schema import SECONDS, Name, Prompt, VideoReference, Whole, seconds_text
from wanforge.runtime.service.web.intake.body import FORMS, JSON, MOST_FIELDS, content_type, json_object
from wanforge.runtime.service.web.state import Service

VIDEO, NESTED = "video", "video[id]"
"""The field of the video that is continued, and what it is called in a form."""


class ExtensionRequest(BaseModel):
    """How a clip goes on. Fields that are left out have the model's defaults; the size is that of the video."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt = Field(description="What happens next, in English.")
    video: VideoReference = Field(description="The completed video that is continued.")
    seconds: Annotated[Annotated[str, StringConstraints(pattern=SECONDS)] | None, BeforeValidator(seconds_text)] = (
        Field(
            None,
            description="Length of what is added; the nearest that the model can make.",
            examples=["5"],
            json_schema_extra={"anyOf": [{"type": "string", "pattern": SECONDS}, {"type": "number"}, {"type": "null"}]},
        )
    )
    model: Name | None = Field(None, description="The model that goes on; by default the one that made the video.")
    recipe: Name | None = Field(None, description="The recipe, if the model is served in several.")
    seed: Annotated[int, Field(ge=0, lt=SEEDS), Whole] | None = Field(
        None, description="Seed of the noise; drawn by default."
    )
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS), Whole] | None = Field(
        None, description="Number of sampling steps."
    )
    lora: Name | None = Field(None, description="A LoRA that the model is served with.")
    backend: Name | None = Field(None, description="The backend, if only one will do.")
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY), Whole] = Field(
        0, description="Higher is sooner, among your own jobs."
    )


def described() -> dict[str, Any]:
    """The body in the OpenAPI document."""
    as_json = schema_of(ExtensionRequest)
    fields = {name: without_null(field) for name, field in as_json["properties"].items() if name != VIDEO}
    fields[NESTED] = as_json["properties"][VIDEO]["properties"]["id"]
    required = [NESTED if name == VIDEO else name for name in as_json["required"]]
    as_form = {**as_json, "properties": fields, "required": required}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": as_json}, FORMS[0]: {"schema": as_form}}}}


async def extension_request(request: Request, service: Service) -> ExtensionRequest:
    """What a client asks for.

    Raises:
        ApiError: The body is no JSON object and no form, or a field of it is unknown or wrong.
    """
    if content_type(request) not in FORMS:
        return await json_object(request, service, ExtensionRequest)
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise invalid(name, f"{name} is a file; name a video of this server by its id instead, as {NESTED}")
            if name in fields or (name == NESTED and VIDEO in fields):
                raise invalid(name, f"{name} is given twice", "duplicate_field")
            if name == NESTED:
                fields[VIDEO] = {"id": value}
            else:
                fields[name] = value
    try:
        return ExtensionRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()[0]) from None
