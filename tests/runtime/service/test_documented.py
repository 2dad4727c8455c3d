"""The page about serving names every setting and every code of an error."""

import re
import tomllib

from tests.processes import ROOT
from wanforge.runtime.service.settings import ClientLimits, ServeSettings
from wanforge.runtime.service.store.base import Policy
from wanforge.runtime.service.web.forms.errors import STATUS
from wanforge.runtime.service.workers.status import OUTCOMES

PAGE = (ROOT / "docs/serving.md").read_text()
WEB = ROOT / "runtime/service/web"
API_CODE = re.compile(r'(?:ApiError\(\s*\d+,\s*|invalid\([^()]*, |code = )"([a-z_]+)"')


def test_every_setting_is_shown_with_its_default() -> None:
    block = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    shown = tomllib.loads(block[1])
    assert shown.keys() == set(ServeSettings.__struct_fields__)
    for defaults, table in ((ClientLimits(), shown["limits"]), (Policy(), shown["policy"])):
        fields = {name: getattr(defaults, name) for name in defaults.__struct_fields__ if name != "quota"}
        assert {name: value for name, value in table.items() if name != "quota"} == {
            name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
        }


def test_every_code_is_named() -> None:
    codes = {code for path in WEB.rglob("*.py") for code in API_CODE.findall(path.read_text())}
    assert {"too_busy", "not_found", "too_many_lines"} <= codes
    failures = set(OUTCOMES) - {"completed", "cancelled", "requeued"}
    assert [code for code in sorted({*codes, *STATUS, *failures}) if f"`{code}`" not in PAGE] == []
