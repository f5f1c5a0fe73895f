"""`python -m twostroke` is the `twostroke` command."""

from twostroke.cli.main import main

main()
