"""What is in deploy/ agrees with the server. `.ci/observability` runs it."""

import re
import subprocess
import sys
from pathlib import Path

from ganserve_server.observe.metrics import Load, Metrics, Standstills

ROOT = Path(__file__).parents[2]
RULES = (ROOT / "deploy/prometheus/rules.yml").read_text()
DASHBOARD = ROOT / "deploy/grafana/dashboards/ganserve.json"


def test_each_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    cases = re.findall(
        r"alertname: (\w+)\n +exp_alerts:( \[\])?", (ROOT / "deploy/prometheus/rules_test.yml").read_text()
    )
    for alert in re.findall(r"- alert: (\w+)", RULES):
        assert {silent == "" for name, silent in cases if name == alert} == {True, False}


def test_the_committed_dashboard_is_what_its_program_prints() -> None:
    command = [sys.executable, ROOT / "deploy/grafana/dashboard.py"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == DASHBOARD.read_text()


def test_the_dashboard_shows_every_metric() -> None:
    dashboard = DASHBOARD.read_text() + RULES
    for metric in [*Metrics().registry.collect(), *Load(lambda: (0, 0)).collect(), *Standstills(lambda: 0.0).collect()]:
        if metric.name.startswith("ganserve_"):
            assert re.search(rf"\b{metric.name}(_total|_bucket)?\b", dashboard), f"nothing shows {metric.name}"
