"""The chart, rendered by Helm's own engine: golden manifests, Kubernetes' schemas, and what values mean."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deploy.kubernetes import render
from sparse_serve.server.settings import Settings
from tests.deploy import dockerfile
from tests.docs.pages import blocks

helm = pytest.importorskip("helm_python", reason="of deploy/locks/deploy.txt, which `make test` installs")
validator = pytest.importorskip("kubernetes_validate", reason="of deploy/locks/deploy.txt, which `make test` installs")

VALUES = {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in (render.DEPLOY / "helm/values").glob("*.yaml")}
CUSTOM = {"monitoring.coreos.com/v1", "keda.sh/v1alpha1"}
"""Kinds that Kubernetes itself has no schema of."""

VERSIONS = ("1.30", validator.latest_version())
"""The oldest that the chart takes, and the newest that there is a schema of."""


def resources(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What is made, by kind."""
    made = render.render(values, **more)
    loaded = [yaml.safe_load(text) for path, text in made.items() if path.endswith(".yaml")]
    return {each["kind"]: each for each in loaded if each}


def changed(name: str, **values: Any) -> dict[str, Any]:
    """The values of a file, with others."""
    found = copy.deepcopy(VALUES[name])
    for path, value in values.items():
        *above, last = path.split("__")
        place = found
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return dict(found)


def server(values: dict[str, Any]) -> dict[str, Any]:
    return dict(resources(values)["Deployment"]["spec"]["template"]["spec"]["containers"][0])


def environ(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container["env"]}


def test_the_manifests_are_what_the_chart_makes() -> None:
    committed = {file.name: file.read_text("utf-8") for file in render.OUT_DIR.glob("*.yaml")}
    assert render.manifests() == committed, "run `make manifests`"


@pytest.mark.parametrize("name", sorted(VALUES))
def test_helm_lint_finds_nothing(name: str) -> None:
    found = helm.lint(str(render.CHART), VALUES[name], strict=True, kube_version="v1.30.0")
    info = 1
    assert [each for each in found["messages"] if each["severity"] > info] == [] and not found["errors"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(VALUES))
