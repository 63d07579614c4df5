"""`liverank model` as people type it: with a token, against a server that asks for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.__main__ import main
from tests.app import running_app
from tests.rollout import lattice_net, settings, some_streams
from tests.secured import TOKENS, write_access


def test_the_commands_go_the_whole_way_and_name_who_did_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made" / "trendiness" / "2"
    made.mkdir(parents=True)
    (made / "model.onnx").write_bytes(lattice_net(2).SerializeToString())
    (made / "metrics.json").write_text('{"headline": {"auc": 0.875}, "commit": "abc1234"}')
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client)
        server = ["--server", f"127.0.0.1:{client.app.port}"]

        def liverank(*words: str) -> str:
            assert main(["model", *words, *server]) == 0
            return capsys.readouterr().out

        assert "auc 0.875" in liverank("push", str(made), "--why", "trained on May")
        assert "shadow at 50 %" in liverank("shadow", "trendiness/2", "--percent", "50", "--why", "a look")
        assert "canary at 1 %" in liverank("canary", "trendiness/2", "--percent", "1", "--hold", "60", "--why", "try")
        assert main(["model", "promote", "trendiness/2", "--why", "hasty", *server]) == 1
        assert "FAILED_PRECONDITION: version 2 is in canary at 1 %" in capsys.readouterr().err
        assert "serving: trendiness/2" in liverank("promote", "trendiness/2", "--force", "--why", "it is good")
        assert "0.875" in liverank("diff", "trendiness/1", "trendiness/2")
        shown = liverank("list")
        assert "serving" in shown and "previous" in shown
        assert "peer:127.0.0.1  push trendiness/2  OK: trained on May" in shown
        assert "promote trendiness/2  REFUSED: hasty (version 2 is in canary" in shown
        assert "serving: trendiness/1" in liverank("rollback", "--why", "it was not")
        told = json.loads(liverank("list", "--json", "--history", "1"))
        assert told["models"][0]["history"][0]["step"] == "rollback"
    for words in (["push", "nowhere", "--why", "x"], ["push", str(tmp_path), "--why", "x"], ["diff", "a/1", "b/2"]):
        assert main(["model", *words]) == 2
        assert "liverank: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["model", "promote", "trendiness/2"])
    assert "--why" in capsys.readouterr().err


def test_a_token_without_the_role_is_refused_and_one_with_it_is_named_in_both_audit_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = write_access(tmp_path / "access.toml", "reader", "admin", producer_ids=["*"])
    for role in ("reader", "admin"):
        (tmp_path / role).write_text(TOKENS[role])
    security = {"access_file": str(access), "audit_file": str(tmp_path / "audit.jsonl")}
    with running_app(tmp_path, security=security, **settings(tmp_path)) as client:
        server = ["--server", f"127.0.0.1:{client.app.port}"]
        command = ["model", "rollback", "--why", "because", *server, "--token-file"]
        assert main([*command, str(tmp_path / "reader")]) == 1
        assert "PERMISSION_DENIED" in capsys.readouterr().err
        assert main([*command, str(tmp_path / "admin")]) == 1
        assert "FAILED_PRECONDITION: there is no candidate" in capsys.readouterr().err
    (line,) = (tmp_path / "events.rollout.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["who"], entry["what"], entry["outcome"], entry["why"]) == (
        "token:admin", "rollback", "REFUSED", "because",
    )  # fmt: skip
    audited = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(e["who"], e["outcome"]) for e in audited if e["what"].endswith("/RollbackModel")] == [
        ("token:reader", "PERMISSION_DENIED"), ("token:admin", "FAILED_PRECONDITION"),
    ]  # fmt: skip


def test_the_pytorch_lines_of_the_documentation_make_a_version_that_can_be_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    lines = page.partition("**PyTorch.**")[2].partition("```python\n")[2].partition("```")[0]

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, features):  # type: ignore[no-untyped-def]
            return torch.sigmoid(torch.nan_to_num(features).mean(dim=1) * 1e-6)

    monkeypatch.chdir(tmp_path)
    exec(lines, {"model": Net(), "auc": 0.7})
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client, 20)
        command = ["model", "push", "build/models/trendiness/2", "--why", "as in the book"]
        assert main([*command, "--server", f"127.0.0.1:{client.app.port}"]) == 0, capsys.readouterr().err
    assert "candidate: trendiness/2, pushed" in capsys.readouterr().out
