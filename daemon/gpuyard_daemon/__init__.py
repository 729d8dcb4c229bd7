"""The head node's side of a yard: the scheduler daemon, its pure core, and the commands that bring a yard up."""
