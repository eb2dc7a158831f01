"""The inference service: engines at the bottom, then experiments, routing, the catalog, the HTTP API and the wiring."""
