"""`python -m oprd` and `accelerate launch -m oprd`."""

from oprd.cli import main

main()
