"""What people read: why a job waits, what would start it and when; lists and numbers. Changes nothing."""
