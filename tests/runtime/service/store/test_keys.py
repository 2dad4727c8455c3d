"""API keys."""

import hmac

import pytest

from tests.runtime.service.store.rig import Rig


def test_a_key_opens_what_it_was_made_for(rig: Rig) -> None:
    store = rig.open()
    key, text = store.add_key("ann", ["videos", "metrics"])
    assert store.verify_key(text) == key
    assert (key.owner, key.scopes, key.created_at) == ("ann", ("videos", "metrics"), rig.clock.seconds)
    assert store.api_keys() == [key]


def test_nothing_else_opens_anything(rig: Rig) -> None:
    store = rig.open()
    (key, text), (other, _) = store.add_key("ann"), store.add_key("bob")
    secret = text.removeprefix(f"{key.id}_")
    wrong = [text[:-1], f"{text}0", text.upper(), key.id, f"{key.id}_", f"{other.id}_{secret}", f"wf_{secret}"]
    for attempt in [*wrong, "", "_", "\udcff_\udcff", "\0_", f"{key.id}_☃", f"' OR 1=1 --_{secret}"]:
        assert store.verify_key(attempt) is None


def test_a_key_is_compared_in_constant_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = rig.open()
    _, text = store.add_key("ann")
    compared = list[tuple[str, str]]()

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    tried = [text, f"{text[:-1]}g", f"wf0_{text}", "", "_", "\0"]
    assert [store.verify_key(each) is not None for each in tried][1:] == [False] * 5
    assert len(compared) == len(tried)  # also for an id that there is not
    assert {len(digest) for pair in compared for digest in pair} == {64}  # hashes, not secrets


def test_a_revoked_key_stays_revoked(rig: Rig) -> None:
    store = rig.open()
    key, text = store.add_key("ann")
    _, kept = store.add_key("ann")
    assert store.revoke_key(key.id)
    assert store.verify_key(text) is None
    assert store.verify_key(kept) is not None
    assert not store.revoke_key(key.id)
    assert not store.revoke_key("wf0")
    assert {each.id: each.revoked_at for each in store.api_keys()}[key.id] == rig.clock.seconds


def test_the_secret_is_stored_nowhere(rig: Rig) -> None:
    store = rig.open()
    key, text = store.add_key("ann")
    with store.database.read() as transaction:
        row = transaction.row("SELECT * FROM api_keys")
    assert row is not None
    secret = text.removeprefix(f"{key.id}_")
    assert len(secret) == 64
    assert secret not in map(str, dict(row).values())
