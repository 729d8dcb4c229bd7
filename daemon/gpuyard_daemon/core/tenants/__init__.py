"""What tenants and queues may hold: policy, quotas, limits, and the books of what they hold and have used."""
