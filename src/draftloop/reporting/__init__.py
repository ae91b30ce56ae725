"""What people look at: the HTML report and the figures of `stats`. Reads the store, changes nothing.

Where to look: `stored.py` reads, `figures.py` and `mistakes.py` count, `overview.py` and `trainings.py`
choose what is said, `charts.py` draws, `page.py` and `templates/` make the page.
"""
