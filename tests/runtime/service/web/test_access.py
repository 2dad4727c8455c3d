"""Keys, what they allow, and how often."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.service.served import Rig, running
from wanforge.errors import ConfigError
from wanforge.runtime.service.settings import ClientLimits, Role, ServedBundle, ServeSettings, check_settings
from wanforge.runtime.service.store.base import ApiKey, StoreError
from wanforge.runtime.service.web.access import Bucket

PROMPT = {"prompt": "a red circle"}


@pytest.fixture
def locked(tinywan: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server with keys."""
    with running(ServeSettings(), [("", tinywan)], tmp_path, keys=True) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_nothing_can_be_seen_or_done(locked: Rig) -> None:
    for method, path in [
        ("GET", "/v1/videos"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos/x/events"),
        ("GET", "/v1/videos/x/content"),
        ("DELETE", "/v1/videos/x"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
    ]:
        for headers in ({}, bearer("wf_nobody_" + "0" * 64), {"Authorization": "Basic YTpi"}):
            response = locked.client.request(method, path, headers=headers)
            assert response.status_code == 401, (method, path)
            assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
    assert locked.client.get("/livez").status_code == 200
    assert locked.client.get("/").status_code == 200


def test_an_owner_sees_only_what_is_theirs(locked: Rig) -> None:
    _, ann = locked.store.add_key("ann")
    _, ben = locked.store.add_key("ben")
    _, root = locked.store.add_key("root", ["admin"])
    video = locked.client.post("/v1/videos", json=PROMPT, headers=bearer(ann)).json()
    path = f"/v1/videos/{video['id']}"
    for method, each in [("GET", path), ("GET", f"{path}/content"), ("POST", f"{path}/cancel"), ("DELETE", path)]:
        assert locked.client.request(method, each, headers=bearer(ben)).status_code == 404
    assert locked.client.get("/v1/videos", headers=bearer(ben)).json()["data"] == []
    for key in (ann, root):
        assert locked.client.get(path, headers=bearer(key)).status_code == 200
        assert len(locked.client.get("/v1/videos", headers=bearer(key)).json()["data"]) == 1


def test_a_key_allows_what_its_scopes_say(locked: Rig) -> None:
    _, reader = locked.store.add_key("ann", ["read"])
    assert locked.client.get("/v1/videos", headers=bearer(reader)).status_code == 200
    refused = locked.client.post("/v1/videos", json=PROMPT, headers=bearer(reader))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
    assert locked.client.get("/metrics", headers=bearer(reader)).status_code == 403


def test_a_revoked_key_works_no_longer(locked: Rig) -> None:
    key, text = locked.store.add_key("ann")
    assert locked.client.get("/v1/models", headers=bearer(text)).status_code == 200
    locked.store.revoke_key(key.id)
    locked.app.state.keys.verified.clear()  # as it happens after some seconds
    assert locked.client.get("/v1/models", headers=bearer(text)).status_code == 401


@pytest.mark.parametrize("role", ["both", "api", "worker"])
def test_a_server_asks_for_keys_once_there_is_one(
    tinywan: Path, tmp_path: Path, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanforge.runtime.service.web.state.UNLOCKED_SECONDS", 0.0)
    elsewhere = {"Host": "videos.example.org"}
    with running(ServeSettings(role=role, data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        assert rig.client.get("/metrics").status_code == 200
        assert rig.client.get("/metrics", headers=elsewhere).status_code == (200 if role == "worker" else 403)
        _, key = rig.store.add_key("ann", ["admin"])
        for headers in ({}, elsewhere):
            assert rig.client.get("/metrics", headers=headers).status_code == 401
            assert rig.client.get("/metrics", headers={**headers, **bearer(key)}).status_code == 200


def test_a_server_that_was_open_stays_so_while_its_store_is_away(
    tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanforge.runtime.service.web.state.UNLOCKED_SECONDS", 0.0)

    def away() -> list[ApiKey]:
        raise StoreError("store_unreachable", "it is away")

    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        monkeypatch.setattr(rig.store, "api_keys", away)
        assert rig.client.get("/v1/models").status_code == 200


def test_too_many_requests_are_turned_away_with_a_time(tinywan: Path, tmp_path: Path) -> None:
    settings = ServeSettings(limits=ClientLimits(requests_per_second=0.5, burst=3))
    with running(settings, [("", tinywan)], tmp_path) as rig:
        answers = [rig.client.get("/v1/models") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].json()["error"]["code"] == "rate_limited"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 3


def test_a_bucket_fills_up_to_its_size() -> None:
    bucket = Bucket(2.0, filled_at=-1e9)
    assert [bucket.take(0.001, 2.0) == 0 for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_server_that_others_can_reach_needs_keys(host: str) -> None:
    settings = ServeSettings(host=host, bundles=(ServedBundle("b"),))
    with pytest.raises(ConfigError, match="wanforge serve keys add"):
        check_settings(settings, has_keys=False)
    check_settings(settings, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_a_server_of_this_machine_needs_none(host: str) -> None:
    check_settings(ServeSettings(host=host, bundles=(ServedBundle("b"),)), has_keys=False)
