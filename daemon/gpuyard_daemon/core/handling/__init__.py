"""From inputs to facts: what requests, reports and time bring about, decided without looking for places."""
