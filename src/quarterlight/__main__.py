"""``python -m quarterlight``, for launchers such as torchrun."""

from quarterlight.cli.main import main

main()
