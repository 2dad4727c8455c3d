"""The compose file: it is one, it hides secrets, and what it mounts is what wanforge, Prometheus and Grafana read."""

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import ROOT
from wanforge.runtime.service.settings import load_settings
from wanforge.version import __version__

FOLDER = ROOT / "integrations/container"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MADE = ("pg_service.conf", "postgres_password", "grafana_password", "monitor_key", "s3_identities.json")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder in which secrets.sh has made secrets."""
    shutil.copy(FOLDER / "secrets.sh", tmp_path)
    subprocess.run(["sh", tmp_path / "secrets.sh"], check=True)
    return tmp_path


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_specification_knows_every_field(name: str) -> None:
    compose = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    # It reads JSON, in which the parts that services have in common are already in place.
    compose.PyCompose.from_json(json.dumps(yaml.safe_load((FOLDER / name).read_text()))).validate()


def test_every_file_that_is_mounted_is_there(made: Path) -> None:
    for each in COMPOSE["configs"].values():
        assert (FOLDER / re.sub(r"\$\{\w+:-(.+)\}", r"\1", each["file"])).is_file()
    assert {Path(each["file"]).name for each in COMPOSE["secrets"].values()} == set(MADE)
    assert {path.name for path in (made / "secrets").iterdir()} == set(MADE)
    assert COMPOSE["x-wanforge"]["build"]["dockerfile"] == "integrations/container/Containerfile"


def test_every_service_is_locked_down_and_none_holds_a_secret() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY", variable):
                assert value.startswith("/run/secrets/") or value == f"${{{variable}:-}}", variable


def test_images_have_the_version_of_wanforge_and_no_image_is_whatever_is_newest() -> None:
    images = [service["image"] for service in COMPOSE["services"].values()]
    assert {image for image in images if image.startswith("wanforge")} == {f"wanforge:{__version__}-cpu"}
    assert all(re.search(r":v?\d", image) for image in images)
    graphics = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text())["services"]["server"]
    assert graphics["image"] == f"wanforge:{__version__}-cuda"


@pytest.mark.parametrize(("name", "results"), [("serve.toml", ""), ("serve-s3.toml", "s3://wanforge/results")])
def test_wanforge_reads_the_settings(name: str, results: str) -> None:
    found = load_settings(FOLDER / name)
    server = COMPOSE["services"]["server"]
    assert found.results == results
    assert f"service:{found.data}" in server["volumes"]
    assert server["ports"] == [f"127.0.0.1:{found.port}:{found.port}"]
    bundle = COMPOSE["services"]["bundle"]["command"]
    assert [each.path for each in found.bundles] == [bundle[bundle.index("--out") + 1]]


def test_secrets_are_made_once_and_are_not_open_to_other_users(made: Path) -> None:
    secrets = made / "secrets"
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE((made / ".env").stat().st_mode) == 0o600
    (identity,) = json.loads(before["s3_identities.json"])["identities"]
    assert identity["credentials"][0]["secretKey"] in (made / ".env").read_text()
    assert before["postgres_password"] in before["pg_service.conf"]
    assert len({before["postgres_password"], before["grafana_password"], identity["credentials"][0]["secretKey"]}) == 3
    subprocess.run(["sh", made / "secrets.sh"], check=True)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


def made_with(env: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What secrets.sh does where there is an .env already."""
    shutil.copy(FOLDER / "secrets.sh", folder)
    (folder / ".env").write_text(env)
    return subprocess.run(["sh", folder / "secrets.sh"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("env", ["", "COMPOSE_PROFILES=s3", "COMPOSE_PROFILES=s3\nAWS_ACCESS_KEY_ID=\n"])
def test_a_key_of_s3_is_made_beside_the_variables_that_there_are(env: str, tmp_path: Path) -> None:
    assert made_with(env, tmp_path).returncode == 0
    found = dict(line.split("=") for line in (tmp_path / ".env").read_text().splitlines() if line)
    (identity,) = json.loads((tmp_path / "secrets/s3_identities.json").read_text())["identities"]
    key = identity["credentials"][0]
    assert (key["accessKey"], key["secretKey"]) == (found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"])
    assert len(key["accessKey"]) == len(key["secretKey"]) == 48
    assert found.get("COMPOSE_PROFILES", "") == ("s3" if env else "")
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_a_key_of_s3_that_there_is_stays(tmp_path: Path) -> None:
    env = 'AWS_ACCESS_KEY_ID="mine"\nAWS_SECRET_ACCESS_KEY=hidden\n'
    assert made_with(env, tmp_path).returncode == 0
    assert (tmp_path / ".env").read_text() == env
    (identity,) = json.loads((tmp_path / "secrets/s3_identities.json").read_text())["identities"]
    assert identity["credentials"] == [{"accessKey": "mine", "secretKey": "hidden"}]


def test_half_a_key_of_s3_is_refused(tmp_path: Path) -> None:
    done = made_with("AWS_ACCESS_KEY_ID=mine\n", tmp_path)
    assert done.returncode == 1
    assert "give both" in done.stderr
    assert not (tmp_path / "secrets/s3_identities.json").exists()


def test_the_page_writes_keys_only_where_nobody_else_can_read_them() -> None:
    block = (ROOT / "docs/containers.md").read_text().split("```bash\ncd integrations/container\n")[1].split("```")[0]
    written = re.findall(r" > (\S+)", block)
    assert written
    assert all(place.startswith("secrets/") for place in written)


def test_git_keeps_no_secret() -> None:
    done = subprocess.run(
        ["git", "check-ignore", *(f"secrets/{name}" for name in MADE), ".env"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 128:
        pytest.skip("this is no checkout of git")
    assert len(done.stdout.splitlines()) == len(MADE) + 1


def test_prometheus_reads_its_settings_and_the_rules(tmp_path: Path, made: Path) -> None:
    program = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian's package prometheus)")
    text = (FOLDER / "prometheus.yml").read_text()
    text = text.replace("/etc/prometheus/alerts.yml", str(ROOT / "integrations/service/alerts.yml"))
    file = tmp_path / "prometheus.yml"
    file.write_text(text.replace("/run/secrets/monitor_key", str(made / "secrets/monitor_key")))
    done = subprocess.run([program, "check", "config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 rules found" in done.stdout


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    mounted = {each["source"]: each["target"] for each in COMPOSE["services"]["grafana"]["configs"]}
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards.yaml").read_text())["providers"]
    assert Path(mounted["dashboard"]).parent == Path(provider["options"]["path"])
    (source,) = yaml.safe_load((FOLDER / "grafana/sources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]


@pytest.mark.slow
def test_the_password_of_the_database_is_read_from_a_file(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    from wanforge.runtime.service.store.base import StoreError
    from wanforge.runtime.service.store.sql_store import open_store

    named = psycopg.conninfo.conninfo_to_dict(postgres_url)
    service = tmp_path / "pg_service.conf"
    service.write_text("[wanforge]\n" + "".join(f"{name}={value}\n" for name, value in named.items()))
    service.chmod(0o444)  # as a secret is mounted; a password file of libpq might not be read by others
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    store = open_store(load_settings(FOLDER / "serve.toml").store)
    try:
        key, _ = store.add_key("ann")
        assert [each.id for each in store.api_keys()] == [key.id]
    finally:
        store.close()
    service.chmod(0o600)
    service.write_text("[wanforge]\nhost=/nowhere\n")
    with pytest.raises(StoreError, match="of the service 'wanforge' cannot be reached"):
        open_store(load_settings(FOLDER / "serve.toml").store)
