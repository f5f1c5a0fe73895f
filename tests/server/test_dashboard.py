"""The Grafana dashboard asks only for metrics that a running engine exports."""

from __future__ import annotations

import json
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from fakes import FakeExecutor, make_parts
from loopback import run_server
from places import REPO
from twostroke.engine.async_llm import AsyncLLM

DASHBOARD = REPO / "docs" / "grafana" / "twostroke.json"


def find_exported() -> set[str]:
    """Names of the samples of an engine's page, as they are queried."""
    with run_server(AsyncLLM(make_parts(FakeExecutor()))) as url:
        page = httpx.get(f"{url}/metrics").text
    families = list(text_string_to_metric_families(page))
    labelled = {name.split()[2] for name in page.splitlines() if name.startswith("# TYPE")}
    return {sample.name for family in families for sample in family.samples} | labelled


def test_every_metric_of_the_dashboard_is_exported() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"twostroke_\w+", target["expr"])
    }
    assert len(asked) > 20
    assert asked - find_exported() == set()


def test_its_queries_are_balanced_and_its_panels_lie_apart() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            for left, right in ("()", "{}", "[]"):
                assert target["expr"].count(left) == target["expr"].count(right)
