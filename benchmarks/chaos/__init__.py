"""Processes of a service are killed, stopped and starved while trainers sample, and every response is checked.

`run.py` has the order of it all, and `record.py` what is left of it. `load.py` makes the calls that `calls.py` draws,
`publisher.py` the versions, `faults.py` the events; `watch.py` sees which engines are ready. `checks.py` and
`reference.py` look at what came back, and `report.py` says what they found.
"""
