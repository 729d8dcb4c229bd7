"""The node agent: carves the cards of one host, runs what the daemon orders, and reports what became of it."""
