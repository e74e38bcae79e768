"""`prismctl bench`: load on a cluster, and what came of it."""
