"""What the yard knows: records, the facts that change them, and the one writer that applies facts."""
