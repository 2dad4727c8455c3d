"""The routes of models."""

from typing import Annotated

from fastapi import APIRouter, Path, Request

from wanforge.configs.clip import load_resolutions
from wanforge.runtime.service.catalogue import Served
from wanforge.runtime.service.web.access import Reader
from wanforge.runtime.service.web.forms.errors import ApiError
from wanforge.runtime.service.web.forms.schema import Model, ModelList
from wanforge.runtime.service.web.state import service_of
from wanforge.runtime.service.web.videos import errors

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelList, responses=errors(), operation_id="list_models")
async def listed(request: Request, caller: Reader) -> ModelList:
    """The models that are served; the first one is the default."""
    service = service_of(request)
    return ModelList(data=[told(each, service.started_at) for each in service.catalogue.served])


@router.get("/{model}", response_model=Model, responses=errors(404), operation_id="retrieve_model")
async def retrieve(request: Request, model: Annotated[str, Path(max_length=200)], caller: Reader) -> Model:
    """A model that is served."""
    service = service_of(request)
    for each in service.catalogue.served:
        if each.name == model:
            return told(each, service.started_at)
    raise ApiError(404, "not_found", f"there is no model {model!r}; GET /v1/models lists them")


def told(served: Served, created: float) -> Model:
    """A bundle as an object of the API."""
    model, recipe = served.bundle.model, served.bundle.recipe
    return Model(
        id=served.name,
        created=int(created),
        task=model.task,
        live=bool(model.causal),
        recipe=recipe.name,
        size=f"{model.video.width_px}x{model.video.height_px}",
        frames=model.video.frames,
        fps=model.video.fps,
        steps=model.sampler.steps,
        topk=model.topk if recipe.is_sparse else None,
        loras=list(served.loras),
        fingerprint=served.fingerprint,
        sizes=[f"{sizes['16:9'][0]}x{sizes['16:9'][1]}" for sizes in load_resolutions().values()],
    )
