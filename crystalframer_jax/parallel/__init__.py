"""Devices and processes that share the work, and end together."""
