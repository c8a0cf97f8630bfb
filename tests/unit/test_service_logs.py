"""The service's log of one test, for its report."""

from __future__ import annotations

from pathlib import Path

from tests.support import service_logs


def test_log_of_a_test_is_what_was_appended_while_it_ran() -> None:
    """Of every log of a running cluster that has grown, its end; nothing of tests before, and none of other files."""
    with service_logs.cluster_directory() as directory:
        logs = Path(directory) / "session_latest" / "logs"
        (logs / "serve").mkdir(parents=True)
        router, worker, quiet = logs / "serve" / "router.log", logs / "worker-1.err", logs / "worker-2.err"
        for path in (router, worker, quiet, logs / "raylet.out"):
            path.write_text("before\n")
        service_logs.mark()
        assert service_logs.since_mark() == ""
        for path in (router, worker, logs / "raylet.out"):
            with path.open("a") as file:
                file.writelines(f"line {number}\n" for number in range(100))
        text = service_logs.since_mark()
        assert text.count("100 lines") == 2 and "== router.log" in text and "== worker-1.err" in text
        assert text.count("line 99\n") + text.endswith("line 99") == 2
        assert "before" not in text and "line 0\n" not in text and "raylet" not in text
    service_logs.mark()
    assert not Path(directory).exists() and service_logs.since_mark() == ""
