"""Kills, stops and starves a service's processes while trainers sample, and checks every response.

`run.py` orders the phases of a run, and `record.py` holds its records. `load.py` makes the calls that `calls.py` draws,
`agents.py` takes the turns that `turns.py` draws, over HTTP. `publisher.py` publishes versions, `faults.py` causes the
events, `watch.py` tracks which engines are ready. `checks.py`, `trajectories.py` and `reference.py` check responses and
sessions, and `report.py` reports the findings.
"""
