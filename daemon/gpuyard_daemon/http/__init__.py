"""What the daemon shows over HTTP: metrics, health, readiness, and one plain page about the yard.

Read-only and without keys: it tells how the yard is, and nothing about any tenant's jobs.
"""
