"""The round, written once: propose, verify, accept / recover / bonus, trim. Knows no framework, no text."""
