"""The chart knows the server's settings, and has the project's version."""

import json
import re
import tomllib
from pathlib import Path

from ganserve_server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "ganserve"
# What templates/deployment.yaml sets.
OF_THE_CHART = {
    *("address", "metrics_address", "models", "drain_delay_s", "drain_timeout_s"),
    *("tls_certificate_file", "tls_key_file", "tls_client_ca_file", "tokens_file"),
}


def test_the_chart_takes_every_setting_and_no_other() -> None:
    settings = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]
    assert settings["additionalProperties"] is False
    assert settings["properties"].keys() | OF_THE_CHART == ServerSettings.model_fields.keys()
    for name, rule in settings["properties"].items():
        assert rule["description"] == ServerSettings.model_fields[name].description


def test_the_deployment_sets_what_the_schema_leaves_to_it() -> None:
    deployment = (CHART / "templates" / "deployment.yaml").read_text()
    assert {name.lower() for name in re.findall(r"name: GANSERVE_SERVER_(\w+),", deployment)} == OF_THE_CHART


def test_the_readme_of_the_chart_has_a_row_for_every_value() -> None:
    readme = (CHART / "README.md").read_text()
    for name in json.loads((CHART / "values.schema.json").read_text())["properties"].keys() - {"global"}:
        assert re.search(rf"^\| `{name}[`.]", readme, re.MULTILINE), f"the chart's README lacks {name}"


def test_the_chart_is_of_the_projects_version() -> None:
    """Helm wants both numbers in the file; the images get theirs as a build argument."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = (CHART / "Chart.yaml").read_text()
    assert re.findall(r"^(?:version|appVersion): (.*)$", chart, re.MULTILINE) == [version, version]
