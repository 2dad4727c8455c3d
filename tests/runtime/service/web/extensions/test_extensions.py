"""Requests to continue a video that are sent again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.service.served import running
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.service.settings import ServeSettings


@pytest.mark.slow
def test_a_request_that_is_repeated_finds_its_video_although_the_one_before_is_gone(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    bundle = bundle_of("tiny-causal", "bf16").root
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path) as server:
        source = server.submit(size="64x32", frames=17)["id"]
        server.make()
        body = {"prompt": "a kite", "seconds": "1", "video": {"id": source}}

        def extend(key: str, **more: str) -> tuple[int, str]:
            headers = {"Idempotency-Key": key}
            answer = server.client.post("/v1/videos/extensions", json={**body, **more}, headers=headers)
            return answer.status_code, answer.json().get("id") or answer.json()["error"]["code"]

        status, longer = extend("mine")
        assert status == 200
        assert server.client.delete(f"/v1/videos/{source}").status_code == 200
        assert extend("mine") == (200, longer)
        assert extend("mine", prompt="a train") == (409, "idempotency_conflict")
        assert extend("other") == (404, "not_found")
