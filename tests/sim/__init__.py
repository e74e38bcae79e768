"""Deterministic simulation of a whole Raft cluster, from one seed."""
