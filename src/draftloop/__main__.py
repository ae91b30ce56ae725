"""`python -m draftloop` is the command line."""

from draftloop.cli.main import main

if __name__ == "__main__":
    main()
