"""torchao: the wire, its configs, what it says in headers, and which config a weight has."""
