"""Timeouts and periods whose order matters, in seconds. The inequalities between them are asserted at the end."""

from __future__ import annotations

# Between a router and its engines.

PROBE_PERIOD_S = 2.0
"""How often a router asks each engine for its state."""
PROBE_TIMEOUT_S = 15.0
"""An engine that does not answer within this time is lost. Serve itself keeps a call to a dead replica until the
replica is replaced."""
ROUTER_LEASE_S = 15.0
"""An engine aborts a router's groups when the router has not called it for so long."""
ENGINE_PAUSE_LEASE_S = 30.0
"""An engine ends its pause when no router has asked for its state for so long."""
REMOVED_ENGINE_GRACE_S = 5.0
"""How long an engine that was taken out of the service may finish its groups."""
ENGINE_SHUTDOWN_S = 8.0
"""Serve ends the process of a removed engine after this time. On Ctrl-C, samples without a router last until then."""
LATE_TIMER_S = 1.0
"""A timer that fires this late shows that the process was stalled; a lease is then extended, since its renewal may be
waiting behind the stall."""

# Between a caller and its router.

ROUTER_GRACE_S = 10.0
"""The router enforces deadlines; a caller waits this much longer before it takes the router for gone. A router that
dies ends every call at once; one that cannot be replaced shows only by this."""
ANSWER_TIMEOUT_S = 60.0
"""Timeout for trivial calls."""
CONTROL_TIMEOUT_S = 600.0
"""Timeout for calls that sample nothing. The longest of them loads an adapter on every engine."""
CALL_LEASE_S = 60.0
"""A router gives a call up when its caller has not renewed it for so long. Callers renew four times as often."""
FUTURES_LEASE_S = 120.0
"""A router gives up calls that nobody waits for when their session has been silent for so long."""
FUTURES_RETRY_S = 1.0
"""When to send a call again that was refused because results wait to be collected."""
UPLOAD_LEASE_S = 60.0
"""A router gives an update of weights up when its trainer has sent nothing for so long: it is gone."""
MAX_PAUSE_LEASE_S = 3600.0
"""The longest lease of a pause."""

# Between processes and Serve.

CONTROLLER_TIMEOUT_S = 30.0
"""A Serve controller that is silent for longer is not being replaced: its cluster is gone. On two busy cores a process
of Serve is back after 10 to 17 s."""
CLUSTER_LOSS_S = 60.0
"""Ray ends a process whose cluster has been gone for this long."""
STORE_TIMEOUT_S = 120.0
"""How long routers and engines wait for the store, which Serve replaces when it dies."""

assert PROBE_PERIOD_S < ROUTER_LEASE_S, "a router renews its lease with each probe"
assert PROBE_PERIOD_S + PROBE_TIMEOUT_S < ENGINE_PAUSE_LEASE_S, "one slow answer must not end a pause"
assert REMOVED_ENGINE_GRACE_S < ENGINE_SHUTDOWN_S, "a router takes its groups back before the process ends"
assert ROUTER_GRACE_S < CONTROLLER_TIMEOUT_S < CLUSTER_LOSS_S, "a caller must report a lost cluster before Ray ends it"
assert ROUTER_GRACE_S < ANSWER_TIMEOUT_S < CONTROL_TIMEOUT_S
assert 2 * CONTROLLER_TIMEOUT_S <= CALL_LEASE_S, "a call outlives the replacement of its router"
assert CALL_LEASE_S < FUTURES_LEASE_S, "HTTP clients are silent while a gateway is being replaced"
assert CONTROLLER_TIMEOUT_S < STORE_TIMEOUT_S < CONTROL_TIMEOUT_S, "a store may be replaced within a control call"
