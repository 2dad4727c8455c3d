"""The chart: Helm itself renders it, and what comes out is what Kubernetes and wanforge understand."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.processes import ROOT
from wanforge.runtime.service.commands.serve import run
from wanforge.runtime.service.job import State
from wanforge.runtime.service.settings import load_settings
from wanforge.version import __version__

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")

CHART = ROOT / "integrations/helm"
EVERYTHING = {
    "results": {"secret": "s3", "environment": {"AWS_REGION": "eu-central-1"}},
    "bundles": {"kernels": "/bundles/kernels"},
    "prepare": {"arguments": ["import", "--recipe", "w8a8", "--out", "/bundles/tinywan"]},
    "autoscaling": {"enabled": True},
    "monitor": {"enabled": True},
    "ingress": {"enabled": True, "tlsSecret": "tls", "class": "nginx", "annotations": {"a": "b"}},
}
CPU = {"workers": {"target": "cpu", "gpus": 0}, "api": {"replicas": 1}, "bundles": {"claim": "models"}}
CUSTOM = ("ScaledObject", "ServiceMonitor")
"""Kinds that Kubernetes itself does not have."""


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a release named ``videos``."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="videos", namespace="prod")
    found = [each for name, text in texts.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text)]
    return [each for each in found if each]


def notes(values: dict[str, Any]) -> str:
    """What Helm tells after an installation."""
    with helm.Chart.load(str(CHART)) as chart:
        (found,) = [
            str(text)
            for name, text in chart.render(values, name="videos", namespace="prod").items()
            if name.endswith("NOTES.txt")
        ]
    return found


def only(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The one object of a kind, whose name ends with something."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name)]
    return found


def pod_of(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """What the pods of a deployment or a job are like."""
    found: dict[str, Any] = only(objects, kind, name)["spec"]["template"]["spec"]
    return found


def test_helm_finds_nothing_wrong() -> None:
    found = helm.lint(str(CHART))
    assert not found["errors"]
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


@pytest.mark.parametrize("values", [{}, EVERYTHING, CPU], ids=["defaults", "everything", "cpu"])
def test_kubernetes_knows_every_field(values: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    objects = rendered(values)
    assert len({(each["kind"], each["metadata"]["name"]) for each in objects}) == len(objects)
    for each in objects:
        if each["kind"] not in CUSTOM:
            kubernetes.validate(each, kubernetes.latest_version(), strict=True)


def test_what_is_optional_is_only_there_if_it_is_asked_for() -> None:
    usual = {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "PersistentVolumeClaim"}
    assert {each["kind"] for each in rendered({})} == usual
    assert {each["kind"] for each in rendered(EVERYTHING)} == usual | {"Job", "Ingress", *CUSTOM}
    assert "PersistentVolumeClaim" not in {each["kind"] for each in rendered(CPU)}


def test_every_pod_is_locked_down() -> None:
    objects = rendered(EVERYTHING)
    for kind, name in (("Deployment", "-api"), ("Deployment", "-worker"), ("Job", "")):
        pod = pod_of(objects, kind, name)
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
        assert writable == {"/var/lib/wanforge", "/tmp"} | ({"/bundles"} if kind == "Job" else set())


def test_no_object_holds_a_secret() -> None:
    objects = rendered(EVERYTHING)
    assert "Secret" not in {each["kind"] for each in objects}
    assert "password" not in json.dumps(objects).lower()


def test_wanforge_reads_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(only(rendered({}), "ConfigMap")["data"]["serve.toml"])
    found = load_settings(file)
    assert found.host == "0.0.0.0"
    assert found.data == "/var/lib/wanforge"
    assert found.store == "postgresql://?service=wanforge"
    assert found.results == "s3://wanforge/results"
    assert [each.path for each in found.bundles] == ["/bundles/tinywan"]
    pod = pod_of(rendered({}), "Deployment", "-api")
    assert found.port == pod["containers"][0]["ports"][0]["containerPort"]


def test_the_api_stays_reachable_without_workers() -> None:
    objects = rendered({})
    (api,) = pod_of(objects, "Deployment", "-api")["containers"]
    (worker,) = pod_of(objects, "Deployment", "-worker")["containers"]
    assert api["readinessProbe"]["httpGet"]["path"] == "/livez"
    assert worker["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert worker["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_wanforge_knows_the_options() -> None:
    known = {name: each for each in run.params for name in each.opts}
    for role in ("api", "worker"):
        (container,) = pod_of(rendered({}), "Deployment", f"-{role}")["containers"]
        assert container["args"] == ["serve", "--role", role, "--config", "/etc/wanforge/serve.toml"]
        assert role in known["--role"].type.choices
        assert "--config" in known


def test_a_worker_has_its_gpu_and_time_to_end() -> None:
    pod = pod_of(rendered({"workers": {"gpus": 2}}), "Deployment", "-worker")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["containers"][0]["image"].endswith(f":{__version__}-cuda")
    assert pod["terminationGracePeriodSeconds"] >= 60
    cpu = pod_of(rendered(CPU), "Deployment", "-worker")
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]
    assert cpu["containers"][0]["image"].endswith(f":{__version__}-cpu")


def test_an_image_can_be_named_by_its_digest() -> None:
    digest = "sha256:" + "0" * 64
    objects = rendered({"image": {"digests": {"api": digest}}})
    assert pod_of(objects, "Deployment", "-api")["containers"][0]["image"].endswith(f"wanforge@{digest}")


def test_the_queue_scales_the_workers() -> None:
    objects = rendered(EVERYTHING)
    scaled = only(objects, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == only(objects, "Deployment", "-worker")["metadata"]["name"]
    assert "replicas" not in only(objects, "Deployment", "-worker")["spec"]
    query = scaled["triggers"][0]["metadata"]["query"]
    assert "wanforge_jobs{" in query
    assert f'state=~"{State.QUEUED}|{State.IN_PROGRESS}"' in query


def test_the_notes_say_who_makes_keys_and_what_goes_undone_without_workers() -> None:
    usual, none_at_least = (notes({"autoscaling": {"enabled": True, "least": least}}) for least in (1, 0))
    assert "deploy/videos-wanforge-worker -- wanforge serve keys add" in usual
    assert "There may be no worker" not in usual
    assert "There may be no worker" in none_at_least
    assert "There may be no worker" not in notes({"autoscaling": {"least": 0}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"settings": 'store = "postgresql://wanforge:secret@db/wanforge"'},
        {"results": {"environment": {"AWS_SECRET_ACCESS_KEY": "secret"}}},
        {"results": {"place": "/var/results"}},
        {"workers": {"target": "cpu"}},
        {"workers": {"target": "cuda", "gpus": 0}},
        {"api": {"replicas": 0}},
        {"api": {"replica": 2}},
        {"image": {"digests": {"api": "latest"}}},
    ],
    ids=lambda wrong: json.dumps(wrong),
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError, match="values don't meet"):
        rendered(wrong)


def test_the_schema_is_one_and_takes_the_defaults() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    Draft7Validator.check_schema(schema)
    assert not list(Draft7Validator(schema).iter_errors(values))
    assert tomllib.loads(values["settings"])["bundles"]
