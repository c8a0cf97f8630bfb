"""Writes the dashboards and alert rules.

python -m observability.generate
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from observability.alerts import rules
from observability.dashboards import DASHBOARDS

HERE = Path(__file__).parent
HEADER = "# Written by `python -m observability.generate`.\n"


def files() -> dict[Path, str]:
    """Returns the contents of all generated files, by path."""
    dashboards = {
        HERE / "grafana" / "dashboards" / f"{dashboard.name}.json": json.dumps(dashboard.json(), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }
    alerts = HEADER + yaml.safe_dump(rules(), sort_keys=False, width=120)
    return {**dashboards, HERE / "prometheus" / "alerts.yml": alerts}


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
