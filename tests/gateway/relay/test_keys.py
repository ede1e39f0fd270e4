"""API keys: who is let in, what each may do, and how often."""

import json
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.gateway.relay.ending import Answer
from chiron.gateway.relay.errors import ApiError, invalid, too_many
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import ANONYMOUS, Key, hash_secret, new_secret

A, B, ADMIN = "secret-a", "secret-b", "secret-admin"


def hashed(secret: str) -> str:
    return "sha256:" + sha256(secret.encode()).hexdigest()


def ring(**limits: float) -> KeyRing:
    return KeyRing(
        [Key(name="a", hash=hashed(A), models=("m1",), classes=("chat",), **limits), Key(name="b", hash=hashed(B))],
        hashed(ADMIN),
    )


def bearer(secret: str) -> bytes:
    return b"Bearer " + secret.encode()


def test_a_key_is_known_by_its_hash() -> None:
    keys = ring()
    assert keys.check(bearer(A)).name == "a"
    assert keys.check(b"bearer   " + B.encode() + b" ").owner == "b"
    assert keys.check(bearer(ADMIN)).owner is None
    assert keys.check_admin(bearer(ADMIN)).admin


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic abc", b"Bearer nope", b"Bearer \xff\x00"])
def test_anything_else_is_401(header: bytes | None) -> None:
    for check in (ring().check, ring().check_admin):
        with pytest.raises(ApiError) as caught:
            check(header)
        assert caught.value.status == 401
        assert caught.value.code == "invalid_api_key"
        assert (b"www-authenticate", b"Bearer") in caught.value.headers


def test_a_key_that_is_not_the_admins_is_403() -> None:
    with pytest.raises(ApiError) as caught:
        ring().check_admin(bearer(A))
    assert caught.value.status == 403
    with pytest.raises(ApiError) as caught:
        KeyRing([Key(name="a", hash=hashed(A))]).check_admin(bearer(A))
    assert caught.value.status == 403
    assert "admin_key_hash" in caught.value.message


def test_without_keys_everybody_is_anonymous_and_any_secret_will_do() -> None:
    keys = KeyRing()
    assert keys.check(None) is ANONYMOUS
    assert keys.check(b"Bearer sk-whatever") is ANONYMOUS
    assert KeyRing(admin_open=True).check_admin(None).admin
    with pytest.raises(ApiError):
        keys.check_admin(None)
    guarded = KeyRing(admin_hash=hashed(ADMIN), admin_open=True)
    assert guarded.check(b"Bearer sk-whatever") is ANONYMOUS
    assert guarded.check(bearer(ADMIN)).admin
    with pytest.raises(ApiError):
        guarded.check_admin(None)


def test_a_key_is_held_to_its_models_and_classes() -> None:
    key = ring().check(bearer(A))
    key.permit("m1", "chat")
    with pytest.raises(ApiError, match="m2"):
        key.permit("m2")
    with pytest.raises(ApiError, match="batch"):
        key.permit("m1", "batch")
    ring().check(bearer(B)).permit("m2", "batch")


def test_requests_per_minute_are_a_bucket_that_refills() -> None:
    keys = ring(requests_per_minute=2)
    key = keys.check(bearer(A))
    keys.take(key, 100.0)
    keys.take(key, 100.0)
    with pytest.raises(ApiError) as caught:
        keys.take(key, 100.0)
    assert caught.value.status == 429
    assert (b"retry-after", b"30") in caught.value.headers
    keys.take(key, 130.0)
    with pytest.raises(ApiError):
        keys.take(key, 130.0)
    for _ in range(100):
        keys.take(keys.check(bearer(B)), 130.0)


def test_tokens_per_minute_count_output_too_and_a_large_prompt_goes_into_debt() -> None:
    keys = ring(tokens_per_minute=600)
    key = keys.check(bearer(A))
    keys.take(key, 0.0, 6000)
    with pytest.raises(ApiError, match="600 tokens per minute") as caught:
        keys.take(key, 60.0, 1)
    assert (b"retry-after", b"481") in caught.value.headers
    keys.take(key, 600.0, 500)
    keys.charge(key, 100)
    with pytest.raises(ApiError):
        keys.take(key, 600.0, 1)


@given(
    limit=st.floats(0.1, 1000),
    gaps=st.lists(st.floats(0, 30), max_size=60),
)
def test_never_more_than_the_limit_and_a_burst(limit: float, gaps: list[float]) -> None:
    keys = ring(requests_per_minute=limit)
    key = keys.check(bearer(A))
    now_s, taken = 0.0, 0
    for gap in gaps:
        now_s += gap
        try:
            keys.take(key, now_s)
        except ApiError:
            continue
        taken += 1
    assert taken <= limit + limit * now_s / 60.0 + 1.0


def test_secrets_and_hashes_do_not_show() -> None:
    key = ring().check(bearer(A))
    assert A not in repr(key)
    assert key.hash not in repr(key)
    with pytest.raises(ValueError, match="hash") as caught:
        Key(name="x", hash="sk-plain-secret")
    assert "sk-plain-secret" not in str(caught.value)


def test_key_rings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="same hash"):
        KeyRing([Key(name="a", hash=hashed(A)), Key(name="b", hash=hashed(A))])
    with pytest.raises(ValueError, match="unique"):
        KeyRing([Key(name="a", hash=hashed(A)), Key(name="a", hash=hashed(B))])
    with pytest.raises(ValueError, match="admin"):
        KeyRing([Key(name="admin", hash=hashed(A))])
    with pytest.raises(ValueError, match="requests_per_minute"):
        Key(name="a", hash=hashed(A), requests_per_minute=0)


def test_a_new_secret_opens_what_its_hash_locks() -> None:
    secret = new_secret()
    assert KeyRing([Key(name="n", hash=hash_secret(secret.encode()))]).check(bearer(secret)).name == "n"
    assert new_secret() != secret


def test_errors_are_openais_objects() -> None:
    error = invalid("temperature is 3; allowed: 0 to 2", param="temperature")
    assert json.loads(error.body()) == {
        "error": {
            "message": "temperature is 3; allowed: 0 to 2",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        }
    }
    assert Answer(400, error.body()).event() == b"data: " + error.body() + b"\n\n"
    assert invalid("half a character: \ud800").body().isascii()
    assert (b"retry-after", b"1") in too_many("slow down", 0.2).headers
    assert (b"retry-after-ms", b"200") in too_many("slow down", 0.2).headers
