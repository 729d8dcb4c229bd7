"""`python -m gpuyard.cli`: the same as the command `gpuyard`, where that is not on the PATH."""

from gpuyard.cli import main

main()
