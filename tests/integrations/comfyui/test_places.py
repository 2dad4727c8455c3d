"""Which address a widget means, and to whom the key goes."""

import sys
from typing import Any

import pytest

from tests.integrations.comfyui.stand_in import ComfyUI


@pytest.fixture
def places(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WANFORGE_URL", "https://videos.example.org/")
    monkeypatch.setenv("WANFORGE_API_KEY", "abc_secret")
    return sys.modules[f"{comfy.package.__name__}.places"]


def test_an_empty_address_is_that_of_the_environment(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.url_of("  ") == places.url_of(None) == "https://videos.example.org"
    assert places.url_of("http://gpu:8000/") == "http://gpu:8000"
    monkeypatch.delenv("WANFORGE_URL")
    assert places.url_of("") == "http://127.0.0.1:8000"


def test_the_key_goes_to_the_server_of_the_environment_alone(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.key_of("https://videos.example.org:443/") == "abc_secret"
    for other in ("http://videos.example.org", "https://example.org", "https://videos.example.org:444"):
        assert places.key_of(other) is None
    monkeypatch.delenv("WANFORGE_URL")
    assert places.key_of("https://videos.example.org") is None
    assert places.key_of("http://127.0.0.1:8000") == "abc_secret"


def test_a_key_with_other_characters_is_told_and_not_sent(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANFORGE_API_KEY", "abc\u201dsecret")
    with pytest.raises(Exception, match="WANFORGE_API_KEY has characters that no key has"):
        places.key_of("https://videos.example.org")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "no address of a server"),
        ("127.0.0.1:8000", "no address of a server"),
        ("http://", "no address of a server"),
        ("http://[::1", "no address of a server"),
        ("http://host:99999", "no address of a server"),
        ("http://ann:secret@host", "leave the name and the password out"),
        ("http://host/?key=secret", "more than the address of a server"),
    ],
)
def test_what_is_no_address_is_told(places: Any, url: str, says: str) -> None:
    with pytest.raises(Exception, match=says):
        places.url_of(url)
