"""Devices and processes: mesh, fsdp, consistency, watchdog, preemption."""
