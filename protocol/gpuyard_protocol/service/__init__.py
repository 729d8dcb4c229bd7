"""What the long-running processes of a yard do alike: read their settings, speak to systemd, open a page."""
