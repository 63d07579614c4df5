"""Encrypted channels: whom the server believes, whom it turns away, certificates that change while it serves."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import admin_pb2, admin_pb2_grpc, liveness_pb2, liveness_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from server.__main__ import main
from server.app import App
from server.channel import client_settings, open_channel
from server.errors import ConfigError
from tests.app import serving_app, status_of
from tests.certificates import Authority
from tests.secured import TOKENS, channel, write_access
from tests.triton_server import eventually


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


def tls(folder: Path, ours: Authority, mutual: bool = False, **more: Any) -> dict[str, Any]:
    """The server's [security] with TLS."""
    cert, key = ours.issue("server")
    access = write_access(
        folder / "access.toml", "reader", "admin", certificates={"feed.example": ["reader"], "common": ["admin"]}
    )
    ca = {"client_ca_file": str(ours.ca_file)} if mutual else {}
    return {"cert_file": str(cert), "key_file": str(key), "access_file": str(access), **ca, **more}


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, ours: Authority) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("encrypted")
    with serving_app(folder, security=tls(folder, ours)) as app:
        yield app


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, ours: Authority) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("mutual")
    with serving_app(folder, security=tls(folder, ours, mutual=True)) as app:
        yield app


def ask(made: grpc.Channel) -> str:
    """The status of a CheckLive over this channel."""
    with made:
        try:
            liveness_pb2_grpc.LivenessStub(made).CheckLive(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        except grpc.RpcError as error:
            return status_of(error)[0]
    return "OK"


def test_a_client_that_trusts_the_authority_and_has_a_token_gets_in(encrypted: App, ours: Authority) -> None:
    assert ask(channel(encrypted.port, TOKENS["reader"], ca_file=ours.ca_file)) == "OK"
    assert ask(channel(encrypted.port, ca_file=ours.ca_file)) == "UNAUTHENTICATED"
    assert ask(channel(encrypted.port, TOKENS["admin"], ca_file=ours.ca_file)) == "PERMISSION_DENIED"


def test_plain_text_and_distrust_and_another_name_do_not_connect(
    encrypted: App, ours: Authority, theirs: Authority
) -> None:
    token = TOKENS["reader"]
    assert ask(channel(encrypted.port, token)) == "UNAVAILABLE"
    assert ask(channel(encrypted.port, token, ca_file=theirs.ca_file)) == "UNAVAILABLE"
    assert ask(channel(encrypted.port, token, ca_file=ours.ca_file, server_name="else.where")) == "UNAVAILABLE"
    assert ask(channel(encrypted.port, token, ca_file=ours.ca_file, server_name="server")) == "OK"


def with_certificate(app: App, ours: Authority, issued: tuple[Path, Path], token: str | None = None) -> str:
    return ask(channel(app.port, token, ca_file=ours.ca_file, cert_file=issued[0], key_file=issued[1]))


def test_a_certificate_gives_its_name_the_roles_of_the_access_file(mutual: App, ours: Authority) -> None:
    assert with_certificate(mutual, ours, ours.issue("feed.example")) == "OK"
    assert with_certificate(mutual, ours, ours.issue("unknown.example")) == "UNAUTHENTICATED"
    assert with_certificate(mutual, ours, ours.issue("common", alternative=False)) == "PERMISSION_DENIED"
    # A token, if one comes, is what counts.
    assert with_certificate(mutual, ours, ours.issue("unknown.example"), TOKENS["reader"]) == "OK"
    assert with_certificate(mutual, ours, ours.issue("feed.example"), "reader.wrong") == "UNAUTHENTICATED"


def test_without_a_valid_certificate_of_the_authority_nobody_connects(
    mutual: App, ours: Authority, theirs: Authority
) -> None:
    assert ask(channel(mutual.port, TOKENS["reader"], ca_file=ours.ca_file)) == "UNAVAILABLE"
    assert with_certificate(mutual, ours, theirs.issue("feed.example")) == "UNAVAILABLE"
    assert with_certificate(mutual, ours, ours.issue("feed.example", days=-1)) == "UNAVAILABLE"


def test_a_client_believes_no_expired_server(tmp_path: Path, ours: Authority) -> None:
    settings = tls(tmp_path, ours)
    cert, key = ours.issue("old", days=-1)
    with serving_app(tmp_path, security={**settings, "cert_file": str(cert), "key_file": str(key)}) as app:
        assert ask(channel(app.port, TOKENS["reader"], ca_file=ours.ca_file)) == "UNAVAILABLE"


def shown(app: App) -> bytes:
    """The certificate that the server shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", app.port), 10.0) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        certificate = wrapped.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def test_certificates_are_renewed_without_a_restart_and_wrong_ones_are_not_taken(
    tmp_path: Path, ours: Authority
) -> None:
    settings = tls(tmp_path, Authority(tmp_path / "own", "own"), reload_ms=1)
    with serving_app(tmp_path, security=settings) as app:
        open_before = channel(app.port, TOKENS["reader"], ca_file=tmp_path / "own" / "own.pem")
        check = liveness_pb2_grpc.LivenessStub(open_before).CheckLive
        check(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        first = shown(app)
        key = Path(settings["key_file"])
        good = key.read_bytes()
        failed = app.metrics.security_reloads.labels("certificates", "failed")
        for wrong in (b"no key", ours.issue("other")[1].read_bytes()):
            key.write_bytes(wrong)
            before = failed._value.get()
            eventually(lambda was=before: shown(app) and failed._value.get() > was, what="the wrong key was seen")
            assert shown(app) == first
        key.write_bytes(good)
        ours.issue("server")
        for name in ("cert_file", "key_file"):  # of another authority now
            Path(settings[name]).write_bytes(ours.issue("server")[name == "key_file"].read_bytes())
        cert, private = ours.issue("server")
        Path(settings["cert_file"]).write_bytes(cert.read_bytes())
        Path(settings["key_file"]).write_bytes(private.read_bytes())
        eventually(lambda: shown(app) != first, what="the new certificate is shown")
        assert ask(channel(app.port, TOKENS["reader"], ca_file=ours.ca_file)) == "OK"
        check(liveness_pb2.CheckLiveRequest(), timeout=10.0)  # a connection that was open goes on
        open_before.close()


@pytest.mark.parametrize("name", ["cert_file", "key_file", "client_ca_file", "access_file"])
def test_a_file_that_cannot_be_used_ends_the_start_with_its_key(tmp_path: Path, ours: Authority, name: str) -> None:
    settings = tls(tmp_path, ours, mutual=True)
    for wrong, told in ((tmp_path / "nowhere.pem", "cannot be read"), (tmp_path / "empty.pem", "")):
        (tmp_path / "empty.pem").write_text("")
        refused = pytest.raises(ConfigError, match=f"security.*{name}.*{told}")
        with refused, serving_app(tmp_path, security={**settings, name: str(wrong)}):
            pass


# --- the command line and channels ---------------------------------------------------------------


def test_rank_and_explain_come_with_tls_and_a_token(
    encrypted: App, ours: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKENS["reader"] + "\n")
    server = f"127.0.0.1:{encrypted.port}"
    options = ["--server", server, "--ca-file", str(ours.ca_file), "--token-file", str(token_file)]
    assert main(["rank", *options]) == 0 and "degradation" in capsys.readouterr().out
    assert main(["explain", *options, "ghost"]) == 1 and "NOT_FOUND" in capsys.readouterr().err
    assert main(["rank", "--server", server, "--ca-file", str(ours.ca_file)]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    monkeypatch.setenv("LIVERANK_CLIENT__CA_FILE", str(ours.ca_file))
    monkeypatch.setenv("LIVERANK_CLIENT__TOKEN", TOKENS["reader"])
    assert main(["rank", "--server", server]) == 0
    assert TOKENS["reader"] not in repr(client_settings())


def test_a_token_does_not_travel_unencrypted_and_half_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a token goes to 192\.0\.2\.1:7710 over TLS only"):
        open_channel("192.0.2.1:7710", client_settings(token="t"))
    with pytest.raises(ConfigError, match="cert_file and key_file: both or none"):
        open_channel("127.0.0.1:7710", client_settings(cert_file="c.pem"))
    with pytest.raises(ConfigError, match=r"token_file: /nowhere cannot be read"):
        open_channel("127.0.0.1:7710", client_settings(token_file="/nowhere"))


def test_a_made_token_and_its_entry_work_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    out = tmp_path / "feed.token"
    assert main(["token", "new", "feed", "--roles", "reader", "admin", "--producer-ids", "a", "--out", str(out)]) == 0
    entry = capsys.readouterr().out
    assert out.stat().st_mode & 0o777 == 0o600 and out.read_text().split(".")[1].strip() not in entry
    assert main(["token", "new", "feed", "--roles", "reader", "--out", str(out)]) == 2, "not overwritten"
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(TOKENS["admin"] + "\n"))
    assert main(["token", "hash"]) == 0
    hashed = capsys.readouterr().out.strip()
    access = tmp_path / "access.toml"
    access.write_text(f'{entry}\n[token.admin]\nhashes = ["{hashed}"]\nroles = ["admin"]\n')
    with serving_app(tmp_path, security={"access_file": str(access)}) as app:
        for settings in (client_settings(token_file=out), client_settings(token=TOKENS["admin"])):
            with open_channel(f"127.0.0.1:{app.port}", settings) as made:
                admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0)
        with open_channel(f"127.0.0.1:{app.port}", client_settings(token_file=out)) as made:
            ranking_pb2_grpc.RankingStub(made).Rank(ranking_pb2.RankRequest(), timeout=10.0)
    assert main(["token", "new", "bad name", "--roles", "reader"]) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert main(["token", "hash"]) == 2
