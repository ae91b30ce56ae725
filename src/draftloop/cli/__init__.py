"""The command line: one file a command; parse, call, print. The only place that knows rich and typer.

Where to look: `main.py` has the global options and turns errors into exit statuses; `options.py` the flags
that commands share; `console.py`, `progress.py`, `answer.py` and `figures.py` what is shown and how.
"""
