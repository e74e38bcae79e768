"""The leader's decisions: where sandboxes go, which nodes live, what agents are told."""
