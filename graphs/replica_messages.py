"""Replicas' log records for the launcher's terminal."""

from __future__ import annotations

import re

RECORD = re.compile(
    r"\(ServeReplica:(?P<application>[^:]+):(?P<deployment>\S+) (?P<process>pid=\d+(?:, ip=\S+?)?)\) (?P<line>.*)"
)
"""A line that Ray prints for a replica, on its driver."""

SERVE_FORMAT = re.compile(
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d{4}-\d\d-\d\d (?P<time>\d\d:\d\d:\d\d),\d+ .*? -- (?P<message>.*)"
)
"""A line that Serve's log formatter begins a record with."""

CHAINED = ("Traceback (most", "During handling of", "The above exception")


class ReplicaMessages:
    """Picks from a driver's output what replicas of the applications log at WARNING or above, tracebacks included."""

    def __init__(self) -> None:
        self._expects: dict[str, str] = {}
        """Expected next line, by process: "more" or "traceback"."""

    def of(self, line: str) -> str | None:
        """The line as the terminal shows it; None if it is not shown."""
        match = RECORD.fullmatch(line)
        if match is None:
            return None
        process, text = match["process"], match["line"]
        if record := SERVE_FORMAT.fullmatch(text):
            self._expects.pop(process, None)
            if record["level"] in ("DEBUG", "INFO"):
                return None
            self._expects[process] = "more"
            source = f"{match['application']} {match['deployment']}"
            level = "" if record["level"] == "WARNING" else f"{record['level'].lower()}: "
            return f"{record['time']}  {source}  {level}{record['message']}"
        expected = self._expects.get(process)
        if expected is None:
            return None
        if text.startswith(CHAINED):
            self._expects[process] = "traceback"
        elif text.startswith((" ", "\t")) or not text:
            pass
        elif expected == "traceback":  # its last line: the exception
            self._expects[process] = "more"
        else:
            del self._expects[process]
            return None
        return f"    {text}" if text else None
