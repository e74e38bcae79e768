"""What a control node keeps on disk: identity, Raft's log and hard state, and snapshots."""
