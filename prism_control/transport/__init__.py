"""Raft between control nodes: messages and snapshots over gRPC."""
