"""Tokens, the access file, request rates, the audit log, and what the settings refuse."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.config import Settings, is_loopback, parse_settings
from server.errors import ConfigError, RateLimited, Unauthenticated
from server.security.access import AccessList
from server.security.audit import KEPT_FILES, AuditLog
from server.security.gate import host_of
from server.security.rates import MAX_CLIENTS, Rates
from server.security.roles import Role
from server.security.tokens import hash_token, matches, new_token
from tests.secured import HASHES, TOKENS

# --- tokens and the access file ------------------------------------------------------------------


def entry(name: str = "reader", **values: Any) -> str:
    given = {"hashes": [HASHES[name]], "roles": ["reader"], **values}
    return f"[token.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())


def access(text: str) -> AccessList:
    return AccessList.parse(text.encode(), "access.toml")


def test_a_hash_fits_its_token_and_no_other_and_does_not_contain_it() -> None:
    token = new_token("feed")
    hashed = hash_token(token)
    assert matches(token, hashed) and not matches(token[:-1] + "-", hashed) and not matches("", hashed)
    assert token.split(".")[1] not in hashed and hash_token(token) != hashed, "salted"


@pytest.mark.parametrize(
    "token", ["", "feed", "feed.short", "feed.with a space" + "x" * 40, ".x" * 40, "a." + "x" * 300]
)
def test_what_could_be_guessed_is_no_token(token: str) -> None:
    with pytest.raises(ConfigError, match=r"^token: NAME.SECRET wanted") as refused:
        hash_token(token)
    assert not token or token not in str(refused.value)


def test_a_token_is_known_by_any_of_its_hashes_so_that_two_can_overlap() -> None:
    new = new_token("reader")
    both = access(entry(hashes=[HASHES["reader"], hash_token(new)]))
    for token in (TOKENS["reader"], new, new):  # the third from the cache
        identity = both.identify(token, (), 0)
        assert identity.name == "token:reader" and identity.roles == {Role.READER}


@pytest.mark.parametrize(
    "token",
    ["", "reader", TOKENS["reader"] + "x", TOKENS["other"], new_token("reader"), "é" * 50],
    ids=["none", "name only", "longer", "not in the file", "another secret", "not ASCII"],
)
def test_another_token_is_refused_without_a_hint(token: str) -> None:
    with pytest.raises(Unauthenticated, match=r"^authorization: this token is not, or no longer, accepted$"):
        access(entry()).identify(token, (), 0)


def test_without_token_the_certificate_counts_and_with_one_the_token_alone() -> None:
    both = access(entry() + '[certificate."media-1"]\nroles = ["producer"]\n')
    assert both.identify(None, ["10.0.0.1", "media-1"], 0).name == "certificate:media-1"
    assert both.identify(TOKENS["reader"], ["media-1"], 0).name == "token:reader"
    with pytest.raises(Unauthenticated):
        both.identify("reader.wrong", ["media-1"], 0)
    with pytest.raises(Unauthenticated, match="certificate's name"):
        both.identify(None, ["media-2"], 0)
    with pytest.raises(Unauthenticated, match="Bearer TOKEN"):
        both.identify(None, [], 0)


def test_credentials_expire_also_when_they_are_remembered() -> None:
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    dated = access(entry() + f"expires = {expires.isoformat()}\n")
    at_ms = int(expires.timestamp() * 1000)
    assert dated.identify(TOKENS["reader"], (), at_ms - 1)
    with pytest.raises(Unauthenticated, match="expired"):
        dated.identify(TOKENS["reader"], (), at_ms)


def test_a_producer_may_use_its_own_name_unless_other_ids_are_listed() -> None:
    own = access(entry()).identify(TOKENS["reader"], (), 0)
    assert own.may_produce_as("reader") and not own.may_produce_as("p")
    listed = access(entry(producer_ids=["p", "q"])).identify(TOKENS["reader"], (), 0)
    assert listed.may_produce_as("p") and not listed.may_produce_as("reader")
    assert access(entry(producer_ids=["*"])).identify(TOKENS["reader"], (), 0).may_produce_as("whoever")


def test_remembered_tokens_are_bounded_and_wrong_ones_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.security.access.CACHE_ENTRIES", 2)
    known = access("".join(entry(name) for name in TOKENS))
    for token in TOKENS.values():
        with pytest.raises(Unauthenticated):
            known.identify(f"{token}x", (), 0)
    assert not known._accepted
    for token in TOKENS.values():
        assert known.identify(token, (), 0) is known.identify(token, (), 0)
        assert len(known._accepted) <= 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "at least one"),
        ("[token", "access.toml"),
        ("[user.x]\nroles=['reader']", "unknown ['user']"),
        ("token = 3", "[token.NAME] tables wanted"),
        ("[token.x]\nroles=['reader']", "token.x: hashes"),
        (entry(roles=[]), "token.reader: roles"),
        (entry(roles=["root"]), "token.reader: roles.0"),
        (entry(hashes=["SECRET"]), "token.reader: hashes"),
        (entry(hashes=[]), "token.reader: hashes"),
        (entry(extra=1), "token.reader: extra"),
        (entry(expires="tomorrow"), "token.reader: expires"),
        (entry() + "expires = 2030-01-01T00:00:00\n", "token.reader: expires"),
        (entry(producer_ids=[""]), "token.reader: producer_ids"),
        (entry(requests_per_second=-1), "token.reader: requests_per_second"),
        (entry().replace("token.reader", 'token."-x"'), "token.-x"),
        ('[certificate.""]\nroles=["reader"]', "certificate.: a name"),
    ],
)
def test_a_wrong_access_file_is_refused_with_entry_and_key_and_without_values(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        access(text)
    assert told in str(refused.value) and "SECRET" not in str(refused.value)
    assert HASHES["reader"] not in str(refused.value)


# --- rates --------------------------------------------------------------------------------------


def test_a_bucket_lets_its_burst_through_and_then_its_rate() -> None:
    now = [100.0]
    rates = Rates(burst_s=2.0, now_s=lambda: now[0])
    for _ in range(20):
        rates.take("a", 10.0)
    with pytest.raises(RateLimited, match="a: more than 10 requests per second; retry after 100 ms") as refused:
        rates.take("a", 10.0)
    assert refused.value.retry_ms == 100
    rates.take("b", 10.0)  # its own bucket
    now[0] += 0.1
    rates.take("a", 10.0)
    with pytest.raises(RateLimited):
        rates.take("a", 10.0)


def test_a_batch_may_overdraw_its_bucket_and_is_paid_for_by_waiting() -> None:
    now = [0.0]
    rates = Rates(burst_s=1.0, now_s=lambda: now[0])
    for _ in range(9):
        rates.take("a", 10.0)
    rates.take("a", 10.0)  # the last that fits, and it turns out to be a batch of 41
    rates.overdraw("a", 10.0, 40)
    with pytest.raises(RateLimited) as refused:
        rates.take("a", 10.0)
    assert refused.value.retry_ms == 4_100
    now[0] += 4.1
    rates.take("a", 10.0)


def test_no_rate_is_no_limit_and_clients_are_bounded() -> None:
    rates = Rates(burst_s=1.0, now_s=lambda: 0.0)
    for _ in range(100):
        rates.take("a", 0.0)
    for i in range(MAX_CLIENTS + 5):
        rates.take(str(i), 1.0)
    assert len(rates._buckets) == MAX_CLIENTS


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.1.2.3:5555", "10.1.2.3"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5555", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:5555", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:5555", "10.1.2.3"),
        ("unix:/tmp/x", "unix:/tmp/x"),
    ],
)
def test_a_client_without_name_is_its_address_without_port(peer: str, host: str) -> None:
    assert host_of(peer) == host


# --- audit --------------------------------------------------------------------------------------


def test_the_audit_log_is_private_rotates_by_size_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, max_bytes=1_000)
    for i in range(200):
        audit.write("token:ops", "Admin/BlockStream", "OK", {"request": {"stream_id": f"s{i}", "reason": "\n\u2028x"}})
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == KEPT_FILES + 1 and all(file.stat().st_size <= 1_000 for file in files)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["request"]["stream_id"] == "s199" and lines[-1]["who"] == "token:ops" and lines[-1]["at"]


def test_a_line_that_cannot_be_written_is_counted_and_harms_nobody(tmp_path: Path) -> None:
    lost: list[int] = []
    audit = AuditLog(tmp_path / "sub" / "audit.jsonl", 1_000, lambda: lost.append(1))
    audit.close()
    audit.write("who", "what", "OK", {})
    assert lost == [1]
    with pytest.raises(ConfigError, match=r"^security\.audit_file: "):
        AuditLog(tmp_path, 1_000)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "example.com", "localhost.example.com", ""])
def test_an_open_server_beyond_loopback_is_refused_unless_allowed(host: str) -> None:
    with pytest.raises(ConfigError, match=r"serve.host: .* security.cert_file and security.access_file are not set"):
        parse_settings({"serve": {"host": host}})
    allowed = parse_settings({"serve": {"host": host}, "security": {"allow_insecure_public": True}})
    assert allowed.metrics_host == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host) and parse_settings({"serve": {"host": host}}).metrics_host == host


def test_beyond_loopback_both_tls_and_an_access_file_are_needed() -> None:
    tls: dict[str, Any] = {"cert_file": "c.pem", "key_file": "k.pem"}
    with pytest.raises(ConfigError, match=r"security.access_file is not set, so anybody could publish and administer"):
        parse_settings({"serve": {"host": "0.0.0.0"}, "security": tls})
    with pytest.raises(ConfigError, match=r"security.cert_file is not set, so anybody could read along"):
        parse_settings({"serve": {"host": "0.0.0.0"}, "security": {"access_file": "a.toml"}})
    safe = parse_settings({"serve": {"host": "0.0.0.0"}, "security": {**tls, "access_file": "a.toml"}})
    assert safe.metrics_host == "127.0.0.1"
    shown = Settings(serve=safe.serve, security=safe.security.model_copy(update={"public_metrics": True}))
    assert shown.metrics_host == "0.0.0.0"


@pytest.mark.parametrize(
    ("security", "told"),
    [
        ({"cert_file": "c.pem"}, "cert_file and key_file: both or none"),
        ({"client_ca_file": "ca.pem"}, "client_ca_file: needs cert_file"),
        ({"producers_own_streams": True}, "producers_own_streams: needs access_file"),
        ({"tokens": "x"}, "security.tokens"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(security: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_settings({"security": security})
