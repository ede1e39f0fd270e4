"""``python -m chiron``: the command line."""

from chiron.cli import main

if __name__ == "__main__":
    main()
