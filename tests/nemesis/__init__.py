"""Real control nodes in network namespaces, hurt while clients write and read."""
