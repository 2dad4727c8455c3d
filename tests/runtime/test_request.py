"""Requests are checked against a model without PyTorch, which a server's front has no use for."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from wanforge.configs.model import load_model
from wanforge.errors import RequestError
from wanforge.runtime.request import request_for

ROOT = Path(__file__).parent.parent.parent
CHECK = """
import sys
sys.modules["torch"] = None  # so that importing it fails
from pathlib import Path
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.errors import RequestError
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.request import check_request, request_for

model, recipe = load_model("tiny-i2v"), load_recipe("w8a8")
tokenizer = Tokenizer(Path(sys.argv[1]))
checked = check_request(request_for(model, "a red circle", sys.argv[2], {"steps": 3}), model, recipe, tokenizer)
print(len(checked.steps), len(checked.ids) > 3)
try:
    check_request(request_for(model, "a red circle", sys.argv[1], {}), model, recipe, tokenizer)
except RequestError as error:
    print("not an image" in str(error))
"""


def test_a_request_is_checked_without_pytorch(tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (64, 48), "red").save(image)
    tokenizer = ROOT / "exporter" / "checkpoint" / "tinywan" / "tokenizer.json"
    command = [sys.executable, "-c", CHECK, str(tokenizer), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "True", "True"], done.stderr


@pytest.mark.parametrize("scale", [1.1, 5.0, float("nan")])
def test_guidance_is_refused_with_the_reason(scale: float) -> None:
    model = load_model("tiny-lightx2v")
    with pytest.raises(RequestError, match="distilled to do without guidance; leave it out, or use 1") as caught:
        request_for(model, "a red circle", None, {"guidance_scale": scale})
    assert caught.value.field == "guidance_scale"
    assert request_for(model, "a red circle", None, {"guidance_scale": 1.0}) == request_for(
        model, "a red circle", None, {}
    )
