"""Unit tests of the Raft core, named after claims of the paper."""
