"""The checks of `ragtune doctor --security`: each danger is found, and a safe machine has none."""

import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ragtune_ray import cli, config
from ragtune_ray.cluster import security
from ragtune_ray.cluster.doctor import Finding


@pytest.fixture(autouse=True)
def safe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without anything to find; each test adds one danger."""
    for name in (*security.UNSAFE, "RAGTUNE_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setattr(psutil, "net_connections", lambda **_: [])


def findings(tmp_path: Path, *overrides: str) -> dict[str, Finding]:
    """The findings that are not ok, by name; each has a fix."""
    found = security.examine_security(config.Config().using(f"workspace={tmp_path}", *overrides))
    bad = {each.name: each for each in found if each.level != "ok"}
    assert all(each.fix for each in bad.values())
    return bad


def listening(ip: str, port: int, status: str = psutil.CONN_LISTEN) -> SimpleNamespace:
    return SimpleNamespace(laddr=SimpleNamespace(ip=ip, port=port), status=status)


def test_a_safe_machine_has_no_finding(tmp_path: Path) -> None:
    assert findings(tmp_path) == {}


@pytest.mark.parametrize(
    ("ip", "port"),
    [("0.0.0.0", 8265), ("::", 8265), ("10.0.0.7", 8265), ("10.0.0.7", 6379), ("10.0.0.7", 10001)],  # noqa: S104
)
def test_ports_of_ray_that_others_reach_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ip: str, port: int
) -> None:
    others = [listening("127.0.0.1", other) for other in (6379, 8265, 10001) if other != port]
    monkeypatch.setattr(psutil, "net_connections", lambda **_: [listening(ip, port), *others])
    (found,) = findings(tmp_path).values()
    assert (found.name, found.level) == (f"port {port}", "note"), "a token is required"
    assert ip in found.text
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert {name: each.level for name, each in findings(tmp_path).items()} == {
        "ray auth": "note",
        f"port {port}": "failed",
    }


def test_the_ports_of_this_machine_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104 - that is the danger
        monkeypatch.setattr(security, "RAY_PORTS", {server.getsockname()[1]: "a port"})
        assert f"port {server.getsockname()[1]}" in findings(tmp_path)


def test_a_token_that_others_can_read_is_found(tmp_path: Path) -> None:
    (tmp_path / "token").chmod(0o644)
    (found,) = findings(tmp_path).values()
    assert found.fix == f"chmod 600 {tmp_path / 'token'}"


@pytest.mark.parametrize(
    ("name", "unsafe", "harmless"),
    [
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", "0"),
        ("RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "1", "0"),
        ("SSLKEYLOGFILE", "/tmp/keys", ""),
        ("HF_ENDPOINT", "http://hub.example", "https://hub.example"),
    ],
)
def test_variables_that_undo_a_protection_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unsafe: str, harmless: str
) -> None:
    monkeypatch.setenv(name, unsafe)
    (found,) = findings(tmp_path).values()
    assert (found.level, found.fix) == ("failed", f"unset {name}")
    monkeypatch.setenv(name, harmless)
    assert findings(tmp_path) == {}


def test_an_open_endpoint_and_readable_keys_are_found(tmp_path: Path) -> None:
    assert set(findings(tmp_path, "serve.host=0.0.0.0")) == {"endpoint"}
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: [{name: a, key: a-key-of-sixteen-characters}]")
    keys.chmod(0o640)
    (found,) = findings(tmp_path, "serve.host=0.0.0.0", f"serve.keys_path={keys}").values()
    assert (found.level, found.fix) == ("failed", f"chmod 600 {keys}")
    keys.chmod(0o600)
    assert findings(tmp_path, "serve.host=0.0.0.0", f"serve.keys_path={keys}") == {}


def test_an_unencrypted_server_of_others_is_found(tmp_path: Path) -> None:
    engine = "generator.engine=openai"
    assert set(findings(tmp_path, engine, "generator.base_url=http://10.0.0.7/v1")) == {"generator.base_url"}
    assert findings(tmp_path, engine, "generator.base_url=http://127.0.0.1:8000/v1") == {}
    assert findings(tmp_path, engine, "generator.base_url=https://api.example/v1") == {}


def test_a_workspace_that_anyone_can_write_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert set(findings(tmp_path)) == {"workspace"}
    tmp_path.chmod(0o777 | stat.S_ISVTX)
    assert findings(tmp_path) == {}


def test_the_command_runs_only_these_checks_and_fails_if_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"workspace: {tmp_path}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", str(path), "--security"])
    assert ended.value.code == 0, capsys.readouterr().err
    monkeypatch.setenv("SSLKEYLOGFILE", "/tmp/keys")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", str(path), "--security"])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "failed  environment: SSLKEYLOGFILE=/tmp/keys: the keys of encrypted connections" in said
    assert "end to end" not in said