def test_kubernetes_takes_it(name: str, version: str) -> None:
    for kind, resource in resources(VALUES[name]).items():
        if resource["apiVersion"] not in CUSTOM:
            validator.validate(resource, version, strict=True)
        assert resource["metadata"]["name"] == "sparse-serve", kind


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_pod_is_nobody_on_a_read_only_root(name: str) -> None:
    pod = resources(VALUES[name])["Deployment"]["spec"]["template"]["spec"]
    user = int(dockerfile.stages("cpu")[-1].last("USER").rest.split(":")[0])
    assert pod["securityContext"]["runAsUser"] == user and pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["securityContext"] == expected
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/model", "/tmp"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {mount["name"] for each in [*pod["initContainers"], *pod["containers"]] for mount in each["volumeMounts"]}
    assert mounted == volumes


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_variable_is_a_setting_and_no_service_makes_others(name: str) -> None:
    """Kubernetes makes SPARSE_SERVE_PORT of a Service called so, and the server refuses what is no setting of it."""
    pod = resources(VALUES[name])["Deployment"]["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False
    named = {key for key in environ(pod["containers"][0]) if key.startswith("SPARSE_SERVE_")}
    assert named <= {f"SPARSE_SERVE_{field.upper()}" for field in Settings.model_fields}


@pytest.mark.parametrize(("drain_s", "pre_stop_s"), [(60, 10), (600, 5)])
def test_a_pod_gets_the_time_of_its_drain(drain_s: int, pre_stop_s: int) -> None:
    values = changed("cpu", server__drainSeconds=drain_s, server__preStopSeconds=pre_stop_s)
    pod = resources(values)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": pre_stop_s}}
    assert float(environ(container)["SPARSE_SERVE_DRAIN_S"]) == drain_s
    assert pod["terminationGracePeriodSeconds"] > drain_s + pre_stop_s


def test_probes_are_the_kubelet_s_or_from_inside_under_mutual_tls() -> None:
    plain, mutual = server(VALUES["cpu"]), server(VALUES["mtls"])
    tls = server(changed("cpu", tls__secret="t"))
    for probe, path in (("startupProbe", "readyz"), ("readinessProbe", "readyz"), ("livenessProbe", "healthz")):
        assert plain[probe]["httpGet"] == {"path": f"/{path}", "port": "http", "scheme": "HTTP"}
        assert tls[probe]["httpGet"]["scheme"] == "HTTPS"
        assert mutual[probe]["exec"] == {"command": ["sparse-serve-probe", path]}
    minutes = plain["startupProbe"]["failureThreshold"] * plain["startupProbe"]["periodSeconds"] / 60
    assert minutes == 20


def test_gpus_and_cores() -> None:
    cpu, cuda = server(VALUES["cpu"]), server(changed("cuda", gpu__count=2))
    assert cuda["resources"]["limits"]["nvidia.com/gpu"] == 2 and "nvidia.com/gpu" not in cpu["resources"]["limits"]
    assert environ(cpu)["VLLM_CPU_KVCACHE_SPACE"] == "4" and "OMP_NUM_THREADS" in environ(cpu)
    assert not {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"} & set(environ(cuda))


@pytest.mark.parametrize("kind", VALUES)
def test_nothing_asks_for_more_than_its_limit(kind: str) -> None:
    """A cluster would refuse the pod."""
    resources = server(VALUES[kind])["resources"]
    for name in resources["requests"].keys() & resources["limits"].keys():
        assert resources["requests"][name] == resources["limits"][name], name


@pytest.mark.parametrize("is_strict", [False, True])
def test_the_doctor_looks_first(is_strict: bool) -> None:
    found = resources(changed("cuda", doctor__strict=is_strict))["Deployment"]["spec"]["template"]["spec"]
    assert [each["name"] for each in found["initContainers"]] == ["fetch", "doctor"]
    doctor = found["initContainers"][1]
    assert doctor.get("args") == (["doctor", "/model"] if is_strict else None)
    without = resources(changed("cpu", doctor__enabled=False))["Deployment"]["spec"]["template"]["spec"]
    assert not without["initContainers"]


def test_autoscalers_own_the_number_of_replicas() -> None:
    assert resources(VALUES["cpu"])["Deployment"]["spec"]["replicas"] == 2
    keda, hpa = resources(VALUES["cuda"]), resources(VALUES["mtls"])
    for made, kind in ((keda, "ScaledObject"), (hpa, "HorizontalPodAutoscaler")):
        assert "replicas" not in made["Deployment"]["spec"]
        assert made[kind]["spec"]["scaleTargetRef"]["name"] == made["Deployment"]["metadata"]["name"]
    found = [each["metadata"] for each in keda["ScaledObject"]["spec"]["triggers"]]
    assert [each["threshold"] for each in found] == ["8", "64"]
    for each, metric in zip(found, ("waiting", "running"), strict=True):
        assert each["query"].startswith(f'sum(vllm:num_requests_{metric}{{namespace="default"')
    assert len(hpa["HorizontalPodAutoscaler"]["spec"]["metrics"]) == 2
    alone = resources(changed("cuda", autoscaling__runningRequests=0))["ScaledObject"]["spec"]["triggers"]
    assert len(alone) == 1


def test_what_belongs_together_has_the_labels_of_a_release() -> None:
    made = resources(VALUES["cuda"], name="other", namespace="there")
    labels = made["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        made["Deployment"]["spec"]["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert (
        made["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= made["Service"]["metadata"]["labels"].items()
    )
    assert made["Deployment"]["metadata"]["name"] == "other-sparse-serve"
    assert 'namespace="there"' in made["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]


def test_what_the_manual_says_to_install_is_what_the_chart_takes() -> None:
    shown = [command for block in blocks() if block.page == "docs/deploy.md" for command in block.commands]
    installs = [shlex.split(command) for command in shown if command.startswith("helm install")]
    assert installs
    for words in installs:
        _, _, name, chart, *flags = words
        assert render.DEPLOY.parent / chart == render.CHART
        values: dict[str, Any] = {}
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            if flag == "--values":
                values = yaml.safe_load((render.DEPLOY.parent / value).read_text("utf-8"))
            else:
                assert flag == "--set"
                path, _, setting = value.partition("=")
                above, _, last = path.partition(".")
                values.setdefault(above, {})[last] = setting
        assert resources(values, name=name)["Deployment"]


@pytest.mark.parametrize("name", ["gateway", "kserve", "model"])
def test_an_example_fits_the_chart_and_the_server(name: str) -> None:
    text = (render.OUT_DIR / "examples" / f"{name}.yaml").read_text("utf-8")
    made = {each["kind"]: each for each in yaml.safe_load_all(text)}
    if name == "model":
        for resource in made.values():
            validator.validate(resource, VERSIONS[-1], strict=True)
        assert made["PersistentVolumeClaim"]["metadata"]["name"] == VALUES["cpu"]["model"]["claim"]
    elif name == "gateway":
        chart = resources(VALUES["cpu"])
        pool = made["InferencePool"]["spec"]
        assert pool["selector"]["matchLabels"] == chart["Service"]["spec"]["selector"]
        ports = [port["containerPort"] for port in server(VALUES["cpu"])["ports"]]
        assert pool["targetPorts"][0]["number"] in ports
    else:
        (container,) = made["ServingRuntime"]["spec"]["containers"]
        named = {key for key in environ(container) if key.startswith("SPARSE_SERVE_")}
        assert named <= {f"SPARSE_SERVE_{field.upper()}" for field in Settings.model_fields}
        assert not made["InferenceService"]["metadata"]["name"].startswith("sparse-serve")
        grace_s = made["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"]
        assert grace_s > float(environ(container)["SPARSE_SERVE_DRAIN_S"]) + 10


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(helm.HelmError) as caught:
        render.render(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"auth": {"insecure": True}}, "model.claim"),
        ({"model": {"claim": "a", "fetch": {"image": "b"}}, "auth": {"insecure": True}}, "not both"),
        ({"model": {"claim": "a"}}, "auth.apiKeysSecret"),
        (changed("cpu", tls__clientCASecret="c"), "tls.secret"),
        (changed("cpu", serviceMonitor__enabled=True), "serviceMonitor.keySecret"),
        (changed("cpu", replica=3), "replica"),
        (changed("cpu", server__drainSeconds="1m"), "drainSeconds"),
        (changed("cpu", accelerator="tpu"), "accelerator"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], word: str) -> None:
    assert word in refused(values)


@pytest.mark.parametrize("break_it", [lambda pod: pod.update(restartPolcy="x"), lambda pod: pod.update(containers={})])
def test_the_schemas_find_what_is_wrong(break_it: Callable[[dict[str, Any]], None]) -> None:
    deployment = resources(VALUES["cpu"])["Deployment"]
    break_it(deployment["spec"]["template"]["spec"])
    with pytest.raises(validator.ValidationError):
        validator.validate(deployment, VERSIONS[-1], strict=True)
