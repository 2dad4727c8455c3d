"""API keys: ``id_secret``, of which the store has the id and a hash of the secret.

A secret has 256 random bits, so one SHA-256 is enough: there is no dictionary to try.
"""

import hmac
import secrets
from collections.abc import Iterable
from hashlib import sha256

import msgspec

from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.store.databases.database import Row, Transaction
from wanforge.runtime.service.store.rows import text_of


def add_key(transaction: Transaction, owner: str, scopes: Iterable[str]) -> tuple[ApiKey, str]:
    """Make a key."""
    key = ApiKey(id=f"wf{secrets.token_hex(6)}", owner=owner, scopes=tuple(scopes), created_at=transaction.now)
    secret = secrets.token_hex(32)
    transaction.run(
        "INSERT INTO api_keys (id, owner, hash, scopes, created_at) VALUES (:id, :owner, :hash, :scopes, :now)",
        id=key.id,
        owner=owner,
        hash=_hash(secret),
        scopes=text_of(key.scopes),
        now=key.created_at,
    )
    return key, f"{key.id}_{secret}"


def keys(transaction: Transaction) -> list[ApiKey]:
    """All keys, oldest first."""
    return [_key_of(row) for row in transaction.rows("SELECT * FROM api_keys ORDER BY created_at, id")]


def revoke_key(transaction: Transaction, key: str) -> bool:
    """Make a key invalid."""
    statement = "UPDATE api_keys SET revoked_at = :now WHERE id = :key AND revoked_at IS NULL"
    return transaction.run(statement, now=transaction.now, key=key) == 1


def verify_key(transaction: Transaction, text: str) -> ApiKey | None:
    """The key of a text. An unknown id takes as long as a wrong secret."""
    key, _, secret = text.partition("_") if text.isascii() and text.isprintable() else ("", "", "")
    row = transaction.row("SELECT * FROM api_keys WHERE id = :key", key=key)
    is_right = hmac.compare_digest(_hash(secret), row["hash"] if row else _hash(""))
    return _key_of(row) if row and is_right and row["revoked_at"] is None else None


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _key_of(row: Row) -> ApiKey:
    return ApiKey(
        id=row["id"],
        owner=row["owner"],
        scopes=msgspec.json.decode(row["scopes"], type=tuple[str, ...]),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )
