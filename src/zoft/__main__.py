"""``python -m zoft``."""

from zoft.cli import main

main()
