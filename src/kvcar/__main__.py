"""``python -m kvcar`` is the ``kvcar`` command."""

from .cli import main

main()
