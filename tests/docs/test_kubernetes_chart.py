"""The Helm chart, rendered by Helm itself: valid objects, a config that Chiron reads, and no right too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from chiron.config.serve import ServeConfig, parse_serve
from chiron.engines.staged import head, stage
from chiron.fleet.kubernetes.source import KubernetesSource
from render_manifests import CHART, DEPLOY, plain, render
from yaml_loader import LOADER

helm_python = pytest.importorskip("helm_python")

Values = dict[str, Any]
EVERYTHING: Values = {
    "advise": True,
    "imagePullSecrets": [{"name": "registry"}],
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "storage": {"storageClassName": "fast"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}}]},
    "dashboards": {"enabled": True},
    "engine": {"enabled": True, "gpus": 2, "resources": {"limits": {"memory": "64Gi"}}},
    "staged": {
        "enabled": True,
        "monitors": [{"namespaceSelector": {}}],
        "hpa": {"behavior": {"scaleDown": {}}},
        "certificateSecret": "stages-tls",
    },
}
KINDS: Values = {
    "config": {
        "server": {"port": 9000, "grace": "1m"},
        "policies": {"mine": {"policy": "chiron", "hold": "2m", "itl_margin": 0.5, "tick": "5s"}},
        "models": {
            "llama-3.1-8b": None,
            "two": {
                "max_instances": 1000000,
                "instances": [
                    {"engine": "vllm", "name": "a", "kubernetes": {"deployment": "a", "scaler": "external"}},
                    {"engine": "vllm", "name": "b", "kubernetes": {"statefulset": "b", "namespace": "other"}},
                ],
            },
            "three": {"engine": "vllm", "kubernetes": {"leaderworkerset": "c"}},
        },
    }
}


MODELS_ONLY: Values = {
    "config": {"kubernetes": {"namespace": "llm"}, "models": {"llama-3.1-8b": None}},
    "chironModels": {"workloads": ["deployments", "leaderworkersets"]},
}


SEVERAL: Values = {
    "config": {
        "server": {"grace": "1m"},
        "store": {"url": "postgresql://chiron@db/chiron"},
        "gateways": {"elect": "kubernetes", "lease": "3s"},
    },
    "gateways": {
        "replicas": 3,
        "certificateSecret": "chiron-gateways",
        "databaseSecret": {"name": "chiron-db"},
    },
    "networkPolicy": {"enabled": True},
    "storage": {"storageClassName": "fast"},
}


def objects(values: Values) -> list[dict[str, Any]]:
    return [item for text in render(values).values() for item in yaml.load_all(text, LOADER) if item]


def one(values: Values, kind: str) -> dict[str, Any]:
    (found,) = [item for item in objects(values) if item["kind"] == kind]
    return found


def config_of(values: Values, directory: Path) -> ServeConfig:
    (text,) = [item["data"]["chiron.toml"] for item in objects(values) if "chiron.toml" in item.get("data", {})]
    return parse_serve(text, directory=directory)


def test_the_plain_manifests_are_made_from_it() -> None:
    for name, text in plain().items():
        assert (DEPLOY / "kubernetes" / name).read_text() == text, "run tools/render_manifests.py"


def test_helm_has_nothing_to_say_about_it() -> None:
    for values in ({}, EVERYTHING, KINDS, MODELS_ONLY, SEVERAL):
        report = helm_python.lint(str(CHART), values, strict=True, kube_version="v1.34.0")
        assert report["errors"] == []
        assert [each for each in report["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize(
    "values",
    [{}, EVERYTHING, KINDS, MODELS_ONLY, SEVERAL],
    ids=["defaults", "everything", "kinds", "models", "several gateways"],
)
@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_every_object_is_valid(values: Values, version: str) -> None:
    found = objects(values)
    names = [(item["kind"], item["metadata"]["name"], item["metadata"].get("namespace")) for item in found]
    assert len(set(names)) == len(names) >= 8
    for item in found:
        if "coreos" not in item["apiVersion"]:  # Its schema is the Prometheus operator's.
            kubernetes_validate.validate(item, version, strict=True)


def test_numbers_of_the_config_stay_what_they_are(tmp_path: Path) -> None:
    config = config_of(KINDS, tmp_path)
    assert config.server.port == 9000
    assert {model.name: model.max_instances for model in config.models}["two"] == 1000000
    container = one(KINDS, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": 9000, "protocol": "TCP"}]


def test_rights_are_those_that_the_named_workloads_need() -> None:
    roles = [item for item in objects(KINDS) if item["kind"] == "Role"]
    rights = {
        (role["metadata"].get("namespace"), resource, name, *rule["verbs"])
        for role in roles
        for rule in role["rules"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [None])
    }
    look = ("get", "list", "watch")
    assert rights == {
        (None, "deployments", "a", *look),
        (None, "deployments/scale", "a", "get"),  # KEDA scales it.
        (None, "leaderworkersets", "c", *look),
        (None, "leaderworkersets/scale", "c", "get", "update"),
        (None, "pods", None, "list", "watch", "patch", "delete"),
        (None, "events", None, "create"),
        ("other", "statefulsets", "b", *look),
        ("other", "statefulsets/scale", "b", "get", "update"),
        ("other", "pods", None, "list", "watch", "patch", "delete"),
        ("other", "events", None, "create"),
    }
    for binding in [item for item in objects(KINDS) if item["kind"] == "RoleBinding"]:
        expected = {"kind": "ServiceAccount", "name": "chiron"}
        expected |= {"namespace": "default"} if "namespace" in binding["metadata"] else {}
        assert binding["subjects"] == [expected]


def test_models_as_resources_need_their_own_rights_and_no_more(tmp_path: Path) -> None:
    assert config_of({"config": {"kubernetes": {}}}, tmp_path).kubernetes is not None
    config = config_of(MODELS_ONLY, tmp_path)
    assert config.kubernetes is not None
    assert (config.kubernetes.namespace, config.models) == ("llm", ())
    role = one(MODELS_ONLY, "Role")
    assert role["metadata"]["namespace"] == "llm"
    rights = {(resource, *rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}
    assert rights == {
        ("chironmodels", "get", "list", "watch"),
        ("chironmodels/status", "patch"),
        ("deployments", "get", "list", "watch"),
        ("deployments/scale", "get", "update"),
        ("leaderworkersets", "get", "list", "watch"),
        ("leaderworkersets/scale", "get", "update"),
        ("pods", "list", "watch", "patch", "delete"),
        ("events", "create"),
    }
    advised = one({**MODELS_ONLY, "advise": True}, "Role")
    assert {v for rule in advised["rules"] for v in rule["verbs"]} == {"get", "list", "watch", "patch"}
    assert [r["resources"] for r in advised["rules"] if "patch" in r["verbs"]] == [["chironmodels/status"]]


def test_in_advise_mode_it_may_change_nothing() -> None:
    verbs = {verb for rule in one(EVERYTHING, "Role")["rules"] for verb in rule["verbs"]}
    assert verbs == {"get", "list", "watch"}
    (gateway,) = [i for i in objects(EVERYTHING) if i["kind"] == "Deployment" and i["metadata"]["name"] == "chiron"]
    assert gateway["spec"]["template"]["spec"]["containers"][0]["args"][-1] == "--advise"


@pytest.mark.parametrize(("grace", "seconds"), [(None, 60), ("1m30s", 120), (45, 75), ("500ms", 31), ("2h", 7230)])
def test_kubernetes_waits_for_as_long_as_the_gateway_may_take_to_end(grace: str | int | None, seconds: int) -> None:
    deployment = one({"config": {"server": {"grace": grace}}} if grace is not None else {}, "Deployment")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds


def test_batch_work_outlives_an_installation_unless_told_otherwise() -> None:
    kept, loose = one({}, "PersistentVolumeClaim"), one({"storage": {"keep": False}}, "PersistentVolumeClaim")
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in loose["metadata"]


def test_several_gateways_have_names_and_directories_of_their_own_and_know_one_another(tmp_path: Path) -> None:
    made = objects(SEVERAL)
    gateways = one(SEVERAL, "StatefulSet")
    assert [item for item in made if item["kind"] in ("Deployment", "PersistentVolumeClaim")] == []
    assert gateways["spec"]["replicas"] == 3
    (claim,) = gateways["spec"]["volumeClaimTemplates"]
    assert (claim["metadata"]["name"], claim["spec"]["storageClassName"]) == ("data", "fast")
    pod = gateways["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][-4:] == [
        *("--set", "gateways.name=$(POD_NAME)"),
        *("--set", "gateways.advertise=$(POD_NAME).chiron-gateways.default.svc:9443"),
    ]
    assert container["env"][0]["name"] == "POD_NAME"
    (peers,) = [item for item in made if item["kind"] == "Service" and item["metadata"]["name"] == "chiron-gateways"]
    assert gateways["spec"]["serviceName"] == peers["metadata"]["name"]
    assert (peers["spec"]["clusterIP"], peers["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert one(SEVERAL, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    (spread,) = pod["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert spread["labelSelector"] == gateways["spec"]["selector"]
    assert "topologySpreadConstraints" not in one({}, "Deployment")["spec"]["template"]["spec"]
    paths = {volume["name"]: volume["mountPath"] for volume in container["volumeMounts"]}
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert secrets == {"certificates": "chiron-gateways", "database": "chiron-db"}
    config = config_of(SEVERAL, tmp_path)
    assert config.gateways is not None
    assert (config.gateways.elect, config.gateways.lease_s, config.gateways.listen) == (
        "kubernetes",
        3.0,
        "0.0.0.0:9443",
    )
    files = [config.gateways.certificate, config.gateways.key, config.gateways.ca]
    assert [str(file) for file in files] == [
        f"{paths['certificates']}/{name}" for name in ("tls.crt", "tls.key", "ca.crt")
    ]
    assert str(config.store.password_file) == f"{paths['database']}/password"


def test_several_gateways_may_write_the_lease_that_elects_them_and_no_other() -> None:
    (role,) = [i for i in objects(SEVERAL) if i["kind"] == "Role" and i["metadata"]["name"] == "chiron-leader"]
    assert [(rule.get("resourceNames"), rule["verbs"]) for rule in role["rules"]] == [
        (None, ["create"]),
        (["chiron"], ["get", "update"]),
    ]
    config = {**SEVERAL["config"], "gateways": {"elect": "kubernetes", "kubernetes_namespace": "leases"}}
    made = [i for i in objects({**SEVERAL, "config": config}) if i["metadata"]["name"] == "chiron-leader"]
    assert [(i["kind"], i["metadata"]["namespace"]) for i in made] == [("Role", "leases"), ("RoleBinding", "leases")]
    assert made[1]["subjects"] == [{"kind": "ServiceAccount", "name": "chiron", "namespace": "default"}]
    by_database = {**SEVERAL, "config": {"store": {"url": "postgresql://chiron@db/chiron"}}}
    assert [i for i in objects(by_database) if i["metadata"]["name"] == "chiron-leader"] == []


def test_several_gateways_without_what_they_share_are_refused() -> None:
    without = {"gateways": {"replicas": 2, "certificateSecret": "c"}}
    with pytest.raises(Exception, match=r"config\.store\.url must name the PostgreSQL that they share"):
        objects(without)
    with pytest.raises(Exception, match="certificateSecret"):
        objects({"config": {"store": {"url": "postgresql://db/c"}}, "gateways": {"replicas": 2}})


def test_the_one_that_is_left_of_several_gateways_is_one_of_them() -> None:
    """Nothing changes but their number: two workloads would be two leaders for a while."""
    values = {**SEVERAL, "gateways": {**SEVERAL["gateways"], "replicas": 1}}
    three, left = objects(SEVERAL), objects(values)
    (several,) = [item for item in three if item["kind"] == "StatefulSet"]
    (single,) = [item for item in left if item["kind"] == "StatefulSet"]
    assert (several["spec"].pop("replicas"), single["spec"].pop("replicas")) == (3, 1)
    for made, key in ((three, "maxUnavailable"), (left, "minAvailable")):
        (budget,) = [item for item in made if item["kind"] == "PodDisruptionBudget"]
        assert budget["spec"].pop(key) == 1
    assert three == left


def test_without_certificates_one_gateway_needs_nothing_of_several(tmp_path: Path) -> None:
    values = {**SEVERAL, "gateways": {**SEVERAL["gateways"], "replicas": 1, "certificateSecret": ""}}
    config = config_of(values, tmp_path)
    assert config.gateways is None
    assert str(config.store.password_file) == "/etc/chiron-database/password", "its batches stay in the database"
    assert one(values, "Deployment")["spec"]["replicas"] == 1


def test_one_of_several_that_ends_serves_until_nobody_is_sent_there() -> None:
    def pod(**gateways: Any) -> dict[str, Any]:
        values = {**SEVERAL, "gateways": {**SEVERAL["gateways"], **gateways}}
        return dict(one(values, "StatefulSet")["spec"]["template"]["spec"])

    for about, waits_s in (({}, 5), ({"preStopSeconds": 20}, 20)):
        hook = pod(**about)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook == ["sleep", str(waits_s)]
        assert pod(**about)["terminationGracePeriodSeconds"] == 90 + waits_s, "beside what its requests may take"
    assert "lifecycle" not in one({}, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def test_names_by_which_gateways_cannot_be_reached_are_refused() -> None:
    assert render(SEVERAL, name="r" * 30, namespace="n" * 16)
    with pytest.raises(Exception, match=r"which has 107 characters; 100 are allowed: give the release a shorter name"):
        render(SEVERAL, name="r" * 35, namespace="n" * 20)


def test_the_numbers_of_several_gateways_are_read_once() -> None:
    values = {**SEVERAL, "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}
    made = [item for item in objects(values) if "coreos" in item["apiVersion"]]
    assert [item["kind"] for item in made] == ["ScrapeConfig"], "each pod would tell the leader's numbers"
    spec = made[0]["spec"]
    (service,) = [i for i in objects(values) if i["kind"] == "Service" and i["metadata"]["name"] == "chiron"]
    assert spec["staticConfigs"][0]["targets"] == [f"chiron.default.svc:{service['spec']['ports'][0]['port']}"]
    assert spec["authorization"] == {"credentials": {"name": "chiron-admin", "key": "token"}}


def test_only_gateways_reach_the_leader_where_the_network_has_policies() -> None:
    (policy,) = [i for i in objects(SEVERAL) if i["kind"] == "NetworkPolicy" and i["metadata"]["name"] == "chiron"]
    (inside,) = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "gateways"}]]
    labels = one(SEVERAL, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert inside["from"] == [{"podSelector": {"matchLabels": labels}}]


def test_another_config_is_another_pod() -> None:
    def mark(values: Values) -> str:
        return str(one(values, "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert mark({}) == mark({"service": {"port": 81}}) != mark(KINDS)


def test_the_example_engine_has_gpus_or_none_and_keeps_its_number_of_replicas(tmp_path: Path) -> None:
    def engine(**about: Any) -> dict[str, Any]:
        values = {"engine": {"enabled": True, **about}}
        (found,) = [i for i in objects(values) if i["kind"] == "Deployment" and i["metadata"]["name"] == "vllm"]
        return found

    (source,) = [kind.source for kind in config_of({}, tmp_path).models[0].kinds]
    assert isinstance(source, KubernetesSource)
    assert source.name == engine()["metadata"]["name"]
    assert "replicas" not in engine()["spec"]
    for about, resources in (
        ({}, {"limits": {"nvidia.com/gpu": "1"}}),
        ({"gpus": 0}, None),
        ({"gpus": 0, "resources": {"requests": {"cpu": "8"}}}, {"requests": {"cpu": "8"}}),
        ({"gpus": 2, "resources": {"limits": {"memory": "9Gi"}}}, {"limits": {"memory": "9Gi", "nvidia.com/gpu": "2"}}),
    ):
        assert engine(**about)["spec"]["template"]["spec"]["containers"][0].get("resources") == resources


STAGES: Values = {
    "staged": {
        "enabled": True,
        "servedModelName": "m",
        "args": ["--kv-gb", "20"],
        "stages": [
            {"layers": "0-3", "min": 2, "max": 5, "gpus": 1, "resources": {"limits": {"memory": "9Gi"}}},
            {"layers": "4-7", "args": ["--dtype", "float32"], "gpus": 0},
        ],
    }
}


def staged(values: Values) -> dict[tuple[str, str], dict[str, Any]]:
    named = {(item["kind"], item["metadata"]["name"]): item for item in objects(values)}
    return {key: item for key, item in named.items() if key[1].startswith("staged")}


def container_of(item: dict[str, Any]) -> dict[str, Any]:
    (found,) = item["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_every_stage_is_scaled_by_itself_and_found_by_its_name() -> None:
    found = staged(STAGES)
    names = ["staged-0-3", "staged-4-7"]
    assert sorted(found) == sorted(
        [(kind, name) for kind in ("Deployment", "Service", "HorizontalPodAutoscaler") for name in names]
        + [("Deployment", "staged-head"), ("Service", "staged-head")]
    )
    for name, least, most in zip(names, (2, 1), (5, 1), strict=True):
        deployment, service = found["Deployment", name], found["Service", name]
        scaler = found["HorizontalPodAutoscaler", name]["spec"]
        assert "replicas" not in deployment["spec"], "whoever applied it again would scale it"
        assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert (scaler["minReplicas"], scaler["maxReplicas"]) == (least, most)
        assert scaler["metrics"][0]["pods"]["metric"]["name"] == "chiron_stage_utilisation"
        assert service["spec"]["clusterIP"] == "None"
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        (port,) = container_of(deployment)["ports"]
        assert service["spec"]["ports"][0]["targetPort"] == port["name"]
        (model, _) = deployment["spec"]["template"]["spec"]["volumes"]
        assert model == {"name": "model", "persistentVolumeClaim": {"claimName": "model", "readOnly": True}}
    fixed = staged({"staged": {**STAGES["staged"], "hpa": {"enabled": False}, "volume": {"emptyDir": {}}}})
    (model, _) = fixed["Deployment", "staged-head"]["spec"]["template"]["spec"]["volumes"]
    assert model == {"name": "model", "emptyDir": {}}
    assert fixed["Deployment", "staged-0-3"]["spec"]["replicas"] == 2
    assert not [kind for kind, _ in fixed if kind == "HorizontalPodAutoscaler"]


def test_the_commands_of_stages_and_head_are_read_by_them() -> None:
    found = staged(STAGES)
    for name, layers, device in (("staged-0-3", "0-3", "cuda"), ("staged-4-7", "4-7", "cpu")):
        first, second, model, *rest = container_of(found["Deployment", name])["args"]
        assert (first, second) == ("stages", "serve")
        options = stage.parse_options(["--model", model, *rest])
        assert (options.layers, options.device, options.port, options.kv_gb) == (layers, device, 9000, 20.0)
        grace_s = found["Deployment", name]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > options.grace
    assert options.dtype == "float32"
    assert container_of(found["Deployment", "staged-0-3"])["resources"] == {
        "limits": {"memory": "9Gi", "nvidia.com/gpu": "1"}
    }
    _, command, model, *rest = container_of(found["Deployment", "staged-head"])["args"]
    options = head.parse_options(["--model", model, *rest])
    assert command == "head"
    assert options.discover > 0
    ranges, addresses = head.read_stages(options.stage, 8)
    assert [str(each) for each in ranges] == ["0-3", "4-7"]
    assert addresses == [["staged-0-3:9000"], ["staged-4-7:9000"]]
    assert options.served_model_name == ["m"]


def test_head_and_stages_show_one_another_certificates_of_a_secret() -> None:
    values = {"staged": {**STAGES["staged"], "certificateSecret": "stages-tls"}, "serviceMonitor": {"enabled": True}}
    found = staged(values)
    for name, parse in (("staged-0-3", stage), ("staged-4-7", stage), ("staged-head", head)):
        pod = found["Deployment", name]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "certificates"]
        (secret,) = [v["secret"]["secretName"] for v in pod["volumes"] if v["name"] == "certificates"]
        _, _, model, *rest = container["args"]
        options = parse.parse_options(["--model", model, *rest])
        assert secret == "stages-tls"
        assert [str(each) for each in (options.tls_cert, options.tls_key, options.tls_ca)] == [
            f"{mount}/{file}" for file in ("tls.crt", "tls.key", "ca.crt")
        ]
        probe = container["readinessProbe"]
        assert ("httpGet" in probe) == (name == "staged-head"), "a kubelet has no certificate that a stage takes"
    (endpoint,) = found["PodMonitor", "staged-stages"]["spec"]["podMetricsEndpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]["serverName"]) == ("https", "staged-0-3")
    plain = staged(STAGES)["Deployment", "staged-0-3"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in plain["volumes"]] == ["model", "tmp"]
    assert not [word for word in plain["containers"][0]["args"] if "tls" in word]


def test_only_the_gateway_may_ask_the_api_server() -> None:
    values = {**EVERYTHING, "advise": False}
    pods = {i["metadata"]["name"]: i["spec"]["template"]["spec"] for i in objects(values) if i["kind"] == "Deployment"}
    assert {name for name, pod in pods.items() if pod.get("automountServiceAccountToken", True)} == {"chiron"}
    assert len(pods) == 5


def test_the_monitor_sends_the_admin_key_and_the_dashboard_is_the_one_that_ships() -> None:
    (endpoint,) = one(EVERYTHING, "ServiceMonitor")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert endpoint["authorization"] == {"credentials": {"name": "chiron-admin", "key": "token"}}
    (shown,) = [item for item in objects(EVERYTHING) if item["metadata"]["name"] == "chiron-dashboards"]
    assert json.loads(shown["data"]["chiron.json"]) == json.loads((DEPLOY / "grafana-dashboard.json").read_text())


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 2},
        {"config": {"server": {"port": "80"}}},
        {"config": {"models": {"m": {"kubernetes": {"deployment": "a", "statefulset": "b"}}}}},
        {"config": {"models": {"m": {"kubernetes": {"deployment": "A_b"}}}}},
        {"config": {"models": {"m": {"instances": [{"kubernetes": {"deployment": "a", "scaler": "keda"}}]}}}},
        {"storage": {"size": "much"}},
        {"config": {"models": {"llama-3.1-8b": None}}},
        {"chironModels": {"workloads": ["pods"]}},
        {"serviceMonitor": {"interval": "often"}},
        {"engine": {"gpus": -1}},
        {"image": {"tag": 1}},
        {"staged": {"enabled": True, "stages": [{"layers": "0-3", "min": 3, "max": 2}]}},
        {"staged": {"enabled": True, "stages": [{"layers": "first"}]}},
        {"staged": {"enabled": True, "stages": []}},
        {"staged": {"hpa": {"metric": "cpu"}}},
        {"staged": {"certificateSecret": "Not A Name"}},
        {"gateways": {"preStopSeconds": -1}},
    ],
)
def test_values_that_cannot_be_meant_are_refused(wrong: Values) -> None:
    with helm_python.Chart.load(str(CHART)) as chart, pytest.raises(helm_python.HelmError):
        chart.render(wrong, name="chiron", namespace="default")
