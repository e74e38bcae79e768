"""What sandboxes have of a network: ports into them, and what they may reach outside."""
