"""`python -m prism_cli`."""

from prism_cli.main import main

main()
