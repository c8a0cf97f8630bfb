"""Writes the dashboards and alert rules.

python -m observability.generate
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from observability.alerts import ALERTS, rules
from observability.dashboards import DASHBOARDS
from twinkle_serve.data_format.metrics import METRICS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "observability.md"
HEADER = "# Written by `python -m observability.generate`.\n"


def files() -> dict[Path, str]:
    """Returns the contents of all generated files, by path."""
    dashboards = {
        HERE / "grafana" / "dashboards" / f"{dashboard.name}.json": json.dumps(dashboard.json(), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }
    alerts = HEADER + yaml.safe_dump(rules(), sort_keys=False, width=120)
    page = _with_tables(PAGE.read_text(encoding="utf-8"))
    return {**dashboards, PAGE: page, HERE / "prometheus" / "alerts.yml": alerts}


def metrics_table() -> str:
    """Returns the table of metrics for the docs."""
    rows = []
    for metric in METRICS:
        tags = ", ".join(f"`{tag}`" for tag in metric.tags)
        rows.append(f"| `{metric.exported}` | {metric.kind} | {tags} | {metric.description} |")
    return "\n".join(["| metric | kind | tags | |", "| --- | --- | --- | --- |", *rows])


def alerts_table() -> str:
    """Returns the table of alerts for the docs."""
    rows = [
        f"| {alert.name} | `{' and '.join(map(str, alert.conditions))}` | {alert.lasts} | {alert.remedy} |"
        for alert in ALERTS
    ]
    return "\n".join(["| alert | condition | for | remedy |", "| --- | --- | --- | --- |", *rows]).replace("|d", "\\|d")


def _with_tables(page: str) -> str:
    """Returns the docs' page with both tables."""
    for name, table in (("metrics", metrics_table()), ("alerts", alerts_table())):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
