"""One control node: the loop that drives Raft, the leader's duties, and the server around them."""
