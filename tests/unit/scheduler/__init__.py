"""Tests of the scheduler, the liveness of nodes and the pure part of dispatch."""
