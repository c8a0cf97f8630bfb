"""Kills, stops and starves a service's processes while trainers sample, and checks every response.

`run.py` orders the phases of a run, and `record.py` holds its records. `load.py` makes the calls that `calls.py` draws,
`publisher.py` publishes versions, `faults.py` causes the events, `watch.py` tracks which engines are ready. `checks.py`
and `reference.py` check the responses, and `report.py` reports the findings.
"""
