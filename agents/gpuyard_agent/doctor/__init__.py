"""`gpuyard doctor`: what this host can enforce, what is missing, and how to get it."""
