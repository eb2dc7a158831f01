"""Engines make tokens. A library: no HTTP server, no Settings, no metrics registry."""
