"""`python -m twinkle_serve.cli`, where no program `twinkle-serve` is installed."""

from twinkle_serve.cli import main

main()
