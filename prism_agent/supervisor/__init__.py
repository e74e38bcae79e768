"""The supervisor: PID 1 of every sandbox (C), and the agent's side of talking to it."""
