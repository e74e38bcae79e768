"""Control plane of Prism: consensus, state, scheduling and the API."""
