"""Who is next: keys of jobs, what they rest on, and the order in which they are tried."""
