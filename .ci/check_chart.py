"""Check what the chart promises in a folder's manifests: times that add up, a cage, and the rules of deploy/."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


def check(manifests: list[dict[str, Any]]) -> str:
    kinds = {manifest["kind"]: manifest for manifest in manifests}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    environment = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert len(environment) == len(server["env"]), "a variable is given twice"
    delay, timeout = (int(environment[f"GANSERVE_SERVER_DRAIN_{name}_S"]) for name in ("DELAY", "TIMEOUT"))
    grace = pod["terminationGracePeriodSeconds"]
    assert grace > delay + timeout, f"SIGKILL comes after {grace} s, amid {delay} + {timeout} s of draining"
    readiness = server["readinessProbe"]
    assert "httpGet" in readiness or "GANSERVE_SERVER_TLS_KEY_FILE" not in environment, "a gRPC probe speaks no TLS"
    liveness = server["livenessProbe"]
    assert liveness["httpGet"]["path"] == "/livez", "a server that drains must not be killed"
    assert liveness["periodSeconds"] * (liveness["failureThreshold"] - 1) > 5, (
        "a server ends itself first, and logs why"
    )
    assert liveness["terminationGracePeriodSeconds"] < grace, "a stuck server cannot drain"

    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [server, *pod.get("initContainers", [])]:
        cage = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == cage
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
    mounted = {mount["name"] for container in (server,) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}

    wanted = kinds["Deployment"]["spec"]["selector"]["matchLabels"].items()
    assert wanted <= kinds["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    services = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    assert [service["spec"].get("clusterIP") for service in services] == [None, "None"]
    assert all(service["spec"]["selector"].items() == wanted for service in services)
    scaled = "HorizontalPodAutoscaler" in kinds
    assert scaled == ("replicas" not in kinds["Deployment"]["spec"]), "two would say how many replicas there are"
    if "ServiceMonitor" in kinds:
        chosen = kinds["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        assert [chosen <= service["metadata"]["labels"].items() for service in services] == [False, True]
    if "PrometheusRule" in kinds:
        assert kinds["PrometheusRule"]["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    if "ConfigMap" in kinds:
        dashboard = json.loads(kinds["ConfigMap"]["data"]["ganserve.json"])
        assert dashboard == json.loads((DEPLOY / "grafana" / "dashboards" / "ganserve.json").read_text())
    return f"{', '.join(sorted(kinds))}; {delay} + {timeout} < {grace} s"


for file in sorted(Path(sys.argv[1]).glob("*.yaml")):
    print(f"{file.stem}: {check([manifest for manifest in yaml.safe_load_all(file.read_text()) if manifest])}")
