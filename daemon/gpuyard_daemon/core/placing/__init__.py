"""Where work goes: what nodes have free, what fits them, and which of those that fit is best."""
