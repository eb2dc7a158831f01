"""Engines behind HTTP providers, and the transport to them.

`provider.Provider` is what an engine holds: it chooses an address (replicas), spares a backend that fails (breaker),
bounds what is in flight (limits), tries again (retrying) and speaks HTTP (connection, event_stream). `failures` turns
whatever went wrong into the tree of `service.engines.errors`. None of this knows what is asked or answered.
"""
