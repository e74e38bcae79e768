"""Pure, deterministic Raft core: no I/O, no clock, no global randomness."""
