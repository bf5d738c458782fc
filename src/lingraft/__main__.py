"""`python -m lingraft`, the form that `torchrun -m lingraft` and `accelerate launch -m lingraft` need."""

from lingraft.cli import main

main()
