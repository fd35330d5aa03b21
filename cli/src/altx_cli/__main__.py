"""`python -m altx_cli`."""

from altx_cli.main import main

main()
