"""Grafana's dashboards as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

WIDTH = 24
"""Columns of Grafana's grid."""
PANEL_WIDTH, PANEL_HEIGHT = 8, 7
STAT_WIDTH, STAT_HEIGHT = 4, 4

SOURCE = {"type": "prometheus", "uid": "twinkle-serve-prometheus"}
"""The data source that provisioning makes."""


@dataclass(frozen=True, slots=True)
class Query:
    """A line of a panel, or several where its expression has tags."""

    expression: str
    legend: str = ""
    """Of each line, with tags as `{{engine}}`."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart, or a number."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """One of Grafana's units."""
    description: str = ""
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    stacked: bool = False
    most: float | None = None
    """Upper end of the axis."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels, over the applications that its variable selects."""

    name: str
    """Of its file and in its URL."""
    title: str
    applications: str
    """Series whose tag `application` the variable offers."""
    panels: Sequence[Panel]

    def json(self) -> dict[str, Any]:
        """Returns what Grafana imports."""
        return {
            "uid": f"twinkle-serve-{self.name}",
            "title": self.title,
            "tags": ["twinkle-serve"],
            "timezone": "browser",
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "editable": True,
            "graphTooltip": 1,
            "schemaVersion": 39,
            "links": [
                {
                    "title": "Twinkle Serve",
                    "type": "dashboards",
                    "tags": ["twinkle-serve"],
                    "asDropdown": False,
                    "keepTime": True,
                }
            ],
            "templating": {"list": [self._variable()]},
            "panels": [
                _panel(i + 1, panel, place)
                for i, (panel, place) in enumerate(zip(self.panels, _places(self.panels), strict=True))
            ],
        }

    def _variable(self) -> dict[str, Any]:
        query = f"label_values({self.applications}, application)"
        return {
            "name": "application",
            "label": "Application",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": "application"},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _places(panels: Sequence[Panel]) -> list[dict[str, int]]:
    """Returns the place of each panel: rows from left to right, each as high as its first panel."""
    places, x, y, height = [], 0, 0, 0
    for panel in panels:
        w, h = (STAT_WIDTH, STAT_HEIGHT) if panel.kind == "stat" else (PANEL_WIDTH, PANEL_HEIGHT)
        if x + w > WIDTH or (x and h != height):
            x, y = 0, y + height
        places.append({"x": x, "y": y, "w": w, "h": h})
        x, height = x + w, h
    return places


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or panel.title,
            }
            for i, query in enumerate(panel.queries)
        ],
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
    if panel.kind == "state-timeline":
        return {"showValue": "never", "mergeValues": True}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
