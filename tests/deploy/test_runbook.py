"""The runbook, docs/operations/, has one form, a section for each alert, and an index of its pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / "docs/operations"
PAGES = sorted(page for page in RUNBOOK.glob("*.md") if page.name != "README.md")
RULES = (ROOT / "deploy/prometheus/rules.yml").read_text()


def _entries(page: Path) -> dict[str, list[str]]:
    """Return the bold words that begin the parts of each section, in their order."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    parts = re.compile(r"^\*\*(Symptom|When|Check|Do|Expect|Then)\*\*", re.MULTILINE)
    return {section.splitlines()[0]: parts.findall(section) for section in sections}


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES)
    assert alerts
    assert alerts == list(_entries(RUNBOOK / "alerts.md"))
    assert re.findall(r"runbook_url: (.+)", RULES) == [f"docs/operations/alerts.md#{alert.lower()}" for alert in alerts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_entry_goes_from_what_an_operator_sees_to_the_next_step(page: Path) -> None:
    entries = _entries(page)
    if page.name == "log.md":
        del entries["Fields of a call"], entries["Events"]
    assert entries
    for title, parts in entries.items():
        known = (["Symptom", "Check", "Expect", "Then"], ["When", "Do", "Expect", "Then"])
        assert parts in known, f"{page.name}, {title}"


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (RUNBOOK / "README.md").read_text()))
    assert linked == {page.name for page in PAGES}


def test_what_looks_for_a_status_in_the_log_says_in_which_lines() -> None:
    """A line about calls that are not logged, and one about an operator's call, have a status, too."""
    recipes = [recipe for page in PAGES for recipe in re.findall(r"select\(.*\.code [=!|].*", page.read_text())]
    assert recipes
    assert not [recipe for recipe in recipes if ".event" not in recipe]
